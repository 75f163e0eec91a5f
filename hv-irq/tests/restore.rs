#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! Routers saved, restored on another VM, and moved to one, on the KVM in memory.

mod common;

use std::sync::Arc;

use common::{Machine, msi};
use hv_core::fake::{FakeHost, FakeKvm, FakeVm};
use hv_core::{Capability, EventFd, Gsi, Hypervisor, IrqchipId, Msi, Route, RouteTarget};
use hv_irq::{
    GsiError, GsiRoute, Ioapic, IoapicState, IrqRouter, LegacyPins, LevelPin, MsiVectors,
    MsiVectorsState, RestoreError, RouteError, RouterError, RouterState,
};

/// A device with one vector that is live, one that is masked and one that never was unmasked; a
/// single route, and a line.
struct Device {
    vectors: MsiVectors<FakeVm>,
    route: GsiRoute<FakeVm>,
    event: EventFd,
    line: LevelPin<FakeVm>,
}

fn plug(machine: &Machine, router: &IrqRouter<FakeVm>) -> Device {
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
    let route = router
        .batch(|batch| {
            let route = batch.add_msi(msi(1, 0x62))?;
            batch.bind(&route, event.clone())?;
            Ok(route)
        })
        .unwrap();
    let line = router.bind_level(Gsi(20), machine.event(), machine.event()).unwrap();
    Device { vectors, route, event, line }
}

fn saved() -> (RouterState, MsiVectorsState) {
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let device = plug(&machine, &router);
    device.vectors.event(1).unwrap().signal();
    (router.save(), device.vectors.save().unwrap())
}

#[test]
fn a_device_goes_on_elsewhere() {
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let device = plug(&machine, &router);
    device.vectors.event(1).unwrap().signal();
    let states = (router.save(), device.vectors.save().unwrap());
    let text = serde_json::to_string(&states).unwrap();
    let (router_state, device_state): (RouterState, MsiVectorsState) =
        serde_json::from_str(&text).unwrap();
    assert_eq!((&router_state, &device_state), (&states.0, &states.1));
    let single = device.route.gsi();
    let table = machine.view.routes();
    drop((device, router));

    let other = Machine::new(&kvm, LegacyPins::Kernel);
    let before = other.tables();
    let mut restored = IrqRouter::restore(other.vm.clone(), other.config, &router_state).unwrap();
    let mut vectors = restored.vectors(&device_state, other.events(3)).unwrap();
    let route = restored.route(single).unwrap();
    let event = other.event();
    restored.router().batch(|batch| batch.bind(&route, event.clone())).unwrap();
    let line = restored.router().bind_level(Gsi(20), other.event(), other.event()).unwrap();
    let router = restored.finish().unwrap();
    assert_eq!(other.tables() - before, 1);
    assert_eq!(other.view.routes(), table);
    assert_eq!(router.save(), router_state);
    assert_eq!(vectors.save().unwrap(), device_state);

    vectors.event(0).unwrap().signal();
    event.signal();
    assert_eq!((other.taken(0), other.taken(1)), (vec![0x40], vec![0x62]));
    vectors.unmask(1).unwrap();
    assert_eq!(other.taken(1), [0x51], "the event that waited, once");
    assert_eq!(vectors.gsi(2), Ok(None));
    drop((vectors, route, line));
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    assert_eq!(router.routes().len(), 38);
    assert_eq!(kvm.findings(), []);
}

