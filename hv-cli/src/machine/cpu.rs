//! What the guest's processors are: CPUID, and the state they start with beyond the registers a
//! loader sets.
//!
//! CPUID is the host's, as KVM offers it, with the topology of this machine written over it: one
//! package, one thread a core, APIC ids from 0.

use hv_core::{Error, Vcpu};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry};

/// What of the host the guest's CPUID depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Processors of the machine, at least 1.
    pub cpus: u32,
    /// KVM offers the TSC-deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`), which it never puts into
    /// the supported leaves.
    pub tsc_deadline: bool,
    /// Hide the paravirtual features that make a guest execute VMCALL at CPL 0, which software
    /// KVM can't run.
    pub hide_hypercalls: bool,
}

/// Leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x40000001, EAX: PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD.
const HYPERCALL_FEATURES: u32 = 1 << 7 | 1 << 11 | 1 << 13;
/// Leaf 0x40000001 of "KVMKVMKVM" (Linux, `Documentation/virt/kvm/x86/cpuid.rst`).
const KVM_FEATURES: u32 = 0x4000_0001;

/// The leaves of the processor with this APIC id.
#[must_use]
pub fn cpuid(
    supported: &[kvm_cpuid_entry2],
    id: u32,
    config: CpuidConfig,
) -> Vec<kvm_cpuid_entry2> {
    let cpus = config.cpus.max(1);
    let highest = supported.iter().filter(|e| e.function == 0).map(|e| e.eax).max();
    let extended_topology = |e: &kvm_cpuid_entry2| e.function == 0xb || e.function == 0x1f;
    let mut leaves: Vec<_> = supported.iter().filter(|e| !extended_topology(e)).copied().collect();
    for leaf in &mut leaves {
        patch(leaf, id, cpus, config);
    }
    if highest >= Some(0xb) {
        leaves.extend(topology(0xb, id, cpus));
    }
    if highest >= Some(0x1f) {
        leaves.extend(topology(0x1f, id, cpus));
    }
    leaves
}

