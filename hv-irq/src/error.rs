//! Why the router refused or failed.
//!
//! Every kind says whether anything changed, because that is what a caller has to know.

use std::os::fd::RawFd;

use hv_core::Gsi;
use thiserror::Error;

use crate::{GsiError, RouteError};

/// Why a batch or a call of the router failed. But for [`RouterError::RollbackFailed`], everything
/// is as it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RouterError {
    /// KVM has fewer GSIs, which is also its limit of routes, than the legacy interrupts take.
    #[error("KVM_CAP_IRQ_ROUTING is {count}, but the legacy interrupts alone take {needed} routes")]
    TooFewGsis {
        /// The value of the capability.
        count: u32,
        /// What is needed.
        needed: u32,
    },
    /// A GSI can't be taken.
    #[error(transparent)]
    Gsi(#[from] GsiError),
    /// A route can't be made.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The eventfd raises an interrupt already; KVM takes each once (`EBUSY`).
    #[error("eventfd {fd} already raises GSI {gsi}: unbind it there first")]
    EventInUse {
        /// The descriptor.
        fd: RawFd,
        /// The GSI it is bound to.
        gsi: Gsi,
    },
    /// Another eventfd is bound to the route.
    #[error("GSI {gsi} is already raised by eventfd {fd}: unbind it first")]
    RouteBound {
        /// The GSI of the route.
        gsi: Gsi,
        /// The descriptor bound to it.
        fd: RawFd,
    },
    /// The GSI has no route to bind an eventfd to: the batch that was to make it failed.
    #[error("GSI {0} has no route, and its events would be lost: drop it, or route it first")]
    NotRouted(Gsi),
    /// The group has no such vector.
    #[error("vector {index} does not exist: the group has {count} vectors")]
    NoSuchVector {
        /// The vector.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// The router is gone, and with it its VM.
    #[error("the router of this VM is gone: nothing can be routed any more")]
    RouterGone,
    /// The route belongs to another router.
    #[error("the route of GSI {0} belongs to another VM's router")]
    ForeignRoute(Gsi),
    /// The kernel has no such line, or none at all because the irqchip is split.
    #[error(
        "GSI {0} is no line of the kernel's interrupt controllers; with a split irqchip, use the user-space I/O APIC"
    )]
    NoKernelLine(Gsi),
    /// An I/O APIC in user space was asked for though the kernel has one.
    #[error("the kernel has the I/O APIC of this VM: one in user space needs a split irqchip")]
    PinsInKernel,
    /// A call failed, and all that had been done before it was undone.
    #[error(transparent)]
    Kvm(#[from] hv_core::Error),
    /// A call failed, and so did undoing what had been done before it. The router knows what KVM
    /// still has: a route that could not be restored is gone, one that could not be removed goes
    /// with its handle, and an eventfd that could not be bound again is unbound.
    #[error("{cause}; undoing the change failed too: {rollback}")]
    RollbackFailed {
        /// Why the batch failed.
        cause: hv_core::Error,
        /// The first failure while undoing it.
        rollback: hv_core::Error,
    },
}
