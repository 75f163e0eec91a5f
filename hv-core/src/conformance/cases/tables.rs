//! `KVM_SET_GSI_ROUTING`: which tables are legal.

use crate::conformance::bench::{Bench, Drive, EDGE, message, msi_route, pin_route};
use crate::conformance::expect::{refused, same};
use crate::conformance::{Case, Checked, Kernels, Miss, Platform, RawRequest, RawRoute, VmOf};
use crate::{
    Capability, Errno, Gsi, IrqBackend, IrqchipId, LineStatus, Msi, Route, RouteTarget, Vm,
};

/// `KVM_IRQ_ROUTING_IRQCHIP` and `KVM_IRQ_ROUTING_MSI`.
const PIN: u32 = 1;
const MSI: u32 = 2;

/// `KVM_X2APIC_API_USE_32BIT_IDS`.
const USE_32BIT_IDS: u64 = 1;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = legal();
    cases.extend(illegal());
    cases.extend(limits());
    cases.extend(unspeakable());
    cases
}

fn legal<P: Platform>() -> Vec<Case<P>> {
    let table = |name, rule, routes: &[Route]| {
        let routes = routes.to_vec();
        Case::new(name, rule, move |p: &P| Ok(p.vm_with_irqchip()?.set_gsi_routing(&routes)?))
    };
    let (pic, ioapic) = (IrqchipId::PIC_MASTER, IrqchipId::IOAPIC);
    let of_a_device = Msi { device: Some(0x18), ..message(0, 0x40) };
    vec![
        table("table-empty", "A table may be empty.", &[]),
        table(
            "table-pic-and-ioapic",
            "One GSI may lead to a pin of a PIC and one of the I/O APIC.",
            &[pin_route(4, pic, 4), pin_route(4, ioapic, 4)],
        ),
        table(
            "table-pins-of-the-slave-pic",
            "A GSI may lead to a pin of the slave PIC.",
            &[pin_route(8, IrqchipId::PIC_SLAVE, 0), pin_route(15, IrqchipId::PIC_SLAVE, 7)],
        ),
        table(
            "table-two-gsis-on-a-pin",
            "Two GSIs may lead to one pin.",
            &[pin_route(4, ioapic, 4), pin_route(5, ioapic, 4)],
        ),
        table(
            "table-message-on-a-legacy-gsi",
            "A GSI of a legacy pin may lead to a message.",
            &[msi_route(3, message(0, 0x40))],
        ),
        table(
            "table-message-of-zeros",
            "A message may be all zeros.",
            &[msi_route(30, Msi::default())],
        ),
        table(
            "table-message-with-device-id",
            "A message may have a device id.",
            &[msi_route(30, of_a_device)],
        )
        .kernels(Kernels::Since(4, 8, "EINVAL")),
        table(
            "table-two-gsis-with-a-message",
            "Two GSIs may lead to the same message.",
            &[msi_route(30, message(0, 0x40)), msi_route(31, message(0, 0x40))],
        ),
        Case::new(
            "table-hyperv-sint",
            "A GSI may lead to a synthetic interrupt, also of a vCPU that has none, if KVM has Hyper-V \
             emulation.",
            hyperv_sint,
        ),
        table(
            "table-message-above-4-gib",
            "Without 32-bit APIC ids a message's address may be above 4 GiB.",
            &[msi_route(30, Msi { address: 0x12_fee0_0000, data: 0x40, device: None })],
        ),
    ]
}

fn hyperv_sint<P: Platform>(p: &P) -> Checked {
    let target = RouteTarget::HypervSint { vcpu: 0, sint: 3 };
    match p.vm_with_irqchip()?.set_gsi_routing(&[Route { gsi: Gsi(30), target }]) {
        // Nothing else says that it is left out of this kernel.
        Err(error) if error.errno == Errno::EINVAL => {
            Err(Miss::not_applicable("this KVM has no Hyper-V emulation"))
        }
        result => Ok(result?),
    }
}

fn illegal<P: Platform>() -> Vec<Case<P>> {
    let table = |name, rule, routes: &[Route]| {
        let routes = routes.to_vec();
        Case::new(name, rule, move |p: &P| {
            refused(p.vm_with_irqchip()?.set_gsi_routing(&routes), Errno::EINVAL)
        })
    };
    let (pic, slave, ioapic) = (IrqchipId::PIC_MASTER, IrqchipId::PIC_SLAVE, IrqchipId::IOAPIC);
    let msi = |vector| message(0, vector);
    vec![
        table(
            "table-two-messages-on-a-gsi",
            "Two messages on one GSI are refused with EINVAL.",
            &[msi_route(30, msi(0x40)), msi_route(30, msi(0x41))],
        ),
        table(
            "table-one-message-twice-on-a-gsi",
            "The same message twice on one GSI is refused with EINVAL.",
            &[msi_route(30, msi(0x40)), msi_route(30, msi(0x40))],
        ),
        table(
            "table-pin-then-message-on-a-gsi",
            "A pin and a message on one GSI are refused with EINVAL.",
            &[pin_route(4, ioapic, 4), msi_route(4, msi(0x40))],
        ),
        table(
            "table-message-then-pin-on-a-gsi",
            "A message and a pin on one GSI are refused with EINVAL.",
            &[msi_route(4, msi(0x40)), pin_route(4, ioapic, 4)],
        ),
        table(
            "table-two-pins-of-a-chip-on-a-gsi",
            "Two pins of one chip on one GSI are refused with EINVAL.",
            &[pin_route(4, ioapic, 4), pin_route(4, ioapic, 5)],
        ),
        table(
            "table-ioapic-pin-24",
            "The I/O APIC has no pin 24 (EINVAL).",
            &[pin_route(4, ioapic, 24)],
        ),
        table("table-pic-pin-8", "A PIC has no pin 8 (EINVAL).", &[pin_route(4, pic, 8)]),
        table(
            "table-slave-pin-8",
            "The slave PIC has no pin 8 (EINVAL).",
            &[pin_route(4, slave, 8)],
        ),
        table(
            "table-irqchip-3",
            "There is no irqchip 3 (EINVAL).",
            &[pin_route(4, IrqchipId(3), 0)],
        ),
        Case::new(
            "table-message-above-4-gib-with-32-bit-ids",
            "With 32-bit APIC ids bits 32 to 39 of a message's address must be 0 (EINVAL).",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::X2apicApi)?;
                vm.enable_cap(Capability::X2apicApi, [USE_32BIT_IDS, 0, 0, 0])?;
                let msi = Msi { address: 0x12_fee0_0000, data: 0x40, device: None };
                refused(vm.set_gsi_routing(&[msi_route(30, msi)]), Errno::EINVAL)?;
                let msi = Msi { address: 0x1200_fee0_0000, ..msi };
                Ok(vm.set_gsi_routing(&[msi_route(30, msi)])?)
            },
        )
        .kernels(Kernels::Since(4, 8, "no 32-bit APIC ids")),
    ]
}

