//! What was seen during one check, by the guest and by the host.
//!
//! Collected only; [`super::judge`] decides what it means. The guest can't make it grow without
//! bound.

use hv_core::MsiStatus;
use hv_irq::RouterError;

/// Where an access went: a port or an MMIO register, by its offset in the check device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Port(u16),
    Mmio(u64),
}

/// One access that reached the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) is_write: bool,
    pub(super) place: Place,
    pub(super) len: usize,
    pub(super) value: u64,
}

impl Access {
    pub(super) fn read(place: Place, len: usize, value: u64) -> Self {
        Self { is_write: false, place, len, value }
    }

    pub(super) fn write(place: Place, len: usize, value: u64) -> Self {
        Self { is_write: true, place, len, value }
    }
}

/// What became of an interrupt the guest asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sent {
    /// By `KVM_SIGNAL_MSI`.
    Message(Result<MsiStatus, RouterError>),
    /// By a write to the eventfd of the irqfd.
    Event(Result<(), std::io::ErrorKind>),
}

/// An exception in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) vector: u32,
    pub(super) error_code: u32,
    pub(super) rip: u32,
    pub(super) cr2: u32,
}

/// Of everything the guest can repeat, this many are kept: more than any check needs.
const LIMIT: usize = 256;

/// Everything seen during one check.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Accesses to the registers whose use is the check.
    pub(super) accesses: Vec<Access>,
    /// What the guest reported.
    pub(super) values: Vec<u32>,
    /// What came out of COM1.
    pub(super) com1: Vec<u8>,
    /// The interrupt that was asked for.
    pub(super) sent: Option<Sent>,
    /// How often the doorbell's eventfd was signalled.
    pub(super) doorbell: u64,
    /// What the host finds where the guest wrote to the read-only page.
    pub(super) rom: Option<u64>,
    /// The exception that ended it.
    pub(super) fault: Option<Fault>,
    /// Something was dropped because there was too much of it.
    pub(super) overflow: bool,
}

impl Evidence {
    pub(super) fn add_access(&mut self, access: Access) {
        push(&mut self.accesses, access, &mut self.overflow);
    }

    pub(super) fn add_value(&mut self, value: u32) {
        push(&mut self.values, value, &mut self.overflow);
    }

    pub(super) fn add_com1(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            push(&mut self.com1, byte, &mut self.overflow);
        }
    }
}

fn push<T>(list: &mut Vec<T>, item: T, overflow: &mut bool) {
    if list.len() < LIMIT {
        list.push(item);
    } else {
        *overflow = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_goes_on_and_on_fills_no_memory() {
        let mut evidence = Evidence::default();
        for n in 0..LIMIT as u32 {
            evidence.add_value(n);
        }
        assert!(!evidence.overflow);
        evidence.add_value(0);
        assert!(evidence.overflow);
        evidence.add_com1(&[0; 10_000]);
        assert_eq!((evidence.values.len(), evidence.com1.len()), (LIMIT, LIMIT));
    }
}
