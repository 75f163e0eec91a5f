//! Which pages a guest wrote, as hv-memory tells it, on `/dev/kvm`: by the log, with manual protection and
//! by dirty rings, also while slots change.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "kvm/writer.rs"]
mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hv_core::{Errno, HostRange, Hypervisor, MemoryBackend, SlotFlags, Vm};
use hv_kvm::{Kvm, KvmVm};
use hv_memory::{
    DirtyError, DirtyPages, DirtyTracking, GuestRange, Mapping, NewSlot, Slot, SlotLimits,
    SlotManager, VcpusPaused,
};
use vm_memory::{Bytes, GuestAddress};

use crate::writer::{LIST, PAGE, Writer, own_memory, value_at};

type Pages = BTreeSet<u64>;

struct Paused;
impl VcpusPaused for Paused {}

const RING: DirtyTracking = DirtyTracking::Ring { bytes: 1 << 16 };
const MANUAL: DirtyTracking = DirtyTracking::ManualProtect { initially_set: false };
const ALL_WAYS: [DirtyTracking; 4] =
    [DirtyTracking::Log, MANUAL, DirtyTracking::ManualProtect { initially_set: true }, RING];

/// Guest page numbers from here on are those of the tests.
const FIRST: u64 = (1 << 30) / PAGE;

/// A VM with two guests.
struct Machine {
    how: DirtyTracking,
    manager: SlotManager<KvmVm>,
    writers: Vec<Writer>,
    pages: DirtyPages,
    _own: Vec<Slot<KvmVm>>,
}

fn kvm() -> Kvm {
    let kvm = Kvm::open("/dev/kvm").unwrap_or_else(|error| panic!("this test needs KVM: {error}"));
    kvm.install_kick().unwrap();
    kvm
}

impl Machine {
    fn new(how: DirtyTracking) -> Self {
        let kvm = kvm();
        let vm = Arc::new(kvm.create_vm(0).unwrap());
        let (memories, own): (Vec<_>, Vec<_>) = (0..2).map(|id| own_memory(id, id)).unzip();
        own.iter().for_each(|slot| vm.set_memory_slot(slot).unwrap());
        let limits = SlotLimits { slots: 32, address_bits: 36 };
        let own = own.into_iter().map(|slot| ("guest", slot));
        let (manager, own) = SlotManager::adopt(vm.clone(), own, limits).unwrap();
        manager.track_dirty(how).unwrap();
        assert_eq!(manager.dirty_tracking(), how);
        let writers = memories.into_iter().zip(0..).map(|(memory, id)| {
            let vcpu = vm.create_vcpu(id).unwrap();
            if how == RING {
                manager.add_dirty_ring(&vcpu).unwrap();
            }
            Writer::new(&kvm, vcpu, memory)
        });
        let writers = writers.collect();
        Self { how, manager, writers, pages: DirtyPages::new(), _own: own }
    }

    /// A slot that logs.
    fn add(&self, memory: &Arc<Mapping>, host: u64, pages: u64, at: u64) -> Slot<KvmVm> {
        self.manager.add(new_slot(memory, host, pages, at, true)).unwrap()
    }

    /// A guest writes to pages of the tests.
    fn write(&mut self, vcpu: usize, pages: &Pages) {
        let manager = &self.manager;
        let addresses = pages.iter().map(|page| (FIRST + page) * PAGE);
        let full = || manager.empty_dirty_ring(vcpu as u32).unwrap();
        assert_eq!(self.writers[vcpu].write(addresses, 1, full), 0, "it is all memory");
    }

    fn harvest(&mut self) -> Pages {
        self.manager.harvest_dirty(&mut self.pages).unwrap();
        numbers(&self.pages)
    }

    /// What is told of a slot that has just begun to log.
    fn at_first(&self, pages: impl IntoIterator<Item = u64>) -> Pages {
        match self.how {
            DirtyTracking::ManualProtect { initially_set: true } => pages.into_iter().collect(),
            _ => Pages::new(),
        }
    }
}

