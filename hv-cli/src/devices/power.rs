//! Power-off, the power button and reset by ACPI's fixed registers (ACPI 6.5, 4.8.2.2.1, 4.8.3 and
//! 4.8.3.6).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::IrqLines;
use crate::exit_code::StopReason;
use crate::layout::{RESET_VALUE, SCI_IRQ, SLEEP_TYPE_S5};
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

/// The power button in the status and the enable register.
const PWRBTN: u16 = 1 << 8;

/// Bits of the PM1a control register.
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_EN: u16 = 1 << 13;

/// The value that puts a machine with a sleep control register (ACPI 6.5, 4.8.3.7) into S5.
/// Guests that know no tables write it to the first port: `SLP_EN | S5 << 2`.
const SLEEP_CONTROL_S5: u8 = 1 << 5 | SLEEP_TYPE_S5 << 2;

/// The PM1a event registers, and the line that says when one of them has something to say.
struct Events {
    status: u16,
    enable: u16,
    line: Box<dyn IrqLines>,
    level: bool,
}

impl Events {
    /// Sets the system control interrupt to what the registers say.
    fn update(&mut self) {
        let level = self.status & self.enable != 0;
        if level != self.level {
            self.level = level;
            self.line.set(SCI_IRQ.into(), level);
        }
    }
}

/// The power button of a machine. Clones are the same.
#[derive(Clone)]
pub struct Button(Arc<Mutex<Events>>);

impl Button {
    /// Presses it: the guest is told by an interrupt if it has asked for that, which is returned. If
    /// not, the press waits in the status register for a guest that looks or asks later.
    pub fn press(&self) -> bool {
        let mut events = self.events();
        events.status |= PWRBTN;
        events.update();
        events.enable & PWRBTN != 0
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The PM1a event block (status and enable) and control block, 6 bytes. The power button is the only
/// event there is.
pub struct PowerControl {
    stopper: Stopper,
    button: Button,
}

impl PowerControl {
    /// A block wired to `stopper`, and to the interrupt controller for the system control interrupt.
    #[must_use]
    pub fn new(stopper: Stopper, line: Box<dyn IrqLines>) -> Self {
        let events = Events { status: 0, enable: 0, line, level: false };
        Self { stopper, button: Button(Arc::new(Mutex::new(events))) }
    }

    /// Its button.
    #[must_use]
    pub fn button(&self) -> Button {
        self.button.clone()
    }
}

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;

impl Device for PowerControl {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [control_low, control_high] = SCI_EN.to_le_bytes();
        let events = self.button.events();
        let [status_low, status_high] = events.status.to_le_bytes();
        let [enable_low, enable_high] = events.enable.to_le_bytes();
        let registers =
            [status_low, status_high, enable_low, enable_high, control_low, control_high];
        for (byte, i) in data.iter_mut().zip(offset..) {
            *byte = usize::try_from(i).ok().and_then(|i| registers.get(i)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (STATUS, &[SLEEP_CONTROL_S5]) => self.stopper.stop(StopReason::PowerOff),
            (STATUS, &[low, high]) => {
                let mut events = self.button.events();
                // What is written as one is cleared.
                events.status &= !u16::from_le_bytes([low, high]);
                events.update();
            }
            (ENABLE, &[low, high]) => {
                let mut events = self.button.events();
                events.enable = u16::from_le_bytes([low, high]);
                events.update();
            }
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

    #[derive(Clone, Default)]
    struct Line(Arc<Mutex<Vec<(u32, bool)>>>);

    impl Line {
        fn take(&self) -> Vec<(u32, bool)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl IrqLines for Line {
        fn set(&mut self, gsi: u32, level: bool) {
            self.0.lock().unwrap().push((gsi, level));
        }
    }

    fn power(stopper: Stopper) -> (PowerControl, Line) {
        let line = Line::default();
        (PowerControl::new(stopper, Box::new(line.clone())), line)
    }

    #[test]
    fn s5_powers_off_and_other_states_do_not() {
        let stopper = stopper();
        let (mut power, _) = power(stopper.clone());
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
        let (mut power, _) = power(stopper.clone());
        power.write(STATUS, &0x34u16.to_le_bytes());
        assert!(!stopper.is_stopped(), "clearing status bits is not sleeping");
        power.write(STATUS, &[0x34]);
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
    }

    #[test]
    fn the_button_interrupts_a_guest_that_asked_until_it_has_seen_it() {
        let (mut power, line) = power(stopper());
        let button = power.button();
        let status = |power: &mut PowerControl| {
            let mut data = [0xff; 2];
            power.read(STATUS, &mut data);
            u16::from_le_bytes(data)
        };
        power.write(ENABLE, &0x20u16.to_le_bytes());
        assert!(!button.press(), "another event is not this one");
        assert_eq!((status(&mut power), line.take()), (0x100, vec![]));
        // Who asks later hears of it at once.
        power.write(ENABLE, &0x100u16.to_le_bytes());
        assert_eq!(line.take(), [(9, true)]);
        power.write(STATUS, &0xfeffu16.to_le_bytes());
        assert_eq!((status(&mut power), line.take()), (0x100, vec![]), "others were cleared");
        power.write(STATUS, &0x100u16.to_le_bytes());
        assert_eq!((status(&mut power), line.take()), (0, vec![(9, false)]));
        assert!(button.press() && button.press());
        assert_eq!(line.take(), [(9, true)]);
        power.write(ENABLE, &[0, 0]);
        assert_eq!(line.take(), [(9, false)]);
    }

    #[test]
    fn reads_say_acpi_mode_and_no_event() {
        let (mut power, _) = power(stopper());
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
