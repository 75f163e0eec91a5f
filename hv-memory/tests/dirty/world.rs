//! Slots on a VM, its guest, and the model of what is dirty.

use std::sync::Arc;

use hv_core::fake::{FakeKvm, GuestStep, VmView};
use hv_core::layer::Interceptor;
use hv_core::{Error, HostRange, Hypervisor, IoAddress, SlotFlags, Vcpu, VcpuExit, Vm};
use hv_memory::{
    DirtyError, DirtyPages, DirtyTracking, GuestRange, Mapping, NewSlot, Slot, SlotError,
    SlotLimits, SlotManager, VcpusPaused,
};
use vm_memory::{Bytes, GuestAddress};

use crate::PAGE;
use crate::kvm::{Chosen, Live, TestKvm, TestVm, Witness};
use crate::model::{Model, Pages};
use crate::plan::{Fault, HOST, Op};

struct Paused;
impl VcpusPaused for Paused {}

type TestVcpu = <TestVm as Vm>::Vcpu;

pub(crate) struct World {
    pub(crate) fake: FakeKvm,
    pub(crate) witness: Witness,
    pub(crate) manager: SlotManager<TestVm>,
    chosen: Chosen,
    view: VmView,
    vcpus: Vec<TestVcpu>,
    mapping: Arc<Mapping>,
    owners: Vec<Slot<TestVm>>,
    model: Model,
    how: DirtyTracking,
    /// What is filled again and again, and what was read last.
    harvested: DirtyPages,
    read: DirtyPages,
}

/// What an operation answered.
enum Answer {
    Done,
    Slot(SlotError),
    Dirty(DirtyError),
}

impl World {
    pub(crate) fn new(how: DirtyTracking) -> Self {
        let (fake, witness, chosen) = (FakeKvm::default(), Witness::default(), Chosen::none());
        let kvm: TestKvm = chosen.over(witness.over(fake.clone()));
        let vm = Arc::new(kvm.create_vm(0).unwrap());
        let limits = SlotLimits { slots: 6, address_bits: 36 };
        let (manager, _) = SlotManager::adopt::<&str>(vm.clone(), [], limits).unwrap();
        manager.track_dirty(how).unwrap();
        let vcpus: Vec<TestVcpu> = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
        if let DirtyTracking::Ring { .. } = how {
            vcpus.iter().for_each(|vcpu| manager.add_dirty_ring(vcpu).unwrap());
        }
        Self {
            fake,
            witness,
            manager,
            chosen,
            view: vm.inner().inner().view(),
            vcpus,
            mapping: Arc::new(Mapping::anonymous(HOST * PAGE).unwrap()),
            owners: Vec::new(),
            model: Model::default(),
            how,
            harvested: DirtyPages::new(),
            read: DirtyPages::new(),
        }
    }

    fn slots(&self) -> Vec<Live> {
        self.witness.with(|seen| seen.slots.values().copied().collect())
    }

    fn owner(&self, which: usize) -> Option<usize> {
        which.checked_rem(self.owners.len())
    }

    /// Carries an operation out and says what is wrong with what came of it.
    pub(crate) fn run(&mut self, op: &Op, fault: Option<Fault>) -> Result<(), String> {
        if let Some(fault) = fault.filter(|_| !matches!(op, Op::Guest { .. } | Op::Flood(_))) {
            self.chosen.choose(fault.plan());
        }
        let answer = self.carry_out(op);
        let injected = self.chosen.heal();
        match answer? {
            Answer::Done => {}
            Answer::Slot(SlotError::Overlap { .. } | SlotError::NoFreeSlot { .. }) => {}
            Answer::Slot(SlotError::Kvm { error, .. } | SlotError::DirtyLog { error, .. })
            | Answer::Dirty(DirtyError::Kvm { error, .. } | DirtyError::Rings(error)) => {
                check_injected(injected, &error)?
            }
            Answer::Slot(error) => return Err(error.to_string()),
            Answer::Dirty(error) => return Err(error.to_string()),
        }
        let begun = self.witness.with(|seen| std::mem::take(&mut seen.begun));
        if self.how == (DirtyTracking::ManualProtect { initially_set: true }) {
            for slot in begun {
                (slot.first..slot.first + slot.pages)
                    .for_each(|page| self.model.write(page, false));
            }
        }
        let complaints = self.witness.with(|seen| std::mem::take(&mut seen.complaints));
        if !complaints.is_empty() {
            return Err(format!("{complaints:?}"));
        }
        match self.fake.findings() {
            findings if findings.is_empty() => Ok(()),
            findings => Err(format!("{findings:?}")),
        }
    }

