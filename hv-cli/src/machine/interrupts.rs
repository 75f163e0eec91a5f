//! How the machine's own devices reach an interrupt controller, wherever it is.
//!
//! With the controllers in KVM a line is an irqfd, so raising it is no ioctl; with a split irqchip
//! it is a pin of hv-irq's I/O APIC. What a guest programs there may be nonsense that KVM refuses:
//! then no interrupt arrives, which is what such a guest has asked for.

use std::sync::{Arc, Mutex};

use hv_core::init::Record;
use hv_core::{Call, Errno, Error, Gsi, IrqBackend};
use hv_irq::{Ioapic, IrqRouter, LegacyPins, LevelPin, PinIrqfd, RouterConfig, RouterError};

use super::bus::{BusError, Device};
use super::exits::Outside;
use crate::devices::{EdgeIrq, IrqLines};
use crate::event::Event;
use crate::layout;

/// The interrupts of a machine.
pub(super) struct Interrupts<V: IrqBackend> {
    router: IrqRouter<V>,
    /// The I/O APIC, if it is not in the kernel.
    ioapic: Option<Arc<Ioapic<V>>>,
}

impl<V: IrqBackend + Send + Sync + 'static> Interrupts<V> {
    /// Sets the default routes of the machine that init made.
    ///
    /// # Errors
    /// KVM has no routing, or refuses the routes.
    pub(super) fn new(vm: Arc<V>, record: &Record) -> Result<Self, RouterError> {
        let config = RouterConfig::from(record);
        let router = IrqRouter::new(vm, config)?;
        let ioapic = match config.pins {
            LegacyPins::Userspace => Some(Arc::new(Ioapic::new(router.clone())?)),
            LegacyPins::Kernel => None,
        };
        Ok(Self { router, ioapic })
    }

    /// The router, for devices with messages of their own.
    pub(super) fn router(&self) -> &IrqRouter<V> {
        &self.router
    }

    /// Puts the I/O APIC where the guest looks for it, if it is not in the kernel.
    ///
    /// # Errors
    /// Something else is there.
    pub(super) fn attach(&self, outside: &mut Outside) -> Result<(), BusError> {
        let Some(ioapic) = &self.ioapic else { return Ok(()) };
        let page = Arc::new(Mutex::new(IoapicPage(ioapic.clone())));
        outside.memory.insert("I/O APIC", layout::IO_APIC.into(), 0x1000, page)?;
        let ioapic = ioapic.clone();
        outside.end_of_interrupt = Some(Box::new(move |vector| {
            let _ = ioapic.eoi(vector);
        }));
        Ok(())
    }

    /// An edge-triggered line.
    ///
    /// # Errors
    /// KVM refuses the irqfd, or there is no descriptor left for it.
    pub(super) fn edge(&self, line: u8) -> Result<Arc<dyn EdgeIrq>, RouterError> {
        if let Some(ioapic) = &self.ioapic {
            return Ok(Arc::new(UserspacePin { ioapic: ioapic.clone(), pin: line }));
        }
        let event = Event::new().map_err(|error| Error::new(Call::Eventfd, Errno::from(&error)))?;
        let irqfd = self.router.bind_pin(Gsi(line.into()), event.shared())?;
        Ok(Arc::new(KernelPin { event, _irqfd: irqfd }))
    }

    /// A level-triggered line, unless this KVM can't tell of the end of its interrupts.
    ///
    /// # Errors
    /// KVM refuses the irqfd, or there is no descriptor left for it.
    pub(super) fn level(
        &self,
        line: u8,
        record: &Record,
    ) -> Result<Option<LevelPin<V>>, RouterError> {
        let event = || {
            let event = Event::new().map_err(|e| Error::new(Call::Eventfd, Errno::from(&e)))?;
            Ok::<_, RouterError>(event.shared())
        };
        match &self.ioapic {
            Some(ioapic) => ioapic.bind_level(line, event()?, event()?).map(Some),
            None if record.irqfds.resample => {
                self.router.bind_level(Gsi(line.into()), event()?, event()?).map(Some)
            }
            None => Ok(None),
        }
    }

    /// All lines by their level.
    pub(super) fn lines(&self) -> Box<dyn IrqLines> {
        match &self.ioapic {
            Some(ioapic) => Box::new(UserspaceLines(ioapic.clone())),
            None => Box::new(KernelLines(self.router.clone())),
        }
    }
}

