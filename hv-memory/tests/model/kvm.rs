//! The KVM in memory, which fails when told to, and a witness of what it was asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hv_core::fake::{FakeHost, FakeKvm, FakeVm, VmView};
use hv_core::{
    Capability, CoalescedZone, Errno, Error, Hypervisor, Ioctl, MemoryBackend, MemorySlot, SlotId,
};

const PAGE: u64 = 4096;

/// A page of a guest: its host address, readonly, logging.
pub(crate) type HostPage = (u64, bool, bool);

/// A VM that fails when told to, and remembers what a map should never have asked for.
pub(crate) struct Witness {
    vm: FakeVm,
    view: VmView,
    /// As a KVM without `KVM_CAP_JOIN_MEMORY_REGIONS_WORKS`.
    joins: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Calls from now on that succeed, then how many fail.
    faults: Option<(usize, usize)>,
    injected: usize,
    calls: usize,
    complaints: Vec<String>,
    /// Where deleted slots began whose numbers are unused since.
    deleted: BTreeMap<SlotId, u64>,
    /// Pages that a running vCPU must have all the time.
    watched: BTreeMap<u64, u64>,
}

impl Witness {
    pub(crate) fn new(slots: u32, joins: bool, readonly: bool) -> (FakeKvm, Arc<Self>) {
        let host = FakeHost::default()
            .with(Capability::NrMemslots, slots.cast_signed())
            .with(Capability::ReadonlyMem, readonly.into());
        let kvm = FakeKvm::new(host);
        let vm = kvm.create_vm(0).unwrap();
        let view = vm.view();
        (kvm, Arc::new(Self { vm, view, joins, state: Mutex::default() }))
    }

    /// After `calls` more calls, `failures` fail (`ENOMEM`) and never reach the VM.
    pub(crate) fn fail_after(&self, calls: usize, failures: usize) {
        let mut state = self.state.lock().unwrap();
        (state.faults, state.injected) = (Some((calls, failures)), 0);
    }

    /// Stops failing, and says how many calls failed.
    pub(crate) fn heal(&self) -> usize {
        let mut state = self.state.lock().unwrap();
        state.faults = None;
        std::mem::take(&mut state.injected)
    }

    /// A running vCPU uses these pages from now on, by number, which are at these host addresses.
    pub(crate) fn watch(&self, pages: BTreeMap<u64, u64>) {
        self.state.lock().unwrap().watched = pages;
    }

    /// Calls made since it was last asked.
    pub(crate) fn take_calls(&self) -> usize {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }

    /// What KVM refused by itself, and what a vCPU would have noticed.
    pub(crate) fn complaints(&self) -> Vec<String> {
        self.state.lock().unwrap().complaints.clone()
    }

    pub(crate) fn slots(&self) -> Vec<MemorySlot> {
        self.view.slots()
    }

    pub(crate) fn pages(&self) -> BTreeMap<u64, HostPage> {
        let pages = |slot: MemorySlot| {
            let (guest, host, flags) = (slot.guest.0, slot.host.address(), slot.flags);
            (0..slot.host.len() as u64 / PAGE).map(move |n| {
                (guest / PAGE + n, (host + n * PAGE, flags.readonly, flags.log_dirty))
            })
        };
        self.slots().into_iter().flat_map(pages).collect()
    }

    fn call(&self, call: impl FnOnce(&mut State) -> Result<(), Error>) -> Result<(), Error> {
        let state = &mut *self.state.lock().unwrap();
        state.calls += 1;
        match &mut state.faults {
            Some((0, failures)) if *failures > 0 => {
                *failures -= 1;
                state.injected += 1;
                return Err(Error::new(Ioctl::SetUserMemoryRegion, Errno::ENOMEM));
            }
            Some((calls, _)) => *calls = calls.saturating_sub(1),
            None => {}
        }
        if let Err(error) = call(state) {
            // Once something has failed, what was joined may be more than can be undone.
            if self.joins || state.injected == 0 {
                state.complaints.push(error.to_string());
            }
            return Err(error);
        }
        let pages = self.pages();
        let lost = |(page, host): (&u64, &u64)| {
            pages.get(page).is_none_or(|(there, ..)| there != host).then_some(*page)
        };
        if let Some(page) = state.watched.iter().find_map(lost) {
            state.complaints.push(format!("a running vCPU misses page {page:#x}"));
        }
        Ok(())
    }
}

impl MemoryBackend for Witness {
    fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        self.call(|state| {
            let (start, end) = (slot.guest.0, slot.guest.0 + slot.host.len() as u64);
            let others = state.deleted.iter().filter(|(id, _)| **id != slot.id);
            let in_the_way = others.map(|(_, first)| *first).any(|at| start < at && at < end);
            if !self.joins && in_the_way {
                return Err(Error::new(Ioctl::SetUserMemoryRegion, Errno::EEXIST));
            }
            let same = self.slots().into_iter().any(|there| there == *slot);
            if same {
                state.complaints.push(format!("{slot:?} was there"));
            }
            self.vm.set_memory_slot(slot)?;
            state.deleted.remove(&slot.id);
            Ok(())
        })
    }

    fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error> {
        self.call(|state| {
            let first = self.slots().into_iter().find(|slot| slot.id == id);
            self.vm.delete_memory_slot(id)?;
            state.deleted.extend(first.map(|slot| (id, slot.guest.0)));
            Ok(())
        })
    }

    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error> {
        self.vm.dirty_log(id, bitmap)
    }

    fn clear_dirty_log(&self, id: SlotId, first: u64, n: u32, bits: &[u64]) -> Result<(), Error> {
        self.vm.clear_dirty_log(id, first, n, bits)
    }

    fn reset_dirty_rings(&self) -> Result<u32, Error> {
        self.vm.reset_dirty_rings()
    }

    fn register_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        self.vm.register_coalesced_zone(zone)
    }

    fn unregister_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        self.vm.unregister_coalesced_zone(zone)
    }
}
