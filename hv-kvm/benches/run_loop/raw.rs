//! The same guest by system calls alone: what a VMM would write that uses neither hv-kvm nor
//! kvm-ioctls. Setting it up does use kvm-ioctls; the loop is one ioctl and reads of the mapping.

#![allow(unsafe_code, reason = "this is what the traits are compared with")]

use std::hint::black_box;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_OUT, kvm_regs, kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::common::CODE;
use crate::{GUEST, Guest, PORT, VALUE};

/// Where VMX keeps the task state segment it needs for real mode.
pub(crate) const TSS: u64 = 0xfffb_d000;

/// `KVM_RUN`: `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::Ioctl = 0xae80;

const PAGE: usize = 4096;

/// A new mapping, or a panic with the errno.
fn map(len: usize, flags: i32, fd: i32) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    assert_ne!(start, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    start.cast()
}

/// A VM with one vCPU. Its mappings stay until the process ends, so that no order of dropping
/// can take one from KVM.
pub(crate) struct RawGuest {
    vcpu: VcpuFd,
    run: *mut kvm_run,
    _vm: VmFd,
}

impl RawGuest {
    pub(crate) fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(TSS as usize).unwrap();
        let memory = map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        // SAFETY: the code is shorter than the page, which nothing else refers to.
        unsafe { ptr::copy_nonoverlapping(GUEST.as_ptr(), memory, GUEST.len()) };
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE,
            memory_size: PAGE as u64,
            userspace_addr: memory as u64,
        };
        // SAFETY: the mapping is never removed, and no reference to it is made.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
        let len = kvm.get_vcpu_mmap_size().unwrap();
        assert!(len >= size_of::<kvm_run>(), "a mapping of {len} bytes");
        let run = map(len, libc::MAP_SHARED, vcpu.as_raw_fd()).cast();
        Self { vcpu, run, _vm: vm }
    }
}

impl Guest for RawGuest {
    fn run(&mut self, exits: u64) {
        let run = self.run;
        let mut done = 0;
        while done < exits {
            // SAFETY: KVM writes the mapping and the guest's memory, to which there are no
            // references.
            if unsafe { libc::ioctl(self.vcpu.as_raw_fd(), KVM_RUN, 0) } < 0 {
                let error = io::Error::last_os_error();
                assert_eq!(error.raw_os_error(), Some(libc::EINTR), "KVM_RUN: {error}");
                // SAFETY: a field inside the mapping, which KVM does not write now.
                unsafe { (*run).immediate_exit = 0 };
                continue;
            }
            // SAFETY: as above.
            let reason = unsafe { (*run).exit_reason };
            assert_eq!(reason, KVM_EXIT_IO, "unexpected exit");
            // SAFETY: as above.
            let io = unsafe { &raw const (*run).__bindgen_anon_1.io };
            // SAFETY: as above; integers, for which every bit pattern is a value.
            let io = unsafe { io.read() };
            assert_eq!(
                (u32::from(io.direction), io.port, io.size, io.count),
                (KVM_EXIT_IO_OUT, PORT, 1, 1)
            );
            // SAFETY: KVM puts the data of port I/O inside the mapping.
            let data = unsafe { self.run.cast::<u8>().add(io.data_offset as usize) };
            // SAFETY: as above.
            assert_eq!(black_box(unsafe { data.read() }), VALUE);
            done += 1;
        }
    }
}
