//! The MMIO and the port bus of a VM: where a guest's writes meet ioeventfds, coalesced zones and
//! the registers of chips.
//!
//! They are together because their order on the bus decides who gets a write. What chips do is
//! not known here; local APICs are no part of a bus and come before it.

mod bus;
mod ioevents;
mod zones;

use std::collections::VecDeque;

use crate::{CoalescedWrite, CoalescedZone, Errno, IoAddress};
use bus::{Bus, Span};
use ioevents::Doorbell;

/// What a host's KVM allows.
#[derive(Debug, Clone, Copy)]
pub(in crate::fake) struct IoLimits {
    /// Chips and zones a bus can have (`NR_IOBUS_DEVS`). ioeventfds don't count.
    pub(in crate::fake) devices: usize,
    /// `KVM_CAP_IOEVENTFD_ANY_LENGTH`.
    pub(in crate::fake) any_length: bool,
    /// `KVM_CAP_COALESCED_PIO`.
    pub(in crate::fake) ports: bool,
}

/// Who took a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::fake) enum Taken {
    /// An ioeventfd, whose eventfd has been signalled.
    Event,
    /// A coalesced zone: it is in the ring.
    Zone,
    /// The registers of a chip are there, which has yet to be told.
    Chip,
    /// Nobody: it ends the run.
    Nobody,
}

/// Who is at an address.
#[derive(Debug)]
enum Device {
    Event(Doorbell),
    Zone(CoalescedZone),
    Chip,
}

/// The buses of a VM.
#[derive(Debug)]
pub(in crate::fake) struct Io {
    limits: IoLimits,
    mmio: Bus<Device>,
    ports: Bus<Device>,
    /// What zones have collected, for both buses.
    ring: VecDeque<CoalescedWrite>,
}

impl Io {
    pub(in crate::fake) fn new(limits: IoLimits) -> Self {
        Self { limits, mmio: Bus::default(), ports: Bus::default(), ring: VecDeque::new() }
    }

    /// Puts the registers of chips on their buses, with their bytes: all, or none and `ENOSPC` if a
    /// bus is full.
    pub(in crate::fake) fn plug(&mut self, registers: &[(IoAddress, u32)]) -> Result<(), Errno> {
        let ports = registers.iter().filter(|(at, _)| matches!(at, IoAddress::Pio(_))).count();
        let fits = |there: &Bus<Device>, more: usize| counted(there) + more <= self.limits.devices;
        if !fits(&self.ports, ports) || !fits(&self.mmio, registers.len() - ports) {
            return Err(Errno::ENOSPC);
        }
        for &(address, len) in registers {
            self.bus(address).add(Span { start: address.value(), len }, Device::Chip);
        }
        Ok(())
    }

    /// A guest writes, at most 8 bytes, where no memory is that can be written.
    pub(in crate::fake) fn write(&mut self, address: IoAddress, data: &[u8]) -> Taken {
        // More is none of KVM's: it cuts what is longer.
        let Some(len) = u32::try_from(data.len()).ok().filter(|len| (1..=8).contains(len)) else {
            return Taken::Nobody;
        };
        let bus = match address {
            IoAddress::Mmio(_) => &self.mmio,
            IoAddress::Pio(_) => &self.ports,
        };
        // The first that takes it: an ioeventfd for other data leaves it to the next.
        for device in bus.at(Span { start: address.value(), len }) {
            match device {
                Device::Event(doorbell) if doorbell.rings_for(data) => {
                    doorbell.event.event.signal();
                    return Taken::Event;
                }
                Device::Zone(zone) if zones::collects(zone, address.value(), len) => {
                    let write = CoalescedWrite::new(address, data);
                    if let Some(write) = write.filter(|_| zones::has_room(&self.ring)) {
                        self.ring.push_back(write);
                        return Taken::Zone;
                    }
                }
                Device::Chip => return Taken::Chip,
                Device::Event(_) | Device::Zone(_) => {}
            }
        }
        Taken::Nobody
    }

    fn add(&mut self, address: IoAddress, len: u32, device: Device) -> Result<(), Errno> {
        let limit = self.limits.devices;
        let bus = self.bus(address);
        if counted(bus) >= limit {
            return Err(Errno::ENOSPC);
        }
        bus.add(Span { start: address.value(), len }, device);
        Ok(())
    }

    fn bus(&mut self, address: IoAddress) -> &mut Bus<Device> {
        match address {
            IoAddress::Mmio(_) => &mut self.mmio,
            IoAddress::Pio(_) => &mut self.ports,
        }
    }

    fn devices(&self) -> impl Iterator<Item = &Device> {
        self.mmio.devices().chain(self.ports.devices())
    }
}

/// The devices of a bus that the limit is about.
fn counted(bus: &Bus<Device>) -> usize {
    bus.devices().filter(|device| !matches!(device, Device::Event(_))).count()
}

#[cfg(test)]
mod tests;
