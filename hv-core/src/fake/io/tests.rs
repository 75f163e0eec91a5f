use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::{EventFd, IoEvent};

const LIMITS: IoLimits = IoLimits { devices: 1000, any_length: true, ports: true };

fn io() -> Io {
    Io::new(LIMITS)
}

fn event() -> EventFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
}

fn dup(event: &EventFd) -> EventFd {
    event.as_fd().try_clone_to_owned().unwrap().into()
}

use IoAddress::{Mmio, Pio};

fn doorbell(address: IoAddress, length: u32, datamatch: Option<u64>, event: &EventFd) -> IoEvent {
    IoEvent { address, length, datamatch, event: event.clone() }
}

fn zone(address: u64, size: u32) -> CoalescedZone {
    CoalescedZone { address: Mmio(address), size }
}

fn port_zone(port: u16, size: u32) -> CoalescedZone {
    CoalescedZone { address: Pio(port), size }
}

#[test]
fn ioeventfds_are_judged_as_by_kvm() {
    let (mut io, first) = (io(), event());
    let (invalid, exists) = (Err(Errno::EINVAL), Err(Errno::EEXIST));
    // The state before each row is what the rows above left. Each row has an eventfd of its own,
    // which makes no difference.
    for (what, address, length, datamatch, answer) in [
        ("length 3", Mmio(0x1000), 3, None, invalid),
        ("length 16", Mmio(0x1000), 16, None, invalid),
        ("length 2^31", Mmio(0x1000), 1 << 31, None, invalid),
        ("a value without a length", Mmio(0x1000), 0, Some(0), invalid),
        ("a value without a length, port", Pio(0x100), 0, Some(0), invalid),
        ("any length", Mmio(0x1000), 0, None, Ok(())),
        ("any length, again", Mmio(0x1000), 0, None, exists),
        ("a length under any length", Mmio(0x1000), 4, None, exists),
        ("a value under any length", Mmio(0x1000), 4, Some(1), exists),
        ("the next address", Mmio(0x1001), 4, None, Ok(())),
        ("a port of that number", Pio(0x1000), 0, None, Ok(())),
        ("the value 1", Mmio(0x2000), 2, Some(1), Ok(())),
        ("the value 1, again", Mmio(0x2000), 2, Some(1), exists),
        ("the value 2", Mmio(0x2000), 2, Some(2), Ok(())),
        ("any value over values", Mmio(0x2000), 2, None, exists),
        ("any length over values", Mmio(0x2000), 0, None, exists),
        ("another length, any value", Mmio(0x2000), 4, None, Ok(())),
        ("a value under any value", Mmio(0x2000), 4, Some(1), exists),
        ("a value that is wider than its length", Mmio(0x3000), 1, Some(0x101), Ok(())),
        ("its low byte", Mmio(0x3000), 1, Some(1), Ok(())),
        ("wraps", Mmio(u64::MAX - 6), 8, None, invalid),
        ("ends with the last byte", Mmio(u64::MAX - 7), 8, None, invalid),
        ("ends one before", Mmio(u64::MAX - 8), 8, None, Ok(())),
        ("any length at the last byte", Mmio(u64::MAX), 0, None, Ok(())),
        ("past the last port", Pio(0xffff), 2, None, Ok(())),
    ] {
        assert_eq!(io.assign(&doorbell(address, length, datamatch, &event())), answer, "{what}");
    }
    assert_eq!(io.ioevents().len(), 11);

    let null = EventFd::from(OwnedFd::from(File::open("/dev/null").unwrap()));
    assert_eq!(io.assign(&doorbell(Mmio(0x9000), 4, None, &null)), invalid, "no eventfd");
    assert_eq!(io.deassign(&doorbell(Mmio(0x1001), 4, None, &null)), invalid, "no eventfd");
    // One eventfd for as many as one likes.
    assert_eq!(io.assign(&doorbell(Mmio(0x9000), 4, None, &first)), Ok(()));
    assert_eq!(io.assign(&doorbell(Mmio(0xa000), 4, None, &first)), Ok(()));
}

#[test]
fn a_host_may_know_no_ioeventfd_of_any_length() {
    let mut io = Io::new(IoLimits { any_length: false, ..LIMITS });
    assert_eq!(io.assign(&doorbell(Mmio(0x1000), 0, None, &event())), Err(Errno::EINVAL));
    assert_eq!(io.assign(&doorbell(Mmio(0x1000), 1, None, &event())), Ok(()));
}

