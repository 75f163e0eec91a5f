//! A map, its VM and the model of both, and what an edit does to them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hv_core::fake::FakeKvm;
use hv_core::{HostMemory as _, HostRange, MemorySlot};
use hv_memory::{
    AddressMap, AddressMapError, CommitError, Edit as MapEdit, LiveMap, Mapping, NewRegion, Plan,
    RegionId, SlotOperation, SlotRules, VcpusPaused,
};
use proptest::prelude::*;
use vm_memory::GuestAddress;

use crate::Checked;
use crate::kvm::{HostPage, Witness};
use crate::model::{
    ADDRESS_BITS, CELL, CELLS, DEEPEST, Kind, Model, PER_PAGE, Page, Region, Seen, Slot, pages,
    slots,
};
use crate::plan::{Edit, Fate, MEMORIES, MEMORY_PAGES, Op, Place, Setup, What};

pub(crate) const PAGE: u64 = CELL * PER_PAGE;

struct Paused;
impl VcpusPaused for Paused {}

pub(crate) struct World {
    pub(crate) live: LiveMap<Witness>,
    pub(crate) model: Model,
    pub(crate) witness: Arc<Witness>,
    pub(crate) kvm: FakeKvm,
    pub(crate) memories: Vec<Arc<Mapping>>,
    setup: Setup,
}

/// Why an operation is refused: the name of its error.
type Refusal = &'static str;

fn refusal(error: &AddressMapError) -> Refusal {
    use AddressMapError as E;
    match error {
        E::Empty { .. } => "empty",
        E::BeyondAddressBits { .. } => "beyond",
        E::Overlap { .. } => "overlap",
        E::Unaligned { .. } => "unaligned",
        E::OutsideTarget { .. } => "outside",
        E::AliasCycle { .. } => "cycle",
        E::TooDeep { .. } => "deep",
        E::InUse { .. } => "in use",
        E::NotAnAlias { .. } => "no alias",
        E::NoReadonlySlots { .. } => "readonly",
        E::TooManySlots { .. } => "slots",
        _ => "something else",
    }
}

fn beyond(cell: u64, len: u64) -> bool {
    cell + len > CELLS
}

impl World {
    pub(crate) fn new(setup: Setup) -> Self {
        let (kvm, witness) = Witness::new(setup.slots, setup.joins, setup.readonly);
        let memory = |_| Arc::new(Mapping::anonymous(MEMORY_PAGES * PAGE).unwrap());
        let memories = (0..MEMORIES).map(memory).collect();
        let map = AddressMap::new(ADDRESS_BITS).with_max_slot_size(setup.max * PAGE);
        let Setup { slots, joins, readonly, .. } = setup;
        let rules = SlotRules { slots, joins, readonly };
        let live = LiveMap::adopt(witness.clone(), map, rules).unwrap();
        Self { live, model: Model::default(), witness, kvm, memories, setup }
    }

