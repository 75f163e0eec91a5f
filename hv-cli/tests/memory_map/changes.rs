//! The scenarios: changes of the map, and what the guest finds after each.

use hv_memory::NewRegion;
use vm_memory::GuestAddress;

use super::{At, Host, Machine, PAGE, exits, ram, rom};

/// Slots may be as large as KVM has them.
const LARGE: u64 = 1 << 20;

/// Where memory is: above what guests have for themselves and KVM for its devices.
const BASE: u64 = 1 << 32;

fn at(page: u64) -> GuestAddress {
    GuestAddress(BASE + page * PAGE)
}

fn address(page: u64) -> u64 {
    BASE + page * PAGE
}

pub(crate) fn memory_is_split_and_joined_around_a_device<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[8], LARGE);
    let memory = m.host(0, 0, 8 * PAGE);
    m.edit([0, 0, 0, 1], |edit| edit.add(NewRegion::ram("RAM", memory).at(at(0), 0)));
    m.expect(address(0), ram(0, 0..8).chain(exits(1)));
    let device = NewRegion::mmio("device", 2 * PAGE).at(at(3), 1);
    let device = m.edit([1, 0, 0, 2], |edit| edit.add(device));
    m.expect(address(0), ram(0, 0..3).chain(exits(2)).chain(ram(0, 5..8)));
    m.edit([2, 0, 0, 2], |edit| edit.place(device, at(4), 1));
    m.expect(address(0), ram(0, 0..4).chain(exits(2)).chain(ram(0, 6..8)));
    m.edit([2, 0, 0, 1], |edit| edit.place(device, at(6), 1));
    m.expect(address(0), ram(0, 0..6).chain(exits(2)));
    m.edit([1, 0, 0, 1], |edit| edit.remove(device));
    m.expect(address(0), ram(0, 0..8));
    // Two memories that follow each other, in the guest and in the host, are one.
    let (low, high) = (m.host(0, 0, 4 * PAGE), m.host(0, 4 * PAGE, 4 * PAGE));
    let (low, high) = m.edit([0, 0, 0, 1], |edit| {
        let low = edit.add(NewRegion::ram("low", low).at(at(0x20), 0))?;
        Ok((low, edit.add(NewRegion::ram("high", high).at(at(0x24), 0))?))
    });
    m.expect(address(0x20), ram(0, 0..8));
    m.edit([1, 0, 0, 1], |edit| edit.remove(low));
    m.expect(address(0x20), exits(4).chain(ram(0, 4..8)));
    m.edit([1, 0, 0, 0], |edit| edit.remove(high));
    m.expect(address(0x20), exits(8));
    m.expect(address(0), ram(0, 0..8));
}

pub(crate) fn memory_moves<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[4], LARGE);
    let memory = m.host(0, 0, 4 * PAGE);
    let id = m.edit([0, 0, 0, 1], |edit| edit.add(NewRegion::ram("RAM", memory).at(at(0), 0)));
    m.expect(address(0), ram(0, 0..4));
    // Elsewhere; over where it was; under the lowest page and back.
    let mut was = 0;
    for page in [0x10, 0x12, 0x11, 0] {
        m.edit([0, 1, 0, 0], |edit| edit.place(id, at(page), 0));
        m.expect(address(page), ram(0, 0..4));
        let gone = (was..was + 4).filter(|old| !(page..page + 4).contains(old));
        for old in gone {
            m.expect(address(old), exits(1));
        }
        was = page;
    }
}

pub(crate) fn memory_becomes_readonly_and_writable_again<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[6], LARGE);
    let (low, high) = (m.host(0, 0, 3 * PAGE), m.host(0, 3 * PAGE, 3 * PAGE));
    let (low, high) = m.edit([0, 0, 0, 1], |edit| {
        let low = edit.add(NewRegion::ram("low", low).at(at(0), 0))?;
        Ok((low, edit.add(NewRegion::ram("high", high).at(at(3), 0))?))
    });
    m.expect(address(0), ram(0, 0..6));
    m.edit([1, 0, 0, 2], |edit| edit.set_readonly(high, true));
    m.expect(address(0), ram(0, 0..3).chain(rom(0, 3..6)));
    // Both are written through another address, one of them by the guest.
    let shadow = m.host(0, 0, 6 * PAGE);
    let shadow = NewRegion::ram("shadow", shadow).at(at(0x10), 0);
    let shadow = m.edit([0, 0, 0, 1], |edit| edit.add(shadow));
    m.expect(address(0x10), ram(0, 0..6));
    m.expect(address(0), ram(0, 0..3).chain(rom(0, 3..6)));
    m.edit([2, 0, 0, 2], |edit| {
        edit.set_readonly(low, true)?;
        edit.set_readonly(high, false)
    });
    m.expect(address(0), rom(0, 0..3).chain(ram(0, 3..6)));
    // The slot of the shadow is what is wanted then, elsewhere.
    m.edit([2, 1, 0, 0], |edit| {
        edit.remove(shadow)?;
        edit.set_readonly(low, false)
    });
    m.expect(address(0), ram(0, 0..6));
}

