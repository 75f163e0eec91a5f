//! Dirty rings and the ring of collected writes on real KVM, under guests that run while they are
//! read.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;
mod user_mode;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{Alive, PAGE};
use hv_core::{
    Capability, CoalescedWrite, CoalescedZone, DirtyRing, Hypervisor, IoAddress, MemoryBackend,
    MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use user_mode::{END, UserGuest};

const RAM: u64 = 0x10_0000;
const ZONE: u64 = 0xc000_0000;

fn page(n: u64) -> u64 {
    RAM + n * PAGE as u64
}

/// A VM with rings of `bytes`, and slot 0 of `pages` pages at [`RAM`] that logs.
fn ring_vm(kvm: &Kvm, bytes: u64, pages: usize) -> (KvmVm, MemorySlot) {
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::DirtyLogRing, [bytes, 0, 0, 0]).unwrap();
    let flags = SlotFlags { log_dirty: true, readonly: false };
    let slot = MemorySlot { flags, ..common::slot(0, RAM, &common::pages(pages)) };
    vm.set_memory_slot(&slot).unwrap();
    (vm, slot)
}

/// Reads a ring from one entry to the next.
struct Reader {
    ring: Arc<dyn DirtyRing>,
    next: usize,
}

impl Reader {
    fn of(guest: &UserGuest) -> Self {
        Self { ring: guest.vcpu.dirty_ring().unwrap(), next: 0 }
    }

    fn collect(&mut self) -> Vec<u64> {
        let entries = self.ring.entries();
        let mut pages = Vec::new();
        while let Some(page) = entries[self.next % entries.len()].dirty() {
            assert_eq!(page.slot, SlotId(0));
            entries[self.next % entries.len()].collect();
            pages.push(page.page);
            self.next += 1;
        }
        pages
    }
}

#[test]
fn what_the_processor_stores_is_reported_once_until_it_is_reset() {
    let kvm = common::kvm();
    let (vm, slot) = ring_vm(&kvm, 65536, 64);
    let mut guest = UserGuest::new(&kvm, &vm, 0);
    let mut ring = Reader::of(&guest);
    guest.store(page(5), 3);
    guest.store(page(6), 3);
    assert_eq!(ring.collect(), [5, 6, 7, 8]);
    guest.store(page(5), 4);
    assert!(ring.collect().is_empty(), "writable until they are reset");
    assert_eq!(vm.reset_dirty_rings().unwrap(), 4);
    guest.store(page(8), 1);
    guest.store(page(5), 1);
    assert_eq!(ring.collect(), [8, 5]);
    assert_eq!(common::load(&slot.host, 5 * PAGE, 1), [1]);
}

#[test]
fn what_the_processor_can_store_already_is_missed_by_logs_that_begin_full() {
    let kvm = common::kvm();
    for (manual, reported) in [(0, vec![0]), (1, vec![0]), (3, vec![])] {
        let (vm, logging) = ring_vm(&kvm, 65536, 64);
        vm.enable_cap(Capability::ManualDirtyLogProtect2, [manual, 0, 0, 0]).unwrap();
        vm.set_memory_slot(&MemorySlot { flags: SlotFlags::default(), ..logging.clone() }).unwrap();
        let mut guest = UserGuest::new(&kvm, &vm, 0);
        let mut ring = Reader::of(&guest);
        guest.store(page(0), 1);
        vm.set_memory_slot(&logging).unwrap();
        guest.store(page(0), 1);
        assert_eq!(ring.collect(), reported, "with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 {manual}");
    }
}

/// Tells another thread that this one has ended, by a panic too.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// As for a migration: the ring is smaller than what is written, and read and reset by another thread
/// meanwhile, which copies what was reported. A page may be reported before the store is made; then
/// it is reported again.
#[test]
fn who_collects_while_the_guest_runs_has_a_copy_at_the_end() {
    const PAGES: u64 = 3000;
    const ROUNDS: u8 = 3;
    let kvm = common::kvm();
    let (vm, slot) = ring_vm(&kvm, 16384, PAGES as usize);
    let mut guest = UserGuest::new(&kvm, &vm, 0);
    let mut ring = Reader::of(&guest);
    let mut copy = vec![0; PAGES as usize];
    for round in 1..=ROUNDS {
        guest.begin(page(0), PAGES, round);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ends = Ends(&done);
                loop {
                    match guest.run() {
                        None => break,
                        // Whoever collects makes room; this vCPU may only try again.
                        Some(VcpuExit::DirtyRingFull) => thread::yield_now(),
                        other => panic!("{other:?}"),
                    }
                }
            });
            let mut collected = 0;
            loop {
                let last = done.load(Ordering::SeqCst);
                let pages = ring.collect();
                collected += pages.len() as u32;
                // A signal may keep KVM from resetting all of them at once.
                collected -= vm.reset_dirty_rings().unwrap();
                // After the reset: what is written from here on is reported again.
                for n in pages {
                    copy[n as usize] = common::load(&slot.host, n as usize * PAGE, 1)[0];
                }
                if last && collected == 0 {
                    break;
                }
                thread::yield_now();
            }
        });
        let stale: Vec<_> = (0..PAGES).filter(|n| copy[*n as usize] != round).collect();
        assert!(stale.is_empty(), "round {round}: pages {stale:?}");
    }
}

