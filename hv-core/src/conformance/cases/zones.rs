//! `KVM_REGISTER_COALESCED_MMIO`: what zones there may be, and which writes they collect.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::{Case, Checked, Guest, Kernels, Platform, RawRequest, Seen};
use crate::{Capability, CoalescedZone, Errno, IoAddress, MemoryBackend, Vcpu};

const ADDRESS: u64 = 0xc000_0000;

const ZONE: CoalescedZone = CoalescedZone { address: IoAddress::Mmio(ADDRESS), size: 0x100 };

/// Devices an in-kernel I/O bus takes (`NR_IOBUS_DEVS`).
const BUS_DEVICES: u64 = 1000;

/// Writes that the ring of a VM holds: entries of 24 bytes in a page after two indices, one of them
/// always free.
const RING: usize = (4096 - 8) / 24 - 1;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("zone-twice", "Registering a zone again is no error.", |p: &P| {
            let vm = p.vm()?;
            p.needs(&vm, Capability::CoalescedMmio)?;
            vm.register_coalesced_zone(ZONE)?;
            Ok(vm.register_coalesced_zone(ZONE)?)
        }),
        Case::new("zone-absent", "Unregistering a zone that is not there is no error.", |p: &P| {
            let vm = p.vm()?;
            p.needs(&vm, Capability::CoalescedMmio)?;
            Ok(vm.unregister_coalesced_zone(ZONE)?)
        }),
        Case::new(
            "zone-of-unknown-space",
            "A zone in an address space that is neither memory nor ports is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedPio)?;
                let request =
                    RawRequest::CoalescedZone { register: true, address: 0x70, size: 1, pio: 2 };
                p.raw_refused(&vm, &request, Errno::EINVAL)
            },
        ),
        Case::new(
            "zone-of-unknown-space-unregistered",
            "Unregistering such a zone is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedPio)?;
                let request =
                    RawRequest::CoalescedZone { register: false, address: 0x70, size: 1, pio: 2 };
                p.raw_refused(&vm, &request, Errno::EINVAL)
            },
        ),
        Case::new("zone-limit", "The 1001st zone is refused with ENOSPC.", limit)
            .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "zone-collects",
            "A write inside a zone does not exit; one that reaches beyond it does, and reads do.",
            collects,
        ),
        Case::new(
            "zone-ring-full",
            "The ring of collected writes holds 169, which is one less than a page has room for; the \
             170th exits.",
            ring_full,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "zone-writes-come-in-order",
            "What zones collect of all vCPUs, to memory and to ports, is in one ring, which any vCPU can \
             empty: address, length and data, in the order of the writes.",
            in_order,
        ),
        Case::new(
            "zone-ring-has-room-again",
            "Each write that is taken from a full ring makes room for one; it goes round.",
            room_again,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "zone-writes-outlive-their-zone",
            "What a zone has collected stays to be taken when the zone is unregistered.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedMmio)?;
                let mut guest = p.guest_on(&vm, 0)?;
                nothing::<P>(&mut guest)?;
                vm.register_coalesced_zone(ZONE)?;
                nothing::<P>(&mut guest)?;
                same("a write", guest.store(ADDRESS, &[7])?, Seen::ByKernel)?;
                vm.unregister_coalesced_zone(ZONE)?;
                takes::<P>(&mut guest, IoAddress::Mmio(ADDRESS), &[7])?;
                nothing::<P>(&mut guest)
            },
        ),
        Case::new("zone-of-ports", "A zone of ports collects writes to them.", of_ports),
        Case::new("zone-ends", "Writes to a zone exit again once it is unregistered.", |p: &P| {
            let vm = p.vm()?;
            p.needs(&vm, Capability::CoalescedMmio)?;
            let mut guest = p.guest_on(&vm, 0)?;
            vm.register_coalesced_zone(ZONE)?;
            same("a write", guest.store(ADDRESS, &[1])?, Seen::ByKernel)?;
            vm.unregister_coalesced_zone(ZONE)?;
            exits::<P>(&mut guest, ADDRESS)
        }),
        Case::new(
            "zone-registered-twice-ends-at-once",
            "Unregistering a zone that was registered twice ends it.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedMmio)?;
                let mut guest = p.guest_on(&vm, 0)?;
                vm.register_coalesced_zone(ZONE)?;
                vm.register_coalesced_zone(ZONE)?;
                vm.unregister_coalesced_zone(ZONE)?;
                exits::<P>(&mut guest, ADDRESS)
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "zone-ends-by-its-part",
            "Unregistering a part of a zone ends all of it.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedMmio)?;
                let mut guest = p.guest_on(&vm, 0)?;
                vm.register_coalesced_zone(ZONE)?;
                let address = IoAddress::Mmio(ADDRESS + 0x80);
                vm.unregister_coalesced_zone(CoalescedZone { address, size: 8 })?;
                exits::<P>(&mut guest, ADDRESS)
            },
        ),
        Case::new(
            "zone-stays-for-what-is-larger",
            "Unregistering a range that reaches beyond a zone leaves the zone.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::CoalescedMmio)?;
                let mut guest = p.guest_on(&vm, 0)?;
                vm.register_coalesced_zone(ZONE)?;
                vm.unregister_coalesced_zone(CoalescedZone { size: 0x200, ..ZONE })?;
                same("a write", guest.store(ADDRESS, &[1])?, Seen::ByKernel)
            },
        ),
    ]
}

