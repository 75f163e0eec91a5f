//! Guest memory for KVM, over vm-memory: RAM, the address map, memory slots, dirty pages, ioeventfds,
//! coalesced zones.
//!
//! - [`RamLayout`] says where RAM goes, [`Backing`] what it is made of, [`GuestRam`] maps it before
//!   the VM exists.
//! - [`AddressMap`] has regions of RAM, ROM, devices and aliases, and flattens them; [`LiveMap`] is the map
//!   of a VM, whose edits become a [`Plan`] of slot operations.
//! - [`SlotManager`] knows the slots of a VM and hands out their owners, [`Slot`].
//! - It also tells which pages were written, by the guest or the VMM: [`DirtyTracking`] says how KVM
//!   tells, [`DirtyPages`] are the pages, [`WriteLog`] is what marks the VMM's writes.
//! - [`IoEventRegistry`] knows its ioeventfds and hands out their owners, [`IoEventHandle`].
//! - [`CoalescedZones`] knows its coalesced zones, hands out their owners, [`ZoneHandle`], and what
//!   they collected.
//! - [`Mapping`] is host memory, [`GuestRange`] a range of guest-physical addresses.
//!
//! Generic over [`hv_core::MemoryBackend`] and [`hv_core::IoEventBackend`]. Nothing here assumes a
//! number of slots or an address map.

mod backing;
mod dirty;
mod ioevent;
mod layout;
mod map;
mod ram;
mod range;
mod slot;
mod zones;

pub use backing::{
    Backing, BackingFile, FileError, FileProblem, HugePageSize, HugePages, KeptSize, MapError,
    Mapping, PrefaultError, Progress, Sharing,
};
pub use dirty::{DirtyError, DirtyPages, DirtyRanges, DirtyTracking, WriteLog};
pub use ioevent::{IoEventError, IoEventHandle, IoEventMatch, IoEventRegistry};
pub use layout::{LayoutError, RamLayout};
pub use map::{
    AddressMap, AddressMapError, CommitError, Edit, FlatMemory, FlatRange, Found, LiveMap,
    NewRegion, PausedPlan, Plan, RegionId, RunningPlan, SlotOperation, SlotRules,
};
pub use ram::{GuestRam, RamError, RamMemory};
pub use range::GuestRange;
pub use slot::{NewSlot, Slot, SlotError, SlotInfo, SlotLimits, SlotManager, VcpusPaused};
pub use zones::{CoalescedZones, ZoneError, ZoneHandle, ZoneSupport};

/// Bytes of a page of the host: what slots and their memory are aligned to.
#[must_use]
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// The code in the README is compiled with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