fn patch(leaf: &mut kvm_cpuid_entry2, id: u32, cpus: u32, config: CpuidConfig) {
    match leaf.function {
        0x1 => {
            leaf.ebx = (leaf.ebx & 0xff00) | ((id & 0xff) << 24) | (cpus.min(0xff) << 16);
            leaf.ecx |= HYPERVISOR;
            set(&mut leaf.ecx, TSC_DEADLINE, config.tsc_deadline);
            set(&mut leaf.edx, HTT, cpus > 1);
        }
        // Caches (leaf 4 on Intel, 0x8000001d on AMD): shared by nobody below level 3.
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level < 3 { 0 } else { (cpus - 1).min(0xfff) };
            leaf.eax = (leaf.eax & 0x3fff) | sharing << 14;
            if leaf.function == 0x4 {
                leaf.eax |= (cpus - 1).min(0x3f) << 26;
            }
        }
        KVM_FEATURES if config.hide_hypercalls => leaf.eax &= !HYPERCALL_FEATURES,
        0x8000_0001 => {
            let amd = leaf.ecx & CMP_LEGACY != 0;
            set(&mut leaf.ecx, CMP_LEGACY, amd && cpus > 1);
        }
        0x8000_0008 => leaf.ecx = bits_for(cpus) << 12 | (cpus - 1).min(0xff),
        0x8000_001e => {
            leaf.eax = id;
            leaf.ebx = id & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

fn set(register: &mut u32, bits: u32, on: bool) {
    *register = if on { *register | bits } else { *register & !bits };
}

/// Bits an APIC id takes in a machine of this many processors.
fn bits_for(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Extended topology (Intel SDM volume 2, CPUID leaf 0BH): threads, then cores, then the end.
fn topology(function: u32, id: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        edx: id,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, 1, 0, 1), level(1, 2, bits_for(cpus), cpus.min(0xffff)), level(2, 0, 0, 0)]
}

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of the local vector table in the local APIC's registers.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// Sets what firmware would have set: the FPU, cacheable memory, and on the boot processor the
/// local APIC's two pins.
///
/// # Errors
/// Those of the ioctls.
pub fn set_firmware_state<V: Vcpu>(vcpu: &V, boot_processor: bool) -> Result<(), Error> {
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() })?;
    // A KVM without MTRRs refuses the register, and memory is cacheable anyway.
    vcpu.set_msrs(&[kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_ENABLED_WRITE_BACK,
        ..kvm_msr_entry::default()
    }])?;
    if boot_processor {
        let mut lapic = vcpu.lapic()?;
        for (offset, value) in [(LVT_LINT0, DELIVER_EXTINT), (LVT_LINT1, DELIVER_NMI)] {
            let register = lapic.regs.iter_mut().skip(offset);
            for (to, from) in register.zip(value.to_le_bytes()) {
                *to = from as std::ffi::c_char;
            }
        }
        vcpu.set_lapic(&lapic)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVcpu;
    use kvm_bindings::kvm_lapic_state;

    fn leaf(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ..kvm_cpuid_entry2::default() }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = leaves.iter().filter(|e| (e.function, e.index) == (function, index));
        let leaf = *found.next().unwrap();
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        leaf
    }

    fn config(cpus: u32) -> CpuidConfig {
        CpuidConfig { cpus, tsc_deadline: true, hide_hypercalls: false }
    }

    #[test]
    fn every_processor_knows_its_id_and_the_topology() {
        let host_topology = kvm_cpuid_entry2 { ebx: 96, edx: 77, ..leaf(0xb, 1, 7) };
        let host = [leaf(0, 0, 0x16), leaf(1, 0, 0), host_topology];
        let leaves = cpuid(&host, 2, config(3));
        let one = find(&leaves, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 3));
        assert_ne!(one.ecx & HYPERVISOR, 0);
        assert_ne!(one.ecx & TSC_DEADLINE, 0);
        assert_ne!(one.edx & HTT, 0);
        let cores = find(&leaves, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!(find(&leaves, 0xb, 0).ebx, 1);
        assert_eq!(find(&leaves, 0xb, 2).ecx, 2);
        assert!(leaves.iter().all(|e| e.function != 0x1f), "beyond the host's highest leaf");
    }

    #[test]
    fn one_processor_has_no_siblings() {
        let host = [leaf(1, 0, 0), kvm_cpuid_entry2 { edx: HTT, ..leaf(1, 1, 0) }];
        let leaves = cpuid(&host[..1], 0, config(1));
        assert_eq!(find(&leaves, 1, 0).edx & HTT, 0);
        assert!(leaves.iter().all(|e| e.function != 0xb));
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let host = [leaf(4, 0, 1 << 5 | 1 | 0xfc00_0000), leaf(4, 3, 3 << 5 | 3), leaf(4, 4, 0)];
        let leaves = cpuid(&host, 0, config(4));
        let sharing = |index| find(&leaves, 4, index).eax >> 14 & 0xfff;
        assert_eq!((sharing(0), sharing(3)), (0, 3));
        assert_eq!(find(&leaves, 4, 0).eax >> 26, 3);
        assert_eq!(find(&leaves, 4, 4).eax, 0);
    }

    #[test]
    fn hypercall_features_are_hidden_only_where_they_hurt() {
        let host = [leaf(KVM_FEATURES, 0, 0x0100_7efb)];
        let kept = cpuid(&host, 0, config(1));
        assert_eq!(find(&kept, KVM_FEATURES, 0).eax, 0x0100_7efb);
        let hidden = cpuid(&host, 0, CpuidConfig { hide_hypercalls: true, ..config(1) });
        assert_eq!(find(&hidden, KVM_FEATURES, 0).eax, 0x0100_7efb & !0x2880);
    }

    #[test]
    fn more_processors_than_a_field_holds_saturate() {
        let host = [leaf(0, 0, 0xb), leaf(1, 0, 0), leaf(0x8000_0008, 0, 0)];
        let leaves = cpuid(&host, 1000, config(1024));
        assert_eq!(find(&leaves, 1, 0).ebx >> 16 & 0xff, 0xff);
        assert_eq!(find(&leaves, 0xb, 1).edx, 1000);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx & 0xff, 0xff);
    }

    #[test]
    fn the_boot_processor_gets_its_local_pins() {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_set_fpu().withf(|f| f.fcw == 0x37f).once().returning(|_| Ok(()));
        vcpu.expect_set_msrs().once().returning(|e| Ok(e.len()));
        vcpu.expect_lapic().once().returning(|| Ok(kvm_lapic_state::default()));
        vcpu.expect_set_lapic()
            .withf(|l| l.regs[LVT_LINT0 + 1] == 7 && l.regs[LVT_LINT1 + 1] == 4)
            .once()
            .returning(|_| Ok(()));
        set_firmware_state(&vcpu, true).unwrap();
    }
}