/// `pages` pages of a mapping from `host` on, at page `at` of the tests.
fn new_slot(memory: &Arc<Mapping>, host: u64, pages: u64, at: u64, log: bool) -> NewSlot {
    let bytes = |pages: u64| usize::try_from(pages * PAGE).unwrap();
    NewSlot {
        name: format!("pages from {at}").into(),
        guest: address(at),
        host: HostRange::new(memory.clone(), bytes(host), bytes(pages)).unwrap(),
        flags: SlotFlags { log_dirty: log, readonly: false },
    }
}

fn address(page: u64) -> GuestAddress {
    GuestAddress((FIRST + page) * PAGE)
}

fn numbers(pages: &DirtyPages) -> Pages {
    let of_range =
        |range: GuestRange| range.start().0 / PAGE - FIRST..=range.last().0 / PAGE - FIRST;
    pages.ranges().flat_map(of_range).collect()
}

fn memory(pages: u64) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(pages * PAGE).unwrap())
}

/// Every `step`-th page from `first` to before `end`.
fn every(first: u64, end: u64, step: usize) -> Pages {
    (first..end).step_by(step).collect()
}

#[test]
fn each_way_tells_exactly_the_pages_that_guests_and_vmm_wrote() {
    for how in ALL_WAYS {
        let mut machine = Machine::new(how);
        let ram = memory(1000);
        let slots = [(0, 700, 0), (700, 300, 700)];
        let _slots = slots.map(|(host, pages, at)| machine.add(&ram, host, pages, at));
        assert_eq!(machine.harvest(), machine.at_first(0..1000), "{how:?}");
        for round in 0..5 {
            let (one, other) = (every(round, 1000, 7), every(3 * round, 900, 31));
            machine.write(0, &one);
            machine.write(1, &other);
            machine.write(0, &other);
            let at = 690 + round;
            let bytes = [1; 20 * PAGE as usize];
            ram.as_volatile_slice()
                .write_slice(&bytes, usize::try_from(at * PAGE).unwrap())
                .unwrap();
            let written: Pages = one.into_iter().chain(other).chain(at..at + 20).collect();
            assert_eq!(machine.harvest(), written, "{how:?}");
            assert_eq!(machine.harvest(), Pages::new(), "{how:?}");
        }
    }
}

#[test]
fn what_is_read_stays_until_it_is_cleared_and_nothing_beside_it_is() {
    for how in ALL_WAYS {
        let mut machine = Machine::new(how);
        let _slot = machine.add(&memory(300), 0, 300, 5);
        machine.harvest();
        let mut read = DirtyPages::new();
        let written = every(5, 305, 3);
        machine.write(0, &written);
        for _ in 0..2 {
            machine.manager.read_dirty(&mut read).unwrap();
            assert_eq!(numbers(&read), written, "{how:?}");
        }
        // Not in what was read, so not to be cleared, though between what is.
        let later: Pages = [90, 91, 151].into();
        assert!(written.is_disjoint(&later));
        machine.write(1, &later);
        let range = GuestRange::new(GuestAddress(address(70).0 + 1), 100 * PAGE).unwrap();
        machine.manager.clear_dirty(&read, range).unwrap();
        // A page that was cleared is watched again.
        let again: Pages = [89].into();
        assert!(written.contains(&89));
        machine.write(0, &again);
        let cleared = |page: &u64| (71..170).contains(page);
        let left = written.iter().copied().filter(|page| !cleared(page)).chain(later).chain(again);
        assert_eq!(machine.harvest(), left.collect(), "{how:?}");
    }
}

