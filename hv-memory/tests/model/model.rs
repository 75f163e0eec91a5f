//! What an address map means, worked out the long way: cell by cell, each time anew.

use std::collections::BTreeMap;

use hv_memory::RegionId;

/// Bytes of a cell: addresses, offsets and lengths of regions are multiples of it.
pub(crate) const CELL: u64 = 0x400;

/// Cells of a page.
pub(crate) const PER_PAGE: u64 = 4;

/// Cells of the guest's physical addresses.
pub(crate) const CELLS: u64 = 1 << (ADDRESS_BITS - 10);

pub(crate) const ADDRESS_BITS: u8 = 17;

/// Aliases of aliases there can be.
pub(crate) const DEEPEST: usize = 8;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// Cells of a memory from an offset.
    Memory {
        memory: usize,
        offset: u64,
    },
    Mmio,
    Alias {
        target: RegionId,
        offset: u64,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Region {
    pub(crate) kind: Kind,
    pub(crate) len: u64,
    pub(crate) readonly: bool,
    pub(crate) log_dirty: bool,
    /// First cell, and priority.
    pub(crate) place: Option<(u64, i32)>,
}

/// A cell of a memory, and what may be done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) memory: usize,
    pub(crate) cell: u64,
    pub(crate) readonly: bool,
    pub(crate) log_dirty: bool,
}

/// A page a guest has: of which memory, which, and what may be done with it.
pub(crate) type Page = Cell;

/// What is seen in a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) region: RegionId,
    pub(crate) offset: u64,
    pub(crate) memory: Option<Cell>,
}

/// A slot, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot {
    pub(crate) page: u64,
    pub(crate) pages: u64,
    pub(crate) first: Page,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Model {
    pub(crate) regions: BTreeMap<RegionId, Region>,
}

impl Model {
    /// Cell `offset` of a region.
    fn shown(&self, id: RegionId, offset: u64) -> Option<Cell> {
        let region = &self.regions[&id];
        let (readonly, log_dirty) = (region.readonly, region.log_dirty);
        match region.kind {
            Kind::Memory { memory, offset: first } => {
                Some(Cell { memory, cell: first + offset, readonly, log_dirty })
            }
            Kind::Mmio => None,
            Kind::Alias { target, offset: first } => {
                let cell = self.shown(target, first + offset)?;
                Some(Cell {
                    readonly: cell.readonly || readonly,
                    log_dirty: cell.log_dirty || log_dirty,
                    ..cell
                })
            }
        }
    }

    fn seen(&self, cell: u64) -> Option<Seen> {
        let there = self.regions.iter().filter_map(|(&region, r)| {
            let (first, priority) = r.place?;
            (first..first + r.len).contains(&cell).then(|| (priority, region, cell - first))
        });
        let (_, region, offset) = there.max_by_key(|&(priority, ..)| priority)?;
        Some(Seen { region, offset, memory: self.shown(region, offset) })
    }

    /// What is seen in each cell.
    pub(crate) fn cells(&self) -> Vec<Option<Seen>> {
        (0..CELLS).map(|cell| self.seen(cell)).collect()
    }
    /// Two regions of one priority are in one place.
    pub(crate) fn overlaps(&self) -> bool {
        let places: Vec<_> =
            self.regions.values().filter_map(|r| Some((r.place?, r.len))).collect();
        places.iter().enumerate().any(|(i, ((start, priority), len))| {
            places[..i].iter().any(|((other, other_priority), other_len)| {
                priority == other_priority && *start < other + other_len && *other < start + len
            })
        })
    }

    /// A region shows memory that can't be mapped where it is.
    pub(crate) fn is_unaligned(&self) -> bool {
        self.regions.iter().any(|(&id, region)| {
            let (Some((first, _)), Some(shown)) = (region.place, self.shown(id, 0)) else {
                return false;
            };
            first % PER_PAGE != shown.cell % PER_PAGE
        })
    }

    /// Aliases below a region, itself included.
    pub(crate) fn depth(&self, id: RegionId) -> usize {
        match self.regions[&id].kind {
            Kind::Alias { target, .. } => 1 + self.depth(target),
            _ => 1,
        }
    }

    /// Aliases above a region.
    pub(crate) fn height(&self, id: RegionId) -> usize {
        let above = self.aliases(id).map(|alias| 1 + self.height(alias));
        above.max().unwrap_or(0)
    }

    /// The aliases that show a region.
    pub(crate) fn aliases(&self, id: RegionId) -> impl Iterator<Item = RegionId> {
        let shows = move |region: &Region| matches!(region.kind, Kind::Alias { target, .. } if target == id);
        self.regions.iter().filter(move |(_, region)| shows(region)).map(|(&alias, _)| alias)
    }

    /// Whether a region shows another, or is it.
    pub(crate) fn shows(&self, id: RegionId, other: RegionId) -> bool {
        id == other
            || match self.regions[&id].kind {
                Kind::Alias { target, .. } => self.shows(target, other),
                _ => false,
            }
    }
}

/// The pages a guest has: those of which each cell is memory and follows the one before.
pub(crate) fn pages(cells: &[Option<Seen>]) -> BTreeMap<u64, Page> {
    let page = |(page, cells): (u64, &[Option<Seen>])| {
        let cell = |n: u64| cells[n as usize]?.memory;
        let first = cell(0)?;
        let follows = |n| cell(n) == Some(Cell { cell: first.cell + n, ..first });
        (0..PER_PAGE).all(follows).then_some((page, first))
    };
    (0..).zip(cells.chunks(PER_PAGE as usize)).filter_map(page).collect()
}

/// The slots that are as long as can be, cut at multiples of `max` pages.
pub(crate) fn slots(pages: &BTreeMap<u64, Page>, max: u64) -> Vec<Slot> {
    let mut slots: Vec<Slot> = Vec::new();
    for (&page, &first) in pages {
        if let Some(slot) = slots.last_mut().filter(|slot| slot.page + slot.pages == page) {
            let next = Cell { cell: slot.first.cell + slot.pages * PER_PAGE, ..slot.first };
            if first == next && page % max != 0 {
                slot.pages += 1;
                continue;
            }
        }
        slots.push(Slot { page, pages: 1, first });
    }
    slots
}
