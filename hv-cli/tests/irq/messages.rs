//! Message-signalled interrupts.

use hv_core::MsiStatus;
use hv_core::init::MsiMode;
use hv_irq::{IrqRouter, LegacyPins, MsiVectors};

use super::{Counted, Host, Machine, NOBODY, Router, Taken, VCPUS, msi};

const BOTH: [LegacyPins; 2] = [LegacyPins::Kernel, LegacyPins::Userspace];

/// A device whose vectors are enabled and unmasked.
fn device<H: Host>(
    machine: &Machine<H>,
    router: &Router<H>,
    targets: &[Taken],
) -> MsiVectors<Counted<H>> {
    let mut device = MsiVectors::new(router, machine.events(targets.len()));
    device
        .change(|change| {
            change.enable();
            for (i, &(vcpu, vector)) in targets.iter().enumerate() {
                change.retarget(i, msi(vcpu, vector))?;
                change.unmask(i)?;
            }
            Ok(())
        })
        .unwrap();
    device
}

pub(crate) fn an_edge_is_one_interrupt<H: Host>(host: &H) {
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        let targets = [(0, 0x41), (1, 0x52)];
        let device = device(&machine, &router, &targets);
        machine.expect([], "nothing was signalled");
        for _ in 0..3 {
            for (i, target) in targets.into_iter().enumerate() {
                device.event(i).unwrap().signal();
                machine.expect([target], "one event, one interrupt");
            }
        }
        (0..2).for_each(|i| device.event(i).unwrap().signal());
        machine.expect(targets, "both at once");
        drop(device);
        machine.expect([], "without the device");
    }
}

pub(crate) fn a_live_vector_is_retargeted<H: Host>(host: &H) {
    let mut machine = Machine::new(host, LegacyPins::Kernel);
    let router = machine.router();
    let mut device = device(&machine, &router, &[(0, 0x41)]);
    for round in 0..10 {
        let target = (round % VCPUS, 0x41 + round as u8);
        let tables = machine.tables();
        device.retarget(0, msi(target.0, target.1)).unwrap();
        device.retarget(0, msi(target.0, target.1)).unwrap();
        let changed = u64::from(round > 0);
        assert_eq!(machine.tables() - tables, changed, "one table, and none for what is there");
        device.event(0).unwrap().signal();
        machine.expect([target], "to the vCPU of now");
    }
    device.retarget(0, msi(NOBODY, 0x41)).unwrap();
    device.event(0).unwrap().signal();
    drop(device);
    machine.expect([], "a message to nobody");
}

/// The order that is easily wrong: the table first, then what waited.
pub(crate) fn an_event_behind_a_mask_is_delivered_once_and_to_the_new_vcpu<H: Host>(host: &H) {
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        let mut device = device(&machine, &router, &[(0, 0x41)]);
        for round in 0..10 {
            let target = ((round + 1) % VCPUS, 0x42 + round as u8);
            device.mask(0).unwrap();
            device.event(0).unwrap().signal();
            device.event(0).unwrap().signal();
            machine.expect([], "masked");
            assert_eq!(device.is_pending(0), Ok(true));
            // In one commit with the new message, and after it.
            if round % 2 == 0 {
                device.retarget(0, msi(target.0, target.1)).unwrap();
                device.unmask(0).unwrap();
            } else {
                device
                    .change(|change| {
                        change.unmask(0)?;
                        change.retarget(0, msi(target.0, target.1))
                    })
                    .unwrap();
            }
            machine.expect([target], "once, to the new vCPU");
            assert_eq!(device.is_pending(0), Ok(false));
        }
        drop(device);
        machine.expect([], "without the device");
    }
}

