#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! Sequences of batches, with failures injected, against a naive model and the KVM in memory.
//!
//! `PROPTEST_CASES=1000000 cargo test -p hv-irq --release --test model` runs a million.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use common::{FaultyVm, Machine as Host};
use hv_core::fake::FakeKvm;
use hv_core::{EventFd, Gsi, Msi, Route, RouteTarget};
use hv_irq::{GsiRoute, IrqRouter, LegacyPins, PinIrqfd, RouterError, pc_default_routes};
use proptest::prelude::*;

fn msi(data: u32) -> Msi {
    Msi { address: 0xfee0_0000, data, device: None }
}

#[derive(Debug, Clone)]
enum Step {
    /// Adds routes in the batch, some of them bound.
    Add {
        count: usize,
        bound: bool,
    },
    Retarget {
        which: usize,
        data: u32,
    },
    Bind {
        which: usize,
    },
    /// Binds the eventfd of another route, which must be refused.
    BindTaken {
        which: usize,
        event: usize,
    },
    Unbind {
        which: usize,
    },
    Remove {
        which: usize,
    },
}

#[derive(Debug, Clone)]
enum Op {
    Batch(Vec<Step>),
    Drop(usize),
    BindPin(u32),
    DropPin(usize),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..5_usize, any::<bool>()).prop_map(|(count, bound)| Step::Add { count, bound }),
        (any::<usize>(), 0..4_u32).prop_map(|(which, data)| Step::Retarget { which, data }),
        any::<usize>().prop_map(|which| Step::Bind { which }),
        (any::<usize>(), any::<usize>())
            .prop_map(|(which, event)| Step::BindTaken { which, event }),
        any::<usize>().prop_map(|which| Step::Unbind { which }),
        any::<usize>().prop_map(|which| Step::Remove { which }),
    ]
}

fn ops() -> impl Strategy<Value = Vec<(Op, Option<usize>)>> {
    let op = prop_oneof![
        6 => prop::collection::vec(steps(), 0..6).prop_map(Op::Batch),
        2 => any::<usize>().prop_map(Op::Drop),
        1 => (0..25_u32).prop_map(Op::BindPin),
        1 => any::<usize>().prop_map(Op::DropPin),
    ];
    let fault = prop_oneof![3 => Just(None), 1 => (0..6_usize).prop_map(Some)];
    prop::collection::vec((op, fault), 0..40)
}

/// A route as its owner knows it.
#[derive(Clone, Debug)]
struct Vector {
    route: Arc<GsiRoute<FaultyVm>>,
    data: u32,
    event: Option<EventFd>,
}

struct Machine {
    host: Host,
    vm: Arc<FaultyVm>,
    router: IrqRouter<FaultyVm>,
    vectors: Vec<Vector>,
    pins: Vec<(PinIrqfd<FaultyVm>, RawFd)>,
}

impl Machine {
    /// Runs a batch; the vectors are what they should be if it succeeds, and as before if not.
    fn batch(&mut self, steps: &[Step]) -> Result<(), RouterError> {
        let mut vectors = self.vectors.clone();
        let event = || self.host.event();
        let done = self.router.batch(|batch| {
            for step in steps {
                let pick = |which: &usize| (!vectors.is_empty()).then(|| which % vectors.len());
                match step {
                    Step::Add { count, bound } => {
                        for _ in 0..*count {
                            let route = Arc::new(batch.add_msi(msi(1))?);
                            let event = bound.then(event);
                            if let Some(event) = &event {
                                batch.bind(&route, event.clone())?;
                            }
                            vectors.push(Vector { route, data: 1, event });
                        }
                    }
                    Step::Retarget { which, data } => {
                        let Some(i) = pick(which) else { continue };
                        batch.set_msi(&vectors[i].route, msi(*data))?;
                        vectors[i].data = *data;
                    }
                    Step::Bind { which } => {
                        let Some(i) = pick(which) else { continue };
                        let event = event();
                        batch.bind(&vectors[i].route, event.clone())?;
                        vectors[i].event = Some(event);
                    }
                    Step::BindTaken { which, event } => {
                        let (Some(i), Some(from)) = (pick(which), pick(event)) else { continue };
                        let Some(event) = vectors[from].event.clone() else { continue };
                        batch.bind(&vectors[i].route, event)?;
                    }
                    Step::Unbind { which } => {
                        let Some(i) = pick(which) else { continue };
                        batch.unbind(&vectors[i].route)?;
                        vectors[i].event = None;
                    }
                    Step::Remove { which } => {
                        let Some(i) = pick(which) else { continue };
                        // Removed when the last clone goes, which a failed batch leaves alone.
                        let vector = vectors.remove(i);
                        batch.unbind(&vector.route)?;
                    }
                }
            }
            Ok(())
        });
        // What goes here, new routes of a failed batch or removed ones of a good one, goes now.
        if done.is_ok() {
            self.vectors = vectors;
        }
        done
    }

