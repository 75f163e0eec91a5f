//! The interrupts of a VM as a whole: the rows about lines, messages and irqfds.

use super::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

const LIMIT: u32 = 4096;
const SPIV: u64 = 0xfee0_00f0;
const EOI: u64 = 0xfee0_00b0;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

fn irq() -> Irq {
    Irq::new(IrqLimits { routes: LIMIT }).unwrap()
}

fn with_vcpus(mut irq: Irq, n: u32) -> Irq {
    for vcpu in 0..n {
        irq.add_vcpu(vcpu);
        assert!(irq.mmio_write(vcpu, SPIV, &0x1ffu32.to_le_bytes()));
    }
    irq
}

/// A full irqchip and one vCPU that takes interrupts.
fn full() -> Irq {
    let mut irq = irq();
    irq.create_full();
    with_vcpus(irq, 1)
}

fn split(pins: u32) -> Irq {
    let mut irq = irq();
    irq.create_split(pins);
    with_vcpus(irq, 1)
}

fn event() -> EventFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
}

fn irqfd(event: &EventFd, gsi: u32) -> Irqfd {
    Irqfd { event: event.clone(), gsi: Gsi(gsi), resample: None }
}

fn message(vector: u32) -> Msi {
    Msi { address: 0xfee0_0000, data: vector, device: None }
}

fn msi_route(gsi: u32, vector: u32) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Msi(message(vector)) }
}

fn pin_route(gsi: u32, pin: u32) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin } }
}

/// The guest programs a redirection entry.
fn redirect(irq: &mut Irq, pin: u32, entry: u64) {
    for (register, value) in [(0x11 + pin * 2, entry >> 32), (0x10 + pin * 2, entry)] {
        assert!(irq.mmio_write(0, 0xfec0_0000, &register.to_le_bytes()));
        assert!(irq.mmio_write(0, 0xfec0_0010, &(value as u32).to_le_bytes()));
    }
}

fn fixed(vectors: &[u8]) -> Vec<Interrupt> {
    vectors.iter().map(|&vector| Interrupt::Fixed(vector)).collect()
}

fn lost(gsi: u32, why: Loss) -> Vec<Finding> {
    vec![Finding::LostEvent { gsi: Gsi(gsi), why }]
}

#[test]
fn before_an_irqchip() {
    let mut irq = irq();
    assert_eq!(irq.kind(), None);
    assert_eq!(irq.set_routing(&[]), Err(Errno::EINVAL));
    assert_eq!(irq.irqfd_assign(&irqfd(&event(), 0), false), Err(Errno::EINVAL));
    assert_eq!(irq.msi(message(0x40)), Err(Errno::EINVAL));
    assert_eq!(irq.line(Gsi(4), true), Err(Errno::ENXIO));
    assert_eq!(irq.chip(0).map(|_| ()), Err(Errno::ENXIO));
    assert_eq!(irq.lapic_page(0).map(|_| ()), Err(Errno::EINVAL));
    irq.add_vcpu(0);
    assert!(!irq.mmio_write(0, SPIV, &[0; 4]));
    assert!(!irq.port_write(0x20, &[0]));
    assert!(!irq.pending(0) && irq.take(0).is_empty());
}

#[test]
fn the_first_table_replaces_the_default_one() {
    let mut irq = full();
    assert_eq!(irq.routes().len(), 40);
    redirect(&mut irq, 4, 0x61 | MASKED);
    redirect(&mut irq, 20, 0x61);
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    assert_eq!(irq.line(Gsi(4), true), Ok(LineStatus::Ignored), "not routed any more");
    assert_eq!(split(24).routes(), []);
}

#[test]
fn a_refused_table_leaves_the_one_before_in_force() {
    let mut irq = full();
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    for bad in [&[msi_route(24, 1), msi_route(24, 2)][..], &[pin_route(1, 24)]] {
        assert_eq!(irq.set_routing(bad), Err(Errno::EINVAL));
    }
    assert_eq!(irq.routes(), [msi_route(24, 0x51)]);
    assert_eq!(irq.line(Gsi(24), true), Ok(LineStatus::Delivered(1)));
    assert_eq!(irq.take(0), fixed(&[0x51]));
    assert_eq!(split(4).set_routing(&[pin_route(1, 1)]), Err(Errno::EINVAL));
}

