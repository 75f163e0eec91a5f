//! Why memory can't be given to a guest.

use std::sync::Arc;

use hv_core::SlotId;
use thiserror::Error;
use vm_memory::GuestAddress;

use crate::GuestRange;

/// Why a slot can't be made, moved or removed. The slots are as they were before.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SlotError {
    /// The memory has no bytes.
    #[error("memory {name:?} has no bytes")]
    Empty {
        /// Its name.
        name: Arc<str>,
    },
    /// The range would pass the last 64-bit address.
    #[error("memory {name:?} of {len:#x} bytes at {:#x} passes the last address", .guest.0)]
    Wraps {
        /// Its name.
        name: Arc<str>,
        /// Where it was to begin.
        guest: GuestAddress,
        /// Its bytes.
        len: u64,
    },
    /// The guest address, the size or the host address is not page-aligned.
    #[error(
        "memory {name:?} at {range}, host address {host:#x}, is not aligned to pages of {page} bytes"
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
    /// KVM has a limit of pages in one slot.
    #[error("memory {name:?} at {range} is more than the {most:#x} bytes of one slot: split it")]
    TooLarge {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// The most bytes of a slot.
        most: u64,
    },
    /// The guest's processor has no such addresses.
    #[error("memory {name:?} at {range} is beyond the {address_bits} physical address bits")]
    BeyondAddressBits {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// Physical address bits.
        address_bits: u8,
    },
    /// Other memory is there.
    #[error("memory {name:?} at {range} overlaps {other:?} at {other_range}")]
    Overlap {
        /// Its name.
        name: Arc<str>,
        /// Where it was to be.
        range: GuestRange,
        /// The name of what is there.
        other: Arc<str>,
        /// Where that is.
        other_range: GuestRange,
    },
    /// Every slot is in use.
    #[error("no slot is free for memory {name:?}: KVM has {limit}, and all are in use")]
    NoFreeSlot {
        /// Its name.
        name: Arc<str>,
        /// How many slots there are (`KVM_CAP_NR_MEMSLOTS`).
        limit: u32,
    },
    /// An adopted slot has a number KVM can't have given it.
    #[error("memory {name:?} can't have slot {id}: KVM has slots below {limit}")]
    IdBeyondLimit {
        /// Its name.
        name: Arc<str>,
        /// The slot.
        id: SlotId,
        /// How many slots there are.
        limit: u32,
    },
    /// An adopted slot has the number of another one.
    #[error("memory {name:?} can't have slot {id}: another slot has it")]
    IdInUse {
        /// Its name.
        name: Arc<str>,
        /// The slot.
        id: SlotId,
    },
    /// The manager of the slot is gone, and with it most likely the VM.
    #[error("slot {0} is left to its VM: its manager is gone")]
    ManagerGone(SlotId),
    /// What the guest has written could not be read from the slot's log, and would be forgotten.
    #[error("memory {name:?} stays as it is, because its dirty pages can't be read: {error}")]
    DirtyLog {
        /// Its name.
        name: Arc<str>,
        /// KVM's answer.
        error: hv_core::Error,
    },
    /// KVM refused.
    #[error("memory {name:?}: {error}")]
    Kvm {
        /// The name of the memory.
        name: Arc<str>,
        /// What KVM said.
        error: hv_core::Error,
    },
}
