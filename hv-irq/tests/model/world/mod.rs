//! A router on a VM, its owners and its guest, beside the model of them.

mod actions;
mod moves;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use hv_core::fake::{FakeHost, FakeKvm, Interrupt as Taken, VmView};
use hv_core::layer::Interceptor;
use hv_core::{
    Capability, EventFd, Gsi, Hypervisor, IoAddress, Ioctl, Msi, Route, RouteTarget, Vm,
};
use hv_irq::{
    GsiRoute, Ioapic, IrqRouter, LegacyPins, LevelPin, MsiVectors, PinIrqfd, RouterConfig,
    RouterError,
};

use crate::kvm::{Chosen, TestKvm, TestVm, Witness};
use crate::model::{Interrupts, LEVEL_LINES, Model, Refusal, line_interrupt};
use crate::plan::{Fault, Op, Setup, USER_PINS};

type Bound<T> = (T, EventFd);

/// What came of an operation.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Calls that were made to fail.
    pub(crate) injected: u64,
    /// How often a table was written, and how many batches there were at most to write one.
    pub(crate) tables: u64,
    pub(crate) batches: u64,
    /// Whether the table is another one now.
    pub(crate) changed: bool,
    /// What the guest received, and what it should have.
    pub(crate) taken: Interrupts,
    pub(crate) expected: Interrupts,
    /// How it failed, if it did.
    pub(crate) error: Option<RouterError>,
    /// Undoing failed: what owners have is not known any more.
    pub(crate) lost: bool,
    /// An answer that the model does not have.
    pub(crate) surprise: Option<String>,
    /// The table right after it, that of the router and that of KVM.
    pub(crate) tables_agree: bool,
}

pub(crate) struct World {
    pub(crate) fake: FakeKvm,
    pub(crate) witness: Witness,
    pub(crate) model: Model,
    pub(crate) router: IrqRouter<TestVm>,
    pub(crate) view: VmView,
    kvm: TestKvm,
    chosen: Chosen,
    config: RouterConfig,
    ioapic: Option<Ioapic<TestVm>>,
    routes: BTreeMap<u32, Bound<GsiRoute<TestVm>>>,
    groups: BTreeMap<u32, MsiVectors<TestVm>>,
    pins: BTreeMap<u32, Bound<PinIrqfd<TestVm>>>,
    levels: BTreeMap<u32, LevelPin<TestVm>>,
    /// Ends that the I/O APIC in user space is still to be told of.
    exits: VecDeque<u8>,
}

/// A VM with an irqchip and two vCPUs that take interrupts. In the kernel, all pins are open.
fn machine(kvm: &TestKvm, setup: &Setup) -> (Arc<TestVm>, VmView) {
    let vm = kvm.create_vm(0).unwrap();
    match setup.pins {
        LegacyPins::Kernel => vm.create_irqchip().unwrap(),
        LegacyPins::Userspace => {
            vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
        }
    }
    if setup.x2apic {
        vm.enable_cap(Capability::X2apicApi, [1, 0, 0, 0]).unwrap();
    }
    let view = vm.inner().inner().view();
    for id in 0..2 {
        drop(vm.create_vcpu(id).unwrap());
        view.enable_apic(id);
    }
    if setup.pins == LegacyPins::Kernel {
        for gsi in (0..24).filter(|&gsi| gsi != 2) {
            let (vcpu, vector) = line_interrupt(gsi);
            let level = if LEVEL_LINES.contains(&gsi) { 0x8000 } else { 0 };
            let entry = [u32::from(vcpu) << 24, level | u32::from(vector)];
            for (select, value) in [0x11, 0x10].into_iter().zip(entry) {
                let write = |offset: u64, value: u32| {
                    let address = IoAddress::Mmio(0xfec0_0000 + offset);
                    let _ = view.guest_write(address, &value.to_le_bytes());
                };
                write(0, select + 2 * (u32::from(vector) - 0x20));
                write(0x10, value);
            }
        }
    }
    (Arc::new(vm), view)
}

