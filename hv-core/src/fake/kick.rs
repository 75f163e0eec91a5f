//! How another thread gets a vCPU of the fake out of its run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::kvm::{System, new_eventfd};
use crate::{Call, Errno, Error, EventFd, VcpuKick};

/// Stops a vCPU from another thread.
///
/// It keeps neither the vCPU nor the VM: kicking a vCPU that is gone does nothing.
#[derive(Debug, Clone)]
pub struct FakeKick {
    vcpu: Weak<Kickable>,
    system: Arc<System>,
}

impl VcpuKick for FakeKick {
    fn kick(&self) -> Result<(), Error> {
        self.system.count(Call::Kick);
        if let Some(vcpu) = self.vcpu.upgrade() {
            vcpu.requested.store(true, Ordering::SeqCst);
            vcpu.wake();
        }
        Ok(())
    }
}

/// What a vCPU shares with those who kick or wake it.
#[derive(Debug)]
pub(super) struct Kickable {
    requested: AtomicBool,
    /// Signalled when a vCPU that waits should look again.
    event: EventFd,
}

impl Kickable {
    pub(super) fn new() -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self { requested: AtomicBool::new(false), event: new_eventfd()? }))
    }

    pub(super) fn kicker(self: &Arc<Self>, system: &Arc<System>) -> FakeKick {
        FakeKick { vcpu: Arc::downgrade(self), system: system.clone() }
    }

    /// Takes a kick, if there was one. What the kicker did before is visible from here on.
    pub(super) fn take(&self) -> bool {
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// Makes the vCPU look again if it waits, or when it next does.
    pub(super) fn wake(&self) {
        self.event.signal();
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}
