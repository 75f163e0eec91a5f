//! vCPUs parked for the machine's control: paused, or looked at for a moment.
//!
//! A hold is beside what a debugger does. While the machine is paused, a debugger sees and changes all it
//! likes, and what it lets go runs when the pause ends; a vCPU it has stopped stays so when the pause
//! ends. Who waits here waits for as long as it said: a vCPU may be busy in a device, and a machine that
//! can't be paused must still be one that can be stopped.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use hv_core::{Vcpu, VcpuKick};

use super::{Debugger, State};

/// Why vCPUs are not parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// There is no such vCPU.
    #[error("there is no vCPU {vcpu}; there are {vcpus}, counted from 0")]
    NoSuchVcpu {
        /// What was asked for.
        vcpu: usize,
        /// How many there are.
        vcpus: usize,
    },
    /// It has not left the device it accesses, which may wait for a reader of the console.
    #[error(
        "vCPU {vcpu} did not stop within {limit:?}: a device keeps it, as the serial port does when \
         nobody reads its output; nothing was changed, try again"
    )]
    Busy {
        /// The first of them.
        vcpu: usize,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The machine is coming to its end.
    #[error("the machine is stopping")]
    Stopping,
}

/// For the machine's control.
impl<V: Vcpu> Debugger<V> {
    /// Parks all vCPUs until [`unpause`](Self::unpause). When this returns, none runs. A machine that is
    /// paused stays so.
    ///
    /// # Errors
    /// One did not stop within `limit`: none is kept then. The machine has stopped.
    pub fn pause(&self, limit: Duration) -> Result<(), HoldError> {
        let mut state = self.state();
        state.pausing += 1;
        state.kick(|_| true);
        let (mut state, result) = self.wait_for(state, |_| true, limit);
        state.pausing -= 1;
        match result {
            Ok(()) => state.paused = true,
            Err(_) => self.0.released.notify_all(),
        }
        result
    }

    /// Ends a pause, if there is one.
    pub fn unpause(&self) {
        self.state().paused = false;
        self.0.released.notify_all();
    }

    /// Whether the machine is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.state().paused
    }

    /// Whether a debugger keeps vCPUs from running.
    #[must_use]
    pub fn is_held_by_debugger(&self) -> bool {
        let state = self.state();
        state.stopping || state.slots.iter().any(super::Slot::is_parked)
    }

    /// Parks one vCPU for as long as `look` takes.
    ///
    /// # Errors
    /// There is no such vCPU, or it did not stop within `limit`. The machine has stopped.
    pub fn look<R>(
        &self,
        id: usize,
        limit: Duration,
        look: impl FnOnce(&V) -> R,
    ) -> Result<R, HoldError> {
        let mut state = self.state();
        let vcpus = state.slots.len();
        let none = HoldError::NoSuchVcpu { vcpu: id, vcpus };
        state.slots.get_mut(id).ok_or(none)?.looks += 1;
        state.kick(|it| it == id);
        let (mut state, result) = self.wait_for(state, |it| it == id, limit);
        // Under the lock it stays, and nothing is left to undo if `look` unwinds.
        self.0.released.notify_all();
        let slot = state.slots.get_mut(id).ok_or(none)?;
        slot.looks -= 1;
        result?;
        slot.vcpu.as_ref().map(look).ok_or(HoldError::Stopping)
    }

    /// Waits until the vCPUs that are `wanted` are parked.
    fn wait_for<'a>(
        &'a self,
        state: MutexGuard<'a, State<V>>,
        wanted: impl Fn(usize) -> bool,
        limit: Duration,
    ) -> (MutexGuard<'a, State<V>>, Result<(), HoldError>) {
        let stopper = &self.0.stopper;
        let (state, _) = self
            .0
            .arrived
            .wait_timeout_while(state, limit, |state| {
                !stopper.is_stopped() && state.running(&wanted).is_some()
            })
            .unwrap_or_else(PoisonError::into_inner);
        let result = match state.running(&wanted) {
            _ if stopper.is_stopped() => Err(HoldError::Stopping),
            Some(vcpu) => Err(HoldError::Busy { vcpu, limit }),
            None => Ok(()),
        };
        (state, result)
    }
}

impl<V: Vcpu> State<V> {
    /// The first of the `wanted` that is not parked.
    fn running(&self, wanted: impl Fn(usize) -> bool) -> Option<usize> {
        let mut ids = self.slots.iter().enumerate();
        ids.find(|(id, slot)| wanted(*id) && slot.vcpu.is_none()).map(|(id, _)| id)
    }

    /// Makes the `wanted` come.
    fn kick(&self, wanted: impl Fn(usize) -> bool) {
        for (id, slot) in self.slots.iter().enumerate() {
            if wanted(id) && slot.vcpu.is_none() {
                // A vCPU whose thread is gone needs no kick.
                let _ = slot.kick.kick();
            }
        }
    }
}

#[cfg(test)]
mod tests;