#[test]
fn a_ring_is_there_as_long_as_it_is_held_and_keeps_the_memory_of_its_vm() {
    let kvm = common::kvm();
    let alive = Alive::default();
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::DirtyLogRing, [65536, 0, 0, 0]).unwrap();
    vm.set_memory_slot(&common::slot(0, RAM, &alive.pages(1))).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let (ring, again) = (vcpu.dirty_ring().unwrap(), vcpu.dirty_ring().unwrap());
    drop((vm, vcpu));
    assert_eq!(ring.entries().len(), 4096);
    assert!(ring.entries().iter().all(|entry| entry.dirty().is_none()));
    assert!(again.entries()[4095].publish(hv_core::DirtyPage { slot: SlotId(1), page: 2 }));
    assert!(ring.entries()[4095].dirty().is_some(), "the same memory");
    drop(ring);
    assert_eq!(alive.count(), 1);
    drop(again);
    assert_eq!(alive.count(), 0);
}

#[test]
fn what_is_written_into_a_zone_while_all_take_comes_once_and_in_order() {
    const WRITES: u64 = 600;
    let kvm = common::kvm();
    let vm = kvm.create_vm(0).unwrap();
    let zone = CoalescedZone { address: IoAddress::Mmio(ZONE), size: 2 << 20 };
    vm.register_coalesced_zone(zone).unwrap();
    let mut guests: Vec<_> = (0..2).map(|id| UserGuest::new(&kvm, &vm, id)).collect();
    for (guest, value) in guests.iter().zip(0..) {
        guest.begin(ZONE, WRITES / 2, value);
    }
    // What a device would see. Whoever takes a write handles it before another is taken.
    let handled: Mutex<Vec<(u64, u8)>> = Mutex::default();
    let take = |vcpu: &KvmVcpu| {
        let mut handled = handled.lock().unwrap();
        while let Some(write) = vcpu.take_coalesced_write().unwrap() {
            handled.push((write.address.value(), write.bytes()[0]));
        }
    };
    thread::scope(|scope| {
        for guest in &mut guests {
            scope.spawn(|| {
                loop {
                    let exit = common::next_exit(&mut guest.vcpu);
                    take(&guest.vcpu);
                    match exit {
                        VcpuExit::Mmio(mmio) if mmio.address == END => return,
                        // The ring was full.
                        VcpuExit::Mmio(mmio) => {
                            let byte = mmio.written.unwrap()[0];
                            handled.lock().unwrap().push((mmio.address, byte));
                        }
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
    });
    assert!(guests.iter().all(|guest| !guest.vcpu.has_coalesced_write()));
    let handled = handled.into_inner().unwrap();
    assert_eq!(handled.len() as u64, WRITES);
    for id in 0..2 {
        let of_one = handled.iter().filter(|(_, value)| *value == id).map(|(address, _)| *address);
        assert!(of_one.eq((0..WRITES / 2).map(|n| ZONE + n * PAGE as u64)), "vCPU {id}");
    }
}

#[test]
fn a_look_into_an_empty_ring_takes_nothing() {
    let vm = common::kvm().create_vm(0).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let nothing = |vcpu: &KvmVcpu| {
        assert!(!vcpu.has_coalesced_write());
        assert_eq!(vcpu.take_coalesced_write(), Ok(None::<CoalescedWrite>));
    };
    nothing(&vcpu);
    let zone = CoalescedZone { address: IoAddress::Pio(0x70), size: 1 };
    vm.register_coalesced_zone(zone).unwrap();
    nothing(&vcpu);
}