#[test]
fn what_was_written_is_told_when_its_slot_has_gone_moved_or_ceased_to_log() {
    for how in ALL_WAYS {
        let mut machine = Machine::new(how);
        let ram = memory(400);
        let removed = machine.add(&ram, 0, 100, 0);
        let unmapped = machine.add(&ram, 100, 100, 100);
        let moved = machine.add(&ram, 200, 100, 200);
        let toggled = machine.add(&ram, 300, 100, 300);
        machine.harvest();
        machine.write(0, &every(0, 400, 9));
        machine.write(1, &every(0, 400, 50));

        removed.remove().unwrap();
        unmapped.unmap(&Paused).unwrap();
        moved.move_to(address(1000)).unwrap();
        toggled.set_log_dirty(false).unwrap();
        let told: Pages = every(0, 400, 9).union(&every(0, 400, 50)).copied().collect();
        // Only the log that goes on knows of these.
        machine.write(0, &[300, 301, 1001, 1064].into());
        let told: Pages = told.into_iter().chain([1001, 1064]).collect();
        assert_eq!(machine.harvest(), told, "{how:?}");

        unmapped.map().unwrap();
        toggled.set_log_dirty(true).unwrap();
        let again = machine.add(&ram, 0, 100, 0);
        let begun = machine.at_first((0..200).chain(300..400));
        machine.write(1, &[7, 107, 307, 1007].into());
        let told: Pages = begun.into_iter().chain([7, 107, 307, 1007]).collect();
        assert_eq!(machine.harvest(), told, "{how:?}");
        drop(again);
        assert_eq!(machine.harvest(), Pages::new(), "{how:?}");
    }
}

/// As a migration does it: what is told is copied. In the end the copy is what the guest has.
#[test]
fn a_copy_of_what_is_told_is_the_memory_though_slots_change_under_a_running_guest() {
    const HOST: u64 = 600;
    // Guest pages, and the page of the mapping.
    const STAYS: (u64, u64) = (0, 0);
    const MOVES: [u64; 2] = [1000, 2000];
    for how in ALL_WAYS {
        let mut machine = Machine::new(how);
        let ram = memory(HOST);
        let _stays = machine.add(&ram, STAYS.1, 400, STAYS.0);
        let moves = machine.add(&ram, 400, 200, MOVES[0]);
        let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
        let (manager, writers, pages) =
            (&machine.manager, &mut machine.writers, &mut machine.pages);
        let mut copy = vec![0; HOST as usize];
        let mut take = |pages: &mut DirtyPages| {
            manager.harvest_dirty(pages).unwrap();
            for page in numbers(pages) {
                let host = match page {
                    0..400 => page,
                    1000..1200 => 400 + page - 1000,
                    2000..2200 => 400 + page - 2000,
                    _ => panic!("{how:?}: page {page} is none"),
                };
                copy[host as usize] = value_at(&ram, host);
            }
        };
        let (missed, changes) = std::thread::scope(|scope| {
            let guests: Vec<_> = writers
                .iter_mut()
                .zip(1..)
                .map(|(writer, id): (_, u32)| {
                    let (stop, rounds) = (&stop, &rounds);
                    scope.spawn(move || {
                        let (mut missed, mut value) = (0, u64::from(id));
                        while !stop.load(Ordering::Relaxed) {
                            let n = rounds.fetch_add(1, Ordering::Relaxed);
                            let stays = (n % 11..400).step_by(11);
                            let moves =
                                MOVES.into_iter().flat_map(|at| (at + n % 7..at + 200).step_by(7));
                            let addresses = stays.chain(moves).map(|page| (FIRST + page) * PAGE);
                            value += 2;
                            let full = || manager.empty_dirty_ring(id).unwrap();
                            missed += writer.write(addresses, value, full);
                        }
                        missed
                    })
                })
                .collect();
            let mut changes = 0;
            while rounds.load(Ordering::Relaxed) < 300 || changes < 20 {
                moves.move_to(address(MOVES[(changes + 1) % 2])).unwrap();
                take(pages);
                // Others come and go.
                drop(manager.add(new_slot(&ram, 0, 1, 3000, false)).unwrap());
                take(pages);
                changes += 1;
            }
            stop.store(true, Ordering::Relaxed);
            let missed: u64 = guests.into_iter().map(|guest| guest.join().unwrap()).sum();
            (missed, changes)
        });
        take(pages);
        let memory: Vec<u64> = (0..HOST).map(|page| value_at(&ram, page)).collect();
        let written = memory.iter().filter(|value| **value != 0).count();
        println!(
            "{how:?}: {changes} changes, {written} pages, {missed} writes where no memory was"
        );
        assert!(written > 500 && missed > 0, "{written}, {missed}");
        manager.harvest_dirty(pages).unwrap();
        assert!(pages.is_empty());
        assert_eq!(copy, memory, "{how:?}");
    }
}

