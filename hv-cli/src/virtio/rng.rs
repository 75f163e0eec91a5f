//! The entropy device (virtio 1.2, 5.4): random bytes of the host.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::session::host;
use super::{DeviceError, Session, VirtioDevice};

/// Descriptors of its queue. A driver has one request at a time.
const QUEUE_SIZE: u16 = 64;

/// The most bytes a request gets: a device may give less than asked for, and a guest may ask for 4 GiB.
const MOST: usize = 4096;

/// An entropy device.
pub struct Rng {
    buffer: Box<[u8; MOST]>,
}

impl Rng {
    /// A device; it needs nothing of the host but getrandom(2).
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: Box::new([0; MOST]) }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(request) = session.queue(queue)?.pop()? {
            let len = usize::try_from(request.writable_len()).unwrap_or(MOST).min(MOST);
            if len == 0 {
                // A driver must not ask for nothing (5.4.6.1): it gets that.
                session.count_error();
            }
            let wanted = self.buffer.get_mut(..len).unwrap_or_default();
            let got = getrandom(&mut *wanted, GetRandomFlags::empty())
                .map_err(|errno| host("getrandom", &errno.into()))?;
            let bytes = wanted.get(..got).unwrap_or_default();
            request.write_at(0, bytes)?;
            session.queue(queue)?.push(request, got as u32)?;
        }
        Ok(())
    }
}
