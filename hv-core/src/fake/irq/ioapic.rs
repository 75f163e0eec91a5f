//! The I/O APIC: 24 pins, each with a redirection entry that makes a message of it (82093AA data
//! sheet, as KVM has it).

use super::clock::{self, Clock};
use super::lapic::Lapic;
use super::lapics::Lapics;
use super::message::{Message, Outcome};
use super::routing::IOAPIC_PINS;
use crate::fake::Loss;

const PINS: usize = IOAPIC_PINS as usize;
/// Where it is, and for how many bytes.
const BASE: u64 = 0xfec0_0000;
const LENGTH: u64 = 0x100;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR: a store leaves them.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

/// Who drives a line. The line is high if any of them holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// `KVM_IRQ_LINE`, and irqfds without a resample eventfd: they share one.
    Caller = 1,
    /// irqfds with a resample eventfd.
    Resample = 2,
    /// The first, when it asks what becomes of it (`KVM_IRQ_LINE_STATUS`).
    Asking = 3,
}

impl Source {
    fn bit(self) -> u8 {
        if self == Source::Resample { 2 } else { 1 }
    }
}

/// Sets or clears what `source` holds; whether the line is high then.
pub(super) fn drive(line: &mut u8, source: Source, level: bool) -> bool {
    match level {
        true => *line |= source.bit(),
        false => *line &= !(source.bit()),
    }
    *line != 0
}

/// The registers `KVM_GET_IRQCHIP` knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) base: u64,
    pub(super) select: u32,
    pub(super) id: u32,
    pub(super) irr: u32,
    pub(super) entries: [u64; PINS],
}

/// The I/O APIC.
#[derive(Debug)]
pub(super) struct Ioapic {
    registers: Registers,
    /// Edges in the request register that were sent.
    sent: u32,
    lines: [u8; PINS],
    clock: Clock,
}

/// What a store has set off, for whoever knows about irqfds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// A level-triggered pin that is high was unmasked: ask its resamplers whether it still is, and
    /// if there are none, [`Ioapic::send`].
    Unmasked(u32),
}

impl Ioapic {
    pub(super) fn new() -> Self {
        let entries = [MASKED; PINS];
        let registers = Registers { base: BASE, select: 0, id: 0, irr: 0, entries };
        Self { registers, sent: 0, lines: [0; PINS], clock: Clock::default() }
    }

    fn entry(&self, pin: u32) -> u64 {
        self.registers.entries.get(pin as usize).copied().unwrap_or(MASKED)
    }

    fn entry_mut(&mut self, pin: u32) -> Option<&mut u64> {
        self.registers.entries.get_mut(pin as usize)
    }

    /// The message of a pin.
    pub(super) fn message(&self, pin: u32) -> Message {
        Message::from_redirection(self.entry(pin))
    }

    /// The pins whose interrupts have this vector.
    pub(super) fn pins_of(&self, vector: u8) -> Vec<u32> {
        (0..IOAPIC_PINS).filter(|&pin| self.entry(pin) as u8 == vector).collect()
    }

    /// Sets a line.
    pub(super) fn set(
        &mut self,
        pin: u32,
        source: Source,
        level: bool,
        lapics: &mut Lapics,
    ) -> Outcome {
        match self.lines.get_mut(pin as usize) {
            Some(line) => {
                let high = drive(line, source, level);
                self.request(pin, high, source == Source::Asking, lapics)
            }
            None => Outcome::Refused(Loss::Unrouted),
        }
    }

    fn request(&mut self, pin: u32, high: bool, asks: bool, lapics: &mut Lapics) -> Outcome {
        let bit = 1 << pin;
        if !high {
            self.registers.irr &= !bit;
            return Outcome::Delivered(1); // KVM's answer to lowering a line
        }
        if asks && pin == clock::PIN && self.clock.waits() {
            return Outcome::Coalesced;
        }
        let before = self.registers.irr;
        self.registers.irr |= bit;
        if self.entry(pin) & LEVEL == 0 {
            self.sent &= !bit;
            if before & bit != 0 {
                return Outcome::Coalesced;
            }
        }
        self.send_asked(pin, asks, lapics)
    }

    /// Sends the message of a pin, unless it is masked or its last one has not ended.
    pub(super) fn send(&mut self, pin: u32, lapics: &mut Lapics) -> Outcome {
        self.send_asked(pin, false, lapics)
    }

