//! ioeventfds as plain data (`KVM_IOEVENTFD`).

use crate::{EventFd, IoAddress};

/// A guest write that signals an eventfd instead of leaving the kernel.
///
/// All of it identifies the event: deassigning needs the same address, length, value and eventfd.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IoEvent {
    /// Where the guest writes.
    pub address: IoAddress,
    /// Bytes of the access: 1, 2, 4 or 8, or 0 for any (without a value).
    pub length: u32,
    /// The value that must be written; any if `None`.
    pub datamatch: Option<u64>,
    /// The eventfd that is signalled.
    pub event: EventFd,
}