struct IoapicPage<V: IrqBackend>(Arc<Ioapic<V>>);

impl<V: IrqBackend + Send + Sync> Device for IoapicPage<V> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.0.write(offset, data);
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

struct UserspacePin<V: IrqBackend> {
    ioapic: Arc<Ioapic<V>>,
    pin: u8,
}

impl<V: IrqBackend + Send + Sync> EdgeIrq for UserspacePin<V> {
    fn raise(&self) {
        let _ = self.ioapic.pulse(self.pin);
    }
}

struct KernelLines<V: IrqBackend>(IrqRouter<V>);

impl<V: IrqBackend + Send + Sync> IrqLines for KernelLines<V> {
    fn set(&mut self, gsi: u32, level: bool) {
        let _ = self.0.set_line(Gsi(gsi), level);
    }
}

struct UserspaceLines<V: IrqBackend>(Arc<Ioapic<V>>);

impl<V: IrqBackend + Send + Sync> IrqLines for UserspaceLines<V> {
    fn set(&mut self, gsi: u32, level: bool) {
        if let Ok(pin) = u8::try_from(gsi) {
            let _ = self.0.set_line(pin, level);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVm;
    use hv_core::{Msi, MsiStatus, RouteTarget};
    use hv_irq::LEGACY_GSIS;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn vm() -> MockVm {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm
    }

    fn interrupts(vm: MockVm, pins: LegacyPins) -> Interrupts<MockVm> {
        let config = RouterConfig::new(4096, pins);
        let router = IrqRouter::new(Arc::new(vm), config).unwrap();
        let ioapic =
            (pins == LegacyPins::Userspace).then(|| Arc::new(Ioapic::new(router.clone()).unwrap()));
        Interrupts { router, ioapic }
    }

    #[test]
    fn a_line_of_the_kernel_is_an_irqfd_and_raising_it_is_no_ioctl() {
        let mut vm = vm();
        vm.expect_set_gsi_routing().once().returning(|_| Ok(()));
        vm.expect_irqfd_assign().withf(|i| i.gsi == Gsi(4)).once().returning(|_| Ok(()));
        vm.expect_irqfd_deassign().once().returning(|_, _| Ok(()));
        let interrupts = interrupts(vm, LegacyPins::Kernel);
        interrupts.edge(4).unwrap().raise();
        let mut outside = Outside::default();
        interrupts.attach(&mut outside).unwrap();
        assert!(outside.end_of_interrupt.is_none());
    }

    #[test]
    fn a_split_irqchip_has_its_pins_on_the_bus() {
        const SELECT: u64 = layout::IO_APIC as u64;
        const WINDOW: u64 = SELECT + 0x10;
        let mut vm = vm();
        vm.expect_set_gsi_routing().returning(|routes| {
            assert!(routes.iter().all(|r| LEGACY_GSIS.contains(&r.gsi.0)));
            assert!(routes.iter().all(|r| matches!(r.target, RouteTarget::Msi(_))));
            Ok(())
        });
        let sent = Arc::new(AtomicUsize::new(0));
        let count = sent.clone();
        vm.expect_signal_msi().returning(move |msi: Msi| {
            assert_eq!(msi.data & 0xff, 0x41);
            count.fetch_add(1, Ordering::Relaxed);
            Ok(MsiStatus::Delivered)
        });
        let interrupts = interrupts(vm, LegacyPins::Userspace);
        let mut outside = Outside::default();
        interrupts.attach(&mut outside).unwrap();
        // Pin 4: vector 0x41, edge, not masked.
        outside.memory.write(SELECT, &0x18u32.to_le_bytes());
        outside.memory.write(WINDOW, &0x41u32.to_le_bytes());
        interrupts.edge(4).unwrap().raise();
        assert_eq!(sent.load(Ordering::Relaxed), 1);
        let mut lines = interrupts.lines();
        lines.set(4, true);
        lines.set(4, false);
        lines.set(400, true);
        assert_eq!(sent.load(Ordering::Relaxed), 2);
    }
}
