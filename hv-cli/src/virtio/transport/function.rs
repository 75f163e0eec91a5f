//! A virtio device as a PCI function.

use std::io;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, IoAddress, IoEventBackend, IrqBackend};
use hv_irq::{IrqRouter, LevelPin};
use hv_memory::{IoEventHandle, IoEventMatch, IoEventRegistry};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::common::{Common, DRIVER_OK, Elsewhere, Written};
use super::layout::{
    self, COMMON, DEVICE, ISR, MOST_QUEUES, MSIX_BAR, NOTIFY, NOTIFY_MULTIPLIER, PAGE, REGISTER_BAR,
};
use crate::event::Event;
use crate::pci::{CapabilityError, ConfigSpace, INTERRUPT_DISABLE, Msix, PciFunction};
use crate::virtio::worker::{Parts, Worker};
use crate::virtio::{Counters, DeviceConfig, DeviceError, DeviceInterrupts, Memory, VirtioDevice};

/// Features of the transport and the rings.
pub(in crate::virtio) const FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// What a machine has for its devices.
pub struct Platform<'a, V: IrqBackend + IoEventBackend> {
    /// Guest memory.
    pub memory: Memory,
    /// Where the vectors get their routes.
    pub router: &'a IrqRouter<V>,
    /// Where doorbells get their ioeventfds; without, ringing is an exit.
    pub ioeventfds: Option<&'a Arc<IoEventRegistry<V>>>,
    /// The number and the line for a driver without MSI-X; without, it gets no interrupts.
    pub line: Option<(u8, LevelPin<V>)>,
}

/// Why a device can't be had.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The host has no descriptor or no thread left.
    #[error("{name}: {error}; raise the limits of the process (ulimit -n, ulimit -u)")]
    Host {
        /// The device.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// It describes itself wrongly.
    #[error("{name}: {error}")]
    Description {
        /// The device.
        name: String,
        /// How.
        error: CapabilityError,
    },
    /// It has no queue, or more than there are doorbells for.
    #[error("{name} can't have {queues} queues")]
    Queues {
        /// The device.
        name: String,
        /// How many it wants.
        queues: usize,
    },
}

/// A virtio device as a PCI function: its registers, its interrupts and the thread that runs it.
pub struct VirtioPci<V: IrqBackend + IoEventBackend> {
    config: ConfigSpace,
    /// Offset of the capability for access through configuration space.
    window: u16,
    msix: Msix<V>,
    line: Option<LevelPin<V>>,
    common: Common,
    device_config: DeviceConfig,
    interrupts: Arc<DeviceInterrupts>,
    counters: Arc<Counters>,
    doorbells: Vec<EventFd>,
    ioeventfds: Weak<IoEventRegistry<V>>,
    /// The doorbells that KVM has.
    rung_by_kvm: Vec<IoEventHandle<V>>,
    worker: Worker,
    /// The driver has reset the device, and its thread is not done with it.
    resetting: bool,
    /// The device could not be activated.
    broken: bool,
}

