//! What makes KVM signal an eventfd of the VMM: doorbells, and the ends of level-triggered
//! interrupts.

use super::Request;
use crate::{EventFd, Gsi, IoAddress, IoEvent, Irqfd};

/// An assignment by which KVM signals an eventfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Signals {
    /// A guest write does (`KVM_IOEVENTFD`).
    Doorbell {
        address: IoAddress,
        length: u32,
        datamatch: Option<u64>,
        /// The number the kernel gave the eventfd.
        event: Option<u64>,
    },
    /// The end of an interrupt does (`KVM_IRQFD_FLAG_RESAMPLE`).
    Resample {
        /// The number the kernel gave the eventfd that raises the interrupt.
        irqfd: Option<u64>,
        gsi: Gsi,
    },
}

impl Signals {
    /// What a call assigns if it succeeds, and the eventfd that is signalled.
    pub(super) fn assigned_by<'a>(request: &Request<'a>) -> Option<(Self, &'a EventFd)> {
        match *request {
            Request::IoeventfdAssign(doorbell) => Some((Self::doorbell(doorbell), &doorbell.event)),
            Request::IrqfdAssign(Irqfd { event, gsi, resample: Some(resample) }) => {
                Some((Self::Resample { irqfd: event.id(), gsi: *gsi }, resample))
            }
            _ => None,
        }
    }

    /// What a call ends if it succeeds.
    pub(super) fn ended_by(request: &Request<'_>) -> Option<Self> {
        match *request {
            Request::IoeventfdDeassign(doorbell) => Some(Self::doorbell(doorbell)),
            Request::IrqfdDeassign { event, gsi } => {
                Some(Self::Resample { irqfd: event.id(), gsi })
            }
            _ => None,
        }
    }

    fn doorbell(doorbell: &IoEvent) -> Self {
        let IoEvent { address, length, datamatch, ref event } = *doorbell;
        Self::Doorbell { address, length, datamatch, event: event.id() }
    }
}

/// Adds `count` to an eventfd, as KVM would have.
pub(super) fn signal(event: &EventFd, count: u32) {
    // At its maximum the counter stays there, which wakes just as well.
    let _ = rustix::io::write(event, &u64::from(count).to_ne_bytes());
}