    fn send_asked(&mut self, pin: u32, asked: bool, lapics: &mut Lapics) -> Outcome {
        let entry = self.entry(pin);
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 {
            return Outcome::Refused(Loss::Masked);
        }
        if level && entry & REMOTE_IRR != 0 {
            return Outcome::Refused(Loss::InService);
        }
        if !level {
            self.sent |= 1 << pin;
        }
        let message = self.message(pin);
        let outcome = lapics.send(&message, None);
        if asked && pin == clock::PIN {
            self.clock.sent(&message, outcome, lapics);
        }
        // KVM sets it for -1 too: then nobody ends it.
        if level
            && outcome.count() != Some(0)
            && let Some(entry) = self.entry_mut(pin)
        {
            *entry |= REMOTE_IRR;
        }
        outcome
    }

    /// A vCPU has ended a vector, whoever sent it.
    pub(super) fn vector_ended(&mut self, vcpu: u32, vector: u8) {
        self.clock.ended(vcpu, vector);
    }

    /// The state of a local APIC was set.
    pub(super) fn restore_clock(&mut self, lapic: &Lapic) {
        self.clock.restore(&self.message(clock::PIN), lapic);
    }

    /// The interrupt of a pin has ended. If it was taken as level-triggered and its line is still
    /// high, it is sent again.
    pub(super) fn end(&mut self, pin: u32, was_level: bool, lapics: &mut Lapics) {
        if !was_level {
            return;
        }
        if let Some(entry) = self.entry_mut(pin) {
            *entry &= !REMOTE_IRR;
        }
        if self.registers.irr & 1 << pin != 0 {
            self.send(pin, lapics);
        }
    }

    /// A resampler was asked about a pin: that it was high counts no more.
    pub(super) fn forget(&mut self, pin: u32) {
        self.registers.irr &= !(1 << pin);
    }

    // Registers.

    /// The registers as `KVM_GET_IRQCHIP` shows them: edges that were sent are no longer requested.
    pub(super) fn registers(&self) -> Registers {
        Registers { irr: self.registers.irr & !self.sent, ..self.registers.clone() }
    }

    /// Takes registers (`KVM_SET_IRQCHIP`) and sends what they say is requested.
    pub(super) fn set_registers(&mut self, registers: Registers, lapics: &mut Lapics) {
        let requested = registers.irr;
        self.registers = Registers { irr: 0, ..registers };
        self.sent = 0;
        self.clock.restore_all(&self.message(clock::PIN), lapics);
        for pin in (0..IOAPIC_PINS).filter(|pin| requested & 1 << pin != 0) {
            self.request(pin, true, true, lapics);
        }
    }

    /// The register at a guest-physical address.
    pub(super) fn register_at(&self, address: u64) -> Option<u8> {
        let offset = address.checked_sub(self.registers.base)?;
        u8::try_from(offset).ok().filter(|_| offset < LENGTH)
    }

