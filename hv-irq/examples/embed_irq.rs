//! A device with message-signalled interrupts, from plug to unplug, in a VMM made with hv-irq.
//!
//! Runs without hardware: the VM is a mock that prints what it is told. With hv-kvm it would be a
//! KVM VM, and nothing else would differ.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hv_core::mock::MockVm;
use hv_core::{EventFd, IrqBackend, Msi};
use hv_irq::{IrqRouter, LegacyPins, MsiRoute, RouterConfig, RouterError};

/// What a device keeps for each of its vectors.
struct Vector<V: IrqBackend> {
    route: MsiRoute<V>,
    event: EventFd,
}

/// A device is plugged: one commit, however many vectors it has.
fn plug<V: IrqBackend>(
    router: &IrqRouter<V>,
    events: Vec<EventFd>,
) -> Result<Vec<Vector<V>>, RouterError> {
    router.batch(|batch| {
        let mut vectors = Vec::new();
        for (event, data) in events.into_iter().zip(0x40..) {
            let route = batch.add_msi(Msi { address: 0xfee0_0000, data, device: None })?;
            batch.bind(&route, event.clone())?;
            vectors.push(Vector { route, event });
        }
        Ok(vectors)
    })
}

fn main() -> Result<(), RouterError> {
    let vm = Arc::new(printing_vm());
    let pins = LegacyPins::Kernel;
    let config = RouterConfig { gsi_count: 4096, pins, inject_status: true };
    println!("start:");
    let router = IrqRouter::new(vm, config)?;

    println!("plug a device with three vectors:");
    let vectors = plug(&router, (0..3).map(|_| event()).collect())?;

    println!("the guest masks one, unmasks it on another vCPU, and nothing is lost:");
    let [first, ..] = vectors.as_slice() else { return Ok(()) };
    router.batch(|batch| batch.unbind(&first.route))?;
    router.batch(|batch| {
        batch.set_msi(&first.route, Msi { address: 0xfee0_1000, data: 0x40, device: None })?;
        batch.bind(&first.route, first.event.clone())
    })?;

    println!("the guest writes what is there already:");
    router.batch(|batch| {
        batch.set_msi(&first.route, Msi { address: 0xfee0_1000, data: 0x40, device: None })
    })?;

    println!("unplug:");
    router.batch(|batch| vectors.into_iter().try_for_each(|v| batch.remove(v.route)))?;
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    assert_eq!(router.routes().len(), 38);
    Ok(())
}

/// Stands in for an eventfd, which a hypervisor makes (`Hypervisor::eventfd`).
fn event() -> EventFd {
    match File::open("/dev/null") {
        Ok(file) => OwnedFd::from(file).into(),
        Err(error) => {
            eprintln!("embed_irq: can't open /dev/null: {error}");
            std::process::exit(1)
        }
    }
}

fn printing_vm() -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_set_gsi_routing().returning(|routes| {
        println!("  KVM_SET_GSI_ROUTING with {} routes", routes.len());
        Ok(())
    });
    vm.expect_irqfd_assign().returning(|irqfd| {
        println!("  KVM_IRQFD: GSI {}", irqfd.gsi);
        Ok(())
    });
    vm.expect_irqfd_deassign().returning(|_, gsi| {
        println!("  KVM_IRQFD, deassign: GSI {gsi}");
        Ok(())
    });
    vm.expect_drop().return_const(());
    vm
}
