//! ioeventfds (`KVM_IOEVENTFD`).

use super::{Device, Io};
use crate::{Errno, IoEvent};

/// An ioeventfd, with what tells its eventfd from others.
#[derive(Debug)]
pub(super) struct Doorbell {
    pub(super) event: IoEvent,
    /// Two descriptors of one eventfd are the same to KVM.
    eventfd: u64,
}

impl Doorbell {
    /// `EINVAL` if the descriptor is no eventfd.
    fn new(event: &IoEvent) -> Result<Self, Errno> {
        let eventfd = event.event.id().ok_or(Errno::EINVAL)?;
        Ok(Self { event: event.clone(), eventfd })
    }

    /// Whether a write to its address is for it.
    pub(super) fn rings_for(&self, data: &[u8]) -> bool {
        let IoEvent { length, datamatch, .. } = self.event;
        match (length, datamatch) {
            (0, _) => true,
            _ if length as usize != data.len() => false,
            (_, None) => true,
            // A value wider than the write is allowed and never written.
            (_, Some(value)) => little_endian(data) == value,
        }
    }

    /// Whether KVM takes the two for the same: any length and any value cover all others.
    fn covers(&self, other: &Self) -> bool {
        let (a, b) = (&self.event, &other.event);
        let value = a.datamatch.is_none() || b.datamatch.is_none() || a.datamatch == b.datamatch;
        let write = a.length == 0 || b.length == 0 || (a.length == b.length && value);
        a.address == b.address && write
    }

    fn is(&self, other: &Self) -> bool {
        let (a, b) = (&self.event, &other.event);
        (a.address, a.length, a.datamatch, self.eventfd)
            == (b.address, b.length, b.datamatch, other.eventfd)
    }
}

fn little_endian(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Io {
    /// `KVM_IOEVENTFD`. Linux has no limit for them, only one for chips and zones, which holds up
    /// ioeventfds as well once it is reached.
    pub(in crate::fake) fn assign(&mut self, event: &IoEvent) -> Result<(), Errno> {
        let IoEvent { address, length, datamatch, .. } = *event;
        let possible = match length {
            0 => self.limits.any_length && datamatch.is_none(),
            1 | 2 | 4 | 8 => true,
            _ => false,
        };
        // The address after the last byte has to be one, so the last 8 bytes of all have no
        // ioeventfd of length 8. Port 0xffff has one of length 2.
        if !possible || address.value().checked_add(length.into()).is_none() {
            return Err(Errno::EINVAL);
        }
        let doorbell = Doorbell::new(event)?;
        if self.doorbells().any(|other| other.covers(&doorbell)) {
            return Err(Errno::EEXIST);
        }
        self.add(address, length, Device::Event(doorbell))
    }

    /// `KVM_IOEVENTFD` with `KVM_IOEVENTFD_FLAG_DEASSIGN`.
    pub(in crate::fake) fn deassign(&mut self, event: &IoEvent) -> Result<(), Errno> {
        let wanted = Doorbell::new(event)?;
        if !self.doorbells().any(|doorbell| doorbell.is(&wanted)) {
            return Err(Errno::ENOENT);
        }
        self.bus(event.address)
            .retain(|device| !matches!(device, Device::Event(doorbell) if doorbell.is(&wanted)));
        Ok(())
    }

    /// The ioeventfds: those at addresses, then those at ports, in the order of the bus.
    pub(in crate::fake) fn ioevents(&self) -> Vec<IoEvent> {
        self.doorbells().map(|doorbell| doorbell.event.clone()).collect()
    }

    fn doorbells(&self) -> impl Iterator<Item = &Doorbell> {
        self.devices().filter_map(|device| match device {
            Device::Event(doorbell) => Some(doorbell),
            _ => None,
        })
    }
}
