//! The ioctl arguments of variable length, as words.
//!
//! A routing table, a CPUID list and a list of registers are each a header that counts and an
//! array. The wrappers of kvm-bindings cap those arrays below what KVM takes, so that KVM's own
//! answer to a long one could never be seen. Written as words they need no limit, no `unsafe` and
//! no allocation but one. Nothing here judges content: that is KVM's part.

use hv_core::{Route, RouteTarget};
use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID,
    kvm_cpuid_entry2, kvm_irq_routing_entry, kvm_msr_entry,
};

/// Words of a `struct kvm_irq_routing_entry`.
const ROUTE_WORDS: usize = size_of::<kvm_irq_routing_entry>() / size_of::<u64>();

/// Words of a `struct kvm_cpuid_entry2`.
const CPUID_WORDS: usize = size_of::<kvm_cpuid_entry2>() / size_of::<u32>();

/// Two 32-bit fields in the order they have in memory.
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// `struct kvm_irq_routing`. `None` if there are more routes than its counter can say.
pub(crate) fn irq_routing(routes: &[Route]) -> Option<Vec<u64>> {
    let nr = u32::try_from(routes.len()).ok()?;
    let header = pair(nr, 0);
    Some(std::iter::once(header).chain(routes.iter().flat_map(irq_routing_entry)).collect())
}

fn irq_routing_entry(route: &Route) -> [u64; ROUTE_WORDS] {
    let (kind, flags, first, second) = match route.target {
        RouteTarget::Pin { chip, pin } => (KVM_IRQ_ROUTING_IRQCHIP, 0, pair(chip.0, pin), 0),
        RouteTarget::Msi(msi) => (
            KVM_IRQ_ROUTING_MSI,
            msi.device.map_or(0, |_| KVM_MSI_VALID_DEVID),
            msi.address,
            pair(msi.data, msi.device.unwrap_or(0)),
        ),
        RouteTarget::HypervSint { vcpu, sint } => (KVM_IRQ_ROUTING_HV_SINT, 0, pair(vcpu, sint), 0),
        // `RouteTarget` may grow. Type 0 is none of KVM's: it answers EINVAL.
        _ => (0, 0, 0, 0),
    };
    [pair(route.gsi.0, kind), pair(flags, 0), first, second, 0, 0]
}

/// `struct kvm_cpuid2` with `entries`. `None` if there are more than its counter can say.
pub(crate) fn cpuid(entries: &[kvm_cpuid_entry2]) -> Option<Vec<u32>> {
    let nent = u32::try_from(entries.len()).ok()?;
    let entries = entries.iter().flat_map(|e| {
        let [p0, p1, p2] = e.padding;
        [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, p0, p1, p2]
    });
    Some([nent, 0].into_iter().chain(entries).collect())
}

/// `struct kvm_cpuid2` with room for `room` entries.
pub(crate) fn cpuid_room(room: u16) -> Vec<u32> {
    let mut words = vec![0; 2 + usize::from(room) * CPUID_WORDS];
    if let Some(nent) = words.first_mut() {
        *nent = u32::from(room);
    }
    words
}

/// The entries of a `struct kvm_cpuid2` that KVM filled.
pub(crate) fn cpuid_entries(words: &[u32]) -> Vec<kvm_cpuid_entry2> {
    let [nent, _, entries @ ..] = words else { return Vec::new() };
    let (entries, _) = entries.as_chunks::<CPUID_WORDS>();
    let entries = entries.iter().take(*nent as usize);
    entries
        .map(|&[function, index, flags, eax, ebx, ecx, edx, p0, p1, p2]| kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            padding: [p0, p1, p2],
        })
        .collect()
}

/// `struct kvm_msrs` with `entries`. `None` if there are more than its counter can say.
pub(crate) fn msrs(entries: &[kvm_msr_entry]) -> Option<Vec<u64>> {
    let nmsrs = u32::try_from(entries.len()).ok()?;
    let entries = entries.iter().flat_map(|e| [pair(e.index, e.reserved), e.data]);
    Some(std::iter::once(pair(nmsrs, 0)).chain(entries).collect())
}