pub(crate) fn aliases_show_the_same_bytes<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[8], LARGE);
    let memory = m.host(0, 0, 8 * PAGE);
    let (target, alias) = m.edit([0, 0, 0, 3], |edit| {
        let target = edit.add(NewRegion::ram("RAM", memory).at(at(0), 0))?;
        let alias = NewRegion::alias("window", target, 2 * PAGE, 3 * PAGE).at(at(0x20), 0);
        let alias = edit.add(alias)?;
        let second = NewRegion::alias("window of it", alias, PAGE, PAGE).readonly();
        edit.add(second.at(at(0x30), 0))?;
        Ok((target, alias))
    });
    m.expect(address(0x20), ram(0, 2..5));
    m.expect(address(0), ram(0, 0..8));
    m.expect(address(0x30), rom(0, 3..4));
    // The alias of the alias goes along.
    m.edit([2, 0, 0, 2], |edit| edit.retarget(alias, target, 5 * PAGE));
    m.expect(address(0x20), ram(0, 5..8));
    m.expect(address(0x30), rom(0, 6..7));
    // What it shows need not be anywhere itself.
    m.edit([1, 0, 0, 0], |edit| edit.unplace(target));
    m.expect(address(0), exits(8));
    m.expect(address(0x20), ram(0, 5..8));
    m.edit([1, 0, 0, 1], |edit| edit.set_readonly(alias, true));
    m.expect(address(0x20), rom(0, 5..8));
}

pub(crate) fn what_is_hidden_comes_back<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[4, 4], LARGE);
    let (below, above) = (m.host(0, 0, 4 * PAGE), m.host(1, 0, 2 * PAGE));
    let above = m.edit([0, 0, 0, 3], |edit| {
        edit.add(NewRegion::ram("below", below).at(at(0), 0))?;
        edit.add(NewRegion::ram("above", above).at(at(1), 7))
    });
    m.expect(address(0), ram(0, 0..1).chain(ram(1, 0..2)).chain(ram(0, 3..4)));
    m.edit([3, 0, 0, 1], |edit| edit.place(above, at(1), -1));
    m.expect(address(0), ram(0, 0..4));
    m.edit([1, 0, 0, 3], |edit| edit.place(above, at(1), 1));
    m.expect(address(0), ram(0, 0..1).chain(ram(1, 0..2)).chain(ram(0, 3..4)));
    m.edit([3, 0, 0, 1], |edit| edit.unplace(above));
    m.expect(address(0), ram(0, 0..4));
}

pub(crate) fn parts_of_pages_exit<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[4], LARGE);
    let memory = m.host(0, 0x800, 3 * PAGE);
    let start = GuestAddress(BASE + 0x800);
    m.edit([0, 0, 0, 1], |edit| edit.add(NewRegion::ram("RAM", memory).at(start, 0)));
    m.expect(address(0), exits(1).chain(ram(0, 1..3)).chain(exits(1)));
    m.expect_at(address(3) + 0x7f8, At::Exit);
    // The rest comes, and completes the page.
    let rest = m.host(0, 0x3800, 0x800);
    let place = GuestAddress(BASE + 0x3800);
    let rest = m.edit([1, 0, 0, 1], |edit| edit.add(NewRegion::ram("rest", rest).at(place, 0)));
    m.expect(address(0), exits(1).chain(ram(0, 1..4)));
    // A device of a few bytes takes its page away.
    let device = NewRegion::mmio("device", 4).at(GuestAddress(address(2) + 0x10), 1);
    let device = m.edit([1, 0, 0, 2], |edit| edit.add(device));
    m.expect(address(0), exits(1).chain(ram(0, 1..2)).chain(exits(1)).chain(ram(0, 3..4)));
    m.edit([2, 0, 0, 1], |edit| {
        edit.remove(device)?;
        edit.remove(rest)
    });
    m.expect(address(0), exits(1).chain(ram(0, 1..3)).chain(exits(1)));
}

pub(crate) fn much_memory_is_in_many_slots<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[16], 4);
    let memory = m.host(0, 0, 16 * PAGE);
    let id = m.edit([0, 0, 0, 5], |edit| edit.add(NewRegion::ram("RAM", memory).at(at(2), 0)));
    m.expect(address(2), ram(0, 0..16));
    // A device in one of them leaves the others alone.
    let device = NewRegion::mmio("device", PAGE).at(at(9), 1);
    let device = m.edit([1, 0, 0, 2], |edit| edit.add(device));
    m.expect(address(2), ram(0, 0..7).chain(exits(1)).chain(ram(0, 8..16)));
    m.edit([2, 0, 0, 1], |edit| edit.remove(device));
    m.edit([0, 0, 5, 0], |edit| edit.set_log_dirty(id, true));
    m.edit([0, 0, 5, 0], |edit| edit.set_log_dirty(id, false));
    m.expect(address(2), ram(0, 0..16));
}

pub(crate) fn slots_change_places<H: Host>(host: &H) {
    let mut m = Machine::new(host, &[2, 2, 2], LARGE);
    let hosts = [0, 1, 2].map(|n| m.host(n, 0, 2 * PAGE));
    let ids = m.edit([0, 0, 0, 3], |edit| {
        let mut add = |n: usize| {
            let region = NewRegion::ram("RAM", hosts[n].clone());
            edit.add(region.at(at(2 * n as u64), 0))
        };
        Ok([add(0)?, add(1)?, add(2)?])
    });
    m.expect(address(0), ram(0, 0..2).chain(ram(1, 0..2)).chain(ram(2, 0..2)));
    let mut place = |operations, pages: [u64; 3]| {
        m.edit(operations, |edit| {
            let places = ids.into_iter().zip(pages);
            places.into_iter().try_for_each(|(id, page)| edit.place(id, at(page), 0))
        });
        for (memory, page) in pages.into_iter().enumerate() {
            m.expect(address(page), ram(memory, 0..2));
        }
    };
    place([0, 3, 0, 0], [1, 3, 5]);
    place([0, 3, 0, 0], [0, 2, 4]);
    place([1, 2, 0, 1], [4, 0, 2]);
    place([1, 1, 0, 1], [2, 0, 4]);
}
