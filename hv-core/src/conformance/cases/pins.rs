//! Pins of the I/O APIC: who holds a line, and what a redirection entry remembers (82093AA manual).

use kvm_bindings::{
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
};

use crate::conformance::bench::{
    Bench, Drive, EDGE, LEVEL, await_signal, irqfd, message, msi_route, pin_route,
};
use crate::conformance::expect::same;
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, Seen, VmOf};
use crate::{Capability, EventFd, Gsi, IrqBackend, IrqchipId, Irqfd, LineStatus, Vm};

const MASKED: u64 = 1 << 16;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = lines();
    cases.extend(resamplers().into_iter().map(|c| c.kernels(Kernels::Measured("Linux 6.18"))));
    cases
}

fn lines<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "irqfd-of-a-pin-is-a-pulse",
            "An event of an irqfd raises and lowers its pin: the next event is another edge.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, EDGE)?;
                let event = p.eventfd()?;
                vm.irqfd_assign(&irqfd(&event, 20))?;
                for _ in 0..2 {
                    event.signal();
                    same("interrupts", guest.await_interrupts(1)?, vec![0x61])?;
                }
                Ok(())
            },
        ),
        Case::new("line-lowered", "Lowering a line to a pin counts as delivered.", |p: &P| {
            let (vm, _guest) = with_pin_20(p, EDGE)?;
            same("the status", vm.irq_line_status(Gsi(20), false)?, LineStatus::Delivered(1))
        })
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "line-status-counts-targets",
            "The status of a line says how many vCPUs took its interrupt.",
            |p: &P| {
                let (vm, _guest) = with_pin_20(p, EDGE)?;
                let _second = p.guest_on(&vm, 1)?;
                vm.set_gsi_routing(&[msi_route(30, message(0xff, 0x51))])?;
                same("the status", vm.irq_line_status(Gsi(30), true)?, LineStatus::Delivered(2))
            },
        ),
        Case::new(
            "ioapic-store-keeps-remote-irr",
            "A store to a level-triggered entry does not clear its remote IRR: a line before the end \
             is still ignored.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL)?;
                same("the status", pulse::<P>(&vm)?, LineStatus::Delivered(1))?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                same("the status after a store", pulse::<P>(&vm)?, LineStatus::Ignored)
            },
        ),
        Case::new(
            "ioapic-edge-clears-remote-irr",
            "Making an entry edge-triggered clears its remote IRR, and level-triggered again it \
             delivers at once.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL)?;
                same("the status", pulse::<P>(&vm)?, LineStatus::Delivered(1))?;
                guest.program_ioapic(20, EDGE | MASKED | 0x61)?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                same("the status after that", pulse::<P>(&vm)?, LineStatus::Delivered(1))
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "irqchip-state-requests-pins",
            "A pin that is requested in the state of an I/O APIC that is set interrupts.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, EDGE | MASKED)?;
                let mut redirtbl = [kvm_ioapic_state__bindgen_ty_1 { bits: MASKED }; 24];
                if let Some(entry) = redirtbl.get_mut(20) {
                    entry.bits = EDGE | 0x62;
                }
                let ioapic = kvm_ioapic_state {
                    base_address: 0xfec0_0000,
                    irr: 1 << 20,
                    redirtbl,
                    ..Default::default()
                };
                let mut chip = kvm_irqchip__bindgen_ty_1 { dummy: [0; 512] };
                chip.ioapic = ioapic;
                vm.set_irqchip(&kvm_irqchip { chip_id: IrqchipId::IOAPIC.0, pad: 0, chip })?;
                same("interrupts", guest.interrupts()?, vec![0x62])
            },
        ),
    ]
}

