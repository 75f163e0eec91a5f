//! The pair of 8259 interrupt controllers (8259A data sheet, as KVM has it): pins 0 to 7 on the
//! master, 8 to 15 on the slave, which hangs on the master's pin 2.
//!
//! Polling and special mask mode are registers without an effect.

use kvm_bindings::kvm_pic_state;

use super::ioapic::{Source, drive};
use super::message::Outcome;

/// The pin of the master on which the slave hangs.
const CASCADE: u8 = 2;
const MASTER_COMMAND: u16 = 0x20;
const SLAVE_COMMAND: u16 = 0xa0;
/// Edge/level control registers.
const ELCR: u16 = 0x4d0;

/// One of the two, over the registers `KVM_GET_IRQCHIP` knows.
#[derive(Debug)]
struct Chip(kvm_pic_state);

impl Chip {
    fn new(elcr_mask: u8) -> Self {
        Self(kvm_pic_state { elcr_mask, ..kvm_pic_state::default() })
    }

    /// Sets a pin.
    fn set(&mut self, pin: u8, high: bool) -> Outcome {
        let (bit, state) = (1 << (pin & 7), &mut self.0);
        let level = state.elcr & bit != 0;
        let mut outcome = Outcome::Delivered(1);
        if high {
            if level || state.last_irr & bit == 0 {
                if state.irr & bit != 0 {
                    outcome = Outcome::Coalesced;
                }
                state.irr |= bit;
            }
            state.last_irr |= bit;
        } else {
            state.last_irr &= !bit;
            if level {
                state.irr &= !bit;
            }
        }
        if state.imr & bit != 0 { Outcome::Kept } else { outcome }
    }

    /// How urgent the most urgent of these pins is, 0 to 7, the rotation considered.
    fn priority(&self, pins: u8) -> Option<u8> {
        let rotated = pins.rotate_right(u32::from(self.0.priority_add & 7));
        (rotated != 0).then(|| rotated.trailing_zeros() as u8)
    }

    fn pin_of(&self, priority: u8) -> u8 {
        priority.wrapping_add(self.0.priority_add) & 7
    }

    /// The pin that asks for service and may.
    fn asks(&self, master: bool) -> Option<u8> {
        let state = &self.0;
        let wanted = self.priority(state.irr & !state.imr)?;
        let mut served = state.isr;
        if master && state.special_fully_nested_mode != 0 {
            served &= !(1 << CASCADE);
        }
        let free = self.priority(served).is_none_or(|current| wanted < current);
        free.then(|| self.pin_of(wanted))
    }

    /// The processor takes a pin; whether that ended it at once.
    fn acknowledge(&mut self, pin: u8) -> bool {
        let (bit, state) = (1 << (pin & 7), &mut self.0);
        state.isr |= bit;
        if state.elcr & bit == 0 {
            state.irr &= !bit; // a level stays
        }
        if state.auto_eoi != 0 {
            state.isr &= !bit;
            if state.rotate_on_auto_eoi != 0 {
                state.priority_add = pin.wrapping_add(1) & 7;
            }
        }
        state.auto_eoi != 0
    }

    fn vector(&self, pin: u8) -> u8 {
        self.0.irq_base.wrapping_add(pin)
    }

    /// A store to the command port.
    fn command(&mut self, value: u8, wired: bool) -> Reaction {
        if value & 0x10 != 0 {
            return self.initialize(value, wired);
        }
        if value & 0x08 != 0 {
            if value & 0x04 != 0 {
                self.0.poll = 1;
            }
            if value & 0x02 != 0 {
                self.0.read_reg_select = value & 1;
            }
            if value & 0x40 != 0 {
                self.0.special_mask = value >> 5 & 1;
            }
        } else {
            return self.operate(value);
        }
        Reaction::NONE
    }

