//! Interrupt routing for KVM: GSIs, routes and irqfds, staged, committed with one ioctl, and owned.
//!
//! - [`IrqRouter`] is the router of a VM. [`IrqRouter::batch`] changes routes and irqfds together,
//!   [`GsiRoute`] and [`PinIrqfd`] own what it gives out.
//! - [`GsiBitmap`] and [`RoutingTable`] are what it is made of: which GSIs are taken, and which tables
//!   KVM accepts. [`pc_default_routes`] is where a table starts.
//! - [`Ioapic`] has the pins of a VM whose irqchip is split.
//!
//! Generic over [`hv_core::IrqBackend`]. Nothing here knows a device, and no ioctl that changes
//! anything is called outside of a commit.

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
