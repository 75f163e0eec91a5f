//! The dirty log by system calls alone, into words that are there already.

#![allow(unsafe_code, reason = "this is what the library is compared with")]

use std::hint::black_box;
use std::io;
use std::os::fd::AsFd;

use hv_core::MemoryBackend;
use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::Loop;
use crate::guest::{Guest, MEMORY, PAGE, SLOT};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

pub(crate) struct RawLog {
    guest: Guest,
    words: Vec<u64>,
    manual: bool,
}

impl RawLog {
    pub(crate) fn new(guest: Guest, manual: bool) -> Self {
        guest.vm.set_memory_slot(&guest.memory).unwrap();
        let words = vec![0; usize::try_from(MEMORY / PAGE / 64).unwrap()];
        Self { guest, words, manual }
    }
}

impl Loop for RawLog {
    fn write(&mut self, turn: u64) {
        self.guest.write(turn);
    }

    fn collect(&mut self) -> u64 {
        let vm = self.guest.vm.as_fd();
        let mut log = kvm_dirty_log { slot: SLOT.0, ..Default::default() };
        log.__bindgen_anon_1.dirty_bitmap = self.words.as_mut_ptr().cast();
        // SAFETY: KVM writes a bit for each page of the slot, for which there is room.
        checked(unsafe { ioctl_with_ref(&vm, KVM_GET_DIRTY_LOG(), &log) });
        if self.manual {
            let mut clear = kvm_clear_dirty_log { slot: SLOT.0, ..Default::default() };
            clear.num_pages = u32::try_from(MEMORY / PAGE).unwrap();
            clear.__bindgen_anon_1.dirty_bitmap = self.words.as_mut_ptr().cast();
            // SAFETY: KVM reads a bit for each page of the slot, and they are there.
            checked(unsafe { ioctl_with_ref(&vm, KVM_CLEAR_DIRTY_LOG(), &clear) });
        }
        let mut pages = 0;
        for (n, word) in self.words.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                black_box(n as u64 * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
                pages += 1;
            }
        }
        pages
    }
}

fn checked(result: i32) {
    assert!(result >= 0, "ioctl: {}", io::Error::last_os_error());
}
