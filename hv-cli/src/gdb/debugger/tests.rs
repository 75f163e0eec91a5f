//! What parked vCPUs are told, and what KVM is, on mocks.

use super::*;
use hv_core::mock::{MockVcpu, MockVcpuKick};
use hv_core::{Errno, Ioctl};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP, kvm_debugregs, kvm_regs, kvm_sregs,
};
use std::thread::{self, JoinHandle};
use vm_memory::{Bytes, GuestAddress};

const SOFTWARE: Setup = Setup { wait: false, software_kvm: true };
const HARDWARE: Setup = Setup { wait: false, software_kvm: false };

fn debugger(vcpus: usize, setup: Setup) -> Debugger<MockVcpu> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let kicks = (0..vcpus).map(|_| {
        let mut kick = MockVcpuKick::new();
        kick.expect_kick().returning(|| Ok(()));
        kick
    });
    let stopper = Stopper::new(Event::new().unwrap());
    let debugger = Debugger::new(kicks, memory, stopper.clone(), setup).unwrap();
    stopper.add_vcpu(debugger.waker());
    debugger
}

fn vcpu(id: u32) -> MockVcpu {
    let mut vcpu = MockVcpu::new();
    vcpu.expect_id().return_const(id);
    vcpu
}

/// A vCPU at 0x100 in protected mode.
fn at_code(id: u32) -> MockVcpu {
    let mut vcpu = vcpu(id);
    vcpu.expect_regs().returning(|| Ok(kvm_regs { rip: 0x100, ..Default::default() }));
    vcpu.expect_sregs().returning(|| Ok(kvm_sregs { cr0: 1, ..Default::default() }));
    vcpu
}

/// Its thread parks it.
fn park(
    debugger: &Debugger<MockVcpu>,
    vcpu: MockVcpu,
    why: Option<Why>,
) -> JoinHandle<(MockVcpu, Action)> {
    let debugger = debugger.clone();
    debugger.stop();
    thread::spawn(move || debugger.park(vcpu, why))
}

fn until_stopped(debugger: &Debugger<MockVcpu>) {
    while !debugger.is_stopped() {
        thread::yield_now();
    }
}

fn all(action: Action) -> impl Fn(usize) -> Option<Action> {
    move |_| Some(action)
}

#[test]
fn kvm_is_told_what_changes_and_nothing_else() {
    let debugger = debugger(1, HARDWARE);
    let mut it = vcpu(0);
    let mut calls = mockall::Sequence::new();
    for control in [
        KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | kvm_bindings::KVM_GUESTDBG_BLOCKIRQ,
        0,
        KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
        0,
    ] {
        it.expect_set_guest_debug()
            .withf(move |debug| debug.control == control)
            .once()
            .in_sequence(&mut calls)
            .returning(|_| Ok(()));
    }
    let turn = |it: MockVcpu, breakpoint: bool, action| {
        let thread = park(&debugger, it, None);
        until_stopped(&debugger);
        debugger.with(0, |_, memory, it| breakpoint && it.insert(memory, 0x10, 0x10)).unwrap();
        debugger.resume(all(action)).unwrap();
        let (it, told) = thread.join().unwrap();
        assert_eq!(told, action);
        it
    };
    let it = turn(it, false, Action::Continue);
    let it = turn(it, false, Action::Step);
    let it = turn(it, false, Action::Continue);
    let it = turn(it, true, Action::Continue);
    let it = turn(it, false, Action::Continue);
    let thread = park(&debugger, it, None);
    until_stopped(&debugger);
    debugger.detach(true).unwrap();
    assert_eq!(thread.join().unwrap().1, Action::Continue);
    assert_eq!(debugger.0.memory.read_obj::<u8>(GuestAddress(0x10)).unwrap(), 0);
}

#[test]
fn what_would_be_lost_keeps_all_parked_until_it_is_told() {
    let debugger = debugger(2, HARDWARE);
    let watch = Why::Watch { address: 8, access: false };
    let first = park(&debugger, vcpu(0), Some(Why::Breakpoint));
    while debugger.state().reports.is_empty() {
        thread::yield_now();
    }
    let second = park(&debugger, vcpu(1), Some(watch));
    until_stopped(&debugger);
    assert_eq!(debugger.take_report(), Some(Report { vcpu: 0, why: Why::Breakpoint }));
    debugger.resume(all(Action::Continue)).unwrap();
    assert!(debugger.is_stopped(), "the watchpoint has not been told");
    assert_eq!(debugger.take_report(), Some(Report { vcpu: 1, why: watch }));
    debugger.resume(all(Action::Continue)).unwrap();
    first.join().unwrap();
    second.join().unwrap();
}

#[test]
fn a_breakpoint_that_is_still_there_is_come_to_again() {
    let debugger = debugger(2, HARDWARE);
    let threads = [0, 1].map(|id| park(&debugger, vcpu(id), Some(Why::Breakpoint)));
    until_stopped(&debugger);
    debugger.take_report().unwrap();
    debugger.resume(all(Action::Continue)).unwrap();
    for thread in threads {
        assert_eq!(thread.join().unwrap().1, Action::Continue);
    }
    assert_eq!(debugger.take_report(), None);
}

