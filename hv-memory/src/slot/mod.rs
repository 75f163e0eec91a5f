//! Memory slots of a VM: numbered, checked and owned.
//!
//! Assumes no number of slots and no address map: both are given. What is mapped where is decided by
//! the caller; this module makes sure that KVM and the caller agree on it.

mod dirty;
mod error;
mod manager;
mod table;

pub use error::SlotError;
pub use manager::{NewSlot, Slot, SlotInfo, SlotLimits, SlotManager, VcpusPaused};
