//! The address map by itself, without a VM.

use std::ops::Range;
use std::sync::Arc;

use hv_core::{HostRange, MemorySlot, SlotFlags, SlotId};
use vm_memory::GuestAddress;

use super::edit::{Changes, Edit};
use super::slots::{Shape, Wanted};
use super::table::Table;
use super::view::{Flat, View, coalesced};
use super::{AddressMapError, RegionId};
use crate::{GuestRange, page_size};

/// Bytes of one slot at most, unless a map is told otherwise: 2^30 pages, the largest power of two
/// below KVM's limit of 2^31 - 1 pages.
const MAX_SLOT_PAGES: u64 = 1 << 30;

/// KVM has no guest-physical addresses beyond these bits.
const MAX_ADDRESS_BITS: u8 = 52;

/// A range in which one region is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatRange {
    /// Its guest-physical addresses.
    pub range: GuestRange,
    /// The region that is seen.
    pub region: RegionId,
    /// Its name.
    pub name: Arc<str>,
    /// Where in the region the range begins.
    pub offset: u64,
    /// The memory that is seen; none of a device.
    pub memory: Option<FlatMemory>,
}

/// Memory in a flat range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatMemory {
    /// As many bytes as the range has.
    pub host: HostRange,
    /// Readonly, or logging.
    pub flags: SlotFlags,
}

/// What is at a guest-physical address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The range it is in.
    pub flat: FlatRange,
    /// Whether the guest's reads of it exit as MMIO: of a device, and of memory that shares its page
    /// with something else.
    pub traps: bool,
}

/// What a guest sees at which guest-physical address: regions of RAM, ROM and devices, aliases of
/// them, and which hides which.
///
/// Where regions overlap, the one with the higher priority is seen. The map is flattened as it
/// changes, at a cost that depends on the change and, by a logarithm, on the number of regions.
///
/// ```
/// use std::sync::Arc;
/// use hv_core::HostRange;
/// use hv_memory::{AddressMap, Mapping, NewRegion};
/// use vm_memory::GuestAddress;
///
/// let memory = Arc::new(Mapping::anonymous(1 << 20)?);
/// let host = HostRange::new(memory, 0, 1 << 20).ok_or("no such range")?;
/// let mut map = AddressMap::new(46);
/// map.edit(|edit| {
///     edit.add(NewRegion::ram("RAM", host).at(GuestAddress(0), 0))?;
///     edit.add(NewRegion::mmio("VGA", 0x2_0000).at(GuestAddress(0xa_0000), 1))
/// })?;
/// let flat: Vec<_> = map.flat().map(|flat| format!("{} {}", flat.range, flat.name)).collect();
/// assert_eq!(flat, ["0x0-0x9ffff RAM", "0xa0000-0xbffff VGA", "0xc0000-0xfffff RAM"]);
/// assert_eq!(map.slots().len(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AddressMap {
    address_bits: u8,
    table: Table,
    view: View,
    pub(super) shape: Shape,
}

impl AddressMap {
    /// An empty map for a guest whose processor has so many physical address bits; KVM has 52 at
    /// most.
    #[must_use]
    pub fn new(address_bits: u8) -> Self {
        let page = page_size();
        let shape = Shape { page, max: MAX_SLOT_PAGES.saturating_mul(page) };
        let address_bits = address_bits.min(MAX_ADDRESS_BITS);
        Self { address_bits, table: Table::default(), view: View::new(), shape }
    }

    /// Cuts memory into slots of `bytes` at most, rounded down to pages; one page at least. They
    /// begin and end at multiples of that size, so that a change at one end of much memory leaves the
    /// slots at the other end alone.
    #[must_use]
    pub fn with_max_slot_size(mut self, bytes: u64) -> Self {
        let page = self.shape.page;
        let pages = (bytes / page).clamp(1, MAX_SLOT_PAGES);
        self.shape.max = pages.saturating_mul(page);
        self
    }

