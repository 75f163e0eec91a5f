//! What scripted guests do, and what becomes of it.

use super::{errno, message, msi_route, slot, vm_with_irqchip};
use crate::fake::{FakeHost, FakeKvm, FakeVm, Finding, GuestStep, Interrupt, Loss, Seen, Wrote};
use crate::{
    Capability, CoalescedWrite, CoalescedZone, ExitReply, Gsi, Hypervisor, IoAddress, IoDirection,
    IoEvent, IoEventBackend, IoExit, IrqBackend, Irqfd, MemoryBackend, MmioExit, Msi, Route,
    RouteTarget, SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};

const RAM: u64 = 0x10_0000;
const ROM: u64 = 0x20_0000;
const NOWHERE: u64 = 0xd000_0000;

/// A VM with a page of RAM that logs and a page of ROM, and its vCPU.
fn vm(steps: impl IntoIterator<Item = GuestStep>) -> (FakeKvm, FakeVm, impl Vcpu) {
    let kvm = FakeKvm::new(FakeHost::default().guest(0, steps));
    let vm = vm_with_irqchip(&kvm);
    let ram = SlotFlags { log_dirty: true, readonly: false };
    let rom = SlotFlags { log_dirty: false, readonly: true };
    vm.set_memory_slot(&slot(0, RAM, ram)).unwrap();
    vm.set_memory_slot(&slot(1, ROM, rom)).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    (kvm, vm, vcpu)
}

fn write(address: u64, data: impl Into<Vec<u8>>) -> GuestStep {
    GuestStep::write(IoAddress::Mmio(address), data)
}

fn read(address: u64, len: u16) -> GuestStep {
    GuestStep::read(IoAddress::Mmio(address), len)
}

fn stored(address: u64, len: u8, data: &[u8]) -> VcpuExit {
    let mut written = [0; 8];
    written[..data.len()].copy_from_slice(data);
    VcpuExit::Mmio(MmioExit { address, len, written: Some(written) })
}

fn saw(address: u64, data: impl Into<Vec<u8>>) -> Seen {
    Seen::Read { address: IoAddress::Mmio(address), data: data.into() }
}

#[test]
fn memory_is_served_and_marked_dirty() {
    let (_, vm, mut vcpu) = vm([write(RAM + 8, *b"hello"), read(RAM + 7, 7), read(ROM, 2)]);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    assert_eq!(vm.view().take_seen(0), [saw(RAM + 7, *b"\0hello\0"), saw(ROM, [0, 0])]);
    let mut bitmap = [0];
    vm.dirty_log(SlotId(0), &mut bitmap).unwrap();
    assert_eq!(bitmap, [1]);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt), "the script is at its end");
}

#[test]
fn what_nobody_serves_exits_in_pieces() {
    let (_, vm, mut vcpu) = vm([
        write(ROM, [1, 2]),
        write(NOWHERE + 0xffa, *b"abcdefghijklmnopqrst"),
        // The first four bytes are in RAM.
        write(RAM + 0xffc, *b"12345678"),
    ]);
    assert_eq!(vcpu.run(), Ok(stored(ROM, 2, &[1, 2])));
    assert_eq!(vcpu.run(), Ok(stored(NOWHERE + 0xffa, 6, b"abcdef")), "up to the page's end");
    assert_eq!(vcpu.run(), Ok(stored(NOWHERE + 0x1000, 8, b"ghijklmn")));
    assert_eq!(vcpu.run(), Ok(stored(NOWHERE + 0x1008, 6, b"opqrst")));
    assert_eq!(vcpu.run(), Ok(stored(RAM + 0x1000, 4, b"5678")));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    let mut bytes = [0; 4];
    assert!(vm.view().guest_read(IoAddress::Mmio(RAM + 0xffc), &mut bytes));
    assert_eq!(bytes, *b"1234");
}

#[test]
fn an_access_at_the_last_address_ends() {
    let (_, _, mut vcpu) = vm([write(u64::MAX - 1, [1, 2, 3]), read(u64::MAX, 9)]);
    assert_eq!(vcpu.run(), Ok(stored(u64::MAX - 1, 2, &[1, 2])));
    let last = MmioExit { address: u64::MAX, len: 1, written: None };
    assert_eq!(vcpu.run(), Ok(VcpuExit::Mmio(last)));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
}