impl World {
    pub(crate) fn new(setup: Setup) -> Self {
        let host = FakeHost::default().with(Capability::IrqRouting, setup.limit as i32);
        let (fake, witness, chosen) = (FakeKvm::new(host), Witness::default(), Chosen::none());
        let kvm = chosen.over(witness.over(fake.clone()));
        let (vm, view) = machine(&kvm, &setup);
        let mut config = RouterConfig::new(setup.limit, setup.pins);
        (config.msi, config.x2apic_format) = (setup.msi, setup.x2apic);
        let router = IrqRouter::new(vm, config).unwrap();
        let ioapic =
            (setup.pins == LegacyPins::Userspace).then(|| Ioapic::new(router.clone()).unwrap());
        Self {
            fake,
            witness,
            model: Model::new(setup),
            router,
            view,
            kvm,
            chosen,
            config,
            ioapic,
            routes: BTreeMap::new(),
            groups: BTreeMap::new(),
            pins: BTreeMap::new(),
            levels: BTreeMap::new(),
            exits: VecDeque::new(),
        }
    }

    fn event(&self) -> EventFd {
        self.fake.eventfd().unwrap()
    }

    fn tables(&self) -> u64 {
        self.fake.calls().of(Ioctl::SetGsiRouting)
    }

    /// The guest takes its interrupts and ends them.
    fn take(&mut self) -> Interrupts {
        let mut all = Interrupts::new();
        for vcpu in 0..2_u8 {
            loop {
                let taken = self.view.take_interrupts(vcpu.into());
                if taken.is_empty() {
                    break;
                }
                for interrupt in taken {
                    if let Taken::Fixed(vector) = interrupt {
                        self.view.end_of_interrupt(vcpu.into(), vector);
                        all.insert((vcpu, vector));
                    }
                }
            }
        }
        all
    }

    /// The irqfds there should be.
    pub(crate) fn irqfds(&self) -> BTreeSet<(EventFd, Gsi)> {
        let mut irqfds = BTreeSet::new();
        for (id, (route, event)) in &self.routes {
            if self.model.routes[id].bound {
                irqfds.insert((event.clone(), route.gsi()));
            }
        }
        for (id, vectors) in &self.groups {
            let group = &self.model.groups[id];
            for (i, vector) in group.vectors.iter().enumerate() {
                if self.model.is_live(group, vector) {
                    let gsi = Gsi(vector.gsi.unwrap_or(u32::MAX));
                    irqfds.insert((vectors.event(i).unwrap().clone(), gsi));
                }
            }
        }
        irqfds.extend(self.pins.values().map(|(pin, event)| (event.clone(), pin.gsi())));
        for level in self.levels.values() {
            let pin = self.model.user_pins.get(&(level.gsi().0 as u8));
            if !pin.is_some_and(|pin| pin.masked) {
                irqfds.insert((level.trigger().clone(), level.gsi()));
            }
        }
        irqfds
    }

    /// What handles say of themselves differs from what the model has: where.
    pub(crate) fn disagreement(&self) -> Option<String> {
        for (id, (route, _)) in &self.routes {
            if route.gsi().0 != self.model.routes[id].gsi {
                return Some(format!("route {id} has GSI {}", route.gsi()));
            }
        }
        for (id, vectors) in &self.groups {
            let group = &self.model.groups[id];
            if (vectors.is_enabled(), vectors.is_all_masked()) != (group.enabled, group.masked) {
                return Some(format!("{vectors:?}"));
            }
            for (i, vector) in group.vectors.iter().enumerate() {
                let is = (
                    vectors.gsi(i).unwrap().map(|gsi| gsi.0),
                    vectors.message(i).unwrap(),
                    vectors.is_masked(i).unwrap(),
                    vectors.is_pending(i).unwrap(),
                );
                let should = (vector.gsi, vector.message, vector.masked, vector.pending);
                if is != should {
                    return Some(format!("vector {i} of {id}: {is:?}, and not {should:?}"));
                }
            }
        }
        let entries = self.ioapic.iter().flat_map(|ioapic| {
            let saved = ioapic.save();
            USER_PINS.map(|pin| (pin, saved.entries[usize::from(pin)], saved.lines >> pin & 1 != 0))
        });
        for (number, entry, line) in entries {
            let pin = &self.model.user_pins[&number];
            let bits = u64::from(pin.vcpu) << 56
                | u64::from(pin.masked) << 16
                | u64::from(pin.level) << 15
                | u64::from(pin.remote_irr) << 14
                | u64::from(pin.vector);
            if (entry, line) != (bits, pin.line) {
                return Some(format!("pin {number} is {entry:#x}, {line} and not {pin:?}"));
            }
        }
        None
    }