#[test]
fn only_those_that_are_named_go_on() {
    let debugger = debugger(2, HARDWARE);
    let threads = [0, 1].map(|id| park(&debugger, vcpu(id), None));
    until_stopped(&debugger);
    debugger.resume(|id| (id == 1).then_some(Action::Continue)).unwrap();
    let [first, second] = threads;
    let (it, _) = second.join().unwrap();
    assert!(!first.is_finished());
    assert!(!debugger.is_stopped() && !debugger.is_stopping(0));
    debugger.stop();
    assert!(debugger.is_stopping(0));
    let second = park(&debugger, it, None);
    until_stopped(&debugger);
    debugger.0.stopper.stop(crate::exit_code::StopReason::UserQuit);
    for thread in [first, second] {
        assert_eq!(thread.join().unwrap().1, Action::End);
    }
}

#[test]
fn a_call_that_fails_leaves_all_parked() {
    let debugger = debugger(2, HARDWARE);
    let error = Error::new(Ioctl::SetGuestDebug, Errno::EIO);
    let mut broken = vcpu(1);
    broken.expect_set_guest_debug().once().returning(move |_| Err(error));
    let mut whole = vcpu(0);
    whole.expect_set_guest_debug().once().returning(|_| Ok(()));
    let threads = [whole, broken].map(|it| park(&debugger, it, None));
    until_stopped(&debugger);
    let step = |id| Some(if id == 1 { Action::Step } else { Action::Continue });
    debugger.with(0, |_, memory, it| it.insert(memory, 0x10, 0x10)).unwrap();
    assert_eq!(debugger.resume(step), Err(error));
    assert!(debugger.is_stopped());
    debugger.0.stopper.stop(crate::exit_code::StopReason::UserQuit);
    for thread in threads {
        assert_eq!(thread.join().unwrap().1, Action::End);
    }
}

#[test]
fn a_step_of_user_code_is_not_tried_where_it_would_trap_in_the_guest() {
    let debugger = debugger(1, SOFTWARE);
    let mut it = vcpu(0);
    it.expect_regs().returning(|| Ok(kvm_regs::default()));
    it.expect_sregs().returning(|| {
        let mut sregs = kvm_sregs { cr0: 1, ..Default::default() };
        sregs.ss.dpl = 3;
        Ok(sregs)
    });
    let thread = park(&debugger, it, None);
    until_stopped(&debugger);
    debugger.resume(all(Action::Step)).unwrap();
    assert_eq!(debugger.take_report(), Some(Report { vcpu: 0, why: Why::CanNotStep }));
    debugger.resume(all(Action::Continue)).unwrap();
    assert_eq!(thread.join().unwrap().1, Action::Continue);
}

#[test]
fn an_int3_is_a_breakpoint_where_one_was_set_and_the_guests_elsewhere() {
    let debugger = debugger(1, HARDWARE);
    let mut own = vcpu(0);
    let inject = |debug: &kvm_guest_debug| debug.control == KVM_GUESTDBG_INJECT_BP;
    own.expect_set_guest_debug().withf(inject).once().returning(|_| Ok(()));
    assert_eq!(debugger.debug_exit(&own, 3, 0), Ok(None), "there is no breakpoint at all");

    debugger.state().breakpoints.insert(&debugger.0.memory, 0x100, 0x100);
    let mut it = at_code(0);
    it.expect_vcpu_events().returning(|| Ok(Default::default()));
    assert_eq!(debugger.debug_exit(&it, 3, 0), Ok(Some(Why::Breakpoint)));
    assert_eq!(debugger.is_breakpoint(&it), Ok(true));
    debugger.state().breakpoints.insert(&debugger.0.memory, 0x200, 0x200);
    assert!(debugger.state().breakpoints.remove(&debugger.0.memory, 0x100));
    assert_eq!(debugger.is_breakpoint(&it), Ok(false));
    let mut own = at_code(0);
    own.expect_set_guest_debug().withf(inject).once().returning(|_| Ok(()));
    assert_eq!(debugger.debug_exit(&own, 3, 0), Ok(None));
}

#[test]
fn a_debug_exception_nobody_asked_for_is_the_guests() {
    let debugger = debugger(1, HARDWARE);
    let mut it = vcpu(0);
    it.expect_debugregs()
        .return_const(Ok(kvm_debugregs { dr6: 0xffff_0ff0, ..Default::default() }));
    it.expect_set_debugregs().withf(|it| it.dr6 == 0xffff_4ff0).once().returning(|_| Ok(()));
    it.expect_set_guest_debug()
        .withf(|debug| debug.control == KVM_GUESTDBG_INJECT_DB)
        .once()
        .returning(|_| Ok(()));
    assert_eq!(debugger.debug_exit(&it, 1, 0xffff_4ff0), Ok(None));
}
