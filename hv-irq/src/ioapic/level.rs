//! The eventfds that drive level-triggered pins, and those that are signalled at the end.
//!
//! They are irqfds while their pin is not masked. While it is masked they are unbound, and an event
//! waits in its eventfd. By the time the pin is unmasked the device may want no interrupt any more (a
//! guest whose handler runs in a thread masks the pin, and serves the device before it unmasks it), and
//! KVM can't look. So what waited is not delivered then: the device is asked, as KVM's own I/O APIC does.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, Gsi, IrqBackend, IrqchipId, Irqfd};

use super::{Chip, Ioapic, PINS};
use crate::router::Shared;
use crate::state::Op;
use crate::{Batch, IrqRouter, LevelPin, RouteError, RouterError};

/// What drives a pin, and what is told of the end of its interrupts.
#[derive(Debug, Clone)]
pub(super) struct Trigger {
    event: EventFd,
    resample: EventFd,
}

/// Those of all pins.
#[derive(Debug, Default)]
pub(super) struct Triggers([Vec<Trigger>; PINS]);

impl Trigger {
    /// The event waits again.
    pub(super) fn put_back(&self) {
        self.event.signal();
    }

    /// The device has to look whether it wants an interrupt.
    pub(super) fn ask(&self) {
        self.resample.signal();
    }
}

impl Triggers {
    /// Tells those who drive a pin that its interrupt ended.
    pub(super) fn resample(&self, pin: usize) {
        self.of(pin).iter().for_each(Trigger::ask);
    }

    /// Takes the events that wait at a pin, and says whose they are.
    pub(super) fn take_waiting(&self, pin: usize) -> Vec<Trigger> {
        let waiting = self.of(pin).iter().filter(|trigger| trigger.event.take().is_some());
        waiting.cloned().collect()
    }

    /// Binds or unbinds those that drive a pin.
    pub(super) fn stage<V: IrqBackend>(&self, batch: &mut Batch<'_, V>, pin: usize, bind: bool) {
        let gsi = Gsi(pin as u32);
        for Trigger { event, .. } in self.of(pin) {
            batch.stage(if bind {
                Op::Keep(Irqfd { event: event.clone(), gsi, resample: None })
            } else {
                Op::UnbindEvent(event.as_raw_fd())
            });
        }
    }

    fn of(&self, pin: usize) -> &[Trigger] {
        self.0.get(pin).map_or(&[], Vec::as_slice)
    }

    fn pin_of(&self, event: &EventFd) -> Option<Gsi> {
        let drives = |pin: &Vec<Trigger>| pin.iter().any(|trigger| trigger.event == *event);
        self.0.iter().position(drives).map(|pin| Gsi(pin as u32))
    }
}

/// Who drives a pin by an eventfd: what it takes to let go of it.
pub(crate) struct PinTrigger<V: IrqBackend> {
    chip: Weak<Chip<V>>,
    /// The I/O APIC may go first; what is bound is the router's.
    router: Weak<Shared<V>>,
    event: EventFd,
}

impl<V: IrqBackend> Drop for PinTrigger<V> {
    fn drop(&mut self) {
        let chip = self.chip.upgrade();
        let mut registers = chip.as_ref().map(|chip| chip.registers());
        for pin in registers.iter_mut().flat_map(|registers| &mut registers.triggers.0) {
            pin.retain(|trigger| trigger.event != self.event);
        }
        if let Some(shared) = self.router.upgrade() {
            IrqRouter { shared }.release_irqfd(&self.event);
        }
    }
}

impl<V: IrqBackend> Ioapic<V> {
    /// Lets an eventfd drive a level-triggered pin as it would a line of the kernel
    /// ([`crate::IrqRouter::bind_level`]): KVM sends the pin's message when `trigger` is signalled and
    /// the pin is not masked, and `resample` is signalled when the guest ends the interrupt, or unmasks
    /// the pin after it was raised. Both must be non-blocking.
    ///
    /// # Errors
    /// There is no such pin, the eventfd drives one already, or KVM refuses the irqfd.
    pub fn bind_level(
        &self,
        pin: u8,
        trigger: EventFd,
        resample: EventFd,
    ) -> Result<LevelPin<V>, RouterError> {
        let (chip, index, gsi) = (&self.chip, usize::from(pin), Gsi(pin.into()));
        let mut registers = chip.registers();
        let fd = trigger.as_raw_fd();
        // Bound elsewhere it could not be bound when the guest unmasks the pin.
        let bound = || chip.router.shared.state().owned_irqfd(fd);
        if let Some(gsi) = registers.triggers.pin_of(&trigger).or_else(bound) {
            return Err(RouterError::EventInUse { fd, gsi });
        }
        let Some(entry) = registers.entries.get(index) else {
            let (chip, pin) = (IrqchipId::IOAPIC, pin.into());
            return Err(RouteError::NoSuchPin { chip, pin }.into());
        };
        if !entry.is_masked() {
            chip.router.batch(|batch| {
                let event = trigger.clone();
                batch.stage(Op::Bind(Irqfd { event, gsi, resample: None }));
                Ok(())
            })?;
        }
        if let Some(pin) = registers.triggers.0.get_mut(index) {
            pin.push(Trigger { event: trigger.clone(), resample: resample.clone() });
        }
        let router = Arc::downgrade(&chip.router.shared);
        let owner = PinTrigger { chip: Arc::downgrade(chip), router, event: trigger.clone() };
        Ok(LevelPin::in_user_space(gsi, trigger, resample, owner))
    }
}
