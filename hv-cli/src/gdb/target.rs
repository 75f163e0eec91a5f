//! The machine as gdbstub wants it: its vCPUs are the threads of one process, numbered from 1.

use std::collections::BTreeMap;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointsExt, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use hv_core::{Errno, Error, Vcpu};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
};

use super::breakpoints::{Breakpoints, Memory, Trigger};
use super::debugger::{Action, Debugger};
use super::memory::{self, AccessError};
use super::registers::{self, Regs, X86};
use crate::complete::look_up;

pub(super) struct GdbTarget<V: Vcpu> {
    debugger: Debugger<V>,
    /// What vCPUs were told to do since the last resume.
    actions: BTreeMap<usize, Action>,
    /// Those that were told nothing stay where they are.
    locked: bool,
    /// The vCPU that was looked at last: its page tables say first where a breakpoint is.
    current: usize,
}

impl<V: Vcpu> GdbTarget<V> {
    pub(super) fn new(debugger: Debugger<V>) -> Self {
        Self { debugger, actions: BTreeMap::new(), locked: false, current: 0 }
    }

    /// Works on the vCPU of a thread.
    fn on<R>(
        &mut self,
        tid: Tid,
        f: impl FnOnce(&V, &Memory, &mut Breakpoints) -> Result<R, AccessError>,
    ) -> TargetResult<R, Self> {
        let vcpu = vcpu(tid);
        let result = self.debugger.with(vcpu, f).ok_or_else(|| refused(Errno::ESRCH))?;
        self.current = vcpu;
        result.map_err(|error| match error {
            AccessError::NotThere => refused(Errno::EFAULT),
            AccessError::Hypervisor(error) => refused(error.errno),
        })
    }

    fn on_current<R>(
        &mut self,
        f: impl FnOnce(&V, &Memory, &mut Breakpoints) -> R,
    ) -> TargetResult<R, Self> {
        self.debugger.with(self.current, f).ok_or_else(|| refused(Errno::ESRCH))
    }

    fn set_hardware(
        &mut self,
        trigger: Trigger,
        address: u64,
        len: u64,
    ) -> TargetResult<bool, Self> {
        self.on_current(|_, _, breakpoints| breakpoints.insert_hardware(trigger, address, len))
    }

    fn unset_hardware(
        &mut self,
        trigger: Trigger,
        address: u64,
        len: u64,
    ) -> TargetResult<bool, Self> {
        self.on_current(|_, _, breakpoints| breakpoints.remove_hardware(trigger, address, len))
    }

