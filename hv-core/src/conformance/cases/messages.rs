//! `KVM_SIGNAL_MSI`: who receives a message, and when (Intel SDM volume 3, "Advanced Programmable
//! Interrupt Controller").

use crate::conformance::bench::{Bench, Drive, message};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, RawRequest, Seen, VmOf};
use crate::{Capability, Errno, IrqBackend, Msi, MsiStatus, Vm};

/// Registers of the local APIC.
const TASK_PRIORITY: u64 = 0xfee0_0080;
const LOGICAL_DESTINATION: u64 = 0xfee0_00d0;
const DESTINATION_FORMAT: u64 = 0xfee0_00e0;
const SPURIOUS_VECTOR: u64 = 0xfee0_00f0;

/// Bits of a message's address: redirection hint and logical destination mode.
const HINT: u64 = 1 << 3;
const LOGICAL: u64 = 1 << 2;

/// Delivery modes in a message's data.
const LOWEST_PRIORITY: u32 = 1 << 8;
const NMI: u32 = 4 << 8;
const EXTERNAL: u32 = 7 << 8;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "message-before-irqchip",
            "A message is refused with EINVAL before there is an irqchip.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::SignalMsi)?;
                refused(vm.signal_msi(message(0, 0x51)), Errno::EINVAL)
            },
        ),
        Case::new(
            "message-unknown-flag",
            "A message with a flag other than KVM_MSI_VALID_DEVID is refused with EINVAL.",
            |p: &P| {
                let request =
                    RawRequest::SignalMsi { address: 0xfee0_0000, data: 0x51, flags: 2, device: 0 };
                p.raw_refused(&p.vm_with_irqchip()?, &request, Errno::EINVAL)
            },
        ),
        Case::new(
            "message-without-vcpus",
            "A message in a VM without vCPUs has no target (EPERM).",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::SignalMsi)?;
                same("its answer", vm.signal_msi(message(0, 0x51))?, MsiStatus::NoTarget)
            },
        ),
        Case::new("message-delivered", "A message is delivered to the vCPU it names.", |p: &P| {
            let (vm, [mut first, mut second]) = two(p)?;
            same("its answer", vm.signal_msi(message(1, 0x51))?, MsiStatus::Delivered)?;
            same("interrupts of vCPU 0", first.interrupts()?, Vec::new())?;
            same("interrupts of vCPU 1", second.interrupts()?, vec![0x51])
        }),
        Case::new(
            "message-with-device-id",
            "A message may have a device id, which changes nothing.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                let msi = Msi { device: Some(0x18), ..message(0, 0x51) };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Delivered)?;
                same("interrupts", guest.interrupts()?, vec![0x51])
            },
        )
        .kernels(Kernels::Since(4, 8, "EINVAL")),
        Case::new(
            "message-to-nobody",
            "A message to an APIC id that no vCPU has is delivered to nobody, with EPERM or, where KVM \
             looks the id up in its map, 0.",
            |p: &P| {
                let (vm, [mut first, mut second]) = two(p)?;
                let answer = vm.signal_msi(message(9, 0x51))?;
                holds(&format!("{answer:?} is not Delivered"), answer != MsiStatus::Delivered)?;
                same("interrupts of vCPU 0", first.interrupts()?, Vec::new())?;
                same("interrupts of vCPU 1", second.interrupts()?, Vec::new())
            },
        ),
        Case::new("message-to-all", "A message to APIC id 255 is delivered to every vCPU.", |p: &P| {
            let (vm, [mut first, mut second]) = two(p)?;
            same("its answer", vm.signal_msi(message(0xff, 0x51))?, MsiStatus::Delivered)?;
            same("interrupts of vCPU 0", first.interrupts()?, vec![0x51])?;
            same("interrupts of vCPU 1", second.interrupts()?, vec![0x51])
        }),
        Case::new(
            "message-logical",
            "A message with a logical destination is delivered to every vCPU it has a bit for.",
            |p: &P| {
                let (vm, [mut first, mut second]) = logical(p)?;
                let to = |ids| Msi { address: message(ids, 0).address | LOGICAL, ..message(0, 0x51) };
                same("the answer for one", vm.signal_msi(to(2))?, MsiStatus::Delivered)?;
                same("interrupts of vCPU 0", first.interrupts()?, Vec::new())?;
                same("interrupts of vCPU 1", second.interrupts()?, vec![0x51])?;
                same("the answer for two", vm.signal_msi(to(3))?, MsiStatus::Delivered)?;
                same("interrupts of vCPU 0", first.interrupts()?, vec![0x51])?;
                same("interrupts of vCPU 1", second.interrupts()?, vec![0x51])
            },
        ),
        Case::new(
            "message-lowest-priority",
            "A message with lowest priority is delivered to one of the vCPUs it names.",
            |p: &P| {
                let (vm, [mut first, mut second]) = logical(p)?;
                let address = message(3, 0).address | LOGICAL | HINT;
                let msi = Msi { address, data: 0x51 | LOWEST_PRIORITY, device: None };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Delivered)?;
                let both = [first.interrupts()?, second.interrupts()?].concat();
                same("interrupts of both", both, vec![0x51])
            },
        ),
        Case::new(
            "message-nmi",
            "A message can be a non-maskable interrupt; its vector does not matter.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                let msi = Msi { data: 0x51 | NMI, ..message(0, 0) };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Delivered)?;
                same("interrupts", guest.take_interrupts()?, vec![2])
            },
        ),
        Case::new(
            "message-to-a-disabled-apic",
            "A local APIC that is disabled by software takes no message.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                set(&mut guest, SPURIOUS_VECTOR, 0xff)?;
                let answer = vm.signal_msi(message(0, 0x51))?;
                holds(&format!("{answer:?} is not Delivered"), answer != MsiStatus::Delivered)?;
                set(&mut guest, SPURIOUS_VECTOR, 0x1ff)?;
                same("interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "message-below-the-task-priority",
            "An interrupt whose class is not above the task priority waits until it is.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                set(&mut guest, TASK_PRIORITY, 0x50)?;
                same("its answer", vm.signal_msi(message(0, 0x51))?, MsiStatus::Delivered)?;
                same("the answer above", vm.signal_msi(message(0, 0x61))?, MsiStatus::Delivered)?;
                same("interrupts", guest.interrupts()?, vec![0x61])?;
                set(&mut guest, TASK_PRIORITY, 0x40)?;
                same("interrupts then", guest.interrupts()?, vec![0x51])
            },
        ),
        Case::new(
            "messages-by-priority",
            "Of several pending interrupts the guest takes the highest vector first.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                for vector in [0x41, 0x71, 0x51] {
                    vm.signal_msi(message(0, vector))?;
                }
                same("interrupts", guest.interrupts()?, vec![0x71, 0x51, 0x41])
            },
        ),
        Case::new(
            "message-behind-one-in-service",
            "While an interrupt is in service one of the same class waits for its end; the same \
             vector may become pending again meanwhile.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                vm.signal_msi(message(0, 0x51))?;
                same("interrupts", guest.take_interrupts()?, vec![0x51])?;
                guest.needs_in_service(0x51)?;
                vm.signal_msi(message(0, 0x52))?;
                vm.signal_msi(message(0, 0x51))?;
                same("interrupts in service", guest.take_interrupts()?, Vec::new())?;
                same("who sees its end", guest.end_of_interrupt(0x51)?, Seen::ByKernel)?;
                same("interrupts then", guest.interrupts()?, vec![0x52, 0x51])
            },
        ),
        Case::new(
            "message-with-a-hint",
            "A fixed message with the redirection hint is delivered to one of the vCPUs it names.",
            |p: &P| {
                let (vm, [mut first, mut second]) = logical(p)?;
                let address = message(3, 0).address | LOGICAL | HINT;
                let msi = Msi { address, ..message(0, 0x51) };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Delivered)?;
                let both = [first.interrupts()?, second.interrupts()?].concat();
                same("interrupts of both", both, vec![0x51])
            },
        ),
        Case::new(
            "message-to-a-cluster",
            "In the cluster model a logical destination is a cluster and a bit for each of its members.",
            |p: &P| {
                let (vm, [mut first, mut second]) = two(p)?;
                for (guest, id) in [(&mut first, 0x11), (&mut second, 0x21)] {
                    set(guest, DESTINATION_FORMAT, 0x0fff_ffff)?;
                    set(guest, LOGICAL_DESTINATION, id << 24)?;
                }
                let address = message(0x11, 0).address | LOGICAL;
                let msi = Msi { address, ..message(0, 0x51) };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Delivered)?;
                same("interrupts of vCPU 0", first.interrupts()?, vec![0x51])?;
                same("interrupts of vCPU 1", second.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "message-external-interrupt",
            "A message can't be an external interrupt of a PIC: nobody takes it.",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                let msi = Msi { data: 0x51 | EXTERNAL, ..message(0, 0) };
                same("its answer", vm.signal_msi(msi)?, MsiStatus::Blocked)?;
                same("interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "message-with-32-bit-ids",
            "With 32-bit APIC ids bits 40 to 63 of a message's address are part of the id, and bits 32 \
             to 39 must be 0 (EINVAL).",
            |p: &P| {
                let (vm, [mut guest, _]) = two(p)?;
                p.needs(&vm, Capability::X2apicApi)?;
                vm.enable_cap(Capability::X2apicApi, [1, 0, 0, 0])?;
                let with = |high: u64| Msi { address: 0xfee0_0000 | high << 32, ..message(0, 0x51) };
                refused(vm.signal_msi(with(1)), Errno::EINVAL)?;
                let answer = vm.signal_msi(with(0x100))?;
                holds(&format!("{answer:?} is not Delivered"), answer != MsiStatus::Delivered)?;
                same("interrupts of vCPU 0", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "message-in-split-mode",
            "With the split irqchip messages are delivered as with the whole one.",
            |p: &P| {
                let vm = p.vm_with_split_irqchip(24)?;
                p.needs(&vm, Capability::SignalMsi)?;
                let mut guest = p.guest_on(&vm, 0)?;
                same("its answer", vm.signal_msi(message(0, 0x51))?, MsiStatus::Delivered)?;
                same("interrupts", guest.interrupts()?, vec![0x51])
            },
        ),
    ]
    .into_iter()
    .map(|case| match case.kernels {
        Kernels::All => case.kernels(Kernels::Since(3, 5, "no KVM_SIGNAL_MSI")),
        _ => case,
    })
    .collect()
}

/// A VM with an irqchip and two guests.
fn two<P: Platform>(p: &P) -> Checked<(VmOf<P>, [P::Guest; 2])> {
    let vm = p.vm_with_irqchip()?;
    p.needs(&vm, Capability::SignalMsi)?;
    let guests = [p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?];
    Ok((vm, guests))
}

/// The same, with logical ids 1 and 2 in the flat model.
fn logical<P: Platform>(p: &P) -> Checked<(VmOf<P>, [P::Guest; 2])> {
    let (vm, [mut first, mut second]) = two(p)?;
    set(&mut first, LOGICAL_DESTINATION, 1 << 24)?;
    set(&mut second, LOGICAL_DESTINATION, 2 << 24)?;
    Ok((vm, [first, second]))
}

/// Writes a register of the guest's local APIC.
fn set(guest: &mut impl Drive, register: u64, value: u32) -> Checked {
    same("who serves the local APIC", guest.store(register, &value.to_le_bytes())?, Seen::ByKernel)
}
