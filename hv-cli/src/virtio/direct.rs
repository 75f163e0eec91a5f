//! A device that is called by hand: without its thread, without a transport, without a VM.
//!
//! For what has to be deterministic or has to measure the device alone: fuzzing and benchmarks. The
//! device is called as its thread calls it, and what the queues check is checked. A machine uses
//! [`VirtioPci`](super::VirtioPci).

use std::io;
use std::sync::Arc;

use super::queue::QueueSetup;
use super::session::{DEVICE_TOKENS, host};
use super::transport::FEATURES;
use super::worker::Parts;
use super::{
    CounterValues, Counters, DeviceError, DeviceInterrupts, Memory, Ready, Session, VirtioDevice,
    Virtqueue,
};
use crate::event::Event;

/// A queue as its driver sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingSetup {
    /// How many descriptors it has: a power of two, and no more than the device's.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// That of the available ring.
    pub available: u64,
    /// That of the used ring.
    pub used: u64,
}

/// A device that is called by hand.
///
/// ```
/// use std::sync::Arc;
///
/// use hv_cli::virtio::{Direct, RingSetup, Rng};
/// use hv_memory::RamMemory;
/// use vm_memory::{Bytes, GuestAddress};
///
/// let memory = Arc::new(RamMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
/// let mut rng = Direct::new(Box::new(Rng::new()), memory.clone())?;
/// let ring = RingSetup { size: 4, descriptors: 0x1000, available: 0x2000, used: 0x3000 };
/// // A buffer of 16 bytes at 0x4000 for the device to write, in descriptor 0, made available.
/// memory.write_obj(0x4000u64, GuestAddress(0x1000)).unwrap();
/// memory.write_obj(16u32, GuestAddress(0x1008)).unwrap();
/// memory.write_obj(2u16, GuestAddress(0x100c)).unwrap();
/// memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
/// rng.activate(0, &[Some(ring)]).unwrap();
/// assert_eq!(rng.counters().bytes_to_guest, 16);
/// assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 1);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Direct {
    parts: Parts,
    sizes: Vec<u16>,
    session: Option<Session>,
    /// It asked for a reset.
    failed: bool,
    ready: Vec<(u64, Ready)>,
}