#[test]
fn reads_take_the_answer_of_the_vmm() {
    let (_, vm, mut vcpu) = vm([
        read(NOWHERE, 4),
        GuestStep::read(IoAddress::Pio(0x70), 2),
        read(NOWHERE, 1),
        GuestStep::exit(VcpuExit::Rdmsr { index: 0x123, reason: 2 }),
        GuestStep::exit(VcpuExit::Wrmsr { index: 0x123, reason: 2, data: 1 }),
    ]);
    let exit = MmioExit { address: NOWHERE, len: 4, written: None };
    assert_eq!(vcpu.run(), Ok(VcpuExit::Mmio(exit)));
    vcpu.reply(ExitReply::Rdmsr(None)); // not asked for
    vcpu.reply(ExitReply::Mmio(*b"abcdefgh"));
    let port = IoExit { direction: IoDirection::In, port: 0x70, size: 2, count: 1 };
    assert_eq!(vcpu.run(), Ok(VcpuExit::Io(port)));
    vcpu.io_data().copy_from_slice(b"xy");
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio(_))), "left without an answer");
    assert_eq!(vcpu.io_data(), b"", "not of this exit");
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Rdmsr { .. })));
    vcpu.reply(ExitReply::Rdmsr(Some(7)));
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Wrmsr { .. })));
    vcpu.reply(ExitReply::Wrmsr(false));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    let port = Seen::Read { address: IoAddress::Pio(0x70), data: b"xy".to_vec() };
    let msrs = [ExitReply::Rdmsr(Some(7)), ExitReply::Wrmsr(false)].map(Seen::Reply);
    let [msr_read, msr_write] = msrs;
    let expected = [saw(NOWHERE, *b"abcd"), port, saw(NOWHERE, [0]), msr_read, msr_write];
    assert_eq!(vm.view().take_seen(0), expected);
    assert_eq!(vm.view().take_seen(0), []);
}

#[test]
fn strings_to_a_port_are_one_exit() {
    let io =
        |direction, size, count| Ok(VcpuExit::Io(IoExit { direction, port: 0x3f8, size, count }));
    let port = IoAddress::Pio(0x3f8);
    let (_, _, mut vcpu) = vm([
        GuestStep::write(port, *b"hello"),
        GuestStep::write(port, *b"four"),
        GuestStep::read(port, 3),
        GuestStep::write(port, vec![7; 5000]),
        GuestStep::write(port, []),
        GuestStep::Exit(
            VcpuExit::Io(IoExit { direction: IoDirection::In, port: 1, size: 4, count: u32::MAX }),
            vec![1, 2],
        ),
    ]);
    assert_eq!(vcpu.run(), io(IoDirection::Out, 1, 5));
    assert_eq!(vcpu.io_data(), b"hello");
    assert_eq!(vcpu.run(), io(IoDirection::Out, 4, 1));
    assert_eq!(vcpu.run(), io(IoDirection::In, 1, 3));
    assert_eq!(vcpu.io_data().len(), 3);
    assert_eq!(vcpu.run(), io(IoDirection::Out, 1, 4096));
    assert_eq!(vcpu.run(), io(IoDirection::Out, 1, 904));
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Io(_))));
    assert_eq!((vcpu.io_data().len(), &vcpu.io_data()[..3]), (4096, &[1, 2, 0][..]));
}

