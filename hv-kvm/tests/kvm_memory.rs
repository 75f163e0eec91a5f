//! Memory slots on real KVM: its rules, and how long the host memory lives.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use common::{Alive, CODE, PAGE, UNMAPPED, begin, next_exit, slot, vm_with};
use hv_core::{
    Capability, CoalescedZone, Errno, HostRange, Hypervisor, IoAddress, Ioctl, MemoryBackend,
    MemorySlot, MmioExit, SlotFlags, SlotId, Vcpu, VcpuExit, VcpuKick, Vm,
};
use hv_kvm::KvmVm;
use vm_memory::GuestAddress;

const LOG_DIRTY: SlotFlags = SlotFlags { log_dirty: true, readonly: false };
const READONLY: SlotFlags = SlotFlags { log_dirty: false, readonly: true };

fn vm() -> KvmVm {
    common::kvm().create_vm(0).unwrap()
}

fn errno(result: Result<(), hv_core::Error>) -> Result<(), Errno> {
    result.map_err(|error| error.errno)
}

#[test]
fn kvm_judges_slots() {
    let (vm, memory) = (vm(), common::pages(4));
    let set = |slot: MemorySlot| errno(vm.set_memory_slot(&slot));
    assert_eq!(set(slot(0, 0x1000, &memory)), Ok(()));
    assert_eq!(set(slot(0, 0x1000, &memory)), Ok(()), "identical");
    assert_eq!(set(slot(1, 0x2000, &memory)), Err(Errno::EEXIST), "overlap");
    assert_eq!(set(slot(1, 0x5000, &memory)), Ok(()), "two slots on one memory");
    assert_eq!(set(slot(2, 0x9001, &memory)), Err(Errno::EINVAL), "guest address");
    assert_eq!(set(slot(2, 1 << 52, &memory)), Err(Errno::EINVAL), "beyond physical addresses");
    assert_eq!(set(slot(2, u64::MAX - 0xfff, &memory)), Err(Errno::EINVAL), "wrap");
    let limit = vm.check_extension(Capability::NrMemslots).unwrap().unsigned_abs();
    assert_eq!(set(slot(limit, 0x9000, &memory)), Err(Errno::EINVAL), "slot id");
    assert_eq!(set(slot(0, 0x20000, &memory)), Ok(()), "move");
    assert_eq!(set(slot(0, 0x5000, &memory)), Err(Errno::EEXIST), "move onto another");
    let flagged = |flags| MemorySlot { flags, ..slot(0, 0x20000, &memory) };
    assert_eq!(set(flagged(LOG_DIRTY)), Ok(()));
    assert_eq!(set(flagged(READONLY)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.delete_memory_slot(SlotId(0))), Ok(()));
    assert_eq!(errno(vm.delete_memory_slot(SlotId(0))), Err(Errno::EINVAL), "absent");
    assert_eq!(set(flagged(READONLY)), Ok(()), "at creation");

    let error = vm.set_memory_slot(&slot(7, 0x20000, &memory)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_SET_USER_MEMORY_REGION for slot 7 at 0x20000, 0x4000 bytes failed: \
         EEXIST (File exists); the range overlaps another slot"
    );
}

#[test]
fn a_slot_without_memory_is_refused_and_deletes_nothing() {
    let (vm, memory) = (vm(), common::pages(1));
    vm.set_memory_slot(&slot(0, 0x1000, &memory)).unwrap();
    let nothing = HostRange::new(std::sync::Arc::new(Nothing), 0, 0).unwrap();
    let error = vm.set_memory_slot(&slot(0, 0x1000, &nothing)).unwrap_err();
    assert_eq!((error.call, error.errno), (Ioctl::SetUserMemoryRegion.into(), Errno::EINVAL));
    assert_eq!(errno(vm.delete_memory_slot(SlotId(0))), Ok(()), "still there");
}

#[derive(Debug)]
struct Nothing;

impl hv_core::HostMemory for Nothing {
    fn bytes(&self) -> &[std::sync::atomic::AtomicU8] {
        &[]
    }
}

