//! `isa-debug-exit`: a port whose write ends the machine with a code the guest chooses.

use crate::exit_code::StopReason;
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

/// The device, 4 ports wide. Writing `v` makes the exit code `(v << 1) | 1`.
pub struct DebugExit(Stopper);

impl DebugExit {
    /// A device that ends the machine of `stopper`.
    #[must_use]
    pub fn new(stopper: Stopper) -> Self {
        Self(stopper)
    }
}

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        self.0.stop(StopReason::DebugExit { value: u32::from_le_bytes(value) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    #[test]
    fn any_width_ends_the_machine_with_its_value() {
        for (data, value) in [(&[0x10][..], 0x10), (&[1, 2], 0x201), (&[1, 2, 3, 4], 0x0403_0201)] {
            let stopper = Stopper::new(Event::new().unwrap());
            DebugExit::new(stopper.clone()).write(0, data);
            assert_eq!(stopper.reason(), Some(&StopReason::DebugExit { value }));
        }
    }
}
