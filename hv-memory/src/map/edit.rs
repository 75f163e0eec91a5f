//! An edit: changes to regions that are made together or not at all.
//!
//! It changes the table of regions at once and remembers what was there. What is flattened is not its
//! business: it only says in which windows that has to be done again.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::region::{Kind, Placement, Region};
use super::table::{MAX_ALIASES, Table};
use super::{AddressMapError, NewRegion, RegionId};
use crate::{GuestRange, page_size};

/// What an edit changed: enough to flatten again, and to take it back.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// What the regions were; none where there was no region.
    before: BTreeMap<RegionId, Option<Region>>,
    /// Where something else may be seen now.
    pub(super) windows: Vec<Range<u64>>,
}

impl Changes {
    /// Takes them back.
    pub(super) fn undo(&mut self, table: &mut Table) {
        for (id, region) in std::mem::take(&mut self.before) {
            table.put(id, region);
        }
    }
}

/// Changes to an address map that are made together; see [`crate::AddressMap::edit`] and
/// [`crate::LiveMap::edit`].
///
/// Regions may overlap each other at equal priority for as long as the edit lasts, so that two can
/// change places.
#[derive(Debug)]
pub struct Edit<'a> {
    table: &'a mut Table,
    address_bits: u8,
    changes: Changes,
    /// Regions that are new, or that are somewhere else or show something else than before.
    touched: BTreeSet<RegionId>,
}

impl<'a> Edit<'a> {
    pub(super) fn new(table: &'a mut Table, address_bits: u8) -> Self {
        Self { table, address_bits, changes: Changes::default(), touched: BTreeSet::new() }
    }

    /// Adds a region.
    ///
    /// # Errors
    /// It has no bytes, its place is not one of the guest, or it is an alias of what is not there.
    pub fn add(&mut self, new: NewRegion) -> Result<RegionId, AddressMapError> {
        let NewRegion { name, kind, readonly, log_dirty, at } = new;
        let mut region = Region { name, kind, readonly, log_dirty, placement: None };
        if region.len() == 0 {
            return Err(AddressMapError::Empty { name: region.name });
        }
        if let Some(target) = region.target() {
            let depth = self.table.chain(target).count();
            self.check_alias(&region, target, depth)?;
        }
        if let Some((guest, priority)) = at {
            region.placement = Some(self.placement(&region, guest, priority)?);
        }
        let id = self.table.new_id();
        self.put(id, Some(region));
        Ok(id)
    }

    /// Removes a region.
    ///
    /// # Errors
    /// There is no such region, or an alias shows it.
    pub fn remove(&mut self, id: RegionId) -> Result<(), AddressMapError> {
        let name = self.region(id)?.name.clone();
        if let Some(alias) = self.table.aliases_of(id).next() {
            return Err(AddressMapError::InUse { name, alias: self.table.name(alias) });
        }
        self.put(id, None);
        Ok(())
    }

    /// Puts a region at a guest-physical address, or somewhere else if it is at one.
    ///
    /// # Errors
    /// There is no such region, or it can't be there.
    pub fn place(
        &mut self,
        id: RegionId,
        guest: GuestAddress,
        priority: i32,
    ) -> Result<(), AddressMapError> {
        let region = self.region(id)?;
        let placement = self.placement(region, guest, priority)?;
        self.change(id, |region| region.placement = Some(placement))
    }

    /// Takes a region away from the guest, and keeps it.
    ///
    /// # Errors
    /// There is no such region.
    pub fn unplace(&mut self, id: RegionId) -> Result<(), AddressMapError> {
        self.change(id, |region| region.placement = None)
    }

    /// Makes what is seen through a region readonly, or no longer.
    ///
    /// # Errors
    /// There is no such region.
    pub fn set_readonly(&mut self, id: RegionId, readonly: bool) -> Result<(), AddressMapError> {
        self.change(id, |region| region.readonly = readonly)
    }

    /// Starts or ends recording which pages are written through a region.
    ///
    /// # Errors
    /// There is no such region.
    pub fn set_log_dirty(&mut self, id: RegionId, log_dirty: bool) -> Result<(), AddressMapError> {
        self.change(id, |region| region.log_dirty = log_dirty)
    }

    /// Lets an alias show another region, or another part of it.
    ///
    /// # Errors
    /// There is no such region, it is no alias, or it would show what is not there or itself.
    pub fn retarget(
        &mut self,
        id: RegionId,
        target: RegionId,
        offset: u64,
    ) -> Result<(), AddressMapError> {
        let region = self.region(id)?;
        let Kind::Alias { len, .. } = region.kind else {
            return Err(AddressMapError::NotAnAlias { name: region.name.clone() });
        };
        let kind = Kind::Alias { target, offset, len };
        let changed = Region { kind: kind.clone(), ..region.clone() };
        if self.table.chain(target).any(|(shown, _)| shown == id) {
            let (name, target) = (changed.name, self.table.name(target));
            return Err(AddressMapError::AliasCycle { name, target });
        }
        let above = self.table.seen_through(id).into_iter().map(|(_, away)| away).max();
        let depth = self.table.chain(target).count().saturating_add(above.unwrap_or(0));
        self.check_alias(&changed, target, depth)?;
        self.change(id, |region| region.kind = kind)
    }

