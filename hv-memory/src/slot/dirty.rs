//! Dirty pages of all slots, told by the manager.
//!
//! Under the manager's lock, across the ioctls: a slot neither comes nor goes while its log is read.

use hv_core::{MemoryBackend, MemorySlot, SlotId, Vm};

use super::SlotManager;
use super::manager::State;
use super::table::SlotTable;
use crate::dirty::{Logging, Slots};
use crate::{DirtyError, DirtyPages, DirtyTracking, GuestRange};

/// # Dirty pages
///
/// A page is dirty from when the guest, or the VMM through a [`crate::RamMemory`], writes to it
/// while a slot that logs ([`hv_core::SlotFlags::log_dirty`]) has it, until it is harvested or cleared.
/// It stays dirty, at the address it was written at, if the slot is removed, unmapped or moved, or
/// ceases to log; and if a call fails.
impl<M: MemoryBackend> SlotManager<M> {
    /// How KVM tells which pages the guest writes.
    #[must_use]
    pub fn dirty_tracking(&self) -> DirtyTracking {
        self.shared.state().dirty.how()
    }

    /// Tells which pages are dirty, and from then on they are not: what is written later is told
    /// the next time. Needs no memory if `pages` was filled before and no slot came since.
    ///
    /// # Errors
    /// KVM refuses to read or clear a log. `pages` is empty, and all pages are still dirty.
    pub fn harvest_dirty(&self, pages: &mut DirtyPages) -> Result<(), DirtyError> {
        let mut state = self.shared.state();
        let State { table, dirty, .. } = &mut *state;
        dirty.harvest(&*self.shared.vm, table, pages)
    }

    /// Tells which pages are dirty, and they stay so. With [`DirtyTracking::ManualProtect`] that is
    /// cheaper than harvesting; without, the pages are remembered here.
    ///
    /// # Errors
    /// KVM refuses to read a log. `pages` is empty, and all pages are still dirty.
    pub fn read_dirty(&self, pages: &mut DirtyPages) -> Result<(), DirtyError> {
        let mut state = self.shared.state();
        let State { table, dirty, .. } = &mut *state;
        dirty.read(&*self.shared.vm, table, pages)
    }

    /// Those of `pages`, as [read](Self::read_dirty), that are in `range` as a whole are dirty no more,
    /// and no others. To be called before they are copied: a page that was written again since it was
    /// read is cleared like others, and only what is written later is told again.
    ///
    /// # Errors
    /// KVM refuses to clear a log, or to reset rings. All pages are still dirty, and so are those of `pages`
    /// that were harvested meanwhile.
    pub fn clear_dirty(&self, pages: &DirtyPages, range: GuestRange) -> Result<(), DirtyError> {
        let mut state = self.shared.state();
        let State { table, dirty, .. } = &mut *state;
        dirty.clear(&*self.shared.vm, table, pages, range)
    }

    /// Takes what the dirty rings have, to be told by the next harvest, and so lets this vCPU go on: the
    /// answer to [`hv_core::VcpuExit::DirtyRingFull`].
    ///
    /// # Errors
    /// Dirty pages are not tracked by rings, the vCPU's ring was not [added](Self::add_dirty_ring), or KVM
    /// refuses to reset rings; all pages are still dirty. [`DirtyError::Overflow`] says that some are
    /// lost.
    pub fn empty_dirty_ring(&self, vcpu: u32) -> Result<(), DirtyError> {
        let mut state = self.shared.state();
        let State { table, dirty, .. } = &mut *state;
        dirty.ring_full(&*self.shared.vm, table, vcpu)
    }
}

impl<V: Vm> SlotManager<V> {
    /// Chooses how KVM tells which pages the guest writes (`KVM_ENABLE_CAP`). It can be chosen
    /// once, and the same again is no error.
    ///
    /// # Errors
    /// The host does not have it, another way was chosen before, or KVM refuses.
    pub fn track_dirty(&self, how: DirtyTracking) -> Result<(), DirtyError> {
        self.shared.state().dirty.change(&*self.shared.vm, how)
    }

    /// Reads the dirty ring of a vCPU from now on, with [`DirtyTracking::Ring`]: before the vCPU first
    /// runs. The same vCPU again makes no difference. The ring keeps the VM until the manager
    /// is dropped.
    ///
    /// # Errors
    /// Dirty pages are not tracked by rings, or the vCPU's can't be mapped.
    pub fn add_dirty_ring(&self, vcpu: &V::Vcpu) -> Result<(), DirtyError> {
        self.shared.state().dirty.add_ring(vcpu)
    }
}

impl Slots for SlotTable {
    fn logging(&self) -> impl Iterator<Item = Logging<'_>> + Clone {
        self.mapped().filter(|entry| entry.logs()).map(|entry| (&entry.name, &entry.slot))
    }

    fn live(&self, id: SlotId) -> Option<&MemorySlot> {
        self.get(id).filter(|entry| entry.mapped).map(|entry| &entry.slot)
    }
}
