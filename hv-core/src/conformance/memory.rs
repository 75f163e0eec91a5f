//! Host memory for the slots of cases.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{Checked, Miss};
use crate::{HostMemory, HostRange, MemorySlot, SlotFlags, SlotId};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

#[derive(Debug)]
struct Pages(Vec<AtomicU8>);

impl HostMemory for Pages {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

/// `count` pages of host memory, page-aligned and zero.
///
/// # Errors
/// A failure if the size can't be had.
pub fn pages(count: usize) -> Checked<HostRange> {
    let too_many = || Miss::failed(format!("{count} pages of host memory can't be had"));
    span(0, count.checked_mul(PAGE).ok_or_else(too_many)?)
}

/// `len` bytes of host memory, `offset` bytes behind the start of a page, zero.
pub(super) fn span(offset: usize, len: usize) -> Checked<HostRange> {
    let too_many = || Miss::failed(format!("{len} bytes of host memory can't be had"));
    let room = len.checked_add(offset).and_then(|room| room.checked_add(PAGE));
    let memory = Pages((0..room.ok_or_else(too_many)?).map(|_| AtomicU8::new(0)).collect());
    let start = memory.0.as_ptr().align_offset(PAGE).saturating_add(offset);
    HostRange::new(Arc::new(memory), start, len).ok_or_else(too_many)
}

/// Slot `id` at `guest`, without flags.
pub(super) fn slot(id: u32, guest: u64, host: &HostRange) -> MemorySlot {
    MemorySlot {
        id: SlotId(id),
        guest: vm_memory::GuestAddress(guest),
        host: host.clone(),
        flags: SlotFlags::default(),
    }
}

/// The bytes of `host` from `offset`; those past the end are missing.
pub(super) fn peek(host: &HostRange, offset: usize, len: usize) -> Vec<u8> {
    let bytes = host.bytes().iter().skip(offset).take(len);
    bytes.map(|byte| byte.load(Ordering::Relaxed)).collect()
}

/// Writes `data` into `host` from `offset`, as a device would.
pub(super) fn poke(host: &HostRange, offset: usize, data: &[u8]) {
    for (to, from) in host.bytes().iter().skip(offset).zip(data) {
        to.store(*from, Ordering::Relaxed);
    }
}
