#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on fails"
)]
//! What edits of an address map come to: operations on slots, or errors that say what is in the way.

use std::sync::Arc;

use hv_core::fake::{FakeKvm, FakeVm, VmView};
use hv_core::init::{Config, init};
use hv_core::layer::{Faults, Interceptor as _};
use hv_core::{Errno, HostMemory as _, HostRange, Hypervisor as _, Ioctl, MemoryBackend};
use hv_memory::{
    AddressMap, AddressMapError, CommitError, Edit, GuestRam, GuestRange, LiveMap, Mapping,
    NewRegion, NewSlot, PausedPlan, Plan, RamLayout, RunningPlan, SlotOperation, SlotRules,
    VcpusPaused,
};
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;

const RULES: SlotRules = SlotRules { slots: 64, joins: true, readonly: true };

struct Paused;
impl VcpusPaused for Paused {}

type Change = Box<dyn Fn(&mut Edit<'_>) -> Result<(), AddressMapError>>;

/// Pages of host memory.
fn memory(pages: u64) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(pages * PAGE).unwrap())
}

/// Bytes of it.
fn part(memory: &Arc<Mapping>, offset: u64, len: u64) -> HostRange {
    let bytes = |n: u64| usize::try_from(n).unwrap();
    HostRange::new(memory.clone(), bytes(offset), bytes(len)).unwrap()
}

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE)
}

fn live_with(rules: SlotRules, map: AddressMap) -> (LiveMap<FakeVm>, VmView) {
    let vm = FakeKvm::default().create_vm(0).unwrap();
    for slot in map.slots() {
        vm.set_memory_slot(&slot).unwrap(); // as init does
    }
    let view = vm.view();
    (LiveMap::adopt(Arc::new(vm), map, rules).unwrap(), view)
}

fn live() -> (LiveMap<FakeVm>, VmView) {
    live_with(RULES, AddressMap::new(46))
}

/// The operations of a plan, in short.
fn short<M: MemoryBackend, R>(plan: &Plan<'_, M, R>) -> Vec<String> {
    let pages =
        |range: &GuestRange| format!("{:x}-{:x}", range.start().0 / PAGE, range.last().0 / PAGE);
    let operation = |operation: &SlotOperation| match operation {
        SlotOperation::Delete { range } => format!("delete {}", pages(range)),
        SlotOperation::Move { range, to } => format!("move {} to {:x}", pages(range), to.0 / PAGE),
        SlotOperation::LogDirty { range, log_dirty } => format!("log {} {log_dirty}", pages(range)),
        SlotOperation::Add(new) => {
            let range = GuestRange::new(new.guest, new.host.len() as u64).unwrap();
            let readonly = if new.flags.readonly { " readonly" } else { "" };
            format!("add {} {}{readonly}", pages(&range), new.name)
        }
    };
    plan.operations().iter().map(operation).collect()
}

