//! The registers and the pins, against a mock that logs what KVM is told.

use super::*;
use crate::RouterConfig;
use crate::testing::event;
use hv_core::mock::MockVm;
use hv_core::{Errno, Error, Gsi, Ioctl, Msi, Route, RouteTarget};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

/// What a VM is told, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    Table(Vec<Route>),
    Message(Msi),
    Bound(Gsi),
    Unbound(Gsi),
}

type Log = Arc<Mutex<Vec<Told>>>;

fn ioapic(status: MsiStatus) -> (Ioapic<MockVm>, Log) {
    let log = Log::default();
    let (tables, messages) = (log.clone(), log.clone());
    let (bound, unbound) = (log.clone(), log.clone());
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_gsi_routing().returning(move |routes| {
        tables.lock().unwrap().push(Told::Table(routes.to_vec()));
        Ok(())
    });
    vm.expect_irqfd_assign().returning(move |irqfd| {
        assert_eq!(irqfd.resample, None, "KVM refuses one in split mode");
        bound.lock().unwrap().push(Told::Bound(irqfd.gsi));
        Ok(())
    });
    vm.expect_irqfd_deassign().returning(move |_, gsi| {
        unbound.lock().unwrap().push(Told::Unbound(gsi));
        Ok(())
    });
    vm.expect_signal_msi().returning(move |msi| {
        messages.lock().unwrap().push(Told::Message(msi));
        Ok(status)
    });
    (Ioapic::new(split(vm)).unwrap(), log)
}

fn split(vm: MockVm) -> IrqRouter<MockVm> {
    let pins = LegacyPins::Userspace;
    let config = RouterConfig::new(4096, pins);
    IrqRouter::new(Arc::new(vm), config).unwrap()
}

fn set(ioapic: &Ioapic<MockVm>, register: u8, value: u32) {
    ioapic.write(register::SELECT, &[register]).unwrap();
    ioapic.write(register::WINDOW, &value.to_le_bytes()).unwrap();
}

fn get(ioapic: &Ioapic<MockVm>, register: u8) -> u32 {
    ioapic.write(register::SELECT, &u32::from(register).to_le_bytes()).unwrap();
    let mut data = [0xaa; 4];
    ioapic.read(register::WINDOW, &mut data);
    u32::from_le_bytes(data)
}

fn low(pin: u8) -> u8 {
    index::REDIRECTION + 2 * pin
}

fn taken(log: &Log) -> Vec<Told> {
    std::mem::take(&mut log.lock().unwrap())
}

fn message(data: u32) -> Told {
    Told::Message(Msi { address: 0xfee0_0000, data, device: None })
}

const LEVEL_0X41: u32 = 0x8041;

#[test]
fn identifies_itself() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    assert_eq!(get(&ioapic, index::VERSION), 0x0017_0020, "24 entries, with an EOI register");
    set(&ioapic, index::ID, 0xffff_ffff);
    assert_eq!(get(&ioapic, index::ID), 0x0f00_0000);
    assert_eq!(get(&ioapic, index::ARBITRATION), 0x0f00_0000);
    for pin in 0..24 {
        assert_eq!(get(&ioapic, low(pin)), 0x1_0000, "masked");
        assert_eq!(get(&ioapic, low(pin) + 1), 0);
    }
    assert!(taken(&log).is_empty(), "none of this concerns KVM");
}

#[test]
fn any_access_to_any_offset_is_answered() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    for offset in (0..0x1000).chain([u64::MAX]) {
        if offset != register::WINDOW {
            ioapic.write(offset, &[0xff; 8]).unwrap();
        }
        let mut data = [0xaa; 8];
        ioapic.read(offset, &mut data);
        ioapic.read(offset, &mut data[..1]);
        ioapic.read(offset, &mut []);
        assert_eq!(data[4..], [0; 4]);
    }
    for select in 0x40..=0xff {
        set(&ioapic, select, u32::MAX);
        assert_eq!(get(&ioapic, select), 0, "no such register");
    }
    assert!(taken(&log).is_empty());
}

#[test]
fn an_edge_is_sent_once_and_not_while_masked() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    ioapic.pulse(4).unwrap();
    set(&ioapic, low(4), 0x31);
    let route = Route {
        gsi: Gsi(4),
        target: RouteTarget::Msi(Msi { address: 0xfee0_0000, data: 0x31, device: None }),
    };
    assert_eq!(taken(&log), [Told::Table(vec![route])], "nothing is left of a masked edge");
    ioapic.set_line(4, true).unwrap();
    ioapic.set_line(4, true).unwrap();
    assert_eq!(taken(&log), [message(0x31)], "a level is no edge");
    ioapic.set_line(4, false).unwrap();
    ioapic.pulse(4).unwrap();
    ioapic.pulse(4).unwrap();
    assert_eq!(taken(&log), [message(0x31), message(0x31)]);
    assert_eq!(get(&ioapic, low(4)), 0x31, "an edge leaves no remote IRR");
}

