//! `KVM_RUN`: what comes to the VMM, and what the VMM makes the guest take.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{refused, same};
use crate::conformance::memory::{PAGE, pages, peek, slot};
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, Seen};
use crate::{Errno, IoAddress, IoDirection, IoExit, MemoryBackend, MmioExit, Vcpu, VcpuExit, Vm};

/// Nothing is here in the VMs of these cases.
const NOWHERE: u64 = 0x4000_0000;
const NO_PORT: u16 = 0x510;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "exit-mmio-says-all-of-the-access",
            "An access to no memory exits with its address, direction, data and 1, 2, 4 or 8 bytes.",
            mmio_exits,
        ),
        Case::new(
            "exit-io-says-all-of-the-access",
            "An access to a port exits with the port, its direction and 1, 2 or 4 bytes.",
            io_exits,
        ),
        Case::new(
            "access-across-slots",
            "An access that crosses from one slot into the next does not exit and reaches both.",
            across_slots,
        ),
        Case::new("nmi-taken-once", "KVM_NMI makes the guest take vector 2, once.", nmi_taken),
        Case::new(
            "nmi-one-behind-another",
            "Of several non-maskable interrupts KVM keeps two for the guest.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                let mut guest = p.guest_on(&vm, 0)?;
                for _ in 0..3 {
                    guest.vcpu().nmi()?;
                }
                let taken = [guest.take_interrupts()?, guest.take_interrupts()?].concat();
                same("interrupts", taken, vec![2, 2])
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "lapic-state-keeps-its-version",
            "The version of a local APIC can't be set.",
            |p: &P| {
                const VERSION: usize = 0x30;
                let vm = p.vm_with_irqchip()?;
                let vcpu = vm.create_vcpu(0)?;
                let before = vcpu.lapic()?;
                let mut other = before;
                if let Some(version) = other.regs.get_mut(VERSION) {
                    *version ^= 0x7f;
                }
                vcpu.set_lapic(&other)?;
                same("the state", vcpu.lapic()?.regs.get(VERSION), before.regs.get(VERSION))
            },
        ),
        Case::new(
            "interrupt-injected-over-another",
            "Without an irqchip a second KVM_INTERRUPT is no error.",
            |p: &P| {
                let vm = p.vm()?;
                let mut guest = p.guest_on(&vm, 0)?;
                guest.vcpu().interrupt(0x40)?;
                Ok(guest.vcpu().interrupt(0x41)?)
            },
        ),
        Case::new(
            "interrupt-injected-without-irqchip",
            "Without an irqchip KVM_INTERRUPT makes the guest take the vector, once.",
            injected_without_irqchip,
        ),
        Case::new(
            "interrupt-injected-beside-irqchip",
            "With the irqchip in the kernel KVM_INTERRUPT is refused with ENXIO.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                refused(p.guest_on(&vm, 0)?.vcpu().interrupt(0x40), Errno::ENXIO)
            },
        ),
        Case::new(
            "interrupt-injected-in-split-mode",
            "With the split irqchip KVM_INTERRUPT is the VMM's PIC: one at a time, else EEXIST.",
            injected_in_split_mode,
        ),
        Case::new("guests-on-two-vcpus", "What one vCPU stores, another loads.", two_vcpus),
    ]
}

fn mmio_exits<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    // One that is far above 4 GiB as well.
    for base in [NOWHERE, 0x10_0000_0000] {
        for len in [1u8, 2, 4, 8] {
            let address = base + u64::from(len);
            let all = [1, 2, 3, 4, 5, 6, 7, 8];
            let data = all.get(..len.into()).unwrap_or_default();
            let mut written = [0; 8];
            written.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            let seen = match guest.store(address, data)? {
                // What is behind the data in KVM's field is not said.
                Seen::ByVmm(VcpuExit::Mmio(MmioExit { address, len, written: Some(bytes) })) => {
                    let mut only = [0; 8];
                    only.iter_mut().zip(bytes).take(len.into()).for_each(|(to, b)| *to = b);
                    Seen::ByVmm(VcpuExit::Mmio(MmioExit { address, len, written: Some(only) }))
                }
                seen => seen,
            };
            let exit = |written| Seen::ByVmm(VcpuExit::Mmio(MmioExit { address, len, written }));
            same("a write", seen, exit(Some(written)))?;
            let mut read = [0; 8];
            let into = read.get_mut(..len.into()).unwrap_or_default();
            same("a read", guest.read(IoAddress::Mmio(address), into)?, exit(None))?;
            let answered = into.iter().all(|byte| *byte == 0xff);
            same("the guest reads what the VMM answers", answered, true)?;
        }
    }
    Ok(())
}

fn io_exits<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    for size in [1u8, 2, 4] {
        let exit = |direction| {
            Seen::ByVmm(VcpuExit::Io(IoExit { direction, port: NO_PORT, size, count: 1 }))
        };
        let mut data = [1, 2, 3, 4];
        let data = data.get_mut(..size.into()).unwrap_or_default();
        same("a write", guest.port_out(NO_PORT, data)?, exit(IoDirection::Out))?;
        same("a read", guest.read(IoAddress::Pio(NO_PORT), data)?, exit(IoDirection::In))?;
        let answered = data.iter().all(|byte| *byte == 0xff);
        same("the guest reads what the VMM answers", answered, true)?;
    }
    Ok(())
}

fn across_slots<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let (low, high) = (pages(1)?, pages(1)?);
    vm.set_memory_slot(&slot(0, NOWHERE, &low))?;
    vm.set_memory_slot(&slot(1, NOWHERE + PAGE as u64, &high))?;
    let border = NOWHERE + PAGE as u64 - 3;
    same("a write", guest.store(border, &[1, 2, 3, 4, 5, 6, 7, 8])?, Seen::ByKernel)?;
    same("the lower slot", peek(&low, PAGE - 3, 3), vec![1, 2, 3])?;
    same("the upper slot", peek(&high, 0, 6), vec![4, 5, 6, 7, 8, 0])?;
    same("a read", guest.load(border)?, ([1, 2, 3, 4, 5, 6, 7, 8], Seen::ByKernel))
}

fn nmi_taken<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.vcpu().nmi()?;
    same("interrupts", guest.take_interrupts()?, vec![2])?;
    same("interrupts after that", guest.take_interrupts()?, vec![])
}

fn injected_without_irqchip<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.vcpu().interrupt(0x40)?;
    same("interrupts", guest.take_interrupts()?, vec![0x40])?;
    same("interrupts after that", guest.take_interrupts()?, vec![])
}

fn injected_in_split_mode<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_split_irqchip(24)?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.vcpu().interrupt(0x40)?;
    refused(guest.vcpu().interrupt(0x41), Errno::EEXIST)?;
    same("interrupts", guest.take_interrupts()?, vec![0x40])?;
    guest.vcpu().interrupt(0x41)?;
    same("interrupts after that", guest.take_interrupts()?, vec![0x41])
}

fn two_vcpus<P: Platform>(p: &P) -> Checked {
    let vm = p.vm_with_irqchip()?;
    let (mut first, mut second) = (p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?);
    let memory = pages(1)?;
    vm.set_memory_slot(&slot(0, NOWHERE, &memory))?;
    same("a write", first.store(NOWHERE, &[1, 2, 3, 4])?, Seen::ByKernel)?;
    same("a read", second.load(NOWHERE)?, ([1, 2, 3, 4], Seen::ByKernel))
}