    /// The first initialization command word. Edges are forgotten, and have ended if the pair is
    /// wired to a processor.
    fn initialize(&mut self, value: u8, wired: bool) -> Reaction {
        let old = self.0;
        let ended = if wired { old.irr & !old.elcr } else { 0 };
        self.0 = kvm_pic_state {
            irr: old.irr & old.elcr,
            isr: old.isr & !ended,
            irq_base: old.irq_base,
            rotate_on_auto_eoi: old.rotate_on_auto_eoi,
            poll: old.poll,
            init_state: 1,
            init4: value & 1,
            elcr: old.elcr,
            elcr_mask: old.elcr_mask,
            ..kvm_pic_state::default()
        };
        if self.0.init4 != 0 {
            self.0.special_fully_nested_mode = old.special_fully_nested_mode;
            self.0.auto_eoi = old.auto_eoi;
        }
        Reaction { ended, ask: false }
    }

    /// The second operation command word: ends and rotations.
    fn operate(&mut self, value: u8) -> Reaction {
        let (command, named) = (value >> 5, value & 7);
        let ended = match command {
            1 | 5 => self.priority(self.0.isr).map(|current| self.pin_of(current)),
            3 | 7 => Some(named),
            6 => {
                self.0.priority_add = named.wrapping_add(1) & 7;
                return Reaction::ASK;
            }
            0 | 4 => {
                self.0.rotate_on_auto_eoi = command >> 2;
                None
            }
            _ => None,
        };
        let Some(pin) = ended else {
            return Reaction::NONE;
        };
        self.0.isr &= !(1 << pin);
        if command & 4 != 0 {
            self.0.priority_add = pin.wrapping_add(1) & 7;
        }
        Reaction { ended: 1 << pin, ask: true }
    }

    /// A store to the data port.
    fn data(&mut self, value: u8) -> Reaction {
        let state = &mut self.0;
        state.init_state = match state.init_state {
            1 => {
                state.irq_base = value & 0xf8;
                2
            }
            2 if state.init4 != 0 => 3,
            2 => 0,
            3 => {
                state.special_fully_nested_mode = value >> 4 & 1;
                state.auto_eoi = value >> 1 & 1;
                0
            }
            _ => {
                state.imr = value;
                return Reaction::ASK;
            }
        };
        Reaction::NONE
    }

    fn read(&self, data: bool) -> u8 {
        match data {
            true => self.0.imr,
            false if self.0.read_reg_select != 0 => self.0.isr,
            false => self.0.irr,
        }
    }
}

/// What a store has set off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Reaction {
    /// These pins have ended.
    ended: u8,
    /// Another pin may be the most urgent now.
    ask: bool,
}

impl Reaction {
    const NONE: Self = Self { ended: 0, ask: false };
    const ASK: Self = Self { ended: 0, ask: true };
}

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Master,
    Slave,
}

/// The pair.
#[derive(Debug)]
pub(super) struct Pic {
    master: Chip,
    slave: Chip,
    lines: [u8; 16],
    /// Whether it asks the processor: as it was when last it was looked at, so the processor may
    /// come in vain (and gets pin 7).
    output: bool,
    /// Pins that ended and nobody was told yet, as bits.
    ended: u16,
}

impl Pic {
    pub(super) fn new() -> Self {
        // The pins that can be level-triggered: not the timer, keyboard, cascade and clock.
        let (master, slave) = (Chip::new(0xf8), Chip::new(0xde));
        Self { master, slave, lines: [0; 16], output: false, ended: 0 }
    }

    /// Sets a line, 0 to 15.
    pub(super) fn set(&mut self, pin: u8, source: Source, level: bool) -> Outcome {
        let pin = pin & 15;
        let high = self.lines.get_mut(usize::from(pin)).is_some_and(|l| drive(l, source, level));
        let outcome = match pin {
            0..8 => self.master.set(pin, high),
            _ => self.slave.set(pin - 8, high),
        };
        self.cascade();
        outcome
    }

    /// The slave asks by a pulse on the master's pin, the master asks the processor.
    pub(super) fn cascade(&mut self) {
        if self.slave.asks(false).is_some() {
            self.master.set(CASCADE, true);
            self.master.set(CASCADE, false);
        }
        self.output = self.master.asks(true).is_some();
    }

    /// Whether it asks the processor.
    pub(super) fn asks(&self) -> bool {
        self.output
    }