#[test]
fn a_router_state_that_contradicts_itself_is_refused_by_name() {
    type Spoil = fn(&mut RouterState);
    let gsi = |error| RestoreError::Router(RouterError::Gsi(error));
    let route = |error| RestoreError::Router(RouterError::Route(error));
    let out = GsiError::OutOfRange { gsi: Gsi(4096), count: 4096 };
    let other_pins =
        RestoreError::OtherPins { saved: LegacyPins::Userspace, here: LegacyPins::Kernel };
    let cases: &[(Spoil, RestoreError)] = &[
        (|s| s.pins = LegacyPins::Userspace, other_pins),
        (|s| s.allocated.push(Gsi(4096)), gsi(out)),
        (|s| s.allocated.push(Gsi(23)), gsi(GsiError::Reserved(Gsi(23)))),
        (|s| s.allocated.push(Gsi(24)), gsi(GsiError::AlreadyAllocated(Gsi(24)))),
        (|s| s.allocated.retain(|&gsi| gsi != Gsi(25)), RestoreError::RouteWithoutOwner(Gsi(25))),
        (
            |s| s.allocated = (24..4090).map(Gsi).collect(),
            route(RouteError::TableFull { limit: 4096 }),
        ),
        (|s| s.routes.push(s.routes[38]), route(RouteError::Conflict { gsi: Gsi(24) })),
        (
            |s| {
                let target = RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin: 24 };
                s.routes[38] = Route { gsi: Gsi(24), target };
            },
            route(RouteError::NoSuchPin { chip: IrqchipId::IOAPIC, pin: 24 }),
        ),
        (|s| s.routes.truncate(37), RestoreError::LegacyRoutes),
        (|s| s.bound.push(Gsi(30)), RestoreError::BoundWithoutRoute(Gsi(30))),
        (|s| s.bound.push(Gsi(24)), RestoreError::BoundTwice(Gsi(24))),
    ];
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let untouched = machine.view.routes();
    let (good, _) = saved();
    for (i, (spoil, error)) in cases.iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let refused = IrqRouter::restore(machine.vm.clone(), machine.config, &state);
        assert_eq!(refused.unwrap_err(), *error, "case {i}");
        assert!(!error.to_string().is_empty());
    }
    assert_eq!((machine.tables(), machine.view.routes()), (0, untouched), "KVM was not asked");
    let mut small = machine.config;
    small.gsi_count = 30;
    let refused = IrqRouter::restore(machine.vm.clone(), small, &good).unwrap_err();
    let too_few = RouterError::TooFewGsis { count: 30, needed: 38 };
    assert_eq!(refused, RestoreError::Router(too_few));
}

#[test]
fn a_group_that_contradicts_its_router_is_refused_by_name() {
    type Spoil = fn(&mut MsiVectorsState);
    let cases: &[(Spoil, RestoreError)] = &[
        (|s| s.vectors.truncate(2), RestoreError::OtherVectors { saved: 2, events: 3 }),
        (|s| s.vectors[0].gsi = None, RestoreError::VectorGsi(0)),
        (|s| s.vectors[2].masked = false, RestoreError::VectorGsi(2)),
        (|s| s.enabled = false, RestoreError::VectorGsi(0)),
        (|s| s.vectors[1].gsi = Some(Gsi(24)), RestoreError::NotToClaim(Gsi(24))),
        (|s| s.vectors[1].gsi = Some(Gsi(10)), RestoreError::NotToClaim(Gsi(10))),
        (|s| s.vectors[1].gsi = Some(Gsi(99)), RestoreError::NotToClaim(Gsi(99))),
        (|s| s.vectors[0].message = msi(1, 0x40), RestoreError::OtherRoute(Gsi(24))),
    ];
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let (state, good) = saved();
    let mut restored = IrqRouter::restore(machine.vm.clone(), machine.config, &state).unwrap();
    for (i, (spoil, error)) in cases.iter().enumerate() {
        let mut group = good.clone();
        spoil(&mut group);
        let refused = restored.vectors(&group, machine.events(3)).unwrap_err();
        assert_eq!(refused, *error, "case {i}");
        assert!(machine.view.irqfds().is_empty());
    }
    let group = restored.vectors(&good, machine.events(3)).unwrap();
    let again = restored.vectors(&good, machine.events(3)).unwrap_err();
    assert_eq!(again, RestoreError::NotToClaim(Gsi(24)), "it has an owner");
    assert_eq!(restored.route(Gsi(24)).unwrap_err(), RestoreError::NotToClaim(Gsi(24)));
    drop(group);
}