impl<V: IrqBackend + IoEventBackend + Send + Sync> VirtioPci<V> {
    /// Makes a function of a device, and starts its thread.
    ///
    /// # Errors
    /// The host has no descriptor or thread left, or the device can't be like that.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        platform: Platform<'_, V>,
    ) -> Result<Self, VirtioError> {
        let host = |error| VirtioError::Host { name: name.to_owned(), error };
        let description = |error| VirtioError::Description { name: name.to_owned(), error };
        let (sizes, device_config) = (device.queue_sizes(), device.config());
        let queues = sizes.len();
        if !(1..=MOST_QUEUES).contains(&queues) {
            return Err(VirtioError::Queues { name: name.to_owned(), queues });
        }
        // A vector for each queue and one for the configuration.
        let vectors = queues + 1;
        let (pending, msix_size) = layout::msix_layout(vectors);
        let mut config = ConfigSpace::new(&layout::identity(device.device_type()));
        let window = layout::describe(&mut config, msix_size, queues, device_config.len())
            .map_err(description)?;
        let msix = Msix::new(&mut config, platform.router, vectors, MSIX_BAR, 0, pending);
        let msix = msix.map_err(host)?;
        if let Some((line, _)) = &platform.line {
            config.set_interrupt(*line);
        }
        let line = platform.line.map(|(_, pin)| pin);

        let counters = Arc::new(Counters::default());
        let trigger = line.as_ref().map(|pin| pin.trigger().clone());
        let events = msix.events().to_vec();
        let interrupts = Arc::new(DeviceInterrupts::new(queues, events, trigger, counters.clone()));
        let common = Common::new(device.features() | FEATURES, sizes);
        let doorbells = (0..queues).map(|_| Ok(Event::new()?.shared()));
        let doorbells: Vec<EventFd> = doorbells.collect::<io::Result<_>>().map_err(host)?;
        let worker = Worker::start(Parts {
            name: name.to_owned(),
            device,
            memory: platform.memory,
            config: device_config.clone(),
            interrupts: interrupts.clone(),
            counters: counters.clone(),
            doorbells: doorbells.clone(),
            line_ended: line.as_ref().map(|pin| pin.resample().clone()),
        })
        .map_err(host)?;
        Ok(Self {
            config,
            window,
            msix,
            line,
            common,
            device_config,
            interrupts,
            counters,
            doorbells,
            ioeventfds: platform.ioeventfds.map_or_else(Weak::new, Arc::downgrade),
            rung_by_kvm: Vec::new(),
            worker,
            resetting: false,
            broken: false,
        })
    }

    /// What is counted of the device; it stays when the device is gone.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Ends a reset when the device's thread has let go of everything.
    fn settle(&mut self) {
        if self.resetting && self.worker.is_idle() {
            self.resetting = false;
            self.broken = false;
            self.common.reset();
            self.interrupts.reset();
        }
    }

    fn reset(&mut self) {
        if self.resetting {
            return;
        }
        self.counters.count_resets(1);
        if self.common.status() & DRIVER_OK != 0 {
            self.worker.reset();
            // What it may still raise is nobody's. That a route could not be given back is counted, and
            // tried again with the next.
            let _ = self.msix.set_active(false);
        }
        self.resetting = true;
        self.settle();
    }

    /// The driver is ready. All its vectors get their routes in one commit.
    fn activate(&mut self) {
        if let Err(error) = self.msix.set_active(true) {
            self.broken = true;
            let errno = match error {
                hv_irq::RouterError::Kvm(error) => error.errno,
                _ => hv_core::Errno::ENOSPC,
            };
            self.counters.failed(DeviceError::Host { what: "routing its interrupts", errno });
            return;
        }
        self.worker.activate(self.common.features(), self.common.queues().to_vec());
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let needs_reset = self.broken || self.worker.needs_reset();
        let active = self.common.status() & DRIVER_OK != 0;
        let elsewhere = Elsewhere {
            status: if active && needs_reset { NEEDS_RESET } else { 0 },
            generation: self.device_config.generation(),
            config_vector: self.interrupts.config_vector(),
            queue_vector: self.interrupts.queue_vector(self.common.selected()),
        };
        self.common.read(elsewhere, offset, data);
    }

    fn common_write(&mut self, offset: u64, data: &[u8]) {
        if self.resetting {
            // The driver has to wait until the status reads 0.
            return self.counters.count_refused(1);
        }
        match self.common.write(offset, data) {
            Written::Done => {}
            Written::Refused => self.counters.count_refused(1),
            Written::Reset => self.reset(),
            Written::DriverOk => self.activate(),
            Written::ConfigVector(vector) => self.interrupts.set_config_vector(vector),
            Written::QueueVector(queue, vector) => self.interrupts.set_queue_vector(queue, vector),
        }
    }

    fn device_write(&mut self, offset: u64, data: &[u8]) {
        let written = usize::try_from(offset).is_ok_and(|at| self.device_config.write(at, data));
        if written {
            self.worker.config_written();
        } else {
            self.counters.count_refused(1);
        }
    }

    /// Counts what the guest wrote for MSI-X and could not have, since there were `before` of them.
    fn count_msix_failures(&self, before: u64) {
        self.counters.count_refused(self.msix.failures().saturating_sub(before));
    }

    /// A doorbell that was no ioeventfd.
    fn ring(&mut self, offset: u64) {
        let active = self.common.status() & DRIVER_OK != 0 && !self.resetting;
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        match self.doorbells.get(index) {
            Some(doorbell) if active => {
                self.counters.count_notification_exits(1);
                doorbell.signal();
            }
            _ => self.counters.count_refused(1),
        }
    }

    /// Lets KVM ring the doorbells where the registers are now. Those it does not take are exits.
    fn place_doorbells(&mut self, registers: Option<u64>) {
        self.rung_by_kvm.clear();
        let (Some(registers), Some(ioeventfds)) = (registers, self.ioeventfds.upgrade()) else {
            return;
        };
        for (index, doorbell) in (0..).zip(&self.doorbells) {
            let address = registers + NOTIFY + u64::from(NOTIFY_MULTIPLIER) * index;
            // A driver writes the number of the queue, 16 bits.
            let matched =
                IoEventMatch { address: IoAddress::Mmio(address), length: 2, datamatch: None };
            if let Ok(handle) = ioeventfds.assign(matched, doorbell.clone()) {
                self.rung_by_kvm.push(handle);
            }
        }
    }

    /// Offset of the data for access through configuration space (4.1.4.9), if an access to
    /// configuration space touches them.
    fn window_touched(&self, offset: u16, len: usize) -> Option<usize> {
        let (data, offset) = (usize::from(self.window) + 16, usize::from(offset));
        (offset < data + 4 && data < offset.saturating_add(len)).then_some(data)
    }

    /// What the driver asks for there: BAR, offset and length, if they are of a register.
    fn window_target(&self) -> Option<(u8, u64, usize)> {
        let at = usize::from(self.window);
        let [bar] = self.config.get(at + 4);
        let offset = u64::from(u32::from_le_bytes(self.config.get(at + 8)));
        let len = u32::from_le_bytes(self.config.get(at + 12));
        let size = self.config.bars().iter().find(|b| b.index == bar)?.size;
        let fits = matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len.into())
            && offset.checked_add(len.into())? <= size;
        fits.then_some((bar, offset, len as usize))
    }

    fn window_read(&mut self, data_at: usize) {
        let mut data = [0; 4];
        match self.window_target() {
            Some((bar, offset, len)) => {
                if let Some(data) = data.get_mut(..len) {
                    self.bar_read(bar, offset, data);
                }
            }
            None => self.counters.count_refused(1),
        }
        self.config.put(data_at, &data);
    }

    fn window_write(&mut self, data_at: usize) {
        let data: [u8; 4] = self.config.get(data_at);
        match self.window_target().and_then(|(bar, at, len)| Some((bar, at, data.get(..len)?))) {
            Some((bar, offset, data)) => self.bar_write(bar, offset, data),
            None => self.counters.count_refused(1),
        }
    }
}