#[test]
fn memory_lives_until_its_slot_is_replaced_or_deleted() {
    let (vm, alive) = (vm(), Alive::default());
    vm.set_memory_slot(&slot(0, 0x1000, &alive.pages(1))).unwrap();
    assert_eq!(alive.count(), 1, "held by the VM");

    vm.set_memory_slot(&slot(1, 0x1000, &alive.pages(1))).unwrap_err();
    assert_eq!(alive.count(), 1, "a refused slot holds nothing");
    vm.set_memory_slot(&slot(0, 0x1000, &alive.pages(1))).unwrap_err();
    assert_eq!(alive.count(), 1, "a refused replacement leaves what was there");

    vm.delete_memory_slot(SlotId(9)).unwrap_err();
    assert_eq!(alive.count(), 1);
    vm.delete_memory_slot(SlotId(0)).unwrap();
    assert_eq!(alive.count(), 0);
}

#[test]
fn memory_follows_its_slot_when_it_moves() {
    let (vm, alive) = (vm(), Alive::default());
    let memory = alive.pages(1);
    vm.set_memory_slot(&slot(0, 0x1000, &memory)).unwrap();
    vm.set_memory_slot(&slot(0, 0x8000, &memory)).unwrap();
    drop(memory);
    assert_eq!(alive.count(), 1);
    vm.delete_memory_slot(SlotId(0)).unwrap();
    assert_eq!(alive.count(), 0);
}

#[test]
fn memory_lives_as_long_as_a_vcpu_but_not_as_long_as_a_kicker() {
    let alive = Alive::default();
    let vm = vm();
    vm.set_tss_addr(0xfffb_d000).unwrap();
    let memory = alive.pages(1);
    common::store(&memory, 0, &[0xb0, 0x07, 0xa2, 0x00, 0x18, 0xf4]); // mov [0x1800], 7; hlt
    vm.set_memory_slot(&slot(0, CODE, &memory)).unwrap();
    drop(memory);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let second = vm.create_vcpu(1).unwrap();
    let kick = vcpu.kicker();
    begin(&vcpu, CODE);

    drop(vm);
    assert_eq!(alive.count(), 1);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt, "the guest runs without the VM's handle");
    assert_eq!(vcpu.regs().unwrap().rax & 0xff, 7);
    drop(vcpu);
    assert_eq!(alive.count(), 1, "the second vCPU holds it");
    drop(second);
    assert_eq!(alive.count(), 0);
    kick.kick().unwrap();
}

#[test]
fn a_write_to_a_readonly_slot_is_mmio() {
    let (vm, _code) = vm_with(&[0xb0, 0x5a, 0xa2, 0x34, 0x40, 0xa0, 0x35, 0x40, 0xf4], 1);
    let rom = common::pages(1);
    common::store(&rom, 0x35, &[0x99]);
    vm.set_memory_slot(&MemorySlot { flags: READONLY, ..slot(1, 0x4000, &rom) }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    let VcpuExit::Mmio(MmioExit { address, len, written: Some(bytes) }) = next_exit(&mut vcpu)
    else {
        panic!("no MMIO write");
    };
    assert_eq!((address, len, bytes[0]), (0x4034, 1, 0x5a));
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rax & 0xff, 0x99, "reads come from the memory");
    assert_eq!(common::load(&rom, 0x34, 2), [0, 0x99]);
}

/// A VM whose slot 1, 100 pages at 0x10000, logs; and the code that writes its pages 0 and 65.
fn logging_vm() -> (KvmVm, HostRange) {
    #[rustfmt::skip]
    let (vm, _) = vm_with(&[
        0xb8, 0x00, 0x10,       // mov ax, 0x1000
        0x8e, 0xd8,             // mov ds, ax
        0xc6, 0x06, 0, 0, 1,    // mov byte [0], 1       page 0
        0xb8, 0x00, 0x51,       // mov ax, 0x5100
        0x8e, 0xd8,             // mov ds, ax
        0xc6, 0x06, 0, 0, 1,    // mov byte [0], 1       page 65
        0xf4,                   // hlt
    ], 1);
    let memory = common::pages(100);
    vm.set_memory_slot(&MemorySlot { flags: LOG_DIRTY, ..slot(1, 0x10000, &memory) }).unwrap();
    (vm, memory)
}

