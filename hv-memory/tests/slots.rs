#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! Sequences of operations on slots, with failures injected, against a naive model of pages and a VM
//! that keeps KVM's rules for slots.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hv_core::{
    CoalescedZone, Errno, Error, HostMemory, HostRange, Ioctl, MemoryBackend, MemorySlot,
    SlotFlags, SlotId,
};
use hv_memory::{
    GuestRam, Mapping, NewSlot, RamLayout, Slot, SlotError, SlotLimits, SlotManager, VcpusPaused,
};
use proptest::prelude::*;
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;

/// A VM as KVM is. Whatever KVM would refuse is a complaint.
#[derive(Debug)]
struct RuleVm {
    state: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    limit: u32,
    /// By slot: guest address, size, host address, flags.
    slots: BTreeMap<u32, (u64, u64, u64, SlotFlags)>,
    calls: usize,
    /// Calls from now on that succeed, then how many fail.
    faults: Option<(usize, usize)>,
    complaints: Vec<String>,
}

impl Rules {
    fn call(&mut self) -> Result<(), Error> {
        self.calls += 1;
        match &mut self.faults {
            Some((0, failures)) if *failures > 0 => {
                *failures -= 1;
                Err(Error::new(Ioctl::SetUserMemoryRegion, Errno::ENOMEM))
            }
            Some((calls, _)) => {
                *calls = calls.saturating_sub(1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn refuse(&mut self, errno: Errno, why: String) -> Result<(), Error> {
        self.complaints.push(why);
        Err(Error::new(Ioctl::SetUserMemoryRegion, errno))
    }

    /// Pages the guest has: where they are in the host, and whether it can't write them.
    fn pages(&self) -> BTreeMap<u64, (u64, bool)> {
        let pages = self.slots.values().flat_map(|&(guest, size, host, flags)| {
            (0..size / PAGE).map(move |n| (guest / PAGE + n, (host + n * PAGE, flags.readonly)))
        });
        pages.collect()
    }
}

impl MemoryBackend for RuleVm {
    fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        let mut rules = self.state.lock().unwrap();
        rules.call()?;
        let (id, guest, size) = (slot.id.0, slot.guest.0, slot.host.len() as u64);
        let host = slot.host.address();
        let aligned = [guest, size, host].iter().all(|value| value % PAGE == 0);
        let live = rules.slots.get(&id).copied();
        let illegal_change = live.is_some_and(|(_, live_size, live_host, flags)| {
            (live_size, live_host) != (size, host) || flags.readonly != slot.flags.readonly
        });
        let fits = guest.checked_add(size).is_some_and(|end| end <= 1 << 52);
        if !aligned || size == 0 || !fits || id >= rules.limit || illegal_change {
            return rules.refuse(Errno::EINVAL, format!("{slot:?}, live {live:?}"));
        }
        let overlaps = rules.slots.iter().any(|(&other, &(start, len, ..))| {
            other != id && start < guest + size && guest < start + len
        });
        if overlaps {
            return rules.refuse(Errno::EEXIST, format!("{slot:?} overlaps"));
        }
        rules.slots.insert(id, (guest, size, host, slot.flags));
        Ok(())
    }

    fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error> {
        let mut rules = self.state.lock().unwrap();
        rules.call()?;
        match rules.slots.remove(&id.0) {
            Some(_) => Ok(()),
            None => rules.refuse(Errno::EINVAL, format!("slot {id} is not there")),
        }
    }

    fn dirty_log(&self, id: SlotId, words: &mut [u64]) -> Result<(), Error> {
        let mut rules = self.state.lock().unwrap();
        rules.call()?;
        match rules.slots.get(&id.0) {
            Some(&(_, size, _, flags)) if flags.log_dirty => {
                assert_eq!(words.len() as u64, (size / PAGE).div_ceil(64));
                words.fill(0);
                Ok(())
            }
            _ => rules.refuse(Errno::ENOENT, format!("slot {id} does not log")),
        }
    }

    fn clear_dirty_log(&self, _: SlotId, _: u64, _: u32, _: &[u64]) -> Result<(), Error> {
        Err(Error::new(Ioctl::ClearDirtyLog, Errno::ENOENT))
    }

    fn reset_dirty_rings(&self) -> Result<u32, Error> {
        Err(Error::new(Ioctl::ResetDirtyRings, Errno::EINVAL))
    }

    fn register_coalesced_zone(&self, _: CoalescedZone) -> Result<(), Error> {
        Ok(())
    }

    fn unregister_coalesced_zone(&self, _: CoalescedZone) -> Result<(), Error> {
        Ok(())
    }
}

struct Paused;
impl VcpusPaused for Paused {}

const LIMITS: SlotLimits = SlotLimits { slots: 8, address_bits: 36 };

fn vm() -> Arc<RuleVm> {
    Arc::new(RuleVm { state: Mutex::new(Rules { limit: LIMITS.slots, ..Rules::default() }) })
}

fn manager(vm: &Arc<RuleVm>) -> SlotManager<RuleVm> {
    SlotManager::adopt::<&str>(vm.clone(), [], LIMITS).unwrap().0
}

fn memory(pages: u64) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(pages * PAGE).unwrap())
}

fn new(memory: &Arc<Mapping>, guest: u64, first: u64, pages: u64, readonly: bool) -> NewSlot {
    let bytes = |pages: u64| usize::try_from(pages * PAGE).unwrap();
    NewSlot {
        name: format!("page {first}").into(),
        guest: GuestAddress(guest),
        host: HostRange::new(memory.clone(), bytes(first), bytes(pages)).unwrap(),
        flags: SlotFlags { readonly, log_dirty: false },
    }
}

#[derive(Debug, Clone)]
enum Op {
    Add { page: u64, pages: u64, first: u64, readonly: bool },
    Remove(usize),
    Drop(usize),
    Move { which: usize, page: u64 },
    Unmap(usize),
    Map(usize),
    LogDirty(usize, bool),
}

fn ops() -> impl Strategy<Value = Vec<(Op, bool)>> {
    let op = prop_oneof![
        5 => (0..24_u64, 1..6_u64, 0..8_u64, any::<bool>()).prop_map(
            |(page, pages, first, readonly)| Op::Add { page, pages, first, readonly }),
        1 => any::<usize>().prop_map(Op::Remove),
        2 => any::<usize>().prop_map(Op::Drop),
        2 => (any::<usize>(), 0..24_u64).prop_map(|(which, page)| Op::Move { which, page }),
        2 => any::<usize>().prop_map(Op::Unmap),
        3 => any::<usize>().prop_map(Op::Map),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, on)| Op::LogDirty(which, on)),
    ];
    prop::collection::vec((op, prop::bool::weighted(0.2)), 0..60)
}

