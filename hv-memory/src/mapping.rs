#![allow(unsafe_code, reason = "guest memory is a mapping; this is where it becomes a safe slice")]
//! Host memory mapped for a guest.
//!
//! The one place of this crate with `unsafe`. It must stay the only owner of its mapping and never
//! unmap, remap or protect it while it lives: the kernel and safe slices point into it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use hv_core::{Errno, HostMemory};
use rustix::mm::Advice;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

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

/// Anonymous memory of the host, zero-filled, read and written by host and guest alike.
///
/// Pages take up memory of the host when they are first touched, are private to this process and
/// are left out of core dumps. The mapping goes when the last `Arc` of it does, which a memory slot
/// or a [`vm_memory::GuestRegionMmap`] may hold.
pub struct Mapping {
    region: Arc<MmapRegion>,
}

impl Mapping {
    /// Maps `len` bytes.
    ///
    /// # Errors
    /// `EINVAL` for a length of 0, `ENOMEM` for more than the process may have.
    pub fn anonymous(len: u64) -> Result<Self, MapError> {
        let failed = |call, errno| MapError { len, call, errno };
        let bytes = usize::try_from(len).map_err(|_| failed("mmap", Errno::ENOMEM))?;
        let region = MmapRegion::new(bytes).map_err(|error| {
            let errno = match error {
                MmapRegionError::Mmap(error) => Errno::from(&error),
                _ => Errno::EINVAL,
            };
            failed("mmap", errno)
        })?;
        // SAFETY: the range is exactly the mapping just made, and this advice changes neither what
        // it contains nor how it can be accessed.
        let advised = unsafe {
            rustix::mm::madvise(region.as_ptr().cast(), region.size(), Advice::LinuxDontDump)
        };
        advised.map_err(|errno| failed("madvise", Errno(errno.raw_os_error())))?;
        Ok(Self { region: Arc::new(region) })
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

impl HostMemory for Mapping {
    fn bytes(&self) -> &[AtomicU8] {
        let start = self.region.as_ptr().cast::<AtomicU8>();
        // SAFETY:
        // - `start` and `size` are those of an mmap that succeeded, so the range is non-null, one
        //   allocation, and no longer than isize::MAX. It was mapped readable and writable.
        // - The mapping lasts as long as the slice: it is unmapped when `region` drops, `self` holds
        //   `region`, and nothing in this crate or in vm-memory unmaps or remaps it before.
        // - AtomicU8 has the size and alignment of u8 and no invalid value; mmap zero-fills.
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
