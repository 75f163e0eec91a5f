//! What happens when the memory of a slot goes must not happen under the manager's lock.

use std::sync::atomic::AtomicU8;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use hv_core::mock::MockVm;
use hv_core::{HostMemory, HostRange, SlotFlags};
use hv_memory::{Mapping, NewSlot, SlotLimits, SlotManager, page_size};
use vm_memory::GuestAddress;

/// Memory that looks at the manager when it goes.
struct Curious {
    mapping: Mapping,
    manager: Arc<OnceLock<SlotManager<MockVm>>>,
    told: mpsc::Sender<usize>,
}

impl std::fmt::Debug for Curious {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Curious")
    }
}

impl HostMemory for Curious {
    fn bytes(&self) -> &[AtomicU8] {
        self.mapping.bytes()
    }
}

impl Drop for Curious {
    fn drop(&mut self) {
        let slots = self.manager.get().map_or(0, |manager| manager.slots().len());
        let _ = self.told.send(slots);
    }
}

#[test]
fn memory_that_goes_with_its_slot_may_ask_the_manager() {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_memory_slot().returning(|_| Ok(()));
    vm.expect_delete_memory_slot().returning(|_| Ok(()));
    let limits = SlotLimits { slots: 8, address_bits: 46 };
    let none: [(&str, _); 0] = [];
    let (manager, _) = SlotManager::adopt(Arc::new(vm), none, limits).unwrap();
    let shared = Arc::new(OnceLock::new());
    let (told, hears) = mpsc::channel();
    let mapping = Mapping::anonymous(page_size()).unwrap();
    let memory = Arc::new(Curious { mapping, manager: shared.clone(), told });
    let host = HostRange::new(memory, 0, page_size() as usize).unwrap();
    let flags = SlotFlags::default();
    let new = NewSlot { name: "curious".into(), guest: GuestAddress(0), host, flags };
    let slot = manager.add(new).unwrap();
    assert!(shared.set(manager).is_ok());
    std::thread::spawn(move || drop(slot));
    let slots = hears.recv_timeout(Duration::from_secs(60)).expect("a deadlock");
    assert_eq!(slots, 0);
}