/// A slot as its owner knows it.
struct Owned {
    slot: Slot<RuleVm>,
    page: u64,
    pages: u64,
    host: u64,
    readonly: bool,
    mapped: bool,
}

impl Owned {
    fn pages(&self) -> BTreeMap<u64, (u64, bool)> {
        let pages = if self.mapped { self.pages } else { 0 };
        (0..pages).map(|n| (self.page + n, (self.host + n * PAGE, self.readonly))).collect()
    }
}

fn run(ops: &[(Op, bool)]) -> Result<(), TestCaseError> {
    let vm = vm();
    let manager = manager(&vm);
    let memory = memory(16);
    let mut owned: Vec<Owned> = Vec::new();
    // What KVM kept of owners that are gone, by slot.
    let mut kept: BTreeMap<SlotId, BTreeMap<u64, (u64, bool)>> = BTreeMap::new();
    for (op, fault) in ops {
        vm.state.lock().unwrap().faults = fault.then_some((0, 1));
        if matches!(op, Op::Add { .. }) {
            // An addition tries the lot again first, and the failure hits the first of them.
            let still = kept.pop_first().filter(|_| *fault);
            kept = still.into_iter().collect();
        }
        let failed = |vm: &RuleVm| vm.state.lock().unwrap().faults == Some((0, 0));
        let pick = |which: &usize| (!owned.is_empty()).then(|| which % owned.len());
        let taken = |except: Option<usize>, page: u64, pages: u64| {
            let others = owned.iter().enumerate().filter(|(i, _)| Some(*i) != except);
            let mut others = others.flat_map(|(_, o)| o.pages().into_keys());
            others.any(|p| (page..page + pages).contains(&p))
                || kept
                    .values()
                    .any(|pages_kept| pages_kept.range(page..page + pages).next().is_some())
        };
        match op {
            Op::Add { page, pages, first, readonly } => {
                let taken = taken(None, *page, *pages);
                let full = owned.len() + kept.len() >= LIMITS.slots as usize;
                match manager.add(new(&memory, page * PAGE, *first, *pages, *readonly)) {
                    Ok(slot) => {
                        prop_assert!(!taken && !full);
                        let used = |id| owned.iter().any(|o| o.slot.id() == id);
                        let free = |id: &SlotId| !used(*id) && !kept.contains_key(id);
                        prop_assert_eq!(Some(slot.id()), (0..).map(SlotId).find(free));
                        let host = memory.bytes().as_ptr().addr() as u64 + first * PAGE;
                        owned.push(Owned {
                            slot,
                            page: *page,
                            pages: *pages,
                            host,
                            readonly: *readonly,
                            mapped: true,
                        });
                    }
                    Err(SlotError::Overlap { .. }) => prop_assert!(taken),
                    Err(SlotError::NoFreeSlot { .. }) => prop_assert!(full),
                    Err(SlotError::Kvm { .. }) => prop_assert!(failed(&vm)),
                    Err(error) => prop_assert!(false, "{}", error),
                }
            }
            Op::Remove(which) | Op::Drop(which) => {
                let Some(i) = pick(which) else { continue };
                let gone = owned.remove(i);
                let (id, pages) = (gone.slot.id(), gone.pages());
                match op {
                    Op::Remove(_) => prop_assert_eq!(gone.slot.remove().is_err(), failed(&vm)),
                    _ => drop(gone.slot),
                }
                if failed(&vm) {
                    kept.insert(id, pages);
                }
            }
            Op::Move { which, page } => {
                let Some(i) = pick(which) else { continue };
                let taken = owned[i].mapped && taken(Some(i), *page, owned[i].pages);
                match owned[i].slot.move_to(GuestAddress(page * PAGE)) {
                    Ok(()) => {
                        prop_assert!(!taken || owned[i].page == *page);
                        owned[i].page = *page;
                    }
                    Err(SlotError::Overlap { .. }) => prop_assert!(taken),
                    Err(error) => prop_assert!(failed(&vm), "{}", error),
                }
            }
            Op::Unmap(which) => {
                let Some(i) = pick(which) else { continue };
                let done = owned[i].slot.unmap(&Paused);
                prop_assert_eq!(done.is_err(), failed(&vm));
                owned[i].mapped &= done.is_err();
            }
            Op::Map(which) => {
                let Some(i) = pick(which) else { continue };
                let taken = !owned[i].mapped && taken(Some(i), owned[i].page, owned[i].pages);
                match owned[i].slot.map() {
                    Ok(()) => {
                        prop_assert!(!taken);
                        owned[i].mapped = true;
                    }
                    Err(SlotError::Overlap { .. }) => prop_assert!(taken),
                    Err(error) => prop_assert!(failed(&vm), "{}", error),
                }
            }
            Op::LogDirty(which, on) => {
                let Some(i) = pick(which) else { continue };
                let done = owned[i].slot.set_log_dirty(*on);
                prop_assert_eq!(done.is_err(), failed(&vm));
                let flags = owned[i].slot.info().unwrap().slot.flags;
                prop_assert!(done.is_err() || flags.log_dirty == *on);
            }
        }
        let rules = vm.state.lock().unwrap();
        prop_assert_eq!(&rules.complaints, &Vec::<String>::new());
        // What the VM has, the manager has, and it is what the owners asked for.
        let mut model: BTreeMap<_, _> = owned.iter().flat_map(Owned::pages).collect();
        model.extend(kept.values().flatten().map(|(page, host)| (*page, *host)));
        prop_assert_eq!(&rules.pages(), &model);
        let ours = manager.slots().into_iter().filter(|info| info.mapped).map(|info| {
            let MemorySlot { id, guest, host, flags } = info.slot;
            (id.0, (guest.0, host.len() as u64, host.address(), flags))
        });
        prop_assert_eq!(&ours.collect::<BTreeMap<_, _>>(), &rules.slots);
        let ordered: Vec<_> = manager.by_address().iter().map(|info| info.slot.guest.0).collect();
        let mut starts: Vec<_> = rules.slots.values().map(|slot| slot.0).collect();
        starts.sort_unstable();
        prop_assert_eq!(ordered, starts);
        drop(rules);
        for page in 0..30 {
            let found = manager.at(GuestAddress(page * PAGE + 5)).is_some();
            prop_assert_eq!(found, model.contains_key(&page));
        }
    }
    vm.state.lock().unwrap().faults = None;
    drop(owned);
    drop(manager.add(new(&memory, 100 * PAGE, 0, 1, false)).unwrap());
    prop_assert!(vm.state.lock().unwrap().slots.is_empty());
    prop_assert_eq!(manager.available(), LIMITS.slots);
    drop(manager);
    prop_assert_eq!(Arc::strong_count(&memory), 1, "nobody holds the memory any more");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn manager_kvm_and_owners_agree(ops in ops()) {
        run(&ops)?;
    }
}

