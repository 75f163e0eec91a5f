//! Where in guest memory each part of a boot goes.
//!
//! Every part is claimed before it is written: nothing is put outside RAM, nothing over anything
//! else. What a format fixes (the kernel) is claimed first; the rest is placed around it.

use std::fmt;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::memory_map::{MemoryMap, without};
use crate::layout;

/// A part of the boot that takes guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The kernel, with the room it needs to unpack itself.
    Kernel,
    /// The ELF segment of this program header.
    Segment(u16),
    /// The initial RAM disk, or the multiboot module.
    Initrd,
    /// The kernel command line.
    Cmdline,
    /// Linux's boot parameters (the "zero page").
    BootParams,
    /// The PVH start info with its memory map and module list.
    StartInfo,
    /// The multiboot information with its memory map and module list.
    MultibootInfo,
    /// The page tables for entry in long mode.
    PageTables,
    /// The global descriptor table.
    Gdt,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Segment(index) => return write!(f, "ELF segment {index}"),
            Part::Kernel => "the kernel",
            Part::Initrd => "the initrd",
            Part::Cmdline => "the command line",
            Part::BootParams => "the boot parameters",
            Part::StartInfo => "the PVH start info",
            Part::MultibootInfo => "the multiboot information",
            Part::PageTables => "the boot page tables",
            Part::Gdt => "the GDT",
        })
    }
}

/// Why a part found no place in guest memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// An address range that leaves the address space.
    #[error("{part} starts at {start:#x} and is {size:#x} bytes long: past the end of memory")]
    Wraps {
        /// What was to be placed.
        part: Part,
        /// Its guest-physical address.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// A fixed place that is not usable RAM below 4 GiB.
    #[error("{part} belongs at {range:#x?}, but below 4 GiB the guest has RAM only at {}", list(.ram))]
    NotRam {
        /// What was to be placed.
        part: Part,
        /// Where it belongs.
        range: Range<u64>,
        /// The usable RAM below 4 GiB.
        ram: Vec<Range<u64>>,
    },
    /// Two parts that want the same memory.
    #[error("{part} at {range:#x?} overlaps {other} at {taken:#x?}")]
    Overlap {
        /// What was to be placed.
        part: Part,
        /// Where it belongs.
        range: Range<u64>,
        /// What is there.
        other: Part,
        /// Where that is.
        taken: Range<u64>,
    },
    /// No free range is large enough.
    #[error(
        "{part} needs {size} bytes, but the largest free range in {window:#x?} has {largest} \
         bytes; give the guest more memory or make it smaller"
    )]
    NoRoom {
        /// What was to be placed.
        part: Part,
        /// Its size in bytes.
        size: u64,
        /// Where it may be.
        window: Range<u64>,
        /// The largest free range there, in bytes.
        largest: u64,
    },
    /// The memory map promised RAM that the guest memory does not have.
    #[error("{part}: {size} bytes at {at:#x} can't be written to guest memory")]
    Write {
        /// What was to be written.
        part: Part,
        /// Where.
        at: u64,
        /// How many bytes.
        size: usize,
    },
}

/// The ranges, for a message.
fn list(ranges: &[Range<u64>]) -> String {
    ranges.iter().map(|range| format!("{range:#x?}")).collect::<Vec<_>>().join(", ")
}

/// Guest memory while it is being filled.
pub(super) struct Space<'a, M> {
    memory: &'a M,
    map: &'a MemoryMap,
    claims: Vec<(Part, Range<u64>)>,
}

impl<'a, M: GuestMemoryBackend> Space<'a, M> {
    pub(super) fn new(memory: &'a M, map: &'a MemoryMap) -> Self {
        Self { memory, map, claims: Vec::new() }
    }

