//! Memory slots as KVM keeps them: which there may be, and what becomes of one that changes.
//!
//! Rules and state only. There is no lock, and the host memory that a change sets free is handed
//! back, because what happens when it goes is the caller's own code.

mod access;
mod dirty;
mod ring;

use std::collections::BTreeMap;

use crate::{Errno, HostRange, MemorySlot, SlotId};
use dirty::DirtyLog;
use ring::Rings;

pub(in crate::fake) use access::Wrote;

const PAGE: u64 = 4096;
/// Dirty bitmaps are indexed by 32-bit numbers with a sign.
const MAX_PAGES: u64 = (1 << 31) - 1;

/// What a host's KVM allows.
#[derive(Debug, Clone, Copy)]
pub(in crate::fake) struct MemoryLimits {
    /// `KVM_CAP_NR_MEMSLOTS`, for each address space.
    pub(in crate::fake) slots: u32,
    /// `KVM_CAP_MULTI_ADDRESS_SPACE`: 2 where system management mode has its own, 0 where there is
    /// only one.
    pub(in crate::fake) address_spaces: u32,
    /// Bits of a guest-physical address: those of the host with nested paging, else 52.
    pub(in crate::fake) gpa_bits: u32,
    /// `KVM_CAP_READONLY_MEM`.
    pub(in crate::fake) readonly: bool,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: the flags it takes, 0 without it.
    pub(in crate::fake) manual_protect: u64,
    /// `KVM_CAP_DIRTY_LOG_RING`: the most bytes of a ring, 0 without it.
    pub(in crate::fake) dirty_ring: u32,
}

/// The memory of a VM.
#[derive(Debug)]
pub(in crate::fake) struct Memory {
    limits: MemoryLimits,
    slots: BTreeMap<SlotId, Slot>,
    /// The same slots by address space and first page. They don't overlap.
    by_page: BTreeMap<(u32, u64), SlotId>,
    /// The flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` that are enabled.
    manual_protect: u64,
    /// Pages written are reported in a ring of each vCPU, and bitmaps can't be asked for.
    rings: Option<Rings>,
}

#[derive(Debug)]
struct Slot {
    memory: MemorySlot,
    region: Region,
    dirty: Option<DirtyLog>,
}

/// The numbers of a slot, as the ioctl takes them. Read from the host memory once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    guest: u64,
    size: u64,
    host: u64,
}

impl Region {
    fn new(guest: u64, host: &HostRange) -> Self {
        let bytes = host.bytes();
        Self { guest, size: bytes.len() as u64, host: bytes.as_ptr().addr() as u64 }
    }

    fn first_page(&self) -> u64 {
        self.guest / PAGE
    }

    fn pages(&self) -> u64 {
        self.size / PAGE
    }

    /// The page after the last. No overflow: pages are numbered with 52 bits.
    fn end_page(&self) -> u64 {
        self.first_page().saturating_add(self.pages())
    }

    /// What is wrong whatever else there is.
    fn check(&self) -> Result<(), Errno> {
        let aligned = (self.guest | self.size | self.host).is_multiple_of(PAGE);
        // A size of 0 deletes, which is a call of its own.
        let sized = self.size != 0 && self.pages() <= MAX_PAGES;
        // Alignment makes an end at 2^64 the only one that wraps without being beyond the limit
        // of addresses as well; KVM refuses both in the same way.
        let ends = self.guest.checked_add(self.size).is_some();
        if aligned && sized && ends { Ok(()) } else { Err(Errno::EINVAL) }
    }
}

fn space(id: SlotId) -> u32 {
    id.0 >> 16
}

impl Memory {
    pub(in crate::fake) fn new(limits: MemoryLimits) -> Self {
        Self {
            limits,
            slots: BTreeMap::new(),
            by_page: BTreeMap::new(),
            manual_protect: 0,
            rings: None,
        }
    }

    /// The slots, by number.
    pub(in crate::fake) fn slots(&self) -> impl Iterator<Item = &MemorySlot> {
        self.slots.values().map(|slot| &slot.memory)
    }