#[test]
fn a_ring_that_is_full_stops_its_vcpu_until_it_is_emptied() {
    let kvm = kvm();
    let vm = Arc::new(kvm.create_vm(0).unwrap());
    let (memory, own) = own_memory(0, 0);
    vm.set_memory_slot(&own).unwrap();
    let limits = SlotLimits { slots: 32, address_bits: 36 };
    let (manager, _own) = SlotManager::adopt(vm.clone(), [("guest", own)], limits).unwrap();
    // With the page modification log of Intel's processors KVM keeps more than 512 entries for itself.
    manager.track_dirty(DirtyTracking::Ring { bytes: 1024 * 16 }).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    manager.add_dirty_ring(&vcpu).unwrap();
    manager.add_dirty_ring(&vcpu).unwrap();
    let ram = self::memory(LIST as u64);
    let _slot = manager.add(new_slot(&ram, 0, LIST as u64, 0, true)).unwrap();
    let mut writer = Writer::new(&kvm, vcpu, memory);
    let mut full = 0;
    let all = every(0, LIST as u64, 1);
    // There are software KVMs that look at a ring only when the guest stops, so it does so often.
    for some in all.iter().collect::<Vec<_>>().chunks(32) {
        let missed = writer.write(some.iter().map(|page| (FIRST + **page) * PAGE), 1, || {
            full += 1;
            manager.empty_dirty_ring(0).unwrap();
        });
        assert_eq!(missed, 0);
    }
    assert!(full > 0, "2048 pages have no room in 1024 entries");
    let mut pages = DirtyPages::new();
    manager.harvest_dirty(&mut pages).unwrap();
    assert_eq!(numbers(&pages), all);
}

#[test]
fn a_way_is_chosen_once_and_rings_before_the_first_vcpu() {
    let limits = SlotLimits { slots: 32, address_bits: 36 };
    let manager = |vm: &Arc<KvmVm>| SlotManager::adopt::<&str>(vm.clone(), [], limits).unwrap().0;
    let vm = Arc::new(kvm().create_vm(0).unwrap());
    let log = manager(&vm);
    let vcpu = vm.create_vcpu(0).unwrap();
    let error = log.track_dirty(RING).unwrap_err();
    assert!(error.to_string().contains("before the first vCPU"), "{error}");
    assert!(
        matches!(&error, DirtyError::Enable { wanted: RING, error } if error.errno == Errno::EINVAL)
    );
    let no_rings = DirtyError::NoRings { chosen: DirtyTracking::Log };
    assert_eq!(log.add_dirty_ring(&vcpu), Err(no_rings.clone()));
    assert_eq!(log.empty_dirty_ring(0), Err(no_rings));
    log.track_dirty(MANUAL).unwrap();
    log.track_dirty(MANUAL).unwrap();
    assert_eq!(log.track_dirty(RING), Err(DirtyError::Chosen { chosen: MANUAL, wanted: RING }));

    let vm = Arc::new(kvm().create_vm(0).unwrap());
    let ring = manager(&vm);
    let error = ring.track_dirty(DirtyTracking::Ring { bytes: 1 << 30 }).unwrap_err();
    assert!(error.to_string().contains("E2BIG"), "{error}");
    ring.track_dirty(RING).unwrap();
    assert_eq!(ring.empty_dirty_ring(0), Err(DirtyError::RingNotAdded { vcpu: 0 }));
    assert_eq!(ring.track_dirty(MANUAL), Err(DirtyError::Chosen { chosen: RING, wanted: MANUAL }));
}