#[test]
fn a_level_is_sent_again_only_after_its_end() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    set(&ioapic, low(9), LEVEL_0X41);
    taken(&log);
    ioapic.set_line(9, true).unwrap();
    ioapic.set_line(9, false).unwrap();
    ioapic.set_line(9, true).unwrap();
    assert_eq!(taken(&log), [message(0xc041)]);
    assert_eq!(get(&ioapic, low(9)), LEVEL_0X41 | 0x4000, "remote IRR");
    ioapic.eoi(0x40).unwrap();
    assert!(taken(&log).is_empty(), "another vector");
    ioapic.eoi(0x41).unwrap();
    assert_eq!(taken(&log), [message(0xc041)], "still asserted");
    ioapic.set_line(9, false).unwrap();
    ioapic.write(register::EOI, &0x41_u32.to_le_bytes()).unwrap();
    assert!(taken(&log).is_empty());
    assert_eq!(get(&ioapic, low(9)), LEVEL_0X41);
}

#[test]
fn a_masked_level_waits_and_its_end_still_counts() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    set(&ioapic, low(9), LEVEL_0X41);
    ioapic.set_line(9, true).unwrap();
    taken(&log);
    // Masked while in service, as a handler that runs in a thread does.
    set(&ioapic, low(9), LEVEL_0X41 | 0x1_0000);
    assert!(taken(&log).is_empty(), "the mask is no part of the route: no ioctl");
    ioapic.eoi(0x41).unwrap();
    assert!(taken(&log).is_empty());
    assert_eq!(get(&ioapic, low(9)), LEVEL_0X41 | 0x1_0000, "ended");
    set(&ioapic, low(9), LEVEL_0X41);
    assert_eq!(taken(&log), [message(0xc041)], "unmasked with its line asserted");
}

#[test]
fn the_route_is_committed_before_the_message_is_sent() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    ioapic.set_line(5, true).unwrap();
    set(&ioapic, low(5), 0x8052);
    let told = taken(&log);
    assert!(matches!(told[..], [Told::Table(_), Told::Message(_)]), "{told:?}");
    set(&ioapic, low(5) + 1, 0x0100_0000);
    assert!(matches!(taken(&log)[..], [Told::Table(_)]), "in service: not sent again");
}

#[test]
fn without_a_target_the_pin_stays_ready() {
    let (ioapic, log) = ioapic(MsiStatus::NoTarget);
    set(&ioapic, low(9), LEVEL_0X41);
    ioapic.set_line(9, true).unwrap();
    assert_eq!(get(&ioapic, low(9)), LEVEL_0X41, "nobody accepted it");
    taken(&log);
    set(&ioapic, low(9) + 1, 0x0100_0000);
    assert_eq!(taken(&log).len(), 2, "tried again at its new destination");
}

#[test]
fn a_refused_route_leaves_the_entry_as_it_was() {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    let refused = Error::new(Ioctl::SetGsiRouting, Errno::ENOMEM);
    vm.expect_set_gsi_routing().returning(move |_| Err(refused));
    let ioapic = Ioapic::new(split(vm)).unwrap();
    ioapic.write(register::SELECT, &[low(3)]).unwrap();
    let error = ioapic.write(register::WINDOW, &[0x41, 0x80, 0, 0]).unwrap_err();
    assert_eq!(error, RouterError::Kvm(refused));
    assert_eq!(get(&ioapic, low(3)), 0x1_0000);
}

#[test]
fn not_beside_the_one_in_the_kernel_and_not_beyond_its_pins() {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_gsi_routing().returning(|_| Ok(()));
    let pins = LegacyPins::Kernel;
    let config = RouterConfig::new(4096, pins);
    let router = IrqRouter::new(Arc::new(vm), config).unwrap();
    assert_eq!(Ioapic::new(router).unwrap_err(), RouterError::PinsInKernel);
    let (ioapic, _) = ioapic(MsiStatus::Delivered);
    let error = ioapic.set_line(24, true).unwrap_err();
    assert_eq!(error.to_string(), "pin 24 of irqchip 2 does not exist");
}

