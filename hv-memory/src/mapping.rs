#![allow(unsafe_code, reason = "guest memory is a mapping; this is where it becomes a safe slice")]
//! Host memory mapped for a guest.
//!
//! The one place of this crate with `unsafe`. It must stay the only owner of its mapping and never
//! unmap or protect it while it lives, nor put other bytes there: the kernel and safe slices point
//! into it.

use std::fmt;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use hv_core::{Errno, HostMemory};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Why host memory could not be mapped.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("mapping {len:#x} bytes of host memory failed in {call}: {errno}{}", remedy(*.errno))]
pub struct MapError {
    /// Bytes asked for.
    pub len: u64,
    /// The system call, such as `"mmap"`.
    pub call: &'static str,
    /// Its errno.
    pub errno: Errno,
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOMEM => {
            "; ask for less, or raise the limit on address space (ulimit -v) or vm.overcommit_memory"
        }
        _ => "",
    }
}

/// Memory of the host, zero-filled at first, read and written by host and guest alike.
///
/// Pages take up memory of the host when they are first touched, and are left out of core dumps. The
/// mapping goes when the last `Arc` of it does, which a memory slot
/// or a [`vm_memory::GuestRegionMmap`] may hold.
pub struct Mapping {
    region: Arc<MmapRegion>,
}

impl Mapping {
    /// Maps `len` bytes that are private to this process.
    ///
    /// # Errors
    /// `EINVAL` for a length of 0, `ENOMEM` for more than the process may have.
    pub fn anonymous(len: u64) -> Result<Self, MapError> {
        let bytes = in_host(len)?;
        Self::new(len, MmapRegion::new(bytes))
    }

    /// Maps `len` bytes of memory that a descriptor names (`memfd_create(2)`), so that it can be
    /// given to another process, or [remapped](Self::remap).
    ///
    /// # Errors
    /// `EINVAL` for a length of 0, `ENOMEM` for more than the process may have, `EMFILE` without
    /// a descriptor left.
    pub fn shared(len: u64) -> Result<Self, MapError> {
        let bytes = in_host(len)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create(c"guest memory", flags)
            .map_err(failed(len, "memfd_create"))?;
        rustix::fs::ftruncate(&memfd, len).map_err(failed(len, "ftruncate"))?;
        // An access beyond the end of the file would kill the process, so it keeps its size, whoever
        // gets hold of the descriptor.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memfd, seals).map_err(failed(len, "fcntl of F_ADD_SEALS"))?;
        Self::new(len, MmapRegion::from_file(FileOffset::new(File::from(memfd), 0), bytes))
    }

    fn new(len: u64, region: Result<MmapRegion, MmapRegionError>) -> Result<Self, MapError> {
        let region = region.map_err(|error| {
            let errno = match error {
                MmapRegionError::Mmap(error) => Errno::from(&error),
                _ => Errno::EINVAL,
            };
            MapError { len, call: "mmap", errno }
        })?;
        let mapping = Self { region: Arc::new(region) };
        mapping.advise(0, mapping.region.size(), Advice::LinuxDontDump)?;
        Ok(mapping)
    }

    /// Takes the page at `offset` away from every user of the mapping and gives it back at once,
    /// with what is in it: whoever touches it, a running guest too, has to find it anew. Returns
    /// whether there is such a page; only [shared](Self::shared) memory has pages to be found anew.
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn remap(&self, offset: u64) -> Result<bool, MapError> {
        let page = crate::page_size();
        let Ok(at) = usize::try_from(offset) else { return Ok(false) };
        let shared = self.region.file_offset().is_some();
        if !shared || !offset.is_multiple_of(page) || at >= self.region.size() {
            return Ok(false);
        }
        self.advise(at, page as usize, Advice::LinuxDontNeed)?;
        Ok(true)
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), MapError> {
        let start = self.region.as_ptr().wrapping_add(offset);
        // SAFETY: all callers pass a part of this mapping, and advice that neither unmaps it nor
        // changes how it can be accessed nor what is in it: of a shared mapping MADV_DONTNEED drops
        // only page table entries, and the next access finds the same page of the file.
        let advised = unsafe { rustix::mm::madvise(start.cast(), len, advice) };
        advised.map_err(failed(len as u64, "madvise"))
    }

    /// The mapping as vm-memory knows it, for a [`vm_memory::GuestRegionMmap`].
    #[must_use]
    pub fn region(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.region)
    }

    /// All of it, to read and write.
    #[must_use]
    pub fn as_volatile_slice(&self) -> VolatileSlice<'_> {
        self.region.as_volatile_slice()
    }
}

fn failed(len: u64, call: &'static str) -> impl Fn(rustix::io::Errno) -> MapError {
    move |errno| MapError { len, call, errno: Errno(errno.raw_os_error()) }
}

/// `len` as a size of this process.
fn in_host(len: u64) -> Result<usize, MapError> {
    usize::try_from(len).map_err(|_| MapError { len, call: "mmap", errno: Errno::ENOMEM })
}

