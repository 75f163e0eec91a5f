//! What slots there are, and which further one would be legal.
//!
//! Bookkeeping only: it must not call KVM.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hv_core::{MemorySlot, SlotId};
use vm_memory::GuestAddress;

use super::{SlotError, SlotLimits};
use crate::{GuestRange, page_size};

/// Pages of one slot at most (`KVM_MEM_MAX_NR_PAGES`).
const MAX_PAGES: u64 = (1 << 31) - 1;

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) slot: MemorySlot,
    pub(super) range: GuestRange,
    /// KVM has it. If not it keeps its number but takes up no addresses.
    pub(super) mapped: bool,
}

impl Entry {
    /// KVM records which of its pages are written.
    pub(super) fn logs(&self) -> bool {
        self.mapped && self.slot.flags.log_dirty
    }
}

#[derive(Debug)]
pub(super) struct SlotTable {
    limits: SlotLimits,
    entries: BTreeMap<SlotId, Entry>,
    /// Where the mapped ones begin.
    by_start: BTreeMap<u64, SlotId>,
    /// Unused numbers below `next`, from which on all are unused.
    unused: BTreeSet<SlotId>,
    next: u32,
}

impl SlotTable {
    pub(super) fn new(limits: SlotLimits) -> Self {
        Self {
            limits,
            entries: BTreeMap::new(),
            by_start: BTreeMap::new(),
            unused: BTreeSet::new(),
            next: 0,
        }
    }

    pub(super) fn get(&self, id: SlotId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// The entries, by number.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// The mapped entries, by guest address.
    pub(super) fn mapped(&self) -> impl Iterator<Item = &Entry> + Clone {
        self.by_start.values().filter_map(|id| self.entries.get(id))
    }

    /// Numbers that are unused.
    pub(super) fn available(&self) -> u32 {
        self.limits.slots.saturating_sub(self.entries.len() as u32)
    }

    /// The lowest unused number. It stays unused until an entry with it is inserted.
    pub(super) fn unused_id(&self, name: &Arc<str>) -> Result<SlotId, SlotError> {
        let limit = self.limits.slots;
        let id = self.unused.first().copied().unwrap_or(SlotId(self.next));
        if id.0 < limit { Ok(id) } else { Err(SlotError::NoFreeSlot { name: name.clone(), limit }) }
    }

    /// Refuses a number that is in use, or that KVM does not have.
    pub(super) fn check_id(&self, name: &Arc<str>, id: SlotId) -> Result<(), SlotError> {
        let limit = self.limits.slots;
        if id.0 >= limit {
            return Err(SlotError::IdBeyondLimit { name: name.clone(), id, limit });
        }
        if self.entries.contains_key(&id) {
            return Err(SlotError::IdInUse { name: name.clone(), id });
        }
        Ok(())
    }

    /// Where a slot would be, if it may be there beside all mapped ones but itself.
    pub(super) fn place(
        &self,
        name: &Arc<str>,
        slot: &MemorySlot,
    ) -> Result<GuestRange, SlotError> {
        let range = self.shape(name, slot)?;
        match self.overlapping(range, slot.id) {
            None => Ok(range),
            Some(other) => Err(SlotError::Overlap {
                name: name.clone(),
                range,
                other: other.name.clone(),
                other_range: other.range,
            }),
        }
    }

    /// Where a slot would be, if KVM takes such slots at all.
    pub(super) fn shape(
        &self,
        name: &Arc<str>,
        slot: &MemorySlot,
    ) -> Result<GuestRange, SlotError> {
        let name = || name.clone();
        let len = slot.host.len() as u64;
        let page = page_size();
        if len == 0 {
            return Err(SlotError::Empty { name: name() });
        }
        let Some(range) = GuestRange::new(slot.guest, len) else {
            return Err(SlotError::Wraps { name: name(), guest: slot.guest, len });
        };
        let host = slot.host.address();
        if [slot.guest.0, len, host].iter().any(|value| !value.is_multiple_of(page)) {
            return Err(SlotError::Unaligned { name: name(), range, host, page });
        }
        let most = MAX_PAGES * page;
        if len > most {
            return Err(SlotError::TooLarge { name: name(), range, most });
        }
        let address_bits = self.limits.address_bits;
        if range.last().0.checked_shr(address_bits.into()).unwrap_or(0) != 0 {
            return Err(SlotError::BeyondAddressBits { name: name(), range, address_bits });
        }
        Ok(range)
    }

    /// The first mapped entry in `range`, but for `except`.
    fn overlapping(&self, range: GuestRange, except: SlotId) -> Option<&Entry> {
        // Entries are disjoint: of those that begin before the range only the last can reach in,
        // unless that is the excepted one, which then hides nothing that reaches further.
        let before = self.by_start.range(..range.start().0).next_back();
        let inside = self.by_start.range(range.start().0..=range.last().0);
        before
            .into_iter()
            .chain(inside)
            .filter(|&(_, &id)| id != except)
            .filter_map(|(_, id)| self.entries.get(id))
            .find(|entry| entry.range.overlaps(&range))
    }

    /// Inserts an entry, or replaces the one with its number.
    pub(super) fn put(&mut self, entry: Entry) {
        let id = entry.slot.id;
        self.take(id);
        self.unused.extend((self.next..id.0).map(SlotId));
        self.next = self.next.max(id.0.saturating_add(1));
        self.unused.remove(&id);
        if entry.mapped {
            self.by_start.insert(entry.range.start().0, id);
        }
        self.entries.insert(id, entry);
    }

    /// Removes an entry; its number is unused again.
    pub(super) fn take(&mut self, id: SlotId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if entry.mapped {
            self.by_start.remove(&entry.range.start().0);
        }
        self.unused.insert(id);
        Some(entry)
    }

    /// The mapped entry that has `address`.
    pub(super) fn at(&self, address: GuestAddress) -> Option<&Entry> {
        let (_, id) = self.by_start.range(..=address.0).next_back()?;
        self.get(*id).filter(|entry| entry.range.contains(address))
    }
}