    /// The processor takes the most urgent interrupt: its vector, that of pin 7 for a spurious one.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.asks(true) {
            Some(CASCADE) => {
                self.take(CASCADE);
                let pin = self.slave.asks(false);
                if let Some(pin) = pin {
                    self.take(pin + 8);
                }
                self.slave.vector(pin.unwrap_or(7))
            }
            Some(pin) => {
                self.take(pin);
                self.master.vector(pin)
            }
            None => self.master.vector(7),
        };
        self.cascade();
        vector
    }

    fn take(&mut self, pin: u8) {
        let ended = match pin {
            0..8 => self.master.acknowledge(pin),
            _ => self.slave.acknowledge(pin - 8),
        };
        if ended {
            self.ended |= 1 << pin;
        }
    }

    /// Ends the interrupt with this vector, as a guest's handler does; `false` if it is not in
    /// service.
    pub(super) fn end(&mut self, vector: u8) -> bool {
        let in_service = |chip: &Chip| {
            let pin = vector.wrapping_sub(chip.0.irq_base);
            (pin < 8 && chip.0.isr & 1 << pin != 0).then_some(pin)
        };
        if let Some(pin) = in_service(&self.slave) {
            self.command(Which::Slave, 0x60 | pin, true);
            self.command(Which::Master, 0x60 | CASCADE, true);
        } else if let Some(pin) = in_service(&self.master) {
            self.command(Which::Master, 0x60 | pin, true);
        } else {
            return false;
        }
        true
    }

    fn command(&mut self, which: Which, value: u8, wired: bool) {
        let reaction = self.chip(which).command(value, wired);
        self.ended |= u16::from(reaction.ended) << if which == Which::Slave { 8 } else { 0 };
        if reaction.ask {
            self.cascade();
        }
    }

    fn data(&mut self, which: Which, value: u8) {
        if self.chip(which).data(value).ask {
            self.cascade();
        }
    }

    fn chip(&mut self, which: Which) -> &mut Chip {
        match which {
            Which::Master => &mut self.master,
            Which::Slave => &mut self.slave,
        }
    }

    /// The pins (0 to 15) that have ended since this was last asked.
    pub(super) fn take_ended(&mut self) -> impl Iterator<Item = u8> + use<> {
        let ended = std::mem::take(&mut self.ended);
        (0..16).filter(move |pin| ended & 1 << pin != 0)
    }

    /// A store to a port; `false` if the port is not one of the pair's. `wired`: some local APIC lets
    /// the pair through.
    pub(super) fn write(&mut self, port: u16, value: u8, wired: bool) -> bool {
        match port {
            MASTER_COMMAND => self.command(Which::Master, value, wired),
            SLAVE_COMMAND => self.command(Which::Slave, value, wired),
            0x21 => self.data(Which::Master, value),
            0xa1 => self.data(Which::Slave, value),
            ELCR => self.master.0.elcr = value & self.master.0.elcr_mask,
            0x4d1 => self.slave.0.elcr = value & self.slave.0.elcr_mask,
            _ => return false,
        }
        true
    }

    /// A load from a port, if it is one of the pair's.
    pub(super) fn read(&self, port: u16) -> Option<u8> {
        Some(match port {
            MASTER_COMMAND | 0x21 => self.master.read(port & 1 != 0),
            SLAVE_COMMAND | 0xa1 => self.slave.read(port & 1 != 0),
            ELCR => self.master.0.elcr,
            0x4d1 => self.slave.0.elcr,
            _ => return None,
        })
    }

    /// The registers of one (`KVM_GET_IRQCHIP`).
    pub(super) fn registers(&self, which: Which) -> kvm_pic_state {
        match which {
            Which::Master => self.master.0,
            Which::Slave => self.slave.0,
        }
    }

    /// Sets them (`KVM_SET_IRQCHIP`); [`Self::cascade`] is due then.
    pub(super) fn set_registers(&mut self, which: Which, registers: kvm_pic_state) {
        self.chip(which).0 = registers;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair as a PC sets it up: vectors 0x20 and 0x28, nothing masked.
    fn pic() -> Pic {
        let mut pic = Pic::new();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 1),
        ] {
            assert!(pic.write(port, value, true));
        }
        pic
    }

    fn set(pic: &mut Pic, pin: u8, level: bool) -> Outcome {
        pic.set(pin, Source::Caller, level)
    }

    #[test]
    fn an_edge_is_served_once() {
        let mut pic = pic();
        assert_eq!(set(&mut pic, 4, true), Outcome::Delivered(1));
        assert!(pic.asks());
        assert_eq!(pic.acknowledge(), 0x24);
        assert!(!pic.asks());
        assert!(pic.end(0x24));
        assert!(!pic.asks(), "the line is still high, but that was the edge");
        assert_eq!(pic.take_ended().collect::<Vec<_>>(), [4]);
        set(&mut pic, 4, false);
        set(&mut pic, 4, true);
        assert!(pic.asks());
        set(&mut pic, 4, false);
        assert_eq!(set(&mut pic, 4, true), Outcome::Coalesced, "not served in between");
    }

    #[test]
    fn a_level_is_served_as_long_as_it_is_high() {
        let mut pic = pic();
        pic.write(0x4d1, 0xff, true);
        assert_eq!(pic.read(0x4d1), Some(0xde), "the clock and the FPU are edges");
        set(&mut pic, 11, true);
        assert_eq!(pic.acknowledge(), 0x2b);
        assert!(!pic.asks());
        pic.end(0x2b);
        assert!(pic.asks());
        set(&mut pic, 11, false);
        assert_eq!(pic.acknowledge(), 0x2f, "gone: spurious, from the slave");
    }

    #[test]
    fn a_masked_edge_is_kept() {
        let mut pic = pic();
        pic.write(0x21, 0xff, true);
        assert_eq!(set(&mut pic, 4, true), Outcome::Kept);
        set(&mut pic, 4, false);
        assert!(!pic.asks());
        pic.write(0x21, 0xef, true);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn lower_pins_are_more_urgent() {
        let mut pic = pic();
        set(&mut pic, 4, true);
        assert_eq!(pic.acknowledge(), 0x24);
        set(&mut pic, 6, true);
        assert!(!pic.asks());
        set(&mut pic, 10, true);
        assert_eq!(pic.acknowledge(), 0x2a, "the slave is at pin 2");
        pic.write(0x20, 0xe4, true); // ends 4 and makes it the least urgent: 5 and 6 come first
        assert_eq!(pic.acknowledge(), 0x26);
        set(&mut pic, 4, false);
        set(&mut pic, 4, true);
        assert!(!pic.asks());
        pic.end(0x26);
        assert!(!pic.asks(), "2 is still in service");
        pic.end(0x2a);
        assert_eq!(pic.acknowledge(), 0x24);
    }

    #[test]
    fn initializing_forgets_edges() {
        for wired in [true, false] {
            let mut pic = pic();
            set(&mut pic, 4, true);
            pic.acknowledge();
            set(&mut pic, 4, false);
            set(&mut pic, 4, true);
            assert!(pic.write(0x20, 0x11, wired));
            assert_eq!((pic.master.0.irr, pic.master.0.isr), (0, if wired { 0 } else { 0x10 }));
            assert_eq!(pic.take_ended().count(), usize::from(wired));
        }
    }

    #[test]
    fn automatic_end() {
        let mut pic = pic();
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3)] {
            pic.write(port, value, true);
        }
        set(&mut pic, 4, true);
        assert_eq!(pic.acknowledge(), 0x24);
        assert_eq!(pic.read(0x20), Some(0));
        assert!(!pic.end(0x24));
        assert_eq!(pic.take_ended().collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn registers_are_read_and_hostile_ones_harmless() {
        let mut pic = pic();
        set(&mut pic, 5, true);
        assert_eq!(pic.read(0x20), Some(0x20));
        pic.acknowledge();
        pic.write(0x20, 0x0b, true);
        assert_eq!(pic.read(0x20), Some(0x20), "in service");
        assert_eq!(pic.read(0x22), None);
        assert!(!pic.write(0x22, 0, true));
        let hostile =
            kvm_pic_state { priority_add: 0xff, irq_base: 0xff, irr: 0xff, ..pic.master.0 };
        for which in [Which::Master, Which::Slave] {
            pic.set_registers(which, hostile);
            assert_eq!(pic.registers(which), hostile);
        }
        for value in 0..=255 {
            pic.acknowledge();
            pic.end(value);
            pic.write(0x20, value, true);
            pic.write(0xa1, value, true);
        }
    }
}
