#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! What guests do to the vectors of devices, with failures injected, against a naive model of what
//! the guest has to receive, on the KVM in memory.
//!
//! `PROPTEST_CASES=1000000 cargo test -p hv-irq --release --test vectors` runs a million.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{FaultyVm, Machine, msi};
use hv_core::fake::{FakeHost, FakeKvm};
use hv_core::init::MsiMode;
use hv_core::{Capability, Gsi, Msi, MsiStatus, Route, RouteTarget, Vm};
use hv_irq::{IrqRouter, LegacyPins, MsiVectors, RouteError, RouterError, pc_default_routes};
use proptest::prelude::*;

/// GSIs, and entries of the table: few, so that they run out.
const LIMIT: u32 = 48;
const DEFAULTS: u32 = 38;

#[derive(Debug, Clone, Copy)]
enum Sub {
    Enable,
    Disable,
    MaskAll,
    UnmaskAll,
    Mask(usize),
    Unmask(usize),
    /// To this vCPU.
    Retarget(usize, u8),
    /// To an address no device would use.
    Garbage(usize),
    OutOfRange,
}

#[derive(Debug, Clone)]
enum Op {
    Plug(usize),
    Change(usize, Vec<Sub>),
    Signal(usize, usize),
    Unplug(usize),
    Message(u8),
    Move,
}

fn sub() -> impl Strategy<Value = Sub> {
    let i = any::<usize>();
    prop_oneof![
        4 => Just(Sub::Enable),
        1 => Just(Sub::Disable),
        1 => Just(Sub::MaskAll),
        2 => Just(Sub::UnmaskAll),
        4 => i.prop_map(Sub::Mask),
        8 => i.prop_map(Sub::Unmask),
        4 => (i, 0..2_u8).prop_map(|(i, vcpu)| Sub::Retarget(i, vcpu)),
        1 => i.prop_map(Sub::Garbage),
        1 => Just(Sub::OutOfRange),
    ]
}

fn ops() -> impl Strategy<Value = Vec<(Op, Option<usize>)>> {
    let i = any::<usize>();
    let op = prop_oneof![
        2 => (1..6_usize).prop_map(Op::Plug),
        8 => (i, prop::collection::vec(sub(), 0..8)).prop_map(|(i, subs)| Op::Change(i, subs)),
        8 => (i, i).prop_map(|(group, vector)| Op::Signal(group, vector)),
        1 => i.prop_map(Op::Unplug),
        2 => any::<u8>().prop_map(Op::Message),
        1 => Just(Op::Move),
    ];
    let fault = prop_oneof![4 => Just(None), 1 => (0..8_usize).prop_map(Some)];
    prop::collection::vec((op, fault), 0..50)
}

/// A vector as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Entry {
    vcpu: u8,
    /// Its own, so that the guest knows who interrupts.
    vector: u8,
    garbage: bool,
    masked: bool,
    pending: bool,
    has_gsi: bool,
}

impl Entry {
    fn message(self) -> Msi {
        let Msi { address, data, device } = msi(self.vcpu, self.vector);
        let high = if self.garbage { 0x12_0000_0000 } else { 0 };
        Msi { address: address | high, data, device }
    }
}

#[derive(Debug, Clone)]
struct Group {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

impl Group {
    /// Whether KVM refuses what is not of the x2APIC format is said by `x2apic`.
    fn is_live(&self, i: usize, x2apic: bool) -> bool {
        let entry = self.entries[i];
        let held_back = self.masked || entry.masked || (entry.garbage && x2apic);
        self.enabled && !held_back
    }

    fn apply(&mut self, sub: Sub) {
        let n = self.entries.len();
        match sub {
            Sub::Enable => self.enabled = true,
            Sub::Disable => self.enabled = false,
            Sub::MaskAll => self.masked = true,
            Sub::UnmaskAll => self.masked = false,
            Sub::Mask(i) => self.entries[i % n].masked = true,
            Sub::Unmask(i) => self.entries[i % n].masked = false,
            Sub::Retarget(i, vcpu) => {
                (self.entries[i % n].vcpu, self.entries[i % n].garbage) = (vcpu, false);
            }
            Sub::Garbage(i) => self.entries[i % n].garbage = true,
            Sub::OutOfRange => {}
        }
    }
}

struct World {
    kvm: FakeKvm,
    host: Machine,
    vm: Arc<FaultyVm>,
    router: IrqRouter<FaultyVm>,
    groups: Vec<(Group, MsiVectors<FaultyVm>)>,
    plugged: u8,
    x2apic: bool,
}

impl World {
    fn new(x2apic: bool, msi: MsiMode) -> Self {
        let kvm = FakeKvm::new(FakeHost::default().with(Capability::IrqRouting, LIMIT as i32));
        let mut host = Self::host(&kvm, x2apic);
        host.config.msi = msi;
        let vm = host.faulty();
        let router = IrqRouter::new(vm.clone(), host.config).unwrap();
        Self { kvm, host, vm, router, groups: Vec::new(), plugged: 0, x2apic }
    }

