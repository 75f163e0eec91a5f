//! Routes, irqfds, lines, messages and ioeventfds on real KVM.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use common::{CODE, UNMAPPED, begin, next_exit, vm_with};
use hv_core::{
    Capability, Errno, EventFd, Gsi, Hypervisor, IoAddress, IoEvent, IoEventBackend, IrqBackend,
    IrqchipId, Irqfd, LineStatus, Msi, MsiStatus, Route, RouteTarget, Vcpu, VcpuExit, Vm,
};
use hv_kvm::{KvmVcpu, KvmVm};
use kvm_bindings::kvm_pit_config;

fn vm() -> KvmVm {
    common::kvm().create_vm(0).unwrap()
}

fn vm_with_irqchip() -> KvmVm {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm
}

fn eventfd() -> EventFd {
    common::kvm().eventfd().unwrap()
}

fn errno<T>(result: Result<T, hv_core::Error>) -> Result<T, Errno> {
    result.map_err(|error| error.errno)
}

/// A message of `vector` to the local APIC 0.
fn message(vector: u8) -> Msi {
    Msi { address: 0xfee0_0000, data: vector.into(), device: None }
}

fn msi_route(gsi: u32, vector: u8) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Msi(message(vector)) }
}

/// A vCPU whose local APIC takes interrupts.
fn vcpu_with_apic(vm: &KvmVm, id: u32) -> KvmVcpu {
    let vcpu = vm.create_vcpu(id).unwrap();
    let mut lapic = vcpu.lapic().unwrap();
    // Spurious interrupt vector register: enabled, vector 0xff.
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (0xffu8 as i8, 0x01);
    vcpu.set_lapic(&lapic).unwrap();
    vcpu
}

/// Whether the local APIC has `vector` in its interrupt request register.
fn requested(vcpu: &KvmVcpu, vector: u8) -> bool {
    let byte = 0x200 + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
    vcpu.lapic().unwrap().regs[byte] as u8 & (1 << (vector % 8)) != 0
}

#[test]
fn without_an_irqchip() {
    let (vm, event) = (vm(), eventfd());
    assert_eq!(errno(vm.set_gsi_routing(&[])), Err(Errno::EINVAL));
    let irqfd = Irqfd { event, gsi: Gsi(0), resample: None };
    assert_eq!(errno(vm.irqfd_assign(&irqfd)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.signal_msi(message(0x40))), Err(Errno::EINVAL));
    assert_eq!(errno(vm.irq_line(Gsi(4), true)), Err(Errno::ENXIO));
    assert_eq!(errno(vm.irq_line_status(Gsi(4), true)), Err(Errno::ENXIO));
    assert_eq!(errno(vm.irqchip(0).map(|_| ())), Err(Errno::ENXIO));
    assert_eq!(errno(vm.create_pit2(kvm_pit_config::default())), Err(Errno::ENOENT));
}

#[test]
fn a_table_of_any_length_is_judged_by_kvm() {
    let vm = vm_with_irqchip();
    let limit = vm.check_extension(Capability::IrqRouting).unwrap().unsigned_abs();
    let table = |n| (0..n).map(|gsi| msi_route(gsi, 0x40)).collect::<Vec<_>>();
    assert_eq!(errno(vm.set_gsi_routing(&table(limit))), Ok(()));
    let error = vm.set_gsi_routing(&table(limit + 1)).unwrap_err();
    assert_eq!(error.errno, Errno::EINVAL);
    let text = format!("KVM_SET_GSI_ROUTING with {} routes failed: EINVAL", limit + 1);
    assert!(error.to_string().starts_with(&text), "{error}");
    assert_eq!(errno(vm.set_gsi_routing(&table(100_000))), Err(Errno::EINVAL));
    assert_eq!(errno(vm.set_gsi_routing(&[])), Ok(()));

    let twice = [msi_route(30, 0x40), msi_route(30, 0x41)];
    assert_eq!(errno(vm.set_gsi_routing(&twice)), Err(Errno::EINVAL), "two messages on one GSI");
    let pin = |chip, pin| Route { gsi: Gsi(4), target: RouteTarget::Pin { chip, pin } };
    let both = [pin(IrqchipId::PIC_MASTER, 4), pin(IrqchipId::IOAPIC, 4)];
    assert_eq!(errno(vm.set_gsi_routing(&both)), Ok(()));
    assert_eq!(errno(vm.set_gsi_routing(&[pin(IrqchipId::IOAPIC, 24)])), Err(Errno::EINVAL));
    let device = Some(0x18);
    let target = RouteTarget::Msi(Msi { device, ..message(0x40) });
    assert_eq!(errno(vm.set_gsi_routing(&[Route { gsi: Gsi(30), target }])), Ok(()));
}