impl HostMemory for Mapping {
    fn bytes(&self) -> &[AtomicU8] {
        let start = self.region.as_ptr().cast::<AtomicU8>();
        // SAFETY:
        // - `start` and `size` are those of an mmap that succeeded, so the range is non-null, one
        //   allocation, and no longer than isize::MAX. It was mapped readable and writable.
        // - The mapping lasts as long as the slice: it is unmapped when `region` drops, `self` holds
        //   `region`, and nothing in this crate or in vm-memory unmaps or replaces it before.
        // - AtomicU8 has the size and alignment of u8 and no invalid value; mmap zero-fills. The
        //   file behind shared memory is sealed, so that it can't become shorter.
        // - Others change these bytes while the slice lives: the guest, the kernel, vm-memory by
        //   volatile accesses through raw pointers. The bytes are atomics, so that the compiler may
        //   not assume otherwise, and no `&mut` or `&[u8]` to them is ever made.
        unsafe { std::slice::from_raw_parts(start, self.region.size()) }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p}, {:#x} bytes)", self.region.as_ptr(), self.region.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;

    #[test]
    fn slice_and_volatile_access_see_the_same_bytes() {
        let mapping = Mapping::anonymous(0x2000).unwrap();
        assert_eq!(mapping.bytes().len(), 0x2000);
        assert!(mapping.bytes().iter().all(|b| b.load(Ordering::Relaxed) == 0));
        mapping.as_volatile_slice().write_slice(b"hv", 0x1fff - 1).unwrap();
        let last: Vec<u8> =
            mapping.bytes()[0x1ffe..].iter().map(|b| b.load(Ordering::Relaxed)).collect();
        assert_eq!(last, b"hv");
        mapping.bytes()[0].store(7, Ordering::Relaxed);
        assert_eq!(mapping.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
    }

    #[test]
    fn a_shared_page_is_remapped_with_its_bytes() {
        let page = crate::page_size();
        let mapping = Mapping::shared(3 * page).unwrap();
        let address = mapping.bytes().as_ptr();
        for (n, at) in [(1u8, 0), (2, page), (3, 2 * page)] {
            mapping.bytes()[at as usize].store(n, Ordering::Relaxed);
        }
        assert_eq!(mapping.remap(page), Ok(true));
        assert_eq!(mapping.remap(page), Ok(true));
        assert_eq!(mapping.bytes().as_ptr(), address);
        let first = |at: u64| mapping.bytes()[at as usize].load(Ordering::Relaxed);
        assert_eq!([first(0), first(page), first(2 * page)], [1, 2, 3]);
        mapping.bytes()[page as usize + 1].store(9, Ordering::Relaxed);
        assert_eq!(mapping.as_volatile_slice().read_obj::<u8>(page as usize + 1).unwrap(), 9);
    }

    #[test]
    fn a_remapped_page_is_really_mapped_anew() {
        let page = crate::page_size() as usize;
        let mapping = Mapping::shared(16 * page as u64).unwrap();
        for at in (0..16).map(|n| n * page) {
            mapping.bytes()[at].store(1, Ordering::Relaxed);
        }
        let faults = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields = stat.rsplit(") ").next().unwrap();
            fields.split(' ').nth(7).unwrap().parse::<u64>().unwrap() // minflt
        };
        let before = faults();
        for _ in 0..1000 {
            mapping.remap(page as u64).unwrap();
            mapping.bytes()[page].store(2, Ordering::Relaxed);
        }
        assert!(faults() - before >= 1000, "each access after a remap faults once");
    }

    #[test]
    fn shared_memory_keeps_its_size() {
        let mapping = Mapping::shared(crate::page_size()).unwrap();
        let region = mapping.region();
        let file = region.file_offset().unwrap().file();
        let error = file.set_len(0).unwrap_err();
        assert_eq!(Errno::from(&error), Errno::EPERM);
    }

    #[test]
    fn what_is_no_page_of_shared_memory_is_not_remapped() {
        let page = crate::page_size();
        let shared = Mapping::shared(page).unwrap();
        assert_eq!(shared.remap(1), Ok(false));
        assert_eq!(shared.remap(page), Ok(false));
        assert_eq!(shared.remap(u64::MAX - page + 1), Ok(false));
        assert_eq!(Mapping::anonymous(page).unwrap().remap(0), Ok(false));
    }

    #[test]
    fn what_can_not_be_mapped_says_so() {
        let error = Mapping::anonymous(0).unwrap_err();
        assert_eq!((error.call, error.errno), ("mmap", Errno::EINVAL));
        let error = Mapping::anonymous(1 << 60).unwrap_err();
        assert_eq!(error.errno, Errno::ENOMEM);
        assert!(error.to_string().contains("ulimit -v"), "{error}");
        assert!(error.to_string().contains("0x1000000000000000 bytes"), "{error}");
    }

    #[test]
    fn left_out_of_core_dumps() {
        let mapping = Mapping::anonymous(0x10_0000).unwrap();
        let address = format!("{:x}-", mapping.bytes().as_ptr().addr());
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        // Neighbouring mappings with equal flags are merged, so the line may start lower.
        let flags = smaps
            .lines()
            .skip_while(|line| !covers(line, &address))
            .find(|line| line.starts_with("VmFlags:"))
            .unwrap();
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }

    fn covers(line: &str, address: &str) -> bool {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let Some((Some(start), Some(end))) = range.map(|(a, b)| (hex(a), hex(b))) else {
            return false;
        };
        let address = hex(address.trim_end_matches('-')).unwrap();
        (start..end).contains(&address)
    }
}
