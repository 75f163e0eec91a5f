//! The parts together, through the traits.

mod creation;
mod guests;
mod hosts;
mod kicks;
mod lifetime;
mod rings;
mod state;

use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use vm_memory::GuestAddress;

use super::{FakeKvm, FakeVm};
use crate::{
    Errno, Error, Gsi, HostMemory, HostRange, Hypervisor, MemorySlot, Msi, Route, RouteTarget,
    SlotFlags, SlotId, Vm,
};

/// A page of host memory.
#[derive(Debug)]
#[repr(align(4096))]
struct Page([AtomicU8; 4096]);

impl HostMemory for Page {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

fn page() -> Arc<Page> {
    Arc::new(Page(std::array::from_fn(|_| AtomicU8::new(0))))
}

/// A slot of one page.
fn slot(id: u32, guest: u64, flags: SlotFlags) -> MemorySlot {
    let host = HostRange::new(page(), 0, 4096).unwrap();
    MemorySlot { id: SlotId(id), guest: GuestAddress(guest), host, flags }
}

fn errno<T>(result: Result<T, Error>) -> Result<T, Errno> {
    result.map_err(|error| error.errno)
}

/// A VM of a default host with an irqchip.
fn vm_with_irqchip(kvm: &FakeKvm) -> FakeVm {
    let vm = kvm.create_vm(0).unwrap();
    vm.create_irqchip().unwrap();
    vm
}

fn message(vector: u8) -> Msi {
    Msi { address: 0xfee0_0000, data: vector.into(), device: None }
}

fn msi_route(gsi: u32, vector: u8) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Msi(message(vector)) }
}
