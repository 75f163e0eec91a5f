//! The slots of a VM and their owners.
//!
//! Lock order: one lock, around the table, held across the ioctl that a change needs.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hv_core::{HostRange, MemoryBackend, MemorySlot, SlotFlags, SlotId};
use vm_memory::GuestAddress;

use super::SlotError;
use super::table::{Entry, SlotTable};
use crate::GuestRange;
use crate::dirty::Tracker;

/// What a VM can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotLimits {
    /// How many slots (`KVM_CAP_NR_MEMSLOTS`).
    pub slots: u32,
    /// Physical address bits of the guest's processor.
    pub address_bits: u8,
}

/// Memory to be given to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSlot {
    /// What to call it in errors.
    pub name: Arc<str>,
    /// First guest-physical address.
    pub guest: GuestAddress,
    /// The memory.
    pub host: HostRange,
    /// What the slot does beyond mapping.
    pub flags: SlotFlags,
}

/// A slot as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotInfo {
    /// What it is called in errors.
    pub name: Arc<str>,
    /// The slot.
    pub slot: MemorySlot,
    /// Its guest-physical addresses.
    pub range: GuestRange,
    /// Whether the guest has it; see [`Slot::unmap`].
    pub mapped: bool,
}

/// Says that no vCPU runs guest code for as long as it is borrowed.
///
/// Implemented by whatever a VMM has that stops its vCPUs. A vCPU that touches memory which is away
/// for a moment would take it for a device, so what takes memory away for a moment asks for this.
pub trait VcpusPaused {}

/// The memory slots of a VM. Slots that were installed before the manager existed are adopted.
///
/// The manager checks what it can before KVM is called, gives each slot the lowest unused number, and
/// hands out a [`Slot`] that owns it.
///
/// When the manager is dropped the slots stay as they are, and their owners can do nothing more: they
/// are the VM's, and go with it. So drop it before the owners when a VM ends: deleting slots one by
/// one would only take time.
pub struct SlotManager<M: MemoryBackend> {
    pub(super) shared: Arc<Shared<M>>,
}

pub(super) struct Shared<M> {
    pub(super) vm: Arc<M>,
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) table: SlotTable,
    pub(super) dirty: Tracker,
    /// Slots whose owner is gone but which KVM did not delete. Each addition tries again.
    abandoned: BTreeSet<SlotId>,
}

impl<M: MemoryBackend> SlotManager<M> {
    /// The manager of a VM that has the given slots and no others, each with what to call it. Returns
    /// an owner for each, in that order.
    ///
    /// # Errors
    /// KVM can't have accepted these slots under these limits; the VM is left alone.
    pub fn adopt<N: Into<Arc<str>>>(
        vm: Arc<M>,
        slots: impl IntoIterator<Item = (N, MemorySlot)>,
        limits: SlotLimits,
    ) -> Result<(Self, Vec<Slot<M>>), SlotError> {
        let mut table = SlotTable::new(limits);
        let mut dirty = Tracker::default();
        let mut ids = Vec::new();
        for (name, slot) in slots {
            let name = name.into();
            table.check_id(&name, slot.id)?;
            let range = table.place(&name, &slot)?;
            ids.push(slot.id);
            let entry = Entry { name, slot, range, mapped: true };
            if entry.logs() {
                dirty.begin(&entry.slot);
            }
            table.put(entry);
        }
        let state = Mutex::new(State { table, dirty, abandoned: BTreeSet::new() });
        let manager = Self { shared: Arc::new(Shared { vm, state }) };
        let owners = ids.into_iter().map(|id| manager.owner(id)).collect();
        Ok((manager, owners))
    }

    /// Gives memory to the guest (`KVM_SET_USER_MEMORY_REGION`).
    ///
    /// # Errors
    /// The memory is misaligned, empty, beyond the address bits or overlaps other memory, no slot is
    /// free, or KVM refuses.
    pub fn add(&self, new: NewSlot) -> Result<Slot<M>, SlotError> {
        self.add_with(new, |table, name| table.unused_id(name))
    }

    /// The same with this number, which must be unused.
    pub(crate) fn add_as(&self, id: SlotId, new: NewSlot) -> Result<Slot<M>, SlotError> {
        self.add_with(new, |table, name| table.check_id(name, id).map(|()| id))
    }

    fn add_with(
        &self,
        new: NewSlot,
        choose: impl FnOnce(&SlotTable, &Arc<str>) -> Result<SlotId, SlotError>,
    ) -> Result<Slot<M>, SlotError> {
        let NewSlot { name, guest, host, flags } = new;
        let _gone;
        let mut state = self.shared.state();
        _gone = state.reap(&*self.shared.vm);
        let id = choose(&state.table, &name)?;
        let slot = MemorySlot { id, guest, host, flags };
        let range = state.table.place(&name, &slot)?;
        let entry = Entry { name, slot, range, mapped: true };
        state.set(&*self.shared.vm, entry)?;
        Ok(self.owner(id))
    }