#[test]
fn an_ioeventfd_goes_for_one_who_names_all_of_it() {
    let (mut io, first) = (io(), event());
    io.assign(&doorbell(Mmio(0x1000), 2, Some(7), &first)).unwrap();
    io.assign(&doorbell(Mmio(0x1000), 4, None, &first)).unwrap();
    for (what, address, length, datamatch, event) in [
        ("address", Mmio(0x1001), 2, Some(7), first.clone()),
        ("port", Pio(0x1000), 2, Some(7), first.clone()),
        ("length", Mmio(0x1000), 4, Some(7), first.clone()),
        ("impossible length", Mmio(0x1000), 3, Some(7), first.clone()),
        ("value", Mmio(0x1000), 2, Some(8), first.clone()),
        ("no value", Mmio(0x1000), 2, None, first.clone()),
        ("a value for none", Mmio(0x1000), 4, Some(0), first.clone()),
        ("eventfd", Mmio(0x1000), 2, Some(7), event()),
    ] {
        let answer = io.deassign(&doorbell(address, length, datamatch, &event));
        assert_eq!(answer, Err(Errno::ENOENT), "{what}");
    }
    assert_eq!(io.ioevents().len(), 2);
    let copy = doorbell(Mmio(0x1000), 2, Some(7), &dup(&first));
    assert_eq!(io.deassign(&copy), Ok(()), "another descriptor of the eventfd will do");
    assert_eq!(io.deassign(&copy), Err(Errno::ENOENT), "twice");
    assert_eq!(io.ioevents(), [doorbell(Mmio(0x1000), 4, None, &first)]);
}

#[test]
fn a_write_rings_what_it_matches() {
    let mut io = io();
    let (value, word, any, port) = (event(), event(), event(), event());
    io.assign(&doorbell(Mmio(0x1000), 2, Some(0x0201), &value)).unwrap();
    io.assign(&doorbell(Mmio(0x1000), 4, None, &word)).unwrap();
    io.assign(&doorbell(Mmio(0x2000), 0, None, &any)).unwrap();
    io.assign(&doorbell(Pio(0x1000), 1, Some(0), &port)).unwrap();
    io.assign(&doorbell(Mmio(0x3000), 1, Some(0x101), &value)).unwrap();
    io.assign(&doorbell(Mmio(0x4000), 8, Some(0x0807_0605_0403_0201), &value)).unwrap();
    let all = [&value, &word, &any, &port];
    for (address, data, rings) in [
        (Mmio(0x1000), &[1, 2][..], Some(0)),
        (Mmio(0x1000), &[2, 1], None),
        (Mmio(0x1000), &[1], None),
        (Mmio(0x1001), &[2], None),
        (Mmio(0x1002), &[0, 0], None),
        (Mmio(0x1000), &[9, 9, 9, 9], Some(1)),
        (Mmio(0x1000), &[0; 8], None),
        (Mmio(0x2000), &[1], Some(2)),
        (Mmio(0x2000), &[1, 2, 3], Some(2)),
        (Mmio(0x2000), &[0; 8], Some(2)),
        (Mmio(0x2000), &[0; 9], None),
        (Mmio(0x2001), &[1], None),
        (Pio(0x1000), &[0], Some(3)),
        (Pio(0x1000), &[1, 2], None),
        (Mmio(0x3000), &[1], None),
        (Mmio(0x4000), &[1, 2, 3, 4, 5, 6, 7, 8], Some(0)),
        (Mmio(0x4000), &[1, 2, 3, 4, 5, 6, 7, 9], None),
        (Mmio(u64::MAX), &[1, 2], None),
    ] {
        let taken = if rings.is_some() { Taken::Event } else { Taken::Nobody };
        assert_eq!(io.write(address, data), taken, "{address:x?} {data:x?}");
        for (index, event) in all.into_iter().enumerate() {
            let rung = (rings == Some(index)).then_some(1);
            assert_eq!(event.take(), rung, "{address:x?} {data:x?}: eventfd {index}");
        }
    }
}

#[test]
fn sixteen_values_at_one_port_are_told_apart() {
    let (mut io, events) = (io(), (0..16).map(|_| event()).collect::<Vec<_>>());
    for (value, event) in events.iter().enumerate() {
        io.assign(&doorbell(Pio(0x600), 2, Some(value as u64), event)).unwrap();
    }
    for (value, event) in events.iter().enumerate() {
        assert_eq!(io.write(Pio(0x600), &[value as u8, 0]), Taken::Event);
        assert_eq!(event.take(), Some(1));
    }
    assert_eq!(io.write(Pio(0x600), &[16, 0]), Taken::Nobody);
    assert!(events.iter().all(|event| event.take().is_none()));
}

