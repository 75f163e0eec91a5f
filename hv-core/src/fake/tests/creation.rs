//! What may be created when.

use kvm_bindings::kvm_pit_config;

use super::{errno, message, vm_with_irqchip};
use crate::fake::{FakeKvm, FakeVm};
use crate::{
    Capability as C, CoalescedZone, Errno, Gsi, Hypervisor, IoAddress, IoEvent, IoEventBackend,
    IrqBackend, Irqfd, MemoryBackend, Vcpu, Vm,
};

fn vm() -> FakeVm {
    FakeKvm::default().create_vm(0).unwrap()
}

fn split() -> FakeVm {
    let vm = vm();
    vm.enable_cap(C::SplitIrqchip, [24, 0, 0, 0]).unwrap();
    vm
}

#[test]
fn without_an_irqchip() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let irqfd = Irqfd { event: kvm.eventfd().unwrap(), gsi: Gsi(0), resample: None };
    assert_eq!(errno(vm.set_gsi_routing(&[])), Err(Errno::EINVAL));
    assert_eq!(errno(vm.irqfd_assign(&irqfd)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.signal_msi(message(0x40))), Err(Errno::EINVAL));
    assert_eq!(errno(vm.irq_line(Gsi(4), true)), Err(Errno::ENXIO));
    assert_eq!(errno(vm.irq_line_status(Gsi(4), true)), Err(Errno::ENXIO));
    assert_eq!(errno(vm.irqchip(0).map(|_| ())), Err(Errno::ENXIO));
    assert_eq!(errno(vm.create_pit2(kvm_pit_config::default())), Err(Errno::ENOENT));
    assert_eq!(errno(vm.pit2().map(|_| ())), Err(Errno::ENXIO));
    let vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.lapic().map(|_| ())), Err(Errno::EINVAL));
}

#[test]
fn irqchips_once_and_before_the_vcpus() {
    let full = vm_with_irqchip(&FakeKvm::default());
    assert_eq!(errno(full.create_irqchip()), Err(Errno::EEXIST));
    assert_eq!(errno(full.enable_cap(C::SplitIrqchip, [24, 0, 0, 0])), Err(Errno::EEXIST));
    assert_eq!(full.view().routes().len(), 40, "KVM's default pins");

    let split = split();
    assert_eq!(errno(split.create_irqchip()), Err(Errno::EEXIST));
    assert_eq!(errno(split.irqchip(0).map(|_| ())), Err(Errno::ENXIO));
    assert_eq!(errno(split.create_pit2(kvm_pit_config::default())), Err(Errno::ENOENT));
    assert!(split.view().routes().is_empty());

    let late = vm();
    let vcpu = late.create_vcpu(0).unwrap();
    drop(vcpu);
    assert_eq!(errno(late.create_irqchip()), Err(Errno::EINVAL), "a vCPU stays");
    assert_eq!(errno(late.enable_cap(C::SplitIrqchip, [24, 0, 0, 0])), Err(Errno::EEXIST));
    assert_eq!(errno(vm().enable_cap(C::SplitIrqchip, [4097, 0, 0, 0])), Err(Errno::EINVAL));
    assert_eq!(errno(vm().enable_cap(C::SplitIrqchip, [u64::MAX, 0, 0, 0])), Err(Errno::EINVAL));
}

#[test]
fn the_timer_once_and_with_a_full_irqchip() {
    let vm = vm_with_irqchip(&FakeKvm::default());
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    assert_eq!(errno(vm.create_pit2(kvm_pit_config::default())), Err(Errno::EEXIST));
    let mut pit = vm.pit2().unwrap();
    pit.channels[1].count = 77;
    vm.set_pit2(&pit).unwrap();
    assert_eq!(vm.pit2().unwrap(), pit);
}

#[test]
fn addresses_and_limits() {
    let vm = vm();
    vm.set_identity_map_addr(0xfeff_c000).unwrap();
    for (address, answer) in
        [(0xffff_d000, Ok(())), (0xffff_d001, Err(Errno::EINVAL)), (1 << 32, Err(Errno::EINVAL))]
    {
        assert_eq!(errno(vm.set_tss_addr(address)), answer, "{address:#x}");
    }
    assert_eq!(errno(vm.set_nr_mmu_pages(63)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.set_nr_mmu_pages(64)), Ok(()));
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(errno(vm.set_identity_map_addr(0xfeff_c000)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.set_tss_addr(0xfeff_d000)), Ok(()));
}

#[test]
fn vcpus_by_id_and_number() {
    let vm = vm();
    let first = vm.create_vcpu(0).unwrap();
    let error = vm.create_vcpu(0).unwrap_err();
    assert_eq!(error.errno, Errno::EEXIST);
    assert!(error.to_string().starts_with("KVM_CREATE_VCPU on vCPU 0 failed: EEXIST"), "{error}");
    drop(first);
    assert_eq!(errno(vm.create_vcpu(0).map(|_| ())), Err(Errno::EEXIST), "it stays in its VM");
    assert_eq!(errno(vm.create_vcpu(4096).map(|_| ())), Err(Errno::EINVAL));
    assert_eq!(vm.create_vcpu(4095).unwrap().id(), 4095);

    let limited = self::vm();
    assert_eq!(errno(limited.enable_cap(C::MaxVcpuId, [4097, 0, 0, 0])), Err(Errno::EINVAL));
    limited.enable_cap(C::MaxVcpuId, [5, 0, 0, 0]).unwrap();
    limited.enable_cap(C::MaxVcpuId, [5, 0, 0, 0]).unwrap();
    assert_eq!(errno(limited.enable_cap(C::MaxVcpuId, [6, 0, 0, 0])), Err(Errno::EINVAL));
    assert_eq!(errno(limited.create_vcpu(5).map(|_| ())), Err(Errno::EINVAL));
    assert!(limited.create_vcpu(4).is_ok());
}