impl Direct {
    /// A device that no driver has touched. It interrupts by MSI-X, a vector for each queue.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(device: Box<dyn VirtioDevice>, memory: Memory) -> io::Result<Self> {
        let (sizes, config) = (device.queue_sizes(), device.config());
        let counters = Arc::new(Counters::default());
        let events = (0..=sizes.len()).map(|_| Ok(Event::new()?.shared()));
        let events = events.collect::<io::Result<_>>()?;
        let interrupts = DeviceInterrupts::new(sizes.len(), events, None, counters.clone());
        interrupts.use_messages(true);
        for (index, vector) in (0..sizes.len()).zip(0..) {
            interrupts.set_queue_vector(index, vector);
        }
        interrupts.set_config_vector(sizes.len() as u16);
        let parts = Parts {
            name: String::new(),
            device,
            memory,
            config,
            interrupts: Arc::new(interrupts),
            counters,
            doorbells: Vec::new(),
            line_ended: None,
        };
        Ok(Self { parts, sizes, session: None, failed: false, ready: Vec::new() })
    }

    /// The driver is ready, after a reset: it took those of `features` that are offered, and set up
    /// these queues. The device is told of what is in them.
    ///
    /// # Errors
    /// The device asks for a reset: until then it is not called any more.
    pub fn activate(
        &mut self,
        features: u64,
        queues: &[Option<RingSetup>],
    ) -> Result<(), DeviceError> {
        self.reset();
        let queues: Vec<_> = (0..)
            .zip(&self.sizes)
            .map(|(index, &most)| match queues.get(index).copied().flatten() {
                Some(RingSetup { size, descriptors, available, used }) => {
                    QueueSetup { most, size, enabled: true, descriptors, available, used }
                }
                None => QueueSetup::new(most),
            })
            .collect();
        let offered = self.parts.device.features() | FEATURES;
        let begun = self.parts.session(features & offered, &queues);
        let session = begun.inspect_err(|_| self.failed = true)?;
        self.session = Some(session);
        self.with(Parts::activate)
    }

    /// The driver rings the doorbell of a queue. Of a queue it did not enable, nobody hears.
    ///
    /// # Errors
    /// As [`Self::activate`].
    pub fn ring(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.with(|parts, session| parts.queue_ready(session, queue))
    }

    /// The driver writes to the configuration space. Returns whether it may.
    ///
    /// # Errors
    /// As [`Self::activate`].
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<bool, DeviceError> {
        let written = self.parts.config.write(offset, data);
        self.with(Parts::config_written)?;
        Ok(written)
    }

    /// Calls the device for what is ready at the host and for what it left in its queues: one turn of
    /// its thread, without waiting. Returns whether there was something.
    ///
    /// # Errors
    /// As [`Self::activate`].
    pub fn turn(&mut self) -> Result<bool, DeviceError> {
        let mut ready = std::mem::take(&mut self.ready);
        let mut more = false;
        let result = self.with(|parts, session| {
            let waited = session.poller.wait(true, &mut ready);
            waited.map_err(|error| host("waiting for events", &error))?;
            more = !ready.is_empty() || session.queues.iter().any(Virtqueue::has_more);
            for &(token, what) in &ready {
                if token >= DEVICE_TOKENS {
                    parts.host_ready(session, what)?;
                }
            }
            parts.again(session)
        });
        self.ready = ready;
        result.map(|()| more)
    }

    /// The driver resets the device.
    pub fn reset(&mut self) {
        self.failed = false;
        if self.session.is_some() {
            self.parts.device.reset();
            self.session = None;
        }
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> CounterValues {
        self.parts.counters.values()
    }

    fn with(
        &mut self,
        call: impl FnOnce(&mut Parts, &mut Session) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        match &mut self.session {
            Some(session) if !self.failed => {
                call(&mut self.parts, session).inspect_err(|_| self.failed = true)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_memory::RamMemory;
    use std::sync::Mutex;
    use vm_memory::{Bytes, GuestAddress};

    /// Writes down what it is called for; a request of one byte is an error.
    struct Log(Arc<Mutex<Vec<&'static str>>>);

    impl VirtioDevice for Log {
        fn device_type(&self) -> u32 {
            42
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![8, 8]
        }
        fn activate(&mut self, _session: &mut Session) -> Result<(), DeviceError> {
            self.0.lock().unwrap().push("activate");
            Ok(())
        }
        fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
            self.0.lock().unwrap().push("queue");
            match session.queue(queue)?.pop()? {
                Some(_) => Err(DeviceError::Driver("no")),
                None => Ok(()),
            }
        }
        fn reset(&mut self) {
            self.0.lock().unwrap().push("reset");
        }
    }

    #[test]
    fn a_device_that_failed_is_reset_before_it_is_called_again() {
        let memory = Arc::new(RamMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut direct = Direct::new(Box::new(Log(log.clone())), memory.clone()).unwrap();
        let ring = RingSetup { size: 4, descriptors: 0x1000, available: 0x2000, used: 0x3000 };
        direct.ring(0).unwrap();
        direct.activate(0, &[Some(ring)]).unwrap();
        for queue in [0, 1, 2] {
            direct.ring(queue).unwrap();
        }
        memory.write_obj(1u32, GuestAddress(0x1008)).unwrap();
        memory.write_obj(1u16, GuestAddress(0x2002)).unwrap();
        assert_eq!(direct.ring(0), Err(DeviceError::Driver("no")));
        assert_eq!((direct.ring(0), direct.turn()), (Ok(()), Ok(false)));
        assert_eq!(direct.activate(0, &[Some(ring)]), Err(DeviceError::Driver("no")));
        let outside = RingSetup { used: 0x10000, ..ring };
        assert!(matches!(direct.activate(0, &[Some(outside)]), Err(DeviceError::Queue(_))));
        direct.reset();
        let expected =
            ["activate", "queue", "queue", "queue", "reset", "activate", "queue", "reset"];
        assert_eq!(*log.lock().unwrap(), expected);
    }
}