    fn carry_out(&mut self, op: &Op) -> Result<Answer, String> {
        let done = |result: Result<(), SlotError>| match result {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Slot(error),
        };
        let told = |result: Result<(), DirtyError>| match result {
            Ok(()) => Answer::Done,
            Err(error) => Answer::Dirty(error),
        };
        Ok(match *op {
            Op::Add { page, pages, host, readonly, log } => {
                let bytes = |pages: u64| usize::try_from(pages * PAGE).unwrap();
                let new = NewSlot {
                    name: "RAM".into(),
                    guest: GuestAddress(page * PAGE),
                    host: HostRange::new(self.mapping.clone(), bytes(host), bytes(pages)).unwrap(),
                    flags: SlotFlags { log_dirty: log, readonly },
                };
                done(self.manager.add(new).map(|owner| self.owners.push(owner)))
            }
            Op::Guest { vcpu, slot, ref pages } => {
                self.guest_writes(vcpu, slot, pages)?;
                Answer::Done
            }
            Op::Flood(slot) => {
                let pages: Vec<u64> = (0..HOST).collect();
                self.guest_writes(0, slot, &pages)?;
                Answer::Done
            }
            Op::Vmm { page, pages } => {
                self.vmm_writes(page, pages.min(HOST - 1 - page));
                Answer::Done
            }
            Op::Harvest => {
                let result = self.manager.harvest_dirty(&mut self.harvested);
                let pages = pages_of(&self.harvested)?;
                match &result {
                    Ok(()) => {
                        self.model.check(&pages)?;
                        self.model.harvested();
                    }
                    Err(_) if pages.is_empty() => {}
                    Err(_) => return Err("a failed harvest tells something".into()),
                }
                told(result)
            }
            Op::Read => {
                let result = self.manager.read_dirty(&mut self.read);
                let pages = pages_of(&self.read)?;
                match &result {
                    Ok(()) => {
                        self.model.check(&pages)?;
                        self.model.read(&pages);
                    }
                    Err(_) if pages.is_empty() => self.model.unread(),
                    Err(_) => return Err("what could not be read tells something".into()),
                }
                told(result)
            }
            Op::Clear { page, pages, start, end } => {
                let (start, end) = (
                    (page * PAGE).saturating_add_signed(start),
                    ((page + pages) * PAGE).saturating_add_signed(end),
                );
                let range = GuestRange::new(GuestAddress(start), end - start).unwrap();
                self.witness.with(|seen| seen.cleared.clear());
                let result = self.manager.clear_dirty(&self.read, range);
                let cleared = self.witness.with(|seen| std::mem::take(&mut seen.cleared));
                let asked = self.model.asked(start.div_ceil(PAGE), end / PAGE);
                if !cleared.is_subset(&asked) {
                    return Err(format!("cleared {cleared:?}, asked for {asked:?}"));
                }
                match &result {
                    Ok(()) => self.model.clear(&asked),
                    Err(_) => self.model.not_cleared(&asked),
                }
                told(result)
            }
            Op::Remove(which) | Op::Drop(which) => {
                let Some(which) = self.owner(which) else { return Ok(Answer::Done) };
                let owner = self.owners.remove(which);
                match op {
                    Op::Remove(_) => done(owner.remove()),
                    _ => Answer::Done,
                }
            }
            Op::Move(which, _) | Op::Unmap(which) | Op::Map(which) | Op::Log(which, _) => {
                let Some(which) = self.owner(which) else { return Ok(Answer::Done) };
                let owner = &self.owners[which];
                done(match *op {
                    Op::Move(_, page) => owner.move_to(GuestAddress(page * PAGE)),
                    Op::Unmap(_) => owner.unmap(&Paused),
                    Op::Map(_) => owner.map(),
                    Op::Log(_, on) => owner.set_log_dirty(on),
                    _ => Ok(()),
                })
            }
        })
    }