#[test]
fn what_can_be_enabled() {
    // Measured on Linux 6.18.
    for (cap, argument, full, in_split) in [
        (C::ManualDirtyLogProtect2, 0, true, true),
        (C::ManualDirtyLogProtect2, 1, true, true),
        (C::ManualDirtyLogProtect2, 2, false, false),
        (C::ManualDirtyLogProtect2, 3, true, true),
        (C::ManualDirtyLogProtect2, 4, false, false),
        (C::X2apicApi, 0, true, true),
        (C::X2apicApi, 3, true, true),
        (C::X2apicApi, 4, false, true),
        (C::X2apicApi, 8, true, true),
        (C::X2apicApi, 12, false, false),
        (C::X2apicApi, 16, false, false),
        (C::ExceptionPayload, 1, true, true),
        (C::Irqchip, 0, false, false),
        (C::IrqRouting, 0, false, false),
        (C::CoalescedMmio, 0, false, false),
        (C::MaxVcpus, 0, false, false),
        (C::MemoryFaultInfo, 0, false, false),
        (C::CheckExtensionVm, 0, false, false),
    ] {
        for (vm, allowed) in [(vm(), full), (split(), in_split)] {
            let answer = errno(vm.enable_cap(cap, [argument, 0, 0, 0]));
            let expected = if allowed { Ok(()) } else { Err(Errno::EINVAL) };
            assert_eq!(answer, expected, "{cap} {argument}");
        }
    }
}

#[test]
fn a_vm_with_a_split_irqchip_has_one_flag_more() {
    let kvm = FakeKvm::default();
    assert_eq!(kvm.check_extension(C::X2apicApi), Ok(15));
    assert_eq!(Vm::check_extension(&vm(), C::X2apicApi), Ok(11));
    assert_eq!(Vm::check_extension(&split(), C::X2apicApi), Ok(15));
}

#[test]
fn a_dirty_ring_before_the_vcpus() {
    let ring = |vm: &FakeVm, bytes| errno(vm.enable_cap(C::DirtyLogRing, [bytes, 0, 0, 0]));
    assert_eq!(ring(&vm(), 64), Err(Errno::EINVAL));
    assert_eq!(ring(&vm(), 1 << 21), Err(Errno::E2BIG));
    assert_eq!(ring(&vm(), 1 << 16), Ok(()));
    let late = vm();
    let _vcpu = late.create_vcpu(0).unwrap();
    assert_eq!(ring(&late, 1 << 16), Err(Errno::EINVAL));
}

/// Measured: 1000 zones, or 999 and 997 beside the chips of a full irqchip; and then no ioeventfd.
#[test]
fn chips_zones_and_ioeventfds_share_the_buses() {
    let kvm = FakeKvm::default();
    let event = kvm.eventfd().unwrap();
    let zone = |n: u16, port: bool| CoalescedZone {
        address: match port {
            true => IoAddress::Pio(0x1000 + n * 8),
            false => IoAddress::Mmio(0x1000 + u64::from(n) * 8),
        },
        size: 4,
    };
    for (irqchip, port, room) in
        [(false, false, 1000), (false, true, 1000), (true, false, 999), (true, true, 997)]
    {
        let vm = kvm.create_vm(0).unwrap();
        if irqchip {
            vm.create_irqchip().unwrap();
        }
        for n in 0..room {
            assert_eq!(errno(vm.register_coalesced_zone(zone(n, port))), Ok(()));
        }
        assert_eq!(errno(vm.register_coalesced_zone(zone(room, port))), Err(Errno::ENOSPC));
        let IoAddress::Mmio(_) = zone(0, port).address else { continue };
        let address = IoAddress::Mmio(0x90_0000);
        let doorbell = IoEvent { address, length: 4, datamatch: None, event: event.clone() };
        assert_eq!(errno(vm.ioeventfd_assign(&doorbell)), Err(Errno::ENOSPC));
    }
    let vm = kvm.create_vm(0).unwrap();
    for n in 0..1100 {
        let address = IoAddress::Mmio(0x1000 + n * 8);
        let doorbell = IoEvent { address, length: 4, datamatch: None, event: event.clone() };
        assert_eq!(errno(vm.ioeventfd_assign(&doorbell)), Ok(()), "they have no limit themselves");
    }
    assert_eq!(errno(vm.register_coalesced_zone(zone(0, true))), Ok(()));
}

#[test]
fn only_the_normal_type_of_vm() {
    assert_eq!(errno(FakeKvm::default().create_vm(1).map(|_| ())), Err(Errno::EINVAL));
}