#[test]
fn a_zone_collects_writes_inside_it_in_order() {
    let mut io = io();
    io.register(zone(0x1000, 0x10)).unwrap();
    io.register(port_zone(0x70, 2)).unwrap();
    for (address, data, taken) in [
        (Mmio(0xfff), &[1][..], Taken::Nobody),
        (Mmio(0x1000), &[1], Taken::Zone),
        (Mmio(0x1008), &[8; 8], Taken::Zone),
        (Mmio(0x1009), &[8; 8], Taken::Nobody),
        (Mmio(0x1010), &[1], Taken::Nobody),
        (Pio(0x71), &[2], Taken::Zone),
        (Pio(0x71), &[2, 2], Taken::Nobody),
        (Pio(0x70), &[3, 4], Taken::Zone),
        (Mmio(0x70), &[1], Taken::Nobody),
    ] {
        assert_eq!(io.write(address, data), taken, "{address:x?} {data:x?}");
    }
    let collected = |address, data: &[u8]| CoalescedWrite::new(address, data).unwrap();
    let ring = [
        collected(Mmio(0x1000), &[1]),
        collected(Mmio(0x1008), &[8; 8]),
        collected(Pio(0x71), &[2]),
        collected(Pio(0x70), &[3, 4]),
    ];
    assert!(io.collected().eq(&ring), "looking takes nothing");
    for write in ring {
        assert!(io.has_collected());
        assert_eq!(io.take_collected(), Some(write));
    }
    assert!(!io.has_collected());
    assert_eq!(io.take_collected(), None);
}

#[test]
fn a_full_ring_ends_runs_until_it_is_emptied() {
    let mut io = io();
    io.register(zone(0x1000, 0x10)).unwrap();
    let taken = (0..300).filter(|_| io.write(Mmio(0x1000), &[1]) == Taken::Zone).count();
    assert_eq!(taken, 169, "measured");
    assert!(io.take_collected().is_some());
    assert_eq!(io.write(Mmio(0x1000), &[1]), Taken::Zone, "there is room for one");
    assert_eq!(io.write(Mmio(0x1000), &[1]), Taken::Nobody);
    assert_eq!(std::iter::from_fn(|| io.take_collected()).count(), 169);
}

#[test]
fn unregistering_ends_the_zones_that_contain_the_range() {
    let zones = [zone(0x1000, 0x100), zone(0x1000, 0x100), zone(0x1080, 0x100), zone(0x4000, 8)];
    for (what, range, left) in [
        ("itself, and its twin", zone(0x1000, 0x100), &[zone(0x1080, 0x100), zone(0x4000, 8)][..]),
        ("a part of three", zone(0x1090, 1), &[zone(0x4000, 8)]),
        ("around all", zone(0, 0x10000), &zones),
        ("a range that passes the end", zone(0x1090, 0x100), &zones),
        ("absent", zone(0x9000, 8), &zones),
        ("ports", port_zone(0x1000, 0x100), &zones),
        ("of no bytes, at the end", zone(0x4008, 0), &zones[..3]),
        ("of bytes beyond a sign", zone(0x4000, 1 << 31), &zones),
    ] {
        let mut io = io();
        zones.iter().for_each(|zone| io.register(*zone).unwrap());
        assert_eq!(io.unregister(range), Ok(()), "{what}");
        let key = |zone: &CoalescedZone| (zone.address, zone.size);
        let mut there = io.zones();
        there.sort_by_key(key);
        assert_eq!(there, left, "{what}");
    }
}

#[test]
fn zones_of_odd_sizes_are_accepted() {
    let mut io = io();
    for zone in [zone(0x100, 0), zone(u64::MAX - 3, 16), port_zone(0xffff, 16)] {
        assert_eq!(io.register(zone), Ok(()));
    }
    assert_eq!(io.write(Mmio(0x100), &[1]), Taken::Nobody, "it has no bytes");
    assert_eq!(io.write(Mmio(u64::MAX - 3), &[1]), Taken::Nobody, "its end wraps");
    assert_eq!(io.write(Pio(0xffff), &[1, 2]), Taken::Zone);
}

/// Measured on Linux 6.18.
#[test]
fn the_sizes_of_zones_have_a_sign() {
    for (what, zone, address, taken) in [
        ("1 GiB", zone(0x8000_0000, 0x4000_0000), 0x8000_e000, Taken::Zone),
        ("2 GiB", zone(0x8000_0000, 0x8000_0000), 0x8000_e000, Taken::Nobody),
        ("3 GiB", zone(0x8000_0000, 0xc000_0000), 0x8000_e000, Taken::Nobody),
        ("3 GiB, which ends below 0", zone(0, 0xc000_0000), 0xe000, Taken::Zone),
    ] {
        let mut io = io();
        io.register(zone).unwrap();
        assert_eq!(io.write(Mmio(address), &[1]), taken, "{what}");
    }
    let mut io = io();
    io.register(zone(0, 0xc000_0000)).unwrap();
    io.unregister(zone(0, 0xc000_0000)).unwrap();
    assert_eq!(io.zones().len(), 1, "such a zone can't be named");
    io.unregister(zone(0, 1)).unwrap();
    assert_eq!(io.zones(), [], "but a part of it");
}