pub(crate) fn changes_of_single_routes_are_one_table<H: Host>(host: &H) {
    let mut machine = Machine::new(host, LegacyPins::Kernel);
    let router = machine.router();
    let (events, before) = (machine.events(2), (router.save(), machine.tables()));
    let mut routes = router
        .batch(|batch| {
            let routes = [batch.add_msi(msi(0, 0x41))?, batch.add_msi(msi(1, 0x52))?];
            for (route, event) in routes.iter().zip(&events) {
                batch.bind(route, event.clone())?;
            }
            Ok(routes)
        })
        .unwrap();
    assert_eq!(machine.tables() - before.1, 1);
    events.iter().for_each(hv_core::EventFd::signal);
    machine.expect([(0, 0x41), (1, 0x52)], "two routes");

    router.batch(|batch| batch.unbind(&routes[0])).unwrap();
    events[0].signal();
    machine.expect([], "not bound");
    assert_eq!(machine.tables() - before.1, 1, "an irqfd is no route");
    router
        .batch(|batch| {
            batch.bind(&routes[0], events[0].clone())?;
            batch.set_msi(&routes[0], msi(1, 0x43))?;
            batch.set_msi(&routes[1], msi(0, 0x54))
        })
        .unwrap();
    assert_eq!(machine.tables() - before.1, 2);
    machine.expect([(1, 0x43)], "the event that waited, by the new route");
    events.iter().for_each(hv_core::EventFd::signal);
    machine.expect([(1, 0x43), (0, 0x54)], "exchanged");

    let [first, second] = &mut routes;
    assert!(first.gsi() < second.gsi());
    router.batch(|batch| routes.into_iter().try_for_each(|route| batch.remove(route))).unwrap();
    assert_eq!(machine.tables() - before.1, 3, "both removed");
    events.iter().for_each(hv_core::EventFd::signal);
    machine.expect([], "without routes");
    assert_eq!(router.save(), before.0);
    host.assert_unbound(machine.vm.inner(), &events);
}

pub(crate) fn a_device_of_256_vectors_costs_one_table<H: Host>(host: &H) {
    const VECTORS: usize = 256;
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        // Half of them to each vCPU: a local APIC has fewer than 256.
        let target = |i: usize, to: usize| (((i + to) % 2) as u32, 0x30 + (i / 2) as u8);
        let all = |to| (0..VECTORS).map(move |i| target(i, to));
        let signal = |device: &MsiVectors<_>| {
            (0..VECTORS).for_each(|i| device.event(i).unwrap().signal());
        };
        let tables = machine.tables();
        let mut device = device(&machine, &router, &all(0).collect::<Vec<_>>());
        assert_eq!(machine.tables() - tables, 1, "enabled");
        signal(&device);
        machine.expect(all(0), "each vector interrupts");

        let (tables, irqfds) = (machine.tables(), machine.irqfds());
        let retarget = |device: &mut MsiVectors<_>| {
            let to = |i| target(i, 1);
            device.change(|change| {
                (0..VECTORS).try_for_each(|i| change.retarget(i, msi(to(i).0, to(i).1)))
            })
        };
        retarget(&mut device).unwrap();
        assert_eq!(machine.tables() - tables, 1, "retargeted");
        retarget(&mut device).unwrap();
        assert_eq!(machine.tables() - tables, 1, "nothing changed");
        assert_eq!(machine.irqfds(), irqfds, "what is bound stays bound");
        signal(&device);
        machine.expect(all(1), "each at the other vCPU");

        device.disable().unwrap();
        assert_eq!(machine.tables() - tables, 2, "disabled");
        signal(&device);
        machine.expect([], "disabled");
        device.enable().unwrap();
        assert_eq!(machine.tables() - tables, 3, "enabled again");
        machine.expect(all(1), "what waited");
        drop(device);
        assert_eq!(machine.tables() - tables, 4, "unplugged");
        machine.expect([], "without the device");
    }
}

/// As on a host without `KVM_CAP_SIGNAL_MSI`.
pub(crate) fn messages_without_a_route_get_dynamic_ones<H: Host>(host: &H) {
    const ROOM: u32 = 12;
    let mut machine = Machine::new(host, LegacyPins::Kernel);
    machine.config.msi = MsiMode::DynamicRoutes;
    machine.config.gsi_count = 38 + ROOM;
    let router: Router<H> = IrqRouter::new(machine.vm.clone(), machine.config).unwrap();
    let owned = device(&machine, &router, &[(1, 0xa1)]);
    let tables = machine.tables();
    for round in 0..3 {
        for target in [(0, 0x41), (1, 0x41), (0, 0x42)] {
            assert_eq!(router.signal_msi(msi(target.0, target.1)), Ok(MsiStatus::Delivered));
            machine.expect([target], "sent");
        }
        assert_eq!(machine.tables() - tables, 3, "round {round}: a route for each, once");
    }
    assert_ne!(router.signal_msi(msi(NOBODY, 0x41)), Ok(MsiStatus::Delivered));
    machine.expect([], "to nobody");
    // More than there is room for: old ones go, the route of the device stays.
    for vector in 0x30..0x90 {
        let target = (u32::from(vector) % VCPUS, vector);
        router.signal_msi(msi(target.0, target.1)).unwrap();
        machine.expect([target], "sent");
        assert!(router.allocated().len() <= ROOM as usize);
        owned.event(0).unwrap().signal();
        machine.expect([(1, 0xa1)], "the device");
    }
    drop(owned);
    machine.expect([], "without the device");
}