    /// The slot that has an address.
    #[must_use]
    pub fn at(&self, address: GuestAddress) -> Option<SlotInfo> {
        self.shared.state().table.at(address).map(SlotInfo::from)
    }

    /// All slots, by number.
    #[must_use]
    pub fn slots(&self) -> Vec<SlotInfo> {
        self.shared.state().table.iter().map(SlotInfo::from).collect()
    }

    /// The slots the guest has, by guest address.
    #[must_use]
    pub fn by_address(&self) -> Vec<SlotInfo> {
        self.shared.state().table.mapped().map(SlotInfo::from).collect()
    }

    /// How many more slots there can be.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.shared.state().table.available()
    }

    fn owner(&self, id: SlotId) -> Slot<M> {
        Slot { id, shared: Arc::downgrade(&self.shared) }
    }
}

impl<M: MemoryBackend> Shared<M> {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // The table is changed after KVM agreed and in one step, so that a panic of a backend leaves
        // it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes a slot whose owner is done with it. If KVM refuses, a later addition tries again.
    fn release(&self, id: SlotId) -> Result<(), SlotError> {
        // Dropped after the lock: what happens when this memory goes may need the manager.
        let _gone;
        let mut state = self.state();
        match state.delete(&*self.vm, id) {
            Ok(entry) => {
                _gone = entry;
                Ok(())
            }
            Err(error) => {
                state.abandoned.insert(id);
                Err(error)
            }
        }
    }
}

impl State {
    fn entry(&self, id: SlotId) -> Result<Entry, SlotError> {
        // The entry of an owner goes after its owner.
        self.table.get(id).cloned().ok_or(SlotError::ManagerGone(id))
    }

    /// Makes a slot what `entry` says, in KVM and here. What its log has is read before KVM forgets it.
    fn set<M: MemoryBackend>(&mut self, vm: &M, entry: Entry) -> Result<(), SlotError> {
        let Self { table, dirty, .. } = self;
        let name = || entry.name.clone();
        let live = table.get(entry.slot.id).filter(|live| live.mapped);
        let logged = live.filter(|live| live.logs()).map(|live| &live.slot);
        let moves = live.is_some_and(|live| live.slot.guest != entry.slot.guest);
        if let Some(slot) = logged.filter(|_| moves || !entry.logs()) {
            let read = dirty.leave(vm, slot, table);
            read.map_err(|error| SlotError::DirtyLog { name: name(), error })?;
        }
        // The VMM's writes are marked before the guest's are recorded.
        let begins = entry.logs() && logged.is_none();
        let ends = !entry.logs() && logged.is_some();
        if begins {
            dirty.begin(&entry.slot);
        }
        let told = vm.set_memory_slot(&entry.slot);
        match (&told, begins, ends) {
            (Err(_), true, _) | (Ok(()), _, true) => dirty.end(entry.slot.id, table),
            (Ok(()), false, false) if moves && entry.logs() => dirty.moved(&entry.slot),
            _ => {}
        }
        told.map_err(|error| SlotError::Kvm { name: name(), error })?;
        table.put(entry);
        Ok(())
    }

    fn delete<M: MemoryBackend>(&mut self, vm: &M, id: SlotId) -> Result<Option<Entry>, SlotError> {
        let Self { table, dirty, .. } = self;
        if let Some(entry) = table.get(id).filter(|entry| entry.mapped) {
            let name = || entry.name.clone();
            if entry.logs() {
                let read = dirty.leave(vm, &entry.slot, table);
                read.map_err(|error| SlotError::DirtyLog { name: name(), error })?;
            }
            let deleted = vm.delete_memory_slot(id);
            deleted.map_err(|error| SlotError::Kvm { name: name(), error })?;
            if entry.logs() {
                dirty.end(id, table);
            }
        }
        Ok(table.take(id))
    }

    /// Tries again to delete what is abandoned; the entries that went are to be dropped after the
    /// lock.
    fn reap<M: MemoryBackend>(&mut self, vm: &M) -> Vec<Entry> {
        let mut gone = Vec::new();
        for id in std::mem::take(&mut self.abandoned) {
            match self.delete(vm, id) {
                Ok(entry) => gone.extend(entry),
                Err(_) => drop(self.abandoned.insert(id)),
            }
        }
        gone
    }
}

/// A slot and its owner: dropping it takes the memory away from the guest.
///
/// If KVM does not delete the slot then, its number and its addresses stay in use, and the manager
/// tries again when a slot is added.
pub struct Slot<M: MemoryBackend> {
    id: SlotId,
    shared: Weak<Shared<M>>,
}