#[test]
fn a_restore_is_not_finished_without_every_owner_and_eventfd() {
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let (state, group) = saved();
    let restore = || IrqRouter::restore(machine.vm.clone(), machine.config, &state).unwrap();

    let mut restored = restore();
    let router = restored.router().clone();
    let vectors = restored.vectors(&group, machine.events(3)).unwrap();
    assert_eq!(restored.finish().unwrap_err(), RestoreError::Unclaimed(Gsi(26)));
    assert_eq!(machine.view.routes().len(), 40, "what nobody claimed is gone");
    drop((vectors, router));

    let mut restored = restore();
    let router = restored.router().clone();
    let vectors = restored.vectors(&group, machine.events(3)).unwrap();
    let route = restored.route(Gsi(26)).unwrap();
    let missing = restored.finish().unwrap_err();
    assert_eq!(missing, RestoreError::OtherBinding(Gsi(20)), "its line is not bound");
    drop((vectors, route, router));

    drop(restore());
    assert_eq!(machine.view.routes().len(), 38);
    assert!(machine.view.irqfds().is_empty());
    assert_eq!(kvm.findings(), []);
}

#[test]
fn a_state_with_a_field_too_many_is_refused() {
    let (state, _) = saved();
    let mut value = serde_json::to_value(&state).unwrap();
    value["later"] = 1.into();
    assert!(serde_json::from_value::<RouterState>(value).is_err());
}

#[test]
fn what_has_no_owner_is_not_saved() {
    let kvm = FakeKvm::default();
    let mut machine = Machine::new(&kvm, LegacyPins::Kernel);
    machine.config.msi = hv_core::init::MsiMode::DynamicRoutes;
    let router = machine.router();
    let empty = router.save();
    router.signal_msi(msi(0, 0x41)).unwrap();
    assert_eq!(machine.taken(0), [0x41]);
    assert_eq!(router.allocated(), [Gsi(24)]);
    assert_eq!(router.save(), empty, "a cache is not state");
}

#[test]
fn a_rebuilt_router_drives_its_new_vm() {
    let kvm = FakeKvm::default();
    let old = Machine::new(&kvm, LegacyPins::Kernel);
    let router = old.router();
    let mut device = plug(&old, &router);
    let new = Machine::new(&kvm, LegacyPins::Kernel);
    let (state, table) = (router.save(), old.view.routes());
    device.vectors.event(1).unwrap().signal();
    let before = new.tables();
    router.rebuild(new.vm.clone()).unwrap();
    assert_eq!(new.tables() - before, 1);
    assert_eq!((new.view.routes(), router.save()), (table, state));
    assert!(old.view.irqfds().is_empty());
    drop(old);

    new.program_pin(20, 0x8033);
    for event in [device.vectors.event(0).unwrap(), &device.event] {
        event.signal();
    }
    device.line.raise();
    assert_eq!((new.taken(0), new.taken(1)), (vec![0x40, 0x33], vec![0x62]));
    new.view.end_of_interrupt(0, 0x33);
    assert!(device.line.take_end());
    device.vectors.unmask(1).unwrap();
    assert_eq!(new.taken(1), [0x51], "handles act on the new VM");
    drop(device);
    assert!(new.view.irqfds().is_empty() && router.allocated().is_empty());
    assert_eq!(kvm.findings(), []);
}

#[test]
fn a_router_that_can_not_be_moved_stays() {
    let kvm = FakeKvm::default();
    let old = Machine::new(&kvm, LegacyPins::Kernel);
    let router = old.router();
    let device = plug(&old, &router);
    let irqfds = old.view.irqfds();
    let without_irqchip = Arc::new(kvm.create_vm(0).unwrap());
    assert!(matches!(router.rebuild(without_irqchip), Err(RouterError::Kvm(_))));
    // KVM takes the table and refuses the resample irqfd, after it took others.
    let host = FakeHost::default().with(Capability::IrqfdResample, 0);
    let without_resample = Machine::new(&FakeKvm::new(host), LegacyPins::Kernel);
    assert!(matches!(router.rebuild(without_resample.vm.clone()), Err(RouterError::Kvm(_))));
    assert_eq!(without_resample.view.irqfds(), [], "the others were taken back");
    assert_eq!(old.view.irqfds(), irqfds);
    device.vectors.event(0).unwrap().signal();
    assert_eq!(old.taken(0), [0x40]);
}

