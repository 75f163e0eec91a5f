//! virtio over PCI (virtio 1.2, 4.1), modern only: what a driver sees of a device.
//!
//! A function has two BARs. The first has the MSI-X table and pending bits; the second the registers, a
//! page each for the common configuration, the ISR status, the device configuration and the doorbells.
//! The capabilities say where; drivers don't guess.
//!
//! A doorbell is an ioeventfd that wakes the device's thread, so the guest does not leave for it; one
//! that KVM could not take, or that is rung in an odd way, comes here as an exit and does the same. An
//! interrupt is an eventfd write of that thread. What comes here is what happens a few times: setting
//! up, resetting, reading the configuration.

mod common;
mod function;
mod layout;

pub(super) use function::FEATURES;
pub use function::{Platform, VirtioError, VirtioPci};

/// Where the registers are, for drivers and tests.
pub mod registers {
    pub use super::layout::{
        COMMON, DEVICE, ISR, MSIX_BAR, NOTIFY, NOTIFY_MULTIPLIER, REGISTER_BAR,
    };
}
