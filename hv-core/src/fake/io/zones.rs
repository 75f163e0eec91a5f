//! Coalesced zones (`KVM_REGISTER_COALESCED_MMIO`) and the ring they fill.
//!
//! The ring is a page of the VM; a VMM empties it before it handles an exit. A ring that nobody
//! empties fills, and then writes end the run as if there were no zone.

use std::collections::VecDeque;

use super::{Device, Io};
use crate::{CoalescedWrite, CoalescedZone, Errno, IoAddress};

/// Writes the ring can hold: entries of 24 bytes in a page after two indices, one of them always
/// free.
const RING: usize = (4096 - 8) / 24 - 1;

pub(super) fn has_room(ring: &VecDeque<CoalescedWrite>) -> bool {
    ring.len() < RING
}

/// Whether all of an access is inside a zone. KVM counts its bytes with a sign, and the end of a
/// zone wraps.
pub(super) fn collects(zone: &CoalescedZone, address: u64, len: u32) -> bool {
    let end = address.checked_add(len.into()).filter(|_| i32::try_from(len).is_ok());
    let zone_end = zone.address.value().wrapping_add(zone.size.into());
    address >= zone.address.value() && end.is_some_and(|end| end <= zone_end)
}

impl Io {
    /// `KVM_REGISTER_COALESCED_MMIO`. The same zone can be there twice.
    pub(in crate::fake) fn register(&mut self, zone: CoalescedZone) -> Result<(), Errno> {
        let zone = self.understood(zone);
        self.add(zone.address, zone.size, Device::Zone(zone))
    }

    /// `KVM_UNREGISTER_COALESCED_MMIO`: all zones go that *contain* the range, so a part of a zone
    /// ends it, and a range around zones ends none.
    pub(in crate::fake) fn unregister(&mut self, range: CoalescedZone) -> Result<(), Errno> {
        let CoalescedZone { address, size } = self.understood(range);
        self.bus(address).retain(
            |device| !matches!(device, Device::Zone(zone) if collects(zone, address.value(), size)),
        );
        Ok(())
    }

    /// The zones: those at addresses, then those at ports, in the order of the bus.
    pub(in crate::fake) fn zones(&self) -> Vec<CoalescedZone> {
        self.devices()
            .filter_map(|device| match device {
                Device::Zone(zone) => Some(*zone),
                _ => None,
            })
            .collect()
    }

    /// What is in the ring, in order.
    pub(in crate::fake) fn collected(&self) -> impl ExactSizeIterator<Item = &CoalescedWrite> {
        self.ring.iter()
    }

    pub(in crate::fake) fn has_collected(&self) -> bool {
        !self.ring.is_empty()
    }

    /// Takes the oldest write out of the ring, as a VMM does.
    pub(in crate::fake) fn take_collected(&mut self) -> Option<CoalescedWrite> {
        self.ring.pop_front()
    }

    /// A kernel that does not know of ports takes them for addresses: the field that says so was
    /// padding.
    fn understood(&self, zone: CoalescedZone) -> CoalescedZone {
        let address = match zone.address {
            IoAddress::Pio(port) if !self.limits.ports => IoAddress::Mmio(port.into()),
            address => address,
        };
        CoalescedZone { address, ..zone }
    }
}