/// The guest programs a pin of the I/O APIC in user space.
fn set(ioapic: &Ioapic<FakeVm>, pin: u8, entry: u64) {
    for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry)] {
        ioapic.write(0, &[register]).unwrap();
        ioapic.write(0x10, &(value as u32).to_le_bytes()).unwrap();
    }
}

#[test]
fn a_split_irqchip_goes_on_elsewhere() {
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Userspace);
    let router = machine.router();
    let ioapic = Ioapic::new(router.clone()).unwrap();
    set(&ioapic, 9, 0x8041);
    set(&ioapic, 10, 0x0100_0000_0000_8052);
    set(&ioapic, 4, 0x1_0034);
    ioapic.set_line(9, true).unwrap();
    assert_eq!(machine.taken(0), [0x41]);
    let pin = ioapic.bind_level(10, machine.event(), machine.event()).unwrap();
    let states = (router.save(), ioapic.save());
    let text = serde_json::to_string(&states).unwrap();
    let states: (RouterState, IoapicState) = serde_json::from_str(&text).unwrap();
    assert_eq!(states, (router.save(), ioapic.save()));
    drop((pin, ioapic, router));

    let other = Machine::new(&kvm, LegacyPins::Userspace);
    let before = other.tables();
    let restored = IrqRouter::restore(other.vm.clone(), other.config, &states.0).unwrap();
    let ioapic = Ioapic::restore(restored.router().clone(), &states.1).unwrap();
    let pin = ioapic.bind_level(10, other.event(), other.event()).unwrap();
    let router = restored.finish().unwrap();
    assert_eq!(other.tables() - before, 1);
    assert_eq!((router.save(), ioapic.save()), states);
    pin.raise();
    assert_eq!(other.taken(1), [0x52]);
    ioapic.eoi(0x52).unwrap();
    assert!(pin.take_end());
    ioapic.eoi(0x41).unwrap();
    assert_eq!(other.taken(0), [0x41], "the line is still asserted");
}

#[test]
fn an_i_o_apic_that_is_none_is_refused_by_name() {
    type Spoil = fn(&mut IoapicState);
    let cases: &[(Spoil, &str)] = &[
        (|s| s.id = 1, "the identification register can't be 0x1"),
        (|s| s.lines = 1 << 24, "the set of asserted lines can't be 0x1000000"),
        (|s| s.entries.truncate(23), "the number of redirection entries can't be 0x17"),
        (|s| s.entries[3] = 1 << 12, "a redirection entry can't be 0x1000"),
        (|s| s.entries[3] = 0x4041, "a redirection entry can't be 0x4041"),
        (|s| s.entries[9] = 0x8042, "GSI 9 leads elsewhere"),
    ];
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Userspace);
    let router = machine.router();
    let ioapic = Ioapic::new(router.clone()).unwrap();
    set(&ioapic, 9, 0x8041);
    let before = machine.tables();
    for (spoil, text) in cases {
        let mut state = ioapic.save();
        spoil(&mut state);
        let error = Ioapic::restore(router.clone(), &state).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(machine.tables(), before);
    // A router that was not restored gets the routes.
    let fresh = Machine::new(&kvm, LegacyPins::Userspace);
    let restored = Ioapic::restore(fresh.router(), &ioapic.save()).unwrap();
    assert_eq!(fresh.view.routes(), machine.view.routes());
    assert_eq!(restored.save(), ioapic.save());
}

#[test]
fn a_message_with_a_long_address_is_no_route_where_apic_ids_have_32_bits() {
    let kvm = FakeKvm::new(FakeHost::default());
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let far = Msi { address: 0x12_fee0_0000, data: 0x41, device: None };
    let _route = router.batch(|batch| batch.add_msi(far)).unwrap();
    let mut config = machine.config;
    config.x2apic_format = true;
    let error = IrqRouter::restore(machine.vm.clone(), config, &router.save()).unwrap_err();
    let illegal = RouteError::IllegalMessage { address: far.address };
    assert_eq!(error, RestoreError::Router(RouterError::Route(illegal)));
}
