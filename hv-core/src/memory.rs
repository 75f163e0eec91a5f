//! Memory slots as plain data (`KVM_SET_USER_MEMORY_REGION`).
//!
//! A slot lets a guest read and write host memory, so the API must make it impossible to name
//! memory that is not there or belongs to something else: a slot is made from a [`HostRange`],
//! which owns what it names.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use vm_memory::GuestAddress;

/// The number of a memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Host memory that a guest may be given.
///
/// The bytes are atomics because that is what guest memory is: anyone may change any of them at
/// any time. A backend keeps the `Arc` of a slot's memory for as long as the kernel may use it.
///
/// It is [`Any`], so that a layer that is given a slot can know its own memory again
/// ([`HostRange::memory`]).
pub trait HostMemory: Any + Send + Sync + fmt::Debug {
    /// The memory. A backend calls this once for a slot and goes on using that slice for as long
    /// as it holds the object.
    fn bytes(&self) -> &[AtomicU8];
}

/// A part of some [`HostMemory`], kept alive by whoever holds it.
///
/// ```
/// use std::sync::{Arc, atomic::AtomicU8};
/// use hv_core::{HostMemory, HostRange};
///
/// #[derive(Debug)]
/// struct Page(Vec<AtomicU8>);
/// impl HostMemory for Page {
///     fn bytes(&self) -> &[AtomicU8] { &self.0 }
/// }
///
/// let page = Arc::new(Page((0..4096).map(|_| AtomicU8::new(0)).collect()));
/// let half = HostRange::new(page.clone(), 2048, 2048).unwrap();
/// assert_eq!(half.len(), 2048);
/// assert!(HostRange::new(page, 2048, 4096).is_none(), "reaches past the end");
/// ```
#[derive(Clone)]
pub struct HostRange {
    memory: Arc<dyn HostMemory>,
    offset: usize,
    len: usize,
}

impl HostRange {
    /// `len` bytes of `memory` from `offset`, or `None` if it does not have them.
    #[must_use]
    pub fn new(memory: Arc<dyn HostMemory>, offset: usize, len: usize) -> Option<Self> {
        memory.bytes().get(offset..offset.checked_add(len)?)?;
        Some(Self { memory, offset, len })
    }

    /// `len` bytes of this range from `offset`, or `None` if it does not have them.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        Self::new(self.memory.clone(), self.offset.checked_add(offset)?, len)
    }

    /// The memory that the range is a part of.
    #[must_use]
    pub fn memory(&self) -> &Arc<dyn HostMemory> {
        &self.memory
    }

    /// Bytes of the memory before the range.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// This range and `next` in one, or `None` unless `next` begins where this one ends, in the same
    /// memory.
    #[must_use]
    pub fn join(&self, next: &Self) -> Option<Self> {
        // Two mappings side by side are still two, of which each may go without the other.
        let same = std::ptr::addr_eq(Arc::as_ptr(&self.memory), Arc::as_ptr(&next.memory));
        if !same || self.offset.checked_add(self.len)? != next.offset {
            return None;
        }
        Self::new(self.memory.clone(), self.offset, self.len.checked_add(next.len)?)
    }

    /// The bytes. Empty if the memory no longer has them, which a well-behaved one always does.
    #[must_use]
    pub fn bytes(&self) -> &[AtomicU8] {
        let end = self.offset.saturating_add(self.len);
        self.memory.bytes().get(self.offset..end).unwrap_or_default()
    }

    /// Bytes in the range.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The host virtual address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.bytes().as_ptr().addr() as u64
    }
}

impl PartialEq for HostRange {
    fn eq(&self, other: &Self) -> bool {
        (self.address(), self.len) == (other.address(), other.len)
    }
}

impl Eq for HostRange {}

impl fmt::Debug for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostRange({:#x}, {:#x} bytes)", self.address(), self.len)
    }
}

/// What a memory slot does beyond mapping memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SlotFlags {
    /// Record which pages are written (`KVM_MEM_LOG_DIRTY_PAGES`). May change on a live slot.
    pub log_dirty: bool,
    /// A guest write exits as MMIO (`KVM_MEM_READONLY`). May not change on a live slot.
    pub readonly: bool,
}

/// A memory slot: guest-physical addresses backed by host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemorySlot {
    /// The slot, below `KVM_CAP_NR_MEMSLOTS`.
    pub id: SlotId,
    /// First guest-physical address, page-aligned.
    pub guest: GuestAddress,
    /// The memory behind it; address and length page-aligned.
    pub host: HostRange,
    /// What it does beyond mapping.
    pub flags: SlotFlags,
}