impl<V: IrqBackend + IoEventBackend + Send + Sync> PciFunction for VirtioPci<V> {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some(at) = self.window_touched(offset, data.len()) {
            self.window_read(at);
        }
        let wants = self.line.is_some() && !self.msix.is_enabled() && self.interrupts.status() != 0;
        self.config.set_interrupt_status(wants);
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let line = |config: &ConfigSpace| config.command() & INTERRUPT_DISABLE == 0;
        let before = (self.msix.is_enabled(), line(&self.config));
        let failures = self.msix.failures();
        self.config.write(offset, data);
        self.msix.control_written(&mut self.config);
        self.count_msix_failures(failures);
        let after = (self.msix.is_enabled(), line(&self.config));
        if before.0 != after.0 {
            self.interrupts.use_messages(after.0);
        }
        if before.1 != after.1 {
            self.interrupts.enable_line(after.1);
        }
        if let Some(at) = self.window_touched(offset, data.len()) {
            self.window_write(at);
        }
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.settle();
        let (structure, at) = (offset / PAGE * PAGE, offset % PAGE);
        match (bar, structure) {
            (MSIX_BAR, _) => match offset.checked_sub(self.msix.pending_offset().into()) {
                Some(at) => self.msix.pending_read(at, data),
                None => self.msix.table_read(offset, data),
            },
            (REGISTER_BAR, COMMON) => self.common_read(at, data),
            (REGISTER_BAR, ISR) => {
                if let (0, [status, ..]) = (at, data) {
                    *status = self.interrupts.take_status();
                }
            }
            (REGISTER_BAR, DEVICE) => {
                self.device_config.get(usize::try_from(at).unwrap_or(usize::MAX), data);
            }
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.settle();
        let (structure, at) = (offset / PAGE * PAGE, offset % PAGE);
        match (bar, structure) {
            (MSIX_BAR, _) => {
                let failures = self.msix.failures();
                self.msix.table_write(offset, data);
                self.count_msix_failures(failures);
            }
            (REGISTER_BAR, COMMON) => self.common_write(at, data),
            (REGISTER_BAR, DEVICE) => self.device_write(at, data),
            (REGISTER_BAR, NOTIFY) => self.ring(at),
            _ => self.counters.count_refused(1),
        }
    }

    fn bar_mapped(&mut self, bar: u8, address: Option<u64>) {
        if bar == REGISTER_BAR {
            self.place_doorbells(address);
        }
    }
}
