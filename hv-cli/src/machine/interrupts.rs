//! How the machine's own devices reach an interrupt controller, wherever it is.
//!
//! With the controllers in KVM a line is an irqfd, so raising it is no ioctl; in split mode it is a
//! pin of hv-irq's I/O APIC.

use std::sync::Arc;

use hv_core::init::{Irqchip, Record};
use hv_core::{Call, Errno, Error, Gsi, IrqBackend};
use hv_irq::{IrqRouter, LegacyPins, PinIrqfd, RouterConfig, RouterError};

use crate::devices::{EdgeIrq, IrqLines};
use crate::event::Event;

/// The interrupts of a machine.
pub(super) struct Interrupts<V: IrqBackend> {
    router: IrqRouter<V>,
}

impl<V: IrqBackend + Send + Sync + 'static> Interrupts<V> {
    /// Sets the default routes of the machine that init made.
    ///
    /// # Errors
    /// KVM has no routing, or refuses the routes.
    pub(super) fn new(vm: Arc<V>, record: &Record) -> Result<Self, RouterError> {
        let pins = match record.irqchip {
            Irqchip::Split { .. } => LegacyPins::Userspace,
            Irqchip::Kernel { .. } | Irqchip::Off => LegacyPins::Kernel,
        };
        let config = RouterConfig {
            gsi_count: record.routing.map_or(0, |routing| routing.gsi_count),
            pins,
            inject_status: record.inject_status,
        };
        let router = IrqRouter::new(vm, config)?;
        Ok(Self { router })
    }

    /// The router, for devices with messages of their own.
    pub(super) fn router(&self) -> &IrqRouter<V> {
        &self.router
    }

    /// An edge-triggered line.
    ///
    /// # Errors
    /// KVM refuses the irqfd, or there is no descriptor left for it.
    pub(super) fn edge(&self, line: u8) -> Result<Arc<dyn EdgeIrq>, RouterError> {
        let event = Event::new().map_err(|error| Error::new(Call::Eventfd, Errno::from(&error)))?;
        let irqfd = self.router.bind_pin(Gsi(line.into()), event.shared())?;
        Ok(Arc::new(KernelPin { event, _irqfd: irqfd }))
    }

    /// All lines by their level.
    pub(super) fn lines(&self) -> Box<dyn IrqLines> {
        Box::new(KernelLines(self.router.clone()))
    }
}

struct KernelPin<V: IrqBackend> {
    event: Event,
    _irqfd: PinIrqfd<V>,
}

impl<V: IrqBackend + Send + Sync> EdgeIrq for KernelPin<V> {
    fn raise(&self) {
        self.event.signal();
    }
}

struct KernelLines<V: IrqBackend>(IrqRouter<V>);

impl<V: IrqBackend + Send + Sync> IrqLines for KernelLines<V> {
    fn set(&mut self, gsi: u32, level: bool) {
        // A line that is not there is a wire to nowhere.
        let _ = self.0.set_line(Gsi(gsi), level);
    }
}