/// A range whose writes KVM may collect in the coalesced ring
/// (`KVM_REGISTER_COALESCED_MMIO`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CoalescedZone {
    /// First address or port.
    pub address: IoAddress,
    /// Bytes.
    pub size: u32,
}

/// A write that a coalesced zone collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CoalescedWrite {
    /// Where the guest wrote.
    pub address: IoAddress,
    /// Bytes of it, 1 to 8.
    pub len: u8,
    /// Those bytes; what is behind them means nothing.
    pub data: [u8; 8],
}

impl CoalescedWrite {
    /// A write of up to 8 bytes, or `None` for more or none.
    #[must_use]
    pub fn new(address: IoAddress, bytes: &[u8]) -> Option<Self> {
        let mut data = [0; 8];
        data.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let len = u8::try_from(bytes.len()).ok().filter(|&len| len > 0)?;
        Some(Self { address, len, data })
    }

    /// The bytes that were written.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.data.get(..self.len.into()).unwrap_or(&self.data)
    }
}

/// An address a guest accesses: guest-physical, or an I/O port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IoAddress {
    /// A guest-physical address, all 64 bits of it.
    Mmio(u64),
    /// An I/O port.
    Pio(u16),
}

impl IoAddress {
    /// The number, without its address space.
    #[must_use]
    pub const fn value(self) -> u64 {
        match self {
            IoAddress::Mmio(address) => address,
            IoAddress::Pio(port) => port as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Bytes(Vec<AtomicU8>);

    impl HostMemory for Bytes {
        fn bytes(&self) -> &[AtomicU8] {
            &self.0
        }
    }

    fn bytes(n: usize) -> Arc<Bytes> {
        Arc::new(Bytes((0..n).map(|_| AtomicU8::new(0)).collect()))
    }

    #[test]
    fn a_range_stays_inside_its_memory() {
        let memory = bytes(16);
        assert!(HostRange::new(memory.clone(), 0, 16).is_some());
        assert!(HostRange::new(memory.clone(), 16, 0).is_some_and(|r| r.is_empty()));
        assert!(HostRange::new(memory.clone(), 1, 16).is_none());
        assert!(HostRange::new(memory, 1, usize::MAX).is_none());
    }

    #[test]
    fn a_slice_stays_inside_its_range() {
        let range = HostRange::new(bytes(16), 4, 8).unwrap();
        let slice = range.slice(2, 6).unwrap();
        assert_eq!((slice.address(), slice.len()), (range.address() + 2, 6));
        assert!(range.slice(2, 7).is_none(), "the memory has it, the range has not");
        assert!(range.slice(1, usize::MAX).is_none());
    }

    #[test]
    fn a_collected_write_has_as_many_bytes_as_were_written() {
        let address = IoAddress::Pio(0x70);
        let write = CoalescedWrite::new(address, &[1, 2]).unwrap();
        assert_eq!((write.len, write.bytes()), (2, &[1, 2][..]));
        assert_eq!(CoalescedWrite::new(address, &[7; 8]).unwrap().bytes(), [7; 8]);
        assert!(CoalescedWrite::new(address, &[]).is_none());
        assert!(CoalescedWrite::new(address, &[0; 9]).is_none());
        assert_eq!(CoalescedWrite { len: 200, ..write }.bytes().len(), 8);
    }

    #[test]
    fn a_range_knows_what_it_is_a_part_of() {
        let memory = bytes(16);
        let slice = HostRange::new(memory.clone(), 4, 8).unwrap().slice(2, 6).unwrap();
        let of: &dyn Any = &**slice.memory();
        assert!(std::ptr::eq(of.downcast_ref::<Bytes>().unwrap(), &*memory));
        assert_eq!(slice.offset(), 6);
    }

    #[test]
    fn what_follows_in_the_same_memory_can_be_joined() {
        let memory = bytes(16);
        let range = |offset, len| HostRange::new(memory.clone(), offset, len).unwrap();
        assert_eq!(range(2, 4).join(&range(6, 3)), Some(range(2, 7)));
        assert_eq!(range(2, 4).join(&range(7, 3)), None, "a gap");
        assert_eq!(range(6, 3).join(&range(2, 4)), None, "the wrong way round");
        let other = HostRange::new(bytes(16), 6, 3).unwrap();
        assert_eq!(range(2, 4).join(&other), None, "other memory");
    }

    #[test]
    fn a_range_keeps_its_memory_alive() {
        let memory = bytes(8);
        let range = HostRange::new(memory.clone(), 4, 4).unwrap();
        assert_eq!(Arc::strong_count(&memory), 2);
        assert_eq!(range.address(), memory.bytes().as_ptr().addr() as u64 + 4);
        drop(range);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
