//! Power-off and reset by ACPI's fixed registers (ACPI 6.5, 4.8.3 and 4.8.3.6).

use crate::exit_code::StopReason;
use crate::layout::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

/// Bits of the PM1a control register.
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_EN: u16 = 1 << 13;

/// The value that puts a machine with a sleep control register (ACPI 6.5, 4.8.3.7) into S5.
/// Guests that know no tables write it to the first port: `SLP_EN | S5 << 2`.
const SLEEP_CONTROL_S5: u8 = 1 << 5 | SLEEP_TYPE_S5 << 2;

/// The PM1a event block (status and enable) and control block, 6 bytes. No event is ever pending:
/// there are no buttons.
pub struct PowerControl {
    stopper: Stopper,
    enable: [u8; 2],
}

impl PowerControl {
    /// A block wired to `stopper`.
    #[must_use]
    pub fn new(stopper: Stopper) -> Self {
        Self { stopper, enable: [0; 2] }
    }
}

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;

impl Device for PowerControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [control_low, control_high] = SCI_EN.to_le_bytes();
        let [enable_low, enable_high] = self.enable;
        let registers = [0, 0, enable_low, enable_high, control_low, control_high];
        for (byte, i) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(i).ok().and_then(|i| registers.get(i)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (STATUS, &[SLEEP_CONTROL_S5]) => self.stopper.stop(StopReason::PowerOff),
            (ENABLE, &[low, high]) => self.enable = [low, high],
            (CONTROL, &[low, high, ..]) => {
                let value = u16::from_le_bytes([low, high]);
                let sleep_type = value >> SLP_TYP_SHIFT & 7;
                if value & SLP_EN != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
                    self.stopper.stop(StopReason::PowerOff);
                }
            }
            _ => {}
        }
    }
}

/// The reset register at port 0xcf9: a write with bit 2 set resets.
pub struct ResetPort(Stopper);

impl ResetPort {
    /// A register wired to `stopper`.
    #[must_use]
    pub fn new(stopper: Stopper) -> Self {
        Self(stopper)
    }
}

const RESET_CPU: u8 = 1 << 2;
const _: () = assert!(RESET_VALUE & RESET_CPU != 0);

impl Device for ResetPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & RESET_CPU != 0) {
            self.0.stop(StopReason::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;

    fn stopper() -> Stopper {
        Stopper::new(Event::new().unwrap())
    }

    #[test]
    fn s5_powers_off_and_other_states_do_not() {
        let stopper = stopper();
        let mut power = PowerControl::new(stopper.clone());
        power.write(CONTROL, &(SLP_EN | 1 << 10).to_le_bytes());
        power.write(CONTROL, &(5u16 << 10).to_le_bytes());
        power.write(CONTROL, &[0x34]);
        assert!(!stopper.is_stopped());
        power.write(CONTROL, &(SLP_EN | 5 << 10).to_le_bytes());
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
    }

    #[test]
    fn the_sleep_control_value_works_without_tables() {
        let stopper = stopper();
        let mut power = PowerControl::new(stopper.clone());
        power.write(STATUS, &0x34u16.to_le_bytes());
        assert!(!stopper.is_stopped(), "clearing status bits is not sleeping");
        power.write(STATUS, &[0x34]);
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
    }

    #[test]
    fn reads_say_acpi_mode_and_no_event() {
        let mut power = PowerControl::new(stopper());
        power.write(ENABLE, &[0x20, 0x01]);
        let mut data = [0xff; 6];
        power.read(STATUS, &mut data);
        assert_eq!(data, [0, 0, 0x20, 0x01, 1, 0]);
    }

    #[test]
    fn reset_needs_its_bit() {
        let stopper = stopper();
        let mut port = ResetPort::new(stopper.clone());
        port.write(0, &[0x02]);
        assert!(!stopper.is_stopped());
        port.write(0, &[RESET_VALUE]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset));
    }
}
