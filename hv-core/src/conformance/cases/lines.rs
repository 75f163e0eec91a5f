//! `KVM_IRQ_LINE` and `KVM_IRQ_LINE_STATUS`: what becomes of a line that is set (82093AA and 8259A
//! manuals).

use crate::conformance::bench::{Bench, Drive, EDGE, LEVEL, message, msi_route, pin_route};
use crate::conformance::expect::{refused, same};
use crate::conformance::{Case, Checked, Guest as _, Platform, Seen, VmOf};
use crate::{Capability, Errno, Gsi, IrqBackend, IrqchipId, LineStatus};

/// An I/O APIC entry that is masked.
const MASKED: u64 = 1 << 16;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "line-before-irqchip",
            "A line is refused with ENXIO before there is an irqchip.",
            |p: &P| refused(p.vm()?.irq_line(Gsi(4), true), Errno::ENXIO),
        ),
        Case::new(
            "line-status-before-irqchip",
            "A line whose status is asked for is refused with ENXIO before there is an irqchip.",
            |p: &P| refused(p.vm()?.irq_line_status(Gsi(4), true), Errno::ENXIO),
        ),
        Case::new(
            "line-unrouted",
            "A line without a route is ignored, without an error.",
            |p: &P| {
                let (vm, _guest) = vm(p)?;
                same("the status", vm.irq_line_status(Gsi(2000), true)?, LineStatus::Ignored)?;
                Ok(vm.irq_line(Gsi(2000), true)?)
            },
        ),
        Case::new("line-masked", "A line whose pin is masked is ignored.", |p: &P| {
            let (vm, mut guest) = vm(p)?;
            guest.program_ioapic(20, EDGE | MASKED | 0x61)?;
            same("the status", vm.irq_line_status(Gsi(20), true)?, LineStatus::Ignored)?;
            same("interrupts", guest.interrupts()?, Vec::new())
        }),
        Case::new(
            "line-edge",
            "An edge-triggered line is delivered when it rises: raised again it is coalesced, lowered \
             and raised again delivered.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_ioapic(20, EDGE | 0x61)?;
                let raise = || vm.irq_line_status(Gsi(20), true);
                same("the status", raise()?, LineStatus::Delivered(1))?;
                same("the status while it is high", raise()?, LineStatus::Coalesced)?;
                same("interrupts", guest.interrupts()?, vec![0x61])?;
                vm.irq_line(Gsi(20), false)?;
                same("the status of the next edge", raise()?, LineStatus::Delivered(1))?;
                same("interrupts of the next edge", guest.interrupts()?, vec![0x61])
            },
        ),
        Case::new(
            "line-level-before-its-end",
            "A level-triggered line that is raised again before the end of its interrupt is ignored.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                let raise = || vm.irq_line_status(Gsi(20), true);
                same("the status", raise()?, LineStatus::Delivered(1))?;
                same("the status before its end", raise()?, LineStatus::Ignored)?;
                vm.irq_line(Gsi(20), false)?;
                same("the status of the next edge", raise()?, LineStatus::Ignored)?;
                vm.irq_line(Gsi(20), false)?;
                same("interrupts", guest.interrupts()?, vec![0x61])?;
                same("the status after its end", raise()?, LineStatus::Delivered(1))
            },
        ),
        Case::new(
            "line-level-stays",
            "A level-triggered line that is still high at the end of its interrupt interrupts again; \
             one that is low does not.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                // With a low line first: a KVM that ends interrupts when they are taken would go on
                // interrupting.
                vm.irq_line(Gsi(20), true)?;
                vm.irq_line(Gsi(20), false)?;
                same("interrupts", guest.await_taken()?, vec![0x61])?;
                guest.needs_in_service(0x61)?;
                vm.irq_line(Gsi(20), true)?;
                same("who sees its end", guest.end_of_interrupt(0x61)?, Seen::ByKernel)?;
                same("interrupts while high", guest.await_taken()?, vec![0x61])?;
                vm.irq_line(Gsi(20), false)?;
                same("who sees its end", guest.end_of_interrupt(0x61)?, Seen::ByKernel)?;
                same("interrupts while low", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "line-level-unmasked",
            "A level-triggered line that is high when its pin is unmasked interrupts then.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_ioapic(20, LEVEL | MASKED | 0x61)?;
                vm.irq_line(Gsi(20), true)?;
                same("interrupts while masked", guest.interrupts()?, Vec::new())?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                vm.irq_line(Gsi(20), false)?;
                same("interrupts", guest.interrupts()?, vec![0x61])
            },
        ),
        Case::new(
            "line-to-pic-and-ioapic",
            "A line that leads to both controllers is delivered by both.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                let (pic, ioapic) = (IrqchipId::PIC_MASTER, IrqchipId::IOAPIC);
                vm.set_gsi_routing(&[pin_route(4, pic, 4), pin_route(4, ioapic, 4)])?;
                guest.program_pics(0x20, 0x28)?;
                guest.program_ioapic(4, EDGE | 0x61)?;
                vm.irq_line(Gsi(4), true)?;
                let mut taken = guest.interrupts()?;
                taken.sort_unstable();
                same("interrupts", taken, vec![0x24, 0x61])
            },
        ),
        Case::new(
            "line-of-slave-pic",
            "GSI 9 leads to pin 1 of the slave PIC by default, through the master's pin 2.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_pics(0x20, 0x28)?;
                vm.irq_line(Gsi(9), true)?;
                same("interrupts", guest.interrupts()?, vec![0x29])
            },
        ),
        Case::new(
            "line-0-leads-to-ioapic-pin-0",
            "KVM's default routes have GSI 0 on pin 0 of the I/O APIC; only a VMM moves it to pin 2.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                guest.program_pics(0x20, 0x28)?;
                // Masked, for GSI 0 leads to the PIC, too.
                same("who serves the PIC", guest.port_out(0x21, &[0xff])?, Seen::ByKernel)?;
                guest.program_ioapic(0, EDGE | 0x61)?;
                guest.program_ioapic(2, EDGE | 0x62)?;
                vm.irq_line(Gsi(0), true)?;
                same("interrupts", guest.interrupts()?, vec![0x61])
            },
        ),
        Case::new(
            "line-of-a-message",
            "Raising a line whose GSI leads to a message sends it; lowering does nothing.",
            |p: &P| {
                let (vm, mut guest) = vm(p)?;
                vm.set_gsi_routing(&[msi_route(30, message(0, 0x51))])?;
                same("the status", vm.irq_line_status(Gsi(30), true)?, LineStatus::Delivered(1))?;
                same("interrupts", guest.interrupts()?, vec![0x51])?;
                same("the status low", vm.irq_line_status(Gsi(30), false)?, LineStatus::Ignored)?;
                same("interrupts then", guest.interrupts()?, Vec::new())
            },
        ),
    ]
}

/// A VM with an irqchip that says what became of a line, and a guest.
fn vm<P: Platform>(p: &P) -> Checked<(VmOf<P>, P::Guest)> {
    let vm = p.vm_with_irqchip()?;
    p.needs(&vm, Capability::IrqInjectStatus)?;
    let guest = p.guest_on(&vm, 0)?;
    Ok((vm, guest))
}
