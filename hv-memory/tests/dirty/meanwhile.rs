//! What a guest that runs writes in the moment in which its slot changes: after the log was read, and
//! before KVM is told.

use std::sync::{Arc, Mutex, OnceLock};

use hv_core::fake::{FakeKvm, FakeVm, VmView, Wrote};
use hv_core::layer::{Answer, Interceptor, LayeredVm, Object, Request};
use hv_core::{Error, HostRange, Hypervisor, IoAddress, SlotFlags, Vm};
use hv_memory::{DirtyPages, DirtyTracking, Mapping, NewSlot, Slot, SlotLimits, SlotManager};
use vm_memory::GuestAddress;

use crate::PAGE;

/// A guest that writes to this page whenever a slot is about to change.
#[derive(Debug, Clone, Default)]
struct Busy {
    view: Arc<OnceLock<VmView>>,
    page: Arc<Mutex<Option<u64>>>,
}

impl Interceptor for Busy {
    fn call<T: Answer>(
        &self,
        _: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        if let Request::SetMemorySlot(_) | Request::DeleteMemorySlot(_) = request
            && let (Some(view), Some(page)) = (self.view.get(), *self.page.lock().unwrap())
        {
            assert_eq!(view.guest_write(IoAddress::Mmio(page * PAGE), &[1]), Wrote::Memory);
        }
        real()
    }
}

/// What is told after `change`, during which the guest writes to page 7; it wrote to page 3 before. The
/// slot has pages 0 to 99.
fn told(
    how: DirtyTracking,
    change: impl FnOnce(Slot<LayeredVm<FakeVm, Busy>>) -> Option<Slot<LayeredVm<FakeVm, Busy>>>,
) -> Vec<u64> {
    let busy = Busy::default();
    let fake = FakeKvm::default();
    let vm = Arc::new(busy.over(fake.clone()).create_vm(0).unwrap());
    let limits = SlotLimits { slots: 8, address_bits: 36 };
    let (manager, _) = SlotManager::adopt::<&str>(vm.clone(), [], limits).unwrap();
    manager.track_dirty(how).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    if let DirtyTracking::Ring { .. } = how {
        manager.add_dirty_ring(&vcpu).unwrap();
    }
    let memory = Arc::new(Mapping::anonymous(100 * PAGE).unwrap());
    let host = HostRange::new(memory, 0, usize::try_from(100 * PAGE).unwrap()).unwrap();
    let flags = SlotFlags { log_dirty: true, readonly: false };
    let new = NewSlot { name: "RAM".into(), guest: GuestAddress(0), host, flags };
    let slot = manager.add(new).unwrap();
    let view = vm.inner().view();
    assert_eq!(view.guest_write(IoAddress::Mmio(3 * PAGE), &[1]), Wrote::Memory);
    assert!(busy.view.set(view).is_ok());
    *busy.page.lock().unwrap() = Some(7);
    let slot = change(slot);
    *busy.page.lock().unwrap() = None;
    let mut pages = DirtyPages::new();
    manager.harvest_dirty(&mut pages).unwrap();
    drop(slot);
    let pages = pages.ranges().flat_map(|range| range.start().0 / PAGE..=range.last().0 / PAGE);
    pages.collect()
}

const LOG: DirtyTracking = DirtyTracking::Log;
const MANUAL: DirtyTracking = DirtyTracking::ManualProtect { initially_set: false };
const RING: DirtyTracking = DirtyTracking::Ring { bytes: 4096 };

#[test]
fn with_rings_it_is_told_though_the_slot_has_gone() {
    let removed = |slot: Slot<_>| {
        slot.remove().unwrap();
        None
    };
    let ceased = |slot: Slot<_>| {
        slot.set_log_dirty(false).unwrap();
        Some(slot)
    };
    assert_eq!(told(RING, removed), [3, 7]);
    assert_eq!(told(RING, ceased), [3, 7]);
    // The log goes with the slot.
    for how in [LOG, MANUAL] {
        assert_eq!(told(how, removed), [3]);
        assert_eq!(told(how, ceased), [3]);
    }
}

#[test]
fn of_a_slot_that_moves_it_is_told_where_the_slot_is_now() {
    for how in [LOG, MANUAL, RING] {
        let pages = told(how, |slot| {
            slot.move_to(GuestAddress(1000 * PAGE)).unwrap();
            Some(slot)
        });
        assert_eq!(pages, [3, 1007], "{how:?}");
    }
}