    fn guest_writes(&mut self, vcpu: u32, slot: usize, pages: &[u64]) -> Result<(), String> {
        let slots = self.slots();
        let Some(which) = slot.checked_rem(slots.len()) else { return Ok(()) };
        let slot = slots[which];
        let pages: Vec<u64> = pages.iter().map(|page| slot.first + page % slot.pages).collect();
        let address = |page: u64| IoAddress::Mmio(page * PAGE + 8);
        let steps = pages.iter().map(|page| GuestStep::write(address(*page), [1]));
        self.view.program(vcpu, steps);
        loop {
            match self.vcpus[vcpu as usize].run().map_err(|error| error.to_string())? {
                VcpuExit::Hlt => break,
                VcpuExit::Mmio(_) => {} // a ROM
                VcpuExit::DirtyRingFull => {
                    self.manager.empty_dirty_ring(vcpu).map_err(|error| error.to_string())?;
                }
                exit => return Err(format!("{exit:?}")),
            }
        }
        let readonly = self.view.slots().into_iter().filter(|slot| slot.flags.readonly);
        let readonly: Pages = readonly.map(|slot| slot.guest.0 / PAGE).collect();
        if slot.logs && !readonly.contains(&slot.first) {
            let stays = !matches!(self.how, DirtyTracking::ManualProtect { .. });
            pages.iter().for_each(|page| self.model.write(*page, stays));
        }
        Ok(())
    }

    fn vmm_writes(&mut self, page: u64, more: u64) {
        let bytes = vec![1; usize::try_from(more * PAGE + 1).unwrap()];
        let offset = usize::try_from(page * PAGE + 100).unwrap();
        self.mapping.as_volatile_slice().write_slice(&bytes, offset).unwrap();
        for slot in self.slots().iter().filter(|slot| slot.logs) {
            let of_slot = (page..=page + more).filter_map(|page| page.checked_sub(slot.host));
            for page in of_slot.filter(|page| *page < slot.pages) {
                self.model.write(slot.first + page, true);
            }
        }
    }

    /// All owners go, and what is still dirty is told.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        self.owners.clear();
        // What KVM would not delete before.
        self.run(&Op::Add { page: 0, pages: 1, host: 0, readonly: false, log: false }, None)?;
        self.owners.clear();
        self.run(&Op::Harvest, None)?;
        let Self { fake, manager, vcpus, mapping, .. } = self;
        drop((manager, vcpus));
        if Arc::strong_count(&mapping) != 1 {
            return Err("somebody holds the memory".into());
        }
        match fake.findings() {
            findings if findings.is_empty() => Ok(()),
            findings => Err(format!("{findings:?}")),
        }
    }
}

/// The pages of ranges, which have to be in order, and apart.
fn pages_of(dirty: &DirtyPages) -> Result<Pages, String> {
    let mut pages = Pages::new();
    let mut end = None;
    for range in dirty {
        let (first, last) = (range.start().0, range.last().0);
        if end.is_some_and(|end| first <= end) || first % PAGE != 0 || (last + 1) % PAGE != 0 {
            return Err(format!("{range} in {dirty:?}"));
        }
        end = Some(last + 1);
        pages.extend(first / PAGE..=last / PAGE);
    }
    match dirty.count() == pages.len() as u64 {
        true => Ok(pages),
        false => Err(format!("{} pages in {dirty:?}", dirty.count())),
    }
}

fn check_injected(injected: u64, error: &Error) -> Result<(), String> {
    match injected {
        0 => Err(format!("nothing was made to fail, but {error}")),
        _ => Ok(()),
    }
}
