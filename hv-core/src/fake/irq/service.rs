//! How a vCPU takes interrupts and ends them, and who hears of the end: the I/O APIC, resample
//! eventfds, the VMM's I/O APIC.

use super::ioapic::Source;
use super::lapic::Lapic;
use super::message::Message;
use super::routing::IOAPIC_PINS;
use super::{DirectedEoi, Interrupt, Irq, lapics};
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
        self.listen(vcpu);
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
                && !self.is_heard(vcpu, vector)
                && let Some(lapic) = self.lapics.get_mut(vcpu)
            {
                lapic.end(vector);
                if let Some(pins) = &mut self.pins {
                    pins.ioapic.vector_ended(vcpu, vector);
                }
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
        self.listen(vcpu);
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

    /// Who hears of ends has changed, on any vCPU.
    pub(super) fn listeners_changed(&mut self) {
        self.listeners = self.listeners.wrapping_add(1);
    }

    /// Brings up to date whose end is heard on a vCPU. A vector that is pending or in service when
    /// its route leads elsewhere is still heard when it ends. As in KVM, this is done when the vCPU
    /// enters the guest.
    pub(in crate::fake) fn listen(&mut self, vcpu: u32) {
        let current = Some(self.listeners);
        let Some(lapic) = self.lapics.get(vcpu).filter(|lapic| lapic.listeners != current) else {
            return;
        };
        let meant = |message: &Message| lapics::meant(lapic, message.destination, None);
        let (meant, mut old): (Vec<_>, Vec<_>) = self.heard_messages().into_iter().partition(meant);
        old.retain(|message| lapic.has(message.vector));
        let vectors = |messages: &[Message]| messages.iter().map(|m| m.vector).collect::<Vec<_>>();
        let (mut heard, old) = (vectors(&meant), vectors(&old));
        heard.extend(&old);
        if let Some(lapic) = self.lapics.get_mut(vcpu) {
            lapic.listeners = current;
            lapic.heard = heard;
            lapic.last_heard = old.into_iter().max();
        }
    }

    /// The messages whose ends are heard: of level-triggered pins, pins with a resampler, and
    /// level-triggered routes of the VMM's I/O APIC.
    fn heard_messages(&self) -> Vec<Message> {
        if let Some(pins) = &self.pins {
            let resampled = |pin| {
                let gsi = self.table.gsi_of(IrqchipId::IOAPIC, pin);
                gsi.is_some_and(|gsi| self.irqfds.resamples(gsi))
            };
            let pins = (0..IOAPIC_PINS).map(|pin| (pin, pins.ioapic.message(pin)));
            let heard = pins.filter(|&(pin, message)| message.level || resampled(pin));
            return heard.map(|(_, message)| message).collect();
        }
        let reserved = self.table.routes().iter().filter(|route| route.gsi.0 < self.reserved);
        let messages = reserved.filter_map(|route| match route.target {
            RouteTarget::Msi(msi) => Some(Message::from_msi(msi, self.wide_ids)),
            RouteTarget::Pin { .. } | RouteTarget::HypervSint { .. } => None,
        });
        messages.filter(|message| message.level).collect()
    }

    fn is_heard(&self, vcpu: u32, vector: u8) -> bool {
        self.lapics.get(vcpu).is_some_and(|lapic| lapic.heard.contains(&vector))
    }

    /// A vector is no longer in service at a local APIC.
    pub(super) fn ended(&mut self, vcpu: u32, vector: u8) -> Option<u8> {
        if let Some(pins) = &mut self.pins {
            pins.ioapic.vector_ended(vcpu, vector);
        }
        if !self.is_heard(vcpu, vector) {
            return None;
        }
        if let Some(lapic) = self.lapics.get_mut(vcpu)
            && lapic.last_heard == Some(vector)
        {
            lapic.listeners = None;
        }
        let Some(pins) = &self.pins else {
            let keeps = |lapic: &Lapic| lapic.suppresses_eoi();
            let kept =
                self.directed_eoi == DirectedEoi::Done && self.lapics.get(vcpu).is_some_and(keeps);
            return (!kept).then_some(vector);
        };
        let was_level = self.lapics.get(vcpu).is_some_and(|lapic| lapic.level(vector));
        for pin in pins.ioapic.pins_of(vector) {
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