#[test]
fn lines_say_what_became_of_them() {
    let mut irq = full();
    assert_eq!(irq.line(Gsi(2000), true), Ok(LineStatus::Ignored), "not routed");
    assert_eq!(irq.line(Gsi(u32::MAX), true), Ok(LineStatus::Ignored));
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Ignored), "masked");
    irq.line(Gsi(20), false).unwrap();
    redirect(&mut irq, 20, 0x61);
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Coalesced));
    irq.line(Gsi(20), false).unwrap();
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    assert_eq!(irq.log(0), fixed(&[0x61]), "both are one to the guest");
    assert!(irq.drain_findings().is_empty(), "the caller was told");
    // A message has no level to take back.
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    assert_eq!(irq.line(Gsi(24), false), Ok(LineStatus::Ignored));
    assert_eq!(irq.line(Gsi(24), true), Ok(LineStatus::Delivered(1)));
}

#[test]
fn a_gsi_may_lead_to_pins_of_several_chips() {
    let mut irq = full();
    redirect(&mut irq, 4, 0x61);
    assert_eq!(irq.line(Gsi(4), true), Ok(LineStatus::Delivered(2)), "I/O APIC and 8259");
    assert!(irq.pending(0));
}

#[test]
fn messages_say_what_became_of_them() {
    let mut irq = irq();
    irq.create_full();
    assert_eq!(irq.msi(message(0x41)), Ok(MsiStatus::NoTarget), "no vCPU yet");
    let mut irq = with_vcpus(irq, 1);
    assert_eq!(irq.msi(message(0x41)), Ok(MsiStatus::Delivered));
    let elsewhere = Msi { address: 0xfee0_5000, ..message(0x41) };
    assert_eq!(irq.msi(elsewhere), Ok(MsiStatus::Blocked));
    assert_eq!(irq.take(0), fixed(&[0x41]));
    irq.mmio_write(0, SPIV, &0xffu32.to_le_bytes());
    assert_eq!(irq.msi(message(0x41)), Ok(MsiStatus::Blocked), "disabled by software");
    assert!(!irq.pending(0));
    let far = Msi { address: 0x0000_0001_fee0_0000, ..message(0x41) };
    assert_eq!(irq.msi(far), Ok(MsiStatus::Blocked));
    irq.use_wide_ids();
    assert_eq!(irq.msi(far), Err(Errno::EINVAL));
}

#[test]
fn an_irqfd_delivers_through_its_route() {
    let (mut irq, event) = (full(), event());
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    irq.irqfd_assign(&irqfd(&event, 24), false).unwrap();
    assert_eq!(irq.irqfd_assign(&irqfd(&event, 25), false), Err(Errno::EBUSY));
    event.signal();
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x51]));
    irq.set_routing(&[msi_route(24, 0x52)]).unwrap();
    event.signal();
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x52]));
    assert_eq!(irq.log(0), fixed(&[0x51, 0x52]));
    assert_eq!(irq.irqfds(), [irqfd(&event, 24)]);
    irq.irqfd_deassign(&event, Gsi(24)).unwrap();
    assert!(irq.irqfds().is_empty() && irq.drain_findings().is_empty());
}

#[test]
fn what_is_signalled_while_not_assigned_is_kept() {
    let (mut irq, event) = (full(), event());
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    event.signal();
    irq.irqfd_assign(&irqfd(&event, 24), false).unwrap();
    irq.settle();
    assert_eq!(irq.log(0), fixed(&[0x51]), "at once, and once");
    assert_eq!(event.take(), Some(1), "the counter is left alone");
    assert!(irq.drain_findings().is_empty());
}

#[test]
fn an_event_without_a_route_is_lost() {
    let (mut irq, event) = (full(), event());
    irq.set_routing(&[]).unwrap();
    irq.irqfd_assign(&irqfd(&event, 24), false).unwrap();
    assert_eq!(irq.drain_findings(), [Finding::UnroutedIrqfd { gsi: Gsi(24) }]);
    event.signal();
    irq.settle();
    assert_eq!(event.take(), None, "it is consumed");
    assert_eq!(irq.drain_findings(), lost(24, Loss::Unrouted));
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    irq.settle();
    assert!(!irq.pending(0));
    irq.set_routing(&[]).unwrap();
    assert_eq!(irq.drain_findings(), [Finding::UnroutedIrqfd { gsi: Gsi(24) }], "cut off");
}

