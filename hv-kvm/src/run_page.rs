//! The mapping of `struct kvm_run` that a vCPU shares with KVM and with whoever kicks it.
//!
//! KVM writes it inside `KVM_RUN`; another thread may set the byte `immediate_exit` at any time.
//! So there are two handles: [`RunPage`], one for a vCPU, reaches everything but that byte, and
//! [`ImmediateExit`] reaches nothing but that byte. No reference to the whole structure is ever
//! made. What the fields mean is decoded in [`crate::exit`].

#![allow(unsafe_code, reason = "memory shared with the kernel")]

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use hv_core::{Errno, InterruptState};
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_run, kvm_run__bindgen_ty_1};

use crate::coalesced;
use crate::raw::last_errno;

/// Bytes of a page.
const PAGE: usize = 4096;

/// The pages of the mapping from this one on belong to the VM, not the vCPU.
const SHARED_PAGE: usize = KVM_COALESCED_MMIO_PAGE_OFFSET as usize;

/// The part of `kvm_run` whose meaning depends on the exit reason.
pub(crate) type Payload = kvm_run__bindgen_ty_1;

#[derive(Debug)]
struct Mapping {
    start: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping is memory of the process, not of a thread. The two handles below say which
// of its bytes may be reached from where.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` gives access to nothing but its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: RawFd, flags: i32, len: usize) -> Result<Self, Errno> {
        if len < size_of::<kvm_run>() {
            return Err(Errno::EINVAL);
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => {
                Ok(Self { start: start.cast(), len })
            }
            _ => Err(last_errno()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that was mapped, and the handles that reach into it hold
        // this object, so none is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Maps the `len` bytes (`KVM_GET_VCPU_MMAP_SIZE`) of a vCPU descriptor.
pub(crate) fn map(vcpu: &OwnedFd, len: usize) -> Result<(RunPage, ImmediateExit), Errno> {
    Ok(handles(Mapping::new(vcpu.as_raw_fd(), libc::MAP_SHARED, len)?))
}

/// Memory of that shape without a vCPU, all zero.
#[cfg(test)]
pub(crate) fn without_vcpu(len: usize) -> Result<(RunPage, ImmediateExit), Errno> {
    Ok(handles(Mapping::new(-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, len)?))
}

fn handles(mapping: Mapping) -> (RunPage, ImmediateExit) {
    let mapping = Arc::new(mapping);
    (RunPage(mapping.clone()), ImmediateExit(mapping))
}

/// A pointer to a field of `kvm_run`, for one of the two handles.
macro_rules! field {
    ($page:expr, $($field:tt)+) => {{
        let run: *mut kvm_run = $page.0.start.as_ptr();
        // SAFETY: the field lies inside the mapping, which is at least a kvm_run large.
        unsafe { &raw mut (*run).$($field)+ }
    }};
}

/// `kvm_run.immediate_exit`: KVM looks at it when `KVM_RUN` begins and then fails with `EINTR`.
#[derive(Debug)]
pub(crate) struct ImmediateExit(Arc<Mapping>);

impl ImmediateExit {
    fn byte(&self) -> &AtomicU8 {
        let byte = field!(self, immediate_exit);
        // SAFETY: the pointer is valid for as long as the mapping is held, which `self` does. This
        // process accesses the byte through this reference only; KVM only reads it.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// Asks for it.
    pub(crate) fn request(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    /// Takes back what was asked for, and sees everything that was written before it was asked.
    pub(crate) fn take(&self) -> bool {
        self.byte().swap(0, Ordering::SeqCst) != 0
    }
}

/// The rest of `kvm_run`. There is one per mapping, and it is not `Clone`, so that an exclusive
/// borrow of it excludes every other access, KVM's included.
#[derive(Debug)]
pub(crate) struct RunPage(Arc<Mapping>);

impl RunPage {
    /// Why the last run ended (`KVM_EXIT_*`).
    pub(crate) fn exit_reason(&self) -> u32 {
        let reason = field!(self, exit_reason);
        // SAFETY: an integer inside the mapping, which only KVM_RUN writes, and that borrows `self`
        // exclusively.
        unsafe { reason.read() }
    }

    /// What belongs to that reason.
    pub(crate) fn payload(&self) -> &Payload {
        let payload = field!(self, __bindgen_anon_1);
        // SAFETY: as above; every bit pattern is a value of the union, whose members are integers.
        unsafe { &*payload }
    }

    /// The same, to write an answer.
    pub(crate) fn payload_mut(&mut self) -> &mut Payload {
        let payload = field!(self, __bindgen_anon_1);
        // SAFETY: as above, and the exclusive borrow of `self` makes the reference the only one.
        unsafe { &mut *payload }
    }

    /// What KVM last said about interrupts.
    pub(crate) fn interrupt_state(&self) -> InterruptState {
        let ready = field!(self, ready_for_interrupt_injection);
        let if_flag = field!(self, if_flag);
        let cr8 = field!(self, cr8);
        InterruptState {
            // SAFETY: as in `exit_reason`.
            ready_for_injection: unsafe { ready.read() } != 0,
            // SAFETY: as in `exit_reason`.
            if_flag: unsafe { if_flag.read() } != 0,
            // SAFETY: as in `exit_reason`.
            cr8: unsafe { cr8.read() },
        }
    }

    /// Asks KVM to exit when an interrupt can be injected.
    pub(crate) fn set_request_interrupt_window(&mut self, wanted: bool) {
        let request = field!(self, request_interrupt_window);
        // SAFETY: as in `exit_reason`, and `self` is borrowed exclusively.
        unsafe { request.write(wanted.into()) }
    }

    /// The bytes of the mapping behind the structure, where KVM puts the data of port I/O; `None`
    /// for a range that is not entirely there.
    pub(crate) fn bytes(&mut self, range: Range<usize>) -> Option<&mut [u8]> {
        let end = self.0.len.min(SHARED_PAGE * PAGE);
        if range.start < size_of::<kvm_run>() || range.end > end {
            return None;
        }
        let len = range.end.checked_sub(range.start)?;
        // SAFETY: `range.start` is within the mapping, as it is at most `range.end`.
        let start = unsafe { self.0.start.cast::<u8>().add(range.start) };
        // SAFETY: the bytes are inside the mapping and behind the structure, hence disjoint from
        // the byte `ImmediateExit` reaches, and before the pages that vCPUs share; `self` is borrowed
        // exclusively, and KVM writes them only inside KVM_RUN, which needs that borrow too.
        Some(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) })
    }

    /// The ring of collected writes, which is the VM's: page `page` of the mapping
    /// (`KVM_CAP_COALESCED_MMIO`). `None` if the mapping has no such page for it.
    pub(crate) fn coalesced_ring(&self, page: usize) -> Option<&coalesced::Ring> {
        const { assert!(size_of::<coalesced::Ring>() <= PAGE) };
        let start = page.checked_mul(PAGE)?;
        let inside = start.checked_add(PAGE)? <= self.0.len;
        if page < SHARED_PAGE || !inside {
            return None;
        }
        // SAFETY: `start` is inside the mapping.
        let ring = unsafe { self.0.start.cast::<u8>().add(start) };
        // SAFETY: the page is inside the mapping, which is page-aligned and lives as long as `self`;
        // the ring fits into it. It is all atomics, of which every bit pattern is a value, so it may be
        // written by KVM and through the mappings of other vCPUs; `bytes` ends before it.
        Some(unsafe { ring.cast::<coalesced::Ring>().as_ref() })
    }

    /// Puts an exit there, as KVM would.
    #[cfg(test)]
    pub(crate) fn fake_exit(&mut self, reason: u32, write: impl FnOnce(&mut Payload)) {
        let exit_reason = field!(self, exit_reason);
        // SAFETY: as in `set_request_interrupt_window`.
        unsafe { exit_reason.write(reason) };
        write(self.payload_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 3 * 4096;

    #[test]
    fn a_mapping_smaller_than_the_structure_is_refused() {
        assert_eq!(without_vcpu(size_of::<kvm_run>() - 1).err(), Some(Errno::EINVAL));
    }

    #[test]
    fn a_descriptor_without_memory_gives_its_errno() {
        let eventfd = crate::raw::eventfd().unwrap();
        assert_eq!(map(&eventfd, LEN).err(), Some(Errno::ENODEV));
    }

    #[test]
    fn only_bytes_behind_the_structure_and_inside_the_mapping_are_given() {
        let (mut page, _) = without_vcpu(LEN).unwrap();
        assert_eq!(page.bytes(4096..8192).map(|b| b.len()), Some(4096));
        assert_eq!(page.bytes(8192..8192).map(|b| b.len()), Some(0));
        assert!(page.bytes(8192..8193).is_none(), "what vCPUs share");
        assert!(page.bytes(0..8).is_none(), "the structure itself");
        assert!(page.bytes(LEN - 4..LEN + 4).is_none(), "past the end");
        let (late, early) = (6000, 4096);
        assert!(page.bytes(late..early).is_none(), "backwards");
    }

    #[test]
    fn the_ring_of_collected_writes_is_inside_the_mapping_and_behind_the_data() {
        let (page, _) = without_vcpu(LEN).unwrap();
        assert!(page.coalesced_ring(2).is_some_and(|ring| ring.is_empty()));
        for page_index in [0, 1, 3, usize::MAX / PAGE, usize::MAX] {
            assert!(page.coalesced_ring(page_index).is_none(), "{page_index}");
        }
    }

    #[test]
    fn immediate_exit_is_taken_once() {
        let (page, exit) = without_vcpu(LEN).unwrap();
        assert!(!exit.take());
        exit.request();
        exit.request();
        assert!(exit.take());
        assert!(!exit.take());
        assert_eq!(page.interrupt_state(), InterruptState::default(), "no other byte changed");
    }
}