    /// Makes an edit, and checks all that can be said of it. Whether it was committed.
    pub(crate) fn run(&mut self, edit: &Edit) -> Result<bool, TestCaseError> {
        let before = self.witness.slots();
        let pages_before = self.witness.pages();
        let settled = self.live.unsettled().is_empty();
        let mut model = self.model.clone();
        let mut expected = Vec::new();
        let Self { live, witness, memories, setup, .. } = self;
        let planned = live.edit(|map| {
            for &op in &edit.ops {
                if let Err((error, why)) = apply(map, &mut model, memories, op) {
                    expected.push((refusal(&error), why));
                    if !edit.goes_on {
                        return Err(error);
                    }
                }
            }
            Ok(())
        });
        // Each operation was judged as the model judges it.
        prop_assert!(expected.iter().all(|(said, why)| said == why), "{:?}", expected);
        let pages_after = pages(&model.cells());
        let in_the_end = match () {
            () if !edit.goes_on && !expected.is_empty() => Some(expected[0].1),
            () if model.overlaps() => Some("overlap"),
            () if model.is_unaligned() => Some("unaligned"),
            () if !setup.readonly && pages_after.values().any(|page| page.readonly) => {
                Some("readonly")
            }
            () => None,
        };
        let wanted = slots(&pages_after, setup.max);
        let too_many = wanted.len() > setup.slots as usize;
        let plan = match std::convert::identity(planned) {
            Ok(plan) => plan,
            Err(error) => {
                match (refusal(&error), in_the_end) {
                    // Either is found first.
                    ("overlap" | "unaligned", Some("overlap" | "unaligned")) => {}
                    ("slots", None) => prop_assert!(too_many || !setup.joins, "{}", error),
                    (said, Some(expected)) => prop_assert_eq!(said, expected, "{}", error),
                    (_, None) => prop_assert!(false, "{}", error),
                }
                prop_assert_eq!(witness.take_calls(), 0, "KVM was not asked");
                prop_assert_eq!(witness.slots(), before);
                return Ok(false);
            }
        };
        prop_assert_eq!(in_the_end, None);
        let after = host_pages(memories, &pages_after);
        prop_assert!(!too_many || !setup.joins, "more slots than there are");

        let operations = plan.operations().to_vec();
        if settled {
            check_minimal(*setup, memories, &operations, &before, &wanted, &after)?;
        }

        let is_hole = |page: &u64| {
            // A page that stays, and whose slot is taken away or moved.
            pages_before.contains_key(page) && after.contains_key(page) && {
                operations.iter().any(|operation| match operation {
                    SlotOperation::Delete { range } | SlotOperation::Move { range, .. } => {
                        range.contains(GuestAddress(page * PAGE))
                    }
                    _ => false,
                })
            }
        };
        let holes: BTreeSet<u64> = pages_before.keys().copied().filter(is_hole).collect();
        let told =
            plan.holes().iter().flat_map(|hole| hole.start().0 / PAGE..=hole.last().0 / PAGE);
        prop_assert_eq!(told.collect::<BTreeSet<u64>>(), holes);
        prop_assert_eq!(matches!(plan, Plan::Paused(_)), !plan.holes().is_empty());

        match edit.fate {
            Fate::Drop => {
                drop(plan);
                prop_assert_eq!(witness.take_calls(), 0);
                prop_assert_eq!(witness.slots(), before);
                return Ok(false);
            }
            Fate::Commit => {}
            Fate::Fail(n) => witness.fail_after(n, 1),
            Fate::FailAll(n, all) => witness.fail_after(n, all),
        }
        let committed = match std::convert::identity(plan) {
            Plan::Running(plan) => {
                let stays = pages_before.iter().filter(|(page, _)| after.contains_key(page));
                witness.watch(stays.map(|(page, (host, ..))| (*page, *host)).collect());
                plan.commit()
            }
            Plan::Paused(plan) => plan.commit(&Paused),
        };
        witness.watch(BTreeMap::new());
        let (injected, calls) = (witness.heal(), witness.take_calls());
        let unsettled = live.unsettled();
        match committed {
            Ok(()) => {
                prop_assert_eq!((injected, calls), (0, operations.len()));
                prop_assert_eq!(unsettled, []);
                self.model = model;
            }
            Err(CommitError::Refused(_)) => {
                prop_assert_eq!(injected, 1, "undone, so one failed");
                prop_assert_eq!(witness.slots(), before, "exactly, by number");
            }
            Err(CommitError::RollbackFailed { ranges, .. }) => {
                prop_assert!(injected > 1 || (injected == 1 && !setup.joins));
                prop_assert_eq!(unsettled, ranges);
            }
        }
        Ok(injected == 0)
    }

    /// Map, KVM and model agree.
    pub(crate) fn agree(&self) -> Checked {
        prop_assert_eq!(self.witness.complaints(), [""; 0]);
        prop_assert_eq!(self.kvm.findings(), []);
        // What KVM has, the map knows.
        let of_map: BTreeMap<_, _> =
            self.live.slots().into_iter().map(|info| (info.slot.id, info.slot)).collect();
        let of_kvm: BTreeMap<_, _> =
            self.witness.slots().into_iter().map(|slot| (slot.id, slot)).collect();
        prop_assert_eq!(&of_map, &of_kvm);
        let used = of_kvm.len();
        prop_assert_eq!(self.live.manager().available() as usize, self.setup.slots as usize - used);
        // And it is what the model has, but for what is unsettled.
        let unsettled = self.live.unsettled();
        let settled =
            |page: &u64| unsettled.iter().all(|range| !range.contains(GuestAddress(page * PAGE)));
        let mut there = self.witness.pages();
        let (cells, max) = (self.model.cells(), self.setup.max);
        let of_model = pages(&cells);
        let mut model = host_pages(&self.memories, &of_model);
        there.retain(|page, _| settled(page));
        model.retain(|page, _| settled(page));
        prop_assert_eq!(&there, &model);
        if self.setup.joins && unsettled.is_empty() {
            prop_assert_eq!(of_kvm.len(), slots(&of_model, max).len());
        }
        self.flat_agrees(&cells, &of_model)
    }

