//! Which slots want to know of the VMM's writes, and what they are told.
//!
//! A mapping marks a page once. Several slots may have that page, so whoever takes a mark takes it for
//! all of them.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use hv_core::{MemorySlot, SlotId};
use vm_memory::MmapRegion;

use super::words::{SparsePages, between, mark};
use super::writes::WriteLog;
use crate::{Mapping, page_size};

/// A slot that wants to know.
#[derive(Debug)]
struct Watch {
    region: Arc<MmapRegion<WriteLog>>,
    /// The first page of the mapping that is the slot's, and how many are.
    first: u64,
    pages: u64,
    /// The guest's number of that page.
    guest: u64,
    /// Another slot may have some of the pages.
    shared: bool,
}

/// Where the marks of a slot go.
pub(super) enum To<'a> {
    /// Into words that begin with the slot.
    Words(&'a mut [u64]),
    /// To what is kept.
    Kept,
}

/// The slots that want to know.
#[derive(Debug, Default)]
pub(super) struct Watches(BTreeMap<SlotId, Watch>);

impl Watches {
    /// From now on the VMM's writes to a slot are marked. Memory that is no [`Mapping`] has no marks.
    pub(super) fn begin(&mut self, slot: &MemorySlot, kept: &mut SparsePages) {
        let memory: &dyn Any = &**slot.host.memory();
        let Some(mapping) = memory.downcast_ref::<Mapping>() else { return };
        let page = page_size();
        let mut watch = Watch {
            region: mapping.region(),
            first: slot.host.offset() as u64 / page,
            pages: slot.host.len() as u64 / page,
            guest: slot.guest.0 / page,
            shared: false,
        };
        watch.region.bitmap().watch();
        // The writes so far are none of this slot's business, but of those that have its pages, too.
        self.take_writes(slot.id, &watch, None, kept);
        for other in self.0.values_mut() {
            let shared = other.overlaps(&watch);
            other.shared |= shared;
            watch.shared |= shared;
        }
        self.0.insert(slot.id, watch);
    }

    /// No more of them are, for this slot.
    pub(super) fn end(&mut self, id: SlotId, kept: &mut SparsePages) {
        self.take(id, To::Kept, kept);
        self.0.remove(&id);
    }

    /// The slot has moved. What was written before, was written where it was.
    pub(super) fn moved(&mut self, slot: &MemorySlot, kept: &mut SparsePages) {
        self.take(slot.id, To::Kept, kept);
        if let Some(watch) = self.0.get_mut(&slot.id) {
            watch.guest = slot.guest.0 / page_size();
        }
    }

    /// Takes the marks of a slot's pages; for other slots that have these pages they are kept.
    pub(super) fn take(&self, id: SlotId, to: To<'_>, kept: &mut SparsePages) {
        if let Some(watch) = self.0.get(&id) {
            self.take_writes(id, watch, Some(to), kept);
        }
    }

    fn take_writes(
        &self,
        id: SlotId,
        watch: &Watch,
        mut to: Option<To<'_>>,
        kept: &mut SparsePages,
    ) {
        watch.region.bitmap().drain(watch.first, watch.pages, |at, bits| {
            match &mut to {
                Some(To::Words(words)) => mark(words, at, bits),
                Some(To::Kept) => kept.add(watch.guest + at, bits),
                None => {}
            }
            if watch.shared || to.is_none() {
                let others = self.0.iter().filter(|(other, _)| **other != id);
                let others = others.filter(|(_, other)| Arc::ptr_eq(&other.region, &watch.region));
                others.for_each(|(_, other)| other.keep(watch.first + at, bits, kept));
            }
        });
    }
}

impl Watch {
    fn overlaps(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.region, &other.region)
            && self.first < other.first + other.pages
            && other.first < self.first + self.pages
    }

    /// Keeps those of the marks that are of this slot. They begin with page `first` of the mapping.
    fn keep(&self, first: u64, bits: u64, kept: &mut SparsePages) {
        let bits = bits & between(first, self.first, self.first + self.pages);
        if bits != 0 {
            let low = bits.trailing_zeros();
            kept.add(self.guest + first + u64::from(low) - self.first, bits >> low);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.region.bitmap().unwatch();
    }
}
