//! The map flattened: at each address the region that is seen there, and the runs of memory that become
//! slots.
//!
//! Both follow from the table of regions alone. They are worked out anew for the windows that an edit
//! has changed and for nothing else.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ops::Range;

use hv_core::{HostRange, SlotFlags};

use super::RegionId;
use super::pieces::{Piece, Pieces};
use super::table::{Shown, Table};

/// What is seen in a flat range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flat {
    /// The region that is seen, and where in it the range begins.
    pub(super) region: RegionId,
    pub(super) offset: u64,
    /// None of a device.
    pub(super) memory: Option<Run>,
}

/// Memory without a gap, in the guest and in the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) host: HostRange,
    pub(super) flags: SlotFlags,
}

impl Run {
    /// The part of it that is `len` bytes from `offset`.
    pub(super) fn part(&self, offset: u64, len: u64) -> Option<HostRange> {
        self.host.slice(usize::try_from(offset).ok()?, usize::try_from(len).ok()?)
    }
}

impl Piece for Run {
    fn advance(&mut self, by: u64) {
        let len = (self.host.len() as u64).saturating_sub(by);
        self.host = self.part(by, len).unwrap_or_else(|| self.host.clone());
    }

    fn truncate(&mut self, len: u64) {
        self.host = self.part(0, len).unwrap_or_else(|| self.host.clone());
    }

    fn join(&self, _len: u64, next: &Self) -> Option<Self> {
        let host =
            if self.flags == next.flags { self.host.join(&next.host)? } else { return None };
        Some(Self { host, flags: self.flags })
    }
}

impl Piece for Flat {
    fn advance(&mut self, by: u64) {
        self.offset = self.offset.saturating_add(by);
        if let Some(memory) = &mut self.memory {
            memory.advance(by);
        }
    }

    fn truncate(&mut self, len: u64) {
        if let Some(memory) = &mut self.memory {
            memory.truncate(len);
        }
    }

    fn join(&self, len: u64, next: &Self) -> Option<Self> {
        if self.region != next.region || self.offset.checked_add(len)? != next.offset {
            return None;
        }
        let memory = match (&self.memory, &next.memory) {
            (None, None) => None,
            (Some(memory), Some(next)) => Some(memory.join(len, next)?),
            _ => return None,
        };
        Some(Self { region: self.region, offset: self.offset, memory })
    }
}

#[derive(Debug, Clone)]
pub(super) struct View {
    flat: Pieces<Flat>,
    runs: Pieces<Run>,
}

impl View {
    pub(super) fn new() -> Self {
        Self { flat: Pieces::new(), runs: Pieces::new() }
    }

    /// What is seen where something is.
    pub(super) fn flat(&self) -> &Pieces<Flat> {
        &self.flat
    }

    /// The memory in it, in runs as long as they can be.
    pub(super) fn runs(&self) -> &Pieces<Run> {
        &self.runs
    }

    /// Works out anew what is seen in `window`.
    pub(super) fn update(&mut self, table: &Table, window: &Range<u64>) {
        self.flat.clear(window);
        self.runs.clear(window);
        // Where something begins or ends to be there, in order; what ends at an address is gone before
        // what begins there is.
        let mut edges = Vec::new();
        for (range, priority, id) in table.overlapping(window) {
            let (start, end) = (range.start.max(window.start), range.end.min(window.end));
            edges.push((start, true, priority, id, range.start));
            edges.push((end, false, priority, id, range.start));
        }
        edges.sort_unstable();
        let mut there: BTreeSet<(i32, RegionId, u64)> = BTreeSet::new();
        let mut since = window.start;
        for &(address, begins, priority, id, start) in &edges {
            if let Some(&(_, seen, seen_start)) = there.last().filter(|_| since < address) {
                self.put(table, since..address, seen, seen_start);
            }
            since = address;
            match begins {
                true => there.insert((priority, id, start)),
                false => there.remove(&(priority, id, start)),
            };
        }
    }

    /// `region`, which begins at `start`, is seen in `range`.
    fn put(&mut self, table: &Table, range: Range<u64>, region: RegionId, start: u64) {
        let offset = range.start.saturating_sub(start);
        let len = range.end.saturating_sub(range.start);
        let memory = table.shown(region).and_then(|Shown { memory, flags }| {
            let all = Run { host: memory?, flags };
            Some(Run { host: all.part(offset, len)?, flags })
        });
        if let Some(memory) = &memory {
            self.runs.put(range.clone(), memory.clone());
        }
        self.flat.put(range, Flat { region, offset, memory });
    }
}

/// Windows put together where they touch, in order.
pub(super) fn coalesced(mut windows: Vec<Range<u64>>) -> Vec<Range<u64>> {
    windows.sort_unstable_by_key(|window| (window.start, Reverse(window.end)));
    let mut all: Vec<Range<u64>> = Vec::with_capacity(windows.len());
    for window in windows {
        match all.last_mut() {
            Some(last) if window.start <= last.end => last.end = last.end.max(window.end),
            _ => all.push(window),
        }
    }
    all
}
