//! The pair of 8259s in the kernel, as a guest programs it (8259A data sheet).

use crate::conformance::bench::{Bench, Drive, await_signal, irqfd, pin_route};
use crate::conformance::expect::same;
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, Seen, VmOf};
use crate::{Capability, Gsi, IrqBackend, IrqchipId, Irqfd, LineStatus};

const COMMAND: u16 = 0x20;
const DATA: u16 = 0x21;
/// Edge/level control register of the first.
const ELCR: u16 = 0x4d0;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "pic-edge",
            "An edge-triggered pin of a PIC interrupts when it rises, not again while it is high.",
            |p: &P| {
                let (vm, mut guest) = pic(p)?;
                vm.irq_line(Gsi(4), true)?;
                same("interrupts", guest.interrupts()?, vec![0x24])?;
                vm.irq_line(Gsi(4), true)?;
                same("interrupts while it is high", guest.interrupts()?, Vec::new())?;
                vm.irq_line(Gsi(4), false)?;
                vm.irq_line(Gsi(4), true)?;
                same("interrupts of the next edge", guest.interrupts()?, vec![0x24])
            },
        ),
        Case::new(
            "pic-masked-keeps-an-edge",
            "A line to a masked pin of a PIC is ignored, says its status, but the request register has \
             it, and it interrupts once unmasked.",
            |p: &P| {
                let (vm, mut guest) = pic(p)?;
                out(&mut guest, DATA, 0xff)?;
                same("the status", vm.irq_line_status(Gsi(4), true)?, LineStatus::Ignored)?;
                same("interrupts", guest.interrupts()?, Vec::new())?;
                let requests = guest.port_in(COMMAND)?;
                same("the request register", requests, ([1 << 4], Seen::ByKernel))?;
                out(&mut guest, DATA, 0)?;
                same("interrupts once unmasked", guest.interrupts()?, vec![0x24])
            },
        ),
        Case::new(
            "pic-level-is-not-kept",
            "A level-triggered pin of a PIC that is low again when it is unmasked does not interrupt.",
            |p: &P| {
                let (vm, mut guest) = pic(p)?;
                out(&mut guest, ELCR, 1 << 5)?;
                out(&mut guest, DATA, 0xff)?;
                vm.irq_line(Gsi(5), true)?;
                vm.irq_line(Gsi(5), false)?;
                out(&mut guest, DATA, 0)?;
                same("interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "pic-edge-pins-stay-edge",
            "Timer, keyboard and cascade can't be made level-triggered.",
            |p: &P| {
                let (_vm, mut guest) = pic(p)?;
                out(&mut guest, ELCR, 0xff)?;
                same("the register", guest.port_in(ELCR)?, ([0xf8], Seen::ByKernel))
            },
        ),
        Case::new(
            "pic-in-service",
            "Without automatic end an interrupt of a PIC holds back those of lower priority until the \
             guest ends it.",
            |p: &P| {
                let (vm, mut guest) = pic(p)?;
                // ICW1 to 4, without AEOI; then no pin masked.
                for (port, word) in [(COMMAND, 0x11), (DATA, 0x20), (DATA, 4), (DATA, 1), (DATA, 0)]
                {
                    out(&mut guest, port, word)?;
                }
                vm.irq_line(Gsi(4), true)?;
                same("interrupts", guest.take_interrupts()?, vec![0x24])?;
                vm.irq_line(Gsi(5), true)?;
                same("interrupts before the end", guest.take_interrupts()?, Vec::new())?;
                out(&mut guest, COMMAND, 0x20)?;
                same("interrupts after the end", guest.take_interrupts()?, vec![0x25])
            },
        ),
        Case::new(
            "pic-resamples",
            "The end of an interrupt of a PIC resamples the irqfds of its GSI.",
            |p: &P| {
                let (vm, mut guest) = pic(p)?;
                p.needs(&vm, Capability::IrqfdResample)?;
                let (event, resample) = (p.eventfd()?, p.eventfd()?);
                vm.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 4) })?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x24])?;
                same("resample signals", await_signal(&resample)?, 1)
            },
        )
        .kernels(Kernels::Since(3, 7, "no resample irqfds")),
    ]
}

/// A VM of which GSIs 4 and 5 lead to a PIC alone, and a guest that has programmed the pair.
fn pic<P: Platform>(p: &P) -> Checked<(VmOf<P>, P::Guest)> {
    let vm = p.vm_with_irqchip()?;
    p.needs(&vm, Capability::IrqInjectStatus)?;
    vm.set_gsi_routing(&[4, 5].map(|pin| pin_route(pin, IrqchipId::PIC_MASTER, pin)))?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_pics(0x20, 0x28)?;
    Ok((vm, guest))
}

fn out(guest: &mut impl Drive, port: u16, value: u8) -> Checked {
    same("who serves the PIC", guest.port_out(port, &[value])?, Seen::ByKernel)
}
