//! The same table by system calls alone: built once, written again with one message changed.

#![allow(unsafe_code, reason = "this is what the router is compared with")]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use hv_core::{Route, RouteTarget};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVMIO, kvm_irq_routing, kvm_irq_routing_entry,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ptr, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

use crate::{Changes, Loop, first_routes, message};

ioctl_io_nr!(KVM_CREATE_VM, KVMIO, 0x01);
ioctl_io_nr!(KVM_CREATE_IRQCHIP, KVMIO, 0x60);
ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, kvm_irq_routing);

/// Words of the structures.
const HEADER: usize = size_of::<kvm_irq_routing>() / size_of::<u64>();
const ENTRY: usize = size_of::<kvm_irq_routing_entry>() / size_of::<u64>();

/// A VM with a `struct kvm_irq_routing`.
pub(crate) struct RawTable {
    vm: OwnedFd,
    table: Vec<u64>,
    changes: Changes,
}

impl RawTable {
    pub(crate) fn new() -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        // SAFETY: makes a VM, and takes no pointer.
        let vm = checked(unsafe { ioctl_with_val(&kvm, KVM_CREATE_VM(), 0) });
        // SAFETY: a descriptor that was just made and that nobody else has.
        let vm = unsafe { OwnedFd::from_raw_fd(vm) };
        // SAFETY: takes no argument.
        checked(unsafe { ioctl(&vm, KVM_CREATE_IRQCHIP()) });
        let routes = first_routes();
        let header = u64::try_from(routes.len()).unwrap();
        let entries = routes.iter().flat_map(entry);
        let table: Vec<u64> = std::iter::once(header).chain(entries).collect();
        assert_eq!(table.len(), HEADER + routes.len() * ENTRY);
        let raw = Self { vm, table, changes: Changes::default() };
        raw.write();
        raw
    }

    fn write(&self) {
        // SAFETY: KVM reads as many entries as the header says, which are in the table behind it.
        checked(unsafe { ioctl_with_ptr(&self.vm, KVM_SET_GSI_ROUTING(), self.table.as_ptr()) });
    }
}

impl Loop for RawTable {
    fn commit(&mut self) {
        let change = self.changes.next();
        let data = HEADER + change.index * ENTRY + 3;
        self.table[data] = u64::from(message(change.data).data);
        self.write();
    }
}

fn checked(result: i32) -> i32 {
    assert!(result >= 0, "ioctl: {}", io::Error::last_os_error());
    result
}

/// Its words, with the fields in the order of `struct kvm_irq_routing_entry`.
fn entry(route: &Route) -> [u64; ENTRY] {
    let pair = |first: u32, second: u32| u64::from(first) | u64::from(second) << 32;
    let (kind, first, second) = match route.target {
        RouteTarget::Pin { chip, pin } => (KVM_IRQ_ROUTING_IRQCHIP, pair(chip.0, pin), 0),
        RouteTarget::Msi(msi) => (KVM_IRQ_ROUTING_MSI, msi.address, pair(msi.data, 0)),
        other => panic!("{other:?} is not in the table"),
    };
    [pair(route.gsi.0, kind), 0, first, second, 0, 0]
}