fn running<M: MemoryBackend, R>(plan: Plan<'_, M, R>) -> RunningPlan<'_, M, R> {
    match plan {
        Plan::Running(plan) => plan,
        Plan::Paused(plan) => panic!("{plan:?}"),
    }
}

fn paused<M: MemoryBackend, R>(plan: Plan<'_, M, R>) -> PausedPlan<'_, M, R> {
    match plan {
        Plan::Running(plan) => panic!("{plan:?}"),
        Plan::Paused(plan) => plan,
    }
}

/// Where slots are, in pages: first, how many.
fn slots(view: &VmView) -> Vec<(u64, u64)> {
    let mut slots: Vec<_> =
        view.slots().iter().map(|s| (s.guest.0 / PAGE, s.host.len() as u64 / PAGE)).collect();
    slots.sort_unstable();
    slots
}

#[test]
fn a_vm_of_128_mib_starts_with_one_slot_before_its_irqchip() {
    let bytes = 128 << 20;
    let mut map = AddressMap::new(46);
    let ram = part(&Arc::new(Mapping::anonymous(bytes).unwrap()), 0, bytes);
    map.edit(|edit| edit.add(NewRegion::ram("RAM", ram).at(at(0), 0))).unwrap();
    let without_map = GuestRam::new(&RamLayout::new(bytes, &[], 46).unwrap()).unwrap();
    for slots in [map.slots(), without_map.slots().to_vec()] {
        let calls = Faults::none();
        let mut config = Config::new(PAGE, 1);
        config.slots = slots;
        let vm = init(|_| Ok(calls.over(FakeKvm::default())), &config).unwrap();
        let made: Vec<_> = calls.calls().into_iter().map(|site| site.call).collect();
        let nth = |ioctl: Ioctl| made.iter().position(|call| *call == ioctl.into()).unwrap();
        let of_slots = made.iter().filter(|call| **call == Ioctl::SetUserMemoryRegion.into());
        assert_eq!(of_slots.count(), 1);
        assert!(nth(Ioctl::SetUserMemoryRegion) < nth(Ioctl::CreateIrqchip));
        drop(vm);
    }
}

#[test]
fn the_map_of_a_started_vm_is_adopted_without_a_call() {
    let memory = memory(32);
    let mut map = AddressMap::new(46).with_max_slot_size(16 * PAGE + 5);
    map.edit(|edit| {
        edit.add(NewRegion::ram("RAM", part(&memory, 0, 31 * PAGE)).at(at(1), 0))?;
        edit.add(NewRegion::rom("ROM", part(&memory, 0, PAGE)).at(at(0x100), 0))
    })
    .unwrap();
    let calls = Faults::none();
    let mut config = Config::new(PAGE, 1);
    config.slots = map.slots();
    let started = init(|_| Ok(calls.over(FakeKvm::default())), &config).unwrap();
    let (_, vm, record) = started.into_parts();
    let made = calls.made();
    let mut live = LiveMap::adopt(Arc::new(vm), map, SlotRules::from(&record)).unwrap();
    assert_eq!(calls.made(), made);
    let slots: Vec<_> = live
        .slots()
        .into_iter()
        .map(|info| (info.slot.id.0, info.name.to_string(), info.slot.guest.0 / PAGE))
        .collect();
    let expected = [(0, "RAM", 1), (1, "RAM", 16), (2, "ROM", 0x100)];
    assert_eq!(slots, expected.map(|(id, name, page)| (id, name.to_owned(), page)));
    // It goes on from there: what stays is not touched.
    let more = NewRegion::ram("more", part(&memory, 0, PAGE)).at(at(0x80), 0);
    assert_eq!(short(&live.edit(|edit| edit.add(more)).unwrap()), ["add 80-80 more"]);
}

#[test]
fn memory_that_only_comes_or_goes_may_do_so_while_vcpus_run() {
    let (mut live, view) = live();
    let ram = part(&memory(4), 0, 4 * PAGE);
    let plan = live.edit(|edit| edit.add(NewRegion::ram("RAM", ram).at(at(8), 0))).unwrap();
    assert_eq!(short(&plan), ["add 8-b RAM"]);
    let id = running(plan).commit().unwrap();
    assert_eq!(slots(&view), [(8, 4)]);
    for log_dirty in [true, false] {
        let plan = live.edit(|edit| edit.set_log_dirty(id, log_dirty)).unwrap();
        assert_eq!(short(&plan), [format!("log 8-b {log_dirty}")]);
        assert!(matches!(plan, Plan::Running(_)));
        plan.commit(|_| Paused).unwrap();
    }
    let plan = live.edit(|edit| edit.place(id, at(0x10), 0)).unwrap();
    assert_eq!(short(&plan), ["move 8-b to 10"]);
    running(plan).commit().unwrap();
    let plan = live.edit(|edit| edit.remove(id)).unwrap();
    assert_eq!(short(&plan), ["delete 10-13"]);
    running(plan).commit().unwrap();
    assert_eq!(slots(&view), []);
}

#[test]
fn memory_that_stays_but_is_away_for_a_moment_takes_paused_vcpus() {
    let (mut live, view) = live();
    let ram = part(&memory(8), 0, 8 * PAGE);
    let add = live.edit(|edit| edit.add(NewRegion::ram("RAM", ram).at(at(0), 0))).unwrap();
    let id = add.commit(|_| Paused).unwrap();

    // Split.
    let plan = live.edit(|edit| edit.add(NewRegion::mmio("device", PAGE).at(at(3), 1))).unwrap();
    assert_eq!(short(&plan), ["delete 0-7", "add 0-2 RAM", "add 4-7 RAM"]);
    let holes: Vec<_> = plan.holes().iter().map(ToString::to_string).collect();
    assert_eq!(holes, ["0x0-0x2fff", "0x4000-0x7fff"]);
    let device = paused(plan).commit(&Paused).unwrap();
    assert_eq!(slots(&view), [(0, 3), (4, 4)]);

    // Joined.
    let plan = live.edit(|edit| edit.remove(device)).unwrap();
    assert_eq!(short(&plan), ["delete 0-2", "delete 4-7", "add 0-7 RAM"]);
    assert!(matches!(plan, Plan::Paused(_)));
    plan.commit(|holes| {
        assert_eq!(holes.len(), 2);
        Paused
    })
    .unwrap();
    assert_eq!(slots(&view), [(0, 8)]);

    // Readonly.
    let plan = live.edit(|edit| edit.set_readonly(id, true)).unwrap();
    assert_eq!(short(&plan), ["delete 0-7", "add 0-7 RAM readonly"]);
    assert!(matches!(plan, Plan::Paused(_)));
    plan.commit(|_| Paused).unwrap();

    // Shifted onto itself.
    let plan = live.edit(|edit| edit.place(id, at(2), 0)).unwrap();
    assert_eq!(short(&plan), ["move 0-7 to 2"]);
    assert_eq!(plan.holes(), [GuestRange::new(at(2), 6 * PAGE).unwrap()]);
    drop(plan);
    assert_eq!(slots(&view), [(0, 8)], "not committed");
    assert_eq!(live.map().flat().next().unwrap().range.start(), at(0));
}

#[test]
fn what_is_linear_is_one_slot_and_what_only_looks_so_is_not() {
    let (one, other) = (memory(4), memory(4));
    let mut map = AddressMap::new(46);
    let slots = |map: &AddressMap| -> Vec<_> {
        map.slots().iter().map(|s| (s.guest.0 / PAGE, s.host.len() as u64 / PAGE)).collect()
    };
    // Neither begins or ends on a page, but together they do.
    map.edit(|edit| {
        edit.add(NewRegion::ram("a", part(&one, 0, 0x1800)).at(at(0), 0))?;
        edit.add(NewRegion::ram("b", part(&one, 0x1800, 0x800)).at(GuestAddress(0x1800), 1))
    })
    .unwrap();
    assert_eq!(slots(&map), [(0, 2)]);
    assert_eq!(map.sub_page().count(), 0);
    // The next memory is another mapping, wherever the host has put it.
    map.edit(|edit| edit.add(NewRegion::ram("c", part(&other, 0, PAGE)).at(at(2), 0))).unwrap();
    assert_eq!(slots(&map), [(0, 2), (2, 1)]);
}

#[test]
fn memory_that_shares_its_page_traps() {
    let memory = memory(4);
    let mut map = AddressMap::new(46);
    map.edit(|edit| {
        edit.add(NewRegion::ram("RAM", part(&memory, 0x800, 0x3000)).at(GuestAddress(0x800), 0))?;
        edit.add(NewRegion::mmio("device", 0x10).at(GuestAddress(0x2ff0), 1))
    })
    .unwrap();
    let rests: Vec<_> = map.sub_page().map(|rest| rest.to_string()).collect();
    assert_eq!(rests, ["0x800-0xfff", "0x2000-0x2fef", "0x3000-0x37ff"]);
    let found = |address| {
        let found = map.at(GuestAddress(address))?;
        Some((found.flat.name.to_string(), found.traps))
    };
    assert_eq!(found(0x7ff), None);
    assert_eq!(found(0x800), Some(("RAM".into(), true)));
    assert_eq!(found(0x1000), Some(("RAM".into(), false)));
    assert_eq!(found(0x2ff0), Some(("device".into(), true)));
    // What traps can be answered from what the map says is there.
    let flat = map.at(GuestAddress(0x3004)).unwrap().flat;
    let host = flat.memory.unwrap().host;
    let offset = 0x3004 - flat.range.start().0;
    assert_eq!(host.address() + offset, part(&memory, 0x3004, 1).address());
    assert_eq!(flat.offset + offset, 0x2804);
}

#[test]
fn two_slots_that_change_places_are_moved_as_far_as_can_be() {
    let (mut live, view) = live();
    let memories = [memory(2), memory(2), memory(2)];
    let plan = live.edit(|edit| {
        let ids = [0, 1, 2].map(|n| {
            let host = part(&memories[n], 0, 2 * PAGE);
            edit.add(NewRegion::ram(format!("RAM {n}"), host).at(at(2 * n as u64), 0))
        });
        let [a, b, c] = ids;
        Ok([a?, b?, c?])
    });
    let [a, b, c] = plan.unwrap().commit(|_| Paused).unwrap();
    // Each one further on: the last goes first.
    let shift = |edit: &mut Edit<'_>| {
        edit.place(a, at(2), 0)?;
        edit.place(b, at(4), 0)?;
        edit.place(c, at(6), 0)
    };
    let plan = live.edit(shift).unwrap();
    assert_eq!(short(&plan), ["move 4-5 to 6", "move 2-3 to 4", "move 0-1 to 2"]);
    plan.commit(|_| Paused).unwrap();
    // In a circle one has to step aside.
    let plan = live.edit(|edit| {
        edit.place(a, at(4), 0)?;
        edit.place(b, at(6), 0)?;
        edit.place(c, at(2), 0)
    });
    let plan = plan.unwrap();
    assert_eq!(short(&plan), ["delete 2-3", "move 6-7 to 2", "move 4-5 to 6", "add 4-5 RAM 0"]);
    plan.commit(|_| Paused).unwrap();
    let hosts: Vec<_> = live.slots().iter().map(|info| info.slot.host.address()).collect();
    assert_eq!(hosts, [2, 0, 1].map(|n| memories[n].bytes().as_ptr().addr() as u64));
    assert_eq!(slots(&view), [(2, 2), (4, 2), (6, 2)]);
}

#[test]
fn without_joins_slots_stay_as_they_were_cut() {
    let memory = memory(8);
    let rules = SlotRules { joins: false, ..RULES };
    let (mut live, view) = live_with(rules, AddressMap::new(46));
    let ram = |first, pages| part(&memory, first * PAGE, pages * PAGE);
    let add =
        |name: &'static str, first, pages| NewRegion::ram(name, ram(first, pages)).at(at(first), 0);
    let low = live.edit(|edit| edit.add(add("low", 0, 4))).unwrap().commit(|_| Paused).unwrap();
    // Beside it, the same memory going on: its own slot, and vCPUs may run.
    let plan = live.edit(|edit| edit.add(add("high", 4, 4))).unwrap();
    assert_eq!(short(&plan), ["add 4-7 high"]);
    let high = running(plan).commit().unwrap();
    // Both have to go for a moment, and come back as they were.
    let plan = live.edit(|edit| {
        edit.set_readonly(low, true)?;
        edit.set_readonly(high, true)
    });
    let plan = plan.unwrap();
    assert_eq!(
        short(&plan),
        ["delete 0-3", "delete 4-7", "add 0-3 low readonly", "add 4-7 high readonly"]
    );
    plan.commit(|_| Paused).unwrap();
    // A slot that is gone is where none can be around it, as long as its number is unused.
    live.edit(|edit| edit.unplace(high)).unwrap().commit(|_| Paused).unwrap();
    live.edit(|edit| edit.unplace(low)).unwrap().commit(|_| Paused).unwrap();
    let plan = live.edit(|edit| edit.add(add("all", 0, 8))).unwrap();
    assert_eq!(short(&plan), ["add 0-3 all", "add 4-7 all"]);
    plan.commit(|_| Paused).unwrap();
    assert_eq!(slots(&view), [(0, 4), (4, 4)]);
}

#[test]
fn what_is_wrong_is_said_with_names_and_ranges_and_changes_nothing() {
    let memory = memory(8);
    let (mut live, view) = live();
    let ram = part(&memory, 0, 4 * PAGE);
    let plan = live.edit(|edit| {
        let ram = edit.add(NewRegion::ram("RAM", ram.clone()).at(at(1), 0))?;
        Ok((ram, edit.add(NewRegion::alias("high RAM", ram, 0, 4 * PAGE))?))
    });
    let (id, alias) = plan.unwrap().commit(|_| Paused).unwrap();
    let host = memory.bytes().as_ptr().addr();
    let name = |page: u64| NewRegion::mmio("device", PAGE).at(at(page), 0);
    let add = |new: NewRegion| -> Change { Box::new(move |edit| edit.add(new.clone()).map(drop)) };
    let device = |address, len| NewRegion::mmio("device", len).at(GuestAddress(address), 3);
    let cases: Vec<(Change, String)> = vec![
        (
            add(name(4)),
            r#"region "device" at 0x4000-0x4fff overlaps "RAM" at 0x1000-0x4fff, and both have priority 0: which of them is seen?"#.into(),
        ),
        (
            add(device(u64::MAX - 0xfff, 0x2000)),
            r#"region "device" of 0x2000 bytes at 0xfffffffffffff000 passes the last address"#.into(),
        ),
        (
            add(device((1 << 46) - 0x1000, 0x1001)),
            r#"region "device" at 0x3ffffffff000-0x400000000000 is beyond the 46 physical address bits"#.into(),
        ),
        (add(device(0, 0)), r#"region "device" has no bytes"#.into()),
        (
            add(NewRegion::ram("odd", part(&memory, 0x10, 0x1000)).at(GuestAddress(0x8020), 0)),
            format!(
                r#"region "odd" at 0x8020-0x901f shows memory at host address {:#x}: both must begin at the same offset in a page of 0x1000 bytes"#,
                host + 0x10
            ),
        ),
        (
            add(NewRegion::alias("window", id, 0x3000, 0x1001)),
            r#"alias "window" shows 0x1001 bytes from offset 0x3000 of "RAM", which has 0x4000"#.into(),
        ),
        (
            add(NewRegion::alias("window", id, u64::MAX, 2)),
            r#"alias "window" shows 0x2 bytes from offset 0xffffffffffffffff of "RAM", which has 0x4000"#.into(),
        ),
        (
            Box::new(move |edit| edit.retarget(id, alias, 0)),
            r#"region "RAM" is no alias: it can't show another region"#.into(),
        ),
        (
            Box::new(move |edit| {
                let second = edit.add(NewRegion::alias("second", alias, 0, 4 * PAGE))?;
                edit.retarget(alias, second, 0)
            }),
            r#"alias "high RAM" can't show "second", which shows "high RAM""#.into(),
        ),
        (
            Box::new(move |edit| edit.retarget(alias, alias, 0)),
            r#"alias "high RAM" can't show "high RAM", which shows "high RAM""#.into(),
        ),
        (
            Box::new(move |edit| edit.remove(id)),
            r#"region "RAM" can't be removed: alias "high RAM" shows it"#.into(),
        ),
        (
            Box::new(move |edit| {
                let mut shown = alias;
                for n in 2..10 {
                    shown = edit.add(NewRegion::alias(format!("alias {n}"), shown, 0, PAGE))?;
                }
                Ok(())
            }),
            r#"alias "alias 9" of "alias 8" would make more than 8 aliases of aliases"#.into(),
        ),
        (
            Box::new(move |edit| {
                edit.remove(alias)?;
                edit.unplace(alias)
            }),
            "the address map has no region 1".into(),
        ),
    ];
    let before: Vec<_> =
        live.map().regions().map(|(id, name, range)| (id, name.to_owned(), range)).collect();
    let flat: Vec<_> = live.map().flat().collect();
    for (change, text) in cases {
        let error = live.edit(|edit| change(edit)).unwrap_err();
        assert_eq!(error.to_string(), text);
        let regions = live.map().regions().map(|(id, name, range)| (id, name.to_owned(), range));
        assert_eq!(regions.collect::<Vec<_>>(), before, "{text}");
        assert_eq!(live.map().flat().collect::<Vec<_>>(), flat, "{text}");
        assert_eq!(slots(&view), [(1, 4)]);
    }
}

#[test]
fn more_slots_than_there_are_and_readonly_without_them_are_refused() {
    let memory = memory(8);
    let rules = SlotRules { slots: 2, readonly: false, ..RULES };
    let (mut live, view) = live_with(rules, AddressMap::new(46));
    let ram =
        |page: u64| NewRegion::ram(format!("RAM {page}"), part(&memory, 0, PAGE)).at(at(page), 0);
    live.edit(|edit| edit.add(ram(0))).unwrap().commit(|_| Paused).unwrap();
    assert_eq!(live.manager().available(), 1);
    let error = live.edit(|edit| edit.add(ram(2)).and(edit.add(ram(4)))).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the address map needs 2 more slots, from "RAM 2" at 0x2000-0x2fff on, and 1 are free"#
    );
    let rom = NewRegion::rom("ROM", part(&memory, 0, PAGE)).at(at(9), 0);
    let error = live.edit(|edit| edit.add(rom)).unwrap_err();
    assert!(error.to_string().starts_with(r#"region "ROM" at 0x9000-0x9fff can't be readonly"#));
    assert_eq!((slots(&view), live.map().regions().count()), (vec![(0, 1)], 1));
}

#[test]
fn a_slot_that_is_not_of_the_map_is_left_alone() {
    let memory = memory(8);
    let (mut live, view) = live();
    let new = NewSlot {
        name: "firmware".into(),
        guest: at(5),
        host: part(&memory, 0, PAGE),
        flags: Default::default(),
    };
    let firmware = live.manager().add(new).unwrap();
    let ram = NewRegion::ram("RAM", part(&memory, 0, 8 * PAGE)).at(at(0), 0);
    let plan = live.edit(|edit| edit.add(ram.clone())).unwrap();
    let error = plan.commit(|_| Paused).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the guest's memory is as it was: memory "RAM" at 0x0-0x7fff overlaps "firmware" at 0x5000-0x5fff"#
    );
    assert_eq!(live.map().regions().count(), 0);
    drop(firmware);
    live.edit(|edit| edit.add(ram)).unwrap().commit(|_| Paused).unwrap();
    assert_eq!(slots(&view), [(0, 8)]);
}

#[test]
fn what_can_not_be_undone_is_told_and_repaired_by_the_next_commit() {
    let memory = memory(8);
    // A VM, its memory, then a device in the middle of that: one slot less, then two more. What fails
    // is the last of these and what undoes the one before, or that and what undoes the first.
    for n in [4, 3] {
        let (first, second) = (Faults::nth(n, Errno::ENOMEM), Faults::nth(n, Errno::EBUSY));
        let vm = first.over(second.over(FakeKvm::default())).create_vm(0).unwrap();
        let view = vm.inner().inner().view();
        let mut live = LiveMap::adopt(Arc::new(vm), AddressMap::new(46), RULES).unwrap();
        let ram = NewRegion::ram("RAM", part(&memory, 0, 8 * PAGE)).at(at(0), 0);
        live.edit(|edit| edit.add(ram)).unwrap().commit(|_| Paused).unwrap();
        let device = NewRegion::mmio("device", PAGE).at(at(3), 1);
        let plan = live.edit(|edit| edit.add(device.clone())).unwrap();
        let error = plan.commit(|_| Paused).unwrap_err();
        let CommitError::RollbackFailed { ranges, .. } = &error else { panic!("{error}") };
        assert_eq!(live.unsettled(), *ranges);
        assert_eq!(ranges.len(), 1);
        assert_eq!(ranges[0].to_string(), "0x0-0x7fff");
        assert!(error.to_string().contains("differs from its map at 0x0-0x7fff"), "{error}");
        assert_ne!(slots(&view), [(0, 8)]);
        assert_eq!(live.map().regions().count(), 1, "the map is as it was");
        assert_eq!(live.slots().len(), view.slots().len(), "and the slots there are, are known");
        live.edit(|_| Ok(())).unwrap().commit(|_| Paused).unwrap();
        assert_eq!(slots(&view), [(0, 8)]);
        assert_eq!(live.unsettled(), []);
    }
}
