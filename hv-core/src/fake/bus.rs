//! Where a guest's access goes: memory, a chip of the kernel, an ioeventfd, a coalesced zone, or out
//! to the VMM.

use super::io::Taken;
use super::memory;
use super::state::State;
use crate::IoAddress;

const PAGE: u64 = 4096;
/// The page of the local APIC, which comes before memory and buses.
const LOCAL_APIC: u64 = 0xfee0_0000;
/// The most of a string instruction that one exit has: a page.
const MAX_STRING: usize = 4096;

/// What became of a guest's write. Of a write in several pieces, the last in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Wrote {
    /// It is in the memory of a slot.
    Memory,
    /// A chip of the kernel took it.
    Chip,
    /// A coalesced zone collected it.
    Collected,
    /// It signalled an ioeventfd.
    Signalled,
    /// Nobody in the kernel takes it: it ends the run with an exit.
    Exit,
}

/// The first piece of an access, as a processor would make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece<T> {
    /// Its bytes.
    pub(super) len: usize,
    /// Bytes of each of its accesses: less than `len` for a string to a port.
    pub(super) unit: usize,
    /// What became of it.
    pub(super) result: T,
}

/// Bytes of each access of `len` bytes to a port.
fn port_unit(len: usize) -> usize {
    if matches!(len, 1 | 2 | 4) { len } else { 1 }
}

/// Bytes up to the end of the page.
fn in_page(address: u64, len: usize) -> usize {
    let rest = PAGE - address % PAGE;
    usize::try_from(rest).map_or(len, |rest| rest.min(len))
}

fn is_local_apic(address: u64) -> bool {
    address & !(PAGE - 1) == LOCAL_APIC
}

impl State {
    /// The first piece of a write by vCPU `id`. In split mode, a store to the local APIC may have
    /// ended an interrupt of the VMM's I/O APIC: see `take_ioapic_eoi` of the interrupt half.
    pub(super) fn write(&mut self, id: u32, address: IoAddress, data: &[u8]) -> Piece<Wrote> {
        match address {
            IoAddress::Mmio(gpa) => self.write_page(id, gpa, data),
            IoAddress::Pio(_) => {
                let unit = port_unit(data.len());
                let data = data.get(..data.len().min(MAX_STRING)).unwrap_or_default();
                let mut units = data.chunks(unit);
                let first = units.next().map_or(Wrote::Exit, |unit| self.offer(id, address, unit));
                // KVM decides by the first access whether a string leaves the kernel; of the rest it
                // drops what nobody takes.
                if first != Wrote::Exit {
                    for unit in units {
                        self.offer(id, address, unit);
                    }
                }
                Piece { len: data.len(), unit, result: first }
            }
        }
    }

    fn write_page(&mut self, id: u32, gpa: u64, data: &[u8]) -> Piece<Wrote> {
        let page = data.get(..in_page(gpa, data.len())).unwrap_or_default();
        let local_apic = is_local_apic(gpa) && self.has_irqchip();
        if !local_apic && self.memory.write(id, gpa, page) == memory::Wrote::Memory {
            return Piece { len: page.len(), unit: page.len(), result: Wrote::Memory };
        }
        let data = page.get(..page.len().min(8)).unwrap_or_default();
        let result = match local_apic && self.irq.mmio_write(id, gpa, data) {
            true => Wrote::Chip,
            false => self.offer(id, IoAddress::Mmio(gpa), data),
        };
        Piece { len: data.len(), unit: data.len(), result }
    }

    /// Offers one access to the devices of its bus.
    fn offer(&mut self, id: u32, address: IoAddress, data: &[u8]) -> Wrote {
        match self.io.write(address, data) {
            Taken::Event => Wrote::Signalled,
            Taken::Zone => Wrote::Collected,
            Taken::Nobody => Wrote::Exit,
            // On a bus an access that wraps is at every device below it; the chip says no.
            Taken::Chip => {
                let took = match address {
                    IoAddress::Mmio(gpa) => self.irq.mmio_write(id, gpa, data),
                    IoAddress::Pio(port) => {
                        self.irq.port_write(port, data) || self.is_timer_port(port)
                    }
                };
                if took { Wrote::Chip } else { Wrote::Exit }
            }
        }
    }

    /// The first piece of a read by vCPU `id`: what it read, or none if the VMM has to say.
    pub(super) fn read(
        &mut self,
        id: u32,
        address: IoAddress,
        len: usize,
    ) -> Piece<Option<Vec<u8>>> {
        match address {
            IoAddress::Mmio(gpa) => {
                let mut data = vec![0; in_page(gpa, len)];
                let apic = is_local_apic(gpa) && self.has_irqchip();
                if !apic && self.memory.read(gpa, &mut data) {
                    return Piece { len: data.len(), unit: data.len(), result: Some(data) };
                }
                data.truncate(8);
                let served = self.irq.mmio_read(id, gpa, &mut data);
                Piece { len: data.len(), unit: data.len(), result: served.then_some(data) }
            }
            IoAddress::Pio(port) => {
                let unit = port_unit(len);
                let mut data = vec![0; len.min(MAX_STRING)];
                let served = data.chunks_mut(unit).all(|unit| self.read_port(port, unit));
                Piece { len: data.len(), unit, result: served.then_some(data) }
            }
        }
    }

    /// A port of a chip. The timer's read as 0.
    fn read_port(&mut self, port: u16, data: &mut [u8]) -> bool {
        self.irq.port_read(port, data) || self.is_timer_port(port)
    }

    fn is_timer_port(&self, port: u16) -> bool {
        self.pit.is_some() && matches!(port, 0x40..=0x43) || self.speaker && port == 0x61
    }
}
