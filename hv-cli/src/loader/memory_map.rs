//! What the guest is told about its memory: the one list behind e820, PVH and multiboot maps.
//!
//! Built from the guest memory itself, so that no map can promise RAM that is not there.

use std::ops::Range;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;

/// What a range of guest-physical addresses is. The discriminants are those that e820, PVH and
/// multiboot share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the operating system.
    Reserved = 2,
}

/// One range of a [`MemoryMap`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// Guest-physical addresses, never empty.
    pub range: Range<u64>,
    /// What they are.
    pub kind: MemoryKind,
}

/// The guest's memory map: sorted, without overlap or empty entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    entries: Vec<MemoryMapEntry>,
}

impl MemoryMap {
    /// The map of `memory`, with the extended BIOS data area, the BIOS area and `reserved`
    /// marked reserved, and the video window left out.
    pub fn new<M: GuestMemoryBackend>(memory: &M, reserved: &[Range<u64>]) -> Self {
        let ram = memory.iter().map(|region| {
            let start = region.start_addr().raw_value();
            start..start.saturating_add(region.len())
        });
        let reserved = reserved.iter().cloned().chain([
            layout::EBDA_START..layout::VGA_START,
            layout::BIOS_START..layout::HIGH_RAM_START,
        ]);
        let reserved = merged(reserved.collect());
        let video = layout::VGA_START..layout::BIOS_START;
        let usable = reserved.iter().chain([&video]).fold(merged(ram.collect()), without);

        let entry = |kind| move |range| MemoryMapEntry { range, kind };
        let mut entries: Vec<_> = usable
            .into_iter()
            .map(entry(MemoryKind::Ram))
            .chain(reserved.into_iter().map(entry(MemoryKind::Reserved)))
            .collect();
        entries.sort_by_key(|entry| entry.range.start);
        Self { entries }
    }

    /// The entries, lowest address first.
    #[must_use]
    pub fn entries(&self) -> &[MemoryMapEntry] {
        &self.entries
    }

    /// The ranges of usable RAM, lowest address first.
    pub fn ram(&self) -> impl Iterator<Item = &Range<u64>> {
        self.entries.iter().filter(|entry| entry.kind == MemoryKind::Ram).map(|entry| &entry.range)
    }

    /// Bytes of usable RAM below `limit`.
    #[must_use]
    pub fn ram_below(&self, limit: u64) -> u64 {
        self.ram().map(|range| range.end.min(limit).saturating_sub(range.start)).sum()
    }
}

/// `ranges` sorted, with empty ones dropped and touching ones joined.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What is left of `ranges` outside `hole`.
pub(super) fn without(ranges: Vec<Range<u64>>, hole: &Range<u64>) -> Vec<Range<u64>> {
    ranges
        .into_iter()
        .flat_map(|range| {
            [
                range.start..range.end.min(hole.start.max(range.start)),
                range.start.max(hole.end.min(range.end))..range.end,
            ]
        })
        .filter(|range| !range.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    fn map(ram: &[(u64, usize)], reserved: Range<u64>) -> Vec<(u64, u64, MemoryKind)> {
        let ram: Vec<_> = ram.iter().map(|&(start, size)| (GuestAddress(start), size)).collect();
        let memory = GuestMemoryMmap::<()>::from_ranges(&ram).unwrap();
        MemoryMap::new(&memory, &[reserved])
            .entries()
            .iter()
            .map(|entry| (entry.range.start, entry.range.end, entry.kind))
            .collect()
    }

    #[test]
    fn ram_on_both_sides_of_the_hole_with_the_reserved_range_of_init() {
        use MemoryKind::{Ram, Reserved};
        assert_eq!(
            map(&[(0, 0xc000_0000), (0x1_0000_0000, 0x4000_0000)], 0xfeff_c000..0xff00_0000),
            [
                (0, 0x9_fc00, Ram),
                (0x9_fc00, 0xa_0000, Reserved),
                (0xe_0000, 0x10_0000, Reserved),
                (0x10_0000, 0xc000_0000, Ram),
                (0xfeff_c000, 0xff00_0000, Reserved),
                (0x1_0000_0000, 0x1_4000_0000, Ram),
            ]
        );
    }

    #[test]
    fn adjacent_ram_is_one_entry_and_reserved_ranges_cut_it() {
        use MemoryKind::{Ram, Reserved};
        assert_eq!(
            map(&[(0x10_0000, 0x10_0000), (0x20_0000, 0x10_0000)], 0x18_0000..0x19_0000),
            [
                (0x9_fc00, 0xa_0000, Reserved),
                (0xe_0000, 0x10_0000, Reserved),
                (0x10_0000, 0x18_0000, Ram),
                (0x18_0000, 0x19_0000, Reserved),
                (0x19_0000, 0x30_0000, Ram),
            ]
        );
    }

    proptest! {
        #[test]
        fn entries_are_sorted_disjoint_and_ram_is_exactly_what_is_not_taken(
            reserved in prop::collection::vec((0u64..0x40, 0u64..8), 0..8),
        ) {
            const PAGE: u64 = 0x1_0000;
            let reserved: Vec<_> =
                reserved.iter().map(|&(at, len)| at * PAGE..(at + len) * PAGE).collect();
            let memory =
                GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x30_0000)]).unwrap();
            let map = MemoryMap::new(&memory, &reserved);
            for pair in map.entries().windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            for at in (0..0x40_0000u64).step_by(PAGE as usize / 64) {
                let taken = reserved.iter().any(|range| range.contains(&at))
                    || (layout::EBDA_START..layout::HIGH_RAM_START).contains(&at);
                let ram = map.ram().any(|range| range.contains(&at));
                prop_assert_eq!(ram, at < 0x30_0000 && !taken, "at {:#x}", at);
            }
        }
    }
}
