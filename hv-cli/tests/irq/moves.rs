//! Routers that go from one VM to another with all they have.

use hv_core::{EventFd, Gsi};
use hv_irq::{GsiRoute, Ioapic, IrqRouter, LegacyPins, LevelPin, MsiVectors};

use super::{Counted, Host, LEVEL, Machine, Router, Taken, msi};

/// The interrupts of [`Devices`], in the order they are signalled.
const LIVE: [Taken; 3] = [(0, 0x40), (1, 0x62), (0, 0x73)];

/// That of the vector that is masked.
const WAITING: Taken = (1, 0x51);

/// A device with a live vector, a masked one and one that was never used; a single route; a line.
struct Devices<H: Host> {
    vectors: MsiVectors<Counted<H>>,
    route: GsiRoute<Counted<H>>,
    event: EventFd,
    line: LevelPin<Counted<H>>,
}

impl<H: Host> Devices<H> {
    fn plug(machine: &mut Machine<H>, router: &Router<H>) -> Self {
        let mut vectors = MsiVectors::new(router, machine.events(3));
        vectors
            .change(|change| {
                change.enable();
                change.retarget(0, msi(0, 0x40))?;
                change.retarget(1, msi(1, 0x51))?;
                change.unmask(0)?;
                change.unmask(1)
            })
            .unwrap();
        vectors.mask(1).unwrap();
        let event = machine.event();
        let bind = |batch: &mut hv_irq::Batch<'_, _>| {
            let route = batch.add_msi(msi(1, 0x62))?;
            batch.bind(&route, event.clone())?;
            Ok(route)
        };
        let route = router.batch(bind).unwrap();
        let line = router.bind_level(Gsi(20), machine.event(), machine.event()).unwrap();
        machine.program_pin(20, 0, LEVEL | 0x73);
        Self { vectors, route, event, line }
    }

    /// Each interrupts, and what waits waits.
    fn are_live(&self, machine: &mut Machine<H>, when: &str) {
        self.vectors.event(0).unwrap().signal();
        self.event.signal();
        self.line.raise();
        machine.expect(LIVE, when);
        super::wait_for("the end of the level", || self.line.take_end());
        machine.expect([], when);
    }

    fn all_events(&self) -> Vec<EventFd> {
        let vectors = (0..3).map(|i| self.vectors.event(i).unwrap().clone());
        vectors.chain([self.event.clone(), self.line.trigger().clone()]).collect()
    }
}

pub(crate) fn a_saved_router_goes_on_in_another_vm<H: Host>(host: &H) {
    let mut old = Machine::new(host, LegacyPins::Kernel);
    let router = old.router();
    let devices = Devices::plug(&mut old, &router);
    devices.are_live(&mut old, "before");
    devices.vectors.event(1).unwrap().signal();
    let saved = (router.save(), devices.vectors.save().unwrap());
    assert!(saved.1.vectors[1].pending);
    let single = devices.route.gsi();
    drop((devices, router, old));

    let mut new = Machine::new(host, LegacyPins::Kernel);
    let mut restored = IrqRouter::restore(new.vm.clone(), new.config, &saved.0).unwrap();
    let vectors = restored.vectors(&saved.1, new.events(3)).unwrap();
    let (route, event) = (restored.route(single).unwrap(), new.event());
    restored.router().batch(|batch| batch.bind(&route, event.clone())).unwrap();
    let line = restored.router().bind_level(Gsi(20), new.event(), new.event()).unwrap();
    let router = restored.finish().unwrap();
    assert_eq!(new.tables(), 1);
    assert_eq!((router.save(), vectors.save().unwrap()), saved);
    new.program_pin(20, 0, LEVEL | 0x73);
    let mut devices = Devices::<H> { vectors, route, event, line };
    new.expect([], "restored");
    devices.are_live(&mut new, "after");
    devices.vectors.unmask(1).unwrap();
    new.expect([WAITING], "what waited goes with it, once");
    let events = devices.all_events();
    drop(devices);
    new.expect([], "without devices");
    assert_eq!(router.routes().len(), 38);
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    host.assert_unbound(new.vm.inner(), &events);
}

pub(crate) fn a_saved_ioapic_goes_on_in_another_vm<H: Host>(host: &H) {
    let mut old = Machine::new(host, LegacyPins::Userspace);
    let router = old.router();
    old.program_pin(4, 1, 0x41);
    old.program_pin(10, 0, LEVEL | 0x52);
    let ioapic = old.ioapic.clone().unwrap();
    let level = ioapic.bind_level(10, old.event(), old.event()).unwrap();
    let saved = (router.save(), ioapic.save());
    assert_eq!(saved.0.bound, [Gsi(10)]);
    drop((level, ioapic, router, old));

    let mut new = Machine::new(host, LegacyPins::Userspace);
    let restored = IrqRouter::restore(new.vm.clone(), new.config, &saved.0).unwrap();
    let ioapic = Ioapic::restore(restored.router().clone(), &saved.1).unwrap();
    let level = ioapic.bind_level(10, new.event(), new.event()).unwrap();
    let router = restored.finish().unwrap();
    assert_eq!(new.tables(), 1);
    assert_eq!((router.save(), ioapic.save()), saved);
    new.ioapic = Some(ioapic.clone());
    ioapic.pulse(4).unwrap();
    new.expect([(1, 0x41)], "an edge");
    for _ in 0..2 {
        level.raise();
        new.expect([(0, 0x52)], "a level");
        assert!(level.take_end(), "KVM says when it ends");
    }
    drop(level);
    new.expect([], "without the device");
}

/// The VM is new; handles and eventfds stay what they are.
pub(crate) fn a_rebuilt_router_drives_its_new_vm<H: Host>(host: &H) {
    let mut old = Machine::new(host, LegacyPins::Kernel);
    let router = old.router();
    let mut devices = Devices::plug(&mut old, &router);
    devices.are_live(&mut old, "before");
    devices.vectors.event(1).unwrap().signal();
    let state = router.save();
    let mut new = Machine::new(host, LegacyPins::Kernel);
    router.rebuild(new.vm.clone()).unwrap();
    assert_eq!(new.tables(), 1);
    assert_eq!(router.save(), state);
    new.program_pin(20, 0, LEVEL | 0x73);
    devices.are_live(&mut new, "after");
    old.expect([], "the old VM");
    devices.vectors.unmask(1).unwrap();
    new.expect([WAITING], "what waited goes with it, once");
    let events = devices.all_events();
    drop(devices);
    new.expect([], "without devices");
    host.assert_unbound(new.vm.inner(), &events);
}
