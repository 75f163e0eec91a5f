//! The RAM of a guest: one mapping for each range of its layout.
//!
//! Made before the VM, so that initialisation can install the slots before the irqchip exists (a
//! slot added later waits for a grace period of the kernel, 5 to 8 ms). It must not know slots
//! beyond numbering them: the [`crate::SlotManager`] looks after them once the VM is there.

use std::ops::ControlFlow;
use std::sync::Arc;

use hv_core::{Errno, HostRange, MemorySlot, SlotFlags, SlotId};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use crate::{
    Backing, FileError, GuestRange, MapError, Mapping, PrefaultError, Progress, RamLayout, WriteLog,
};

/// Why a guest's RAM could not be made.
#[derive(Debug, Error)]
pub enum RamError {
    /// The host did not give the memory.
    #[error("the guest's RAM at {range}: {error}")]
    Map {
        /// The range that was to be backed.
        range: GuestRange,
        /// Why it could not be.
        error: MapError,
    },
    /// vm-memory does not take the ranges.
    #[error("the guest's RAM can't be put together: {0}")]
    Regions(#[from] GuestRegionCollectionError),
}

/// The memory of a guest as vm-memory knows it, for loaders and devices. What is written through it
/// while a slot logs is among the slot's dirty pages. It stays mapped for as long as a clone of it lives.
pub type RamMemory = GuestMemoryMmap<WriteLog>;

/// The RAM of a guest.
///
/// ```
/// use hv_memory::{GuestRam, RamLayout};
/// use vm_memory::{Bytes, GuestAddress};
///
/// let ram = GuestRam::new(&RamLayout::new(1 << 20, &[], 46)?)?;
/// ram.memory().write_obj(0xf4_u8, GuestAddress(0x1000))?;
/// assert_eq!(ram.slots().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct GuestRam {
    memory: RamMemory,
    slots: Vec<MemorySlot>,
    mappings: Vec<(GuestRange, Arc<Mapping>)>,
}

impl GuestRam {
    /// Maps every range of `layout`, zero-filled.
    ///
    /// # Errors
    /// The range the host has no memory for, and why.
    pub fn new(layout: &RamLayout) -> Result<Self, RamError> {
        Self::backed(layout, &Backing::anonymous())
    }

    /// The same in memory whose pages can be [remapped](Self::remap_page).
    ///
    /// # Errors
    /// The range the host has no memory for, and why.
    pub fn shared(layout: &RamLayout) -> Result<Self, RamError> {
        Self::backed(layout, &Backing::memfd())
    }

