//! What lives how long, and what is told of what was left.

use std::sync::Arc;

use super::{msi_route, page, slot, vm_with_irqchip};
use crate::fake::{FakeKvm, Finding, Interrupt, Leftover, Live, Wrote};
use crate::{
    CoalescedZone, Gsi, HostRange, Hypervisor, IoAddress, IoEvent, IoEventBackend, IrqBackend,
    Irqfd, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};

#[test]
fn a_vcpu_keeps_its_vm() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let view = vm.view();
    drop(vm);
    assert_eq!((kvm.live().vms, kvm.live().vcpus, kvm.vms().len()), (1, 1, 1));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    drop(vcpu);
    assert_eq!(kvm.live(), Live { hypervisors: 1, ..Live::default() });
    assert!(kvm.vms().is_empty());
    assert_eq!(view.vcpus(), [0], "what it had can still be asked for");
}

#[test]
fn what_is_left_is_told_and_let_go() {
    let kvm = FakeKvm::default();
    let vm = vm_with_irqchip(&kvm);
    let memory = page();
    let host = HostRange::new(memory.clone(), 0, 4096).unwrap();
    let guest = vm_memory::GuestAddress(0);
    let kept = MemorySlot { id: SlotId(3), guest, host, flags: SlotFlags::default() };
    vm.set_memory_slot(&kept).unwrap();
    drop(kept);
    vm.set_gsi_routing(&[msi_route(30, 0x51)]).unwrap();
    let event = kvm.eventfd().unwrap();
    let (address, gsi) = (IoAddress::Pio(0x70), Gsi(30));
    vm.irqfd_assign(&Irqfd { event: event.clone(), gsi, resample: None }).unwrap();
    vm.ioeventfd_assign(&IoEvent { address, length: 1, datamatch: None, event }).unwrap();
    let zone = CoalescedZone { address: IoAddress::Mmio(0xd000_0000), size: 16 };
    vm.register_coalesced_zone(zone).unwrap();
    let live = Live {
        hypervisors: 1,
        vms: 1,
        vcpus: 0,
        eventfds: 1,
        slots: 1,
        irqfds: 1,
        ioeventfds: 1,
        zones: 1,
    };
    assert_eq!(kvm.live(), live);
    assert_eq!(Arc::strong_count(&memory), 2);
    assert_eq!(kvm.findings(), []);
    drop(vm);
    assert_eq!(kvm.live(), Live { hypervisors: 1, ..Live::default() });
    assert_eq!(Arc::strong_count(&memory), 1);
    let left = [
        Leftover::Slot(SlotId(3)),
        Leftover::Irqfd(gsi),
        Leftover::IoEvent(address),
        Leftover::Zone(zone),
    ];
    assert_eq!(kvm.findings(), left.map(Finding::Left));
}

#[test]
fn nothing_is_told_of_a_vm_that_was_cleared() {
    let kvm = FakeKvm::default();
    let vm = vm_with_irqchip(&kvm);
    vm.set_memory_slot(&slot(0, 0, SlotFlags::default())).unwrap();
    vm.delete_memory_slot(SlotId(0)).unwrap();
    drop(vm);
    assert_eq!(kvm.findings(), []);
}

/// Host memory may do anything when it goes, such as ask the VM it was part of.
#[test]
fn memory_goes_without_the_lock() {
    #[derive(Debug)]
    struct Asks(std::sync::OnceLock<crate::fake::VmView>, Arc<super::Page>);
    impl crate::HostMemory for Asks {
        fn bytes(&self) -> &[std::sync::atomic::AtomicU8] {
            self.1.bytes()
        }
    }
    impl Drop for Asks {
        fn drop(&mut self) {
            assert!(self.0.get().is_some_and(|view| view.slots().is_empty()));
        }
    }
    let kvm = FakeKvm::default();
    for delete in [true, false] {
        let vm = kvm.create_vm(0).unwrap();
        let asks = Arc::new(Asks(std::sync::OnceLock::new(), page()));
        asks.0.set(vm.view()).unwrap();
        let host = HostRange::new(asks, 0, 4096).unwrap();
        let (id, guest) = (SlotId(0), vm_memory::GuestAddress(0));
        vm.set_memory_slot(&MemorySlot { id, guest, host, flags: SlotFlags::default() }).unwrap();
        if delete {
            vm.delete_memory_slot(SlotId(0)).unwrap();
        }
    }
}