    pub(super) fn map(&self) -> &'a MemoryMap {
        self.map
    }

    /// Takes exactly `size` bytes at `start`.
    pub(super) fn claim(
        &mut self,
        part: Part,
        start: u64,
        size: u64,
    ) -> Result<Range<u64>, PlaceError> {
        let end = start.checked_add(size).ok_or(PlaceError::Wraps { part, start, size })?;
        let range = start..end;
        if range.is_empty() {
            return Ok(range);
        }
        // The boot page tables and every 32-bit entry reach no further.
        let reach = layout::MMIO_HOLE_END;
        if end > reach || !self.map.ram().any(|ram| ram.start <= start && end <= ram.end) {
            let ram = self.map.ram().filter(|ram| ram.start < reach).cloned().collect();
            return Err(PlaceError::NotRam { part, range, ram });
        }
        let taken =
            self.claims.iter().find(|(_, other)| other.start < end && start < other.end).cloned();
        if let Some((other, taken)) = taken {
            return Err(PlaceError::Overlap { part, range, other, taken });
        }
        self.claims.push((part, range.clone()));
        Ok(range)
    }

    /// Takes the highest free `size` bytes inside `window` that start at a multiple of `align`, a
    /// power of two.
    pub(super) fn place(
        &mut self,
        part: Part,
        size: u64,
        align: u64,
        window: Range<u64>,
    ) -> Result<u64, PlaceError> {
        let free = self.free(&window);
        let fit = free.iter().rev().find_map(|gap| {
            let start = gap.end.checked_sub(size)? & !(align - 1);
            (start >= gap.start).then_some(start)
        });
        let Some(start) = fit else {
            let largest = free.iter().map(|gap| gap.end - gap.start).max().unwrap_or(0);
            return Err(PlaceError::NoRoom { part, size, window, largest });
        };
        self.claim(part, start, size).map(|range| range.start)
    }

    /// [`Self::place`] in the low memory kept for boot data, and write.
    pub(super) fn put_low(
        &mut self,
        part: Part,
        align: u64,
        bytes: &[u8],
    ) -> Result<u64, PlaceError> {
        let at = self.place_low(part, align, bytes.len())?;
        self.write(part, at, bytes)?;
        Ok(at)
    }

    /// [`Self::place`] in the low memory kept for boot data.
    pub(super) fn place_low(
        &mut self,
        part: Part,
        align: u64,
        size: usize,
    ) -> Result<u64, PlaceError> {
        self.place(part, size as u64, align, layout::BOOT_DATA_START..layout::BOOT_DATA_END)
    }

    /// Writes `bytes` to memory claimed before.
    pub(super) fn write(&self, part: Part, at: u64, bytes: &[u8]) -> Result<(), PlaceError> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(|_| PlaceError::Write {
            part,
            at,
            size: bytes.len(),
        })
    }

    /// The unclaimed RAM of `window`, lowest address first.
    fn free(&self, window: &Range<u64>) -> Vec<Range<u64>> {
        let ram = self
            .map
            .ram()
            .map(|ram| ram.start.max(window.start)..ram.end.min(window.end))
            .filter(|ram| !ram.is_empty())
            .collect();
        self.claims.iter().fold(ram, |gaps, (_, taken)| without(gaps, taken))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn with_space(mib: u64, test: impl FnOnce(&mut Space<'_, GuestMemoryMmap>)) {
        let size = usize::try_from(mib * MIB).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let map = MemoryMap::new(&memory, &[]);
        test(&mut Space::new(&memory, &map));
    }

    #[test]
    fn places_downwards_around_what_is_claimed() {
        with_space(16, |space| {
            space.claim(Part::Kernel, 14 * MIB, MIB).unwrap();
            let window = MIB..16 * MIB;
            assert_eq!(space.place(Part::Initrd, MIB, 4096, window.clone()), Ok(15 * MIB));
            assert_eq!(space.place(Part::Initrd, 1, 4096, window), Ok(14 * MIB - 4096));
        });
    }

    #[test]
    fn a_part_that_does_not_fit_names_both_sizes() {
        with_space(16, |space| {
            space.claim(Part::Kernel, 8 * MIB, MIB).unwrap();
            let error = space.place(Part::Initrd, 9 * MIB, 4096, MIB..16 * MIB).unwrap_err();
            assert_eq!(
                error,
                PlaceError::NoRoom {
                    part: Part::Initrd,
                    size: 9 * MIB,
                    window: MIB..16 * MIB,
                    largest: 7 * MIB
                }
            );
            let text = error.to_string();
            assert!(text.contains("9437184") && text.contains("7340032"), "{text}");
        });
    }

    #[test]
    fn refuses_what_is_not_ram_wraps_or_is_taken() {
        with_space(16, |space| {
            space.claim(Part::Kernel, 2 * MIB, MIB).unwrap();
            let part = Part::Segment(1);
            for (start, size) in [(16 * MIB - 1, 2), (0x9_f000, 0x1000), (1 << 40, 1)] {
                let refused = space.claim(part, start, size);
                assert!(matches!(refused, Err(PlaceError::NotRam { .. })), "{refused:?}");
            }
            assert!(matches!(space.claim(part, u64::MAX, 2), Err(PlaceError::Wraps { .. })));
            assert!(matches!(
                space.claim(part, 3 * MIB - 1, 1),
                Err(PlaceError::Overlap { other: Part::Kernel, .. })
            ));
            assert_eq!(space.claim(part, 3 * MIB, 1), Ok(3 * MIB..3 * MIB + 1));
            assert!(space.claim(part, u64::MAX, 0).is_ok());
        });
    }

    proptest! {
        #[test]
        fn claims_never_overlap_and_stay_in_ram(
            steps in prop::collection::vec(
                (any::<bool>(), 0u64..4 * MIB, 0u64..MIB, 0u32..13), 0..40),
        ) {
            with_space(4, |space| {
                for (fixed, at, size, align) in steps {
                    let _ = if fixed {
                        space.claim(Part::Kernel, at, size).map(|range| range.start)
                    } else {
                        space.place(Part::Initrd, size, 1 << align, at..4 * MIB)
                    };
                }
                for (index, (_, claim)) in space.claims.iter().enumerate() {
                    assert!(space.map.ram().any(|r| r.start <= claim.start && claim.end <= r.end));
                    for (_, other) in &space.claims[..index] {
                        assert!(claim.end <= other.start || other.end <= claim.start);
                    }
                }
            });
        }
    }
}
