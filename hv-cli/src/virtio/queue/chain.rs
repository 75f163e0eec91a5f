//! A request in a queue: buffers in guest memory, read from the ring once and checked.

use hv_memory::{RamMemory, WriteLog};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{Bitmap, RefSlice};
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{ByteValued, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

use super::QueueError;
use crate::virtio::Memory;

/// Guest memory that was looked up. What is written through it is among the dirty pages.
pub(crate) type Slice<'a> = VolatileSlice<'a, RefSlice<'a, WriteLog>>;

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
/// It is given back with [`Virtqueue::push`](crate::virtio::Virtqueue::push). One that is dropped
/// instead is never completed, as when the device is reset.
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
    /// Reads the descriptors of a request, once. `spare` is a list that can be used again.
    pub(super) fn read(
        descriptors: DescriptorChain<&RamMemory>,
        queue: u16,
        queue_size: u16,
        memory: &Memory,
        spare: Vec<Buffer>,
    ) -> Result<Self, QueueError> {
        let mut chain = Self {
            head: descriptors.head_index(),
            queue,
            memory: memory.clone(),
            buffers: spare,
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        match chain.fill(descriptors, queue_size) {
            Ok(()) => Ok(chain),
            Err(error) => Err(chain.error(error)),
        }
    }

    fn fill(
        &mut self,
        descriptors: DescriptorChain<&RamMemory>,
        queue_size: u16,
    ) -> Result<(), ChainError> {
        // virtio-queue ends a chain that is broken as one that is whole; but then its last descriptor
        // says that there is another.
        let (mut count, mut ends) = (0, false);
        for descriptor in descriptors {
            if count == queue_size {
                return Err(ChainError::TooLong);
            }
            count += 1;
            ends = !descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            let writable = descriptor.is_write_only();
            if !writable && self.buffers.len() > self.readable {
                return Err(ChainError::Order);
            }
            if len == 0 {
                continue;
            }
            if !GuestMemoryBackend::check_range(&*self.memory, address, len as usize) {
                return Err(ChainError::Outside { address: address.0, len });
            }
            self.buffers.push(Buffer { address, len });
            // virtio-queue ends a chain before it has 4 GiB.
            if writable {
                self.writable_len = self.writable_len.saturating_add(len);
            } else {
                self.readable_len = self.readable_len.saturating_add(len);
                self.readable += 1;
            }
        }
        if ends { Ok(()) } else { Err(ChainError::NoEnd) }
    }

    /// The descriptor it starts with.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// The list of its buffers, empty.
    pub(super) fn into_spare(self) -> Vec<Buffer> {
        let mut buffers = self.buffers;
        buffers.clear();
        buffers
    }

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
        self.check_room(self.readable_len, offset, data.len())?;
        let mut rest = data;
        for slice in self.readable_parts(offset) {
            let (part, later) = rest.split_at_mut(slice.len().min(rest.len()));
            slice.copy_to(part);
            rest = later;
        }
        Ok(())
    }

    /// Copies bytes into the writable part, from `offset` on.
    ///
    /// # Errors
    /// There is no room for all of them; nothing is written.
    pub fn write_at(&self, offset: u32, data: &[u8]) -> Result<(), QueueError> {
        self.check_room(self.writable_len, offset, data.len())?;
        let mut rest = data;
        for slice in self.writable_parts(offset) {
            let (part, later) = rest.split_at_checked(slice.len()).unwrap_or((rest, &[]));
            slice.copy_from(part);
            rest = later;
        }
        Ok(())
    }

    fn check_room(&self, room: u32, offset: u32, len: usize) -> Result<(), QueueError> {
        let there = room.checked_sub(offset).is_some_and(|room| len as u64 <= u64::from(room));
        if there || len == 0 { Ok(()) } else { Err(self.error(ChainError::TooShort)) }
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

    /// Marks the first `len` bytes of the writable part as written. Only who had the kernel write there
    /// has to: vm-memory marks what it writes itself.
    pub(crate) fn mark_written(&self, len: u32) {
        let mut left = len;
        for buffer in self.writable() {
            let part = buffer.len.min(left);
            if part == 0 {
                break;
            }
            // It is there: the buffers were checked.
            let found =
                GuestMemoryBackend::get_slices(&*self.memory, buffer.address, part as usize);
            for slice in found.flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            left -= part;
        }
    }

    /// The readable part from `offset` on, where it is: for I/O without a copy or a list.
    pub fn readable_parts(&self, offset: u32) -> impl Iterator<Item = Slice<'_>> {
        self.parts(self.readable(), offset)
    }

    /// The writable part from `offset` on, where it is: for I/O without a copy or a list.
    pub fn writable_parts(&self, offset: u32) -> impl Iterator<Item = Slice<'_>> {
        self.parts(self.writable(), offset)
    }

    fn parts<'a>(
        &'a self,
        buffers: &'a [Buffer],
        offset: u32,
    ) -> impl Iterator<Item = Slice<'a>> + 'a {
        let mut skip = offset;
        let rest = buffers.iter().map(move |buffer| {
            let skipped = skip.min(buffer.len);
            skip -= skipped;
            // Its end is in guest memory, so nothing wraps.
            (GuestAddress(buffer.address.0.wrapping_add(skipped.into())), buffer.len - skipped)
        });
        rest.flat_map(|(address, len)| {
            // All of it was found when the request was read, and RAM stays.
            GuestMemoryBackend::get_slices(&*self.memory, address, len as usize).flatten()
        })
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
            let found = GuestMemory::get_slices(&*self.memory, address, part, access);
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
