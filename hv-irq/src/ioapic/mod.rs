//! The I/O APIC of a VM whose irqchip is split: 24 pins in user space, local APICs in the kernel.
//!
//! Register compatible with the 82093AA, with the EOI register of its successors (version 0x20). It
//! sends messages and keeps the routes of GSIs 0 to 23 equal to them, from which KVM learns the ends
//! of which interrupts it has to report (`KVM_EXIT_IOAPIC_EOI`). It must not know who drives a pin.
//!
//! A pin is driven by its line, which is in user space, or by eventfds that are irqfds on its GSI while
//! it is not masked, so that KVM sends the message by itself. Such a message leaves no trace in the
//! remote IRR.
//!
//! The lock around the registers is taken before that of the router's state.

mod level;
mod redirection;
mod save;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv_core::{Gsi, IrqBackend, IrqchipId, MsiStatus, RouteTarget};

use crate::state::Op;
use crate::{IrqRouter, LegacyPins, RouteError, RouterError};
pub(crate) use level::PinTrigger;
use level::{Trigger, Triggers};
use redirection::RedirectionEntry;
pub use save::IoapicState;

const PINS: usize = 24;

/// The bits of the identification register.
const ID: u32 = 0x0f00_0000;

/// Offsets of the memory-mapped registers.
mod register {
    pub(super) const SELECT: u64 = 0x00;
    pub(super) const WINDOW: u64 = 0x10;
    pub(super) const EOI: u64 = 0x40;
}

/// Registers behind the window, by the value of the select register.
mod index {
    pub(super) const ID: u8 = 0x00;
    pub(super) const VERSION: u8 = 0x01;
    pub(super) const ARBITRATION: u8 = 0x02;
    /// Two for each pin: the lower half of its entry, then the upper.
    pub(super) const REDIRECTION: u8 = 0x10;
}

/// An I/O APIC in user space. Clones are the same I/O APIC.
///
/// A VMM maps its registers, 4 KiB at 0xfec00000 on a PC, to [`Ioapic::read`] and [`Ioapic::write`],
/// hands it the vector of each `KVM_EXIT_IOAPIC_EOI`, and lets devices drive its pins.
pub struct Ioapic<V: IrqBackend> {
    chip: Arc<Chip<V>>,
}

pub(crate) struct Chip<V: IrqBackend> {
    router: IrqRouter<V>,
    registers: Mutex<Registers>,
}

#[derive(Debug)]
struct Registers {
    select: u8,
    /// Bits 24 to 27, as they are in the register.
    id: u32,
    entries: [RedirectionEntry; PINS],
    /// Bit n: the line to pin n is asserted.
    lines: u32,
    triggers: Triggers,
}

impl<V: IrqBackend> Ioapic<V> {
    /// An I/O APIC after its reset: every pin masked, every line deasserted.
    ///
    /// # Errors
    /// The kernel has the pins of this VM.
    pub fn new(router: IrqRouter<V>) -> Result<Self, RouterError> {
        if router.config().pins == LegacyPins::Kernel {
            return Err(RouterError::PinsInKernel);
        }
        let entries = [RedirectionEntry::RESET; PINS];
        let triggers = Triggers::default();
        let registers = Mutex::new(Registers { select: 0, id: 0, entries, lines: 0, triggers });
        Ok(Self { chip: Arc::new(Chip { router, registers }) })
    }

    /// The guest reads at an offset into the registers. What is no register reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.chip.registers();
        let value = match offset {
            register::SELECT => registers.select.into(),
            register::WINDOW => registers.window(),
            _ => 0,
        };
        let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// The guest writes at an offset into the registers. A changed redirection entry changes the
    /// route first and delivers then. Writes to what is no register do nothing.
    ///
    /// # Errors
    /// KVM refuses the route, and the entry is as before; or it refuses a message.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), RouterError> {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(value);
        let mut registers = self.chip.registers();
        match offset {
            register::SELECT => registers.select = value as u8,
            register::WINDOW => self.chip.write_window(&mut registers, value)?,
            register::EOI => self.chip.end(&mut registers, value as u8)?,
            _ => {}
        }
        Ok(())
    }

    /// Asserts or deasserts the line to a pin.
    ///
    /// # Errors
    /// There is no such pin, or KVM refuses the message.
    pub fn set_line(&self, pin: u8, asserted: bool) -> Result<(), RouterError> {
        self.chip.drive(&mut self.chip.registers(), pin, asserted)
    }

    /// Asserts the line to a pin and deasserts it: one edge, whoever else drives the pin.
    ///
    /// # Errors
    /// There is no such pin, or KVM refuses the message.
    pub fn pulse(&self, pin: u8) -> Result<(), RouterError> {
        let mut registers = self.chip.registers();
        let sent = self.chip.drive(&mut registers, pin, true);
        // Also if it was not sent: the next one needs an edge, too.
        sent.and(self.chip.drive(&mut registers, pin, false))
    }

    /// The guest ended the interrupt with this vector (`KVM_EXIT_IOAPIC_EOI`). Pins whose line is
    /// still asserted interrupt again.
    ///
    /// # Errors
    /// KVM refuses the message.
    pub fn eoi(&self, vector: u8) -> Result<(), RouterError> {
        self.chip.end(&mut self.chip.registers(), vector)
    }
}