#[test]
fn the_dirty_log_is_read_and_cleared() {
    let (vm, memory) = logging_vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
    assert_eq!(common::load(&memory, 65 * PAGE, 1), [1], "0x51000 - 0x10000 is page 65");

    let mut bitmap = [u64::MAX; 3];
    vm.dirty_log(SlotId(1), &mut bitmap).unwrap();
    assert_eq!(bitmap, [1, 2, u64::MAX], "100 pages are two words");
    vm.dirty_log(SlotId(1), &mut bitmap).unwrap();
    assert_eq!(bitmap[..2], [0, 0]);

    let short = vm.dirty_log(SlotId(1), &mut [0]).unwrap_err();
    assert_eq!((short.call, short.errno), (Ioctl::GetDirtyLog.into(), Errno::EINVAL));
    let log = |slot| errno(vm.dirty_log(SlotId(slot), &mut [0; 2]));
    assert_eq!(log(0), Err(Errno::ENOENT), "does not log");
    assert_eq!(log(5), Err(Errno::ENOENT), "absent");
    assert_eq!(log(0xffff), Err(Errno::EINVAL), "no slot id");

    vm.delete_memory_slot(SlotId(1)).unwrap();
    assert_eq!(log(1), Err(Errno::ENOENT), "deleted");
    let text = vm.dirty_log(SlotId(1), &mut [0; 2]).unwrap_err().to_string();
    assert!(text.starts_with("KVM_GET_DIRTY_LOG of slot 1 failed: ENOENT"), "{text}");
}

#[test]
fn with_manual_protection_only_what_is_cleared_is_clean() {
    let (vm, _memory) = logging_vm();
    vm.enable_cap(Capability::ManualDirtyLogProtect2, [1, 0, 0, 0]).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);

    let log = || {
        let mut bitmap = [0; 2];
        vm.dirty_log(SlotId(1), &mut bitmap).unwrap();
        bitmap
    };
    assert_eq!(log(), [1, 2]);
    assert_eq!(log(), [1, 2], "reading does not clear");
    vm.clear_dirty_log(SlotId(1), 0, 64, &[1]).unwrap();
    assert_eq!(log(), [0, 2], "only what was asked for");
    vm.clear_dirty_log(SlotId(1), 64, 36, &[2]).unwrap();
    assert_eq!(log(), [0, 0], "a count that reaches the end");

    let clear = |slot, first, pages, bitmap: &[u64]| {
        errno(vm.clear_dirty_log(SlotId(slot), first, pages, bitmap))
    };
    assert_eq!(clear(1, 1, 64, &[0; 2]), Err(Errno::EINVAL), "first");
    assert_eq!(clear(1, 0, 63, &[0; 2]), Err(Errno::EINVAL), "pages");
    assert_eq!(clear(1, 64, 64, &[0; 2]), Err(Errno::EINVAL), "past the end");
    assert_eq!(clear(1, 0, 100, &[0]), Err(Errno::EINVAL), "a short bitmap");
    assert_eq!(clear(1, 0, u32::MAX, &[]), Err(Errno::EINVAL), "no bitmap");
    assert_eq!(clear(0, 0, 1, &[0]), Err(Errno::ENOENT), "does not log");
}

#[test]
fn coalesced_zones_come_and_go() {
    let (vm, _code) = vm_with(&[0xa2, 0x00, 0xe0, 0xe6, 0x01, 0xf4], 1); // mov [UNMAPPED], al
    let zone = CoalescedZone { address: IoAddress::Mmio(UNMAPPED), size: 0x100 };
    vm.register_coalesced_zone(zone).unwrap();
    vm.register_coalesced_zone(zone).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(_)), "the write was collected");
    vm.unregister_coalesced_zone(zone).unwrap();
    vm.unregister_coalesced_zone(zone).unwrap();
    begin(&vcpu, CODE);
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Mmio(_)), "and now it exits");

    let port = CoalescedZone { address: IoAddress::Pio(0x70), size: 1 };
    vm.register_coalesced_zone(port).unwrap();
    vm.unregister_coalesced_zone(port).unwrap();
}

#[test]
fn slots_can_be_changed_from_many_threads() {
    let (vm, alive) = (vm(), Alive::default());
    std::thread::scope(|scope| {
        for id in 0..4u32 {
            let (vm, alive) = (&vm, &alive);
            scope.spawn(move || {
                for _ in 0..25 {
                    let guest = GuestAddress(0x10000 * u64::from(id + 1)).0;
                    vm.set_memory_slot(&slot(id, guest, &alive.pages(1))).unwrap();
                    vm.delete_memory_slot(SlotId(id)).unwrap();
                }
            });
        }
    });
    assert_eq!(alive.count(), 0);
}
