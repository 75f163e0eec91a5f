//! What a guest's access to memory does.
//!
//! A guest that is not in system management mode sees address space 0. What is no memory, and a
//! write to a ROM, goes on to the buses, which are not known here.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{Memory, PAGE, Slot};
use crate::DirtyPage;

/// What became of a guest's write, of its worst part if it has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::fake) enum Wrote {
    /// It is in memory.
    Memory,
    /// A readonly slot is there, which did not change.
    ReadOnly,
    /// No slot is there.
    Nothing,
}

/// An access cut at the borders of pages, as KVM does it: the address of each part, and where it
/// is in the data. None for an access that passes the last address.
pub(super) fn pieces(guest: u64, len: usize) -> Option<impl Iterator<Item = (u64, Range<usize>)>> {
    guest.checked_add(len as u64)?;
    let mut start = 0;
    Some(std::iter::from_fn(move || {
        let address = guest.checked_add(start as u64).filter(|_| start < len)?;
        let in_page = usize::try_from(PAGE - address % PAGE).ok()?;
        let end = len.min(start.saturating_add(in_page));
        let piece = start..end;
        start = end;
        Some((address, piece))
    }))
}

impl Memory {
    /// A guest writes, on a vCPU. The parts of the write that are in memory are stored even if others are not.
    pub(in crate::fake) fn write(&mut self, vcpu: u32, guest: u64, data: &[u8]) -> Wrote {
        let Some(pieces) = pieces(guest, data.len()) else { return Wrote::Nothing };
        pieces
            .map(|(address, piece)| {
                self.write_in_page(vcpu, address, data.get(piece).unwrap_or_default())
            })
            .max()
            .unwrap_or(Wrote::Memory)
    }

    /// A guest reads; false if not all of it is memory. The parts that are have been read.
    pub(in crate::fake) fn read(&self, guest: u64, data: &mut [u8]) -> bool {
        let Some(pieces) = pieces(guest, data.len()) else { return false };
        let mut all = true;
        for (address, piece) in pieces {
            let to = data.get_mut(piece).unwrap_or_default();
            match self.slot_at(address).and_then(|slot| slot.bytes(address, to.len())) {
                Some(from) => {
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from.load(Ordering::Relaxed);
                    }
                }
                None => all = false,
            }
        }
        all
    }

    fn write_in_page(&mut self, vcpu: u32, guest: u64, data: &[u8]) -> Wrote {
        let Some(slot) = self.slot_at(guest) else { return Wrote::Nothing };
        if slot.memory.flags.readonly {
            return Wrote::ReadOnly;
        }
        let Some(to) = slot.bytes(guest, data.len()) else { return Wrote::Nothing };
        for (to, from) in to.iter().zip(data) {
            to.store(*from, Ordering::Relaxed);
        }
        let (id, page) = (slot.memory.id, guest / PAGE - slot.region.first_page());
        let log = self.slots.get_mut(&id).and_then(|slot| slot.dirty.as_mut());
        if log.is_some_and(|log| log.mark(page)) {
            self.report(vcpu, DirtyPage { slot: id, page });
        }
        Wrote::Memory
    }

    /// The slot that has a page of address space 0.
    fn slot_at(&self, guest: u64) -> Option<&Slot> {
        let page = guest / PAGE;
        let (_, id) = self.by_page.range(..=(0, page)).next_back()?;
        self.slots.get(id).filter(|slot| page < slot.region.end_page())
    }
}

impl Slot {
    /// `len` bytes from an address of the slot; none if the host memory is not what it was.
    fn bytes(&self, guest: u64, len: usize) -> Option<&[AtomicU8]> {
        let start = usize::try_from(guest.checked_sub(self.region.guest)?).ok()?;
        self.memory.host.bytes().get(start..start.checked_add(len)?)
    }
}
