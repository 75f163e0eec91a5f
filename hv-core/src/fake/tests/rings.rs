//! Dirty rings and the ring of collected writes, as the VMM's side sees them.

use std::sync::Arc;

use super::{errno, slot};
use crate::fake::{FakeHost, FakeKvm, FakeVcpu, FakeVm, Finding, GuestStep, Leftover, Live, Wrote};
use crate::{
    Call, Capability, CoalescedZone, DirtyGfn, DirtyPage, DirtyRing, Errno, HostMemory, HostRange,
    Hypervisor, IoAddress, Ioctl, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};

const RAM: u64 = 0x10_0000;
const PAGE: u64 = 4096;
const LOG: SlotFlags = SlotFlags { log_dirty: true, readonly: false };

/// Entries of the smallest ring, and how many of them are used when it is full.
const ENTRIES: usize = 256;
const FULL: u64 = 192;

fn ring_vm(host: FakeHost) -> (FakeKvm, FakeVm) {
    let kvm = FakeKvm::new(host);
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::DirtyLogRingAcqRel, [4096, 0, 0, 0]).unwrap();
    (kvm, vm)
}

/// Page-aligned memory of `pages` pages.
#[derive(Debug)]
struct Pages(Vec<std::sync::atomic::AtomicU8>);

impl HostMemory for Pages {
    fn bytes(&self) -> &[std::sync::atomic::AtomicU8] {
        let start = self.0.as_ptr().addr().next_multiple_of(4096) - self.0.as_ptr().addr();
        &self.0[start..start + self.0.len() - 4096]
    }
}

/// Slot `id` of `pages` pages at `guest` that logs.
fn logging(id: u32, guest: u64, pages: usize) -> MemorySlot {
    let bytes = pages * 4096;
    let memory = Pages((0..bytes + 4096).map(|_| Default::default()).collect());
    let host = HostRange::new(Arc::new(memory), 0, bytes).unwrap();
    MemorySlot { id: SlotId(id), guest: vm_memory::GuestAddress(guest), host, flags: LOG }
}

fn store(page: u64) -> GuestStep {
    GuestStep::write(IoAddress::Mmio(RAM + page * PAGE), [1])
}

fn run(vm: &FakeVm, vcpu: &mut FakeVcpu, pages: impl IntoIterator<Item = u64>) {
    vm.view().program(vcpu.id(), pages.into_iter().map(store));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
}

/// The pages in a ring, in order, left there.
fn dirty(ring: &dyn DirtyRing) -> Vec<(u32, u64)> {
    let pages = ring.entries().iter().filter_map(DirtyGfn::dirty);
    pages.map(|DirtyPage { slot, page }| (slot.0, page)).collect()
}

fn collect(ring: &dyn DirtyRing) -> Vec<(u32, u64)> {
    let pages = dirty(ring);
    ring.entries().iter().filter(|entry| entry.dirty().is_some()).for_each(DirtyGfn::collect);
    pages
}

#[test]
fn a_page_is_reported_by_who_writes_it_once_until_it_is_reset() {
    let (_, vm) = ring_vm(FakeHost::default());
    vm.set_memory_slot(&logging(3, RAM, 8)).unwrap();
    vm.set_memory_slot(&slot(4, 0, SlotFlags::default())).unwrap();
    let (mut first, mut second) = (vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap());
    let (one, two) = (first.dirty_ring().unwrap(), second.dirty_ring().unwrap());
    assert_eq!((one.entries().len(), two.entries().len()), (ENTRIES, ENTRIES));

    vm.view().program(0, [GuestStep::write(IoAddress::Mmio(8), [1])]);
    run(&vm, &mut first, [5, 1, 5]);
    run(&vm, &mut second, [1, 2]);
    assert_eq!(dirty(&*one), [(3, 5), (3, 1)], "in order, and none of a slot that does not log");
    assert_eq!(dirty(&*two), [(3, 2)], "page 1 is writable already");
    assert_eq!(dirty(&*first.dirty_ring().unwrap()), dirty(&*one), "the same entries");

    assert_eq!(vm.reset_dirty_rings(), Ok(0), "nobody has collected them");
    assert_eq!(collect(&*one), [(3, 5), (3, 1)]);
    run(&vm, &mut first, [1]);
    assert_eq!(dirty(&*one), [], "not reset yet");
    assert_eq!(vm.reset_dirty_rings(), Ok(2));
    run(&vm, &mut first, [1, 2]);
    assert_eq!(dirty(&*one), [(3, 1)]);
    assert_eq!((collect(&*one).len(), collect(&*two).len()), (1, 1));
    assert_eq!(vm.reset_dirty_rings(), Ok(2), "those of all vCPUs");
    assert_eq!(vm.reset_dirty_rings(), Ok(0));
}

