//! Why init failed: the step, and what went wrong in it.

use std::fmt;

use super::Step;
use super::config::GUEST_PAGE_SIZE;
use crate::{Capability, Error, IoAddress, OpenError, SlotId};

/// [`super::init`] failed, with everything undone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {kind}")]
pub struct InitError {
    /// The step that failed.
    pub step: Step,
    /// What went wrong.
    pub kind: InitErrorKind,
}

/// What went wrong in a step of [`super::init`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InitErrorKind {
    /// The host's page is smaller than the guest's.
    #[error(
        "the host's pages of {host} bytes are smaller than the guest's of {GUEST_PAGE_SIZE}: use a host with larger ones"
    )]
    PageSize {
        /// Bytes of a page of the host.
        host: u64,
    },
    /// The device could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// `KVM_GET_API_VERSION` failed: the device is not KVM's system descriptor.
    #[error("the device is not KVM: {0}")]
    NotKvm(Error),
    /// The API version is below 12.
    #[error("KVM's API version {0} is too old: version 12 is needed, which Linux has since 2.6.22")]
    ApiVersionTooOld(i32),
    /// The API version is above 12.
    #[error("KVM's API version {0} is not supported: this program knows version 12")]
    ApiVersionTooNew(i32),
    /// No vCPUs were asked for.
    #[error("0 vCPUs were asked for: a VM needs at least 1")]
    NoVcpus,
    /// More vCPUs than a VM can have.
    #[error(
        "{asked} vCPUs were asked for, but KVM has at most {limit} in a VM on this host: ask for {limit} or fewer"
    )]
    TooManyVcpus {
        /// How many were asked for.
        asked: u32,
        /// How many there can be.
        limit: u32,
    },
    /// A vCPU id that a VM can't have.
    #[error(
        "vCPU id {asked} was asked for, but KVM takes ids below {limit} on this host: use lower APIC ids"
    )]
    VcpuIdTooHigh {
        /// The id.
        asked: u32,
        /// The first that is too high.
        limit: u32,
    },
    /// `KVM_CREATE_VM` was interrupted by a signal each time.
    #[error(
        "KVM_CREATE_VM was interrupted by a signal (EINTR) {tries} times in a row: find what keeps signalling this process"
    )]
    Interrupted {
        /// How often it was tried.
        tries: u32,
    },
    /// Capabilities no VM can run without; all of them.
    #[error("{}", Missing(.0))]
    MissingCapabilities(Vec<Capability>),
    /// Something was asked for that this host's KVM does not have.
    #[error(
        "{request} but KVM has no {capability} on this host (Linux has it since {since}): {remedy}",
        since = .capability.since(), remedy = .request.remedy()
    )]
    Unsupported {
        /// What was asked for.
        request: Request,
        /// The capability it needs.
        capability: Capability,
    },
    /// A call failed.
    #[error(transparent)]
    Call(#[from] Error),
}

/// Something a [`super::Config`] asks for that not every KVM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Request {
    /// An in-kernel irqchip.
    KernelIrqchip,
    /// A split irqchip.
    SplitIrqchip,
    /// An in-kernel timer.
    Pit,
    /// A readonly memory slot.
    ReadonlySlot(SlotId),
    /// An ioeventfd.
    IoEvent(IoAddress),
    /// A coalesced zone.
    CoalescedZone(IoAddress),
}

impl Request {
    const fn remedy(self) -> &'static str {
        match self {
            Request::KernelIrqchip => "ask for no irqchip, or use a newer kernel",
            Request::SplitIrqchip => "ask for the irqchip in the kernel, or use a newer kernel",
            Request::Pit => "ask for the irqchip without the timer, or use a newer kernel",
            Request::ReadonlySlot(_) => "make the slot writable, or use a newer kernel",
            Request::IoEvent(_) => "handle the write as an exit, or use a newer kernel",
            Request::CoalescedZone(_) => "handle each write as an exit, or use a newer kernel",
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::KernelIrqchip => f.write_str("the irqchip was asked for in the kernel,"),
            Request::SplitIrqchip => f.write_str("a split irqchip was asked for,"),
            Request::Pit => f.write_str("the timer was asked for in the kernel,"),
            Request::ReadonlySlot(id) => write!(f, "memory slot {id} is to be readonly,"),
            Request::IoEvent(address) => write!(f, "{} is to be an ioeventfd,", Place(address)),
            Request::CoalescedZone(address) => {
                write!(f, "{} is to start a coalesced zone,", Place(address))
            }
        }
    }
}

struct Place<'a>(&'a IoAddress);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IoAddress::Mmio(address) => write!(f, "address {address:#x}"),
            IoAddress::Pio(port) => write!(f, "port {port:#x}"),
        }
    }
}

struct Missing<'a>(&'a [Capability]);

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KVM lacks what every VM needs: ")?;
        for (i, cap) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{cap} (Linux has it since {}; {})", cap.since(), cap.absence())?;
        }
        f.write_str(": use a newer kernel")
    }
}

/// Says at which step something failed.
pub(super) trait At<T> {
    fn at(self, step: Step) -> Result<T, InitError>;
}

impl<T, E: Into<InitErrorKind>> At<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, InitError> {
        self.map_err(|error| InitError { step, kind: error.into() })
    }
}