    /// The flattened map is the model, in as few ranges as can be.
    fn flat_agrees(&self, seen: &[Option<Seen>], pages: &BTreeMap<u64, Page>) -> Checked {
        let map = self.live.map();
        let flat: Vec<_> = map.flat().collect();
        let mut cells = BTreeMap::new();
        for range in &flat {
            prop_assert_eq!(range.range.len() % CELL, 0);
            for n in 0..range.range.len() / CELL {
                let memory = range.memory.as_ref();
                let memory = memory.map(|m| (m.host.address() + n * CELL, m.flags));
                let at = (range.region, range.offset / CELL + n, memory);
                cells.insert(range.range.start().0 / CELL + n, at);
            }
        }
        let rests: Vec<_> = map.sub_page().collect();
        let mut ranges = 0;
        let mut last = None;
        for cell in 0..CELLS {
            let seen = seen[cell as usize];
            let said = cells.get(&cell).map(|&(region, offset, memory)| {
                let host = memory.map(|(host, flags)| (host, flags.readonly, flags.log_dirty));
                (region, offset, host)
            });
            let expected = seen.map(|seen| {
                let host = seen
                    .memory
                    .map(|m| (host_address(&self.memories, &m), m.readonly, m.log_dirty));
                (seen.region, seen.offset, host)
            });
            prop_assert_eq!(said, expected, "cell {:#x}", cell);
            let found = map.at(GuestAddress(cell * CELL + 5));
            let traps = found.as_ref().map(|found| found.traps);
            let in_slot = pages.contains_key(&(cell / PER_PAGE));
            prop_assert_eq!(traps, seen.map(|_| !in_slot), "cell {:#x}", cell);
            let sub_page = rests.iter().any(|rest| rest.contains(GuestAddress(cell * CELL)));
            prop_assert_eq!(sub_page, !in_slot && seen.is_some_and(|s| s.memory.is_some()));
            let goes_on = |(region, offset): (RegionId, u64)| {
                seen.is_some_and(|seen| (seen.region, seen.offset) == (region, offset + 1))
            };
            ranges += usize::from(seen.is_some() && !last.is_some_and(goes_on));
            last = seen.map(|seen| (seen.region, seen.offset));
        }
        prop_assert_eq!(flat.len(), ranges);
        Ok(())
    }

    /// Takes all away, and sees that nobody holds memory any more.
    pub(crate) fn end(mut self) -> Checked {
        let regions: Vec<RegionId> = self.live.map().regions().map(|(id, ..)| id).collect();
        let plan = self.live.edit(|edit| {
            // What is seen through an alias can't go before it.
            for _ in 0..=DEEPEST {
                for &id in &regions {
                    let _ = edit.remove(id);
                }
            }
            Ok(())
        });
        plan.unwrap().commit(|_| Paused).unwrap();
        prop_assert_eq!(self.live.map().regions().count(), 0);
        prop_assert_eq!(self.live.map().flat().count(), 0);
        prop_assert_eq!(self.witness.slots(), []);
        prop_assert_eq!(self.witness.complaints(), [""; 0]);
        prop_assert_eq!(self.live.unsettled(), []);
        let held = self.memories.iter().map(Arc::strong_count);
        prop_assert!(held.into_iter().all(|holders| holders == 1), "somebody holds memory");
        Ok(())
    }
}

