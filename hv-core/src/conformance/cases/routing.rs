//! `KVM_SET_GSI_ROUTING`: which tables are legal, and what a table does.

use crate::conformance::bench::{
    Bench, Drive, EDGE, LEVEL, await_signal, irqfd, message, msi_route, pin_route,
};
use crate::conformance::expect::{refused, same};
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, Seen};
use crate::{Errno, Gsi, IrqBackend, IrqchipId, Irqfd};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "table-before-irqchip",
            "A routing table is refused with EINVAL before there is an irqchip.",
            |p: &P| refused(p.vm()?.set_gsi_routing(&[]), Errno::EINVAL),
        ),
        Case::new(
            "refused-table-changes-nothing",
            "When a table is refused, the one before it stays in force and still delivers.",
            refused_table_changes_nothing,
        ),
        Case::new(
            "pin-in-split-mode",
            "With the split irqchip a route to a pin is refused with EINVAL.",
            pin_in_split_mode,
        ),
        Case::new(
            "default-routes-deliver-to-the-ioapic",
            "After KVM_CREATE_IRQCHIP GSI 20 leads to pin 20 of the I/O APIC without any table.",
            default_ioapic_route,
        ),
        Case::new(
            "default-routes-deliver-to-the-pic",
            "After KVM_CREATE_IRQCHIP GSI 4 leads to pin 4 of the PIC without any table.",
            default_pic_route,
        ),
        Case::new(
            "level-irqfd-resamples",
            "The guest ends the interrupt of a resample irqfd: the resample eventfd is signalled once.",
            level_irqfd_resamples,
        )
        .kernels(Kernels::Since(3, 7, "no resample irqfds")),
        Case::new(
            "level-irqfd-resamples-at-the-end-only",
            "The resample eventfd is not signalled before the guest ends the interrupt.",
            resamples_at_the_end_only,
        )
        .kernels(Kernels::Since(3, 7, "no resample irqfds")),
    ]
}

fn refused_table_changes_nothing<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let event = p.eventfd()?;
    vm.set_gsi_routing(&[msi_route(30, message(0, 0x51))])?;
    vm.irqfd_assign(&irqfd(&event, 30))?;
    let two = [msi_route(30, message(0, 0x52)), msi_route(30, message(0, 0x53))];
    refused(vm.set_gsi_routing(&two), Errno::EINVAL)?;
    event.signal();
    same("interrupts", guest.await_interrupts(1)?, vec![0x51])
}

fn pin_in_split_mode<P: Platform>(p: &P) -> Checked {
    let table = [pin_route(4, IrqchipId::IOAPIC, 4)];
    refused(p.vm_with_split_irqchip(24)?.set_gsi_routing(&table), Errno::EINVAL)
}

fn default_ioapic_route<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_ioapic(20, EDGE | 0x61)?;
    let event = p.eventfd()?;
    vm.irqfd_assign(&irqfd(&event, 20))?;
    event.signal();
    same("interrupts", guest.await_interrupts(1)?, vec![0x61])
}

fn default_pic_route<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_pics(0x20, 0x28)?;
    vm.irq_line(Gsi(4), true)?;
    same("interrupts", guest.await_interrupts(1)?, vec![0x24])
}

fn level_irqfd_resamples<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_ioapic(20, LEVEL | 0x62)?;
    let (event, resample) = (p.eventfd()?, p.eventfd()?);
    vm.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 20) })?;
    event.signal();
    same("interrupts", guest.await_interrupts(1)?, vec![0x62])?;
    same("resample signals", await_signal(&resample)?, 1)?;
    same("interrupts after that", guest.interrupts()?, vec![])
}

fn resamples_at_the_end_only<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.program_ioapic(20, LEVEL | 0x62)?;
    let (event, resample) = (p.eventfd()?, p.eventfd()?);
    vm.irqfd_assign(&Irqfd { resample: Some(resample.clone()), ..irqfd(&event, 20) })?;
    event.signal();
    same("interrupts", guest.await_taken()?, vec![0x62])?;
    guest.needs_in_service(0x62)?;
    same("resample signals before the end", resample.take(), None)?;
    same("who sees the end", guest.end_of_interrupt(0x62)?, Seen::ByKernel)?;
    same("resample signals", await_signal(&resample)?, 1)
}
