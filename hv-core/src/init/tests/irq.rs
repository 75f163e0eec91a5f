//! Rows 12 to 14: interrupt controllers and routing.

use super::host::Host;
use crate::init::{Config, Consequence, InitErrorKind, Irqchip, Irqfds, Request, Routing, Step};
use crate::{Capability, Context, Errno, Error, Ioctl};

const KERNEL: Irqchip = Irqchip::Kernel { pit: true };
const SPLIT: Irqchip = Irqchip::Split { pins: 24 };

fn config(irqchip: Irqchip) -> Config {
    Config { irqchip, ..Config::new(4096, 1) }
}

/// What was asked and done from the irqchip on.
fn irq_lines(host: &Host) -> Vec<String> {
    let irq = ["IRQCHIP", "PIT2", "IRQ_ROUTING", "KVM_CAP_IRQFD"];
    host.lines().into_iter().filter(|l| irq.iter().any(|word| l.contains(word))).collect()
}

#[test]
fn an_irqchip_off_asks_and_creates_nothing() {
    let host = Host::new();
    let vm = host.init(&config(Irqchip::Off)).unwrap();
    assert_eq!(irq_lines(&host), [""; 0]);
    let record = vm.record();
    assert_eq!((record.irqchip, record.routing), (Irqchip::Off, None));
    assert!(!record.async_interrupts());
    assert!(!record.irqfds.allowed && !record.irqfds.resample && !record.irqfds.msi);
    assert!(record.consequences.contains(&Consequence::NoIrqchip));
    assert!(!record.consequences.contains(&Consequence::NoHpet), "the VMM's I/O APIC can override");
}

#[test]
fn an_irqchip_in_the_kernel_has_the_timer_unless_told_otherwise() {
    let host = Host::new();
    let vm = host.init(&config(KERNEL)).unwrap();
    assert_eq!(
        irq_lines(&host),
        [
            "vm KVM_CAP_IRQCHIP",
            "KVM_CREATE_IRQCHIP",
            "vm KVM_CAP_PIT2",
            "KVM_CREATE_PIT2 flags 1",
            "vm KVM_CAP_IRQ_ROUTING",
            "vm KVM_CAP_IRQFD",
            "vm KVM_CAP_IRQFD_RESAMPLE",
        ]
    );
    assert_eq!(vm.record().irqchip, KERNEL);
    assert!(vm.record().async_interrupts());

    let without = Irqchip::Kernel { pit: false };
    let host = Host::new().with(Capability::Pit2, 0);
    assert_eq!(host.init(&config(without)).unwrap().record().irqchip, without);
    assert!(!irq_lines(&host).iter().any(|l| l.contains("PIT2")));
}

#[test]
fn a_split_irqchip_reserves_its_pins() {
    let host = Host::new();
    let vm = host.init(&config(SPLIT)).unwrap();
    let lines = irq_lines(&host);
    assert_eq!(
        lines[..2],
        ["vm KVM_CAP_SPLIT_IRQCHIP", "KVM_ENABLE_CAP KVM_CAP_SPLIT_IRQCHIP [24, 0, 0, 0]"]
    );
    assert!(!lines.iter().any(|l| l.contains("KVM_CREATE")));
    assert_eq!(vm.record().irqchip, SPLIT);
    assert!(vm.record().async_interrupts());
    assert!(vm.record().consequences.contains(&Consequence::SplitIrqchip));
}

#[test]
fn an_irqchip_asked_for_and_missing_is_an_error_never_a_fallback() {
    for (irqchip, capability, request, text) in [
        (KERNEL, Capability::Irqchip, Request::KernelIrqchip, "ask for no irqchip"),
        (KERNEL, Capability::Pit2, Request::Pit, "without the timer"),
        (
            SPLIT,
            Capability::SplitIrqchip,
            Request::SplitIrqchip,
            "ask for the irqchip in the kernel",
        ),
    ] {
        let host = Host::new().with(capability, 0);
        let error = host.refuses(&config(irqchip));
        let kind = InitErrorKind::Unsupported { request, capability };
        assert_eq!((error.step, &error.kind), (Step::Irqchip, &kind));
        let message = error.to_string();
        assert!(message.contains(&format!("KVM has no {capability} on this host")), "{message}");
        assert!(message.contains(text), "{message}");
        let lines = host.lines();
        assert_eq!(lines[lines.len() - 2..], ["VM closed", "hypervisor closed"]);
    }
}

