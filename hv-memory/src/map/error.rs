//! Why an address map can't be changed, and why a change did not arrive at KVM.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestAddress;

use super::RegionId;
use crate::{GuestRange, SlotError};

/// Why an edit is refused. The map, and the VM if it has one, are as they were before.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AddressMapError {
    /// The region has no bytes.
    #[error("region {name:?} has no bytes")]
    Empty {
        /// Its name.
        name: Arc<str>,
    },
    /// The region would pass the last 64-bit address.
    #[error("region {name:?} of {len:#x} bytes at {:#x} passes the last address", .guest.0)]
    Wraps {
        /// Its name.
        name: Arc<str>,
        /// Where it was to begin.
        guest: GuestAddress,
        /// Its bytes.
        len: u64,
    },
    /// The guest's processor has no such addresses.
    #[error("region {name:?} at {range} is beyond the {address_bits} physical address bits")]
    BeyondAddressBits {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// Physical address bits.
        address_bits: u8,
    },
    /// Another region of the same priority is there.
    #[error(
        "region {name:?} at {range} overlaps {other:?} at {other_range}, and both have priority \
         {priority}: which of them is seen?"
    )]
    Overlap {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// The name of what is there.
        other: Arc<str>,
        /// Where that is.
        other_range: GuestRange,
        /// The priority of both.
        priority: i32,
    },
    /// Guest and host address lie differently in their pages, so that no page of the one is a page
    /// of the other.
    #[error(
        "region {name:?} at {range} shows memory at host address {host:#x}: both must begin at the \
         same offset in a page of {page:#x} bytes"
    )]
    Unaligned {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// The host address of its first byte.
        host: u64,
        /// Bytes of a page of the host.
        page: u64,
    },
    /// An alias would show what its target does not have.
    #[error(
        "alias {name:?} shows {len:#x} bytes from offset {offset:#x} of {target:?}, which has \
         {target_len:#x}"
    )]
    OutsideTarget {
        /// Its name.
        name: Arc<str>,
        /// The first byte it shows.
        offset: u64,
        /// How many bytes it shows.
        len: u64,
        /// The name of its target.
        target: Arc<str>,
        /// How many bytes that has.
        target_len: u64,
    },
    /// An alias would show itself.
    #[error("alias {name:?} can't show {target:?}, which shows {name:?}")]
    AliasCycle {
        /// Its name.
        name: Arc<str>,
        /// The name of what it was to show.
        target: Arc<str>,
    },
    /// Aliases of aliases, too many.
    #[error("alias {name:?} of {target:?} would make more than {most} aliases of aliases")]
    TooDeep {
        /// Its name.
        name: Arc<str>,
        /// The name of what it was to show.
        target: Arc<str>,
        /// How many there can be from a region to what it shows in the end.
        most: usize,
    },
    /// The region is still seen through an alias.
    #[error("region {name:?} can't be removed: alias {alias:?} shows it")]
    InUse {
        /// Its name.
        name: Arc<str>,
        /// The name of an alias of it.
        alias: Arc<str>,
    },
    /// Only an alias has a target.
    #[error("region {name:?} is no alias: it can't show another region")]
    NotAnAlias {
        /// Its name.
        name: Arc<str>,
    },
    /// There is no such region, or no more.
    #[error("the address map has no region {0}")]
    NoSuchRegion(RegionId),
    /// The VM has no readonly slots.
    #[error(
        "region {name:?} at {range} can't be readonly: this host has no KVM_CAP_READONLY_MEM; make \
         it writable, or a device that answers reads"
    )]
    NoReadonlySlots {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
    },
    /// The VM has too few slots.
    #[error(
        "the address map needs {needed} more slots, from {name:?} at {range} on, and {available} \
         are free"
    )]
    TooManySlots {
        /// The name of the first memory that would get a slot.
        name: Arc<str>,
        /// Where that is.
        range: GuestRange,
        /// How many more it takes.
        needed: usize,
        /// How many can be had (`KVM_CAP_NR_MEMSLOTS` less those in use).
        available: usize,
    },
}

/// Why a change of the map did not arrive at KVM. The map is as it was before the edit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CommitError {
    /// An operation failed, and those before it were undone: the guest has what it had.
    #[error("the guest's memory is as it was: {0}")]
    Refused(#[source] SlotError),
    /// An operation failed, and undoing those before it did, too: the guest has not the memory of
    /// the map. [`crate::LiveMap::unsettled`] says where, and the next commit repairs it.
    #[error(
        "the guest's memory differs from its map at {}: {error}; undoing that: {rollback}",
        Ranges(.ranges)
    )]
    RollbackFailed {
        /// What failed first.
        error: SlotError,
        /// What failed first when that was undone.
        rollback: Box<SlotError>,
        /// Where slots may differ from the map.
        ranges: Vec<GuestRange>,
    },
}

/// Ranges one after the other.
struct Ranges<'a>(&'a [GuestRange]);

impl std::fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, range) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            write!(f, "{comma}{range}")?;
        }
        Ok(())
    }
}