    /// Devices that were told of an end and should not, or the other way round. Asking takes it.
    pub(crate) fn take_ends(&mut self) -> Option<String> {
        let mut wrong = None;
        for (id, level) in &self.levels {
            let ended = std::mem::take(&mut self.model.levels.get_mut(id).unwrap().ended);
            if level.take_end() != ended {
                wrong = Some(format!(
                    "{level:?}: an end was {}expected",
                    if ended { "" } else { "not " }
                ));
            }
        }
        wrong
    }

    /// Everything goes, and a new router begins on a new VM.
    pub(crate) fn restart(&mut self) {
        self.clear();
        *self = Self::new(self.model.setup);
    }

    /// All owners go.
    pub(crate) fn clear(&mut self) {
        self.routes.clear();
        self.groups.clear();
        self.pins.clear();
        self.levels.clear();
        let model = &mut self.model;
        (model.routes, model.groups) = Default::default();
        (model.pins, model.levels) = Default::default();
    }

    /// Does what `op` says, with failures, and keeps the model up to date.
    pub(crate) fn run(&mut self, op: &Op, fault: Option<Fault>) -> Ran {
        let (tables, before) = (self.tables(), self.view.routes());
        let cached = self.model.cached.clone();
        let mut ran = match op {
            // A move that can not be undone leaves two VMs behind; that is not looked at.
            Op::Restore => self.restore(fault.filter(|fault| !fault.may_repeat())),
            Op::Rebuild => self.rebuild(fault.filter(|fault| !fault.may_repeat())),
            op => {
                self.fail(fault);
                self.carry_out(op)
            }
        };
        ran.injected += self.chosen.heal();
        if !matches!(op, Op::Restore) {
            ran.tables = self.tables() - tables;
        }
        ran.changed = self.view.routes() != before;
        ran.tables_agree = self.router.routes() == self.view.routes();
        if !cached.is_empty() && self.model.cached != cached {
            ran.batches += 1; // the cache was flushed, too
        }
        if ran.injected > 0 {
            // What KVM would not let go of goes with the next commit.
            if let Err(error) = self.router.batch(|_| Ok(())) {
                ran.surprise = Some(format!("the next batch: {error}"));
            }
            let table = self.table();
            self.model.cached.retain(|&(address, data), gsi| {
                let target = RouteTarget::Msi(Msi { address, data, device: None });
                table.contains(&Route { gsi: Gsi(*gsi), target })
            });
        }
        ran
    }

    fn fail(&self, fault: Option<Fault>) {
        if let Some(fault) = fault {
            self.chosen.choose(fault.faults());
        }
    }

    /// The table KVM has.
    pub(crate) fn table(&self) -> BTreeSet<Route> {
        self.view.routes().into_iter().collect()
    }

    /// The model after `op` becomes the model if it was done, and not if it failed.
    fn judge(
        &mut self,
        done: Result<(), RouterError>,
        after: Model,
        predicted: Result<Interrupts, Refusal>,
    ) -> Ran {
        let injected = self.chosen.heal();
        let taken = self.take();
        let mut ran = Ran {
            injected,
            tables: 0,
            batches: 1,
            changed: false,
            taken,
            expected: Interrupts::new(),
            error: done.err(),
            lost: false,
            surprise: None,
            tables_agree: true,
        };
        match (done, &predicted) {
            (Ok(()), Ok(expected)) => {
                ran.expected = expected.clone();
                self.model = after;
            }
            (Err(RouterError::RollbackFailed { .. }), _) if injected > 1 => {
                ran.lost = true;
                ran.expected = ran.taken.clone();
            }
            (Err(RouterError::Kvm(_)), _) if injected > 0 => {
                // An event that waited is delivered if its irqfd was bound before another call
                // failed; then it does not wait any more.
                self.model.forget_delivered(&after, &ran.taken);
                ran.expected = ran.taken.clone();
                if let Ok(expected) = &predicted
                    && !ran.taken.is_subset(expected)
                {
                    ran.expected = expected.clone();
                }
            }
            (Err(error), Err(refusal)) if Refusal::of(&error) == Some(*refusal) => {
                // Room is made before anything is refused.
                self.model.cached = after.cached;
            }
            (done, predicted) => {
                ran.surprise =
                    Some(format!("{done:?}, and not {predicted:?}; {injected} injected"));
            }
        }
        ran
    }

    /// Nothing could fail, nor was KVM asked.
    fn quiet(&mut self, expected: Interrupts) -> Ran {
        let after = self.model.clone();
        self.judge(Ok(()), after, Ok(expected))
    }
}