    /// Makes changes together: all that `change` makes, or none if it fails or they don't go together.
    ///
    /// # Errors
    /// What `change` returns, and regions that overlap at equal priority, or show memory that can't be
    /// mapped where they are.
    pub fn edit<R>(
        &mut self,
        change: impl FnOnce(&mut Edit<'_>) -> Result<R, AddressMapError>,
    ) -> Result<R, AddressMapError> {
        self.stage(change).map(|(made, _)| made)
    }

    /// The same, with what it takes to undo it.
    pub(super) fn stage<R>(
        &mut self,
        change: impl FnOnce(&mut Edit<'_>) -> Result<R, AddressMapError>,
    ) -> Result<(R, Changes), AddressMapError> {
        let mut edit = Edit::new(&mut self.table, self.address_bits);
        let made = change(&mut edit)?;
        let mut changes = edit.finish()?;
        changes.windows = coalesced(std::mem::take(&mut changes.windows));
        self.flatten(&changes.windows);
        Ok((made, changes))
    }

    pub(super) fn undo(&mut self, mut changes: Changes) {
        changes.undo(&mut self.table);
        self.flatten(&changes.windows);
    }

    fn flatten(&mut self, windows: &[Range<u64>]) {
        for window in windows {
            self.view.update(&self.table, window);
        }
    }

    /// The regions: which, and where if it has a place.
    pub fn regions(&self) -> impl Iterator<Item = (RegionId, &str, Option<GuestRange>)> {
        self.table.iter().map(|(id, region)| {
            let range = region.placement.as_ref().map(|place| GuestRange::of(&place.range));
            (id, &*region.name, range)
        })
    }

    /// What is seen, by address. Neighbours differ in region, or in what they show.
    pub fn flat(&self) -> impl Iterator<Item = FlatRange> {
        self.view.flat().iter().map(|(range, flat)| self.flat_range(&range, flat))
    }

    /// What is seen at an address.
    #[must_use]
    pub fn at(&self, address: GuestAddress) -> Option<Found> {
        let (range, flat) = self.view.flat().at(address.0)?;
        let run = self.view.runs().at(address.0);
        let in_slot = run.is_some_and(|(run, _)| self.shape.aligned(&run).contains(&address.0));
        Some(Found { flat: self.flat_range(&range, flat), traps: !in_slot })
    }

    /// Memory that shares its page of the host with something else, or with nothing: it is in no
    /// slot, and the guest's accesses exit as MMIO. [`Self::at`] says what to answer them with.
    pub fn sub_page(&self) -> impl Iterator<Item = GuestRange> {
        self.view.runs().iter().flat_map(|(run, _)| {
            let aligned = self.shape.aligned(&run);
            let rests = match aligned.is_empty() {
                true => [run.clone(), run.end..run.end],
                false => [run.start..aligned.start, aligned.end..run.end],
            };
            rests.into_iter().filter(|rest| !rest.is_empty()).map(|rest| GuestRange::of(&rest))
        })
    }

    /// The slots that give its memory to a guest, with ids from 0 in the order of guest addresses: to
    /// be installed by `hv_core::init`, before the irqchip exists, and then taken over by
    /// [`crate::LiveMap::adopt`].
    #[must_use]
    pub fn slots(&self) -> Vec<MemorySlot> {
        let wanted = self.wanted(&(0..1 << MAX_ADDRESS_BITS));
        let slot = |(id, wanted): (u32, Wanted)| MemorySlot {
            id: SlotId(id),
            guest: GuestAddress(wanted.range.start),
            host: wanted.host,
            flags: wanted.flags,
        };
        (0..).zip(wanted).map(slot).collect()
    }

    /// The slots that have an address of `window`.
    pub(super) fn wanted(&self, window: &Range<u64>) -> Vec<Wanted> {
        let runs = self.view.runs().overlapping(window);
        runs.flat_map(|(range, run)| self.shape.slots(&range, run, window)).collect()
    }

    pub(super) fn address_bits(&self) -> u8 {
        self.address_bits
    }

    pub(super) fn view(&self) -> &View {
        &self.view
    }

    /// The name of what is seen at an address.
    pub(super) fn name_at(&self, address: u64) -> Arc<str> {
        let seen = self.view.flat().at(address);
        seen.map_or_else(|| "memory".into(), |(_, flat)| self.table.name(flat.region))
    }

    fn flat_range(&self, range: &Range<u64>, flat: &Flat) -> FlatRange {
        let memory = flat.memory.clone();
        FlatRange {
            range: GuestRange::of(range),
            region: flat.region,
            name: self.table.name(flat.region),
            offset: flat.offset,
            memory: memory.map(|run| FlatMemory { host: run.host, flags: run.flags }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::NewRegion;
    use super::*;

    #[test]
    fn a_change_of_one_region_of_many_looks_at_what_it_overlaps() {
        let mut map = AddressMap::new(46);
        let ids = map.edit(|edit| {
            (0..1000)
                .map(|n| {
                    let place = GuestAddress(n * 0x1000);
                    edit.add(NewRegion::mmio("device", 0x1800).at(place, n as i32))
                })
                .collect::<Result<Vec<_>, _>>()
        });
        let id = ids.unwrap()[500];
        let (_, changes) =
            map.stage(|edit| edit.place(id, GuestAddress(100 * 0x1000), 5000)).unwrap();
        let places = changes.windows.iter().map(|window| window.end - window.start);
        assert_eq!(places.collect::<Vec<_>>(), [0x1800, 0x1800]);
        let looked_at = changes.windows.iter().map(|window| map.table.overlapping(window).count());
        // Itself, its neighbours there, and those where it was.
        assert_eq!(looked_at.collect::<Vec<_>>(), [4, 2]);
    }
}
