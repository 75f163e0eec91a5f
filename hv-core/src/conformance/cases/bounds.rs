//! Where a limit lies exactly: the last value that is taken or the first that is refused.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config, kvm_pit_state2};

use crate::conformance::bench::{Bench, Drive, vcpu};
use crate::conformance::expect::{refused, same};
use crate::conformance::memory::{pages, slot};
use crate::conformance::{Case, Checked, Kernels, Miss, Platform, Seen, VmOf};
use crate::{Capability, CoalescedZone, Errno, IoAddress, MemoryBackend, Vm};

/// Flags of `KVM_CAP_X2APIC_API`.
const ENABLE_SUPPRESS_EOI: u64 = 4;
const DISABLE_SUPPRESS_EOI: u64 = 8;

/// Devices an in-kernel I/O bus takes (`NR_IOBUS_DEVS`).
const BUS_DEVICES: u16 = 1000;
/// Those of the 8259 pair on the bus of ports.
const PIC_DEVICES: u16 = 3;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = creation();
    cases.extend(memory());
    cases.extend(x2apic_api());
    cases
}

fn creation<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "tss-just-below-4-gib",
            "A TSS whose third page is the last below 4 GiB is taken.",
            |p: &P| Ok(p.vm()?.set_tss_addr(0xffff_d000)?),
        ),
        Case::new("mmu-pages-63", "63 MMU pages are refused with EINVAL.", |p: &P| {
            refused(p.vm()?.set_nr_mmu_pages(63), Errno::EINVAL)
        }),
        Case::new(
            "split-with-all-pins",
            "A split irqchip may have as many pins as there can be routes.",
            |p: &P| {
                let vm = p.vm()?;
                let routes = p.needs(&vm, Capability::IrqRouting)?;
                p.vm_with_split_irqchip(routes.unsigned_abs().into()).map(|_| ())
            },
        ),
        Case::new(
            "irqchip-twice-after-vcpu",
            "A second irqchip is refused with EEXIST also once a vCPU exists.",
            |p: &P| {
                let vm = p.vm_with_irqchip()?;
                let _vcpu = vcpu::<P>(&vm, 0)?;
                refused(vm.create_irqchip(), Errno::EEXIST)
            },
        ),
        Case::new(
            "irqchip-state-of-chip-3",
            "The state of an irqchip there is none of is refused with EINVAL.",
            |p: &P| refused(p.vm_with_irqchip()?.irqchip(3).map(|_| ()), Errno::EINVAL),
        ),
        Case::new(
            "pit-state-set-before-pit",
            "Setting the state of a PIT that is not there is refused with ENXIO.",
            |p: &P| refused(p.vm_with_irqchip()?.set_pit2(&kvm_pit_state2::default()), Errno::ENXIO),
        ),
        Case::new("pit-serves-its-ports", "With a PIT its ports do not exit.", |p: &P| {
            let vm = p.vm_with_irqchip()?;
            let mut guest = p.guest_on(&vm, 0)?;
            vm.create_pit2(kvm_pit_config::default())?;
            same("a write to its control word", guest.port_out(0x43, &[0x30])?, Seen::ByKernel)?;
            same("a read of its counter", guest.port_in::<1>(0x40)?.1, Seen::ByKernel)
        }),
        Case::new(
            "irqchip-on-a-full-bus",
            "An irqchip there is no room for is refused with ENOSPC, and nothing of it is there.",
            irqchip_on_a_full_bus,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "pit-speaker-port",
            "A PIT serves the port of the speaker only if it is asked to (KVM_PIT_SPEAKER_DUMMY).",
            |p: &P| {
                for (flags, served) in [(0, false), (KVM_PIT_SPEAKER_DUMMY, true)] {
                    let vm = p.vm_with_irqchip()?;
                    let mut guest = p.guest_on(&vm, 0)?;
                    vm.create_pit2(kvm_pit_config { flags, ..Default::default() })?;
                    let seen = guest.port_out(0x61, &[0])?;
                    same(&format!("served with flags {flags}"), seen == Seen::ByKernel, served)?;
                }
                Ok(())
            },
        ),
        Case::new("pit-on-a-full-bus", "A PIT there is no room for is ENOMEM.", |p: &P| {
            let vm = p.vm_with_irqchip()?;
            p.needs(&vm, Capability::CoalescedPio)?;
            for n in 0..BUS_DEVICES - PIC_DEVICES {
                let address = IoAddress::Pio(0x1000 + n);
                vm.register_coalesced_zone(CoalescedZone { address, size: 1 })?;
            }
            refused(vm.create_pit2(kvm_pit_config::default()), Errno::ENOMEM)
        })
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new("clock-unknown-flag", "A clock with an unknown flag is EINVAL.", |p: &P| {
            let clock = kvm_clock_data { flags: 1 << 31, ..Default::default() };
            refused(p.vm()?.set_clock(&clock), Errno::EINVAL)
        })
        .kernels(Kernels::Since(4, 9, "flags are not looked at")),
        Case::new(
            "vcpu-id-limit-holds",
            "A limit for vCPU ids (KVM_CAP_MAX_VCPU_ID) is at most the host's; once set it can't be \
             another, and an id at it is EINVAL.",
            vcpu_id_limit,
        )
        .kernels(Kernels::Since(6, 0, "it can't be set")),
    ]
}