fn limits<P: Platform>() -> Vec<Case<P>> {
    let messages = |gsis: std::ops::Range<u32>| -> Vec<Route> {
        gsis.map(|gsi| msi_route(gsi, message(0, 0x40))).collect()
    };
    /// A VM with an irqchip, and how many routes it takes.
    fn limited<P: Platform>(p: &P) -> Checked<(VmOf<P>, u32)> {
        let vm = p.vm_with_irqchip()?;
        let limit = p.needs(&vm, Capability::IrqRouting)?;
        Ok((vm, limit.unsigned_abs()))
    }
    vec![
        Case::new("table-last-gsi", "The GSI below KVM_CAP_IRQ_ROUTING may be routed.", |p: &P| {
            let (vm, limit) = limited(p)?;
            Ok(vm.set_gsi_routing(&[msi_route(limit - 1, message(0, 0x40))])?)
        }),
        Case::new(
            "table-gsi-at-limit",
            "A GSI of KVM_CAP_IRQ_ROUTING is refused with EINVAL.",
            |p: &P| {
                let (vm, limit) = limited(p)?;
                let table = [msi_route(limit, message(0, 0x40))];
                refused(vm.set_gsi_routing(&table), Errno::EINVAL)
            },
        ),
        Case::new("table-full", "A table may have KVM_CAP_IRQ_ROUTING entries.", move |p: &P| {
            let (vm, limit) = limited(p)?;
            Ok(vm.set_gsi_routing(&messages(0..limit))?)
        })
        .kernels(Kernels::Since(4, 7, "one entry less")),
        Case::new(
            "table-too-long",
            "A table of one entry more is refused with EINVAL.",
            move |p: &P| {
                let (vm, limit) = limited(p)?;
                let mut table = messages(24..limit);
                let pins = (0..25).map(|n| pin_route(n % 24, IrqchipId(2 - n / 24), n % 24));
                table.extend(pins);
                same("the length", table.len(), limit as usize + 1)?;
                refused(vm.set_gsi_routing(&table), Errno::EINVAL)
            },
        ),
        Case::new(
            "table-replaces-all-of-the-one-before",
            "A table replaces the whole one before it, KVM's default routes included.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::IrqInjectStatus)?;
                let mut guest = p.guest_on(&vm, 0)?;
                guest.program_ioapic(20, EDGE | 0x61)?;
                let raise = || vm.irq_line_status(Gsi(20), true);
                same("the line by default", raise()?, LineStatus::Delivered(1))?;
                vm.irq_line(Gsi(20), false)?;
                vm.set_gsi_routing(&[msi_route(30, message(0, 0x40))])?;
                same("the line without a route", raise()?, LineStatus::Ignored)
            },
        ),
        Case::new(
            "table-in-split-mode",
            "With the split irqchip a table of messages is legal, also for the reserved GSIs.",
            |p: &P| {
                let vm = p.vm_with_split_irqchip(24)?;
                let table = [msi_route(0, message(0, 0x40)), msi_route(30, message(0, 0x41))];
                Ok(vm.set_gsi_routing(&table)?)
            },
        ),
    ]
}

/// What the traits can't say.
fn unspeakable<P: Platform>() -> Vec<Case<P>> {
    let table = |name, rule, flags, entry: RawRoute| {
        Case::new(name, rule, move |p: &P| {
            let request = RawRequest::SetGsiRouting { flags, entries: vec![entry] };
            p.raw_refused(&p.vm_with_irqchip()?, &request, Errno::EINVAL)
        })
    };
    let pin = RawRoute { gsi: 4, kind: PIN, flags: 0, words: [2, 4, 0, 0] };
    let msi = RawRoute { gsi: 30, kind: MSI, flags: 0, words: [0xfee0_0000, 0, 0x40, 0] };
    vec![
        table(
            "table-unknown-type",
            "An entry of a type KVM does not know is refused with EINVAL.",
            0,
            RawRoute { kind: 99, ..msi },
        ),
        table(
            "table-pin-with-flags",
            "An entry for a pin that has flags is refused with EINVAL.",
            0,
            RawRoute { flags: 1, ..pin },
        ),
        table(
            "table-message-with-unknown-flag",
            "A message with a flag other than KVM_MSI_VALID_DEVID is refused with EINVAL.",
            0,
            RawRoute { flags: 2, ..msi },
        ),
        table("table-flags", "A table with flags is refused with EINVAL.", 1, msi),
    ]
}