impl<M: MemoryBackend> Slot<M> {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// The slot as it is, or `None` if the manager is gone.
    #[must_use]
    pub fn info(&self) -> Option<SlotInfo> {
        let shared = self.shared.upgrade()?;
        let state = shared.state();
        state.table.get(self.id).map(SlotInfo::from)
    }

    /// Moves the memory to another guest-physical address. What was written before stays dirty where it
    /// was written; what a running guest writes in that moment is dirty at the one address or the other.
    ///
    /// # Errors
    /// Those of [`SlotManager::add`]; the memory stays where it was.
    pub fn move_to(&self, guest: GuestAddress) -> Result<(), SlotError> {
        self.change(|slot| slot.guest = guest)
    }

    /// Starts or ends recording which pages are written (`KVM_MEM_LOG_DIRTY_PAGES`). What was written
    /// before the end stays dirty.
    ///
    /// # Errors
    /// KVM refuses, also to say what was written so far; nothing has changed.
    pub fn set_log_dirty(&self, log_dirty: bool) -> Result<(), SlotError> {
        self.change(|slot| slot.flags.log_dirty = log_dirty)
    }

    /// Takes the memory away from the guest for a while; the slot keeps its number, and other slots
    /// may use its addresses. Without effect if it is away already. What was written stays dirty.
    ///
    /// # Errors
    /// KVM refuses, also to say what was written; nothing has changed.
    pub fn unmap(&self, _paused: &impl VcpusPaused) -> Result<(), SlotError> {
        let shared = self.shared()?;
        let mut state = shared.state();
        let entry = state.entry(self.id)?;
        state.delete(&*shared.vm, self.id)?;
        state.table.put(Entry { mapped: false, ..entry });
        Ok(())
    }

    /// Gives the memory back to the guest. Without effect if the guest has it.
    ///
    /// # Errors
    /// Other memory is there now, or KVM refuses; the memory stays away.
    pub fn map(&self) -> Result<(), SlotError> {
        let shared = self.shared()?;
        let mut state = shared.state();
        let entry = state.entry(self.id)?;
        if !entry.mapped {
            state.table.place(&entry.name, &entry.slot)?;
            state.set(&*shared.vm, Entry { mapped: true, ..entry })?;
        }
        Ok(())
    }

    /// Takes the memory away from the guest for good, as dropping does, and says if that failed. What
    /// was written stays dirty.
    ///
    /// A guest that runs and writes to the memory in that moment may be too late for the log to be read
    /// and too early for the memory to be gone. With [`crate::DirtyTracking::Ring`] that is told as well.
    ///
    /// # Errors
    /// KVM refuses, also to say what was written ([`SlotError::DirtyLog`]). The guest has the memory
    /// until then, and the manager tries again when a slot is added.
    pub fn remove(mut self) -> Result<(), SlotError> {
        let shared = self.shared()?;
        self.shared = Weak::new(); // what is left to drop
        shared.release(self.id)
    }

    /// Takes the memory away from the guest for good, or keeps the slot and its owner if KVM refuses.
    pub(crate) fn try_remove(mut self) -> Result<(), (Self, SlotError)> {
        let shared = match self.shared() {
            Ok(shared) => shared,
            Err(error) => return Err((self, error)),
        };
        // Dropped after the lock.
        let _gone;
        let mut state = shared.state();
        match state.delete(&*shared.vm, self.id) {
            Ok(entry) => {
                _gone = entry;
                self.shared = Weak::new(); // what is left to drop
                Ok(())
            }
            Err(error) => {
                drop(state);
                Err((self, error))
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut MemorySlot)) -> Result<(), SlotError> {
        let shared = self.shared()?;
        let mut state = shared.state();
        let mut entry = state.entry(self.id)?;
        let before = entry.slot.clone();
        change(&mut entry.slot);
        if entry.slot == before {
            return Ok(());
        }
        if entry.mapped {
            entry.range = state.table.place(&entry.name, &entry.slot)?;
            state.set(&*shared.vm, entry)
        } else {
            entry.range = state.table.shape(&entry.name, &entry.slot)?;
            state.table.put(entry);
            Ok(())
        }
    }

    fn shared(&self) -> Result<Arc<Shared<M>>, SlotError> {
        self.shared.upgrade().ok_or(SlotError::ManagerGone(self.id))
    }
}

impl<M: MemoryBackend> Drop for Slot<M> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            // A failure is remembered: the slot is abandoned.
            let _ = shared.release(self.id);
        }
    }
}

impl From<&Entry> for SlotInfo {
    fn from(entry: &Entry) -> Self {
        let Entry { name, slot, range, mapped } = entry.clone();
        Self { name, slot, range, mapped }
    }
}

impl<M: MemoryBackend> fmt::Debug for SlotManager<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlotManager").field("slots", &self.slots()).finish()
    }
}

impl<M: MemoryBackend> fmt::Debug for Slot<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.id)
    }
}
