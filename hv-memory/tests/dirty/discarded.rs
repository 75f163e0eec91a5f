//! What is given back to the host is written: with zeros.

use std::sync::Arc;

use hv_core::fake::FakeKvm;
use hv_core::{HostRange, Hypervisor, SlotFlags};
use hv_memory::{DirtyPages, DirtyTracking, Mapping, NewSlot, SlotLimits, SlotManager};
use vm_memory::GuestAddress;

use crate::PAGE;

#[test]
fn pages_that_are_discarded_are_dirty() {
    let vm = Arc::new(FakeKvm::default().create_vm(0).unwrap());
    let limits = SlotLimits { slots: 8, address_bits: 36 };
    let (manager, _) = SlotManager::adopt::<&str>(vm, [], limits).unwrap();
    manager.track_dirty(DirtyTracking::Log).unwrap();
    let memory = Arc::new(Mapping::anonymous(100 * PAGE).unwrap());
    let host = HostRange::new(memory.clone(), 0, usize::try_from(100 * PAGE).unwrap()).unwrap();
    let flags = SlotFlags { log_dirty: true, readonly: false };
    let new = NewSlot { name: "RAM".into(), guest: GuestAddress(0), host, flags };
    let _slot = manager.add(new).unwrap();
    assert_eq!(memory.discard(70 * PAGE - 1, 3 * PAGE), Ok(2 * PAGE));
    let mut pages = DirtyPages::new();
    manager.harvest_dirty(&mut pages).unwrap();
    let pages = pages.ranges().flat_map(|range| range.start().0 / PAGE..=range.last().0 / PAGE);
    assert_eq!(pages.collect::<Vec<_>>(), [70, 71]);
}
