//! Host memory mapped for a guest.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use hv_core::HostMemory;
use rustix::mm::Advice;
use vm_memory::bitmap::RefSlice;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::file::{BackingFile, FileError};
use super::pages::Pages;
use super::{Backing, MapError, failed};
use crate::WriteLog;

/// Memory of the host, read and written by host and guest alike.
///
/// It is unmapped, with its guards, when the last owner goes: an `Arc` of it, which a memory slot may
/// hold, or a [region](Self::region) of vm-memory.
pub struct Mapping {
    pub(super) pages: Arc<Pages>,
    pub(super) region: Arc<MmapRegion<WriteLog>>,
    pub(super) page: u64,
    pub(super) shared: bool,
    pub(super) file: Option<BackingFile>,
}

impl Mapping {
    /// Maps `len` bytes of [`Backing::anonymous`].
    ///
    /// # Errors
    /// A length of 0 or of no whole pages; `ENOMEM` for more than the process may have.
    pub fn anonymous(len: u64) -> Result<Self, MapError> {
        Backing::anonymous().map(len)
    }

    /// Maps `len` bytes of [`Backing::memfd`].
    ///
    /// # Errors
    /// A length of 0 or of no whole pages; `ENOMEM` for more than the process may have, `EMFILE`
    /// without a descriptor left.
    pub fn shared(len: u64) -> Result<Self, MapError> {
        Backing::memfd().map(len)
    }

    /// Bytes of the pages it is made of: of the host's, or of huge pages of the kernel's pool.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// Takes the page at `offset` away from every user of the mapping and gives it back at once,
    /// with what is in it: whoever touches it, a running guest too, has to find it anew. Returns
    /// whether there is such a page; only shared memory has pages to be found anew.
    ///
    /// # Errors
    /// Those of `madvise(2)`. Before Linux 5.18 `EINVAL` for huge pages of the kernel's pool.
    pub fn remap(&self, offset: u64) -> Result<bool, MapError> {
        let len = self.pages.bytes().len();
        let Ok(at) = usize::try_from(offset) else { return Ok(false) };
        if !self.shared || !offset.is_multiple_of(self.page) || at >= len {
            return Ok(false);
        }
        // Of a shared mapping it drops only page table entries.
        let dropped = self.pages.advise(at, self.page as usize, Advice::LinuxDontNeed);
        dropped.map_err(failed(self.page, "madvise of MADV_DONTNEED"))?;
        Ok(true)
    }

    /// Looks whether a file behind the memory still has all of it ([`crate::KeptSize`]), without
    /// touching the memory: before it is used, or to explain an `EFAULT` of `KVM_RUN` or an MMIO exit where RAM is. What is true
    /// when this returns may be false right after. Memory without a file is always whole.
    ///
    /// # Errors
    /// The file became shorter.
    pub fn check(&self) -> Result<(), FileError> {
        match &self.file {
            Some(file) => file.still_has(self.pages.bytes().len() as u64),
            None => Ok(()),
        }
    }

    /// The mapping as vm-memory knows it, for a [`vm_memory::GuestRegionMmap`]. What is written through
    /// it while a slot with this memory logs is among that slot's dirty pages.
    #[must_use]
    pub fn region(&self) -> Arc<MmapRegion<WriteLog>> {
        Arc::clone(&self.region)
    }

    /// All of it, to read and write.
    #[must_use]
    pub fn as_volatile_slice(&self) -> VolatileSlice<'_, RefSlice<'_, WriteLog>> {
        self.region.as_volatile_slice()
    }
}

impl HostMemory for Mapping {
    fn bytes(&self) -> &[AtomicU8] {
        self.pages.bytes()
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p}, {:#x} bytes)", self.region.as_ptr(), self.region.size())
    }
}