#[test]
fn an_eventfd_drives_its_pin_while_it_is_not_masked() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    let early = ioapic.bind_level(10, event(), event()).unwrap();
    assert!(taken(&log).is_empty(), "masked");
    set(&ioapic, low(10), LEVEL_0X41 | 0x1_0000);
    assert!(matches!(taken(&log)[..], [Told::Table(_)]), "still masked");
    set(&ioapic, low(10), LEVEL_0X41);
    assert_eq!(taken(&log), [Told::Bound(Gsi(10))]);
    let late = ioapic.bind_level(10, event(), event()).unwrap();
    assert_eq!(taken(&log), [Told::Bound(Gsi(10))], "at once");
    set(&ioapic, low(10), 0x8042);
    assert!(matches!(taken(&log)[..], [Told::Table(_)]), "bound throughout");
    set(&ioapic, low(10), 0x1_8043);
    assert!(
        matches!(taken(&log)[..], [Told::Unbound(_), Told::Unbound(_), Told::Table(_)]),
        "masked and moved: no event finds the wrong route"
    );
    set(&ioapic, low(10), 0x8044);
    assert!(
        matches!(taken(&log)[..], [Told::Table(_), Told::Bound(_), Told::Bound(_)]),
        "the table first: an event that waited goes to the new vector"
    );
    drop(early);
    assert_eq!(taken(&log), [Told::Unbound(Gsi(10))]);
    set(&ioapic, low(10), 0x1_8044);
    assert_eq!(taken(&log), [Told::Unbound(Gsi(10))], "that of the other device alone");
    drop(late);
    set(&ioapic, low(10), 0x8044);
    assert!(taken(&log).is_empty(), "nobody drives it any more");
}

#[test]
fn an_end_is_told_to_all_who_drive_a_pin_with_its_vector() {
    let (ioapic, _) = ioapic(MsiStatus::Delivered);
    let bind = |pin| ioapic.bind_level(pin, event(), event()).unwrap();
    let (one, other, elsewhere) = (bind(10), bind(10), bind(11));
    set(&ioapic, low(10), LEVEL_0X41);
    set(&ioapic, low(11), 0x8042);
    ioapic.eoi(0x41).unwrap();
    assert!(one.take_end() && other.take_end() && !elsewhere.take_end());
    ioapic.write(register::EOI, &0x42_u32.to_le_bytes()).unwrap();
    assert!(!one.take_end() && elsewhere.take_end());
    // Masked while in service: the end still counts.
    set(&ioapic, low(10), LEVEL_0X41 | 0x1_0000);
    ioapic.eoi(0x41).unwrap();
    assert!(one.take_end());
    // An edge has no end.
    set(&ioapic, low(11), 0x0042);
    assert!(elsewhere.take_end(), "one that was in service will not be told");
    ioapic.eoi(0x42).unwrap();
    assert!(!elsewhere.take_end());
}

#[test]
fn a_new_vector_makes_devices_look_again() {
    let (ioapic, _) = ioapic(MsiStatus::Delivered);
    let pin = ioapic.bind_level(10, event(), event()).unwrap();
    set(&ioapic, low(10), LEVEL_0X41);
    assert!(!pin.take_end(), "there was no level before");
    set(&ioapic, low(10) + 1, 0x0100_0000);
    set(&ioapic, low(10), LEVEL_0X41 | 0x1_0000);
    assert!(!pin.take_end(), "the end will have its vector");
    set(&ioapic, low(10), 0x8051);
    assert!(pin.take_end(), "an interrupt with the old vector may be in service for ever");
}

#[test]
fn an_eventfd_drives_one_pin_that_exists() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    let trigger = event();
    let fd = trigger.as_raw_fd();
    let _pin = ioapic.bind_level(10, trigger.clone(), event()).unwrap();
    let error = ioapic.bind_level(11, trigger, event()).unwrap_err();
    assert_eq!(error, RouterError::EventInUse { fd, gsi: Gsi(10) });
    let error = ioapic.bind_level(24, event(), event()).unwrap_err();
    assert!(matches!(error, RouterError::Route(RouteError::NoSuchPin { pin: 24, .. })));
    assert!(taken(&log).is_empty());
}

#[test]
fn an_eventfd_that_raises_a_message_drives_no_pin() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    let (router, trigger) = (ioapic.chip.router.clone(), event());
    let route = router
        .batch(|batch| {
            let route = batch.add_msi(Msi { address: 0xfee0_0000, data: 0x51, device: None })?;
            batch.bind(&route, trigger.clone())?;
            Ok(route)
        })
        .unwrap();
    taken(&log);
    let fd = trigger.as_raw_fd();
    let error = ioapic.bind_level(10, trigger, event()).unwrap_err();
    assert_eq!(error, RouterError::EventInUse { fd, gsi: route.gsi() });
    assert_eq!(taken(&log), []);
}