#[test]
fn a_reset_stops_at_the_first_entry_that_was_not_collected() {
    let (_, vm) = ring_vm(FakeHost::default());
    vm.set_memory_slot(&logging(0, RAM, 8)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    run(&vm, &mut vcpu, [0, 1, 2]);
    ring.entries()[0].collect();
    ring.entries()[2].collect();
    assert_eq!(vm.reset_dirty_rings(), Ok(1));
    ring.entries()[1].collect();
    assert_eq!(vm.reset_dirty_rings(), Ok(2));
}

#[test]
fn a_full_ring_ends_runs_until_it_is_reset_and_goes_round() {
    let (kvm, vm) = ring_vm(FakeHost::default());
    vm.set_memory_slot(&logging(0, RAM, 512)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    vm.view().program(0, (0..512).map(store));
    let mut seen = Vec::new();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::DirtyRingFull) => {
                assert_eq!(vcpu.run(), Ok(VcpuExit::DirtyRingFull), "as long as it is full");
                let pages = collect(&*ring);
                assert_eq!(pages.len() as u64, FULL);
                seen.extend(pages);
                assert_eq!(vcpu.run(), Ok(VcpuExit::DirtyRingFull), "collecting is not enough");
                let write = vm.view().guest_write(IoAddress::Mmio(RAM), &[1]);
                assert_eq!(write, Wrote::Exit);
                assert_eq!(vm.reset_dirty_rings(), Ok(FULL as u32));
            }
            other => {
                assert_eq!(other, Ok(VcpuExit::Hlt));
                break;
            }
        }
    }
    seen.extend(collect(&*ring));
    // Where the ring went round they are out of order, but each is there once.
    seen.sort_unstable();
    assert!(seen.into_iter().eq((0..512).map(|page| (0, page))));
    assert_eq!(kvm.calls().of(Ioctl::ResetDirtyRings), 2);
    assert_eq!(kvm.calls().of(Call::MmapDirtyRing), 1);
}

#[test]
fn what_an_entry_named_may_have_gone_when_it_is_reset() {
    let (kvm, vm) = ring_vm(FakeHost::default());
    vm.set_memory_slot(&logging(0, RAM, 8)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    run(&vm, &mut vcpu, [7]);
    assert_eq!(collect(&*ring), [(0, 7)]);
    vm.delete_memory_slot(SlotId(0)).unwrap();
    vm.set_memory_slot(&logging(0, RAM, 1)).unwrap();
    assert_eq!(vm.reset_dirty_rings(), Ok(1));
    assert_eq!(kvm.findings(), []);
}

#[test]
fn a_slot_that_moves_or_logs_anew_is_watched_from_its_start() {
    let (_, vm) = ring_vm(FakeHost::default());
    let plain = logging(0, RAM + 8 * PAGE, 4);
    vm.set_memory_slot(&plain).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    run(&vm, &mut vcpu, [8]);
    let moved = MemorySlot { guest: vm_memory::GuestAddress(RAM), ..plain.clone() };
    vm.set_memory_slot(&moved).unwrap();
    run(&vm, &mut vcpu, [0]);
    assert_eq!(collect(&*ring), [(0, 0), (0, 0)]);
    let flags = SlotFlags::default();
    vm.set_memory_slot(&MemorySlot { flags, ..moved.clone() }).unwrap();
    run(&vm, &mut vcpu, [0]);
    vm.set_memory_slot(&moved).unwrap();
    assert_eq!(dirty(&*ring), [], "what was written while it did not log");
    run(&vm, &mut vcpu, [0]);
    assert_eq!(dirty(&*ring), [(0, 0)]);
}

#[test]
fn without_rings_there_is_nothing_to_map_or_reset() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let error = vm.create_vcpu(0).unwrap().dirty_ring().unwrap_err();
    assert_eq!((error.call, error.errno), (Call::MmapDirtyRing, Errno::EINVAL));
    assert!(error.to_string().contains("before the first vCPU"), "{error}");
    assert_eq!(errno(vm.reset_dirty_rings()), Err(Errno::EINVAL));
    let host = || FakeHost::default().without(Capability::DirtyLogRing);
    let either = FakeKvm::new(host()).create_vm(0).unwrap();
    assert_eq!(errno(either.reset_dirty_rings()), Err(Errno::EINVAL));
    let neither = FakeKvm::new(host().without(Capability::DirtyLogRingAcqRel));
    let vm = neither.create_vm(0).unwrap();
    assert_eq!(errno(vm.reset_dirty_rings()), Err(Errno::ENOTTY));
}

