//! `KVM_IOEVENTFD`: which writes signal an eventfd, and which events are legal.

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::{Case, Checked, Kernels, Miss, Platform, RawRequest, Seen, VmOf};
use crate::{
    Capability, CoalescedZone, Errno, EventFd, IoAddress, IoEvent, IoEventBackend, MemoryBackend,
};

const ADDRESS: u64 = 0xc000_0000;
const PORT: u16 = 0x70;

/// Devices an in-kernel I/O bus takes (`NR_IOBUS_DEVS`).
const BUS_DEVICES: u64 = 1000;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = collisions();
    cases.extend(illegal());
    cases.extend(removal());
    cases.extend(seen());
    cases
}

/// An event by its length and value, at [`ADDRESS`].
fn mmio<P: Platform>(p: &P, length: u32, datamatch: Option<u64>) -> Checked<IoEvent> {
    Ok(IoEvent { address: IoAddress::Mmio(ADDRESS), length, datamatch, event: p.eventfd()? })
}

/// A VM that has doorbells.
fn vm<P: Platform>(p: &P) -> Checked<VmOf<P>> {
    let vm = p.vm()?;
    p.needs(&vm, Capability::Ioeventfd)?;
    Ok(vm)
}

/// A length and a value.
type Write = (u32, Option<u64>);

fn collisions<P: Platform>() -> Vec<Case<P>> {
    let pair = |name, rule, first: Write, second: Write, expected: Result<(), Errno>| {
        Case::new(name, rule, move |p: &P| {
            let vm = vm(p)?;
            if first.0 == 0 || second.0 == 0 {
                p.needs(&vm, Capability::IoeventfdAnyLength)?;
            }
            vm.ioeventfd_assign(&mmio(p, first.0, first.1)?)?;
            let second = vm.ioeventfd_assign(&mmio(p, second.0, second.1)?);
            same("the answer to the second", second.map_err(|error| error.errno), expected)
        })
    };
    let refused = Err(Errno::EEXIST);
    vec![
        pair(
            "ioevent-same-write",
            "A second event for the same address, length and value is EEXIST, whatever its eventfd.",
            (4, Some(1)),
            (4, Some(1)),
            refused,
        ),
        pair(
            "ioevent-any-value-twice",
            "A second event for any value of the same address and length is EEXIST.",
            (4, None),
            (4, None),
            refused,
        ),
        pair(
            "ioevent-any-value-over-a-value",
            "An event for any value is EEXIST where there is one for a value.",
            (4, Some(1)),
            (4, None),
            refused,
        ),
        pair(
            "ioevent-a-value-under-any-value",
            "An event for a value is EEXIST where there is one for any value.",
            (4, None),
            (4, Some(1)),
            refused,
        ),
        pair(
            "ioevent-any-length-over-a-length",
            "An event for any length is EEXIST where there is one for a length.",
            (2, Some(1)),
            (0, None),
            refused,
        ),
        pair(
            "ioevent-a-length-under-any-length",
            "An event for a length is EEXIST where there is one for any length.",
            (0, None),
            (8, None),
            refused,
        ),
        pair(
            "ioevent-other-value",
            "Two values of one address and length are two events.",
            (4, Some(1)),
            (4, Some(2)),
            Ok(()),
        ),
        pair(
            "ioevent-other-length",
            "Two lengths of one address are two events.",
            (4, None),
            (2, None),
            Ok(()),
        ),
        Case::new("ioevent-one-eventfd-for-two", "One eventfd may serve two events.", |p: &P| {
            let vm = vm(p)?;
            let first = mmio(p, 4, Some(1))?;
            vm.ioeventfd_assign(&first)?;
            Ok(vm.ioeventfd_assign(&IoEvent { datamatch: Some(2), ..first })?)
        }),
        Case::new(
            "ioevent-port-and-address",
            "A port and an address of the same number are two events.",
            |p: &P| {
                let vm = vm(p)?;
                let port = IoEvent { address: IoAddress::Pio(PORT), ..mmio(p, 4, None)? };
                vm.ioeventfd_assign(&port)?;
                let address = IoAddress::Mmio(PORT.into());
                Ok(vm.ioeventfd_assign(&IoEvent { address, ..port })?)
            },
        ),
    ]
}

