//! Who keeps a vCPU, and who lets it go, when a pause, a look and a debugger meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hv_core::mock::{MockVcpu, MockVcpuKick};
use vm_memory::GuestAddress;

use super::super::{Action, Memory, Setup, Why};
use super::{Debugger, HoldError};
use crate::event::Event;
use crate::exit_code::StopReason;
use crate::machine::stop::Stopper;

/// Ends what hangs.
const LONG: Duration = Duration::from_secs(600);
/// For what can't come.
const SHORT: Duration = Duration::from_millis(1);

struct Rig {
    debugger: Debugger<MockVcpu>,
    stopper: Stopper,
    /// How often each vCPU thread went around its loop.
    turns: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Action>>,
}

/// As a vCPU thread does: runs until it is told to park, and parks then. Steps are noted.
fn run(debugger: &Debugger<MockVcpu>, id: u32, turns: &AtomicU64) -> Action {
    let mut vcpu = MockVcpu::new();
    vcpu.expect_id().return_const(id);
    let mut stepping = false;
    loop {
        turns.fetch_add(1, Ordering::SeqCst);
        let (it, action) = if debugger.is_stopping(id) {
            debugger.park(vcpu, None)
        } else if stepping {
            debugger.park(vcpu, Some(Why::Stepped))
        } else {
            thread::yield_now();
            (vcpu, if debugger.0.stopper.is_stopped() { Action::End } else { Action::Continue })
        };
        vcpu = it;
        match action {
            Action::End => return action,
            Action::Step => stepping = true,
            Action::Continue => stepping = false,
        }
    }
}

impl Rig {
    /// Threads for the last `running` of `vcpus`.
    fn new(vcpus: usize, running: usize) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let kicks = (0..vcpus).map(|_| {
            let mut kick = MockVcpuKick::new();
            kick.expect_kick().returning(|| Ok(()));
            kick
        });
        let stopper = Stopper::new(Event::new().unwrap());
        let setup = Setup { wait: false, software_kvm: false };
        let debugger = Debugger::new(kicks, memory, stopper.clone(), setup).unwrap();
        stopper.add_vcpu(debugger.waker());
        let turns: Vec<_> = (0..running).map(|_| Arc::new(AtomicU64::new(0))).collect();
        let threads = (vcpus as u32 - running as u32..).zip(&turns).map(|(id, turns)| {
            let (debugger, turns) = (debugger.clone(), turns.clone());
            thread::spawn(move || run(&debugger, id, &turns))
        });
        let threads = threads.collect();
        Self { debugger, stopper, turns, threads }
    }

    fn turns(&self) -> Vec<u64> {
        self.turns.iter().map(|turns| turns.load(Ordering::SeqCst)).collect()
    }

    /// Waits until every thread has gone on.
    fn wait_for_progress(&self) {
        let before = self.turns();
        while self.turns().iter().zip(&before).any(|(now, before)| now < &(before + 2)) {
            thread::yield_now();
        }
    }

    /// Fails if a thread goes on.
    fn assert_still(&self) {
        let before = self.turns();
        thread::sleep(Duration::from_millis(5));
        assert_eq!(self.turns(), before);
    }

    fn end(self) {
        self.stopper.stop(StopReason::UserQuit);
        for thread in self.threads {
            assert_eq!(thread.join().unwrap(), Action::End);
        }
    }
}

#[test]
fn a_pause_stops_all_and_is_idempotent_and_so_is_its_end() {
    let rig = Rig::new(2, 2);
    rig.wait_for_progress();
    rig.debugger.unpause();
    for _ in 0..2 {
        rig.debugger.pause(LONG).unwrap();
        assert!(rig.debugger.is_paused());
        rig.assert_still();
    }
    for _ in 0..2 {
        rig.debugger.unpause();
        assert!(!rig.debugger.is_paused());
        rig.wait_for_progress();
    }
    rig.debugger.pause(LONG).unwrap();
    rig.end();
}

#[test]
fn one_that_does_not_come_keeps_the_others_from_being_paused() {
    let rig = Rig::new(2, 1);
    let busy = HoldError::Busy { vcpu: 0, limit: SHORT };
    assert_eq!(rig.debugger.pause(SHORT), Err(busy));
    assert!(!rig.debugger.is_paused());
    rig.wait_for_progress();
    assert_eq!(rig.debugger.look(0, SHORT, |_| ()), Err(busy));
    assert!(busy.to_string().contains("vCPU 0 did not stop within 1ms"));
    rig.end();
}

