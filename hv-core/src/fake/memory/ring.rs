//! Dirty rings, from KVM's side: a ring for each vCPU, in which a page is reported when it is first
//! written, and again when it is written after its entry was reset.
//!
//! The mark of a page in its slot's log says that it is reported and not reset: KVM has made it
//! writable. KVM may report a page that is marked once more; nothing may depend on that, so here it
//! does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Memory, PAGE};
use crate::{DirtyGfn, DirtyPage, Errno, SlotId};

/// Bytes of an entry (`struct kvm_dirty_gfn`).
const ENTRY: u32 = 16;
/// Entries of a ring that the kernel keeps for itself (`KVM_DIRTY_RING_RSVD_ENTRIES`). With the page
/// modification log of Intel's processors there are 512 more.
const RESERVED: u32 = 64;

/// The rings of a VM.
#[derive(Debug)]
pub(super) struct Rings {
    entries: u32,
    by_vcpu: BTreeMap<u32, Ring>,
}

#[derive(Debug)]
struct Ring {
    entries: Arc<[DirtyGfn]>,
    /// How many pages were reported, and how many of them reset.
    reported: u64,
    reset: u64,
}

impl Ring {
    fn new(entries: u32) -> Self {
        let entries = (0..entries).map(|_| DirtyGfn::default()).collect();
        Self { entries, reported: 0, reset: 0 }
    }

    fn entry(&self, n: u64) -> Option<&DirtyGfn> {
        let place = n.checked_rem(self.entries.len() as u64)?;
        self.entries.get(usize::try_from(place).ok()?)
    }

    /// How many entries KVM waits for.
    fn used(&self) -> u64 {
        self.reported.saturating_sub(self.reset)
    }

    fn is_full(&self) -> bool {
        self.used() >= (self.entries.len() as u64).saturating_sub(RESERVED.into())
    }

    /// Reports a page; false if there is no entry left for it.
    fn report(&mut self, page: DirtyPage) -> bool {
        let room = self.used() < self.entries.len() as u64;
        let reported = room && self.entry(self.reported).is_some_and(|entry| entry.publish(page));
        self.reported += u64::from(reported);
        reported
    }

    /// The next page that was collected, whose entry is empty again.
    fn take_collected(&mut self) -> Option<DirtyPage> {
        let page = (self.used() > 0).then(|| self.entry(self.reset)?.reset()).flatten()?;
        self.reset += 1;
        Some(page)
    }
}

impl Memory {
    /// `KVM_CAP_DIRTY_LOG_RING` with the bytes of a ring: from then on bitmaps can't be asked for.
    pub(in crate::fake) fn enable_dirty_ring(
        &mut self,
        size: u64,
        have_vcpus: bool,
    ) -> Result<(), Errno> {
        // The ioctl has 64 bits for it, and 32 of them are looked at.
        let size = size as u32;
        let least = u64::from(RESERVED * ENTRY).max(PAGE);
        if self.limits.dirty_ring == 0 || !size.is_power_of_two() || u64::from(size) < least {
            return Err(Errno::EINVAL);
        }
        if size > self.limits.dirty_ring {
            return Err(Errno::E2BIG);
        }
        if self.rings.is_some() || have_vcpus {
            return Err(Errno::EINVAL);
        }
        self.rings = Some(Rings { entries: size / ENTRY, by_vcpu: BTreeMap::new() });
        Ok(())
    }

    /// Whether pages may be written that are in no ring: with `KVM_DIRTY_LOG_INITIALLY_SET` KVM
    /// leaves what the guest can write already as it is when a slot begins to log.
    pub(in crate::fake) fn rings_miss_pages(&self) -> bool {
        self.rings.is_some() && self.logs_begin_full()
    }

    /// A vCPU was created.
    pub(in crate::fake) fn add_ring(&mut self, vcpu: u32) {
        if let Some(rings) = &mut self.rings {
            rings.by_vcpu.insert(vcpu, Ring::new(rings.entries));
        }
    }

    /// The entries of the ring of a vCPU, if it has one.
    pub(in crate::fake) fn ring(&self, vcpu: u32) -> Option<Arc<[DirtyGfn]>> {
        Some(self.rings.as_ref()?.by_vcpu.get(&vcpu)?.entries.clone())
    }

    /// Whether the ring of a vCPU is so full that the vCPU may not run.
    pub(in crate::fake) fn ring_is_full(&self, vcpu: u32) -> bool {
        let ring = self.rings.as_ref().and_then(|rings| rings.by_vcpu.get(&vcpu));
        ring.is_some_and(Ring::is_full)
    }

    /// `KVM_RESET_DIRTY_RINGS`.
    pub(in crate::fake) fn reset_dirty_rings(&mut self) -> Result<u32, Errno> {
        let rings = self.rings.as_mut().ok_or(Errno::EINVAL)?;
        let mut count = 0u32;
        for ring in rings.by_vcpu.values_mut() {
            while let Some(DirtyPage { slot, page }) = ring.take_collected() {
                // Whatever the entry names now: the slot may have gone, or be another.
                let log = self.slots.get_mut(&slot).and_then(|slot| slot.dirty.as_mut());
                if let Some(log) = log {
                    log.unmark(page);
                }
                count = count.saturating_add(1);
            }
        }
        Ok(count)
    }

    /// Reports a page in the ring of the vCPU that wrote it, if there are rings.
    pub(super) fn report(&mut self, vcpu: u32, page: DirtyPage) {
        if let Some(ring) = self.rings.as_mut().and_then(|rings| rings.by_vcpu.get_mut(&vcpu)) {
            // The vCPU would not run if there were no room.
            ring.report(page);
        }
    }

    /// How many pages of a slot nobody would ever hear of if the slot went now.
    pub(in crate::fake) fn lost_pages(&self, id: SlotId) -> u64 {
        let Some(rings) = &self.rings else { return self.dirty_pages(id) };
        let dirty = rings.by_vcpu.values().flat_map(|ring| ring.entries.iter());
        let dirty = dirty.filter_map(DirtyGfn::dirty).filter(|page| page.slot == id);
        dirty.map(|page| page.page).collect::<BTreeSet<_>>().len() as u64
    }
}