#[test]
fn gsis_are_not_checked_but_found() {
    let (mut irq, events) = (full(), [event(), event()]);
    for (event, gsi) in events.iter().zip([5000, u32::MAX]) {
        irq.irqfd_assign(&irqfd(event, gsi), false).unwrap();
        let gsi = Gsi(gsi);
        assert_eq!(irq.drain_findings(), [Finding::GsiOutOfRange { gsi, limit: LIMIT }]);
        event.signal();
        irq.settle();
        assert_eq!(irq.drain_findings(), lost(gsi.0, Loss::OutOfRange));
    }
    irq.irqfd_deassign(&events[0], Gsi(5001)).unwrap();
    irq.irqfd_deassign(&event(), Gsi(7)).unwrap();
    irq.irqfd_deassign(&events[0], Gsi(5000)).unwrap();
    irq.irqfd_deassign(&events[0], Gsi(5000)).unwrap();
    let vain = [5001, 7, 5000].map(|gsi| Finding::VainDeassign { gsi: Gsi(gsi) });
    assert_eq!(irq.drain_findings(), vain);
}

#[test]
fn why_events_are_lost() {
    for (entry, why) in
        [(0x61 | MASKED, Some(Loss::Masked)), (0x61 | 5 << 56, Some(Loss::NoTarget)), (0x61, None)]
    {
        let (mut irq, event) = (full(), event());
        redirect(&mut irq, 20, entry);
        irq.irqfd_assign(&irqfd(&event, 20), false).unwrap();
        event.signal();
        irq.settle();
        assert_eq!(irq.drain_findings(), why.map_or(Vec::new(), |why| lost(20, why)));
        assert_eq!(irq.pending(0), why.is_none());
    }
    let (mut irq, event) = (irq(), event());
    irq.create_full();
    irq.add_vcpu(0);
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    irq.irqfd_assign(&irqfd(&event, 24), false).unwrap();
    event.signal();
    irq.settle();
    assert_eq!(irq.drain_findings(), lost(24, Loss::Disabled));
}

#[test]
fn a_pulse_on_a_level_in_service_is_lost() {
    let (mut irq, event) = (full(), event());
    redirect(&mut irq, 20, 0x61 | LEVEL);
    irq.irqfd_assign(&irqfd(&event, 20), false).unwrap();
    event.signal();
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x61]));
    event.signal();
    irq.settle();
    assert_eq!(irq.drain_findings(), lost(20, Loss::InService));
    irq.end_of_interrupt(0, 0x61);
    assert!(!irq.pending(0));
}

#[test]
fn a_resample_irqfd_holds_its_line_until_the_end() {
    let (mut irq, event, resample) = (full(), event(), event());
    redirect(&mut irq, 20, 0x61 | LEVEL);
    let irqfd = Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 20) };
    irq.irqfd_assign(&irqfd, false).unwrap();
    event.signal();
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x61]));
    assert_eq!(resample.take(), None);
    event.signal();
    irq.settle();
    assert_eq!(irq.end_of_interrupt(0, 0x61), None);
    assert_eq!(resample.take(), Some(1));
    assert!(!irq.pending(0), "the end lowers the line; the device raises it again");
    event.signal();
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x61]));
    // The level goes with the last resampler.
    irq.irqfd_deassign(&event, Gsi(20)).unwrap();
    irq.end_of_interrupt(0, 0x61);
    assert_eq!((irq.pending(0), resample.take()), (false, None));
    assert!(irq.drain_findings().is_empty());
    assert_eq!(split(24).irqfd_assign(&irqfd, false), Err(Errno::EINVAL));
}

