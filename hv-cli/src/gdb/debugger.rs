//! The stopping and resuming of vCPUs for a debugger.
//!
//! A vCPU that stops is parked: its thread gives it away and waits, and whoever serves the debugger
//! works on it meanwhile. When one stops, all do; the debugger is told when the last one is parked.
//!
//! The machine's control ([`hold`]) parks vCPUs as well. A vCPU runs if neither a debugger nor a hold keeps it.
//!
//! There is one lock, for all of this. Kicks are sent under it; the machine is never stopped under
//! it, because that wakes the parked threads, which need it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hv_core::{Error, Vcpu, VcpuKick};
use kvm_bindings::{
    KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug,
};

use super::breakpoints::{Breakpoints, Memory, Trigger};
use super::limits::Limits;
use crate::complete::{look_up, withdraw};
use crate::event::Event;
use crate::machine::stop::Stopper;

/// DR6.BS: a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR6.B0 to B3, BS: what a debug exception tells of.
const DR6_CAUSES: u64 = 0xf | DR6_SINGLE_STEP;
/// The breakpoint exception.
const BP_VECTOR: u32 = 3;

/// What a vCPU does when it is let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Runs until something stops it.
    Continue,
    /// Makes one step and stops.
    Step,
    /// The machine has stopped: it must not run any more.
    End,
}

/// Why a vCPU stopped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It came to a software breakpoint.
    Breakpoint,
    /// It came to a hardware breakpoint.
    Hardware,
    /// It touched what is watched.
    Watch {
        /// The linear address that was asked for.
        address: u64,
        /// Reads stop it, too.
        access: bool,
    },
    /// It has made its step.
    Stepped,
    /// This KVM can't make it step where it is.
    CanNotStep,
    /// It can't go on; the machine ends when it is let go.
    Crashed,
}

impl Why {
    /// Whether it would not be seen again if it were not told now. A breakpoint that is still there
    /// is come to again.
    fn is_lost_untold(self) -> bool {
        matches!(self, Self::Watch { .. } | Self::Crashed | Self::CanNotStep)
    }
}

/// A vCPU that stopped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) vcpu: usize,
    pub(super) why: Why,
}

struct Slot<V: Vcpu> {
    kick: V::Kick,
    /// It, while its thread waits.
    vcpu: Option<V>,
    /// What its thread is told to do.
    action: Option<Action>,
    /// What it does, or did when it was last told.
    doing: Action,
    /// How many want it parked to look at it.
    looks: u32,
    /// What KVM was last told of breakpoints and steps.
    debug: kvm_guest_debug,
}

impl<V: Vcpu> Slot<V> {
    fn is_parked(&self) -> bool {
        self.vcpu.is_some() && self.action.is_none()
    }
}

struct State<V: Vcpu> {
    slots: Vec<Slot<V>>,
    /// Whether vCPUs are to park.
    stopping: bool,
    /// Whether a debugger is there.
    attached: bool,
    /// The guest waits for a debugger to let it go for the first time.
    held: bool,
    /// The machine is paused: no vCPU leaves, whatever a debugger says.
    paused: bool,
    /// How many are about to pause it.
    pausing: u32,
    reports: VecDeque<Report>,
    breakpoints: Breakpoints,
}

struct Shared<V: Vcpu> {
    state: Mutex<State<V>>,
    /// Parked threads wait for it.
    released: Condvar,
    /// Who wants them parked waits for it.
    arrived: Condvar,
    /// Signalled when the last vCPU is parked.
    parked: Event,
    stopper: Stopper,
    memory: Memory,
    limits: Limits,
}

/// What vCPU threads and the GDB server share. Clones are the same.
pub struct Debugger<V: Vcpu>(Arc<Shared<V>>);

impl<V: Vcpu> Clone for Debugger<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// How a debugger of a machine begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// No vCPU executes an instruction before a debugger lets it.
    pub wait: bool,
    /// The host's KVM interprets guest kernels and runs user code as it is, which it can't debug.
    pub software_kvm: bool,
}