impl<V: IrqBackend> Chip<V> {
    fn drive(&self, registers: &mut Registers, pin: u8, asserted: bool) -> Result<(), RouterError> {
        let Some(&entry) = registers.entries.get(usize::from(pin)) else {
            let (chip, pin) = (IrqchipId::IOAPIC, pin.into());
            return Err(RouteError::NoSuchPin { chip, pin }.into());
        };
        let rises = asserted && registers.lines & (1 << pin) == 0;
        registers.lines = (registers.lines & !(1 << pin)) | (u32::from(asserted) << pin);
        if entry.is_level() {
            self.deliver_level(registers, pin.into())
        } else if rises && !entry.is_masked() {
            // An edge on a masked pin is neither delivered nor kept.
            self.router.signal_msi(entry.message())?;
            Ok(())
        } else {
            Ok(())
        }
    }

    /// Sends the message of a pin if it is level-triggered, its line is asserted, and nothing keeps
    /// it back.
    fn deliver_level(&self, registers: &mut Registers, pin: usize) -> Result<(), RouterError> {
        let asserted = registers.lines & (1 << pin) != 0;
        let Some(entry) = registers.entries.get_mut(pin) else { return Ok(()) };
        if !asserted || !entry.is_level() || entry.is_masked() || entry.remote_irr() {
            return Ok(());
        }
        // What no local APIC accepts is not ended either: the pin has to stay ready to send.
        let status = self.router.signal_msi(entry.message())?;
        *entry = entry.with_remote_irr(status == MsiStatus::Delivered);
        Ok(())
    }

    /// Of several pins with this vector, each ends, also if the message of another is refused.
    fn end(&self, registers: &mut Registers, vector: u8) -> Result<(), RouterError> {
        let mut sent = Ok(());
        for pin in 0..PINS {
            let Some(entry) = registers.entries.get_mut(pin) else { continue };
            if entry.is_level() && entry.vector() == vector {
                registers.triggers.resample(pin);
            }
            if entry.remote_irr() && entry.vector() == vector {
                *entry = entry.with_remote_irr(false);
                sent = sent.and(self.deliver_level(registers, pin));
            }
        }
        sent
    }

    fn write_window(&self, registers: &mut Registers, value: u32) -> Result<(), RouterError> {
        let select = registers.select;
        if select == index::ID {
            registers.id = value & ID;
        }
        let Some((pin, upper)) = redirection_index(select) else { return Ok(()) };
        let Some(entry) = registers.entries.get_mut(pin) else { return Ok(()) };
        let before = *entry;
        let written = if upper { before.with_high(value) } else { before.with_low(value) };
        let opens = before.is_masked() && !written.is_masked();
        let waited = match opens && written.is_level() {
            true => registers.triggers.take_waiting(pin),
            false => Vec::new(),
        };
        let committed = self.router.batch(|batch| {
            batch.stage(Op::Set(Gsi(pin as u32), RouteTarget::Msi(written.message())));
            if before.is_masked() != written.is_masked() {
                registers.triggers.stage(batch, pin, opens);
            }
            Ok(())
        });
        if let Err(error) = committed {
            waited.iter().for_each(Trigger::put_back);
            return Err(error);
        }
        waited.iter().for_each(Trigger::ask);
        *entry = written;
        // The end of an interrupt that is in service has the old vector, and would find nobody.
        if before.is_level() && (before.vector() != written.vector() || !written.is_level()) {
            registers.triggers.resample(pin);
        }
        self.deliver_level(registers, pin)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // Registers are plain numbers, each valid by itself, so that a panic of a backend leaves
        // nothing half-made.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn window(&self) -> u32 {
        match self.select {
            // The arbitration id is that of the I/O APIC, there being no bus to arbitrate.
            index::ID | index::ARBITRATION => self.id,
            index::VERSION => 0x20 | ((PINS as u32 - 1) << 16),
            select => match redirection_index(select) {
                Some((pin, upper)) => self
                    .entries
                    .get(pin)
                    .map_or(0, |entry| if upper { entry.high() } else { entry.low() }),
                None => 0,
            },
        }
    }
}

/// Which pin a register belongs to, and whether it is the upper half of its entry.
fn redirection_index(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(index::REDIRECTION)?;
    Some((usize::from(index / 2), index % 2 == 1))
}

impl<V: IrqBackend> Clone for Ioapic<V> {
    fn clone(&self) -> Self {
        Self { chip: Arc::clone(&self.chip) }
    }
}

impl<V: IrqBackend> fmt::Debug for Ioapic<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registers = self.chip.registers();
        f.debug_struct("Ioapic").field("registers", &*registers).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