    /// What `find` makes of a vCPU: first of that whose registers were looked at last, then of the
    /// others. Of those that have not started, the page tables say nothing.
    fn on_any<R>(
        &self,
        mut find: impl FnMut(&V, &Memory, &mut Breakpoints) -> Result<Option<R>, Error>,
    ) -> TargetResult<Option<R>, Self> {
        for id in [self.current].into_iter().chain(0..self.debugger.vcpus()) {
            let found = self.debugger.with(id, &mut find).ok_or_else(|| refused(Errno::ESRCH))?;
            if let Some(found) = found.map_err(|error| refused(error.errno))? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The vCPU of a thread.
fn vcpu(tid: Tid) -> usize {
    tid.get() - 1
}

/// The thread of a vCPU.
pub(super) fn tid(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

/// An answer that leaves the session as it is.
fn refused<E>(errno: Errno) -> TargetError<E> {
    TargetError::Errno(u8::try_from(errno.0).unwrap_or(u8::MAX))
}

impl<V: Vcpu> Target for GdbTarget<V> {
    type Arch = X86;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpu> MultiThreadBase for GdbTarget<V> {
    fn read_registers(&mut self, regs: &mut Regs, tid: Tid) -> TargetResult<(), Self> {
        *regs = self.on(tid, |vcpu, _, _| Ok(registers::read(vcpu)?))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &Regs, tid: Tid) -> TargetResult<(), Self> {
        self.on(tid, |vcpu, _, _| Ok(registers::write(vcpu, regs)))?
            .map_err(|error| refused(error.errno()))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        self.on(tid, |vcpu, memory, breakpoints| {
            memory::read(vcpu, memory, breakpoints, start, data)
        })
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        self.on(tid, |vcpu, memory, breakpoints| {
            memory::write(vcpu, memory, breakpoints, start, data)
        })
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.debugger.vcpus()).map(tid).for_each(found);
        Ok(())
    }

    fn is_thread_alive(&mut self, tid: Tid) -> Result<bool, Error> {
        Ok(vcpu(tid) < self.debugger.vcpus())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpu> ThreadExtraInfo for GdbTarget<V> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Error> {
        let id = vcpu(tid);
        let state = self.debugger.with(id, |vcpu, _, _| vcpu.mp_state());
        let state = match state.and_then(Result::ok).map(|it| it.mp_state) {
            Some(KVM_MP_STATE_RUNNABLE) => "running",
            Some(KVM_MP_STATE_HALTED) => "halted",
            Some(KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED) => "not started",
            _ => "unknown",
        };
        let text = format!("vCPU {id}: {state}");
        let mut len = 0;
        for (to, from) in buf.iter_mut().zip(text.bytes()) {
            *to = from;
            len += 1;
        }
        Ok(len)
    }
}

/// A guest has no signals: one that is to be passed on is dropped.
impl<V: Vcpu> MultiThreadResume for GdbTarget<V> {
    fn resume(&mut self) -> Result<(), Error> {
        let (actions, locked) = (&self.actions, self.locked);
        let default = (!locked).then_some(Action::Continue);
        self.debugger.resume(|vcpu| actions.get(&vcpu).copied().or(default))
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.actions.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        // The first that is said of a thread counts.
        self.actions.entry(vcpu(tid)).or_insert(Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpu> MultiThreadSingleStep for GdbTarget<V> {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Error> {
        self.actions.entry(vcpu(tid)).or_insert(Action::Step);
        Ok(())
    }
}

impl<V: Vcpu> MultiThreadSchedulerLocking for GdbTarget<V> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.locked = true;
        Ok(())
    }
}

impl<V: Vcpu> BreakpointsExt for GdbTarget<V> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpu> SwBreakpoint for GdbTarget<V> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let limits = self.debugger.limits();
        let done = self.on_any(|vcpu, memory, breakpoints| {
            let sregs = vcpu.sregs()?;
            let Some(mapped) = look_up(&sregs, memory, address) else { return Ok(None) };
            let can = limits.can_patch(&sregs, mapped);
            let done = can && breakpoints.insert(memory, address, mapped.address.0);
            Ok(done.then_some(()))
        })?;
        // gdb says "Cannot access memory at address", which is nearly always what it is.
        Ok(done.is_some())
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.on_current(|_, memory, breakpoints| breakpoints.remove(memory, address))
    }
}

impl<V: Vcpu> HwBreakpoint for GdbTarget<V> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let limits = self.debugger.limits();
        let mapped = self.on_any(|vcpu, memory, _| Ok(look_up(&vcpu.sregs()?, memory, address)))?;
        Ok(limits.can_break(mapped) && self.set_hardware(Trigger::Execute, address, 1)?)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.unset_hardware(Trigger::Execute, address, 1)
    }
}

/// How a watchpoint is told to the processor, which can't watch for reads alone.
fn trigger(kind: WatchKind) -> Option<Trigger> {
    match kind {
        WatchKind::Write => Some(Trigger::Write),
        WatchKind::ReadWrite => Some(Trigger::Access),
        WatchKind::Read => None,
    }
}

impl<V: Vcpu> HwWatchpoint for GdbTarget<V> {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        match trigger(kind).filter(|_| self.debugger.limits().can_watch()) {
            Some(trigger) => self.set_hardware(trigger, address, len),
            None => Ok(false),
        }
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        match trigger(kind) {
            Some(trigger) => self.unset_hardware(trigger, address, len),
            None => Ok(false),
        }
    }
}