#[test]
fn a_look_stops_one_for_a_moment_and_leaves_a_pause_as_it_was() {
    let rig = Rig::new(2, 2);
    for paused in [false, true] {
        for id in [0, 1] {
            let seen = rig.debugger.look(id, LONG, |vcpu| hv_core::Vcpu::id(vcpu) as usize);
            assert_eq!(seen, Ok(id));
        }
        assert_eq!(rig.debugger.is_paused(), paused);
        if paused {
            rig.assert_still();
        } else {
            rig.wait_for_progress();
            rig.debugger.pause(LONG).unwrap();
        }
    }
    let none = HoldError::NoSuchVcpu { vcpu: 2, vcpus: 2 };
    assert_eq!(rig.debugger.look(2, LONG, |_| ()), Err(none));
    assert_eq!(none.to_string(), "there is no vCPU 2; there are 2, counted from 0");
    rig.end();
}

#[test]
fn a_look_that_panics_keeps_nobody() {
    let rig = Rig::new(1, 1);
    let debugger = rig.debugger.clone();
    let look = thread::spawn(move || debugger.look(0, LONG, |_| panic!("a bug")));
    assert!(look.join().is_err());
    rig.wait_for_progress();
    rig.end();
}

#[test]
fn a_stop_ends_a_pause_and_the_wait_for_one() {
    let rig = Rig::new(2, 1);
    let debugger = rig.debugger.clone();
    let waiting = thread::spawn(move || debugger.pause(LONG));
    while rig.debugger.state().pausing == 0 {
        thread::yield_now();
    }
    rig.stopper.stop(StopReason::PowerOff);
    assert_eq!(waiting.join().unwrap(), Err(HoldError::Stopping));
    assert_eq!(rig.debugger.look(0, LONG, |_| ()), Err(HoldError::Stopping));
    rig.end();
}

fn until_stopped(debugger: &Debugger<MockVcpu>) {
    while !debugger.is_stopped() {
        thread::yield_now();
    }
}

#[test]
fn what_a_debugger_lets_go_in_a_pause_goes_when_the_pause_ends() {
    let rig = Rig::new(2, 2);
    rig.debugger.pause(LONG).unwrap();
    assert!(!rig.debugger.is_held_by_debugger());
    // It sees a guest that runs, and stops it.
    assert!(!rig.debugger.is_stopped());
    rig.debugger.attach();
    until_stopped(&rig.debugger);
    assert!(rig.debugger.is_held_by_debugger());
    rig.debugger.resume(|_| Some(Action::Continue)).unwrap();
    rig.assert_still();
    // Its interrupt takes back what has not begun.
    rig.debugger.stop();
    until_stopped(&rig.debugger);
    rig.debugger.detach(false).unwrap();
    rig.assert_still();
    rig.debugger.unpause();
    rig.wait_for_progress();
    rig.end();
}

#[test]
fn what_a_debugger_has_stopped_stays_when_a_pause_ends() {
    let rig = Rig::new(2, 2);
    rig.debugger.attach();
    until_stopped(&rig.debugger);
    rig.debugger.pause(LONG).unwrap();
    rig.debugger.unpause();
    rig.assert_still();
    assert!(rig.debugger.is_stopped());
    rig.debugger.look(1, LONG, |_| ()).unwrap();
    assert!(rig.debugger.is_stopped());
    // One that stays while the other runs is kept, too.
    rig.debugger.resume(|id| (id == 0).then_some(Action::Continue)).unwrap();
    let before = rig.turns();
    while rig.turns()[0] < before[0] + 2 {
        thread::yield_now();
    }
    rig.debugger.pause(LONG).unwrap();
    rig.debugger.unpause();
    assert_eq!(rig.turns()[1], before[1]);
    assert!(rig.debugger.is_held_by_debugger());
    rig.debugger.stop();
    until_stopped(&rig.debugger);
    rig.debugger.detach(false).unwrap();
    rig.wait_for_progress();
    rig.end();
}

#[test]
fn a_step_that_a_pause_interrupts_is_made_when_it_ends() {
    let rig = Rig::new(1, 1);
    rig.debugger.attach();
    until_stopped(&rig.debugger);
    rig.debugger.pause(LONG).unwrap();
    // The slot tells KVM of the step, which the mock takes.
    rig.debugger.state().slots[0]
        .vcpu
        .as_mut()
        .unwrap()
        .expect_set_guest_debug()
        .returning(|_| Ok(()));
    rig.debugger.resume(|_| Some(Action::Step)).unwrap();
    rig.assert_still();
    rig.debugger.unpause();
    until_stopped(&rig.debugger);
    let report = rig.debugger.take_report().unwrap();
    assert_eq!((report.vcpu, report.why), (0, Why::Stepped));

    // One that was under way when it parked goes on as a step.
    rig.debugger.resume(|_| Some(Action::Continue)).unwrap();
    rig.wait_for_progress();
    rig.debugger.state().slots[0].doing = Action::Step;
    rig.debugger.pause(LONG).unwrap();
    rig.debugger.unpause();
    until_stopped(&rig.debugger);
    assert_eq!(rig.debugger.take_report().map(|report| report.why), Some(Why::Stepped));
    rig.end();
}