    /// A load.
    pub(super) fn read(&self, register: u8) -> u32 {
        let select = self.registers.select;
        match (register, select) {
            (0x00, _) => select,
            (0x10, 0 | 2) => self.registers.id << 24,
            (0x10, 1) => (IOAPIC_PINS - 1) << 16 | 0x11,
            (0x10, _) => {
                let index = select.wrapping_sub(0x10) >> 1;
                let entries = &self.registers.entries;
                let entry = entries.get(index as usize).copied().unwrap_or(u64::MAX);
                if select & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    /// A store.
    pub(super) fn write(&mut self, register: u8, value: u32) -> Effect {
        let select = self.registers.select;
        match (register, select) {
            (0x00, _) => self.registers.select = value & 0xff,
            (0x10, 0) => self.registers.id = value >> 24 & 0xf,
            (0x10, 1..=0xf) => {}
            (0x10, _) => return self.write_entry(select - 0x10 >> 1, select & 1 != 0, value),
            _ => {}
        }
        Effect::None
    }

    fn write_entry(&mut self, pin: u32, high: bool, value: u32) -> Effect {
        let Some(entry) = self.entry_mut(pin) else {
            return Effect::None;
        };
        let old = *entry;
        let new = match high {
            true => old & 0xffff_ffff | u64::from(value) << 32,
            false => old & !0xffff_ffff | u64::from(value),
        };
        let mut new = new & !READ_ONLY | old & READ_ONLY;
        if new & LEVEL == 0 {
            new &= !REMOTE_IRR; // systems rely on this to clear it
        }
        *entry = new;
        let waits = self.registers.irr & 1 << pin != 0;
        match waits && new & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
            true => Effect::Unmasked(pin),
            false => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lapic::SPIV;
    use super::*;

    fn lapics() -> Lapics {
        let mut all = Lapics::default();
        all.add(0);
        all.get_mut(0).unwrap().write(SPIV, 0x1ff);
        all
    }

    /// An I/O APIC whose pin 20 has this redirection entry, programmed as a guest does.
    fn ioapic(entry: u64) -> Ioapic {
        let mut ioapic = Ioapic::new();
        write(&mut ioapic, 20, entry);
        ioapic
    }

    fn write(ioapic: &mut Ioapic, pin: u32, entry: u64) -> Effect {
        ioapic.write(0, 0x11 + pin * 2);
        ioapic.write(0x10, (entry >> 32) as u32);
        ioapic.write(0, 0x10 + pin * 2);
        ioapic.write(0x10, entry as u32)
    }

    const MASKED_PIN: Outcome = Outcome::Refused(Loss::Masked);

    fn raise(ioapic: &mut Ioapic, lapics: &mut Lapics) -> Outcome {
        ioapic.set(20, Source::Caller, true, lapics)
    }

    fn lower(ioapic: &mut Ioapic, lapics: &mut Lapics) {
        assert_eq!(ioapic.set(20, Source::Caller, false, lapics), Outcome::Delivered(1));
    }

    #[test]
    fn an_edge_is_sent_once_until_the_line_was_low() {
        let (mut ioapic, mut all) = (ioapic(0x61), lapics());
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Delivered(1));
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Coalesced);
        lower(&mut ioapic, &mut all);
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Delivered(1));
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_not_sent_later() {
        let (mut ioapic, mut all) = (ioapic(0x61 | MASKED), lapics());
        assert_eq!(raise(&mut ioapic, &mut all), MASKED_PIN);
        assert_eq!(write(&mut ioapic, 20, 0x61), Effect::None);
        assert!(!all.get(0).unwrap().pending());
        let mut registers = ioapic.registers();
        assert_eq!(registers.irr, 1 << 20, "while it is high, it is requested");
        registers.irr = 1 << 20;
        ioapic.set_registers(registers, &mut all);
        assert!(all.get(0).unwrap().pending(), "KVM_SET_IRQCHIP sends it");
        assert_eq!(ioapic.registers().irr, 0, "and it is not requested any more");
    }

    #[test]
    fn a_level_is_sent_again_at_its_end_while_the_line_is_high() {
        let (mut ioapic, mut all) = (ioapic(0x61 | LEVEL), lapics());
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Delivered(1));
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Refused(Loss::InService));
        let cpu = all.get_mut(0).unwrap();
        cpu.begin(0x61);
        assert!(cpu.end(0x61) && cpu.level(0x61));
        ioapic.end(20, true, &mut all);
        assert_eq!(all.get(0).unwrap().deliverable(), Some(0x61), "again");
        lower(&mut ioapic, &mut all);
        let cpu = all.get_mut(0).unwrap();
        cpu.begin(0x61);
        cpu.end(0x61);
        ioapic.end(20, true, &mut all);
        assert_eq!(all.get(0).unwrap().deliverable(), None);
        assert_eq!(ioapic.entry(20) & REMOTE_IRR, 0);
    }

    #[test]
    fn a_high_level_waits_for_the_mask() {
        let (mut ioapic, mut all) = (ioapic(0x61 | LEVEL | MASKED), lapics());
        assert_eq!(raise(&mut ioapic, &mut all), MASKED_PIN);
        assert_eq!(write(&mut ioapic, 20, 0x61 | LEVEL), Effect::Unmasked(20));
        assert_eq!(ioapic.send(20, &mut all), Outcome::Delivered(1));
    }

    #[test]
    fn a_line_is_high_while_anyone_holds_it() {
        let (mut ioapic, mut all) = (ioapic(0x61), lapics());
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Delivered(1));
        assert_eq!(ioapic.set(20, Source::Resample, true, &mut all), Outcome::Coalesced);
        ioapic.set(20, Source::Caller, false, &mut all);
        assert_eq!(raise(&mut ioapic, &mut all), Outcome::Coalesced);
    }

    #[test]
    fn registers_as_a_guest_sees_them() {
        let mut ioapic = ioapic(0x0300_0000_0000_0061);
        let mut read = |select| {
            ioapic.write(0, select);
            ioapic.read(0x10)
        };
        assert_eq!(read(1), 0x0017_0011);
        assert_eq!(read(0x10 + 40), 0x61);
        assert_eq!(read(0x11 + 40), 0x0300_0000);
        assert_eq!(read(0x10), 0x0001_0000, "masked after reset");
        assert_eq!(read(0xff), u32::MAX, "no such pin");
        ioapic.write(0, 0xff);
        assert_eq!(ioapic.write(0x10, 1), Effect::None);
        // Remote IRR and delivery status can't be stored.
        write(&mut ioapic, 3, 0x61 | LEVEL | READ_ONLY);
        assert_eq!(ioapic.entry(3), 0x61 | LEVEL);
        assert_eq!(ioapic.register_at(0xfec0_0010), Some(0x10));
        assert_eq!(ioapic.register_at(0xfec0_0100), None);
        assert_eq!(ioapic.register_at(0xfebf_ffff), None);
    }
}