/// No slot is touched that could stay, and none twice that could be touched once.
fn check_minimal(
    setup: Setup,
    memories: &[Arc<Mapping>],
    operations: &[SlotOperation],
    before: &[MemorySlot],
    wanted: &[Slot],
    after: &BTreeMap<u64, HostPage>,
) -> Checked {
    let old: BTreeSet<Shape> = before.iter().map(shape).collect();
    let (mut gone, mut new, mut moved, mut logs) = (0, 0, 0, 0);
    for operation in operations {
        match operation {
            SlotOperation::Delete { .. } => gone += 1,
            SlotOperation::Move { .. } => moved += 1,
            SlotOperation::LogDirty { .. } => logs += 1,
            SlotOperation::Add(_) => new += 1,
        }
    }
    if !setup.joins {
        // What is right stays, whatever could be joined.
        let right = |&&(start, len, host, readonly): &&Shape| {
            let log = after.get(&(start / PAGE)).map(|&(.., log)| log);
            (0..len / PAGE).all(|n| {
                let right = (host + n * PAGE, readonly, log == Some(true));
                after.get(&(start / PAGE + n)) == Some(&right)
            })
        };
        prop_assert_eq!(gone + moved, old.len() - old.iter().filter(right).count());
        return Ok(());
    }
    let now: BTreeMap<Shape, bool> = wanted
        .iter()
        .map(|slot| {
            let host = host_address(memories, &slot.first);
            let shape = (slot.page * PAGE, slot.pages * PAGE, host, slot.first.readonly);
            (shape, slot.first.log_dirty)
        })
        .collect();
    let stays = |slot: &&MemorySlot| now.contains_key(&shape(slot));
    let toggled = before.iter().filter(stays).filter(|s| now[&shape(s)] != s.flags.log_dirty);
    prop_assert_eq!(logs, toggled.count());
    prop_assert_eq!(gone + moved, old.iter().filter(|s| !now.contains_key(s)).count());
    prop_assert_eq!(new + moved, now.keys().filter(|s| !old.contains(s)).count());
    // Each slot that could be moved is, unless it would be in a circle.
    let host = |&(_, len, host, readonly): &Shape| (len, host, readonly);
    let logging: BTreeSet<Shape> = before.iter().filter(|s| s.flags.log_dirty).map(shape).collect();
    let mut movable = BTreeMap::<_, usize>::new();
    for slot in old.iter().filter(|s| !now.contains_key(s) && !logging.contains(s)) {
        *movable.entry(host(slot)).or_default() += 1;
    }
    let mut could = 0;
    for (slot, _) in now.iter().filter(|(slot, log)| !old.contains(slot) && !**log) {
        if let Some(left @ 1..) = movable.get_mut(&host(slot)) {
            *left -= 1;
            could += 1;
        }
    }
    prop_assert!(moved == could || (could > 1 && (1..could).contains(&moved)));
    Ok(())
}

/// A slot without its number: address, bytes, host address, readonly.
type Shape = (u64, u64, u64, bool);

fn shape(slot: &MemorySlot) -> Shape {
    (slot.guest.0, slot.host.len() as u64, slot.host.address(), slot.flags.readonly)
}

fn host_address(memories: &[Arc<Mapping>], page: &Page) -> u64 {
    memories[page.memory].bytes().as_ptr().addr() as u64 + page.cell * CELL
}

fn host_pages(memories: &[Arc<Mapping>], pages: &BTreeMap<u64, Page>) -> BTreeMap<u64, HostPage> {
    let host = |page: &Page| (host_address(memories, page), page.readonly, page.log_dirty);
    pages.iter().map(|(&n, page)| (n, host(page))).collect()
}