fn irqchip_on_a_full_bus<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedPio)?;
    let zone = |n| CoalescedZone { address: IoAddress::Pio(0x1000 + n), size: 1 };
    for n in 0..BUS_DEVICES - PIC_DEVICES + 1 {
        vm.register_coalesced_zone(zone(n))?;
    }
    refused(vm.create_irqchip(), Errno::ENOSPC)?;
    refused(vm.irqchip(0).map(|_| ()), Errno::ENXIO)?;
    vm.unregister_coalesced_zone(zone(0))?;
    Ok(vm.create_irqchip()?)
}

fn vcpu_id_limit<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let most = u64::from(p.needs(&vm, Capability::MaxVcpuId)?.unsigned_abs());
    let set = |limit| vm.enable_cap(Capability::MaxVcpuId, [limit, 0, 0, 0]);
    refused(set(most + 1), Errno::EINVAL)?;
    set(8)?;
    refused(set(4), Errno::EINVAL)?;
    set(8)?;
    refused(vm.create_vcpu(8).map(|_| ()), Errno::EINVAL)?;
    vcpu::<P>(&vm, 7).map(|_| ())
}

fn memory<P: Platform>() -> Vec<Case<P>> {
    const BASE: u64 = 0x1_0000;
    vec![
        Case::new(
            "slot-of-an-unknown-address-space",
            "A slot in an address space the VM does not have is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                let spaces = Vm::check_extension(&vm, Capability::MultiAddressSpace)?;
                let id = spaces.unsigned_abs().max(1) << 16;
                refused(vm.set_memory_slot(&slot(id, BASE, &pages(1)?)), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-moved-by-a-part-of-itself",
            "A slot may move to where it overlaps its old place.",
            |p: &P| {
                let (vm, memory) = (p.vm()?, pages(4)?);
                vm.set_memory_slot(&slot(0, BASE, &memory))?;
                vm.set_memory_slot(&slot(0, BASE + 0x1000, &memory))?;
                Ok(vm.set_memory_slot(&slot(0, BASE, &memory))?)
            },
        ),
        Case::new(
            "dirty-manual-unknown-flag",
            "An unknown flag of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                let cap = Capability::ManualDirtyLogProtect2;
                p.needs(&vm, cap)?;
                refused(vm.enable_cap(cap, [1 | 1 << 20, 0, 0, 0]), Errno::EINVAL)
            },
        )
        .kernels(Kernels::Since(5, 2, "another capability number")),
    ]
}

fn x2apic_api<P: Platform>() -> Vec<Case<P>> {
    let flags = |name, rule, split: bool, flags| {
        Case::new(name, rule, move |p: &P| {
            let vm = if split { p.vm_with_split_irqchip(24)? } else { p.vm_with_irqchip()? };
            p.needs(&vm, Capability::X2apicApi)?;
            refused(vm.enable_cap(Capability::X2apicApi, [flags, 0, 0, 0]), Errno::EINVAL)
        })
    };
    vec![
        flags(
            "x2apic-api-unknown-flag",
            "An unknown flag of KVM_CAP_X2APIC_API is refused with EINVAL.",
            false,
            1 << 40,
        ),
        flags(
            "x2apic-api-suppression-both-ways",
            "EOI suppression can't be enabled and disabled at once (EINVAL).",
            true,
            ENABLE_SUPPRESS_EOI | DISABLE_SUPPRESS_EOI,
        ),
        flags(
            "x2apic-api-suppression-beside-ioapic",
            "EOI suppression can't be enabled beside the I/O APIC of the kernel (EINVAL).",
            false,
            ENABLE_SUPPRESS_EOI,
        ),
        Case::new(
            "x2apic-api-value-of-a-split-vm",
            "KVM_CAP_X2APIC_API offers to enable EOI suppression in split mode only.",
            |p: &P| {
                let offers = |vm: &VmOf<P>| Vm::check_extension(vm, Capability::X2apicApi);
                let split = offers(&p.vm_with_split_irqchip(24)?)?;
                if split & 4 == 0 {
                    return Err(Miss::not_applicable("this kernel can't enable it"));
                }
                same("the value with an I/O APIC", offers(&p.vm_with_irqchip()?)?, split & !4)
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
    ]
}