/// Resample irqfds.
fn resamplers<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "resample-asks-when-unmasked",
            "When a pin is unmasked whose line a resample irqfd holds, that is asked first.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL | MASKED)?;
                // Also to a masked pin of a PIC, where the guest sees that the event has come: KVM sets
                // pins in the order of the table.
                let pic = pin_route(20, IrqchipId::PIC_MASTER, 3);
                vm.set_gsi_routing(&[pin_route(20, IrqchipId::IOAPIC, 20), pic])?;
                for (port, byte) in [(0x21, 0xff), (0x20, 0x0a)] {
                    same("who serves the PIC", guest.port_out(port, &[byte])?, Seen::ByKernel)?;
                }
                let (event, resample) = resampler::<P>(p, &vm, 20)?;
                event.signal();
                guest.await_port(0x20, 1 << 3)?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                same("resample signals", await_signal(&resample)?, 1)
            },
        ),
        Case::new(
            "resample-unbound-lowers-its-line",
            "Unbinding the only resample irqfd of a GSI lowers the line it held.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL | MASKED)?;
                let (event, _resample) = resampler::<P>(p, &vm, 20)?;
                event.signal();
                vm.irqfd_deassign(&event, Gsi(20))?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                same("interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "line-held-by-two",
            "A line that KVM_IRQ_LINE holds stays high when a resample irqfd lets go of it.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL | MASKED)?;
                vm.irq_line(Gsi(20), true)?;
                let (event, _resample) = resampler::<P>(p, &vm, 20)?;
                event.signal();
                vm.irqfd_deassign(&event, Gsi(20))?;
                guest.program_ioapic(20, LEVEL | 0x61)?;
                vm.irq_line(Gsi(20), false)?;
                same("interrupts", guest.interrupts()?, vec![0x61])
            },
        ),
        Case::new(
            "resample-of-its-gsi-only",
            "The end of an interrupt resamples the irqfds of its GSI, and no others.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL)?;
                let (event, resample) = resampler::<P>(p, &vm, 20)?;
                let (_other, other_resample) = resampler::<P>(p, &vm, 21)?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x61])?;
                same("resample signals", await_signal(&resample)?, 1)?;
                same("resample signals of the other", other_resample.take(), None)
            },
        ),
        Case::new(
            "resample-of-the-last-gsi-on-a-pin",
            "Of two GSIs on one pin the last in the table hears of the end.",
            |p: &P| {
                let (vm, mut guest) = with_pin_20(p, LEVEL)?;
                let ioapic = IrqchipId::IOAPIC;
                vm.set_gsi_routing(&[pin_route(40, ioapic, 20), pin_route(41, ioapic, 20)])?;
                let (event, resample) = resampler::<P>(p, &vm, 41)?;
                event.signal();
                same("interrupts", guest.await_taken()?, vec![0x61])?;
                guest.end_of_interrupt(0x61)?;
                same("resample signals", await_signal(&resample)?, 1)
            },
        ),
    ]
}

/// A VM with a guest whose I/O APIC has `entry` with vector 0x61 for pin 20, where GSI 20 leads.
fn with_pin_20<P: Platform>(p: &P, entry: u64) -> Checked<(VmOf<P>, P::Guest)> {
    let vm = p.vm_with_irqchip()?;
    p.needs(&vm, Capability::IrqInjectStatus)?;
    p.needs(&vm, Capability::IrqfdResample)?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_ioapic(20, entry | 0x61)?;
    Ok((vm, guest))
}

/// Raises and lowers GSI 20: the status of it being raised.
fn pulse<P: Platform>(vm: &VmOf<P>) -> Checked<LineStatus> {
    let status = vm.irq_line_status(Gsi(20), true)?;
    vm.irq_line(Gsi(20), false)?;
    Ok(status)
}

/// A resample irqfd on `gsi`: its event and its resample event.
fn resampler<P: Platform>(p: &P, vm: &VmOf<P>, gsi: u32) -> Checked<(EventFd, EventFd)> {
    let (event, resample) = (p.eventfd()?, p.eventfd()?);
    vm.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, gsi) })?;
    Ok((event, resample))
}
