//! The queues of a device (split virtqueues, virtio 1.2, 2.7), and the requests in them.
//!
//! virtio-queue reads and writes the rings. Here is what keeps a device safe from its driver: a chain
//! is read from the ring once, and whatever the driver writes there later does not change it; all of
//! its buffers are in guest memory; it is not longer than the queue; and the requests handed out for
//! one call are bounded, so that a driver that never stops can't keep a device from anything else.
//! A driver that breaks a rule gets an error, which makes the device ask for a reset.

mod chain;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Counters, DeviceInterrupts, Memory};
pub(super) use chain::Slice;
pub use chain::{Buffer, Chain, ChainError};

/// Bytes of the rings (virtio 1.2, 2.7.6 and 2.7.8): what is before the elements, and one of those used.
const AVAILABLE_HEADER: u64 = 4;
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// Why a queue can't go on: the driver broke a rule, or the ring is out of reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The device has no such queue.
    #[error("there is no queue {0}")]
    NoSuchQueue(usize),
    /// The driver enabled a queue whose rings are not in guest memory, or not aligned.
    #[error("queue {0}: the rings are not aligned or not in guest memory")]
    Rings(u16),
    /// The driver made more requests available than the queue has room for.
    #[error("queue {0}: more requests are available than the queue has descriptors")]
    Available(u16),
    /// A ring can't be read or written.
    #[error("queue {0}: the rings can't be accessed")]
    Ring(u16),
    /// A request is malformed.
    #[error("queue {queue}: the request at descriptor {head} {error}")]
    Chain {
        /// The queue.
        queue: u16,
        /// The first descriptor.
        head: u16,
        /// What is wrong.
        error: ChainError,
    },
}

/// A queue as the driver has set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueSetup {
    /// The most descriptors it can have.
    pub(crate) most: u16,
    /// How many the driver wants.
    pub(crate) size: u16,
    pub(crate) enabled: bool,
    /// Addresses of the descriptor table, the available and the used ring.
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

impl QueueSetup {
    /// One that the driver has not touched.
    pub(crate) fn new(most: u16) -> Self {
        Self { most, size: most, enabled: false, descriptors: 0, available: 0, used: 0 }
    }

    /// The ring, if it can be.
    fn ring(&self, event_idx: bool, memory: &Memory) -> Result<Queue, virtio_queue::Error> {
        let mut ring = Queue::new(self.most)?;
        ring.try_set_size(self.size)?;
        ring.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        ring.try_set_avail_ring_address(GuestAddress(self.available))?;
        ring.try_set_used_ring_address(GuestAddress(self.used))?;
        ring.set_event_idx(event_idx);
        ring.set_ready(self.enabled);
        // virtio-queue takes an available ring at 0 for none.
        if self.enabled && (self.available == 0 || !ring.is_valid(&**memory)) {
            return Err(virtio_queue::Error::FindMemoryRegion);
        }
        Ok(ring)
    }
}

/// A queue of a device while its driver uses it.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    ring: Queue,
    memory: Memory,
    interrupts: Arc<DeviceInterrupts>,
    counters: Arc<Counters>,
    /// How many requests may still be taken in this call.
    budget: u16,
    /// Whether there were more.
    more: bool,
    /// Whether the driver rings for new requests.
    rings: bool,
    /// How many requests were completed that the driver was not told of.
    untold: u16,
    /// Lists of buffers that can be used again.
    spare: Vec<Vec<Buffer>>,
}

impl Virtqueue {
    /// The queue as the driver has set it up. One it did not enable never has a request.
    ///
    /// # Errors
    /// The rings of an enabled queue are not in guest memory.
    pub(crate) fn new(
        index: u16,
        setup: &QueueSetup,
        event_idx: bool,
        memory: Memory,
        interrupts: Arc<DeviceInterrupts>,
        counters: Arc<Counters>,
    ) -> Result<Self, QueueError> {
        let ring = setup.ring(event_idx, &memory).map_err(|_| QueueError::Rings(index))?;
        Ok(Self {
            index,
            budget: ring.size(),
            ring,
            memory,
            interrupts,
            counters,
            more: false,
            rings: true,
            untold: 0,
            spare: Vec::new(),
        })
    }

