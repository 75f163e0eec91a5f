//! Kicks, and waiting without being kicked.

use std::thread;

use super::{message, msi_route, vm_with_irqchip};
use crate::fake::run::Next;
use crate::fake::{FakeHost, FakeKvm, FakeVm, GuestStep, Interrupt, Seen};
use crate::{
    Call, ExitReply, Gsi, Hypervisor, IoAddress, IrqBackend, Irqfd, Msi, MsiStatus, Vcpu, VcpuExit,
    VcpuKick, Vm,
};

fn waiting() -> FakeKvm {
    FakeKvm::new(
        FakeHost::default().guest(0, [GuestStep::WaitForInterrupt, GuestStep::TakeInterrupts]),
    )
}

#[test]
fn a_kick_ends_the_next_run_once() {
    let kvm = FakeKvm::default();
    let mut vcpu = kvm.create_vm(0).unwrap().create_vcpu(0).unwrap();
    let kick = vcpu.kicker();
    kick.kick().unwrap();
    kick.clone().kick().unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupted));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    assert_eq!(kvm.calls().of(Call::Kick), 2);
    drop(vcpu);
    assert_eq!(kick.kick(), Ok(()), "of a vCPU that is gone");
    assert_eq!(kvm.live().vms, 0, "a kicker keeps no VM");
}

#[test]
fn an_answer_is_taken_even_if_a_kick_ends_the_run_at_once() {
    let kvm = FakeKvm::new(
        FakeHost::default().guest(0, [GuestStep::read(IoAddress::Mmio(0xd000_0000), 2)]),
    );
    let vm = kvm.create_vm(0).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio(_))));
    vcpu.reply(ExitReply::Mmio([7; 8]));
    vcpu.kicker().kick().unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupted));
    let address = IoAddress::Mmio(0xd000_0000);
    assert_eq!(vm.view().take_seen(0), [Seen::Read { address, data: vec![7, 7] }]);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt), "not read again");
}

#[test]
fn a_kick_ends_waiting_and_the_vcpu_waits_on() {
    let kvm = waiting();
    let vm = vm_with_irqchip(&kvm);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vm.view().enable_apic(0);
    let kick = vcpu.kicker();
    thread::scope(|scope| {
        let vcpu = scope.spawn(move || {
            let first = vcpu.run();
            let halted = vcpu.mp_state().unwrap().mp_state;
            (first, halted, vcpu.run())
        });
        kick.kick().unwrap();
        // Whether it still waits or not: there is an interrupt from now on.
        vm.signal_msi(message(0x41)).unwrap();
        let (first, halted, second) = vcpu.join().unwrap();
        assert_eq!(first, Ok(VcpuExit::Interrupted));
        assert!(halted == 0 || halted == kvm_bindings::KVM_MP_STATE_HALTED);
        assert_eq!(second, Ok(VcpuExit::Hlt));
    });
    assert_eq!(vm.view().take_seen(0), [Seen::Interrupts(vec![Interrupt::Fixed(0x41)])]);
}

#[test]
fn whatever_brings_an_interrupt_ends_waiting() {
    type Bring = fn(&FakeVm, &Irqfd);
    let ways: &[(Bring, Interrupt)] = &[
        // Nobody asks the VM anything: the vCPU itself has to see the eventfd.
        (|_, irqfd| irqfd.event.signal(), Interrupt::Fixed(0x51)),
        (|vm, _| vm.irq_line(Gsi(30), true).unwrap(), Interrupt::Fixed(0x51)),
        (|vm, _| assert!(vm.signal_msi(message(0x61)).is_ok()), Interrupt::Fixed(0x61)),
        (
            |vm, _| {
                let nmi = Msi { data: 0x400, ..message(0) };
                assert_eq!(vm.signal_msi(nmi), Ok(MsiStatus::Delivered));
            },
            Interrupt::Nmi,
        ),
    ];
    for &(bring, interrupt) in ways {
        let kvm = waiting();
        let vm = vm_with_irqchip(&kvm);
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vm.view().enable_apic(0);
        vm.set_gsi_routing(&[msi_route(30, 0x51)]).unwrap();
        let irqfd = Irqfd { event: kvm.eventfd().unwrap(), gsi: Gsi(30), resample: None };
        vm.irqfd_assign(&irqfd).unwrap();
        thread::scope(|scope| {
            let vcpu = scope.spawn(move || vcpu.run());
            bring(&vm, &irqfd);
            assert_eq!(vcpu.join().unwrap(), Ok(VcpuExit::Hlt));
        });
        assert_eq!(vm.view().take_seen(0), [Seen::Interrupts(vec![interrupt])]);
    }
}

/// A vCPU that was told to look again looks once, finds nothing to do, and waits: it must not have
/// told itself to look again.
#[test]
fn waiting_is_not_looking_all_the_time() {
    let kvm = FakeKvm::default();
    let vm = vm_with_irqchip(&kvm);
    let _vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    // To a vCPU that waits for INIT, an NMI is nothing to run for.
    let nmi = Msi { address: 0xfee0_1000, data: 0x400, device: None };
    assert_eq!(vm.signal_msi(nmi), Ok(MsiStatus::Delivered));
    let view = vm.view();
    let step = || {
        let next = view.0.with(|state| state.step(1, false));
        let told = view.0.with(|state| state.vcpus[&1].kick.event().take());
        (matches!(next, Next::Wait), told)
    };
    assert_eq!(step(), (true, None));
    assert_eq!(vm.signal_msi(nmi), Ok(MsiStatus::Delivered));
    assert_eq!(step(), (true, None));
    for data in [0x500, 0x608] {
        vm.signal_msi(Msi { data, ..nmi }).unwrap();
    }
    assert!(view.0.with(|state| state.vcpus[&1].kick.event().take()).is_some());
    assert!(!step().0, "it has been started");
}

/// Each of two vCPUs waits for what the other does.
#[test]
fn vcpus_wake_each_other() {
    let rounds = 200u32;
    let icr = |page: u64| {
        [
            GuestStep::write(IoAddress::Mmio(0xfee0_0310), (page as u32).to_le_bytes()),
            GuestStep::write(IoAddress::Mmio(0xfee0_0300), 0x41u32.to_le_bytes()),
        ]
    };
    let wait = [GuestStep::WaitForInterrupt, GuestStep::TakeInterrupts];
    let ping = (0..rounds).flat_map(|_| icr(1 << 24).into_iter().chain(wait.clone()));
    let pong = (0..rounds).flat_map(|_| wait.clone().into_iter().chain(icr(0)));
    let kvm = FakeKvm::new(FakeHost::default().guest(0, ping).guest(1, pong));
    let vm = vm_with_irqchip(&kvm);
    let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    for vcpu in &vcpus {
        vm.view().enable_apic(vcpu.id());
        vcpu.set_mp_state(kvm_bindings::kvm_mp_state::default()).unwrap();
    }
    thread::scope(|scope| {
        let runs = vcpus.map(|mut vcpu| scope.spawn(move || vcpu.run()));
        for run in runs {
            assert_eq!(run.join().unwrap(), Ok(VcpuExit::Hlt));
        }
    });
    for id in [0, 1] {
        let seen = vm.view().take_seen(id);
        assert_eq!(seen.len() as u32, rounds);
        assert!(seen.iter().all(|s| *s == Seen::Interrupts(vec![Interrupt::Fixed(0x41)])));
    }
}
