//! Guest memory for KVM: RAM over vm-memory, memory slots, ioeventfds.

mod ioevent;
mod layout;
mod mapping;
mod ram;
mod range;
mod slot;

pub use ioevent::{IoEventError, IoEventHandle, IoEventMatch, IoEventRegistry};
pub use layout::{LayoutError, RamLayout};
pub use mapping::{MapError, Mapping};
pub use ram::{GuestRam, RamError};
pub use range::GuestRange;
pub use slot::{NewSlot, Slot, SlotError, SlotInfo, SlotLimits, SlotManager, VcpusPaused};

/// Bytes of a page of the host: what slots and their memory are aligned to.
#[must_use]
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