#[test]
fn a_slot_deleted_before_its_dirty_pages_were_asked_for() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let log = SlotFlags { log_dirty: true, readonly: false };
    for harvest in [true, false] {
        vm.set_memory_slot(&slot(0, 0, log)).unwrap();
        assert_eq!(vm.view().guest_write(IoAddress::Mmio(0x10), &[1]), Wrote::Memory);
        if harvest {
            vm.dirty_log(SlotId(0), &mut [0]).unwrap();
        }
        vm.delete_memory_slot(SlotId(0)).unwrap();
    }
    assert_eq!(kvm.findings(), [Finding::LostDirtyPages { slot: SlotId(0), pages: 1 }]);
}

#[test]
fn logging_that_ends_before_dirty_pages_were_asked_for() {
    let kvm = FakeKvm::default();
    let log = SlotFlags { log_dirty: true, readonly: false };
    let vm = kvm.create_vm(0).unwrap();
    let slot = slot(5, 0, log);
    let logs = |log_dirty| {
        let flags = SlotFlags { log_dirty, readonly: false };
        vm.set_memory_slot(&MemorySlot { flags, ..slot.clone() })
    };
    let lost = Finding::LostDirtyPages { slot: SlotId(5), pages: 1 };
    logs(true).unwrap();
    assert_eq!(vm.view().guest_write(IoAddress::Mmio(0x10), &[1]), Wrote::Memory);
    logs(true).unwrap();
    assert_eq!(kvm.findings(), [], "it goes on");
    let readonly = SlotFlags { readonly: true, log_dirty: false };
    vm.set_memory_slot(&MemorySlot { flags: readonly, ..slot.clone() }).unwrap_err();
    assert_eq!(kvm.findings(), [], "it was refused");
    logs(false).unwrap();
    assert_eq!(kvm.findings(), [lost]);
    logs(true).unwrap();
    assert_eq!(vm.view().guest_write(IoAddress::Mmio(0x10), &[1]), Wrote::Memory);
    drop(vm);
    assert_eq!(kvm.findings(), [lost, lost, Finding::Left(Leftover::Slot(SlotId(5)))]);
}

#[test]
fn the_strict_mode_of_zones() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let zone = CoalescedZone { address: IoAddress::Mmio(0xa0000), size: 16 };
    vm.unregister_coalesced_zone(zone).unwrap();
    vm.register_coalesced_zone(zone).unwrap();
    vm.register_coalesced_zone(zone).unwrap();
    assert_eq!(vm.view().coalesced_zones().len(), 2);
    vm.unregister_coalesced_zone(zone).unwrap();
    assert_eq!(vm.view().coalesced_zones().len(), 0);
    assert_eq!(kvm.findings(), [Finding::VainUnregister(zone), Finding::DuplicateZone(zone)]);
}

#[test]
fn clones_are_the_same_kvm_and_vms_are_apart() {
    let kvm = FakeKvm::default();
    let (first, second) = (vm_with_irqchip(&kvm.clone()), vm_with_irqchip(&kvm));
    let vcpus = [&first, &second].map(|vm| vm.create_vcpu(0).unwrap());
    first.view().enable_apic(0);
    second.view().enable_apic(0);
    first.signal_msi(super::message(0x41)).unwrap();
    assert_eq!(first.view().interrupts(0), [Interrupt::Fixed(0x41)]);
    assert_eq!(second.view().interrupts(0), []);
    assert_eq!(kvm.calls().of(crate::Ioctl::CreateIrqchip), 2);
    drop(vcpus);
}

#[test]
fn many_vms_leave_nothing() {
    let kvm = FakeKvm::default();
    for _ in 0..500 {
        let vm = vm_with_irqchip(&kvm);
        let _vcpu = vm.create_vcpu(0).unwrap();
        let _event = kvm.eventfd().unwrap();
    }
    assert_eq!(kvm.live(), Live { hypervisors: 1, ..Live::default() });
}