    /// `KVM_SET_USER_MEMORY_REGION` with a size: creates, moves, or changes flags. Returns what the
    /// slot was, to be dropped without a lock held.
    pub(in crate::fake) fn set(&mut self, slot: &MemorySlot) -> Result<Option<MemorySlot>, Errno> {
        let region = Region::new(slot.guest.0, &slot.host);
        self.check_id(slot.id)?;
        region.check()?;
        if slot.flags.readonly && !self.limits.readonly {
            return Err(Errno::EINVAL);
        }
        let old = self.slots.get(&slot.id);
        let placed = old.is_none_or(|old| old.region.guest != region.guest);
        if let Some(old) = old {
            // Size, host address and READONLY are for life.
            let same = (old.region.size, old.region.host) == (region.size, region.host)
                && old.memory.flags.readonly == slot.flags.readonly;
            if !same {
                return Err(Errno::EINVAL);
            }
        }
        if placed {
            self.check_place(slot.id, &region)?;
        }
        Ok(self.replace(slot.clone(), region))
    }

    /// `KVM_SET_USER_MEMORY_REGION` with size 0. Returns what the slot was, to be dropped without
    /// a lock held.
    pub(in crate::fake) fn delete(&mut self, id: SlotId) -> Result<MemorySlot, Errno> {
        self.check_id(id)?;
        let slot = self.slots.remove(&id).ok_or(Errno::EINVAL)?;
        self.by_page.remove(&(space(id), slot.region.first_page()));
        Ok(slot.memory)
    }

    fn check_id(&self, id: SlotId) -> Result<(), Errno> {
        let number = id.0 & 0xffff;
        let known = number < self.limits.slots && space(id) < self.limits.address_spaces.max(1);
        if known { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Whether a slot may be where none was before. An overlap is found first.
    fn check_place(&self, id: SlotId, region: &Region) -> Result<(), Errno> {
        let space = space(id);
        // None overlaps another, so of those that begin before the end of this one only the last
        // can reach into it. The slot itself is about to leave its place.
        let neighbour = self
            .by_page
            .range((space, 0)..(space, region.end_page()))
            .rev()
            .map(|(_, other)| other)
            .find(|&&other| other != id)
            .and_then(|other| self.slots.get(other));
        if neighbour.is_some_and(|other| other.region.end_page() > region.first_page()) {
            return Err(Errno::EEXIST);
        }
        let pages = 1u64.checked_shl(self.limits.gpa_bits).unwrap_or(u64::MAX) / PAGE;
        if region.end_page() > pages { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// The slots that have dirty pages nobody asked for, with their number.
    pub(in crate::fake) fn dirty_slots(&self) -> impl Iterator<Item = (SlotId, u64)> {
        self.slots.keys().map(|&id| (id, self.lost_pages(id))).filter(|&(_, pages)| pages > 0)
    }

    /// Puts a slot that has been judged in the place of what it was.
    fn replace(&mut self, memory: MemorySlot, region: Region) -> Option<MemorySlot> {
        let id = memory.id;
        let old = self.slots.remove(&id);
        if let Some(old) = &old {
            self.by_page.remove(&(space(id), old.region.first_page()));
        }
        let (old_memory, old_log) = match old {
            Some(old) => (Some(old.memory), old.dirty),
            None => (None, None),
        };
        // A slot that goes on logging keeps its bits, also when it moves; that is, its bitmap. For a
        // ring all pages of one that moved are watched again. One that begins to log starts anew.
        let moved = old_memory.as_ref().is_some_and(|old| old.guest != memory.guest);
        let old_log = old_log.filter(|_| !(moved && self.rings.is_some()));
        let dirty = match (memory.flags.log_dirty, old_log) {
            (false, _) => None,
            (true, Some(log)) => Some(log),
            (true, None) => Some(DirtyLog::new(region.pages(), self.logs_begin_full())),
        };
        self.by_page.insert((space(id), region.first_page()), id);
        self.slots.insert(id, Slot { memory, region, dirty });
        old_memory
    }
}

#[cfg(test)]
mod tests;
