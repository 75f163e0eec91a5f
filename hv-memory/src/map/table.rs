//! The regions of a map and what is known of them without flattening: which are where, and which are
//! seen through which.
//!
//! Bookkeeping: it takes what it is given. What is legal is judged by [`super::Edit`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use hv_core::{HostRange, SlotFlags};
use iset::IntervalMap;

use super::RegionId;
use super::region::{Kind, Placement, Region};

/// Aliases from a region to what it shows in the end, at most. Enough for any machine; each is a step
/// whenever what the region shows is looked up.
pub(super) const MAX_ALIASES: usize = 8;

#[derive(Debug, Default)]
pub(super) struct Table {
    regions: BTreeMap<RegionId, Region>,
    /// Those with a place, which may overlap.
    placed: IntervalMap<u64, (i32, RegionId)>,
    /// The same by priority and start, with the address behind the last. Those of one priority don't
    /// overlap once an edit is over.
    by_priority: BTreeMap<(i32, u64, RegionId), u64>,
    /// What is shown, and by which alias.
    aliases: BTreeSet<(RegionId, RegionId)>,
    next: u64,
}

/// What a region shows in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    /// All of it; none of a device.
    pub(super) memory: Option<HostRange>,
    pub(super) flags: SlotFlags,
}

impl Table {
    pub(super) fn get(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(&id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (RegionId, &Region)> {
        self.regions.iter().map(|(&id, region)| (id, region))
    }

    pub(super) fn name(&self, id: RegionId) -> Arc<str> {
        self.regions.get(&id).map_or_else(|| "?".into(), |region| region.name.clone())
    }

    pub(super) fn new_id(&mut self) -> RegionId {
        let id = RegionId(self.next);
        self.next = self.next.saturating_add(1);
        id
    }

    /// Makes a region what is given, or takes it away; returns what it was.
    pub(super) fn put(&mut self, id: RegionId, region: Option<Region>) -> Option<Region> {
        let old = self.regions.remove(&id);
        if let Some(old) = &old {
            if let Some(Placement { range, priority }) = &old.placement {
                self.placed.remove_where(range.clone(), |(_, placed)| *placed == id);
                self.by_priority.remove(&(*priority, range.start, id));
            }
            if let Some(target) = old.target() {
                self.aliases.remove(&(target, id));
            }
        }
        if let Some(region) = region {
            if let Some(Placement { range, priority }) = &region.placement {
                self.placed.force_insert(range.clone(), (*priority, id));
                self.by_priority.insert((*priority, range.start, id), range.end);
            }
            if let Some(target) = region.target() {
                self.aliases.insert((target, id));
            }
            self.regions.insert(id, region);
        }
        old
    }

    /// The regions that have an address of `window`.
    pub(super) fn overlapping(
        &self,
        window: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, i32, RegionId)> + use<'_> {
        self.placed.iter(window.clone()).map(|(range, &(priority, id))| (range, priority, id))
    }

    /// A region of the same priority with an address of a placed region. One of those beside it by
    /// address is found, if they don't overlap each other.
    pub(super) fn conflict(&self, id: RegionId, placement: &Placement) -> Option<RegionId> {
        let Placement { range, priority } = placement;
        let key = (*priority, range.start, id);
        let before = self.by_priority.range(..key).next_back();
        let before = before.filter(|&(&(other, ..), &end)| other == *priority && end > range.start);
        let after = self.by_priority.range(key..).nth(1);
        let after =
            after.filter(|&(&(other, start, _), _)| other == *priority && start < range.end);
        before.or(after).map(|(&(.., other), _)| other)
    }

    /// The aliases that show a region directly.
    pub(super) fn aliases_of(&self, id: RegionId) -> impl Iterator<Item = RegionId> + use<'_> {
        self.aliases.range((id, RegionId(0))..=(id, RegionId(u64::MAX))).map(|&(_, alias)| alias)
    }

    /// The region and all through which it is seen, with how many aliases each is away.
    pub(super) fn seen_through(&self, id: RegionId) -> Vec<(RegionId, usize)> {
        // An alias has one target, so that nothing comes twice.
        let mut seen = vec![(id, 0_usize)];
        let mut next = 0;
        while let Some(&(id, away)) = seen.get(next) {
            seen.extend(self.aliases_of(id).map(|alias| (alias, away.saturating_add(1))));
            next += 1;
        }
        seen
    }

    /// The region and what it shows, what that shows, and so on.
    pub(super) fn chain(&self, id: RegionId) -> impl Iterator<Item = (RegionId, &Region)> {
        let first = self.regions.get(&id).map(|region| (id, region));
        std::iter::successors(first, |(_, region)| {
            let target = region.target()?;
            Some((target, self.regions.get(&target)?))
        })
    }

    /// What a region shows.
    pub(super) fn shown(&self, id: RegionId) -> Option<Shown> {
        let len = usize::try_from(self.get(id)?.len()).ok();
        let (mut flags, mut offset) = (SlotFlags::default(), 0_u64);
        for (_, region) in self.chain(id) {
            flags.readonly |= region.readonly;
            flags.log_dirty |= region.log_dirty;
            let memory = match &region.kind {
                Kind::Alias { offset: further, .. } => {
                    offset = offset.checked_add(*further)?;
                    continue;
                }
                Kind::Memory(host) => Some(host.slice(usize::try_from(offset).ok()?, len?)?),
                Kind::Mmio { .. } => None,
            };
            return Some(Shown { memory, flags });
        }
        None
    }
}