#[test]
fn an_irqchip_that_cant_be_created_names_the_errno() {
    let split = Context::Capability(Capability::SplitIrqchip);
    for (irqchip, ioctl, context) in [
        (KERNEL, Ioctl::CreateIrqchip, Context::None),
        (KERNEL, Ioctl::CreatePit2, Context::None),
        (SPLIT, Ioctl::EnableCap, split),
    ] {
        let host = Host::new().failing(ioctl.name(), Errno::EEXIST);
        let error = host.refuses(&config(irqchip));
        let kind = InitErrorKind::Call(Error::new(ioctl, Errno::EEXIST).about(context));
        assert_eq!((error.step, &error.kind), (Step::Irqchip, &kind));
        assert!(error.to_string().contains("failed: EEXIST (File exists)"), "{error}");
        let lines = host.lines();
        assert_eq!(lines[lines.len() - 2..], ["VM closed", "hypervisor closed"]);
    }
}

#[test]
fn the_gsi_bitmap_is_whole_words_with_the_rest_taken() {
    for (gsi_count, bitmap_bits) in [
        (1, 64),
        (24, 64),
        (63, 64),
        (64, 64),
        (65, 128),
        (1024, 1024),
        (4096, 4096),
        (i32::MAX, 1 << 31),
    ] {
        for irqchip in [KERNEL, SPLIT] {
            let host = Host::new().with(Capability::IrqRouting, gsi_count);
            let vm = host.init(&config(irqchip)).unwrap();
            let gsi_count = gsi_count.unsigned_abs();
            let routing = Routing { gsi_count, bitmap_bits };
            assert_eq!(vm.record().routing, Some(routing));
            assert_eq!(routing.over_allocated_bits(), gsi_count..bitmap_bits);
            assert!(!host.lines().iter().any(|l| l.contains("GSI_ROUTING")), "the table is empty");
        }
    }
}

#[test]
fn without_routing_there_is_no_hpet() {
    for value in [0, -1] {
        let vm = Host::new().with(Capability::IrqRouting, value).init(&config(KERNEL)).unwrap();
        assert_eq!(vm.record().routing, None);
        assert!(vm.record().consequences.contains(&Consequence::NoHpet));
        let lacks = Consequence::Lacks(Capability::IrqRouting);
        assert!(!vm.record().consequences.contains(&lacks), "that would say it twice");
    }
    assert!(Consequence::NoHpet.to_string().contains("override of interrupt 0 to pin 2"));
    let vm = Host::new().init(&config(KERNEL)).unwrap();
    assert!(!vm.record().consequences.contains(&Consequence::NoHpet));
}

#[test]
fn irqfds_are_probed_and_follow_irqchip_and_routing() {
    // irqchip, IRQFD, IRQFD_RESAMPLE, IRQ_ROUTING; allowed, resample, MSI
    for (irqchip, irqfd, resample, routing, expected) in [
        (KERNEL, 1, 1, 4096, [true, true, true]),
        (KERNEL, 1, 0, 4096, [true, false, true]),
        (KERNEL, 1, 1, 0, [true, true, false]),
        (KERNEL, 0, 1, 4096, [false, false, false]),
        (SPLIT, 1, 1, 4096, [true, false, true]),
        (SPLIT, 0, 1, 4096, [false, false, false]),
    ] {
        let host = Host::new()
            .with(Capability::Irqfd, irqfd)
            .with(Capability::IrqfdResample, resample)
            .with(Capability::IrqRouting, routing);
        let vm = host.init(&config(irqchip)).unwrap();
        let Irqfds { allowed, resample, msi } = vm.record().irqfds;
        assert_eq!([allowed, resample, msi], expected, "{irqchip:?} {irqfd} {routing}");
    }
}