fn illegal<P: Platform>() -> Vec<Case<P>> {
    let lengths = |name, rule, length, datamatch| {
        Case::new(name, rule, move |p: &P| {
            refused(vm(p)?.ioeventfd_assign(&mmio(p, length, datamatch)?), Errno::EINVAL)
        })
    };
    let raw =
        |fd, flags| RawRequest::Ioeventfd { address: ADDRESS, length: 4, fd, flags, datamatch: 0 };
    vec![
        lengths("ioevent-length-3", "A length of 3 is refused with EINVAL.", 3, None),
        lengths("ioevent-length-16", "A length of 16 is refused with EINVAL.", 16, None),
        lengths(
            "ioevent-value-of-any-length",
            "A value without a length is refused with EINVAL.",
            0,
            Some(1),
        ),
        Case::new(
            "ioevent-wraps",
            "A range that passes the last address is refused with EINVAL.",
            |p: &P| {
                let address = IoAddress::Mmio(u64::MAX - 2);
                refused(
                    vm(p)?.ioeventfd_assign(&IoEvent { address, ..mmio(p, 4, None)? }),
                    Errno::EINVAL,
                )
            },
        ),
        Case::new(
            "ioevent-on-the-last-addresses",
            "A range whose end would be address 2^64 is refused with EINVAL, too.",
            |p: &P| {
                let address = IoAddress::Mmio(u64::MAX - 3);
                let event = IoEvent { address, ..mmio(p, 4, None)? };
                refused(vm(p)?.ioeventfd_assign(&event), Errno::EINVAL)
            },
        ),
        Case::new(
            "ioevent-on-a-full-bus",
            "A bus with as many coalesced zones as it has room for takes no ioeventfd (ENOSPC).",
            |p: &P| {
                let vm = vm(p)?;
                p.needs(&vm, Capability::CoalescedMmio)?;
                for n in 0..BUS_DEVICES {
                    let address = IoAddress::Mmio(0xe000_0000 + n * 8);
                    vm.register_coalesced_zone(CoalescedZone { address, size: 8 })?;
                }
                refused(vm.ioeventfd_assign(&mmio(p, 4, None)?), Errno::ENOSPC)
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "ioevent-no-eventfd",
            "A descriptor that is no eventfd is refused with EINVAL.",
            |p: &P| {
                let vm = vm(p)?;
                let null = File::open("/dev/null")
                    .map_err(|error| Miss::not_applicable(format!("/dev/null: {error}")))?;
                let event = EventFd::from(OwnedFd::from(null));
                refused(vm.ioeventfd_assign(&IoEvent { event, ..mmio(p, 4, None)? }), Errno::EINVAL)
            },
        ),
        Case::new(
            "ioevent-closed-descriptor",
            "A descriptor that is not open is refused with EBADF.",
            move |p: &P| p.raw_refused(&vm(p)?, &raw(-1, 0), Errno::EBADF),
        ),
        Case::new(
            "ioevent-unknown-flag",
            "An unknown flag is refused with EINVAL.",
            move |p: &P| p.raw_refused(&vm(p)?, &raw(0, 1 << 20), Errno::EINVAL),
        ),
        Case::new(
            "ioevent-no-limit",
            "A bus takes more ioeventfds than the 1000 devices it has room for.",
            no_limit,
        )
        .kernels(Kernels::Since(3, 11, "they count as devices")),
    ]
}

fn no_limit<P: Platform>(p: &P) -> Checked {
    let vm = vm(p)?;
    let event = mmio(p, 4, None)?;
    for n in 0..=BUS_DEVICES {
        let address = IoAddress::Mmio(ADDRESS + n * 8);
        vm.ioeventfd_assign(&IoEvent { address, ..event.clone() })?;
    }
    Ok(())
}

/// An event like this one, but for one thing; the eventfd is another.
type Altered = fn(IoEvent, EventFd) -> IoEvent;

fn removal<P: Platform>() -> Vec<Case<P>> {
    let other = |name, rule, alter: Altered| {
        Case::new(name, rule, move |p: &P| {
            let vm = vm(p)?;
            let event = mmio(p, 4, Some(1))?;
            vm.ioeventfd_assign(&event)?;
            let altered = alter(event.clone(), p.eventfd()?);
            refused(vm.ioeventfd_deassign(&altered), Errno::ENOENT)?;
            Ok(vm.ioeventfd_deassign(&event)?)
        })
    };
    vec![
        other(
            "ioevent-removed-by-other-address",
            "Removing by another address is ENOENT.",
            |event, _| IoEvent { address: IoAddress::Mmio(ADDRESS + 4), ..event },
        ),
        other(
            "ioevent-removed-by-other-length",
            "Removing by another length is ENOENT.",
            |event, _| IoEvent { length: 2, ..event },
        ),
        other(
            "ioevent-removed-by-other-value",
            "Removing by another value is ENOENT.",
            |event, _| IoEvent { datamatch: Some(2), ..event },
        ),
        other("ioevent-removed-by-any-value", "Removing by no value is ENOENT.", |event, _| {
            IoEvent { datamatch: None, ..event }
        }),
        other(
            "ioevent-removed-by-other-eventfd",
            "Removing by another eventfd is ENOENT.",
            |event, other| IoEvent { event: other, ..event },
        ),
        Case::new("ioevent-removed-twice", "Removing an event twice is ENOENT.", |p: &P| {
            let vm = vm(p)?;
            let event = mmio(p, 4, None)?;
            vm.ioeventfd_assign(&event)?;
            vm.ioeventfd_deassign(&event)?;
            refused(vm.ioeventfd_deassign(&event), Errno::ENOENT)
        }),
    ]
}

fn seen<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "ioevent-takes-its-value-only",
            "A write of the value signals the eventfd and does not exit; another value exits, and so \
             does a read.",
            takes_its_value_only,
        ),
        Case::new(
            "ioevent-takes-any-value",
            "Without a value every write of the length is taken; one of another length exits.",
            takes_any_value,
        ),
        Case::new(
            "ioevent-takes-any-length",
            "With length 0 a write of every length is taken.",
            takes_any_length,
        ),
        Case::new(
            "ioevent-each-value-its-own",
            "Of two events for two values each is signalled by its own.",
            each_value_its_own,
        ),
        Case::new(
            "ioevent-value-of-8-bytes",
            "A value of 8 bytes is compared in full.",
            |p: &P| {
                let vm = vm(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let value: u64 = 7 << 32 | 1;
                let event = mmio(p, 8, Some(value))?;
                vm.ioeventfd_assign(&event)?;
                same("a write", guest.store(ADDRESS, &value.to_le_bytes())?, Seen::ByKernel)?;
                exits::<P>(&mut guest, &1u64.to_le_bytes())?;
                same("signals", event.event.take(), Some(1))
            },
        ),
        Case::new(
            "ioevent-removed-exits",
            "A write exits again once the event is removed.",
            |p: &P| {
                let vm = vm(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let event = mmio(p, 4, None)?;
                vm.ioeventfd_assign(&event)?;
                same("a write", guest.store(ADDRESS, &[1; 4])?, Seen::ByKernel)?;
                vm.ioeventfd_deassign(&event)?;
                exits::<P>(&mut guest, &[1; 4])?;
                same("signals", event.event.take(), Some(1))
            },
        ),
        Case::new(
            "ioevent-outlives-its-descriptor",
            "An event goes on taking writes when the caller has closed the eventfd.",
            |p: &P| {
                let vm = vm(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                vm.ioeventfd_assign(&mmio(p, 4, None)?)?;
                same("a write", guest.store(ADDRESS, &[1; 4])?, Seen::ByKernel)
            },
        ),
    ]
}

fn exits<P: Platform>(guest: &mut P::Guest, data: &[u8]) -> Checked {
    let seen = guest.store(ADDRESS, data)?;
    holds(&format!("a write of {data:?} exits"), matches!(seen, Seen::ByVmm(_)))
}

fn takes_its_value_only<P: Platform>(p: &P) -> Checked {
    let vm = vm(p)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let event = p.eventfd()?;
    let doorbell = IoEvent {
        address: IoAddress::Pio(PORT),
        length: 1,
        datamatch: Some(7),
        event: event.clone(),
    };
    vm.ioeventfd_assign(&doorbell)?;
    same("writing the value", guest.port_out(PORT, &[7])?, Seen::ByKernel)?;
    same("signals", event.take(), Some(1))?;
    let (all_ones, read) = guest.port_in(PORT)?;
    holds("a read exits", matches!(read, Seen::ByVmm(_)))?;
    same("what it reads", all_ones, [0xff])?;
    let other = guest.port_out(PORT, &[8])?;
    holds("another value exits", matches!(other, Seen::ByVmm(_)))?;
    same("signals of another value", event.take(), None)
}

fn takes_any_value<P: Platform>(p: &P) -> Checked {
    let vm = vm(p)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let event = mmio(p, 4, None)?;
    vm.ioeventfd_assign(&event)?;
    for value in [[0; 4], [1, 2, 3, 4], [0xff; 4]] {
        same("a write", guest.store(ADDRESS, &value)?, Seen::ByKernel)?;
    }
    same("signals", event.event.take(), Some(3))?;
    exits::<P>(&mut guest, &[1; 2])?;
    exits::<P>(&mut guest, &[1; 8])?;
    same("signals of other lengths", event.event.take(), None)
}

fn takes_any_length<P: Platform>(p: &P) -> Checked {
    let vm = vm(p)?;
    p.needs(&vm, Capability::IoeventfdAnyLength)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let event = mmio(p, 0, None)?;
    vm.ioeventfd_assign(&event)?;
    for length in [1, 2, 4, 8] {
        let data = vec![5; length];
        same(&format!("{length} bytes"), guest.store(ADDRESS, &data)?, Seen::ByKernel)?;
    }
    same("signals", event.event.take(), Some(4))
}

fn each_value_its_own<P: Platform>(p: &P) -> Checked {
    let vm = vm(p)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let (one, two) = (mmio(p, 2, Some(1))?, mmio(p, 2, Some(2))?);
    vm.ioeventfd_assign(&one)?;
    vm.ioeventfd_assign(&two)?;
    for value in [2u16, 1, 2] {
        same("a write", guest.store(ADDRESS, &value.to_le_bytes())?, Seen::ByKernel)?;
    }
    same("signals of the first", one.event.take(), Some(1))?;
    same("signals of the second", two.event.take(), Some(2))
}