/// Wakes parked threads when the machine stops.
pub struct Waker<V: Vcpu>(Debugger<V>);

impl<V: Vcpu> VcpuKick for Waker<V> {
    fn kick(&self) -> Result<(), Error> {
        let _state = self.0.state();
        self.0.0.released.notify_all();
        self.0.0.arrived.notify_all();
        Ok(())
    }
}

impl<V: Vcpu> Debugger<V> {
    /// For the vCPUs that these kicks stop, in the order of their ids from 0.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(
        kicks: impl IntoIterator<Item = V::Kick>,
        memory: Memory,
        stopper: Stopper,
        setup: Setup,
    ) -> io::Result<Self> {
        let slot = |kick| Slot {
            kick,
            vcpu: None,
            action: None,
            doing: Action::Continue,
            looks: 0,
            debug: kvm_guest_debug::default(),
        };
        let state = State {
            slots: kicks.into_iter().map(slot).collect(),
            stopping: setup.wait,
            attached: false,
            held: setup.wait,
            paused: false,
            pausing: 0,
            reports: VecDeque::new(),
            breakpoints: Breakpoints::default(),
        };
        Ok(Self(Arc::new(Shared {
            state: Mutex::new(state),
            released: Condvar::new(),
            arrived: Condvar::new(),
            parked: Event::new()?,
            stopper,
            memory,
            limits: Limits { software_kvm: setup.software_kvm },
        })))
    }

    /// What must be kicked when the machine stops, besides the vCPUs.
    #[must_use]
    pub fn waker(&self) -> Waker<V> {
        Waker(self.clone())
    }

    fn state(&self) -> MutexGuard<'_, State<V>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For the thread of a vCPU.
impl<V: Vcpu> Debugger<V> {
    /// Whether this vCPU is to park. To be asked when a run was interrupted.
    #[must_use]
    pub fn is_stopping(&self, vcpu: u32) -> bool {
        let state = self.state();
        state.stopping || state.is_held(vcpu as usize)
    }

