//! Interrupt routing for KVM: GSIs, routes and irqfds, staged, committed in one ioctl, and owned.

mod batch;
mod bitmap;
mod error;
mod ioapic;
mod ledger;
mod pin;
mod pins;
mod router;
mod state;
mod table;

pub use batch::{Batch, MsiRoute};
pub use bitmap::{GsiBitmap, GsiError};
pub use error::RouterError;
pub use ioapic::Ioapic;
pub use pin::PinIrqfd;
pub use pins::{LEGACY_GSIS, pc_default_routes};
pub use router::{IrqRouter, LegacyPins, RouterConfig};
pub use table::{RouteError, RoutingTable};