    /// Maps every range of `layout` in memory made as `backing` says. In a file they follow each
    /// other, without the holes between them.
    ///
    /// # Errors
    /// The range that can't be had, and why. Nothing is mapped then.
    pub fn backed(layout: &RamLayout, backing: &Backing) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        let mut mappings = Vec::new();
        let mut before = 0;
        for (id, &range) in (0..).zip(layout.ranges()) {
            let refused = |error| RamError::Map { range, error };
            let mapping = backing.after(before).and_then(|backing| backing.map(range.len()));
            let mapping = Arc::new(mapping.map_err(refused)?);
            before += range.len(); // a layout is no longer than an address space
            mappings.push((range, mapping.clone()));
            let region = mapping.region();
            let len = region.size();
            let (Some(region), Some(host)) =
                (GuestRegionMmap::with_arc(region, range.start()), HostRange::new(mapping, 0, len))
            else {
                // A layout has no range that wraps, and a mapping all of its bytes.
                let (len, errno) = (range.len(), Errno::EINVAL);
                return Err(refused(MapError::System { len, call: "mmap", errno }));
            };
            regions.push(region);
            let flags = SlotFlags::default();
            slots.push(MemorySlot { id: SlotId(id), guest: range.start(), host, flags });
        }
        Ok(Self { memory: GuestMemoryMmap::from_regions(regions)?, slots, mappings })
    }

    /// Gives all of it memory of the host now ([`Mapping::prefault`]). `progress` is told of all RAM.
    ///
    /// # Errors
    /// The host has no page, or `progress` stopped it.
    pub fn prefault(
        &self,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), PrefaultError> {
        let total = self.mappings.iter().map(|(range, _)| range.len()).sum();
        let mut before = 0;
        for (range, mapping) in &self.mappings {
            let of_all = |done| Progress { done: before + done, total };
            let mut stopped = None;
            let result = mapping.prefault(|progress_of_range| {
                let told = of_all(progress_of_range.done);
                let flow = progress(told);
                if flow.is_break() && told.done < total {
                    stopped = Some(told);
                }
                flow
            });
            match (stopped, result) {
                (Some(told), _) => return Err(PrefaultError::Stopped(told)),
                (_, Err(PrefaultError::Page { progress, errno })) => {
                    return Err(PrefaultError::Page { progress: of_all(progress.done), errno });
                }
                (_, result) => result?,
            }
            before += range.len();
        }
        Ok(())
    }

    /// Looks whether a file behind it still has all of it ([`Mapping::check`]).
    ///
    /// # Errors
    /// The file became shorter.
    pub fn check(&self) -> Result<(), FileError> {
        self.mappings.iter().try_for_each(|(_, mapping)| mapping.check())
    }

    /// The memory, for loaders and devices. Its clones share it.
    #[must_use]
    pub fn memory(&self) -> &RamMemory {
        &self.memory
    }

    /// Takes the page with this guest address away and gives it back at once, with what is in it:
    /// a running guest has to find it anew. Returns whether that was done: there must be RAM, and
    /// it must be [shared](Self::shared).
    ///
    /// # Errors
    /// Those of `madvise(2)`.
    pub fn remap_page(&self, guest: GuestAddress) -> Result<bool, RamError> {
        let Some((range, mapping)) = self.mappings.iter().find(|(r, _)| r.contains(guest)) else {
            return Ok(false);
        };
        let offset = guest.0 - range.start().0;
        let page = offset - offset % mapping.page_size();
        mapping.remap(page).map_err(|error| RamError::Map { range: *range, error })
    }

    /// Gives the whole pages of RAM among `len` bytes from `start` back to the host
    /// ([`Mapping::discard`]), and returns their bytes: fewer than asked for where there is no RAM, or none
    /// that can be given back.
    ///
    /// # Errors
    /// Those of `madvise(2)`. What comes before in the order of addresses was given back.
    pub fn discard(&self, start: GuestAddress, len: u64) -> Result<u64, RamError> {
        let end = start.0.saturating_add(len);
        let mut bytes = 0;
        for (range, mapping) in &self.mappings {
            let first = range.start().0;
            let (from, to) = (start.0.max(first), end.min(first.saturating_add(range.len())));
            if from < to {
                let discarded = mapping.discard(from - first, to - from);
                bytes += discarded.map_err(|error| RamError::Map { range: *range, error })?;
            }
        }
        Ok(bytes)
    }

    /// Whether all of it can be given back.
    #[must_use]
    pub fn can_discard(&self) -> bool {
        self.mappings.iter().all(|(_, mapping)| mapping.can_discard())
    }

    /// The slots that give it to a guest, with ids from 0 in the order of guest addresses.
    #[must_use]
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackingFile, FileProblem, KeptSize, Sharing};
    use std::sync::atomic::Ordering;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    fn two_pages_apart() -> GuestRam {
        let hole = GuestRange::new(GuestAddress(0x1000), 0x3000).unwrap();
        GuestRam::new(&RamLayout::new(0x3000, &[hole], 46).unwrap()).unwrap()
    }

    #[test]
    fn only_pages_of_shared_ram_are_remapped() {
        let page = crate::page_size();
        let layout = RamLayout::new(2 * page, &[], 46).unwrap();
        let ram = GuestRam::shared(&layout).unwrap();
        ram.memory().write_obj(7u8, GuestAddress(page + 5)).unwrap();
        assert!(ram.remap_page(GuestAddress(page + 3)).unwrap());
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(page + 5)).unwrap(), 7);
        assert!(!ram.remap_page(GuestAddress(2 * page)).unwrap(), "no RAM");
        let private = GuestRam::new(&layout).unwrap();
        assert!(!private.remap_page(GuestAddress(0)).unwrap(), "not shared");
    }

    #[test]
    fn one_slot_for_each_range_in_the_order_of_addresses() {
        let ram = two_pages_apart();
        let slots: Vec<_> = ram.slots().iter().map(|s| (s.id.0, s.guest.0, s.host.len())).collect();
        assert_eq!(slots, [(0, 0, 0x1000), (1, 0x4000, 0x2000)]);
        assert_eq!(ram.memory().num_regions(), 2);
        assert!(ram.slots().iter().all(|s| s.host.address() % 4096 == 0));
    }

    #[test]
    fn slots_and_memory_are_the_same_bytes() {
        let ram = two_pages_apart();
        ram.memory().write_obj(0xa5_u8, GuestAddress(0x4001)).unwrap();
        assert_eq!(ram.slots()[1].host.bytes()[1].load(Ordering::Relaxed), 0xa5);
        assert!(ram.memory().write_obj(0_u8, GuestAddress(0x1000)).is_err(), "the hole");
    }

    #[test]
    fn a_slot_keeps_the_memory_alive() {
        let ram = two_pages_apart();
        let slot = ram.slots()[0].clone();
        slot.host.bytes()[5].store(9, Ordering::Relaxed);
        drop(ram);
        assert_eq!(slot.host.bytes()[5].load(Ordering::Relaxed), 9);
    }

    #[test]
    fn ranges_follow_each_other_in_a_file() {
        let page = crate::page_size();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 * page).unwrap();
        let hole = GuestRange::new(GuestAddress(page), 3 * page).unwrap();
        let layout = RamLayout::new(3 * page, &[hole], 46).unwrap();
        let open = || {
            BackingFile::open(file.path(), Sharing::Shared, KeptSize::Promised).unwrap().at(page)
        };
        let ram = GuestRam::backed(&layout, &Backing::file(open())).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        ram.memory().write_obj(2u8, GuestAddress(4 * page)).unwrap();
        ram.memory().write_obj(3u8, GuestAddress(6 * page - 1)).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        let at = |at: u64| bytes[at as usize];
        assert_eq!([at(0), at(page), at(2 * page), at(4 * page - 1)], [0, 1, 2, 3]);
        assert_eq!(ram.check(), Ok(()));

        drop(ram);
        file.as_file().set_len(4 * page - 1).unwrap();
        let error = GuestRam::backed(&layout, &Backing::file(open())).unwrap_err();
        let RamError::Map { range, error: MapError::File(error) } = error else {
            panic!("{error}")
        };
        assert_eq!(range, layout.ranges()[1]);
        let short = FileProblem::TooShort { size: 4 * page - 1, offset: 2 * page, len: 2 * page };
        assert_eq!(error.problem, short);
    }

    #[test]
    fn ram_tells_when_its_file_becomes_shorter() {
        let page = crate::page_size();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 * page).unwrap();
        let backing = BackingFile::open(file.path(), Sharing::Shared, KeptSize::Promised).unwrap();
        let layout = RamLayout::new(2 * page, &[], 46).unwrap();
        let ram = GuestRam::backed(&layout, &Backing::file(backing)).unwrap();
        file.as_file().set_len(page).unwrap();
        let shrunk = FileProblem::Shrunk { size: page, needed: 2 * page };
        assert_eq!(ram.check().unwrap_err().problem, shrunk);
        let PrefaultError::File(error) = ram.prefault(|_| ControlFlow::Continue(())).unwrap_err()
        else {
            panic!("not an error of the file")
        };
        assert_eq!(error.problem, shrunk);
    }

    #[test]
    fn prefaulting_counts_all_ranges_and_stops_between_them() {
        let ram = two_pages_apart();
        let mut told = Vec::new();
        let mut tell = |progress: Progress| {
            told.push((progress.done, progress.total));
            ControlFlow::Continue(())
        };
        ram.prefault(&mut tell).unwrap();
        assert_eq!(told, [(0x1000, 0x3000), (0x3000, 0x3000)]);
        let stopped = ram.prefault(|_| ControlFlow::Break(())).unwrap_err();
        assert_eq!(stopped, PrefaultError::Stopped(Progress { done: 0x1000, total: 0x3000 }));
        // Nothing is left to stop.
        let last = |p: Progress| match p.done < p.total {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        };
        assert_eq!(ram.prefault(last), Ok(()));
    }

    #[test]
    fn the_memory_lives_as_long_as_a_clone_of_it() {
        let ram = two_pages_apart();
        ram.memory().write_obj(0xa5_u8, GuestAddress(0x5fff)).unwrap();
        let memory = ram.memory().clone();
        drop(ram);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5fff)).unwrap(), 0xa5);
    }

    #[test]
    fn more_than_the_address_space_is_an_error_that_names_the_range() {
        let layout = RamLayout::new(1 << 51, &[], 52).unwrap();
        let error = GuestRam::new(&layout).unwrap_err().to_string();
        assert!(error.contains("0x0-0x7ffffffffffff") && error.contains("ENOMEM"), "{error}");
    }
}