#[test]
fn a_message_is_delivered_or_has_no_target() {
    let vm = vm_with_irqchip();
    assert_eq!(vm.signal_msi(message(0x41)), Ok(MsiStatus::NoTarget), "no vCPU yet");
    let vcpu = vcpu_with_apic(&vm, 0);
    assert!(!requested(&vcpu, 0x41));
    assert_eq!(vm.signal_msi(message(0x41)), Ok(MsiStatus::Delivered));
    assert!(requested(&vcpu, 0x41));
    let elsewhere = Msi { address: 0xfee0_5000, ..message(0x41) };
    // KVM answers 0 rather than -1 where it looks the target up in its map of local APICs.
    assert_ne!(vm.signal_msi(elsewhere), Ok(MsiStatus::Delivered));
}

#[test]
fn an_irqfd_delivers_through_its_route() {
    let vm = vm_with_irqchip();
    let vcpu = vcpu_with_apic(&vm, 0);
    vm.set_gsi_routing(&[msi_route(24, 0x51)]).unwrap();
    let event = eventfd();
    let irqfd = Irqfd { event: event.clone(), gsi: Gsi(24), resample: None };
    vm.irqfd_assign(&irqfd).unwrap();

    assert_eq!(errno(vm.irqfd_assign(&irqfd)), Err(Errno::EBUSY));
    let copy = EventFd::from(event.as_fd().try_clone_to_owned().unwrap());
    let same = Irqfd { event: copy.clone(), gsi: Gsi(25), resample: None };
    assert_eq!(errno(vm.irqfd_assign(&same)), Err(Errno::EBUSY), "a dup is the same eventfd");
    let text = vm.irqfd_assign(&irqfd).unwrap_err().to_string();
    assert!(text.starts_with("KVM_IRQFD for GSI 24 failed: EBUSY"), "{text}");

    copy.signal();
    common::wait_for("the interrupt of the irqfd", || requested(&vcpu, 0x51));

    vm.irqfd_deassign(&event, Gsi(24)).unwrap();
    vm.irqfd_deassign(&event, Gsi(24)).unwrap();
    vm.irqfd_assign(&irqfd).unwrap();
}

#[test]
fn descriptors_that_are_no_eventfds() {
    let vm = vm_with_irqchip();
    let event = EventFd::from(OwnedFd::from(File::open("/dev/null").unwrap()));
    let irqfd = Irqfd { event: event.clone(), gsi: Gsi(24), resample: None };
    assert_eq!(errno(vm.irqfd_assign(&irqfd)), Err(Errno::EINVAL));
    assert_eq!(errno(vm.irqfd_deassign(&event, Gsi(24))), Err(Errno::EINVAL));
    let event = IoEvent { address: IoAddress::Pio(1), length: 1, datamatch: None, event };
    assert_eq!(errno(vm.ioeventfd_assign(&event)), Err(Errno::EINVAL));
}

#[test]
fn a_resample_irqfd_needs_the_full_irqchip() {
    let (event, resample) = (eventfd(), eventfd());
    let irqfd = Irqfd { event, gsi: Gsi(4), resample: Some(resample) };
    assert_eq!(errno(vm_with_irqchip().irqfd_assign(&irqfd)), Ok(()));
    let split = vm();
    split.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
    assert_eq!(errno(split.irqfd_assign(&irqfd)), Err(Errno::EINVAL));
}