    /// Whether the batch breaks a rule of irqfds, whatever KVM says.
    fn breaks_a_rule(&self, steps: &[Step]) -> bool {
        let mut bound: Vec<bool> =
            self.vectors.iter().map(|vector| vector.event.is_some()).collect();
        for step in steps {
            let pick = |which: &usize| (!bound.is_empty()).then(|| which % bound.len());
            match step {
                Step::Add { count, bound: with } => bound.extend(vec![*with; *count]),
                Step::Retarget { .. } => {}
                Step::Bind { which } => {
                    let Some(i) = pick(which) else { continue };
                    if std::mem::replace(&mut bound[i], true) {
                        return true;
                    }
                }
                Step::BindTaken { which, event } => {
                    let (Some(_), Some(from)) = (pick(which), pick(event)) else { continue };
                    if bound[from] {
                        return true;
                    }
                }
                Step::Unbind { which } => {
                    let Some(i) = pick(which) else { continue };
                    bound[i] = false;
                }
                Step::Remove { which } => {
                    let Some(i) = pick(which) else { continue };
                    bound.remove(i);
                }
            }
        }
        false
    }

    fn routes(&self) -> Vec<Route> {
        let mut routes: Vec<Route> = match self.router.config().pins {
            LegacyPins::Kernel => pc_default_routes().collect(),
            LegacyPins::Userspace => Vec::new(),
        };
        routes.extend(self.vectors.iter().map(|vector| Route {
            gsi: vector.route.gsi(),
            target: RouteTarget::Msi(msi(vector.data)),
        }));
        routes.sort_unstable();
        routes
    }

    fn irqfds(&self) -> BTreeMap<RawFd, Gsi> {
        let vectors = self.vectors.iter().filter_map(|vector| {
            vector.event.as_ref().map(|event| (event.as_raw_fd(), vector.route.gsi()))
        });
        vectors.chain(self.pins.iter().map(|(pin, fd)| (*fd, pin.gsi()))).collect()
    }

    /// Router and VM agree; the VM had nothing to complain about.
    fn check_agreement(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.vm.complaints(), [""; 0]);
        prop_assert_eq!(self.host.kvm.findings(), []);
        prop_assert_eq!(self.router.routes(), self.host.view.routes());
        let by_fd = |irqfds: Vec<hv_core::Irqfd>| -> BTreeMap<RawFd, Gsi> {
            irqfds.iter().map(|irqfd| (irqfd.event.as_raw_fd(), irqfd.gsi)).collect()
        };
        prop_assert_eq!(by_fd(self.router.irqfds()), by_fd(self.host.view.irqfds()));
        Ok(())
    }

    /// The state is exactly what the owners of routes asked for.
    fn check_model(&self) -> Result<(), TestCaseError> {
        let mut routes = self.router.routes();
        routes.sort_unstable();
        prop_assert_eq!(routes, self.routes());
        let irqfds = self.host.view.irqfds();
        let irqfds: BTreeMap<_, _> = irqfds.iter().map(|i| (i.event.as_raw_fd(), i.gsi)).collect();
        prop_assert_eq!(irqfds, self.irqfds());
        let owned: BTreeSet<_> = self.vectors.iter().map(|vector| vector.route.gsi()).collect();
        prop_assert_eq!(self.router.allocated(), owned.into_iter().collect::<Vec<_>>());
        Ok(())
    }
}