#[test]
fn a_kernel_that_knows_no_ports_takes_them_for_addresses() {
    let mut io = Io::new(IoLimits { ports: false, ..LIMITS });
    io.register(port_zone(0x70, 2)).unwrap();
    assert_eq!(io.write(Pio(0x70), &[1]), Taken::Nobody);
    assert_eq!(io.write(Mmio(0x70), &[1]), Taken::Zone);
    io.unregister(port_zone(0x70, 2)).unwrap();
    assert_eq!(io.zones(), []);
}

#[test]
fn a_bus_is_full_of_chips_and_zones_but_not_of_ioeventfds() {
    let (mut io, event) = (io(), event());
    for n in 0..1500 {
        io.assign(&doorbell(Mmio(0x10_0000 + n * 8), 4, None, &event)).unwrap();
    }
    io.plug(&[(Mmio(0xfec0_0000), 0x100)]).unwrap();
    for n in 0..999 {
        assert_eq!(io.register(zone(0x20_0000 + n * 8, 4)), Ok(()), "zone {n}");
    }
    let full = Err(Errno::ENOSPC);
    assert_eq!(io.register(zone(0, 4)), full);
    assert_eq!(io.plug(&[(Pio(0x20), 2), (Mmio(0xfed0_0000), 8)]), full);
    assert_eq!(io.assign(&doorbell(Mmio(0), 4, None, &event)), full, "it is held up as well");
    assert_eq!(io.write(Pio(0x20), &[1]), Taken::Nobody, "none of the chip's registers is there");
    assert_eq!(io.register(port_zone(0, 4)), Ok(()), "the other bus has room");
    io.deassign(&doorbell(Mmio(0x10_0000), 4, None, &event)).unwrap();
    assert_eq!(io.register(zone(0, 4)), full);
    io.unregister(zone(0x20_0000, 4)).unwrap();
    assert_eq!(io.assign(&doorbell(Mmio(0), 4, None, &event)), Ok(()));
    assert_eq!(io.register(zone(0x20_0000, 4)), Ok(()));
}

/// What takes a one-byte write, by the order in which a zone of 0x100 bytes at 0xe000 and an
/// ioeventfd were made. Measured on Linux 6.18.
#[test]
fn a_device_inside_another_hides_it_from_some_writes() {
    use Taken::{Event, Nobody, Zone};
    let bell = |address, length| doorbell(Mmio(address), length, None, &event());
    for (what, event_first, event, answers) in [
        ("inside, after the zone", false, bell(0xe010, 1), [Zone, Zone, Nobody]),
        ("inside, before the zone", true, bell(0xe010, 1), [Zone, Event, Zone]),
        ("at its start, after the zone", false, bell(0xe000, 1), [Event, Zone, Zone]),
        ("at its start, before the zone", true, bell(0xe000, 1), [Event, Zone, Zone]),
        ("of any length, after the zone", false, bell(0xe000, 0), [Zone, Nobody, Nobody]),
        ("of any length, before the zone", true, bell(0xe000, 0), [Event, Zone, Zone]),
    ] {
        let mut io = io();
        if event_first {
            io.assign(&event).unwrap();
        }
        io.register(zone(0xe000, 0x100)).unwrap();
        if !event_first {
            io.assign(&event).unwrap();
        }
        let taken = [0xe000, 0xe010, 0xe020].map(|address| io.write(Mmio(address), &[1]));
        assert_eq!(taken, answers, "{what}");
    }
}

#[test]
fn a_chip_takes_what_is_for_its_registers() {
    let mut io = io();
    io.plug(&[(Mmio(0xfec0_0000), 0x100)]).unwrap();
    io.plug(&[(Pio(0x20), 2)]).unwrap();
    for (address, data, taken) in [
        (Mmio(0xfec0_0010), &[1, 2, 3, 4][..], Taken::Chip),
        (Mmio(0xfec0_00ff), &[1, 2], Taken::Nobody),
        (Pio(0x21), &[1], Taken::Chip),
        (Pio(0x22), &[1], Taken::Nobody),
        (Pio(0x20), &[1, 2], Taken::Chip),
    ] {
        assert_eq!(io.write(address, data), taken, "{address:x?}");
    }
    assert_eq!((io.ioevents(), io.zones()), (vec![], vec![]), "chips are not listed");
}
