//! The queues of a device (split virtqueues, virtio 1.2, 2.7), and the requests in them.
//!
//! virtio-queue reads and writes the rings. Here is what keeps a device safe from its driver: a chain
//! is read from the ring once, and whatever the driver writes there later does not change it; all of
//! its buffers are in guest memory; it is not longer than the queue; and the requests handed out for
//! one call are bounded, so that a driver that never stops can't keep a device from anything else.
//! A driver that breaks a rule gets an error, which makes the device ask for a reset.

use std::sync::Arc;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::RefSlice;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, Permissions};

use hv_memory::{RamMemory, WriteLog};

use super::{Counters, DeviceInterrupts, Memory};

/// Guest memory that was looked up; what is written through it is among the dirty pages.
type Slice<'a> = VolatileSlice<'a, RefSlice<'a, WriteLog>>;

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

/// What can be wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no end within the table: a loop, an index beyond it, a bad indirect table, 4 GiB or more.
    #[error("has no end")]
    NoEnd,
    /// It has more descriptors than the queue.
    #[error("has more descriptors than the queue")]
    TooLong,
    /// A buffer is not in guest memory.
    #[error("has a buffer that is not guest memory: {len:#x} bytes at {address:#x}")]
    Outside {
        /// Where the buffer starts.
        address: u64,
        /// Its bytes.
        len: u32,
    },
    /// A buffer for the device to read follows one for it to write (virtio 1.2, 2.7.4.2).
    #[error("has a buffer to read after one to write")]
    Order,
    /// It has fewer bytes than the device has to read or write.
    #[error("is too short")]
    TooShort,
}

/// A part of a request in guest memory. It is there, and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its bytes.
    pub len: u32,
}