fn run(
    pins: LegacyPins,
    ops: &[(Op, Option<usize>)],
    failures: usize,
) -> Result<(), TestCaseError> {
    let host = Host::new(&FakeKvm::default(), pins);
    let vm = host.faulty();
    let router = IrqRouter::new(vm.clone(), host.config).unwrap();
    let mut machine = Machine { host, vm, router, vectors: Vec::new(), pins: Vec::new() };
    // Whether KVM kept something of an owner that is gone, so that the model does not know it.
    let mut abandoned = false;
    for (op, fault) in ops {
        let before = (machine.host.tables(), machine.host.view.routes());
        if let Some(calls) = *fault {
            machine.vm.fail_after(calls, failures);
        }
        let mut failed = false;
        let mut injected = |machine: &Machine| {
            failed |= machine.vm.heal() > 0;
            failed
        };
        match op {
            Op::Batch(steps) => {
                let broken = machine.breaks_a_rule(steps);
                let done = machine.batch(steps);
                let failed = injected(&machine);
                prop_assert!(done.is_err() || !broken, "a broken rule was accepted");
                match done {
                    Ok(()) => {}
                    Err(RouterError::EventInUse { .. } | RouterError::RouteBound { .. }) => {
                        prop_assert!(broken);
                    }
                    Err(RouterError::Kvm(_)) => prop_assert!(failed),
                    Err(RouterError::RollbackFailed { .. }) => {
                        prop_assert!(failed && failures > 1, "one failure can be undone");
                        // The owners can't know what is left: this is the end of the model.
                        machine.vm.forgive();
                        let _ = machine.host.kvm.take_findings();
                        machine.vectors.clear();
                        abandoned = true;
                    }
                    Err(error) => prop_assert!(false, "{}", error),
                }
                abandoned |= failed;
            }
            Op::Drop(which) if !machine.vectors.is_empty() => {
                let which = which % machine.vectors.len();
                drop(machine.vectors.remove(which));
                abandoned |= injected(&machine);
            }
            Op::BindPin(gsi) => {
                let event = machine.host.event();
                let fd = event.as_raw_fd();
                match machine.router.bind_pin(Gsi(*gsi), event) {
                    Ok(pin) => machine.pins.push((pin, fd)),
                    Err(RouterError::NoKernelLine(_)) => {
                        let kernel = pins == LegacyPins::Kernel;
                        prop_assert!(!kernel || *gsi == 2 || *gsi == 24);
                    }
                    Err(error) => prop_assert!(injected(&machine), "{}", error),
                }
                abandoned |= injected(&machine);
            }
            Op::DropPin(which) if !machine.pins.is_empty() => {
                let which = which % machine.pins.len();
                drop(machine.pins.remove(which));
                abandoned |= injected(&machine);
            }
            Op::Drop(_) | Op::DropPin(_) => {}
        }
        machine.check_agreement()?;
        if !abandoned && !injected(&machine) {
            let written = machine.host.tables() - before.0;
            let differs = machine.host.view.routes() != before.1;
            // Owners that go after a batch write a table each; see `Step::Remove`.
            let single = match op {
                Op::Batch(steps) => {
                    !steps.iter().any(|s| matches!(s, Step::Remove { .. } | Step::Add { .. }))
                }
                _ => true,
            };
            prop_assert!(!single || written == u64::from(differs));
        }
        if abandoned {
            drop(machine.router.batch(|batch| batch.add_msi(msi(0))));
            abandoned = false;
            machine.check_agreement()?;
        }
        machine.check_model()?;
    }
    machine.vectors.clear();
    machine.pins.clear();
    machine.check_agreement()?;
    machine.check_model()?;
    let left = machine.router.routes().len();
    prop_assert_eq!(left, if pins == LegacyPins::Kernel { 38 } else { 0 });
    prop_assert!(machine.router.allocated().is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn router_kvm_and_owners_agree_and_one_failure_is_undone(ops in ops(), split in any::<bool>()) {
        run(if split { LegacyPins::Userspace } else { LegacyPins::Kernel }, &ops, 1)?;
    }

    #[test]
    fn router_and_kvm_agree_even_if_undoing_fails(ops in ops(), failures in 2..5_usize) {
        run(LegacyPins::Kernel, &ops, failures)?;
    }
}
