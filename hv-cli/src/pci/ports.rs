//! How the guest reaches the bus: the configuration ports, ECAM, and the windows of the BARs, as
//! devices of the machine's [`Bus`](crate::machine::bus::Bus).

use std::sync::Arc;

use super::PciBus;
use crate::machine::bus::Device;

/// The ports 0xcf8 to 0xcff: the address of a register and the register (PCI Local Bus Specification
/// 3.0, 3.2.2.3.2). Only bus 0 has devices.
///
/// The address is a register of 32 bits and answers to no other access; so a byte at 0xcf9 belongs to
/// another device, which is given.
pub struct ConfigPorts<D> {
    bus: Arc<PciBus>,
    address: u32,
    /// Who has the port 0xcf9.
    reset: D,
}

const ADDRESS: u64 = 0;
const RESET: u64 = 1;
const DATA: u64 = 4;

/// Bits of the address: 31 enables, 23 to 16 are the bus, 15 to 11 the device, 10 to 8 the function.
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = 0x80ff_fffc;

impl<D: Device> ConfigPorts<D> {
    /// The ports of a bus, and the device at port 0xcf9 among them.
    #[must_use]
    pub fn new(bus: Arc<PciBus>, reset: D) -> Self {
        Self { bus, address: 0, reset }
    }

    /// Where in ECAM the register is that the address names.
    fn ecam(&self, offset: u64) -> Option<u64> {
        let bus = self.address >> 16 & 0xff;
        if self.address & ENABLE == 0 || bus != 0 {
            return None;
        }
        let function = u64::from(self.address >> 8 & 0xff);
        Some(function << 12 | u64::from(self.address & 0xfc) | (offset - DATA))
    }
}

impl<D: Device> Device for ConfigPorts<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data.len()) {
            (ADDRESS, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (RESET, 1) => self.reset.read(0, data),
            (DATA.., 1..=4) => {
                if let Some(ecam) = self.ecam(offset) {
                    self.bus.config_read(ecam, data);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (ADDRESS, &[a, b, c, d]) => {
                self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS;
            }
            (RESET, [_]) => self.reset.write(0, data),
            (DATA.., [_, ..]) => {
                if let Some(ecam) = self.ecam(offset) {
                    self.bus.config_write(ecam, data);
                }
            }
            _ => {}
        }
    }
}

/// The memory of the enhanced configuration access mechanism, for bus 0: 4 KiB a function.
pub struct Ecam(Arc<PciBus>);

impl Ecam {
    /// Bytes of one bus.
    pub const SIZE: u64 = 1 << 20;

    /// That of a bus.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self(bus)
    }
}

impl Device for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.config_write(offset, data);
    }
}

/// A window of BARs.
pub struct Window {
    bus: Arc<PciBus>,
    start: u64,
}

impl Window {
    /// The window of a bus that starts at an address.
    #[must_use]
    pub fn new(bus: Arc<PciBus>, start: u64) -> Self {
        Self { bus, start }
    }
}

impl Device for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.bus.memory_read(self.start.saturating_add(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.bus.memory_write(self.start.saturating_add(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Windows;

    #[derive(Default)]
    struct Reset(Vec<Vec<u8>>);

    impl Device for Reset {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(0x55);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0.push(data.to_vec());
        }
    }

    fn ports() -> ConfigPorts<Reset> {
        let windows = Windows { low: 0xc000_0000..0xd000_0000, high: None };
        ConfigPorts::new(Arc::new(PciBus::new(windows)), Reset::default())
    }

    fn read(ports: &mut ConfigPorts<Reset>, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        ports.read(offset, &mut data);
        data
    }

    #[test]
    fn registers_are_read_and_written_in_parts() {
        let mut ports = ports();
        ports.write(0, &0xff00_0000u32.to_le_bytes());
        assert_eq!(read(&mut ports, 0, 4), 0x8000_0000u32.to_le_bytes());
        assert_eq!(read(&mut ports, 4, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(read(&mut ports, 6, 2), [0x08, 0x00]);
        assert_eq!(read(&mut ports, 5, 1), [0x1b]);
        ports.write(0, &0x8000_003cu32.to_le_bytes());
        ports.write(4, &[0x0b]);
        assert_eq!(read(&mut ports, 4, 4), [0x0b, 0, 0, 0]);
    }

    #[test]
    fn nobody_answers_ones() {
        let mut ports = ports();
        for address in [0, 0x8001_0000, 0x8000_0800, 0x8000_0100] {
            ports.write(0, &u32::to_le_bytes(address));
            assert_eq!(read(&mut ports, 4, 4), [0xff; 4], "{address:#x}");
            ports.write(4, &[1, 2, 3, 4]);
        }
    }

    #[test]
    fn only_whole_accesses_reach_the_address_and_only_bytes_the_reset_port() {
        let mut ports = ports();
        ports.write(0, &0x8000_0010u32.to_le_bytes());
        for data in [&[1][..], &[1, 2], &[]] {
            ports.write(0, data);
        }
        ports.write(1, &[1, 2]);
        ports.write(3, &[1]);
        assert_eq!(read(&mut ports, 0, 4), 0x8000_0010u32.to_le_bytes());
        for (offset, len) in [(0, 1), (0, 2), (1, 2), (2, 1), (3, 4), (4, 5), (4, 0)] {
            assert_eq!(read(&mut ports, offset, len), vec![0xff; len]);
        }
        assert_eq!(read(&mut ports, 1, 1), [0x55]);
        ports.write(1, &[6]);
        assert_eq!(ports.reset.0, [vec![6]]);
    }
}