    fn host(kvm: &FakeKvm, x2apic: bool) -> Machine {
        let mut host = Machine::new(kvm, LegacyPins::Kernel);
        if x2apic {
            host.vm.enable_cap(Capability::X2apicApi, [1, 0, 0, 0]).unwrap();
            host.config.x2apic_format = true;
        }
        host
    }

    fn owned(&self) -> u32 {
        let entries = self.groups.iter().flat_map(|(group, _)| &group.entries);
        entries.filter(|entry| entry.has_gsi).count() as u32
    }

    /// What the guest takes now, by vCPU.
    fn taken(&self) -> Vec<(u8, u8)> {
        let of = |vcpu| self.host.taken(u32::from(vcpu)).into_iter().map(move |v| (vcpu, v));
        (0..2).flat_map(of).collect()
    }

    fn change(&mut self, which: usize, subs: &[Sub]) -> Result<(), TestCaseError> {
        let room = LIMIT - DEFAULTS - self.owned();
        let (group, vectors) = &mut self.groups[which];
        let (n, mut after) = (group.entries.len(), group.clone());
        subs.iter().for_each(|&sub| after.apply(sub));
        let done = vectors.change(|change| {
            for sub in subs {
                match *sub {
                    Sub::Enable => change.enable(),
                    Sub::Disable => change.disable(),
                    Sub::MaskAll => change.mask_all(),
                    Sub::UnmaskAll => change.unmask_all(),
                    Sub::Mask(i) => change.mask(i % n)?,
                    Sub::Unmask(i) => change.unmask(i % n)?,
                    Sub::Retarget(i, vcpu) => {
                        change.retarget(i % n, msi(vcpu, group.entries[i % n].vector))?;
                    }
                    // The message changes with what was changed before it.
                    Sub::Garbage(i) => change.retarget(i % n, after.entries[i % n].message())?,
                    Sub::OutOfRange => change.mask(n)?,
                }
            }
            // As the model has it, whatever the order was.
            (0..n).try_for_each(|i| change.retarget(i, after.entries[i].message()))
        });
        let injected = self.vm.heal();
        let live: Vec<bool> = (0..n).map(|i| after.is_live(i, self.x2apic)).collect();
        let new = (0..n).filter(|&i| live[i] && !group.entries[i].has_gsi).count() as u32;
        let out_of_range = subs.iter().any(|sub| matches!(sub, Sub::OutOfRange));
        let mut expected: Vec<(u8, u8)> = Vec::new();
        match done {
            Ok(()) => {
                prop_assert!(injected == 0 && !out_of_range && new <= room);
                for (i, entry) in after.entries.iter_mut().enumerate() {
                    entry.has_gsi = after.enabled && (entry.has_gsi || live[i]);
                    if live[i] && std::mem::take(&mut entry.pending) {
                        expected.push((entry.vcpu, entry.vector));
                    }
                }
                *group = after;
            }
            Err(RouterError::NoSuchVector { index, count }) => {
                prop_assert!(out_of_range && (index, count) == (n, n));
            }
            Err(RouterError::Route(RouteError::TableFull { limit })) => {
                prop_assert!(new > room && limit == LIMIT);
            }
            Err(RouterError::Kvm(_)) => {
                prop_assert!(injected > 0);
                // An event that waited was delivered if its irqfd had been bound before another was
                // refused; then it does not wait any more.
                let taken = self.taken();
                for (i, entry) in self.groups[which].0.entries.iter_mut().enumerate() {
                    let new = (after.entries[i].vcpu, entry.vector);
                    if entry.pending && taken.contains(&new) {
                        entry.pending = false;
                        expected.push(new);
                    }
                }
                let (mut taken, mut expected) = (taken, expected);
                taken.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(taken, expected);
                return Ok(());
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
        self.check_taken(expected)
    }

    fn check_taken(&self, mut expected: Vec<(u8, u8)>) -> Result<(), TestCaseError> {
        let mut taken = self.taken();
        taken.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(taken, expected, "what the guest receives");
        Ok(())
    }

    /// Router, KVM and model agree.
    fn check(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.vm.complaints(), [""; 0]);
        prop_assert_eq!(self.kvm.findings(), []);
        prop_assert_eq!(self.router.routes(), self.host.view.routes());
        let (mut routes, mut bound): (BTreeSet<Route>, BTreeSet<(_, Gsi)>) = Default::default();
        let mut owned = BTreeSet::new();
        for (group, vectors) in &self.groups {
            prop_assert_eq!(vectors.is_enabled(), group.enabled);
            for (i, entry) in group.entries.iter().enumerate() {
                let gsi = vectors.gsi(i).unwrap();
                prop_assert_eq!(gsi.is_some(), entry.has_gsi);
                prop_assert_eq!(vectors.is_pending(i).unwrap(), entry.pending);
                prop_assert_eq!(vectors.message(i).unwrap(), entry.message());
                owned.extend(gsi);
                if group.is_live(i, self.x2apic) {
                    let target = RouteTarget::Msi(entry.message());
                    routes.insert(Route { gsi: gsi.unwrap(), target });
                    bound.insert((vectors.event(i).unwrap().clone(), gsi.unwrap()));
                }
            }
        }
        let irqfds = self.host.view.irqfds().into_iter();
        let irqfds: BTreeSet<_> = irqfds.map(|irqfd| (irqfd.event, irqfd.gsi)).collect();
        prop_assert_eq!(irqfds, bound);
        routes.extend(pc_default_routes());
        let table: BTreeSet<_> = self.host.view.routes().into_iter().collect();
        prop_assert!(routes.is_subset(&table));
        let allocated: BTreeSet<_> = self.router.allocated().into_iter().collect();
        let cached = allocated.len() - owned.len();
        prop_assert!(owned.is_subset(&allocated));
        prop_assert_eq!(table.len(), 38 + allocated.len(), "a route for each, and no other");
        if self.host.config.msi == MsiMode::Direct {
            prop_assert_eq!(cached, 0);
        }
        Ok(())
    }

    fn run(&mut self, op: &Op) -> Result<(), TestCaseError> {
        let pick = |i: usize, n: usize| (n > 0).then(|| i % n);
        match *op {
            Op::Plug(n) => {
                let entries: Vec<Entry> = (0..n)
                    .map(|_| {
                        self.plugged = (self.plugged + 1) % 200;
                        let vector = 0x20 + self.plugged;
                        let (garbage, pending, has_gsi) = (false, false, false);
                        Entry { vcpu: 0, vector, garbage, masked: true, pending, has_gsi }
                    })
                    .collect();
                let mut vectors = MsiVectors::new(&self.router, self.host.events(n));
                let messages = entries.iter().enumerate();
                vectors
                    .change(|change| {
                        let mut messages = messages;
                        messages.try_for_each(|(i, entry)| change.retarget(i, entry.message()))
                    })
                    .unwrap();
                self.groups.push((Group { enabled: false, masked: false, entries }, vectors));
            }
            Op::Change(which, ref subs) => {
                if let Some(which) = pick(which, self.groups.len()) {
                    self.change(which, subs)?;
                }
            }
            Op::Signal(which, i) => {
                self.vm.heal();
                let Some(which) = pick(which, self.groups.len()) else { return Ok(()) };
                let (group, vectors) = &mut self.groups[which];
                let i = i % group.entries.len();
                vectors.event(i).unwrap().signal();
                let live = group.is_live(i, self.x2apic);
                let entry = &mut group.entries[i];
                entry.pending = !live;
                let sent = (entry.vcpu, entry.vector);
                self.check_taken(if live { vec![sent] } else { vec![] })?;
            }
            Op::Unplug(which) => {
                if let Some(which) = pick(which, self.groups.len()) {
                    drop(self.groups.remove(which));
                }
            }
            Op::Message(data) => {
                let vector = 0x20 + data % 200;
                let sent = self.router.signal_msi(msi(1, vector));
                let injected = self.vm.heal();
                match sent {
                    Ok(status) => {
                        prop_assert_eq!(status, MsiStatus::Delivered);
                        self.check_taken(vec![(1, vector)])?;
                    }
                    Err(RouterError::Route(RouteError::TableFull { .. })) => {
                        prop_assert_eq!(self.owned(), LIMIT - DEFAULTS);
                    }
                    Err(_) => prop_assert!(injected > 0),
                }
            }
            Op::Move => {
                let mut host = Self::host(&self.kvm, self.x2apic);
                host.config = self.host.config;
                let vm = host.faulty();
                if self.router.rebuild(vm.clone()).is_ok() {
                    (self.host, self.vm) = (host, vm);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn a_guest_receives_what_it_should_once(
        ops in ops(), x2apic in any::<bool>(), direct in any::<bool>()
    ) {
        let mode = if direct { MsiMode::Direct } else { MsiMode::DynamicRoutes };
        let mut world = World::new(x2apic, mode);
        for (op, fault) in &ops {
            let (before, routes) = (world.host.tables(), world.host.view.routes());
            if let Some(calls) = *fault {
                world.vm.fail_after(calls, 1);
            }
            world.run(op)?;
            let injected = world.vm.heal();
            if fault.is_none() && !matches!(op, Op::Move) {
                let written = world.host.tables() - before;
                prop_assert!(!direct || written <= 1, "{:?}: {} tables", op, written);
                prop_assert!(written > 0 || world.host.view.routes() == routes);
            }
            if injected > 0 {
                // What could not be let go of goes with the next commit.
                world.router.batch(|_| Ok(())).unwrap();
            }
            world.check()?;
        }
        world.groups.clear();
        world.check()?;
        prop_assert!(world.router.irqfds().is_empty());
        if direct {
            prop_assert_eq!(world.router.routes().len(), 38);
            prop_assert!(world.router.allocated().is_empty());
        }
    }
}