    /// Whether the driver uses it.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.ring.ready()
    }

    /// How many descriptors it has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Takes the next request. Without one, the driver is asked to ring for the next, and the device is
    /// called again when it does.
    ///
    /// In one call of a device at most [`Self::size`] requests are handed out. If there are more, the
    /// device is called again at once, after everything else that waits.
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.is_enabled() {
            return Ok(None);
        }
        if self.budget == 0 {
            self.more = true;
            return Ok(None);
        }
        let mut next = self.next()?;
        if next.is_none() {
            self.rings = true;
            // One that came before the driver saw the request to ring.
            if self.ring.enable_notification(&*self.memory).map_err(|_| self.ring_error())? {
                next = self.next()?;
            }
        }
        if next.is_some() {
            self.budget -= 1;
            if self.rings {
                self.silence()?;
            }
        }
        Ok(next)
    }

    /// Asks the driver not to ring until [`Self::pop`] finds nothing: for a queue whose requests wait for
    /// something else than their arrival.
    ///
    /// # Errors
    /// The ring can't be written.
    pub fn silence(&mut self) -> Result<(), QueueError> {
        self.rings = false;
        self.ring.disable_notification(&*self.memory).map_err(|_| self.ring_error())
    }

    fn next(&mut self) -> Result<Option<Chain>, QueueError> {
        let mut available = self.ring.iter(&*self.memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::Available(self.index),
            _ => QueueError::Ring(self.index),
        })?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let spare = self.spare.pop().unwrap_or_default();
        Chain::read(descriptors, self.index, self.ring.size(), &self.memory, spare).map(Some)
    }

    /// Puts back the request that was taken last, to be taken again.
    pub fn unpop(&mut self, chain: Chain) {
        self.ring.go_to_previous_position();
        self.budget = self.budget.saturating_add(1);
        self.recycle(chain);
    }

    /// Completes a request, of whose writable part the first `written` bytes were written. The driver is
    /// told when the call of the device returns, or by [`Self::signal`].
    ///
    /// # Errors
    /// The used ring can't be written.
    pub fn push(&mut self, chain: Chain, written: u32) -> Result<(), QueueError> {
        let written = written.min(chain.writable_len());
        self.ring
            .add_used(&*self.memory, chain.head(), written)
            .map_err(|_| QueueError::Ring(self.index))?;
        self.completed(chain, written);
        Ok(())
    }

    /// Completes requests of which the driver must see all or none, as the buffers of one packet; as
    /// [`Self::push`] does.
    ///
    /// # Errors
    /// The used ring can't be written.
    pub fn push_together(
        &mut self,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueError> {
        let mut chains = chains.peekable();
        while let Some((chain, written)) = chains.next() {
            if chains.peek().is_none() {
                return self.push(chain, written);
            }
            // Written where it belongs; the index that makes it seen is written with the last.
            let written = written.min(chain.writable_len());
            let position = self.ring.next_used();
            let slot = u64::from(position.checked_rem(self.ring.size()).unwrap_or(0));
            let at = self.ring.used_ring().checked_add(USED_HEADER + USED_ELEMENT * slot);
            let at = at.ok_or_else(|| self.ring_error())?;
            let element = [u32::from(chain.head()).to_le(), written.to_le()];
            self.memory.write_obj(element, GuestAddress(at)).map_err(|_| self.ring_error())?;
            self.ring.set_next_used(position.wrapping_add(1));
            self.completed(chain, written);
        }
        Ok(())
    }

    fn completed(&mut self, chain: Chain, written: u32) {
        self.untold = self.untold.saturating_add(1);
        self.counters.count_requests(1);
        self.counters.count_bytes_from_guest(chain.readable_len().into());
        self.counters.count_bytes_to_guest(written.into());
        self.recycle(chain);
    }

    fn recycle(&mut self, chain: Chain) {
        if self.spare.len() < usize::from(self.ring.size()) {
            self.spare.push(chain.into_spare());
        }
    }

    /// Tells the driver now of what was completed, if it wants to know.
    ///
    /// # Errors
    /// The ring can't be read.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let told = std::mem::take(&mut self.untold);
        if told == 0 {
            return Ok(());
        }
        if self.interrupt_is_wanted(told)? {
            self.interrupts.queue(self.index.into());
        } else {
            self.counters.count_suppressed(1);
        }
        Ok(())
    }

    /// Whether the driver wants to know that the last `completed` requests are (virtio 1.2, 2.7.7.2 and
    /// 2.7.10). virtio-queue does not look at the flags, and does not know of those pushed together.
    fn interrupt_is_wanted(&self, completed: u16) -> Result<bool, QueueError> {
        // What was used is there for the driver before what the driver wants is looked at.
        fence(Ordering::SeqCst);
        let event_idx = self.ring.event_idx_enabled();
        let offset = if event_idx { AVAILABLE_HEADER + 2 * u64::from(self.ring.size()) } else { 0 };
        let at = self.ring.avail_ring().checked_add(offset).ok_or_else(|| self.ring_error())?;
        let wants: u16 =
            self.memory.load(GuestAddress(at), Ordering::Relaxed).map_err(|_| self.ring_error())?;
        let wants = u16::from_le(wants);
        if !event_idx {
            return Ok(u32::from(wants) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        // It wants to know when this request is completed.
        Ok(self.ring.next_used().wrapping_sub(wants).wrapping_sub(1) < completed)
    }

    /// A call of the device begins: requests may be taken.
    pub(super) fn begin(&mut self) {
        self.budget = self.ring.size();
    }

    /// Whether a call left requests in the ring because there were too many for it.
    pub(super) fn has_more(&self) -> bool {
        self.more
    }

    /// The device is about to look for them.
    pub(super) fn nothing_more(&mut self) {
        self.more = false;
    }

    fn ring_error(&self) -> QueueError {
        QueueError::Ring(self.index)
    }
}