#[test]
fn doorbells_and_zones_take_their_writes() {
    let (kvm, vm, mut vcpu) = vm([
        GuestStep::write(IoAddress::Pio(0x70), [7]),
        GuestStep::write(IoAddress::Pio(0x70), [8]),
        write(NOWHERE, [1, 2, 3, 4]),
        write(NOWHERE + 0x1000, [5]),
    ]);
    let (bell, page) = (kvm.eventfd().unwrap(), IoAddress::Mmio(NOWHERE));
    vm.register_coalesced_zone(CoalescedZone { address: page, size: 0x1000 }).unwrap();
    let (address, event) = (IoAddress::Pio(0x70), bell.clone());
    let doorbell = IoEvent { address, length: 1, datamatch: Some(7), event };
    vm.ioeventfd_assign(&doorbell).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Io(_))), "8 is not the doorbell's");
    assert_eq!((vcpu.io_data(), bell.take()), (&mut [8][..], Some(1)));
    assert_eq!(vcpu.run(), Ok(stored(NOWHERE + 0x1000, 1, &[5])));
    let collected = CoalescedWrite::new(page, &[1, 2, 3, 4]);
    assert!(vcpu.has_coalesced_write());
    assert_eq!(vm.view().collected(), Vec::from_iter(collected));
    assert_eq!(vcpu.take_coalesced_write(), Ok(collected));
    assert_eq!(vcpu.take_coalesced_write(), Ok(None));
    assert!(!vcpu.has_coalesced_write());
    // The same by hand.
    for (address, data, what) in [
        (IoAddress::Pio(0x70), &[7][..], Wrote::Signalled),
        (page, &[1], Wrote::Collected),
        (IoAddress::Mmio(RAM), &[1], Wrote::Memory),
        (IoAddress::Mmio(ROM), &[1], Wrote::Exit),
        (IoAddress::Mmio(RAM + 0xfff), &[1, 2], Wrote::Exit),
        (IoAddress::Mmio(0xfee0_0080), &[0; 4], Wrote::Chip),
        (IoAddress::Mmio(0xfec0_0000), &[0; 4], Wrote::Chip),
        (IoAddress::Pio(0x21), &[0xff], Wrote::Chip),
        (IoAddress::Pio(0x3f8), &[1], Wrote::Exit),
        (IoAddress::Mmio(RAM), &[], Wrote::Memory),
    ] {
        assert_eq!(vm.view().guest_write(address, data), what, "{address:x?}");
    }
    assert!(!vm.view().guest_read(IoAddress::Pio(0x3f8), &mut [0]));
    assert!(!vm.view().guest_read(IoAddress::Mmio(u64::MAX), &mut [0; 3]));
    let mut masks = [0];
    assert!(vm.view().guest_read(IoAddress::Pio(0x21), &mut masks));
    assert_eq!(masks, [0xff]);
}

#[test]
fn irqfds_are_delivered_lost_and_kept() {
    let (kvm, vm, _vcpu) = vm([]);
    let (guest, event) = (vm.view(), kvm.eventfd().unwrap());
    guest.enable_apic(0);
    let irqfd = Irqfd { event: event.clone(), gsi: Gsi(30), resample: None };
    // Kept while it is not assigned.
    event.signal();
    vm.set_gsi_routing(&[msi_route(30, 0x51)]).unwrap();
    vm.irqfd_assign(&irqfd).unwrap();
    assert_eq!(guest.take_interrupts(0), [Interrupt::Fixed(0x51)]);
    // Through the table as it was when it was signalled.
    event.signal();
    vm.set_gsi_routing(&[msi_route(30, 0x52)]).unwrap();
    event.signal();
    assert_eq!(guest.interrupts(0), [0x51, 0x51, 0x52].map(Interrupt::Fixed));
    // A refused table leaves the old one in force.
    let twice = [msi_route(30, 0x53), msi_route(30, 0x54)];
    assert!(vm.set_gsi_routing(&twice).is_err());
    event.signal();
    assert_eq!(guest.take_interrupts(0), [0x52, 0x51].map(Interrupt::Fixed));
    assert_eq!(kvm.findings(), []);
    // Lost while its GSI has no route.
    vm.set_gsi_routing(&[]).unwrap();
    event.signal();
    let lost = Finding::LostEvent { gsi: Gsi(30), why: Loss::Unrouted };
    assert_eq!(kvm.take_findings().last(), Some(&lost));
    vm.irqfd_deassign(&event, Gsi(31)).unwrap();
    assert_eq!(kvm.take_findings(), [Finding::VainDeassign { gsi: Gsi(31) }]);
}

#[test]
fn messages_need_a_target_that_takes_them() {
    let kvm = FakeKvm::default();
    let vm = vm_with_irqchip(&kvm);
    assert_eq!(vm.signal_msi(message(0x41)), Ok(crate::MsiStatus::NoTarget));
    let _vcpu = vm.create_vcpu(0).unwrap();
    vm.view().enable_apic(0);
    assert_eq!(vm.signal_msi(message(0x41)), Ok(crate::MsiStatus::Delivered));
    assert_eq!(vm.view().take_interrupts(0), [Interrupt::Fixed(0x41)]);
}