#[test]
fn a_ring_keeps_its_vm() {
    let (kvm, vm) = ring_vm(FakeHost::default());
    let ring = vm.create_vcpu(0).unwrap().dirty_ring().unwrap();
    drop(vm);
    assert_eq!((kvm.live().vms, kvm.live().vcpus), (1, 0));
    drop(ring);
    assert_eq!(kvm.live(), Live { hypervisors: 1, ..Live::default() });
}

#[test]
fn the_strict_mode_of_dirty_rings() {
    let (kvm, vm) = ring_vm(FakeHost::default());
    vm.set_memory_slot(&logging(0, RAM, 4)).unwrap();
    vm.set_memory_slot(&logging(1, RAM + 4 * PAGE, 4)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    run(&vm, &mut vcpu, [0, 1, 4]);
    // What is in a ring is still there when its slot ceases to log.
    let quiet = MemorySlot { flags: SlotFlags::default(), ..logging(1, RAM + 4 * PAGE, 4) };
    assert_eq!(errno(vm.set_memory_slot(&quiet)), Err(Errno::EINVAL), "other memory");
    assert_eq!(kvm.findings(), []);
    vm.delete_memory_slot(SlotId(0)).unwrap();
    let lost = |slot, pages| Finding::LostDirtyPages { slot: SlotId(slot), pages };
    assert_eq!(kvm.findings(), [lost(0, 2)]);
    drop((vm, vcpu));
    let left = Finding::Left(Leftover::Slot(SlotId(1)));
    assert_eq!(kvm.findings(), [lost(0, 2), lost(1, 1), left]);
}

#[test]
fn a_slot_that_ceases_to_log_leaves_what_is_in_the_ring() {
    let (kvm, vm) = ring_vm(FakeHost::default());
    let logs = logging(0, RAM, 4);
    vm.set_memory_slot(&logs).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    run(&vm, &mut vcpu, [2]);
    vm.set_memory_slot(&MemorySlot { flags: SlotFlags::default(), ..logs }).unwrap();
    assert_eq!(collect(&*ring), [(0, 2)]);
    vm.delete_memory_slot(SlotId(0)).unwrap();
    assert_eq!(kvm.findings(), []);
}

#[test]
fn rings_and_logs_that_begin_full_miss_pages() {
    const MANUAL: Capability = Capability::ManualDirtyLogProtect2;
    for ring_first in [true, false] {
        let kvm = FakeKvm::default();
        let vm = kvm.create_vm(0).unwrap();
        let ring = || vm.enable_cap(Capability::DirtyLogRing, [4096, 0, 0, 0]).unwrap();
        if ring_first {
            ring();
        }
        vm.enable_cap(MANUAL, [1, 0, 0, 0]).unwrap();
        assert_eq!(kvm.findings(), []);
        vm.enable_cap(MANUAL, [3, 0, 0, 0]).unwrap();
        if !ring_first {
            ring();
        }
        assert_eq!(kvm.findings(), [Finding::RingAndInitiallySet]);
        vm.set_memory_slot(&logging(0, RAM, 1)).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        run(&vm, &mut vcpu, [0]);
        assert_eq!(dirty(&*vcpu.dirty_ring().unwrap()), []);
    }
}

#[test]
fn collected_writes_that_nobody_takes_are_told() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let zone = CoalescedZone { address: IoAddress::Mmio(RAM), size: 8 };
    vm.register_coalesced_zone(zone).unwrap();
    let (mut first, second) = (vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap());
    run(&vm, &mut first, [0, 0, 0]);
    // The ring is the VM's, and outlives its zones.
    vm.unregister_coalesced_zone(zone).unwrap();
    assert!(second.has_coalesced_write());
    let taken = second.take_coalesced_write().unwrap().unwrap();
    assert_eq!((taken.address, taken.bytes()), (zone.address, &[1][..]));
    drop((vm, first, second));
    assert_eq!(kvm.findings(), [Finding::LostCollectedWrites { writes: 2 }]);
}

#[test]
fn only_the_first_32_bits_of_a_size_count() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::DirtyLogRing, [1 << 32 | 8192, 0, 0, 0]).unwrap();
    assert_eq!(vm.create_vcpu(0).unwrap().dirty_ring().unwrap().entries().len(), 512);
}