fn exits<P: Platform>(guest: &mut P::Guest, address: u64) -> Checked {
    let seen = guest.store(address, &[1])?;
    holds(&format!("a write to {address:#x} exits"), matches!(seen, Seen::ByVmm(_)))
}

fn limit<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedMmio)?;
    let zone = |n: u64| CoalescedZone { address: IoAddress::Mmio(ADDRESS + n * 0x1000), size: 8 };
    for n in 0..BUS_DEVICES {
        vm.register_coalesced_zone(zone(n))?;
    }
    refused(vm.register_coalesced_zone(zone(BUS_DEVICES)), Errno::ENOSPC)
}

fn collects<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedMmio)?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.register_coalesced_zone(ZONE)?;
    same("a write at its start", guest.store(ADDRESS, &[1])?, Seen::ByKernel)?;
    same("a write at its end", guest.store(ADDRESS + 0xfc, &[1; 4])?, Seen::ByKernel)?;
    let beyond = guest.store(ADDRESS + 0xfe, &[1; 4])?;
    holds("a write across its end exits", matches!(beyond, Seen::ByVmm(_)))?;
    exits::<P>(&mut guest, ADDRESS + 0x100)?;
    exits::<P>(&mut guest, ADDRESS - 1)?;
    let (_, read) = guest.load::<4>(ADDRESS)?;
    holds("a read exits", matches!(read, Seen::ByVmm(_)))
}

/// The next write in the ring is this one.
fn takes<P: Platform>(guest: &mut P::Guest, address: IoAddress, data: &[u8]) -> Checked {
    holds("the ring has a write", guest.vcpu().has_coalesced_write())?;
    let taken = guest.vcpu().take_coalesced_write()?;
    let taken = taken.as_ref().map(|write| (write.address, write.bytes()));
    same("the write that is taken", taken, Some((address, data)))
}

/// The ring is empty.
fn nothing<P: Platform>(guest: &mut P::Guest) -> Checked {
    holds("the ring is empty", !guest.vcpu().has_coalesced_write())?;
    same("the write that is taken", guest.vcpu().take_coalesced_write()?, None)
}

fn in_order<P: Platform>(p: &P) -> Checked {
    const PORT: u16 = 0x70;
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedPio)?;
    let (mut first, mut second) = (p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?);
    vm.register_coalesced_zone(ZONE)?;
    vm.register_coalesced_zone(CoalescedZone { address: IoAddress::Pio(PORT), size: 4 })?;
    let data = [1, 2, 3, 4, 5, 6, 7, 8];
    let mut written = Vec::new();
    for len in [8, 1, 4, 2] {
        let bytes = data.get(..len).unwrap_or_default();
        let address = IoAddress::Mmio(ADDRESS + len as u64);
        for guest in [&mut first, &mut second] {
            same("a write to memory", guest.write(address, bytes)?, Seen::ByKernel)?;
            written.push((address, bytes));
        }
        let (port, bytes) = (IoAddress::Pio(PORT), data.get(4..4 + len.min(4)).unwrap_or_default());
        same("a write to a port", second.write(port, bytes)?, Seen::ByKernel)?;
        written.push((port, bytes));
    }
    for (n, (address, bytes)) in written.into_iter().enumerate() {
        let guest = if n % 3 == 0 { &mut second } else { &mut first };
        takes::<P>(guest, address, bytes)?;
    }
    nothing::<P>(&mut first)?;
    nothing::<P>(&mut second)
}

fn room_again<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedMmio)?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.register_coalesced_zone(ZONE)?;
    let bytes = |n: usize| u32::try_from(n).unwrap_or_default().to_le_bytes();
    for n in 0..RING {
        same(&format!("write {n}"), guest.store(ADDRESS, &bytes(n))?, Seen::ByKernel)?;
    }
    for n in RING..RING + 20 {
        exits::<P>(&mut guest, ADDRESS)?;
        takes::<P>(&mut guest, IoAddress::Mmio(ADDRESS), &bytes(n - RING))?;
        same(&format!("write {n}"), guest.store(ADDRESS, &bytes(n))?, Seen::ByKernel)?;
    }
    for n in 20..RING + 20 {
        takes::<P>(&mut guest, IoAddress::Mmio(ADDRESS), &bytes(n))?;
    }
    nothing::<P>(&mut guest)
}

fn ring_full<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedMmio)?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.register_coalesced_zone(ZONE)?;
    for n in 1..=RING {
        same(&format!("write {n}"), guest.store(ADDRESS, &[1])?, Seen::ByKernel)?;
    }
    exits::<P>(&mut guest, ADDRESS)
}

fn of_ports<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    p.needs(&vm, Capability::CoalescedPio)?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.register_coalesced_zone(CoalescedZone { address: IoAddress::Pio(0x70), size: 2 })?;
    same("a write", guest.port_out(0x71, &[1])?, Seen::ByKernel)?;
    let other = guest.port_out(0x72, &[1])?;
    holds("a write to the next port exits", matches!(other, Seen::ByVmm(_)))
}
