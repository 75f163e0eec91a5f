//! Interrupt routing for KVM: GSIs, routes and irqfds, staged, committed with one ioctl, and owned.
//!
//! - [`IrqRouter`] is the router of a VM. [`IrqRouter::batch`] changes routes and irqfds together;
//!   [`IrqRouter::save`] says what it has, [`IrqRouter::restore`] and [`IrqRouter::rebuild`] bring that
//!   to another VM.
//! - Handles own what it gives out: [`MsiVectors`] the MSI or MSI-X vectors of a device, [`GsiRoute`] a
//!   single GSI, [`PinIrqfd`] an edge-triggered line, [`LevelPin`] a level-triggered one.
//! - [`GsiBitmap`] and [`RoutingTable`] are what it is made of: which GSIs are taken, and which tables
//!   KVM accepts. [`pc_default_routes`] is where a table starts.
//! - [`Ioapic`] has the pins of a VM whose irqchip is split.
//!
//! Generic over [`hv_core::IrqBackend`]. Nothing here knows a device, and no ioctl that changes
//! anything is called outside of a commit.
//!
//! # Threads and locks
//!
//! Everything may be used from any thread: devices, vCPUs that had an exit, a monitor. There are three
//! locks, always taken in this order, and no code of the caller runs under any of them:
//!
//! 1. the registers of an [`Ioapic`], while the guest or a device does something to it;
//! 2. the state of an [`IrqRouter`], across the ioctls of a commit, so that two do not mix;
//! 3. the pointer to its VM, to read it or, in [`IrqRouter::rebuild`], to replace it.
//!
//! So a lock of the caller's (around a device, say) comes before all of these. Messages and lines
//! ([`IrqRouter::signal_msi`], [`IrqRouter::set_line`]) take only the last and do not wait for a commit,
//! unless a message needs a route. Dropping a handle takes the second lock, a [`LevelPin`] of an
//! [`Ioapic`] the first before it.
//!
//! # Without routing
//!
//! A KVM without `KVM_CAP_IRQ_ROUTING` has no router ([`RouterError::TooFewGsis`]). What follows for the
//! machine, no HPET above all, is among the consequences init found
//! ([`hv_core::init::Consequence::NoHpet`]).

mod batch;
mod bitmap;
mod dynamic;
mod error;
mod ioapic;
mod ledger;
mod level;
mod pin;
mod pins;
mod rebuild;
mod restore;
mod router;
mod save;
mod state;
mod table;
#[cfg(test)]
mod testing;
mod vectors;

pub use batch::{Batch, GsiRoute};
pub use bitmap::{GsiBitmap, GsiError};
pub use error::RouterError;
pub use ioapic::{Ioapic, IoapicState};
pub use level::LevelPin;
pub use pin::PinIrqfd;
pub use pins::{LEGACY_GSIS, pc_default_routes};
pub use restore::{RestoreError, Restored};
pub use router::{IrqRouter, LegacyPins, RouterConfig};
pub use save::RouterState;
pub use table::{RouteError, RoutingTable};
pub use vectors::{MsiVectors, MsiVectorsState, VectorChange, VectorState};

/// The code in the README is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
