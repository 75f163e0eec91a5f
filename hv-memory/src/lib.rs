//! Guest memory for KVM: from a number of bytes to memory slots, over vm-memory.

mod layout;
mod mapping;
mod ram;
mod range;

pub use layout::{LayoutError, RamLayout};
pub use mapping::{MapError, Mapping};
pub use ram::{GuestRam, RamError};
pub use range::GuestRange;

/// Bytes of a page of the host: what slots and their memory are aligned to.
#[must_use]
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
