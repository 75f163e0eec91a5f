//! The memory of a VM, from a number of bytes to slots, a ROM and a doorbell, in a VMM made with
//! hv-memory.
//!
//! Runs without hardware: the VM is a mock that prints what it is told. With hv-kvm it would be a
//! KVM VM, and nothing else would differ.

use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hv_core::mock::MockVm;
use hv_core::{HostRange, IoAddress, MemoryBackend, SlotFlags};
use hv_memory::{
    GuestRam, GuestRange, IoEventMatch, IoEventRegistry, Mapping, NewSlot, RamLayout, SlotLimits,
    SlotManager,
};
use vm_memory::{Bytes, GuestAddress};

const GIB: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let vm = Arc::new(printing_vm());

    // Before the VM: where RAM goes, and the memory itself, which takes no room until it is used.
    let devices = GuestRange::new(GuestAddress(3 * GIB), GIB).ok_or("no such range")?;
    let ram = GuestRam::new(&RamLayout::new(4 * GIB, &[devices], 46)?)?;
    ram.memory().write_slice(b"kernel", GuestAddress(0x10_0000))?;

    println!("hv_core::init installs the slots before the irqchip exists:");
    for slot in ram.slots() {
        vm.set_memory_slot(slot)?;
    }

    // From now on the manager knows them.
    let slots = ram.slots().iter().cloned().map(|slot| ("RAM", slot));
    let limits = SlotLimits { slots: 32764, address_bits: 46 };
    let (manager, ram_slots) = SlotManager::adopt(Arc::clone(&vm), slots, limits)?;
    assert_eq!(ram_slots.len(), 2);

    println!("a ROM below 4 GiB:");
    let image = Arc::new(Mapping::anonymous(0x1000)?);
    image.as_volatile_slice().write_slice(&[0xf4; 16], 0xff0)?;
    let host = HostRange::new(image, 0, 0x1000).ok_or("no such range")?;
    let flags = SlotFlags { readonly: true, log_dirty: false };
    let guest = GuestAddress(4 * GIB - 0x1000);
    let rom = manager.add(NewSlot { name: "ROM".into(), guest, host: host.clone(), flags })?;

    println!("what KVM would refuse is refused by name, without asking it:");
    let again = NewSlot { name: "option ROM".into(), guest, host, flags };
    match manager.add(again) {
        Ok(_) => return Err("two memories at one address".into()),
        Err(error) => println!("  {error}"),
    }

    println!("a doorbell that never leaves the kernel:");
    let registry = IoEventRegistry::new(vm);
    let address = IoAddress::Mmio(0xc000_1000);
    let event = OwnedFd::from(File::open("/dev/null")?).into(); // an eventfd in a VMM
    let doorbell =
        registry.assign(IoEventMatch { address, length: 2, datamatch: Some(0) }, event)?;

    println!("an owner that goes takes what it owns:");
    drop(rom);

    println!("a VM that ends takes the rest, without further calls:");
    drop(registry);
    drop(manager);
    drop((doorbell, ram_slots));
    Ok(())
}

fn printing_vm() -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_set_memory_slot().returning(|slot| {
        let (id, guest, len) = (slot.id, slot.guest.0, slot.host.len());
        let readonly = if slot.flags.readonly { ", readonly" } else { "" };
        println!("  KVM_SET_USER_MEMORY_REGION: slot {id} at {guest:#x}, {len:#x} bytes{readonly}");
        Ok(())
    });
    vm.expect_delete_memory_slot().returning(|id| {
        println!("  KVM_SET_USER_MEMORY_REGION: slot {id} deleted");
        Ok(())
    });
    vm.expect_ioeventfd_assign().returning(|event| {
        println!("  KVM_IOEVENTFD at {:#x}", event.address.value());
        Ok(())
    });
    vm.expect_drop().return_const(());
    vm
}
