//! PCI: one segment with one bus, a host bridge and functions with type 0 configuration space (PCI
//! Local Bus Specification 3.0; PCI Firmware Specification 3.3 for ECAM).
//!
//! - [`PciBus`] has the functions and decodes: the configuration ports 0xcf8 and 0xcfc, ECAM, and the
//!   windows for memory BARs. A BAR is only where the guest sees it if all of it is in a window and no
//!   other BAR is there; so one that a guest moves over RAM, the interrupt controllers or another
//!   device is not mapped, and nothing else changes.
//! - [`ConfigSpace`] is the configuration space of a function, [`Msix`] its MSI-X capability.
//! - [`PciFunction`] is what a device implements.
//!
//! Not here: what a device does, and where in the guest the windows are ([`crate::layout`]). There are
//! no I/O BARs, no bridges, no hot-plug, and a device has one function.
//!
//! Locks: the bus has one, taken after that of a device on the machine's
//! [`Bus`](crate::machine::bus::Bus) and held while a function answers. A function may take the locks of
//! hv-irq and hv-memory; it never waits for another thread.

mod bridge;
mod bus;
mod config;
mod msix;
mod ports;

pub use bridge::HostBridge;
pub use bus::{BarMapping, PciBus, PciError, PciFunction, Windows};
pub(crate) use config::INTERRUPT_DISABLE;
pub use config::{Bar, BarKind, CapabilityError, ConfigSpace, Identity, MEMORY_SPACE};
pub use msix::{MSIX_ENTRY, Msix};
pub use ports::{ConfigPorts, Ecam, Window};
