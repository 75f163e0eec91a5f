//! The dirty pages of the slots of a VM: read from KVM, joined with the VMM's own writes, and kept
//! when their slot goes before anybody asked.
//!
//! A part of the slot manager's state: whoever calls has its lock. It must not decide what becomes of
//! a slot.

use std::sync::Arc;

use hv_core::{DirtyPage, Error, MemoryBackend, MemorySlot, SlotId, Vcpu, Vm};

use super::pages::pages_of;
use super::rings::Rings;
use super::watch::{To, Watches};
use super::words::{SparsePages, mark_run, numbered};
use super::{DirtyError, DirtyPages, DirtyTracking};
use crate::{GuestRange, page_size};

/// What is known of dirty pages.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    how: DirtyTracking,
    /// What was read, or written by the VMM, and not yet told.
    kept: SparsePages,
    watches: Watches,
    rings: Rings,
    /// Words for clearing, so that it needs no memory each time.
    words: Vec<u64>,
}

/// A slot that logs, and what it is called.
pub(crate) type Logging<'a> = (&'a Arc<str>, &'a MemorySlot);

/// The slots of the manager.
pub(crate) trait Slots {
    /// Those that log, by guest address.
    fn logging(&self) -> impl Iterator<Item = Logging<'_>> + Clone;

    /// The slot of this number, as the guest has it.
    fn live(&self, id: SlotId) -> Option<&MemorySlot>;
}

impl Tracker {
    pub(crate) fn how(&self) -> DirtyTracking {
        self.how
    }

    pub(crate) fn change<V: Vm>(&mut self, vm: &V, how: DirtyTracking) -> Result<(), DirtyError> {
        self.how.change(vm, how)?;
        self.how = how;
        Ok(())
    }

    pub(crate) fn add_ring<V: Vcpu>(&mut self, vcpu: &V) -> Result<(), DirtyError> {
        self.with_rings()?;
        let id = vcpu.id();
        if !self.rings.has(id) {
            let ring = vcpu.dirty_ring();
            self.rings.add(id, ring.map_err(|error| DirtyError::NoRing { vcpu: id, error })?);
        }
        Ok(())
    }

    fn empty_rings<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
    ) -> Result<(), DirtyError> {
        self.collect(slots);
        self.rings.reset(vm).map_err(DirtyError::Rings)
    }

    /// A vCPU stopped because its ring is full.
    pub(crate) fn ring_full<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
        vcpu: u32,
    ) -> Result<(), DirtyError> {
        self.with_rings()?;
        if !self.rings.has(vcpu) {
            return Err(DirtyError::RingNotAdded { vcpu });
        }
        self.empty_rings(vm, slots)?;
        if self.rings.made_room(vcpu) { Ok(()) } else { Err(DirtyError::Overflow { vcpu }) }
    }

    fn with_rings(&self) -> Result<(), DirtyError> {
        match self.how {
            DirtyTracking::Ring { .. } => Ok(()),
            chosen => Err(DirtyError::NoRings { chosen }),
        }
    }

    /// Keeps what the vCPUs have told of.
    fn collect(&mut self, slots: &impl Slots) {
        let Self { rings, kept, .. } = self;
        rings.collect(|DirtyPage { slot, page }| {
            // A slot that has gone took all it had to tell with it.
            if let Some(slot) = slots.live(slot).filter(|slot| page < pages_in(slot)) {
                kept.add(first_of(slot) + page, 1);
            }
        });
    }

    /// A slot is about to log.
    pub(crate) fn begin(&mut self, slot: &MemorySlot) {
        self.watches.begin(slot, &mut self.kept);
    }

    /// A slot that logs is about to be deleted, to move, or to log no more: keeps what its log has.
    pub(crate) fn leave<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slot: &MemorySlot,
        slots: &impl Slots,
    ) -> Result<(), Error> {
        if let DirtyTracking::Ring { .. } = self.how {
            self.collect(slots);
            return Ok(());
        }
        let Self { how, kept, words, .. } = self;
        words.clear();
        words.resize(count(pages_in(slot).div_ceil(64)), 0);
        how.take(vm, slot, words)?;
        numbered(first_of(slot), words).for_each(|(at, bits)| kept.add(at, bits));
        Ok(())
    }

    /// A slot logs no more, which `slots` does not know yet.
    pub(crate) fn end(&mut self, id: SlotId, slots: &impl Slots) {
        // What came since it was left can only have been of the slot as it was.
        self.collect(slots);
        self.watches.end(id, &mut self.kept);
    }

    /// A slot that logs has moved.
    pub(crate) fn moved(&mut self, slot: &MemorySlot) {
        self.watches.moved(slot, &mut self.kept);
    }

    /// Tells what is dirty and clears it.
    pub(crate) fn harvest<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
        pages: &mut DirtyPages,
    ) -> Result<(), DirtyError> {
        pages.clear();
        if let DirtyTracking::Ring { .. } = self.how {
            self.keep_all(vm, slots)?;
        } else {
            self.take_logs(vm, slots, pages)?;
        }
        std::mem::swap(pages.apart_mut(), &mut self.kept);
        Ok(())
    }

    /// Tells what is dirty, and leaves it so.
    pub(crate) fn read<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
        pages: &mut DirtyPages,
    ) -> Result<(), DirtyError> {
        pages.clear();
        match self.how {
            DirtyTracking::Ring { .. } => self.keep_all(vm, slots)?,
            DirtyTracking::Log => {
                self.take_logs(vm, slots, pages)?;
                pages.copy_parts(&mut self.kept);
            }
            DirtyTracking::ManualProtect { .. } => {
                for (name, slot) in slots.logging() {
                    self.watches.take(slot.id, To::Kept, &mut self.kept);
                    let words = pages.part(first_of(slot), pages_in(slot));
                    if let Err(error) = vm.dirty_log(slot.id, words) {
                        pages.clear();
                        return Err(DirtyError::Kvm { name: name.clone(), error });
                    }
                }
            }
        }
        pages.apart_mut().clone_from(&self.kept);
        Ok(())
    }

    /// Takes what the logs have, or keeps it if one of them can't be had.
    fn take_logs<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
        pages: &mut DirtyPages,
    ) -> Result<(), DirtyError> {
        let Self { how, kept, watches, .. } = self;
        for (name, slot) in slots.logging() {
            let words = pages.part(first_of(slot), pages_in(slot));
            match how.take(vm, slot, words) {
                Ok(()) => watches.take(slot.id, To::Words(words), kept),
                Err(error) => {
                    pages.drop_part();
                    pages.copy_parts(kept);
                    pages.clear();
                    return Err(DirtyError::Kvm { name: name.clone(), error });
                }
            }
        }
        Ok(())
    }

    /// Keeps what the rings have, and the VMM's writes.
    fn keep_all<M: MemoryBackend>(&mut self, vm: &M, slots: &impl Slots) -> Result<(), DirtyError> {
        self.empty_rings(vm, slots)?;
        for (_, slot) in slots.logging() {
            self.watches.take(slot.id, To::Kept, &mut self.kept);
        }
        Ok(())
    }

    /// Those of `pages` that lie in `range` are dirty no more.
    pub(crate) fn clear<M: MemoryBackend>(
        &mut self,
        vm: &M,
        slots: &impl Slots,
        pages: &DirtyPages,
        range: GuestRange,
    ) -> Result<(), DirtyError> {
        let Self { how, kept, words, rings, .. } = self;
        let (first, end) = whole_pages_of(range);
        // What was collected when a slot went is not watched before it is reset.
        rings.reset(vm).map_err(DirtyError::Rings)?;
        if let DirtyTracking::ManualProtect { .. } = how {
            for (n, (name, slot)) in slots.logging().enumerate() {
                let Err(error) = clear_in(vm, slot, pages, (first, end), words) else { continue };
                // What was cleared before the failure is still to be told.
                for (_, slot) in slots.logging().take(n) {
                    let (first, end) = part_of(slot, (first, end));
                    let mut runs = pages.runs(first, end);
                    while let Some((first, end)) = runs.next_pages() {
                        kept.add_run(first, end);
                    }
                }
                return Err(DirtyError::Kvm { name: name.clone(), error });
            }
        }
        let mut runs = pages.runs(first, end);
        while let Some((first, end)) = runs.next_pages() {
            kept.remove(first, end);
        }
        Ok(())
    }
}

