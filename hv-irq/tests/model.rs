#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! Sequences of operations on a router, with failures injected, against a naive model and a VM that
//! keeps KVM's rules for routes and irqfds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use hv_core::{
    Errno, Error, EventFd, Gsi, Ioctl, IrqBackend, Irqfd, LineStatus, Msi, MsiStatus, Route,
    RouteTarget,
};
use hv_irq::{
    GsiRoute, IrqRouter, LegacyPins, PinIrqfd, RouterConfig, RouterError, pc_default_routes,
};
use proptest::prelude::*;

/// A VM as KVM is: it checks tables and eventfds, but not GSIs of irqfds. Whatever KVM would refuse
/// or silently lose is a complaint.
#[derive(Debug, Default)]
struct RuleVm {
    state: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    split: bool,
    routes: Vec<Route>,
    irqfds: BTreeMap<RawFd, Gsi>,
    tables: usize,
    /// Calls from now on that succeed, then how many fail.
    faults: Option<(usize, usize)>,
    complaints: Vec<String>,
}

impl Rules {
    fn injected(&mut self, ioctl: Ioctl) -> Result<(), Error> {
        match &mut self.faults {
            Some((0, failures)) if *failures > 0 => {
                *failures -= 1;
                Err(Error::new(ioctl, Errno::ENOMEM))
            }
            Some((calls, _)) => {
                *calls = calls.saturating_sub(1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn refuse(&mut self, ioctl: Ioctl, errno: Errno, why: String) -> Result<(), Error> {
        self.complaints.push(why);
        Err(Error::new(ioctl, errno))
    }

    fn is_legal(&self, routes: &[Route]) -> bool {
        routes.len() <= 4096
            && routes.iter().enumerate().all(|(i, route)| {
                let others = routes.iter().take(i).filter(|other| other.gsi == route.gsi);
                let mut others = others.map(|other| other.target);
                route.gsi.0 < 4096 && match route.target {
                    RouteTarget::Pin { chip, pin } => !self.split
                        && pin < [8, 8, 24].get(chip.0 as usize).copied().unwrap_or(0)
                        && others.all(
                            |other| matches!(other, RouteTarget::Pin { chip: c, .. } if c != chip),
                        ),
                    _ => others.next().is_none(),
                }
            })
    }

    fn is_routed(&self, gsi: Gsi) -> bool {
        self.routes.iter().any(|route| route.gsi == gsi)
    }
}

impl IrqBackend for RuleVm {
    fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error> {
        let mut rules = self.state.lock().unwrap();
        rules.tables += 1;
        rules.injected(Ioctl::SetGsiRouting)?;
        if !rules.is_legal(routes) {
            return rules.refuse(Ioctl::SetGsiRouting, Errno::EINVAL, format!("{routes:?}"));
        }
        rules.routes = routes.to_vec();
        let lost: Vec<_> =
            rules.irqfds.values().copied().filter(|&gsi| !rules.is_routed(gsi)).collect();
        rules.complaints.extend(lost.iter().map(|gsi| format!("GSI {gsi} unrouted while bound")));
        Ok(())
    }

    fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error> {
        let (fd, gsi) = (irqfd.event.as_raw_fd(), irqfd.gsi);
        let mut rules = self.state.lock().unwrap();
        rules.injected(Ioctl::Irqfd)?;
        if rules.irqfds.contains_key(&fd) {
            return rules.refuse(Ioctl::Irqfd, Errno::EBUSY, format!("{fd} bound twice"));
        }
        if !rules.is_routed(gsi) {
            rules.complaints.push(format!("{fd} bound to unrouted GSI {gsi}"));
        }
        rules.irqfds.insert(fd, gsi);
        Ok(())
    }

    fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error> {
        let fd = event.as_raw_fd();
        let mut rules = self.state.lock().unwrap();
        rules.injected(Ioctl::Irqfd)?;
        if rules.irqfds.get(&fd) != Some(&gsi) {
            rules.complaints.push(format!("{fd} unbound from GSI {gsi} without being bound"));
            return Ok(());
        }
        rules.irqfds.remove(&fd);
        Ok(())
    }

    fn irq_line(&self, _: Gsi, _: bool) -> Result<(), Error> {
        Ok(())
    }

    fn irq_line_status(&self, _: Gsi, _: bool) -> Result<LineStatus, Error> {
        Ok(LineStatus::Ignored)
    }

    fn signal_msi(&self, _: Msi) -> Result<MsiStatus, Error> {
        Ok(MsiStatus::NoTarget)
    }
}

fn router(pins: LegacyPins) -> (Arc<RuleVm>, IrqRouter<RuleVm>) {
    let vm = Arc::new(RuleVm::default());
    vm.state.lock().unwrap().split = pins == LegacyPins::Userspace;
    let config = RouterConfig::new(4096, pins);
    let router = IrqRouter::new(vm.clone(), config).unwrap();
    (vm, router)
}

fn msi(data: u32) -> Msi {
    Msi { address: 0xfee0_0000, data, device: None }
}

fn event() -> EventFd {
    OwnedFd::from(File::open("/dev/null").unwrap()).into()
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
    route: Arc<GsiRoute<RuleVm>>,
    data: u32,
    event: Option<EventFd>,
}

struct Machine {
    vm: Arc<RuleVm>,
    router: IrqRouter<RuleVm>,
    vectors: Vec<Vector>,
    pins: Vec<(PinIrqfd<RuleVm>, RawFd)>,
}

impl Machine {
    /// Runs a batch; the vectors are what they should be if it succeeds, and as before if not.
    fn batch(&mut self, steps: &[Step]) -> Result<(), RouterError> {
        let mut vectors = self.vectors.clone();
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
        let rules = self.vm.state.lock().unwrap();
        prop_assert_eq!(&rules.complaints, &Vec::<String>::new());
        let mut routes = rules.routes.clone();
        routes.sort_unstable();
        let mut ours = self.router.routes();
        ours.sort_unstable();
        prop_assert_eq!(&ours, &routes, "router and KVM have the same table");
        let ours: BTreeMap<_, _> =
            self.router.irqfds().iter().map(|i| (i.event.as_raw_fd(), i.gsi)).collect();
        prop_assert_eq!(&ours, &rules.irqfds, "router and KVM have the same irqfds");
        Ok(())
    }

    /// The state is exactly what the owners of routes asked for.
    fn check_model(&self) -> Result<(), TestCaseError> {
        let mut routes = self.router.routes();
        routes.sort_unstable();
        prop_assert_eq!(routes, self.routes());
        let rules = self.vm.state.lock().unwrap();
        prop_assert_eq!(&rules.irqfds, &self.irqfds());
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
    let (vm, router) = router(pins);
    let mut machine = Machine { vm, router, vectors: Vec::new(), pins: Vec::new() };
    // Whether KVM kept something of an owner that is gone, so that the model does not know it.
    let mut abandoned = false;
    for (op, fault) in ops {
        let before = {
            let mut rules = machine.vm.state.lock().unwrap();
            rules.faults = fault.map(|calls| (calls, failures));
            (rules.tables, rules.routes.clone())
        };
        let injected = |machine: &Machine| {
            let rules = machine.vm.state.lock().unwrap();
            rules.faults.is_some_and(|(calls, left)| calls == 0 && left < failures)
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
                        machine.vm.state.lock().unwrap().complaints.clear();
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
                let event = event();
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
        {
            // A failure: the model is exact again once the next commit has removed what was left.
            let mut rules = machine.vm.state.lock().unwrap();
            let faulted = rules.faults.take().is_some();
            if !abandoned && !faulted {
                let written = rules.tables - before.0;
                let differs = rules.routes != before.1;
                // Owners that go after a batch write a table each; see `Step::Remove`.
                let single = match op {
                    Op::Batch(steps) => {
                        !steps.iter().any(|s| matches!(s, Step::Remove { .. } | Step::Add { .. }))
                    }
                    _ => true,
                };
                prop_assert!(!single || written == usize::from(differs));
            }
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
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn router_kvm_and_owners_agree_and_one_failure_is_undone(ops in ops(), split in any::<bool>()) {
        run(if split { LegacyPins::Userspace } else { LegacyPins::Kernel }, &ops, 1)?;
    }

    #[test]
    fn router_and_kvm_agree_even_if_undoing_fails(ops in ops(), failures in 2..5_usize) {
        run(LegacyPins::Kernel, &ops, failures)?;
    }
}

#[test]
fn plugging_and_unplugging_leaves_nothing() {
    let (vm, router) = router(LegacyPins::Kernel);
    for _ in 0..200 {
        let (watch, event) = UnixStream::pair().unwrap();
        let event = OwnedFd::from(event).into();
        let device = router
            .batch(|batch| {
                let vectors: Vec<_> =
                    (0..257).map(|i| batch.add_msi(msi(i))).collect::<Result<_, _>>()?;
                batch.bind(&vectors[0], event)?;
                Ok(vectors)
            })
            .unwrap();
        assert_eq!(device[256].gsi(), Gsi(24 + 256));
        router.batch(|batch| device.into_iter().try_for_each(|v| batch.remove(v))).unwrap();
        let read = (&watch).read(&mut [0]);
        assert_eq!(read.unwrap(), 0, "the ledger has let go of the eventfd");
    }
    let rules = vm.state.lock().unwrap();
    assert_eq!((rules.tables, rules.routes.len(), rules.irqfds.len()), (401, 38, 0));
    assert_eq!(rules.complaints, [""; 0]);
    assert!(router.allocated().is_empty());
}

#[test]
fn devices_on_several_threads_do_not_disturb_each_other() {
    let (vm, router) = router(LegacyPins::Kernel);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let router = router.clone();
            scope.spawn(move || {
                for round in 0..100 {
                    let (a, b) = router
                        .batch(|batch| {
                            let a = batch.add_msi(msi(thread))?;
                            batch.bind(&a, event())?;
                            Ok((a, batch.add_msi(msi(round))?))
                        })
                        .unwrap();
                    assert_ne!(a.gsi(), b.gsi());
                    drop(b);
                    router.batch(|batch| batch.unbind(&a)).unwrap();
                }
            });
        }
    });
    let rules = vm.state.lock().unwrap();
    assert_eq!(rules.complaints, [""; 0]);
    assert_eq!((rules.routes.len(), rules.irqfds.len()), (38, 0));
    assert!(router.allocated().is_empty());
}
