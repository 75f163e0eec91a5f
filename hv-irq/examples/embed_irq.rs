//! A device with message-signalled interrupts, from plug to unplug, in a VMM made with hv-irq.
//!
//! Runs without hardware: the VM is a mock that prints what it is told. With hv-kvm it would be a
//! KVM VM, and nothing else would differ.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hv_core::mock::MockVm;
use hv_core::{EventFd, Msi};
use hv_irq::{IrqRouter, LegacyPins, MsiVectors, RouterConfig, RouterError};

fn main() -> Result<(), RouterError> {
    let vm = Arc::new(printing_vm());
    println!("start:");
    let router = IrqRouter::new(vm, RouterConfig::new(4096, LegacyPins::Kernel))?;

    println!("plug a device with three vectors:");
    let mut vectors = MsiVectors::new(&router, (0..3).map(|_| event()));

    println!("its driver enables them:");
    let message = |data| Msi { address: 0xfee0_0000, data, device: None };
    vectors.change(|change| {
        change.enable();
        for (index, data) in (0..3).zip(0x40..) {
            change.retarget(index, message(data))?;
            change.unmask(index)?;
        }
        Ok(())
    })?;

    println!("the guest masks one, unmasks it on another vCPU, and nothing is lost:");
    vectors.mask(0)?;
    vectors.retarget(0, Msi { address: 0xfee0_1000, data: 0x40, device: None })?;
    vectors.unmask(0)?;

    println!("the guest writes what is there already:");
    vectors.retarget(0, Msi { address: 0xfee0_1000, data: 0x40, device: None })?;

    println!("unplug:");
    drop(vectors);
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