#[test]
fn a_vcpu_waits_for_init_and_start_up() {
    let host = FakeHost::default().guest(1, [GuestStep::write(IoAddress::Pio(0x42), [1])]);
    let kvm = FakeKvm::new(host);
    let vm = vm_with_irqchip(&kvm);
    let _boot = vm.create_vcpu(0).unwrap();
    let mut second = vm.create_vcpu(1).unwrap();
    assert_eq!(second.mp_state().unwrap().mp_state, kvm_bindings::KVM_MP_STATE_UNINITIALIZED);
    let to_second = |data| Msi { address: 0xfee0_1000, data, device: None };
    vm.signal_msi(to_second(0x500)).unwrap();
    assert_eq!(second.mp_state().unwrap().mp_state, kvm_bindings::KVM_MP_STATE_INIT_RECEIVED);
    vm.signal_msi(to_second(0x609)).unwrap();
    assert!(matches!(second.run(), Ok(VcpuExit::Io(io)) if io.port == 0x42));
    let cs = second.sregs().unwrap().cs;
    assert_eq!((cs.base, cs.selector, second.regs().unwrap().rip), (0x9000, 0x900, 0));
    // Another start-up message is ignored, another INIT is not.
    vm.signal_msi(to_second(0x60a)).unwrap();
    assert_eq!(second.mp_state().unwrap().mp_state, kvm_bindings::KVM_MP_STATE_RUNNABLE);
    assert_eq!(second.sregs().unwrap().cs.base, 0x9000);
}

#[test]
fn the_end_of_an_interrupt_of_the_vmms_ioapic_exits() {
    let host = FakeHost::default().guest(
        0,
        [
            GuestStep::TakeInterrupts,
            GuestStep::EndOfInterrupt(0x61),
            GuestStep::TakeInterrupts,
            GuestStep::write(IoAddress::Mmio(0xfee0_00b0), [0; 4]),
        ],
    );
    let kvm = FakeKvm::new(host);
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vm.view().enable_apic(0);
    // Trigger mode level.
    let level = Msi { address: 0xfee0_0000, data: 0xc061, device: None };
    vm.set_gsi_routing(&[Route { gsi: Gsi(4), target: RouteTarget::Msi(level) }]).unwrap();
    for _ in 0..2 {
        vm.signal_msi(level).unwrap();
        assert_eq!(vcpu.run(), Ok(VcpuExit::IoapicEoi { vector: 0x61 }));
        assert_eq!(
            vm.view().take_seen(0),
            [Seen::Interrupts(vec![Interrupt::Fixed(0x61)])],
            "taken before it ended"
        );
    }
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
}

#[test]
fn without_an_irqchip_the_vmm_injects() {
    let kvm = FakeKvm::new(
        FakeHost::default().guest(0, [GuestStep::WaitForInterrupt, GuestStep::TakeInterrupts]),
    );
    let vm = kvm.create_vm(0).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.request_interrupt_window(true);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt), "interrupts are disabled: no window");
    assert!(!vcpu.interrupt_state().ready_for_injection);
    let mut regs = vcpu.regs().unwrap();
    regs.rflags |= 1 << 9;
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::IrqWindowOpen));
    let state = vcpu.interrupt_state();
    assert!(state.ready_for_injection && state.if_flag);
    vcpu.interrupt(0x20).unwrap();
    vcpu.nmi().unwrap();
    vcpu.request_interrupt_window(false);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    let taken = vec![Interrupt::ExtInt(0x20), Interrupt::Nmi];
    assert_eq!(vm.view().take_seen(0), [Seen::Interrupts(taken)]);

    let vcpu = vm_with_irqchip(&kvm).create_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.interrupt(0x20)), Err(crate::Errno::ENXIO));
    let split = kvm.create_vm(0).unwrap();
    split.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
    let vcpu = split.create_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.interrupt(0x20)), Ok(()));
    assert_eq!(errno(vcpu.interrupt(0x21)), Err(crate::Errno::EEXIST));
}
