//! `testdev`: what multiboot test kernels such as kvm-unit-tests expect of a machine.
//!
//! Four small devices: a latch, a port that takes a page away and gives it back, the interrupt
//! lines as ports, and memory that is not RAM.

use crate::machine::bus::Device;

/// Ports 0xe0 to 0xe3: accesses of 1, 2 and 4 bytes read back what was written.
#[derive(Default)]
pub struct Latch([u8; 4]);

impl Device for Latch {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|o| self.0.get(o..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let to = usize::try_from(offset).ok().and_then(|o| self.0.get_mut(o..));
        for (to, from) in to.unwrap_or_default().iter_mut().zip(data) {
            *to = *from;
        }
    }
}

/// Takes the host page behind a guest address away and gives it back.
pub trait PageRemap: Send {
    /// Unmaps and remaps the page at this guest-physical address. One that is not RAM is ignored.
    fn remap(&mut self, guest: u64);
}

/// Port 0xe4: a 4-byte write names the guest-physical address of a page to remap.
impl Device for Box<dyn PageRemap> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Ok(address) = <[u8; 4]>::try_from(data) {
            self.remap(u64::from(u32::from_le_bytes(address)));
        }
    }
}

/// The level of every interrupt line of the machine.
pub trait IrqLines: Send {
    /// Sets line `gsi` high or low.
    fn set(&mut self, gsi: u32, level: bool);
}

/// Ports 0x2000 to 0x2017: writing 0 or 1 to port n sets interrupt line n.
pub struct SetIrq(Box<dyn IrqLines>);

impl SetIrq {
    /// Interrupt lines in this many ports.
    pub const LINES: u64 = 24;

    /// Ports that set `lines`.
    #[must_use]
    pub fn new(lines: Box<dyn IrqLines>) -> Self {
        Self(lines)
    }
}

impl Device for SetIrq {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(gsi), [level, ..]) = (u32::try_from(offset), data) {
            self.0.set(gsi, level & 1 != 0);
        }
    }
}

/// 64 KiB at 0xff000000 that remember what was written, by MMIO exits.
pub struct Scratch(Box<[u8]>);

impl Scratch {
    /// Bytes.
    pub const SIZE: u64 = 64 << 10;
}

impl Default for Scratch {
    fn default() -> Self {
        Self(vec![0; Self::SIZE as usize].into_boxed_slice())
    }
}

impl Device for Scratch {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|o| self.0.get(o..)).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let to = usize::try_from(offset).ok().and_then(|o| self.0.get_mut(o..));
        for (to, from) in to.unwrap_or_default().iter_mut().zip(data) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_latch_keeps_each_width() {
        let mut latch = Latch::default();
        latch.write(0, &[1, 2, 3, 4]);
        latch.write(0, &[9]);
        let mut data = [0; 4];
        latch.read(0, &mut data);
        assert_eq!(data, [9, 2, 3, 4]);
        let mut data = [0; 2];
        latch.read(0, &mut data);
        assert_eq!(data, [9, 2]);
        latch.read(1, &mut data);
        assert_eq!(data, [2, 3]);
        latch.write(3, &[7]);
        latch.read(2, &mut data);
        assert_eq!(data, [3, 7]);
    }

    #[test]
    fn scratch_remembers_and_has_an_end() {
        let mut scratch = Scratch::default();
        scratch.write(Scratch::SIZE - 2, &[1, 2, 3, 4]);
        let mut data = [0; 4];
        scratch.read(Scratch::SIZE - 2, &mut data);
        assert_eq!(data, [1, 2, 0, 0]);
        scratch.read(u64::MAX, &mut data);
        scratch.write(u64::MAX, &data);
    }

    #[test]
    fn lines_are_set_by_port() {
        struct Lines(Arc<Mutex<Vec<(u32, bool)>>>);
        impl IrqLines for Lines {
            fn set(&mut self, gsi: u32, level: bool) {
                self.0.lock().unwrap().push((gsi, level));
            }
        }
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut ports = SetIrq::new(Box::new(Lines(log.clone())));
        ports.write(5, &[1]);
        ports.write(5, &[0]);
        ports.write(23, &[3]);
        assert_eq!(*log.lock().unwrap(), [(5, true), (5, false), (23, true)]);
    }

    #[test]
    fn only_a_long_write_remaps() {
        struct Pages(Arc<Mutex<Vec<u64>>>);
        impl PageRemap for Pages {
            fn remap(&mut self, guest: u64) {
                self.0.lock().unwrap().push(guest);
            }
        }
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut port: Box<dyn PageRemap> = Box::new(Pages(log.clone()));
        port.write(0, &[1]);
        port.write(0, &0x0080_1000u32.to_le_bytes());
        assert_eq!(*log.lock().unwrap(), [0x0080_1000]);
    }
}
