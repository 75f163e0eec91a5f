//! Rules that nobody would ask about, found where random sequences on two implementations parted.

use crate::conformance::bench::{Bench, Drive, EDGE, message, msi_route, pin_route};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::{Case, Checked, Guest as _, Kernels, Miss, Platform, Seen, VmOf};
use crate::{
    Capability, Errno, Gsi, Hypervisor, IrqBackend, IrqchipId, LineStatus, Msi, MsiStatus, Vcpu,
    VcpuExit, Vm,
};

/// A level-triggered message.
const MESSAGE_LEVEL: u32 = 1 << 15 | 1 << 14;

/// `KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST`.
const DISABLE_SUPPRESS_EOI: u64 = 8;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "vcpu-id-limit-of-zero",
            "A limit of 0 for vCPU ids (KVM_CAP_MAX_VCPU_ID) leaves the limit open.",
            |p: &P| {
                let vm = limits_ids(p)?;
                vm.enable_cap(Capability::MaxVcpuId, [0; 4])?;
                vm.create_vcpu(1)?;
                Ok(())
            },
        ),
        Case::new(
            "vcpu-id-limit-after-a-refused-vcpu",
            "A vCPU whose id is beyond the host's limit settles no limit: one can be set after it.",
            |p: &P| {
                let vm = limits_ids(p)?;
                let limit = p.hypervisor().check_extension(Capability::MaxVcpuId)?.unsigned_abs();
                refused(vm.create_vcpu(limit).map(|_| ()), Errno::EINVAL)?;
                Ok(vm.enable_cap(Capability::MaxVcpuId, [8, 0, 0, 0])?)
            },
        ),
        Case::new(
            "directed-eoi",
            "A local APIC whose CPUID has x2APIC tells of directed EOI in split mode, and not beside \
             the I/O APIC of the kernel.",
            |p: &P| {
                let split = p.vm_with_split_irqchip(24)?;
                same("in split mode", tells_directed_eoi(p, &split)?, true)?;
                let full = p.vm_with_irqchip()?;
                same("with an I/O APIC in the kernel", tells_directed_eoi(p, &full)?, false)
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "directed-eoi-disabled",
            "Nor does it if the VMM disables that (KVM_CAP_X2APIC_API).",
            |p: &P| {
                let vm = p.vm_with_split_irqchip(24)?;
                let known = p.needs(&vm, Capability::X2apicApi)?;
                if u64::from(known.unsigned_abs()) & DISABLE_SUPPRESS_EOI == 0 {
                    return Err(Miss::not_applicable("this kernel can't disable it"));
                }
                vm.enable_cap(Capability::X2apicApi, [DISABLE_SUPPRESS_EOI, 0, 0, 0])?;
                same("whether it is told", tells_directed_eoi(p, &vm)?, false)
            },
        ),
        Case::new(
            "end-of-an-old-route",
            "In split mode the end of an interrupt that was pending when a level-triggered route with \
             its vector came is told, but only once.",
            end_of_an_old_route,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "message-where-two-share-an-id",
            "Where two local APICs have one id, a message to an id that none has finds no target; \
             else the guest blocks it.",
            |p: &P| {
                let nobody = message(2, 0x31);
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::SignalMsi)?;
                let _guest = p.guest_on(&vm, 0)?;
                same("ids of their own", vm.signal_msi(nobody)?, MsiStatus::Blocked)?;
                let vm = p.vm_with_irqchip()?;
                // 0 in a byte.
                let _other = vm.create_vcpu(256).map_err(Miss::not_applicable)?;
                let _guest = p.guest_on(&vm, 0)?;
                same("one id", vm.signal_msi(nobody)?, MsiStatus::NoTarget)
            },
        ),
        Case::new(
            "pic-initialized-while-it-asks",
            "An 8259 that is initialized while it asks for service goes on asking: the processor gets \
             the vector of its pin 7.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                let mut guest = p.guest_on(&vm, 0)?;
                for (port, word) in [(0x20, 0x11), (0x21, 0x70), (0x21, 4), (0x21, 1), (0x21, 0)] {
                    guest.port_out(port, &[word])?;
                }
                vm.irq_line(Gsi(4), true)?;
                guest.port_out(0x20, &[0x11])?;
                same("interrupts", guest.take_interrupts()?, vec![0x77])
            },
        ),
        Case::new(
            "clock-line-before-its-end",
            "A line to pin 8 of the I/O APIC, whose status is asked for, is coalesced until the \
             interrupt has ended, even if it is edge-triggered; no other pin is.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::IrqInjectStatus)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let routes = [8, 9].map(|pin| pin_route(pin, IrqchipId::IOAPIC, pin));
                vm.set_gsi_routing(&routes)?;
                let pulse = |gsi: u8| {
                    let status = vm.irq_line_status(Gsi(gsi.into()), true)?;
                    vm.irq_line(Gsi(gsi.into()), false)?;
                    Checked::Ok(status)
                };
                for (pin, vector, again) in
                    [(8, 0x61, LineStatus::Coalesced), (9, 0x71, LineStatus::Delivered(1))]
                {
                    guest.program_ioapic(pin, EDGE | vector)?;
                    same("the first", pulse(pin)?, LineStatus::Delivered(1))?;
                    same("before its end", pulse(pin)?, again)?;
                    guest.interrupts()?;
                    same("after its end", pulse(pin)?, LineStatus::Delivered(1))?;
                }
                Ok(())
            },
        ),
    ]
}

