//! The `Hypervisor` trait and everything that can be said about KVM without `/dev/kvm`.
//!
//! Three traits make the ladder [`Hypervisor`] → [`Vm`] → [`Vcpu`]; a VM is also an
//! [`IrqBackend`], a [`MemoryBackend`] and an [`IoEventBackend`], which is all that hv-irq and
//! hv-memory ask for. Around them: plain data, errors that name the ioctl and the errno, and
//! [`init`], the start of a VM as one transaction.
//!
//! This crate opens no device and contains no `unsafe`. hv-kvm implements the traits over
//! `/dev/kvm`. Behind features of the same names are `mock`, mocks of them; `fake`, a KVM in memory;
//! `conformance`, the rules of KVM as cases for any implementation; and, behind `layers`, `layer`:
//! what stands between a caller and a hypervisor, to trace, record, replay or fail calls.

mod backend;
mod capability;
#[cfg(feature = "conformance")]
pub mod conformance;
mod device;
mod dirty_ring;
mod errno;
mod errnos;
mod error;
mod event;
mod exit;
#[cfg(feature = "fake")]
pub mod fake;
mod hypervisor;
pub mod init;
mod ioctl;
mod ioevent;
#[cfg(feature = "layers")]
pub mod layer;
mod memory;
#[cfg(feature = "mock")]
pub mod mock;
mod route;
mod vcpu;

pub use backend::{IoEventBackend, IrqBackend, MemoryBackend};
pub use capability::{Capability, Scope};
pub use device::{DeviceChoice, OpenError, OpenErrorKind, ParseDeviceError};
pub use dirty_ring::{DirtyGfn, DirtyPage, DirtyRing};
pub use errno::Errno;
pub use error::{Context, Error};
pub use event::EventFd;
pub use exit::{
    ExitReply, INTERNAL_ERROR_EMULATION, InternalError, IoDirection, IoExit, MmioExit, VcpuExit,
};
pub use hypervisor::{Hypervisor, MsrIndexList, Vm};
pub use ioctl::{Call, Ioctl};
pub use ioevent::IoEvent;
pub use memory::{
    CoalescedWrite, CoalescedZone, HostMemory, HostRange, IoAddress, MemorySlot, SlotFlags, SlotId,
};
pub use route::{Gsi, IrqchipId, Irqfd, LineStatus, Msi, MsiStatus, Route, RouteTarget};
pub use vcpu::{InterruptState, Vcpu, VcpuKick};

/// Its examples are tests.
#[cfg(all(doctest, feature = "mock", feature = "fake", feature = "layers"))]
#[doc = include_str!("../README.md")]
struct Readme;
