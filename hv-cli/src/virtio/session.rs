//! What a device has while its driver uses it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hv_core::Errno;

use super::poller::Poller;
use super::{
    Counters, DeviceConfig, DeviceError, DeviceInterrupts, Interest, Memory, QueueError, Virtqueue,
};

/// The time between `DRIVER_OK` and the next reset: the queues, guest memory, the features the driver
/// took, and the descriptors the device watches.
#[derive(Debug)]
pub struct Session {
    pub(super) queues: Vec<Virtqueue>,
    pub(super) poller: Poller,
    features: u64,
    memory: Memory,
    config: DeviceConfig,
    interrupts: Arc<DeviceInterrupts>,
    counters: Arc<Counters>,
    /// Whether the machine ends.
    pub(super) stopping: Arc<AtomicBool>,
}

/// Tokens of the poller from here on are those of the device; below are those of its thread.
pub(super) const DEVICE_TOKENS: u64 = 1 << 32;

impl Session {
    pub(super) fn new(
        features: u64,
        queues: Vec<Virtqueue>,
        memory: Memory,
        config: DeviceConfig,
        interrupts: Arc<DeviceInterrupts>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        let stopping = Arc::default();
        Ok(Self { queues, poller, features, memory, config, interrupts, counters, stopping })
    }

    /// Whether the driver took the feature with this bit number.
    #[must_use]
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features.checked_shr(bit).unwrap_or(0) & 1 != 0
    }

    /// Whether the machine ends: what takes long need not be begun any more.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// A queue. One the driver did not enable never has a request.
    ///
    /// # Errors
    /// The device has no such queue.
    pub fn queue(&mut self, index: usize) -> Result<&mut Virtqueue, QueueError> {
        self.queues.get_mut(index).ok_or(QueueError::NoSuchQueue(index))
    }

    /// All queues, for a device that uses two at once.
    pub fn queues(&mut self) -> &mut [Virtqueue] {
        &mut self.queues
    }

    /// Changes the configuration space and tells the driver (configuration change notification).
    pub fn change_config(&mut self, offset: usize, data: &[u8]) {
        self.config.set(offset, data);
        self.interrupts.config();
    }

    /// Counts a request that failed.
    pub fn count_error(&self) {
        self.counters.count_errors(1);
    }

    /// Has [`VirtioDevice::host_ready`](super::VirtioDevice::host_ready) called, with `token`, while `fd`
    /// is ready. Until the session ends, [`Self::unwatch`], or the last copy of `fd` is closed. It must
    /// be non-blocking, or be used with calls that are.
    ///
    /// # Errors
    /// It is watched already, or can't be (a regular file).
    pub fn watch(&self, fd: impl AsFd, token: u32, interest: Interest) -> Result<(), DeviceError> {
        let added = self.poller.add(fd, DEVICE_TOKENS | u64::from(token), interest);
        added.map_err(|error| host("watching a descriptor", &error))
    }

    /// Changes what a watched descriptor is watched for. With neither, only a hang-up is told.
    ///
    /// # Errors
    /// It is not watched.
    pub fn rewatch(
        &self,
        fd: impl AsFd,
        token: u32,
        interest: Interest,
    ) -> Result<(), DeviceError> {
        let modified = self.poller.modify(fd, DEVICE_TOKENS | u64::from(token), interest);
        modified.map_err(|error| host("watching a descriptor", &error))
    }

    /// Watches a descriptor no more.
    ///
    /// # Errors
    /// It is not watched.
    pub fn unwatch(&self, fd: impl AsFd) -> Result<(), DeviceError> {
        let removed = self.poller.remove(fd);
        removed.map_err(|error| host("watching a descriptor no more", &error))
    }
}

pub(super) fn host(what: &'static str, error: &io::Error) -> DeviceError {
    DeviceError::Host { what, errno: Errno::from(error) }
}
