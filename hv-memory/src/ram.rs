//! The RAM of a guest: one mapping for each range of its layout.
//!
//! Made before the VM, so that initialisation can install the slots before the irqchip exists (a
//! slot added later waits for a grace period of the kernel, 5 to 8 ms). It must not know slots
//! beyond numbering them: the [`crate::SlotManager`] looks after them once the VM is there.

use std::sync::Arc;

use hv_core::{Errno, HostRange, MemorySlot, SlotFlags, SlotId};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

use crate::{GuestRange, MapError, Mapping, RamLayout};

/// Why a guest's RAM could not be made.
#[derive(Debug, Error)]
pub enum RamError {
    /// The host did not give the memory.
    #[error("no memory for the guest's RAM at {range}: {error}")]
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
    memory: GuestMemoryMmap,
    slots: Vec<MemorySlot>,
    mappings: Vec<(GuestRange, Arc<Mapping>)>,
}

impl GuestRam {
    /// Maps every range of `layout`, zero-filled.
    ///
    /// # Errors
    /// The range the host has no memory for, and why.
    pub fn new(layout: &RamLayout) -> Result<Self, RamError> {
        Self::map(layout, Mapping::anonymous)
    }

    /// The same in memory whose pages can be [remapped](Self::remap_page).
    ///
    /// # Errors
    /// The range the host has no memory for, and why.
    pub fn shared(layout: &RamLayout) -> Result<Self, RamError> {
        Self::map(layout, Mapping::shared)
    }

    fn map(
        layout: &RamLayout,
        mapping: fn(u64) -> Result<Mapping, MapError>,
    ) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        let mut mappings = Vec::new();
        for (id, &range) in (0..).zip(layout.ranges()) {
            let refused = |error| RamError::Map { range, error };
            let mapping = Arc::new(mapping(range.len()).map_err(refused)?);
            mappings.push((range, mapping.clone()));
            let region = mapping.region();
            let len = region.size();
            let (Some(region), Some(host)) =
                (GuestRegionMmap::with_arc(region, range.start()), HostRange::new(mapping, 0, len))
            else {
                // A layout has no range that wraps, and a mapping all of its bytes.
                let error = MapError { len: range.len(), call: "mmap", errno: Errno::EINVAL };
                return Err(refused(error));
            };
            regions.push(region);
            let flags = SlotFlags::default();
            slots.push(MemorySlot { id: SlotId(id), guest: range.start(), host, flags });
        }
        Ok(Self { memory: GuestMemoryMmap::from_regions(regions)?, slots, mappings })
    }

    /// The memory, for loaders and devices. Its clones share it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap {
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
        let page = offset - offset % crate::page_size();
        mapping.remap(page).map_err(|error| RamError::Map { range: *range, error })
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
    fn more_than_the_address_space_is_an_error_that_names_the_range() {
        let layout = RamLayout::new(1 << 51, &[], 52).unwrap();
        let error = GuestRam::new(&layout).unwrap_err().to_string();
        assert!(error.contains("0x0-0x7ffffffffffff") && error.contains("ENOMEM"), "{error}");
    }
}