    fn region(&self, id: RegionId) -> Result<&Region, AddressMapError> {
        self.table.get(id).ok_or(AddressMapError::NoSuchRegion(id))
    }

    /// Where a region would be.
    fn placement(
        &self,
        region: &Region,
        guest: GuestAddress,
        priority: i32,
    ) -> Result<Placement, AddressMapError> {
        let (name, len) = (region.name.clone(), region.len());
        let Some(range) = GuestRange::new(guest, len) else {
            return Err(AddressMapError::Wraps { name, guest, len });
        };
        let address_bits = self.address_bits;
        let end = guest.0.checked_add(len).filter(|end| end.saturating_sub(1) >> address_bits == 0);
        let Some(end) = end else {
            return Err(AddressMapError::BeyondAddressBits { name, range, address_bits });
        };
        Ok(Placement { range: guest.0..end, priority })
    }

    /// Whether a region may be an alias of `target` with `depth` aliases below and above it.
    fn check_alias(
        &self,
        alias: &Region,
        target: RegionId,
        depth: usize,
    ) -> Result<(), AddressMapError> {
        let shown = self.region(target)?;
        let (name, target, target_len) = (alias.name.clone(), shown.name.clone(), shown.len());
        if depth > MAX_ALIASES {
            return Err(AddressMapError::TooDeep { name, target, most: MAX_ALIASES });
        }
        let Kind::Alias { offset, len, .. } = alias.kind else { return Ok(()) };
        match offset.checked_add(len) {
            Some(end) if end <= target_len => Ok(()),
            _ => Err(AddressMapError::OutsideTarget { name, offset, len, target, target_len }),
        }
    }

    fn change(
        &mut self,
        id: RegionId,
        change: impl FnOnce(&mut Region),
    ) -> Result<(), AddressMapError> {
        let mut region = self.region(id)?.clone();
        change(&mut region);
        if self.table.get(id) != Some(&region) {
            self.put(id, Some(region));
        }
        Ok(())
    }

    /// Makes a region what is given, and remembers what it was and where that makes a difference.
    fn put(&mut self, id: RegionId, region: Option<Region>) {
        let window = |region: &Region| region.placement.as_ref().map(|place| place.range.clone());
        let mut windows: Vec<_> = region.iter().filter_map(window).collect();
        let old = self.table.put(id, region);
        windows.extend(old.iter().filter_map(window));
        let shows_the_same = match (&old, self.table.get(id)) {
            (Some(old), Some(new)) => {
                let shown =
                    |region: &Region| (region.kind.clone(), region.readonly, region.log_dirty);
                shown(old) == shown(new)
            }
            _ => false,
        };
        self.touched.insert(id);
        if !shows_the_same {
            for (alias, _) in self.table.seen_through(id).into_iter().skip(1) {
                self.touched.insert(alias);
                windows.extend(self.table.get(alias).and_then(window));
            }
        }
        self.changes.windows.extend(windows);
        self.changes.before.entry(id).or_insert(old);
    }

    /// Judges what is there now as a whole.
    pub(super) fn finish(mut self) -> Result<Changes, AddressMapError> {
        for &id in &self.touched {
            self.check(id)?;
        }
        Ok(std::mem::take(&mut self.changes))
    }

    fn check(&self, id: RegionId) -> Result<(), AddressMapError> {
        let Some(region) = self.table.get(id) else { return Ok(()) };
        let Some(place) = &region.placement else { return Ok(()) };
        let (name, range) = (region.name.clone(), GuestRange::of(&place.range));
        let other = self.table.conflict(id, place).and_then(|other| self.table.get(other));
        if let Some((other, there)) =
            other.and_then(|other| Some((other, other.placement.as_ref()?)))
        {
            let (other, other_range): (Arc<str>, _) =
                (other.name.clone(), GuestRange::of(&there.range));
            let priority = place.priority;
            return Err(AddressMapError::Overlap { name, range, other, other_range, priority });
        }
        let memory = self.table.shown(id).and_then(|shown| shown.memory);
        if let Some(host) = memory.map(|memory| memory.address()) {
            let page = page_size();
            if host % page != place.range.start % page {
                return Err(AddressMapError::Unaligned { name, range, host, page });
            }
        }
        Ok(())
    }
}

impl Drop for Edit<'_> {
    fn drop(&mut self) {
        // An edit that did not finish: refused, given up, or its caller panicked.
        self.changes.undo(self.table);
    }
}