/// Carries an operation out on the map and on the model. If it is refused: how, and why it should be.
fn apply(
    map: &mut MapEdit<'_>,
    model: &mut Model,
    memories: &[Arc<Mapping>],
    op: Op,
) -> Result<(), (AddressMapError, Refusal)> {
    let ids: Vec<RegionId> = model.regions.keys().copied().collect();
    let pick = |i: usize| ids.get(i % ids.len().max(1)).copied();
    let guest = |cell: u64| GuestAddress(cell * CELL);
    let judged =
        |said: Result<(), AddressMapError>, expected: Option<Refusal>| match (said, expected) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(why)) => panic!("{op:?} is to be refused: {why}"),
            (Err(error), expected) => Err((error, expected.unwrap_or("nothing"))),
        };
    match op {
        Op::Add { what, len, place, readonly, log_dirty } => {
            let (new, kind, fits) = match what {
                What::Memory { memory, offset } => {
                    let bytes = |cells: u64| usize::try_from(cells * CELL).unwrap();
                    let host = HostRange::new(memories[memory].clone(), bytes(offset), bytes(len));
                    let new = NewRegion::ram(format!("memory {memory}"), host.unwrap());
                    (new, Kind::Memory { memory, offset }, Ok(()))
                }
                What::Mmio => (NewRegion::mmio("device", len * CELL), Kind::Mmio, Ok(())),
                What::Alias { target, offset } => {
                    let Some(target) = pick(target) else { return Ok(()) };
                    let fits = match () {
                        () if model.depth(target) > DEEPEST => Err("deep"),
                        () if offset + len > model.regions[&target].len => Err("outside"),
                        () => Ok(()),
                    };
                    let new = NewRegion::alias("alias", target, offset * CELL, len * CELL);
                    (new, Kind::Alias { target, offset }, fits)
                }
            };
            let new = if readonly { new.readonly() } else { new };
            let new = if log_dirty { new.log_dirty() } else { new };
            let new = match place {
                Some(place) => new.at(guest(place.cell), place.priority),
                None => new,
            };
            let outside = place.filter(|place| beyond(place.cell, len)).map(|_| "beyond");
            let expected = (len == 0).then_some("empty").or(fits.err()).or(outside);
            let place = place.map(|Place { cell, priority }| (cell, priority));
            let region = Region { kind, len, readonly, log_dirty, place };
            let said = map.add(new).map(|id| {
                model.regions.insert(id, region);
            });
            judged(said, expected)
        }
        Op::Remove(i) => {
            let Some(id) = pick(i) else { return Ok(()) };
            let used = model.aliases(id).next().map(|_| "in use");
            let said = map.remove(id).map(|()| {
                model.regions.remove(&id);
            });
            judged(said, used)
        }
        Op::Place(i, Place { cell, priority }) => {
            let Some(id) = pick(i) else { return Ok(()) };
            let region = model.regions.get_mut(&id).unwrap();
            let outside = beyond(cell, region.len).then_some("beyond");
            let said = map.place(id, guest(cell), priority);
            judged(said.map(|()| region.place = Some((cell, priority))), outside)
        }
        Op::Swap(i, other) => {
            let (Some(a), Some(b)) = (pick(i), pick(other)) else { return Ok(()) };
            let (Some(at_a), Some(at_b)) = (model.regions[&a].place, model.regions[&b].place)
            else {
                return Ok(());
            };
            for (id, (cell, priority)) in [(a, at_b), (b, at_a)] {
                let region = model.regions.get_mut(&id).unwrap();
                let outside = beyond(cell, region.len).then_some("beyond");
                let said = map.place(id, guest(cell), priority);
                judged(said.map(|()| region.place = Some((cell, priority))), outside)?;
            }
            Ok(())
        }
        Op::Unplace(i) => {
            let Some(id) = pick(i) else { return Ok(()) };
            model.regions.get_mut(&id).unwrap().place = None;
            judged(map.unplace(id), None)
        }
        Op::Readonly(i, on) => {
            let Some(id) = pick(i) else { return Ok(()) };
            model.regions.get_mut(&id).unwrap().readonly = on;
            judged(map.set_readonly(id, on), None)
        }
        Op::LogDirty(i, on) => {
            let Some(id) = pick(i) else { return Ok(()) };
            model.regions.get_mut(&id).unwrap().log_dirty = on;
            judged(map.set_log_dirty(id, on), None)
        }
        Op::LogAll(on) => {
            for id in ids {
                model.regions.get_mut(&id).unwrap().log_dirty = on;
                judged(map.set_log_dirty(id, on), None)?;
            }
            Ok(())
        }
        Op::Retarget(i, target, offset) => {
            let (Some(id), Some(target)) = (pick(i), pick(target)) else { return Ok(()) };
            let Kind::Alias { .. } = model.regions[&id].kind else {
                return judged(map.retarget(id, target, offset * CELL), Some("no alias"));
            };
            let expected = match () {
                () if model.shows(target, id) => Some("cycle"),
                () if model.depth(target) + model.height(id) > DEEPEST => Some("deep"),
                () if offset + model.regions[&id].len > model.regions[&target].len => {
                    Some("outside")
                }
                () => None,
            };
            let said = map.retarget(id, target, offset * CELL);
            let kind = Kind::Alias { target, offset };
            judged(said.map(|()| model.regions.get_mut(&id).unwrap().kind = kind), expected)
        }
    }
}
