//! How a device interrupts its driver: by a message for each queue, or all by one line.
//!
//! Raising an interrupt is a write to an eventfd and never an ioctl; which one is said by the
//! registers of the transport, which any vCPU may change at any time. So all of it is atomic, and a
//! race with the driver is one the driver has asked for: it changes vectors while the device runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use hv_core::EventFd;

use super::Counters;

/// The vector that means none (virtio 1.2, 4.1.5.1.2: `VIRTIO_MSI_NO_VECTOR`).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status (virtio 1.2, 4.1.4.5).
pub(crate) const ISR_QUEUE: u8 = 1 << 0;
/// The same, of a configuration change.
pub(crate) const ISR_CONFIG: u8 = 1 << 1;

/// The interrupts of a device, as the transport and the device's thread share them.
#[derive(Debug)]
pub struct DeviceInterrupts {
    /// What raises each MSI-X vector.
    vectors: Vec<EventFd>,
    /// Whether the driver uses MSI-X.
    messages: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    /// What raises the line, if the machine gave the device one.
    line: Option<EventFd>,
    /// Whether the driver lets the device raise it (command register, Interrupt Disable).
    line_enabled: AtomicBool,
    counters: Arc<Counters>,
}

impl DeviceInterrupts {
    /// Those of a device after a reset: no vector is chosen, and the line is enabled.
    pub(crate) fn new(
        queues: usize,
        vectors: Vec<EventFd>,
        line: Option<EventFd>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            vectors,
            messages: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            line,
            line_enabled: AtomicBool::new(true),
            counters,
        }
    }

    /// Tells the driver that a queue has used buffers.
    pub(crate) fn queue(&self, index: usize) {
        let vector = self.queue_vectors.get(index).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        if self.messages.load(Ordering::Acquire) {
            self.message(vector);
        } else {
            self.raise(ISR_QUEUE);
        }
    }

    /// Tells the driver that the configuration, or the status, has changed.
    pub(crate) fn config(&self) {
        if self.messages.load(Ordering::Acquire) {
            self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
            self.message(self.config_vector.load(Ordering::Acquire));
        } else {
            self.raise(ISR_CONFIG);
        }
    }

    fn message(&self, vector: u16) {
        match self.vectors.get(usize::from(vector)) {
            Some(event) => {
                event.signal();
                self.counters.count_interrupts(1);
            }
            None => self.counters.count_suppressed(1),
        }
    }

    fn raise(&self, cause: u8) {
        self.isr.fetch_or(cause, Ordering::AcqRel);
        match &self.line {
            Some(line) if self.line_enabled.load(Ordering::Acquire) => {
                line.signal();
                self.counters.count_interrupts(1);
            }
            _ => self.counters.count_suppressed(1),
        }
    }

    /// Raises the line again if the driver has not seen the cause (a level-triggered line).
    pub(crate) fn again(&self) {
        if let Some(line) = &self.line
            && self.line_is_wanted()
        {
            line.signal();
            self.counters.count_interrupts(1);
        }
    }

    /// Whether the device wants its line raised.
    fn line_is_wanted(&self) -> bool {
        let messages = self.messages.load(Ordering::Acquire);
        !messages && self.line_enabled.load(Ordering::Acquire) && self.status() != 0
    }

    /// What the driver has not read yet.
    pub(crate) fn status(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    /// The driver reads the ISR status, which clears it.
    pub(crate) fn take_status(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The driver switches MSI-X on or off.
    pub(crate) fn use_messages(&self, on: bool) {
        self.messages.store(on, Ordering::Release);
        self.again();
    }

    /// The driver lets the device raise its line, or not.
    pub(crate) fn enable_line(&self, on: bool) {
        self.line_enabled.store(on, Ordering::Release);
        self.again();
    }

    /// The vector of configuration changes.
    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// The driver chooses it. One that does not exist is none.
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Release);
    }

    /// The vector of a queue.
    pub(crate) fn queue_vector(&self, index: usize) -> u16 {
        self.queue_vectors.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// The driver chooses it. One that does not exist is none.
    pub(crate) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(queue) = self.queue_vectors.get(index) {
            queue.store(self.existing(vector), Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR }
    }

    /// As after a reset of the device. What waits behind a mask is not for the next driver.
    pub(crate) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        for event in &self.vectors {
            let _ = event.take();
        }
    }
}
