//! How a machine comes to a stop: whoever is first says why, and everyone hears of it.
//!
//! Devices, vCPU threads and the main loop hold a [`Stopper`]. Nothing else decides that the
//! machine ends.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use hv_core::VcpuKick;

use crate::event::Event;
use crate::exit_code::StopReason;

struct Inner {
    reason: OnceLock<StopReason>,
    /// Wakes the main loop.
    woken: Event,
    kicks: Mutex<Vec<Box<dyn VcpuKick>>>,
}

/// Ends the machine it belongs to. Clones end the same machine.
#[derive(Clone)]
pub struct Stopper(Arc<Inner>);

impl Stopper {
    /// A machine that runs. `woken` is signalled when it is stopped.
    #[must_use]
    pub fn new(woken: Event) -> Self {
        Self(Arc::new(Inner { reason: OnceLock::new(), woken, kicks: Mutex::default() }))
    }

    /// A vCPU that must hear of the stop. If that was before, it is kicked at once.
    pub fn add_vcpu(&self, kick: impl VcpuKick + 'static) {
        let mut kicks = self.0.kicks.lock().unwrap_or_else(PoisonError::into_inner);
        kicks.push(Box::new(kick));
        drop(kicks);
        if self.is_stopped() {
            self.wake_all();
        }
    }

    /// Stops the machine. Only the first reason counts.
    pub fn stop(&self, reason: StopReason) {
        if self.0.reason.set(reason).is_ok() {
            self.wake_all();
        }
    }

    /// Whether it was stopped.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.reason.get().is_some()
    }

    /// Why, once it was stopped.
    #[must_use]
    pub fn reason(&self) -> Option<&StopReason> {
        self.0.reason.get()
    }

    /// What becomes readable when the machine is stopped.
    #[must_use]
    pub fn event(&self) -> &Event {
        &self.0.woken
    }

    fn wake_all(&self) {
        self.0.woken.signal();
        for kick in self.0.kicks.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // A vCPU whose thread is gone needs no kick.
            let _ = kick.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Counting(Arc<AtomicU32>);

    impl VcpuKick for Counting {
        fn kick(&self) -> Result<(), hv_core::Error> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn stopper() -> Stopper {
        Stopper::new(Event::new().unwrap())
    }

    #[test]
    fn the_first_reason_counts_and_everyone_is_woken() {
        let stopper = stopper();
        let kicks = Arc::new(AtomicU32::new(0));
        stopper.add_vcpu(Counting(kicks.clone()));
        stopper.add_vcpu(Counting(kicks.clone()));
        assert!(stopper.event().take().is_none(), "not stopped yet");
        stopper.stop(StopReason::Reset);
        stopper.stop(StopReason::PowerOff);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset));
        assert_eq!(kicks.load(Ordering::Relaxed), 2);
        assert_eq!(stopper.event().take(), Some(1));
    }

    #[test]
    fn a_vcpu_that_comes_late_hears_of_it() {
        let stopper = stopper();
        stopper.stop(StopReason::UserQuit);
        let kicks = Arc::new(AtomicU32::new(0));
        stopper.add_vcpu(Counting(kicks.clone()));
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
    }
}