#[test]
fn what_kvm_would_refuse_is_refused_by_name_before_it_is_asked() {
    let vm = vm();
    let manager = manager(&vm);
    let memory = memory(4);
    let _ram = manager.add(NewSlot { name: "RAM".into(), ..new(&memory, 0x1000, 0, 2, false) });
    let calls = vm.state.lock().unwrap().calls;
    let rom = |guest, offset, len| NewSlot {
        name: "ROM".into(),
        guest: GuestAddress(guest),
        host: HostRange::new(memory.clone(), offset, len).unwrap(),
        flags: SlotFlags { readonly: true, log_dirty: false },
    };
    let at = memory.bytes().as_ptr().addr();
    for (new, text) in [
        (
            rom(0x2000, 0, 0x2000),
            r#"memory "ROM" at 0x2000-0x3fff overlaps "RAM" at 0x1000-0x2fff"#.to_owned(),
        ),
        (rom(0x5000, 0, 0), r#"memory "ROM" has no bytes"#.to_owned()),
        (
            rom(u64::MAX - 0xfff, 0, 0x2000),
            r#"memory "ROM" of 0x2000 bytes at 0xfffffffffffff000 passes the last address"#
                .to_owned(),
        ),
        (
            rom(0x5800, 0, 0x1000),
            format!(
                r#"memory "ROM" at 0x5800-0x67ff, host address {at:#x}, is not aligned to pages of 4096 bytes"#
            ),
        ),
        (
            rom(0x5000, 0x800, 0x1000),
            format!(
                r#"memory "ROM" at 0x5000-0x5fff, host address {:#x}, is not aligned to pages of 4096 bytes"#,
                at + 0x800
            ),
        ),
        (
            rom(0x5000, 0, 0x1800),
            format!(
                r#"memory "ROM" at 0x5000-0x67ff, host address {at:#x}, is not aligned to pages of 4096 bytes"#
            ),
        ),
        (
            rom((1 << 36) - 0x1000, 0, 0x2000),
            r#"memory "ROM" at 0xffffff000-0x1000000fff is beyond the 36 physical address bits"#
                .to_owned(),
        ),
    ] {
        let error = manager.add(new).unwrap_err();
        assert_eq!(error.to_string(), text);
    }
    let top = manager.add(rom((1 << 36) - 0x1000, 0, 0x1000)).unwrap();
    assert_eq!(top.id(), SlotId(1));
    assert_eq!(vm.state.lock().unwrap().calls, calls + 1);
}

#[test]
fn the_slots_of_init_are_adopted_without_an_ioctl() {
    let vm = vm();
    let ram = GuestRam::new(&RamLayout::new(4 * PAGE, &[], 36).unwrap()).unwrap();
    for slot in ram.slots() {
        vm.set_memory_slot(slot).unwrap(); // as init does
    }
    let slots = ram.slots().iter().cloned().map(|slot| ("RAM", slot));
    let (manager, owners) = SlotManager::adopt(vm.clone(), slots, LIMITS).unwrap();
    assert_eq!(vm.state.lock().unwrap().calls, 1, "one ioctl for one range of RAM");
    assert_eq!(owners.len(), 1);
    let error = manager.add(new(&memory(1), 0, 0, 1, true)).unwrap_err();
    assert!(matches!(error, SlotError::Overlap { .. }), "{error}");
    // A VM that ends takes its slots with it.
    drop(manager);
    assert_eq!(owners[0].map().unwrap_err(), SlotError::ManagerGone(SlotId(0)));
    drop(owners);
    assert_eq!(vm.state.lock().unwrap().calls, 1, "no slot was deleted for nothing");
}

#[test]
fn slots_that_kvm_can_not_have_are_not_adopted() {
    let memory = memory(2);
    let slot = |id, guest| {
        let NewSlot { guest, host, flags, .. } = new(&memory, guest, 0, 1, false);
        MemorySlot { id: SlotId(id), guest, host, flags }
    };
    let adopt = |slots: Vec<MemorySlot>| {
        let named = slots.into_iter().map(|slot| ("RAM", slot));
        SlotManager::adopt(vm(), named, LIMITS).map(|(_, owners)| owners.len())
    };
    assert_eq!(adopt(vec![slot(7, 0), slot(2, 0x1000)]), Ok(2));
    let (name, id) = ("RAM".into(), SlotId(8));
    assert_eq!(adopt(vec![slot(8, 0)]), Err(SlotError::IdBeyondLimit { name, id, limit: 8 }));
    let (name, id) = ("RAM".into(), SlotId(0));
    assert_eq!(adopt(vec![slot(0, 0), slot(0, 0x1000)]), Err(SlotError::IdInUse { name, id }));
    assert!(matches!(adopt(vec![slot(0, 0), slot(1, 0)]), Err(SlotError::Overlap { .. })));
}

#[test]
fn a_page_is_taken_out_of_ram_and_put_back() {
    let vm = vm();
    let manager = manager(&vm);
    let memory = memory(8);
    let ram = manager.add(new(&memory, 0, 0, 8, false)).unwrap();
    let whole = vm.state.lock().unwrap().pages();

    ram.unmap(&Paused).unwrap();
    let before = manager.add(new(&memory, 0, 0, 3, false)).unwrap();
    let after = manager.add(new(&memory, 4 * PAGE, 4, 4, false)).unwrap();
    let mut holed = whole.clone();
    holed.remove(&3);
    assert_eq!(vm.state.lock().unwrap().pages(), holed);
    assert!(matches!(ram.map(), Err(SlotError::Overlap { .. })));

    drop((before, after));
    ram.map().unwrap();
    assert_eq!(vm.state.lock().unwrap().pages(), whole);
    assert_eq!(vm.state.lock().unwrap().complaints, [""; 0]);
}