#[test]
fn a_level_goes_with_its_eventfd() {
    let (mut irq, event, resample) = (full(), event(), event());
    redirect(&mut irq, 20, 0x61 | LEVEL | MASKED);
    irq.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 20) }, false)
        .unwrap();
    event.signal();
    irq.settle();
    drop(event);
    irq.settle();
    redirect(&mut irq, 20, 0x61 | LEVEL);
    assert_eq!((irq.pending(0), resample.take()), (false, None));
    assert_eq!(irq.drain_findings(), [Finding::ClosedIrqfd { gsi: Gsi(20) }]);
    assert!(irq.irqfds().is_empty());
}

#[test]
fn an_event_before_its_eventfd_is_closed_is_delivered() {
    let (mut irq, event) = (full(), event());
    irq.set_routing(&[msi_route(24, 0x51)]).unwrap();
    irq.irqfd_assign(&irqfd(&event, 24), false).unwrap();
    event.signal();
    drop(event);
    irq.settle();
    assert_eq!(irq.take(0), fixed(&[0x51]));
    assert_eq!(irq.drain_findings(), [Finding::ClosedIrqfd { gsi: Gsi(24) }]);
}

#[test]
fn an_unmasked_level_asks_its_resampler() {
    let (mut irq, event, resample) = (full(), event(), event());
    redirect(&mut irq, 20, 0x61 | LEVEL | MASKED);
    irq.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 20) }, false)
        .unwrap();
    event.signal();
    irq.settle();
    assert!(!irq.pending(0) && irq.drain_findings().is_empty(), "it waits");
    redirect(&mut irq, 20, 0x61 | LEVEL);
    assert!(!irq.pending(0));
    assert_eq!(resample.take(), Some(1));
    event.signal();
    irq.settle();
    assert!(irq.pending(0));
}

#[test]
fn the_8259_pair_reaches_the_boot_processor() {
    let mut irq = full();
    irq.add_vcpu(1);
    let (event, resample) = (event(), event());
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
        assert!(irq.port_write(port, &[value]));
    }
    // The wire is LINT0, which enabling by software leaves alone.
    irq.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 4) }, false)
        .unwrap();
    event.signal();
    irq.settle();
    assert!(irq.pending(0) && !irq.pending(1));
    assert!(irq.log(0).is_empty());
    assert_eq!(irq.take(0), [Interrupt::ExtInt(0x24)]);
    assert_eq!(irq.log(0), [Interrupt::ExtInt(0x24)]);
    assert_eq!(resample.take(), None);
    assert!(irq.port_write(0x20, &[0x20]));
    assert_eq!(resample.take(), Some(1), "the end is heard");
    let mut byte = [0];
    assert!(irq.port_read(0x21, &mut byte) && !irq.port_read(0x40, &mut byte));
}

#[test]
fn in_split_mode_the_end_of_a_reserved_level_exits() {
    let mut irq = split(24);
    irq.set_routing(&[msi_route(5, 0x8051), msi_route(6, 0x52), msi_route(30, 0x8053)]).unwrap();
    for (gsi, vector, exit) in [(5, 0x51, Some(0x51)), (6, 0x52, None), (30, 0x53, None)] {
        irq.line(Gsi(gsi), true).unwrap();
        assert_eq!(irq.take(0), fixed(&[vector]));
        assert_eq!(irq.end_of_interrupt(0, vector), exit, "GSI {gsi}");
    }
    irq.line(Gsi(5), true).unwrap();
    irq.take(0);
    assert!(irq.mmio_write(0, EOI, &[0; 4]));
    assert_eq!((irq.take_ioapic_eoi(0), irq.take_ioapic_eoi(0)), (Some(0x51), None));
    assert!(!irq.mmio_write(0, 0xfec0_0000, &[0; 4]), "the VMM's I/O APIC");
    assert_eq!(irq.chip(2).map(|_| ()), Err(Errno::ENXIO));
}

#[test]
fn an_end_is_heard_though_the_route_has_gone_elsewhere() {
    for (begun, exit) in [(true, Some(0x51)), (false, None)] {
        let mut irq = split(24);
        let here = msi_route(5, 0x8051);
        let elsewhere = Msi { address: 0xfee0_2000, ..message(0x8051) };
        let elsewhere = Route { gsi: Gsi(5), target: RouteTarget::Msi(elsewhere) };
        irq.set_routing(&[here]).unwrap();
        if begun {
            irq.line(Gsi(5), true).unwrap();
        }
        irq.set_routing(&[elsewhere]).unwrap();
        irq.take(0); // it runs, and sees the new table
        irq.msi(message(0x8051)).unwrap();
        irq.take(0);
        assert_eq!(irq.end_of_interrupt(0, 0x51), exit);
    }
}