/// A request: buffers the device reads, followed by buffers it writes.
///
/// The driver may change what is in the buffers at any time, but not where they are. Several may be the
/// same memory. Together they are less than 4 GiB, which can be more than a device wants to handle at
/// once: what it allocates for a request it must bound itself.
///
/// It is given back with [`Virtqueue::push`]. One that is dropped instead is never completed, as when
/// the device is reset.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    queue: u16,
    memory: Memory,
    buffers: Vec<Buffer>,
    /// How many of the buffers are to be read.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Bytes the device can read.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device can write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The buffers the device can read.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// The buffers the device can write.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Copies bytes out of the readable part, from `offset` on.
    ///
    /// # Errors
    /// There are not that many.
    pub fn read_at(&self, offset: u32, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for slice in self.readable_slices(offset, data.len())? {
            let Some(part) = data.get_mut(done..done + slice.len()) else { break };
            slice.copy_to(part);
            done += part.len();
        }
        Ok(())
    }

    /// Copies bytes into the writable part, from `offset` on.
    ///
    /// # Errors
    /// There is no room for all of them; nothing is written.
    pub fn write_at(&self, offset: u32, data: &[u8]) -> Result<(), QueueError> {
        let mut rest = data;
        for slice in self.writable_slices(offset, data.len())? {
            let (part, later) = rest.split_at_checked(slice.len()).unwrap_or((rest, &[]));
            slice.copy_from(part);
            rest = later;
        }
        Ok(())
    }

    /// A value at `offset` of the readable part.
    ///
    /// # Errors
    /// It does not fit.
    pub fn read_obj<T: ByteValued + Default>(&self, offset: u32) -> Result<T, QueueError> {
        let mut value = T::default();
        self.read_at(offset, value.as_mut_slice())?;
        Ok(value)
    }

    /// `len` bytes of the readable part from `offset` on, where they are: for I/O without a copy.
    ///
    /// # Errors
    /// There are not that many.
    pub fn readable_slices(&self, offset: u32, len: usize) -> Result<Vec<Slice<'_>>, QueueError> {
        self.slices(self.readable(), offset, len, Permissions::Read)
    }

    /// `len` bytes of the writable part from `offset` on, where they are: for I/O without a copy.
    ///
    /// # Errors
    /// There is no room for that many.
    pub fn writable_slices(&self, offset: u32, len: usize) -> Result<Vec<Slice<'_>>, QueueError> {
        self.slices(self.writable(), offset, len, Permissions::Write)
    }

    fn slices(
        &self,
        buffers: &[Buffer],
        offset: u32,
        len: usize,
        access: Permissions,
    ) -> Result<Vec<Slice<'_>>, QueueError> {
        let mut slices = Vec::with_capacity(buffers.len());
        let (mut skip, mut left) = (u64::from(offset), len);
        for buffer in buffers {
            let buffer_len = u64::from(buffer.len);
            if left == 0 {
                break;
            }
            if skip >= buffer_len {
                skip -= buffer_len;
                continue;
            }
            // Its end is in guest memory, so nothing wraps.
            let address = GuestAddress(buffer.address.0.wrapping_add(skip));
            let part = usize::try_from(buffer_len - skip).unwrap_or(usize::MAX).min(left);
            let found = vm_memory::GuestMemory::get_slices(&*self.memory, address, part, access);
            let outside =
                || self.error(ChainError::Outside { address: address.0, len: buffer.len });
            for slice in found.map_err(|_| outside())? {
                slices.push(slice.map_err(|_| outside())?);
            }
            (skip, left) = (0, left - part);
        }
        if left > 0 { Err(self.error(ChainError::TooShort)) } else { Ok(slices) }
    }

    /// The error of this request, for a device that finds something wrong with it.
    #[must_use]
    pub fn error(&self, error: ChainError) -> QueueError {
        QueueError::Chain { queue: self.queue, head: self.head, error }
    }
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
    /// Whether the driver has to be told of what was used.
    used: bool,
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
            used: false,
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
        let head = descriptors.head_index();
        let buffers = self.spare.pop().unwrap_or_default();
        let mut chain = Chain {
            head,
            queue: self.index,
            memory: self.memory.clone(),
            buffers,
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        match fill(&mut chain, descriptors, self.ring.size()) {
            Ok(()) => Ok(Some(chain)),
            Err(error) => Err(chain.error(error)),
        }
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
        let written = written.min(chain.writable_len);
        self.ring
            .add_used(&*self.memory, chain.head, written)
            .map_err(|_| QueueError::Ring(self.index))?;
        self.used = true;
        self.counters.count_requests(1);
        self.counters.count_bytes_from_guest(chain.readable_len.into());
        self.counters.count_bytes_to_guest(written.into());
        self.recycle(chain);
        Ok(())
    }

    fn recycle(&mut self, chain: Chain) {
        let mut buffers = chain.buffers;
        buffers.clear();
        if self.spare.len() < usize::from(self.ring.size()) {
            self.spare.push(buffers);
        }
    }

    /// Tells the driver now of what was completed, if it wants to know.
    ///
    /// # Errors
    /// The ring can't be read.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        if !std::mem::take(&mut self.used) {
            return Ok(());
        }
        if self.interrupt_is_wanted()? {
            self.interrupts.queue(self.index.into());
        } else {
            self.counters.count_suppressed(1);
        }
        Ok(())
    }

    fn interrupt_is_wanted(&mut self) -> Result<bool, QueueError> {
        // Also the barrier between what was used and the flags.
        let wanted = self.ring.needs_notification(&*self.memory).map_err(|_| self.ring_error())?;
        if self.ring.event_idx_enabled() {
            return Ok(wanted);
        }
        // virtio-queue does not look at the flags of the available ring.
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.ring.avail_ring()), std::sync::atomic::Ordering::Relaxed)
            .map_err(|_| self.ring_error())?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
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

/// Reads the descriptors of a chain, once.
fn fill(
    chain: &mut Chain,
    descriptors: virtio_queue::DescriptorChain<&RamMemory>,
    queue_size: u16,
) -> Result<(), ChainError> {
    let (mut count, mut ends) = (0, false);
    for descriptor in descriptors {
        if count == queue_size {
            return Err(ChainError::TooLong);
        }
        count += 1;
        ends = !descriptor.has_next();
        let (address, len) = (descriptor.addr(), descriptor.len());
        let writable = descriptor.is_write_only();
        if !writable && chain.buffers.len() > chain.readable {
            return Err(ChainError::Order);
        }
        if len == 0 {
            continue;
        }
        if !chain.memory.check_range(address, len as usize) {
            return Err(ChainError::Outside { address: address.0, len });
        }
        chain.buffers.push(Buffer { address, len });
        // virtio-queue ends a chain before it has 4 GiB.
        if writable {
            chain.writable_len = chain.writable_len.saturating_add(len);
        } else {
            chain.readable_len = chain.readable_len.saturating_add(len);
            chain.readable += 1;
        }
    }
    if ends { Ok(()) } else { Err(ChainError::NoEnd) }
}
