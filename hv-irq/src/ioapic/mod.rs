//! The I/O APIC of a VM whose irqchip is split: 24 pins in user space, local APICs in the kernel.
//!
//! Register compatible with the 82093AA, with the EOI register of its successors (version 0x20). It
//! sends messages and keeps the routes of GSIs 0 to 23 equal to them, from which KVM learns the ends
//! of which interrupts it has to report (`KVM_EXIT_IOAPIC_EOI`). It must not know who drives a pin.
//!
//! Lock order: the lock around the registers is taken before that of the router.

mod redirection;

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hv_core::{IrqBackend, IrqchipId, MsiStatus};

use crate::{IrqRouter, LegacyPins, RouteError, RouterError};
use redirection::RedirectionEntry;

const PINS: usize = 24;

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

/// An I/O APIC in user space.
///
/// A VMM maps its registers, 4 KiB at 0xfec00000 on a PC, to [`Ioapic::read`] and [`Ioapic::write`],
/// hands it the vector of each `KVM_EXIT_IOAPIC_EOI`, and lets devices drive its pins.
pub struct Ioapic<V: IrqBackend> {
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
        let registers = Mutex::new(Registers { select: 0, id: 0, entries, lines: 0 });
        Ok(Self { router, registers })
    }

    /// The guest reads at an offset into the registers. What is no register reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
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
        let mut registers = self.registers();
        match offset {
            register::SELECT => registers.select = value as u8,
            register::WINDOW => self.write_window(&mut registers, value)?,
            register::EOI => self.end(&mut registers, value as u8)?,
            _ => {}
        }
        Ok(())
    }

    /// Asserts or deasserts the line to a pin.
    ///
    /// # Errors
    /// There is no such pin, or KVM refuses the message.
    pub fn set_line(&self, pin: u8, asserted: bool) -> Result<(), RouterError> {
        self.drive(&mut self.registers(), pin, asserted)
    }

    /// Asserts the line to a pin and deasserts it: one edge, whoever else drives the pin.
    ///
    /// # Errors
    /// There is no such pin, or KVM refuses the message.
    pub fn pulse(&self, pin: u8) -> Result<(), RouterError> {
        let mut registers = self.registers();
        self.drive(&mut registers, pin, true)?;
        self.drive(&mut registers, pin, false)
    }

    /// The guest ended the interrupt with this vector (`KVM_EXIT_IOAPIC_EOI`). Pins whose line is
    /// still asserted interrupt again.
    ///
    /// # Errors
    /// KVM refuses the message.
    pub fn eoi(&self, vector: u8) -> Result<(), RouterError> {
        self.end(&mut self.registers(), vector)
    }

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

    fn end(&self, registers: &mut Registers, vector: u8) -> Result<(), RouterError> {
        for pin in 0..PINS {
            let Some(entry) = registers.entries.get_mut(pin) else { continue };
            if entry.remote_irr() && entry.vector() == vector {
                *entry = entry.with_remote_irr(false);
                self.deliver_level(registers, pin)?;
            }
        }
        Ok(())
    }

    fn write_window(&self, registers: &mut Registers, value: u32) -> Result<(), RouterError> {
        let select = registers.select;
        if select == index::ID {
            registers.id = value & 0x0f00_0000;
        }
        let Some((pin, upper)) = redirection_index(select) else { return Ok(()) };
        let Some(entry) = registers.entries.get_mut(pin) else { return Ok(()) };
        let written = if upper { entry.with_high(value) } else { entry.with_low(value) };
        self.router.batch(|batch| {
            batch.set_legacy(pin as u32, written.message());
            Ok(())
        })?;
        *entry = written;
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

impl<V: IrqBackend> fmt::Debug for Ioapic<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioapic").field("registers", &*self.registers()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RouterConfig;
    use hv_core::mock::MockVm;
    use hv_core::{Errno, Error, Gsi, Ioctl, Msi, Route, RouteTarget};
    use std::sync::{Arc, Mutex};

    /// What a VM is told, in order.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum Told {
        Table(Vec<Route>),
        Message(Msi),
    }

    type Log = Arc<Mutex<Vec<Told>>>;

    fn ioapic(status: MsiStatus) -> (Ioapic<MockVm>, Log) {
        let log = Log::default();
        let (tables, messages) = (log.clone(), log.clone());
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().returning(move |routes| {
            tables.lock().unwrap().push(Told::Table(routes.to_vec()));
            Ok(())
        });
        vm.expect_signal_msi().returning(move |msi| {
            messages.lock().unwrap().push(Told::Message(msi));
            Ok(status)
        });
        (Ioapic::new(split(vm)).unwrap(), log)
    }

    fn split(vm: MockVm) -> IrqRouter<MockVm> {
        let pins = LegacyPins::Userspace;
        let config = RouterConfig { gsi_count: 4096, pins, inject_status: true };
        IrqRouter::new(Arc::new(vm), config).unwrap()
    }

    fn set(ioapic: &Ioapic<MockVm>, register: u8, value: u32) {
        ioapic.write(register::SELECT, &[register]).unwrap();
        ioapic.write(register::WINDOW, &value.to_le_bytes()).unwrap();
    }

    fn get(ioapic: &Ioapic<MockVm>, register: u8) -> u32 {
        ioapic.write(register::SELECT, &u32::from(register).to_le_bytes()).unwrap();
        let mut data = [0xaa; 4];
        ioapic.read(register::WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn low(pin: u8) -> u8 {
        index::REDIRECTION + 2 * pin
    }

    fn taken(log: &Log) -> Vec<Told> {
        std::mem::take(&mut log.lock().unwrap())
    }

    fn message(data: u32) -> Told {
        Told::Message(Msi { address: 0xfee0_0000, data, device: None })
    }

    const LEVEL_0X41: u32 = 0x8041;

    #[test]
    fn identifies_itself() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        assert_eq!(get(&ioapic, index::VERSION), 0x0017_0020, "24 entries, with an EOI register");
        set(&ioapic, index::ID, 0xffff_ffff);
        assert_eq!(get(&ioapic, index::ID), 0x0f00_0000);
        assert_eq!(get(&ioapic, index::ARBITRATION), 0x0f00_0000);
        for pin in 0..24 {
            assert_eq!(get(&ioapic, low(pin)), 0x1_0000, "masked");
            assert_eq!(get(&ioapic, low(pin) + 1), 0);
        }
        assert!(taken(&log).is_empty(), "none of this concerns KVM");
    }

    #[test]
    fn any_access_to_any_offset_is_answered() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        for offset in (0..0x1000).chain([u64::MAX]) {
            if offset != register::WINDOW {
                ioapic.write(offset, &[0xff; 8]).unwrap();
            }
            let mut data = [0xaa; 8];
            ioapic.read(offset, &mut data);
            ioapic.read(offset, &mut data[..1]);
            ioapic.read(offset, &mut []);
            assert_eq!(data[4..], [0; 4]);
        }
        for select in 0x40..=0xff {
            set(&ioapic, select, u32::MAX);
            assert_eq!(get(&ioapic, select), 0, "no such register");
        }
        assert!(taken(&log).is_empty());
    }

    #[test]
    fn an_edge_is_sent_once_and_not_while_masked() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        ioapic.pulse(4).unwrap();
        set(&ioapic, low(4), 0x31);
        let route = Route {
            gsi: Gsi(4),
            target: RouteTarget::Msi(Msi { address: 0xfee0_0000, data: 0x31, device: None }),
        };
        assert_eq!(taken(&log), [Told::Table(vec![route])], "nothing is left of a masked edge");
        ioapic.set_line(4, true).unwrap();
        ioapic.set_line(4, true).unwrap();
        assert_eq!(taken(&log), [message(0x31)], "a level is no edge");
        ioapic.set_line(4, false).unwrap();
        ioapic.pulse(4).unwrap();
        ioapic.pulse(4).unwrap();
        assert_eq!(taken(&log), [message(0x31), message(0x31)]);
        assert_eq!(get(&ioapic, low(4)), 0x31, "an edge leaves no remote IRR");
    }

    #[test]
    fn a_level_is_sent_again_only_after_its_end() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        set(&ioapic, low(9), LEVEL_0X41);
        taken(&log);
        ioapic.set_line(9, true).unwrap();
        ioapic.set_line(9, false).unwrap();
        ioapic.set_line(9, true).unwrap();
        assert_eq!(taken(&log), [message(0xc041)]);
        assert_eq!(get(&ioapic, low(9)), LEVEL_0X41 | 0x4000, "remote IRR");
        ioapic.eoi(0x40).unwrap();
        assert!(taken(&log).is_empty(), "another vector");
        ioapic.eoi(0x41).unwrap();
        assert_eq!(taken(&log), [message(0xc041)], "still asserted");
        ioapic.set_line(9, false).unwrap();
        ioapic.write(register::EOI, &0x41_u32.to_le_bytes()).unwrap();
        assert!(taken(&log).is_empty());
        assert_eq!(get(&ioapic, low(9)), LEVEL_0X41);
    }

    #[test]
    fn a_masked_level_waits_and_its_end_still_counts() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        set(&ioapic, low(9), LEVEL_0X41);
        ioapic.set_line(9, true).unwrap();
        taken(&log);
        // Masked while in service, as a handler that runs in a thread does.
        set(&ioapic, low(9), LEVEL_0X41 | 0x1_0000);
        assert!(taken(&log).is_empty(), "the mask is no part of the route: no ioctl");
        ioapic.eoi(0x41).unwrap();
        assert!(taken(&log).is_empty());
        assert_eq!(get(&ioapic, low(9)), LEVEL_0X41 | 0x1_0000, "ended");
        set(&ioapic, low(9), LEVEL_0X41);
        assert_eq!(taken(&log), [message(0xc041)], "unmasked with its line asserted");
    }

    #[test]
    fn the_route_is_committed_before_the_message_is_sent() {
        let (ioapic, log) = ioapic(MsiStatus::Delivered);
        ioapic.set_line(5, true).unwrap();
        set(&ioapic, low(5), 0x8052);
        let told = taken(&log);
        assert!(matches!(told[..], [Told::Table(_), Told::Message(_)]), "{told:?}");
        set(&ioapic, low(5) + 1, 0x0100_0000);
        assert!(matches!(taken(&log)[..], [Told::Table(_)]), "in service: not sent again");
    }

    #[test]
    fn without_a_target_the_pin_stays_ready() {
        let (ioapic, log) = ioapic(MsiStatus::NoTarget);
        set(&ioapic, low(9), LEVEL_0X41);
        ioapic.set_line(9, true).unwrap();
        assert_eq!(get(&ioapic, low(9)), LEVEL_0X41, "nobody accepted it");
        taken(&log);
        set(&ioapic, low(9) + 1, 0x0100_0000);
        assert_eq!(taken(&log).len(), 2, "tried again at its new destination");
    }

    #[test]
    fn a_refused_route_leaves_the_entry_as_it_was() {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        let refused = Error::new(Ioctl::SetGsiRouting, Errno::ENOMEM);
        vm.expect_set_gsi_routing().returning(move |_| Err(refused));
        let ioapic = Ioapic::new(split(vm)).unwrap();
        ioapic.write(register::SELECT, &[low(3)]).unwrap();
        let error = ioapic.write(register::WINDOW, &[0x41, 0x80, 0, 0]).unwrap_err();
        assert_eq!(error, RouterError::Kvm(refused));
        assert_eq!(get(&ioapic, low(3)), 0x1_0000);
    }

    #[test]
    fn not_beside_the_one_in_the_kernel_and_not_beyond_its_pins() {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().returning(|_| Ok(()));
        let pins = LegacyPins::Kernel;
        let config = RouterConfig { gsi_count: 4096, pins, inject_status: true };
        let router = IrqRouter::new(Arc::new(vm), config).unwrap();
        assert_eq!(Ioapic::new(router).unwrap_err(), RouterError::PinsInKernel);
        let (ioapic, _) = ioapic(MsiStatus::Delivered);
        let error = ioapic.set_line(24, true).unwrap_err();
        assert_eq!(error.to_string(), "pin 24 of irqchip 2 does not exist");
    }
}