    /// Whether a debugger is there to look at a vCPU that can't go on.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.state().attached
    }

    /// Gives the vCPU away until it is let go. If it stopped by itself, the others stop, too.
    pub fn park(&self, vcpu: V, why: Option<Why>) -> (V, Action) {
        let id = vcpu.id() as usize;
        let mut state = self.state();
        let debugged = state.stopping || why.is_some();
        let Some(slot) = state.slots.get_mut(id) else { return (vcpu, Action::End) };
        // What parks for the machine's control alone goes on with what it was doing.
        slot.action = if debugged { None } else { Some(slot.doing) };
        slot.vcpu = Some(vcpu);
        if let Some(why) = why {
            state.reports.push_back(Report { vcpu: id, why });
            state.stop();
        }
        if state.is_stopped() {
            self.0.parked.signal();
        }
        self.0.arrived.notify_all();
        loop {
            let stopped = self.0.stopper.is_stopped();
            let held = state.is_held(id);
            if let Some(slot) = state.slots.get_mut(id)
                && (stopped || (slot.action.is_some() && !held))
                && let Some(vcpu) = slot.vcpu.take()
            {
                let action = slot.action.take().filter(|_| !stopped).unwrap_or(Action::End);
                slot.doing = action;
                return (vcpu, action);
            }
            state = self.0.released.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// KVM could not emulate an instruction of `vcpu`: is it the INT3 of a breakpoint? Then the vCPU
    /// is made as if it had not been tried.
    ///
    /// # Errors
    /// A call failed.
    pub fn is_breakpoint(&self, vcpu: &V) -> Result<bool, Error> {
        let state = self.state();
        if !state.breakpoints.has_software() {
            return Ok(false);
        }
        let sregs = vcpu.sregs()?;
        let linear = sregs.cs.base.wrapping_add(vcpu.regs()?.rip);
        let memory = &self.0.memory;
        let ours = look_up(&sregs, memory, linear)
            .is_some_and(|it| state.breakpoints.is_patched(memory, it.address.0));
        if ours {
            withdraw(vcpu)?;
        }
        Ok(ours)
    }

    /// Why `vcpu` stops at a debug exit of KVM. `None`: it was the guest's own business, and has been
    /// given back to it.
    ///
    /// # Errors
    /// A call failed.
    pub fn debug_exit(&self, vcpu: &V, exception: u32, dr6: u64) -> Result<Option<Why>, Error> {
        if exception == BP_VECTOR {
            if self.is_breakpoint(vcpu)? {
                return Ok(Some(Why::Breakpoint));
            }
            self.give_back(vcpu, KVM_GUESTDBG_INJECT_BP)?;
            return Ok(None);
        }
        let state = self.state();
        let id = vcpu.id() as usize;
        let stepping = state
            .slots
            .get(id)
            .is_some_and(|slot| slot.debug.control & KVM_GUESTDBG_SINGLESTEP != 0);
        if let Some(it) = state.breakpoints.triggered(dr6) {
            return Ok(Some(match it.trigger {
                Trigger::Execute => Why::Hardware,
                trigger => Why::Watch { address: it.address, access: trigger == Trigger::Access },
            }));
        }
        if stepping && dr6 & DR6_SINGLE_STEP != 0 {
            return Ok(Some(Why::Stepped));
        }
        drop(state);
        let mut registers = vcpu.debugregs()?;
        registers.dr6 |= dr6 & DR6_CAUSES;
        vcpu.set_debugregs(&registers)?;
        self.give_back(vcpu, KVM_GUESTDBG_INJECT_DB)?;
        Ok(None)
    }

    /// Gives the guest an exception that KVM handed out.
    fn give_back(&self, vcpu: &V, inject: u32) -> Result<(), Error> {
        let state = self.state();
        let mut debug =
            state.slots.get(vcpu.id() as usize).map(|slot| slot.debug).unwrap_or_default();
        debug.control |= inject;
        vcpu.set_guest_debug(&debug)
    }
}

impl<V: Vcpu> State<V> {
    fn is_stopped(&self) -> bool {
        self.slots.iter().all(Slot::is_parked)
    }

    /// Whether the machine's control keeps this vCPU.
    fn is_held(&self, id: usize) -> bool {
        self.paused || self.pausing > 0 || self.slots.get(id).is_some_and(|slot| slot.looks > 0)
    }

    fn stop(&mut self) {
        self.stopping = true;
        let all_held = self.paused || self.pausing > 0;
        for slot in self.slots.iter_mut().filter(|slot| !slot.is_parked()) {
            if slot.vcpu.is_some() && (all_held || slot.looks > 0) {
                // It was let go but has not left, and does not now.
                slot.action = None;
            } else {
                // A vCPU whose thread is gone needs no kick.
                let _ = slot.kick.kick();
            }
        }
    }

    /// A vCPU that is to make a step where it can't.
    fn impossible_step(
        &self,
        limits: Limits,
        action: impl Fn(usize) -> Option<Action>,
    ) -> Result<Option<usize>, Error> {
        if limits.can_step_anywhere() {
            return Ok(None);
        }
        for (id, slot) in self.slots.iter().enumerate() {
            if let Some(vcpu) = slot.vcpu.as_ref().filter(|_| action(id) == Some(Action::Step))
                && !limits.can_step(&vcpu.regs()?, &vcpu.sregs()?)
            {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Lets those go that `action` has something for.
    fn release(&mut self, action: impl Fn(usize) -> Option<Action>) -> Result<(), Error> {
        for (id, slot) in self.slots.iter_mut().enumerate() {
            if !slot.is_parked() {
                continue;
            }
            let Some(action) = action(id) else { continue };
            let debug = self.breakpoints.guest_debug(action == Action::Step);
            if let Some(vcpu) = &slot.vcpu
                && debug != slot.debug
            {
                vcpu.set_guest_debug(&debug)?;
                slot.debug = debug;
            }
        }
        // None runs before all are told, and none if one could not be.
        self.stopping = false;
        self.held = false;
        for (id, slot) in self.slots.iter_mut().enumerate() {
            if slot.is_parked() {
                slot.action = action(id);
            }
        }
        Ok(())
    }
}

/// For the server.
impl<V: Vcpu> Debugger<V> {
    /// What becomes readable when all vCPUs are parked.
    pub(super) fn parked(&self) -> &Event {
        &self.0.parked
    }

    pub(super) fn stopper(&self) -> &Stopper {
        &self.0.stopper
    }

    /// A debugger has come: stops all vCPUs.
    pub(super) fn attach(&self) {
        let mut state = self.state();
        state.attached = true;
        state.stop();
    }

    /// Makes all vCPUs park, soon.
    pub(super) fn stop(&self) {
        self.state().stop();
    }

    /// Whether all are parked.
    pub(super) fn is_stopped(&self) -> bool {
        self.state().is_stopped()
    }

    /// The next vCPU that stopped by itself.
    pub(super) fn take_report(&self) -> Option<Report> {
        self.state().reports.pop_front()
    }

    pub(super) fn vcpus(&self) -> usize {
        self.state().slots.len()
    }

    /// Works on a parked vCPU. `None` if it is not parked.
    pub(super) fn with<R>(
        &self,
        id: usize,
        f: impl FnOnce(&V, &Memory, &mut Breakpoints) -> R,
    ) -> Option<R> {
        let mut state = self.state();
        let State { slots, breakpoints, .. } = &mut *state;
        let slot = slots.get(id).filter(|slot| slot.is_parked())?;
        Some(f(slot.vcpu.as_ref()?, &self.0.memory, breakpoints))
    }

    /// Lets vCPUs go: what `action` says for each, nothing for those that stay. If one has stopped for
    /// a reason that has not been told and would be lost, none goes.
    ///
    /// # Errors
    /// A call failed. All stay parked then.
    pub(super) fn resume(&self, action: impl Fn(usize) -> Option<Action>) -> Result<(), Error> {
        let mut state = self.state();
        state.reports.retain(|report| report.why.is_lost_untold());
        if let Some(vcpu) = state.impossible_step(self.0.limits, &action)? {
            state.reports.push_back(Report { vcpu, why: Why::CanNotStep });
        }
        if !state.reports.is_empty() {
            self.0.parked.signal();
            return Ok(());
        }
        state.release(action)?;
        drop(state);
        self.0.released.notify_all();
        Ok(())
    }

    /// What can't be debugged here.
    pub(super) fn limits(&self) -> Limits {
        self.0.limits
    }

    /// Takes all breakpoints out of guest memory. The machine is about to be stopped.
    pub(super) fn forget(&self) {
        self.state().breakpoints.clear(&self.0.memory);
    }

    /// The debugger has gone: without its breakpoints, all go on. All must be parked, or the machine
    /// stopped. With `hold`, a guest that waits to be let go stays.
    ///
    /// # Errors
    /// KVM can't be told. All stay parked then.
    pub(super) fn detach(&self, hold: bool) -> Result<(), Error> {
        let mut state = self.state();
        let State { breakpoints, .. } = &mut *state;
        breakpoints.clear(&self.0.memory);
        state.attached = false;
        state.reports.clear();
        if !(hold && state.held) {
            state.release(|_| Some(Action::Continue))?;
            drop(state);
            self.0.released.notify_all();
        }
        Ok(())
    }
}

mod hold;
#[cfg(test)]
mod tests;

pub use hold::HoldError;
