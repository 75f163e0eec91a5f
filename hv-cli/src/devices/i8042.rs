//! The keyboard controller, as far as kernels need one: its reset line.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use crate::exit_code::StopReason;
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

struct Reset(Stopper);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.stop(StopReason::Reset);
        Ok(())
    }
}

/// An i8042 without keyboard or mouse, on ports 0x60 to 0x64: command 0xfe resets the machine.
pub struct I8042(I8042Device<Reset>);

impl I8042 {
    /// A controller whose reset line is wired to `stopper`.
    #[must_use]
    pub fn new(stopper: Stopper) -> Self {
        Self(I8042Device::new(Reset(stopper)))
    }
}

/// Offset of the data port and of the status and command port.
const DATA: u64 = 0;
const COMMAND: u64 = 4;

impl Device for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Ports 0x61 to 0x63 belong to nobody here (0x61 is the in-kernel PIT's).
        data.fill(0xff);
        if let (DATA | COMMAND, [byte]) = (offset, data) {
            *byte = self.0.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (DATA | COMMAND, [byte, ..]) = (offset, data) {
            let Ok(()) = self.0.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    #[test]
    fn only_the_reset_command_resets() {
        let stopper = Stopper::new(Event::new().unwrap());
        let mut i8042 = I8042::new(stopper.clone());
        i8042.write(DATA, &[0xfe]);
        i8042.write(COMMAND, &[0xd1]);
        i8042.write(1, &[0xfe]);
        i8042.write(COMMAND, &[]);
        assert!(!stopper.is_stopped());
        i8042.write(COMMAND, &[0xfe]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset));
    }

    #[test]
    fn the_output_buffer_is_empty() {
        let stopper = Stopper::new(Event::new().unwrap());
        let mut i8042 = I8042::new(stopper);
        let mut status = [0xff];
        i8042.read(COMMAND, &mut status);
        assert_eq!(status[0] & 3, 0, "nothing to read, room to write");
    }
}
