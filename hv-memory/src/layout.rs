//! Where a guest's RAM goes: an amount of memory laid around the holes that devices need.
//!
//! Pure arithmetic. Which holes there are is the machine's business, and whether the host has so
//! much memory its user's.

use thiserror::Error;
use vm_memory::GuestAddress;

use crate::{GuestRange, page_size};

/// Why an amount of memory can't be laid out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// No memory was asked for.
    #[error("a VM needs memory: the size is 0")]
    Zero,
    /// The size is no whole number of pages.
    #[error("{size:#x} bytes of memory are not a multiple of the host's page of {page} bytes")]
    Unaligned {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a page of the host.
        page: u64,
    },
    /// A hole does not begin and end on a page.
    #[error("the hole {hole} in guest memory is not aligned to the host's page of {page} bytes")]
    UnalignedHole {
        /// The hole.
        hole: GuestRange,
        /// Bytes of a page of the host.
        page: u64,
    },
    /// The last range would pass the last address the processor has.
    #[error(
        "{size:#x} bytes of memory do not fit into a guest with {address_bits} physical address \
         bits: at most {most:#x} bytes do"
    )]
    BeyondAddressBits {
        /// Bytes asked for.
        size: u64,
        /// Physical address bits.
        address_bits: u8,
        /// The most that fits beside the holes.
        most: u64,
    },
}

/// RAM ranges of a guest in ascending order, page-aligned, outside the holes.
///
/// ```
/// use hv_memory::{GuestRange, RamLayout};
/// use vm_memory::GuestAddress;
///
/// const GIB: u64 = 1 << 30;
/// let devices = GuestRange::new(GuestAddress(3 * GIB), GIB).unwrap();
/// let layout = RamLayout::new(4 * GIB, &[devices], 46).unwrap();
/// let ranges: Vec<_> = layout.ranges().iter().map(|r| r.to_string()).collect();
/// assert_eq!(ranges, ["0x0-0xbfffffff", "0x100000000-0x13fffffff"]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<GuestRange>,
}

impl RamLayout {
    /// Lays `size` bytes from address 0 upwards, around `holes`, for a processor with
    /// `address_bits` physical address bits (CPUID leaf 0x80000008, EAX bits 0 to 7).
    ///
    /// # Errors
    /// A size of 0, a size or a hole that is not page-aligned, or more than there are addresses
    /// for. KVM has at most 52 address bits.
    pub fn new(size: u64, holes: &[GuestRange], address_bits: u8) -> Result<Self, LayoutError> {
        let page = page_size();
        if size == 0 {
            return Err(LayoutError::Zero);
        }
        if !size.is_multiple_of(page) {
            return Err(LayoutError::Unaligned { size, page });
        }
        let unaligned = |hole: &&GuestRange| {
            !hole.start().0.is_multiple_of(page) || !hole.len().is_multiple_of(page)
        };
        if let Some(&hole) = holes.iter().find(unaligned) {
            return Err(LayoutError::UnalignedHole { hole, page });
        }

        let mut holes = holes.to_vec();
        holes.sort_unstable();
        let end = 1 << address_bits.min(52);
        let mut ranges = Vec::new();
        let (mut next, mut left) = (0, size);
        // The end of the address space stops the last range as a hole stops those before it.
        let stops = holes.iter().map(|hole| (hole.start().0, hole.last().0.saturating_add(1)));
        for (stop, resume) in stops.chain([(end, end)]) {
            let len = left.min(stop.min(end).saturating_sub(next));
            ranges.extend(GuestRange::new(GuestAddress(next), len));
            left -= len;
            next = next.max(resume);
        }
        if left > 0 {
            let most = size - left;
            return Err(LayoutError::BeyondAddressBits { size, address_bits, most });
        }
        Ok(Self { ranges })
    }

    /// The ranges, ascending; at least one.
    #[must_use]
    pub fn ranges(&self) -> &[GuestRange] {
        &self.ranges
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(GuestRange::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const PAGE: u64 = 4096;

    fn hole(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestAddress(start), len).unwrap()
    }

    fn pc(size: u64) -> Vec<(u64, u64)> {
        let layout = RamLayout::new(size, &[hole(3 * GIB, GIB)], 46).unwrap();
        assert_eq!(layout.size(), size);
        layout.ranges().iter().map(|r| (r.start().0, r.len())).collect()
    }

    #[test]
    fn memory_goes_below_the_hole_then_above_it() {
        assert_eq!(pc(128 << 20), [(0, 128 << 20)]);
        assert_eq!(pc(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(pc(3 * GIB + PAGE), [(0, 3 * GIB), (4 * GIB, PAGE)]);
        assert_eq!(pc(64 * GIB), [(0, 3 * GIB), (4 * GIB, 61 * GIB)]);
    }

    #[test]
    fn what_can_not_be_laid_out_is_refused_by_name() {
        let holes = [hole(3 * GIB, GIB)];
        let page = page_size();
        assert_eq!(RamLayout::new(0, &holes, 46), Err(LayoutError::Zero));
        assert_eq!(
            RamLayout::new(4097, &holes, 46),
            Err(LayoutError::Unaligned { size: 4097, page })
        );
        assert_eq!(
            RamLayout::new(GIB, &[hole(5, 6)], 46),
            Err(LayoutError::UnalignedHole { hole: hole(5, 6), page })
        );
        let all_but_the_hole = (1 << 36) - GIB;
        assert!(RamLayout::new(all_but_the_hole, &holes, 36).is_ok());
        assert_eq!(
            RamLayout::new(all_but_the_hole + PAGE, &holes, 36),
            Err(LayoutError::BeyondAddressBits {
                size: all_but_the_hole + PAGE,
                address_bits: 36,
                most: all_but_the_hole
            })
        );
        let nearly_everything = u64::MAX - (PAGE - 1);
        for bits in [0, 52, 64, 255] {
            assert!(matches!(
                RamLayout::new(nearly_everything, &holes, bits),
                Err(LayoutError::BeyondAddressBits { .. })
            ));
        }
    }

    #[test]
    fn a_hole_up_to_the_last_address_ends_memory() {
        let top = hole(GIB, u64::MAX - GIB + 1);
        assert!(RamLayout::new(GIB, &[top], 52).is_ok());
        assert!(RamLayout::new(GIB + PAGE, &[top], 52).is_err());
    }

    proptest! {
        #[test]
        fn ranges_are_ordered_disjoint_and_outside_every_hole(
            pages in 1..600_u64,
            holes in prop::collection::vec((0..300_u64, 1..60_u64), 0..5),
        ) {
            let holes: Vec<_> = holes.iter().map(|&(s, l)| hole(s * PAGE, l * PAGE)).collect();
            // A naive layout: the first pages that are in no hole.
            let free = |page: &u64| !holes.iter().any(|h| h.contains(GuestAddress(page * PAGE)));
            let naive: Vec<u64> = (0..).filter(free).take(pages as usize).collect();
            match RamLayout::new(pages * PAGE, &holes, 21) {
                Ok(layout) => {
                    let got: Vec<u64> = layout
                        .ranges()
                        .iter()
                        .flat_map(|r| r.start().0 / PAGE..=r.last().0 / PAGE)
                        .collect();
                    prop_assert_eq!(got, naive);
                }
                Err(LayoutError::BeyondAddressBits { .. }) => {
                    prop_assert!(*naive.last().unwrap() >= (1 << 21) / PAGE);
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }
}
