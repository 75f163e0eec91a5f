#![allow(unsafe_code, reason = "memory is mapped, protected by guards, and made a safe slice here")]
//! Pages of host memory between guards, mapped for as long as this value lives.
//!
//! The one place of this crate with `unsafe`. It must stay the only owner of its addresses and never
//! unmap or protect its pages while it lives, nor put other pages there: the kernel and safe slices
//! point to them.

use std::ffi::c_void;
use std::fs::File;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use rustix::io::{Errno, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

use crate::{WriteLog, page_size};

/// Bytes before and behind every mapping that nothing can access: who goes astray there dies, rather
/// than change somebody else's memory.
pub(super) const GUARD: usize = 64 << 10;

/// Pages of the kernel that are readable and writable, between guards.
#[derive(Debug)]
pub(crate) struct Pages {
    /// The first address that was reserved, guards and slack for alignment included.
    reserved: *mut c_void,
    reserved_len: usize,
    start: *mut c_void,
    len: usize,
}

// SAFETY: the addresses belong to nobody else, and they are read and written by atomics and by
// vm-memory's volatile accesses only, which any thread may make.
unsafe impl Send for Pages {}
// SAFETY: as above; no method changes a field.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `len` bytes at a multiple of `align`, a power of two, with guards.
    pub(super) fn map(
        len: usize,
        align: usize,
        flags: MapFlags,
        file: Option<(&File, u64)>,
    ) -> Result<Self> {
        let guard = GUARD.max(page_size() as usize);
        let reserved_len = (2 * guard).checked_add(align).and_then(|more| more.checked_add(len));
        let reserved_len = reserved_len.ok_or(Errno::NOMEM)?;
        let reserve = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: with no address given, the kernel chooses one where nothing is.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(null_mut(), reserved_len, ProtFlags::empty(), reserve)
        }?;
        // `align` bytes more than needed were reserved, so that this stays inside.
        let before = (reserved.addr() + guard).next_multiple_of(align) - reserved.addr();
        let start = reserved.wrapping_byte_add(before);
        let pages = Self { reserved, reserved_len, start, len };

        let flags = flags | MapFlags::FIXED;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let mapped = match file {
            // SAFETY: the range is inside what was reserved, which nobody else knows of.
            Some((file, offset)) => unsafe {
                rustix::mm::mmap(start, len, access, flags, file, offset)
            },
            // SAFETY: as above.
            None => unsafe { rustix::mm::mmap_anonymous(start, len, access, flags) },
        };
        if let Err(errno) = mapped {
            // The kernel may have unmapped the range before it failed. Another thread may have got it
            // since, so it can't be unmapped again: the addresses are given up.
            std::mem::forget(pages);
            return Err(errno);
        }
        Ok(pages)
    }

    /// All of them.
    pub(super) fn bytes(&self) -> &[AtomicU8] {
        let start = self.start.cast::<AtomicU8>();
        // SAFETY:
        // - `start` and `len` are those of an mmap that succeeded, so the range is non-null, one
        //   allocation, and no longer than isize::MAX. It was mapped readable and writable.
        // - The mapping lasts as long as the slice: it is unmapped when `self` drops, and nothing
        //   unmaps or replaces it before.
        // - AtomicU8 has the size and alignment of u8 and no invalid value; the kernel fills pages
        //   with zeros or from the file. Where a file ends too early, an access ends the process
        //   rather than give a wrong value.
        // - Others change these bytes while the slice lives: the guest, the kernel, vm-memory by
        //   volatile accesses through raw pointers, other processes. The bytes are atomics, so that
        //   the compiler may not assume otherwise, and no `&mut` or `&[u8]` to them is ever made.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    /// Advice about the pages from `offset`.
    pub(super) fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Errno::INVAL);
        }
        let start = self.start.wrapping_byte_add(offset);
        // SAFETY: the range is a part of this mapping. No advice unmaps it or changes how it can be
        // accessed; that some changes what is in it is no matter to atomics.
        unsafe { rustix::mm::madvise(start, len, advice) }
    }

    /// Takes pages from NUMA node `node`, while it has any. `EINVAL` if there is no such node.
    pub(super) fn prefer_node(&self, node: u32) -> Result<()> {
        const BITS: usize = u64::BITS as usize;
        let mut mask = [0u64; 1024 / BITS]; // more nodes than any kernel is built for
        let node = node as usize;
        let word = mask.get_mut(node / BITS).ok_or(Errno::INVAL)?;
        *word |= 1 << (node % BITS);
        // The kernel takes one bit less than it is told of.
        let bits = mask.len() * BITS + 1;
        // SAFETY: the call only reads `mask`, which has that many bits but for the one the kernel
        // does not take. It changes where pages of this mapping come from, and nothing else.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start,
                self.len,
                libc::MPOL_PREFERRED,
                mask.as_ptr(),
                bits,
                0,
            )
        };
        if result == 0 {
            return Ok(());
        }
        Err(std::io::Error::last_os_error()
            .raw_os_error()
            .map_or(Errno::INVAL, Errno::from_raw_os_error))
    }

    /// The pages as vm-memory knows them. They stay mapped for as long as the region lives.
    pub(super) fn region(
        self: &Arc<Self>,
        flags: MapFlags,
        file: Option<FileOffset>,
        huge: bool,
    ) -> std::result::Result<MmapRegion<WriteLog>, MmapRegionError> {
        let access = (ProtFlags::READ | ProtFlags::WRITE).bits().cast_signed();
        let mut builder =
            MmapRegionBuilder::new_with_bitmap(self.len, WriteLog::keeping(self.clone(), self.len))
                .with_mmap_prot(access)
                .with_mmap_flags(flags.bits().cast_signed())
                .with_hugetlbfs(huge);
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        // SAFETY: address and length are those of this mapping. It lasts as long as the region, which
        // holds it by its `WriteLog`.
        let builder = unsafe { builder.with_raw_mmap_pointer(self.start.cast()) };
        builder.build()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `map` and belongs to `self` alone; no slice of it is left,
        // because each borrows `self` or a region that holds it.
        let unmapped = unsafe { rustix::mm::munmap(self.reserved, self.reserved_len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
