//! How a vCPU takes interrupts and ends them, and who hears of the end: the I/O APIC, resample
//! eventfds, the VMM's I/O APIC.

use super::ioapic::Source;
use super::lapic::Lapic;
use super::message::Message;
use super::{Interrupt, Irq, Kind, lapics};
use crate::{IrqchipId, RouteTarget};

impl Irq {
    /// All that reached a vCPU, oldest first; a vector that was already waiting is not told twice.
    /// What comes from the 8259 pair is told when the vCPU takes it. The newest tens of thousands
    /// are kept.
    pub(in crate::fake) fn log(&self, vcpu: u32) -> &[Interrupt] {
        self.lapics.get(vcpu).map_or(&[], Lapic::log)
    }

    /// Whether a vCPU that takes interrupts has one to take.
    pub(in crate::fake) fn pending(&self, vcpu: u32) -> bool {
        self.lapics.get(vcpu).is_some_and(|lapic| lapic.pending() || self.pic_asks(lapic))
    }

    fn pic_asks(&self, lapic: &Lapic) -> bool {
        lapic.takes_pic() && self.pins.as_ref().is_some_and(|pins| pins.pic.asks())
    }

    /// The vCPU takes what is pending, in the order a processor does: INIT and start-up, SMI, NMI,
    /// the 8259 pair, then vectors by priority.
    ///
    /// Its handlers end a vector at once if nobody is told of the end. One whose end matters (it was
    /// level-triggered, or a resample eventfd or the VMM's I/O APIC waits for it) stays in service,
    /// and with it everything of the same or a lower priority class stays pending, until
    /// [`Self::end_of_interrupt`].
    pub(in crate::fake) fn take(&mut self, vcpu: u32) -> Vec<Interrupt> {
        let Some(lapic) = self.lapics.get_mut(vcpu) else {
            return Vec::new();
        };
        let mut taken = lapic.take_events();
        // One per pin at most: one that ends by itself and is level-triggered would go on for ever.
        for _ in 0..16 {
            let Some(vector) = self.take_from_pic(vcpu) else {
                break;
            };
            taken.push(Interrupt::ExtInt(vector));
        }
        // Every vector at most once, for the same reason.
        for _ in 0..=u8::MAX {
            let Some(lapic) = self.lapics.get_mut(vcpu) else {
                break;
            };
            let Some(vector) = lapic.deliverable() else {
                break;
            };
            lapic.begin(vector);
            taken.push(Interrupt::Fixed(vector));
            if !lapic.level(vector)
                && !self.end_is_heard(vcpu, vector)
                && let Some(lapic) = self.lapics.get_mut(vcpu)
            {
                lapic.end(vector);
            }
        }
        taken
    }

    /// The INIT and start-up messages a vCPU has, which act on it whether it runs or not.
    pub(in crate::fake) fn take_starts(&mut self, vcpu: u32) -> Vec<Interrupt> {
        self.lapics.get_mut(vcpu).map(Lapic::take_starts).unwrap_or_default()
    }

    fn take_from_pic(&mut self, vcpu: u32) -> Option<u8> {
        let lapic = self.lapics.get(vcpu)?;
        if !self.pic_asks(lapic) {
            return None;
        }
        let vector = self.pins.as_mut()?.pic.acknowledge();
        self.lapics.get_mut(vcpu)?.took_pic(vector);
        self.pic_ended();
        Some(vector)
    }

    /// The guest ends a vector that is in service, at the local APIC or else at the 8259 pair; any
    /// other is no harm. In split mode: the vector with which `KVM_EXIT_IOAPIC_EOI` is due.
    pub(in crate::fake) fn end_of_interrupt(&mut self, vcpu: u32, vector: u8) -> Option<u8> {
        if self.lapics.get_mut(vcpu).is_some_and(|lapic| lapic.end(vector)) {
            return self.ended(vcpu, vector);
        }
        if self.pins.as_mut().is_some_and(|pins| pins.pic.end(vector)) {
            self.pic_ended();
        }
        None
    }

    // The end of interrupts.

    /// The vector with which `KVM_EXIT_IOAPIC_EOI` is due, after a store of this vCPU to its local
    /// APIC.
    pub(in crate::fake) fn take_ioapic_eoi(&mut self, vcpu: u32) -> Option<u8> {
        self.lapics.get_mut(vcpu)?.exit_with.take()
    }

    /// Whether the end of a vector on this vCPU is anyone's business.
    fn end_is_heard(&self, vcpu: u32, vector: u8) -> bool {
        match self.kind {
            None => false,
            Some(Kind::Full) => !self.pins_that_hear(vcpu, vector).is_empty(),
            Some(Kind::Split) => self.exits_with(vcpu, vector),
        }
    }

    /// The pins of the I/O APIC that hear of the end: those with this vector and destination that
    /// are level-triggered or have a resampler.
    fn pins_that_hear(&self, vcpu: u32, vector: u8) -> Vec<u32> {
        let (Some(pins), Some(lapic)) = (&self.pins, self.lapics.get(vcpu)) else {
            return Vec::new();
        };
        let mut heard = pins.ioapic.pins_of(vector);
        heard.retain(|&pin| {
            let message = pins.ioapic.message(pin);
            let gsi = self.table.gsi_of(IrqchipId::IOAPIC, pin);
            (message.level || gsi.is_some_and(|gsi| self.irqfds.resamples(gsi)))
                && (lapics::meant(lapic, message.destination, None) || lapic.level(vector))
        });
        heard
    }

    /// Whether the VMM's I/O APIC hears of the end: a level-triggered route of one of its GSIs has
    /// this vector and destination.
    fn exits_with(&self, vcpu: u32, vector: u8) -> bool {
        let Some(lapic) = self.lapics.get(vcpu) else {
            return false;
        };
        self.table.routes().iter().filter(|route| route.gsi.0 < self.reserved).any(|route| {
            let RouteTarget::Msi(msi) = route.target else {
                return false;
            };
            let message = Message::from_msi(msi, self.wide_ids);
            message.level
                && message.vector == vector
                && (lapics::meant(lapic, message.destination, None) || lapic.level(vector))
        })
    }

    /// A vector is no longer in service at a local APIC.
    pub(super) fn ended(&mut self, vcpu: u32, vector: u8) -> Option<u8> {
        if self.kind == Some(Kind::Split) {
            return self.exits_with(vcpu, vector).then_some(vector);
        }
        let was_level = self.lapics.get(vcpu).is_some_and(|lapic| lapic.level(vector));
        for pin in self.pins_that_hear(vcpu, vector) {
            self.acknowledged(IrqchipId::IOAPIC, pin);
            if let Some(pins) = &mut self.pins {
                pins.ioapic.end(pin, was_level, &mut self.lapics);
            }
        }
        None
    }

    pub(super) fn pic_ended(&mut self) {
        let Some(pins) = &mut self.pins else {
            return;
        };
        for pin in pins.pic.take_ended() {
            match pin {
                0..8 => self.acknowledged(IrqchipId::PIC_MASTER, pin.into()),
                _ => self.acknowledged(IrqchipId::PIC_SLAVE, u32::from(pin) - 8),
            }
        }
    }

    /// The guest has ended the interrupt of a pin: its resamplers let go of the line and their
    /// eventfds are signalled.
    fn acknowledged(&mut self, chip: IrqchipId, pin: u32) {
        if let Some(gsi) = self.table.gsi_of(chip, pin).filter(|&gsi| self.irqfds.resamples(gsi)) {
            self.drive(gsi, Source::Resample, false);
            self.irqfds.resample(gsi);
        }
    }
}