#[test]
fn pins_and_i_o_apic_may_go_in_any_order() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    let pin = ioapic.bind_level(10, event(), event()).unwrap();
    set(&ioapic, low(10), LEVEL_0X41);
    taken(&log);
    drop(ioapic);
    drop(pin);
    assert!(taken(&log).is_empty(), "the VM goes with them");
}

#[test]
fn a_pin_is_unbound_though_its_i_o_apic_went_first() {
    let (ioapic, log) = ioapic(MsiStatus::Delivered);
    let router = ioapic.chip.router.clone();
    set(&ioapic, low(10), LEVEL_0X41);
    let pin = ioapic.bind_level(10, event(), event()).unwrap();
    taken(&log);
    drop(ioapic);
    drop(pin);
    assert_eq!(taken(&log), [Told::Unbound(Gsi(10))]);
    assert!(router.irqfds().is_empty());
}

#[test]
fn an_event_that_waits_survives_a_refused_unmask() {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_gsi_routing().returning(|_| Ok(()));
    let refused = Error::new(Ioctl::Irqfd, Errno::ENOMEM);
    vm.expect_irqfd_assign().returning(move |_| Err(refused));
    let ioapic = Ioapic::new(split(vm)).unwrap();
    let trigger = event();
    let pin = ioapic.bind_level(10, trigger.clone(), event()).unwrap();
    pin.raise();
    ioapic.write(register::SELECT, &[low(10)]).unwrap();
    let error = ioapic.write(register::WINDOW, &LEVEL_0X41.to_le_bytes()).unwrap_err();
    assert_eq!(error, RouterError::Kvm(refused));
    assert_eq!(trigger.take(), Some(1));
    assert!(!pin.take_end());
}

/// A VM that takes routes.
fn routable() -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_gsi_routing().returning(|_| Ok(()));
    vm
}

#[test]
fn each_pin_ends_though_the_message_of_another_is_refused() {
    let mut vm = routable();
    let refused = Error::new(Ioctl::SignalMsi, Errno::ENOMEM);
    vm.expect_signal_msi().times(2).returning(|_| Ok(MsiStatus::Delivered));
    vm.expect_signal_msi().once().returning(move |_| Err(refused));
    vm.expect_signal_msi().once().returning(|_| Ok(MsiStatus::Delivered));
    let ioapic = Ioapic::new(split(vm)).unwrap();
    for pin in [9, 10] {
        set(&ioapic, low(pin), LEVEL_0X41);
        ioapic.set_line(pin, true).unwrap();
    }
    assert_eq!(ioapic.eoi(0x41), Err(RouterError::Kvm(refused)));
    assert_eq!(get(&ioapic, low(9)), LEVEL_0X41, "ready to send");
    assert_eq!(get(&ioapic, low(10)), LEVEL_0X41 | 0x4000, "ended, and sent again");
}

#[test]
fn a_refused_pulse_does_not_take_the_next_one_with_it() {
    let mut vm = routable();
    let refused = Error::new(Ioctl::SignalMsi, Errno::ENOMEM);
    vm.expect_signal_msi().once().returning(move |_| Err(refused));
    vm.expect_signal_msi().once().returning(|_| Ok(MsiStatus::Delivered));
    let ioapic = Ioapic::new(split(vm)).unwrap();
    set(&ioapic, low(4), 0x31);
    assert_eq!(ioapic.pulse(4), Err(RouterError::Kvm(refused)));
    ioapic.pulse(4).unwrap();
}

#[test]
fn a_pin_can_be_unmasked_after_an_unmask_that_could_not_be_undone() {
    let mut vm = routable();
    let refused = Error::new(Ioctl::Irqfd, Errno::ENOMEM);
    vm.expect_irqfd_assign().once().returning(|_| Ok(()));
    vm.expect_irqfd_assign().once().returning(move |_| Err(refused));
    vm.expect_irqfd_deassign().once().returning(move |_, _| Err(refused));
    vm.expect_irqfd_assign().once().returning(|_| Ok(()));
    vm.expect_irqfd_deassign().times(2).returning(|_, _| Ok(()));
    let ioapic = Ioapic::new(split(vm)).unwrap();
    let _pins = [(); 2].map(|()| ioapic.bind_level(10, event(), event()).unwrap());
    ioapic.write(register::SELECT, &[low(10)]).unwrap();
    let unmask = || ioapic.write(register::WINDOW, &LEVEL_0X41.to_le_bytes());
    assert!(matches!(unmask(), Err(RouterError::RollbackFailed { .. })));
    assert_eq!(ioapic.chip.router.irqfds().len(), 1, "KVM still has it");
    unmask().unwrap();
    assert_eq!(ioapic.chip.router.irqfds().len(), 2);
}