#[test]
fn a_line_says_what_became_of_it() {
    let vm = vm_with_irqchip();
    assert_eq!(vm.irq_line_status(Gsi(2000), true), Ok(LineStatus::Ignored), "not routed");
    let vcpu = vcpu_with_apic(&vm, 0);
    // I/O APIC redirection entry 20: vector 0x61, edge, fixed, to APIC 0, not masked.
    let mut ioapic = vm.irqchip(IrqchipId::IOAPIC.0).unwrap();
    set_redirection(&mut ioapic, 20, 0x61);
    vm.set_irqchip(&ioapic).unwrap();
    assert_eq!(vm.irq_line_status(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    assert_eq!(vm.irq_line_status(Gsi(20), true), Ok(LineStatus::Coalesced), "still raised");
    vm.irq_line(Gsi(20), false).unwrap();
    assert_eq!(vm.irq_line_status(Gsi(20), true), Ok(LineStatus::Delivered(1)));
    assert!(requested(&vcpu, 0x61));
}

#[allow(unsafe_code, reason = "the state of an irqchip is a C union")]
fn set_redirection(chip: &mut kvm_bindings::kvm_irqchip, pin: usize, entry: u64) {
    assert_eq!(chip.chip_id, IrqchipId::IOAPIC.0);
    // SAFETY: every bit pattern is a state of the I/O APIC.
    let ioapic = unsafe { &mut chip.chip.ioapic };
    ioapic.redirtbl[pin].bits = entry;
}

#[test]
fn an_ioeventfd_takes_the_write_it_matches() {
    #[rustfmt::skip]
    let (vm, _memory) = vm_with(&[
        0xb0, 0x07,       // mov al, 7
        0xe6, 0x70,       // out 0x70, al
        0xb0, 0x08,       // mov al, 8
        0xe6, 0x70,       // out 0x70, al
        0xa2, 0x00, 0xe0, // mov [UNMAPPED], al
        0xf4,             // hlt
    ], 1);
    let (port, memory) = (eventfd(), eventfd());
    let on_port = IoEvent {
        address: IoAddress::Pio(0x70),
        length: 1,
        datamatch: Some(7),
        event: port.clone(),
    };
    let on_memory = IoEvent {
        address: IoAddress::Mmio(UNMAPPED),
        length: 0,
        datamatch: None,
        event: memory.clone(),
    };
    vm.ioeventfd_assign(&on_port).unwrap();
    vm.ioeventfd_assign(&on_memory).unwrap();
    assert_eq!(errno(vm.ioeventfd_assign(&on_port)), Err(Errno::EEXIST));
    let assign = |event| errno(vm.ioeventfd_assign(&event));
    assert_eq!(assign(IoEvent { length: 3, ..on_port.clone() }), Err(Errno::EINVAL));
    assert_eq!(
        assign(IoEvent { length: 0, ..on_port.clone() }),
        Err(Errno::EINVAL),
        "with a value"
    );

    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(_)), "8 does not match");
    assert_eq!(vcpu.io_data(), [8]);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt, "no MMIO exit");
    assert_eq!((port.take(), memory.take()), (Some(1), Some(1)));

    let deassign = |event| errno(vm.ioeventfd_deassign(&event));
    assert_eq!(deassign(IoEvent { datamatch: Some(8), ..on_port.clone() }), Err(Errno::ENOENT));
    assert_eq!(deassign(IoEvent { length: 2, ..on_port.clone() }), Err(Errno::ENOENT));
    assert_eq!(deassign(IoEvent { event: memory, ..on_port.clone() }), Err(Errno::ENOENT));
    assert_eq!(deassign(on_port.clone()), Ok(()));
    assert_eq!(deassign(on_port), Err(Errno::ENOENT));
    begin(&vcpu, CODE);
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(_)));
    assert_eq!(vcpu.io_data(), [7], "the port exits again");
}

#[test]
fn the_order_of_creation() {
    let vm = vm_with_irqchip();
    assert_eq!(errno(vm.create_irqchip()), Err(Errno::EEXIST));
    assert_eq!(errno(vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0])), Err(Errno::EEXIST));
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    assert_eq!(errno(vm.create_pit2(kvm_pit_config::default())), Err(Errno::EEXIST));
    let pit = vm.pit2().unwrap();
    vm.set_pit2(&pit).unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(errno(vm.set_identity_map_addr(0xfeff_c000)), Err(Errno::EINVAL));

    let late = self::vm();
    let vcpu = late.create_vcpu(0).unwrap();
    assert_eq!(errno(late.create_irqchip()), Err(Errno::EINVAL));
    assert_eq!(errno(late.set_tss_addr(0xffff_f000)), Err(Errno::EINVAL));
    assert_eq!(errno(late.set_nr_mmu_pages(1)), Err(Errno::EINVAL));
    late.set_nr_mmu_pages(4096).unwrap();
    drop(vcpu);
    let clock = late.clock().unwrap();
    late.set_clock(&kvm_bindings::kvm_clock_data { flags: 0, ..clock }).unwrap();
}

#[test]
fn interrupts_are_not_injected_beside_the_irqchip() {
    let vm = vm_with_irqchip();
    let vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.interrupt(0x20)), Err(Errno::ENXIO));
}

/// KVM answers `EAGAIN` to the run of a vCPU that is woken to be started; the run goes on.
#[test]
fn a_vcpu_that_waits_to_be_started_runs_on_when_it_is() {
    let (vm, _memory) = vm_with(&[0xe6, 0x42, 0xf4], 1); // out 0x42, al
    vm.create_irqchip().unwrap();
    let _boot = vm.create_vcpu(0).unwrap();
    let mut second = vcpu_with_apic(&vm, 1);
    let waiting = kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
    assert_eq!(second.mp_state().unwrap().mp_state, waiting);
    // Delivery modes INIT and start-up, to local APIC 1; the vector is the page of the code.
    let message = |data| Msi { address: 0xfee0_1000, data, device: None };
    assert_eq!(vm.signal_msi(message(0x500)), Ok(MsiStatus::Delivered));
    assert_eq!(vm.signal_msi(message(0x601)), Ok(MsiStatus::Delivered));
    let exit = next_exit(&mut second);
    assert!(matches!(exit, VcpuExit::Io(io) if io.port == 0x42), "{exit:?}");
    assert_eq!(second.sregs().unwrap().cs.base, CODE);
}
