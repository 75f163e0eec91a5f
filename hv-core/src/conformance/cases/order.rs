//! What must be created before what, and once.

use kvm_bindings::kvm_pit_config;

use crate::conformance::bench::{Bench, Drive, vcpu};
use crate::conformance::expect::{refused, same};
use crate::conformance::memory::{pages, slot};
use crate::conformance::{Case, Checked, Guest as _, Kernels, Platform, Seen, VmOf};
use crate::{Capability, Errno, MemoryBackend, Vcpu, VcpuExit, VcpuKick, Vm};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = irqchips();
    cases.extend(addresses());
    cases.extend(vcpus());
    cases
}

fn pit<P: Platform>(vm: &VmOf<P>) -> Result<(), crate::Error> {
    vm.create_pit2(kvm_pit_config::default())
}

fn split<P: Platform>(vm: &VmOf<P>, pins: u64) -> Result<(), crate::Error> {
    vm.enable_cap(Capability::SplitIrqchip, [pins, 0, 0, 0])
}

fn irqchips<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("irqchip-twice", "A second irqchip is refused with EEXIST.", |p: &P| {
            refused(p.vm_with_irqchip()?.create_irqchip(), Errno::EEXIST)
        }),
        Case::new(
            "irqchip-after-vcpu",
            "An irqchip is refused with EINVAL once a vCPU exists.",
            |p: &P| {
                let vm = p.vm()?;
                let _vcpu = vcpu::<P>(&vm, 0)?;
                refused(vm.create_irqchip(), Errno::EINVAL)
            },
        ),
        Case::new(
            "split-after-irqchip",
            "The split irqchip is refused with EEXIST after the whole one.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                p.needs(&vm, Capability::SplitIrqchip)?;
                refused(split::<P>(&vm, 24), Errno::EEXIST)
            },
        ),
        Case::new(
            "irqchip-after-split",
            "The whole irqchip is refused with EEXIST after the split one.",
            |p: &P| refused(p.vm_with_split_irqchip(24)?.create_irqchip(), Errno::EEXIST),
        ),
        Case::new("split-twice", "A second split irqchip is refused with EEXIST.", |p: &P| {
            refused(split::<P>(&p.vm_with_split_irqchip(24)?, 24), Errno::EEXIST)
        }),
        Case::new(
            "split-after-vcpu",
            "The split irqchip is refused with EEXIST once a vCPU exists.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::SplitIrqchip)?;
                let _vcpu = vcpu::<P>(&vm, 0)?;
                refused(split::<P>(&vm, 24), Errno::EEXIST)
            },
        ),
        Case::new(
            "split-with-too-many-pins",
            "A split irqchip with more pins than there can be routes is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::SplitIrqchip)?;
                let routes = p.needs(&vm, Capability::IrqRouting)?;
                refused(split::<P>(&vm, u64::from(routes.unsigned_abs()) + 1), Errno::EINVAL)
            },
        ),
        Case::new(
            "pit-before-irqchip",
            "A PIT is refused with ENOENT without an irqchip.",
            |p: &P| refused(pit::<P>(&p.vm()?), Errno::ENOENT),
        )
        .kernels(Kernels::Since(6, 8, "a PIT whose interrupts lead nowhere")),
        Case::new("pit-in-split-mode", "A PIT is refused with ENOENT in split mode.", |p: &P| {
            refused(pit::<P>(&p.vm_with_split_irqchip(24)?), Errno::ENOENT)
        })
        .kernels(Kernels::Since(6, 8, "a PIT whose interrupts lead nowhere")),
        Case::new("pit-twice", "A second PIT is refused with EEXIST.", |p: &P| {
            let vm = p.vm_with_irqchip()?;
            pit::<P>(&vm)?;
            refused(pit::<P>(&vm), Errno::EEXIST)
        }),
        Case::new(
            "pit-state-before-pit",
            "The state of a PIT that is not there is refused with ENXIO.",
            |p: &P| refused(p.vm_with_irqchip()?.pit2().map(|_| ()), Errno::ENXIO),
        ),
        Case::new(
            "irqchip-state-before-irqchip",
            "The state of an irqchip that is not there is refused with ENXIO.",
            |p: &P| refused(p.vm()?.irqchip(0).map(|_| ()), Errno::ENXIO),
        ),
        Case::new(
            "irqchip-state-in-split-mode",
            "The state of an I/O APIC is refused with ENXIO in split mode.",
            |p: &P| refused(p.vm_with_split_irqchip(24)?.irqchip(2).map(|_| ()), Errno::ENXIO),
        ),
    ]
}