/// A VM whose vCPU ids can be limited.
fn limits_ids<P: Platform>(p: &P) -> Checked<VmOf<P>> {
    let vm = p.vm()?;
    match vm.enable_cap(Capability::MaxVcpuId, [u64::MAX, 0, 0, 0]) {
        // A kernel that can be asked refuses only what is too much.
        Err(_) if p.vm()?.enable_cap(Capability::MaxVcpuId, [8, 0, 0, 0]).is_ok() => Ok(vm),
        Err(error) => Err(Miss::not_applicable(error)),
        Ok(()) => Err(Miss::failed("a limit beyond that of the host is taken")),
    }
}

/// Whether the version register of a local APIC with x2APIC has the bit (Intel SDM volume 3,
/// "Local APIC Version Register").
fn tells_directed_eoi<P: Platform>(p: &P, vm: &VmOf<P>) -> Checked<bool> {
    let cpuid = p.hypervisor().supported_cpuid()?;
    if !cpuid.iter().any(|leaf| leaf.function == 1 && leaf.ecx & 1 << 21 != 0) {
        return Err(Miss::not_applicable("no x2APIC"));
    }
    let vcpu = vm.create_vcpu(0)?;
    let tells = || Checked::Ok(vcpu.lapic()?.regs.get(0x33).is_some_and(|byte| byte & 1 != 0));
    holds("it is not told without x2APIC", !tells()?)?;
    vcpu.set_cpuid(&cpuid)?;
    tells()
}

fn end_of_an_old_route<P: Platform>(p: &P) -> Checked {
    const VECTOR: u8 = 0x31;
    let vm = p.vm_with_split_irqchip(24)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let edge = msi_route(30, message(0, VECTOR));
    let elsewhere = Msi { data: MESSAGE_LEVEL | u32::from(VECTOR), ..message(5, 0) };
    vm.set_gsi_routing(&[edge])?;
    vm.irq_line(Gsi(30), true)?;
    vm.set_gsi_routing(&[edge, msi_route(0, elsewhere)])?;
    let told = Seen::ByVmm(VcpuExit::IoapicEoi { vector: VECTOR });
    for (what, expected) in [("the first end", told), ("the second end", Seen::ByKernel)] {
        same("interrupts", guest.take_interrupts()?, vec![VECTOR])?;
        same(what, guest.end_of_interrupt(VECTOR)?, expected)?;
        vm.irq_line(Gsi(30), true)?;
    }
    Ok(())
}