impl DirtyTracking {
    /// Reads the log of a slot and clears it.
    fn take<M: MemoryBackend>(
        self,
        vm: &M,
        slot: &MemorySlot,
        words: &mut [u64],
    ) -> Result<(), Error> {
        vm.dirty_log(slot.id, words)?;
        match self {
            Self::ManualProtect { .. } => protect(vm, slot, 0, words),
            Self::Log | Self::Ring { .. } => Ok(()),
        }
    }
}

/// Clears the pages in `words`, the first of which is that of page `first` of the slot.
fn protect<M: MemoryBackend>(
    vm: &M,
    slot: &MemorySlot,
    first: u64,
    words: &[u64],
) -> Result<(), Error> {
    let dirty = |word: &u64| *word != 0;
    let (Some(begin), Some(last)) = (words.iter().position(dirty), words.iter().rposition(dirty))
    else {
        return Ok(());
    };
    let end = pages_in(slot).min(first + (last as u64 + 1) * 64);
    let first = first + begin as u64 * 64;
    // A slot has fewer than 2^31 pages.
    let pages = u32::try_from(end - first).unwrap_or(u32::MAX);
    vm.clear_dirty_log(slot.id, first, pages, words.get(begin..=last).unwrap_or_default())
}

/// Clears those of `pages` that are of `slot` and in `within`.
fn clear_in<M: MemoryBackend>(
    vm: &M,
    slot: &MemorySlot,
    pages: &DirtyPages,
    within: (u64, u64),
    words: &mut Vec<u64>,
) -> Result<(), Error> {
    let of_slot = first_of(slot);
    let (first, end) = part_of(slot, within);
    if first >= end {
        return Ok(());
    }
    // Words are those of the slot, wherever that begins.
    let begin = (first - of_slot) / 64 * 64;
    words.clear();
    words.resize(count((end - of_slot - begin).div_ceil(64)), 0);
    let mut runs = pages.runs(first, end);
    while let Some((first, end)) = runs.next_pages() {
        mark_run(words, first - of_slot - begin, end - of_slot - begin);
    }
    protect(vm, slot, begin, words)
}

/// The pages of `within` that are the slot's.
fn part_of(slot: &MemorySlot, within: (u64, u64)) -> (u64, u64) {
    let first = first_of(slot);
    (within.0.max(first), within.1.min(first + pages_in(slot)))
}

/// The pages that are in a range as a whole: the first, and the one after the last.
fn whole_pages_of(range: GuestRange) -> (u64, u64) {
    let page = page_size();
    let end = range.last().0.checked_add(1).map_or_else(|| pages_of(range).1, |end| end / page);
    (range.start().0.div_ceil(page), end)
}

fn first_of(slot: &MemorySlot) -> u64 {
    slot.guest.0 / page_size()
}

fn pages_in(slot: &MemorySlot) -> u64 {
    slot.host.len() as u64 / page_size()
}

fn count(words: u64) -> usize {
    usize::try_from(words).unwrap_or_default()
}
