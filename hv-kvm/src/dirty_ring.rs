//! The mapping of the dirty ring of a vCPU.
//!
//! How its entries are used is said by [`DirtyGfn`]; nothing is decided here.

#![allow(unsafe_code, reason = "memory shared with the kernel")]

use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use hv_core::{DirtyGfn, DirtyRing, Errno};
use kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET;
use kvm_ioctls::VcpuFd;

use crate::raw::last_errno;
use crate::vm::VmInner;

/// Bytes of a page, the unit of `KVM_DIRTY_LOG_PAGE_OFFSET`.
const PAGE: i64 = 4096;

/// A dirty ring, as long as it is mapped.
///
/// The mapping keeps the vCPU in the kernel, and with it the VM, so this keeps what they need.
#[derive(Debug)]
pub(crate) struct KvmDirtyRing {
    start: NonNull<DirtyGfn>,
    entries: usize,
    _vm: Arc<VmInner>,
}

// SAFETY: the mapping is memory of the process, not of a thread, and all of it is atomics.
unsafe impl Send for KvmDirtyRing {}
// SAFETY: as above; a shared ring gives access to the atomics only.
unsafe impl Sync for KvmDirtyRing {}

impl KvmDirtyRing {
    /// Maps the ring of a vCPU of `vm`, for which rings of `bytes` were enabled.
    pub(crate) fn map(vcpu: &VcpuFd, bytes: u32, vm: &Arc<VmInner>) -> Result<Self, Errno> {
        let (len, protection) = (bytes as usize, libc::PROT_READ | libc::PROT_WRITE);
        let (fd, offset) = (vcpu.as_raw_fd(), i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => {
                let entries = len / size_of::<DirtyGfn>();
                Ok(Self { start: start.cast(), entries, _vm: vm.clone() })
            }
            _ => Err(last_errno()),
        }
    }
}

impl DirtyRing for KvmDirtyRing {
    fn entries(&self) -> &[DirtyGfn] {
        // SAFETY: the mapping is page-aligned, that long, and there as long as `self`. All of it is
        // backed: KVM made the ring with the vCPU, as large as was enabled, and the mapping keeps the
        // vCPU. The entries are atomics of which every bit pattern is a value, so KVM may write them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.entries) }
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        let len = self.entries * size_of::<DirtyGfn>();
        // SAFETY: the range is the one that was mapped, and what was lent of it borrowed `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), len) };
    }
}