#[test]
fn interrupts_are_taken_by_priority() {
    let mut irq = full();
    for vector in [0x35, 0x61, 0x41, 0x62] {
        irq.msi(message(vector)).unwrap();
    }
    irq.msi(message(0x400)).unwrap();
    let mut expected = vec![Interrupt::Nmi];
    expected.extend(fixed(&[0x62, 0x61, 0x41, 0x35]));
    assert_eq!(irq.take(0), expected);
    // A level in service holds back its class and those below.
    irq.msi(message(0x8055)).unwrap();
    assert_eq!(irq.take(0), fixed(&[0x55]));
    for vector in [0x51, 0x61] {
        irq.msi(message(vector)).unwrap();
    }
    assert_eq!(irq.take(0), fixed(&[0x61]));
    irq.end_of_interrupt(0, 0x55);
    assert_eq!(irq.take(0), fixed(&[0x51]));
}

#[test]
fn start_messages_are_taken_apart() {
    let mut irq = with_vcpus(full(), 2);
    for data in [0x500, 0x608] {
        irq.msi(Msi { address: 0xfee0_1000, ..message(data) }).unwrap();
    }
    assert!(irq.pending(1));
    assert_eq!(irq.take_starts(1), [Interrupt::Init, Interrupt::StartUp(8)]);
    assert!(!irq.pending(1) && irq.take(1).is_empty());
}

#[test]
fn state_is_read_and_set() {
    let mut irq = full();
    redirect(&mut irq, 20, 0x61);
    let ioapic = irq.chip(2).unwrap();
    redirect(&mut irq, 20, MASKED);
    irq.set_chip(&ioapic).unwrap();
    assert_eq!(irq.line(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    for chip in [0, 1] {
        let pic = irq.chip(chip).unwrap();
        assert_eq!(irq.set_chip(&pic), Ok(()));
    }
    assert_eq!(irq.chip(3).map(|_| ()), Err(Errno::EINVAL));
    assert_eq!(irq.set_chip(&kvm_irqchip { chip_id: 3, ..ioapic }), Err(Errno::EINVAL));

    let mut lapic = irq.lapic_page(0).unwrap();
    assert_eq!(lapic.regs[0x200 + 0x30], 2, "vector 0x61 is requested");
    lapic.regs[0x200 + 0x30] = 0;
    irq.set_lapic_page(0, &lapic).unwrap();
    assert!(!irq.pending(0));
    let mut data = [0xff; 8];
    assert!(irq.mmio_read(0, 0xfee0_0031, &mut data));
    assert_eq!(data, [0, 5, 0, 0, 0, 0, 0, 0], "the version, from its second byte");
    assert!(!irq.mmio_read(0, 0xfee0_1000, &mut data));
    assert!(irq.mmio_write(0, 0xfee0_0ff0, &[1; 4]) && irq.mmio_write(0, SPIV + 1, &[1; 8]));
}

#[test]
fn the_epoll_instance_is_readable_while_something_is_signalled() {
    let (mut irq, event) = (full(), event());
    irq.irqfd_assign(&irqfd(&event, 20), false).unwrap();
    let readable = |irq: &Irq| {
        let epoll = irq.epoll();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(epoll, PollFlags::IN)], Some(&now)).unwrap() == 1
    };
    assert!(!readable(&irq));
    event.signal();
    assert!(readable(&irq));
    irq.settle();
    assert!(!readable(&irq));
}

#[test]
fn findings_are_bounded() {
    let mut irq = full();
    let event = event();
    for _ in 0..FINDINGS + 10 {
        irq.irqfd_deassign(&event, Gsi(1)).unwrap();
    }
    assert_eq!(irq.drain_findings().len(), FINDINGS);
    assert!(irq.drain_findings().is_empty());
}