fn addresses<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "identity-map-after-vcpu",
            "The identity map can't be placed once a vCPU exists (EINVAL).",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::SetIdentityMapAddr)?;
                let _vcpu = vcpu::<P>(&vm, 0)?;
                refused(vm.set_identity_map_addr(0xfeff_c000), Errno::EINVAL)
            },
        )
        .kernels(Kernels::Since(4, 14, "it can")),
        Case::new("tss-after-vcpu", "The TSS may be placed after a vCPU exists.", |p: &P| {
            let vm = p.vm()?;
            let _vcpu = vcpu::<P>(&vm, 0)?;
            Ok(vm.set_tss_addr(0xfeff_d000)?)
        }),
        Case::new(
            "tss-across-4-gib",
            "A TSS of which the last pages would lie above 4 GiB is refused with EINVAL.",
            |p: &P| refused(p.vm()?.set_tss_addr(0xffff_f000), Errno::EINVAL),
        ),
        Case::new(
            "tss-a-byte-above-the-last-place",
            "A TSS a byte above the last place whose three pages are below 4 GiB is refused with EINVAL.",
            |p: &P| refused(p.vm()?.set_tss_addr(0xffff_d001), Errno::EINVAL),
        ),
        Case::new("tss-above-4-gib", "A TSS above 4 GiB is refused with EINVAL.", |p: &P| {
            refused(p.vm()?.set_tss_addr(1 << 32), Errno::EINVAL)
        }),
        Case::new("mmu-pages-1", "One MMU page is refused with EINVAL.", |p: &P| {
            refused(p.vm()?.set_nr_mmu_pages(1), Errno::EINVAL)
        }),
        Case::new("mmu-pages-64", "64 MMU pages are enough.", |p: &P| {
            Ok(p.vm()?.set_nr_mmu_pages(64)?)
        }),
    ]
}

fn vcpus<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("vcpu-twice", "A vCPU id that is in use is refused with EEXIST.", |p: &P| {
            let vm = p.vm()?;
            let _vcpu = vcpu::<P>(&vm, 3)?;
            refused(vm.create_vcpu(3).map(|_| ()), Errno::EEXIST)
        }),
        Case::new(
            "vcpu-id-at-limit",
            "A vCPU id of KVM_CAP_MAX_VCPU_ID is refused with EINVAL; one less is taken.",
            |p: &P| {
                let vm = p.vm()?;
                let limit = p.needs(&vm, Capability::MaxVcpuId)?.unsigned_abs();
                refused(vm.create_vcpu(limit).map(|_| ()), Errno::EINVAL)?;
                vcpu::<P>(&vm, limit - 1).map(|_| ())
            },
        ),
        Case::new(
            "vcpu-keeps-the-vm",
            "A vCPU goes on working when its VM has been dropped.",
            keeps_the_vm,
        ),
        Case::new(
            "vcpu-kicked-before-it-runs",
            "A vCPU that was kicked returns at once, having run nothing; the kick is used up.",
            kicked_before_it_runs,
        ),
        Case::new(
            "lapic-without-irqchip",
            "There is no local APIC without an irqchip (EINVAL).",
            |p: &P| refused(vcpu::<P>(&p.vm()?, 0)?.lapic().map(|_| ()), Errno::EINVAL),
        ),
        Case::new(
            "interrupt-beside-irqchip",
            "An interrupt can't be injected beside in-kernel PICs (ENXIO).",
            |p: &P| refused(vcpu::<P>(&p.vm_with_irqchip()?, 0)?.interrupt(0x20), Errno::ENXIO),
        ),
        Case::new(
            "interrupt-in-split-mode-twice",
            "In split mode one external interrupt can be injected; a second before the guest took it \
             is EEXIST.",
            |p: &P| {
                let vm = p.vm_with_split_irqchip(24)?;
                let vcpu = vcpu::<P>(&vm, 0)?;
                vcpu.interrupt(0x20)?;
                refused(vcpu.interrupt(0x21), Errno::EEXIST)
            },
        ),
        Case::new(
            "second-vcpu-waits",
            "With an irqchip the first vCPU is runnable and others wait to be started.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                let states = [vcpu::<P>(&vm, 0)?, vcpu::<P>(&vm, 1)?];
                for (vcpu, expected) in states.iter().zip([0, 1]) {
                    same("the state", vcpu.mp_state()?.mp_state, expected)?;
                }
                Ok(())
            },
        ),
        Case::new(
            "second-vcpu-runs-without-irqchip",
            "Without an irqchip every vCPU is runnable.",
            |p: &P| {
                let vm = p.vm()?;
                let _first = vcpu::<P>(&vm, 0)?;
                same("the state", vcpu::<P>(&vm, 1)?.mp_state()?.mp_state, 0)
            },
        ),
    ]
}

fn keeps_the_vm<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.set_memory_slot(&slot(0, 0x1_0000, &pages(1)?))?;
    drop(vm);
    same("a write", guest.store(0x1_0000, &[7])?, Seen::ByKernel)?;
    same("what is read", guest.load(0x1_0000)?, ([7], Seen::ByKernel))
}

fn kicked_before_it_runs<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    guest.vcpu().kicker().kick()?;
    let before = guest.vcpu().regs()?.rip;
    same("the exit", guest.vcpu().run()?, VcpuExit::Interrupted)?;
    same("the instruction pointer", guest.vcpu().regs()?.rip, before)?;
    let next = guest.port_out(0x70, &[1])?;
    same("who sees what it does next", matches!(next, Seen::ByVmm(VcpuExit::Io(_))), true)
}