/// Takes over the values of the first `count` registers of a `struct kvm_msrs` that KVM filled.
pub(crate) fn read_msrs(words: &[u64], count: usize, entries: &mut [kvm_msr_entry]) {
    let (pairs, _) = words.get(1..).unwrap_or_default().as_chunks::<2>();
    for (entry, [_, data]) in entries.iter_mut().zip(pairs).take(count) {
        entry.data = *data;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::{Gsi, IrqchipId, Msi};
    use kvm_bindings::{kvm_cpuid2, kvm_irq_routing, kvm_msrs};
    use std::mem::offset_of;

    #[test]
    fn words_have_the_size_and_alignment_of_the_structures() {
        assert_eq!(size_of::<kvm_irq_routing>(), 8);
        assert_eq!((size_of::<kvm_irq_routing_entry>(), ROUTE_WORDS), (48, 6));
        assert_eq!(align_of::<kvm_irq_routing_entry>(), align_of::<u64>());
        assert_eq!(size_of::<kvm_cpuid2>(), 8);
        assert_eq!((size_of::<kvm_cpuid_entry2>(), CPUID_WORDS), (40, 10));
        assert_eq!(align_of::<kvm_cpuid_entry2>(), align_of::<u32>());
        assert_eq!((size_of::<kvm_msrs>(), size_of::<kvm_msr_entry>()), (8, 16));
        assert_eq!(align_of::<kvm_msr_entry>(), align_of::<u64>());
        assert_eq!(offset_of!(kvm_irq_routing_entry, type_), 4);
        assert_eq!(offset_of!(kvm_irq_routing_entry, flags), 8);
        assert_eq!(offset_of!(kvm_irq_routing_entry, u), 16);
    }

    #[test]
    fn routes_are_laid_out_as_in_the_header() {
        let routes = [
            Route { gsi: Gsi(0), target: RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin: 2 } },
            Route {
                gsi: Gsi(24),
                target: RouteTarget::Msi(Msi {
                    address: 0x1_fee0_1000,
                    data: 0x4041,
                    device: Some(0x18),
                }),
            },
            Route { gsi: Gsi(25), target: RouteTarget::HypervSint { vcpu: 3, sint: 4 } },
        ];
        let words = irq_routing(&routes).unwrap();
        assert_eq!(words.len(), 1 + 3 * 6);
        assert_eq!(words[0], 3, "nr, then flags");
        assert_eq!(words[1..7], [1 << 32, 0, 2 | 2 << 32, 0, 0, 0]);
        assert_eq!(words[7..13], [24 | 2 << 32, 1, 0x1_fee0_1000, 0x4041 | 0x18 << 32, 0, 0]);
        assert_eq!(words[13..19], [25 | 4 << 32, 0, 3 | 4 << 32, 0, 0, 0]);
    }

    #[test]
    fn a_message_without_a_device_has_no_flag() {
        let target = RouteTarget::Msi(Msi { address: 1, data: 2, device: None });
        let words = irq_routing(&[Route { gsi: Gsi(30), target }]).unwrap();
        assert_eq!(words[2..5], [0, 1, 2]);
    }

    #[test]
    fn an_empty_table_is_a_header() {
        assert_eq!(irq_routing(&[]), Some(vec![0]));
    }

    #[test]
    fn cpuid_survives_the_round_trip() {
        let entry = |n| kvm_cpuid_entry2 {
            function: n,
            index: n + 1,
            flags: n + 2,
            eax: n + 3,
            ebx: n + 4,
            ecx: n + 5,
            edx: n + 6,
            padding: [n + 7, n + 8, n + 9],
        };
        let entries = [entry(0x8000_0000), entry(7)];
        let words = cpuid(&entries).unwrap();
        assert_eq!(words[..4], [2, 0, 0x8000_0000, 0x8000_0001]);
        assert_eq!(cpuid_entries(&words), entries);
    }

    #[test]
    fn a_count_beyond_the_room_is_cut() {
        let mut words = cpuid_room(2);
        assert_eq!((words[0], words.len()), (2, 2 + 20));
        words[0] = 9;
        assert_eq!(cpuid_entries(&words).len(), 2);
        assert!(cpuid_entries(&[]).is_empty());
    }

    #[test]
    fn only_registers_that_were_read_are_taken_over() {
        let mut entries = [1, 2, 3].map(|n| kvm_msr_entry { index: n, data: 7, reserved: 0 });
        let mut words = msrs(&entries).unwrap();
        assert_eq!(words, [3, 1, 7, 2, 7, 3, 7]);
        (words[2], words[4], words[6]) = (10, 20, 30);
        read_msrs(&words, 2, &mut entries);
        assert_eq!(entries.map(|e| e.data), [10, 20, 7]);
    }
}
