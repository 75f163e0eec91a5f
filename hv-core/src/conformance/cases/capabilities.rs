//! What KVM says about itself: `KVM_CHECK_EXTENSION` and its relatives on the system descriptor.

use crate::conformance::bench::Bench;
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::{Case, Checked, Platform, RawRequest};
use crate::{Capability, Errno, Hypervisor, Vm};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("api-version", "The version of the API is 12.", |p: &P| {
            same("the version", p.hypervisor().api_version()?, 12)
        }),
        Case::new(
            "capabilities-are-not-negative",
            "A capability is absent with 0 or has a value above, on both descriptors.",
            not_negative,
        ),
        Case::new("capability-vcpu-limits", "NR_VCPUS <= MAX_VCPUS <= MAX_VCPU_ID.", vcpu_limits),
        Case::new(
            "capability-coalesced-page",
            "The coalesced ring is a page inside the mapping of a vCPU, not its first.",
            coalesced_page,
        ),
        Case::new("capability-memslots", "There are at least 32 memory slots.", |p: &P| {
            let slots = Vm::check_extension(&p.vm()?, Capability::NrMemslots)?;
            holds(&format!("{slots} slots are 32 or more"), slots >= 32)
        }),
        Case::new("vcpu-mapping", "The mapping of a vCPU is whole pages.", |p: &P| {
            let size = p.hypervisor().vcpu_mmap_size()?;
            holds(&format!("{size} is whole pages"), size > 0 && size.is_multiple_of(4096))
        }),
        Case::new(
            "msr-list",
            "The list of MSRs says how many there are if there is not room for all, else it is whole.",
            msr_list,
        ),
        Case::new(
            "supported-cpuid",
            "The supported CPUID leaves have leaf 0, and no leaf and index twice.",
            supported_cpuid,
        ),
        Case::new("vm-type-unknown", "A VM of an unknown type is refused with EINVAL.", |p: &P| {
            refused(p.hypervisor().create_vm(0x7fff_ffff).map(|_| ()), Errno::EINVAL)
        }),
        Case::new(
            "enable-cap-unknown",
            "Enabling a capability that does not exist is refused with EINVAL.",
            |p: &P| {
                let request = RawRequest::EnableCap { cap: 0xffff, flags: 0, args: [0; 4] };
                p.raw_refused(&p.vm()?, &request, Errno::EINVAL)
            },
        ),
        Case::new(
            "enable-cap-that-is-only-asked-for",
            "Enabling a capability that has nothing to enable is refused with EINVAL.",
            |p: &P| {
                refused(p.vm()?.enable_cap(Capability::UserMemory, [1, 0, 0, 0]), Errno::EINVAL)
            },
        ),
        Case::new(
            "enable-cap-flags",
            "Enabling a capability with flags is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::SplitIrqchip)?;
                let cap = Capability::SplitIrqchip.number();
                let request = RawRequest::EnableCap { cap, flags: 1, args: [24, 0, 0, 0] };
                p.raw_refused(&vm, &request, Errno::EINVAL)
            },
        ),
    ]
}

fn not_negative<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    for &cap in Capability::ALL {
        let (system, of_vm) =
            (p.hypervisor().check_extension(cap)?, Vm::check_extension(&vm, cap)?);
        holds(&format!("{cap} is {system} and {of_vm}"), system >= 0 && of_vm >= 0)?;
    }
    Ok(())
}

fn vcpu_limits<P: Platform>(p: &P) -> Checked {
    let ask = |cap| p.hypervisor().check_extension(cap);
    let recommended = ask(Capability::NrVcpus)?;
    let most = ask(Capability::MaxVcpus)?;
    let ids = ask(Capability::MaxVcpuId)?;
    let text = format!("1 <= {recommended} <= {most} <= {ids}");
    holds(&text, 1 <= recommended && recommended <= most && most <= ids)
}

fn coalesced_page<P: Platform>(p: &P) -> Checked {
    let page = p.needs(&p.vm()?, Capability::CoalescedMmio)?;
    let size = p.hypervisor().vcpu_mmap_size()?;
    let inside = (page.unsigned_abs() as usize + 1) * 4096 <= size;
    holds(&format!("page {page} is inside {size} bytes"), page > 0 && inside)
}

fn msr_list<P: Platform>(p: &P) -> Checked {
    let kvm = p.hypervisor();
    let none = kvm.msr_index_list(0)?;
    same("indices where there is no room", none.indices, Vec::new())?;
    holds("there are MSRs", none.available > 0)?;
    let one_less = kvm.msr_index_list(none.available - 1)?;
    same("how many there are, with room for one less", one_less.available, none.available)?;
    same("indices then", one_less.indices, Vec::new())?;
    let all = kvm.msr_index_list(none.available)?;
    same("indices with room for all", all.indices.len(), none.available)
}

fn supported_cpuid<P: Platform>(p: &P) -> Checked {
    let leaves = p.hypervisor().supported_cpuid()?;
    holds("there is leaf 0", leaves.iter().any(|leaf| leaf.function == 0))?;
    let mut names: Vec<_> = leaves.iter().map(|leaf| (leaf.function, leaf.index)).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    same("leaves that are there once", names.len(), all)
}
