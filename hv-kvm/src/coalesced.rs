//! The ring of writes that coalesced zones collect (`struct kvm_coalesced_mmio_ring`).
//!
//! It is a page of the VM that every vCPU maps. KVM puts writes in at `last`, the VMM takes them out
//! at `first`. Which of the VMM's threads may do that is decided by a lock; KVM's half takes part in
//! none, so what it writes is read with acquire and what is given back is stored with release. No
//! number in the page is believed.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use hv_core::{CoalescedWrite, Errno, IoAddress};

use crate::run_page::RunPage;

/// Writes a page has room for (`KVM_COALESCED_MMIO_MAX`), one of which stays unused.
const ENTRIES: usize = (4096 - 8) / size_of::<Entry>();

/// `struct kvm_coalesced_mmio`.
#[repr(C)]
#[derive(Debug, Default)]
struct Entry {
    address: AtomicU64,
    len: AtomicU32,
    /// Whether it is a port.
    pio: AtomicU32,
    /// In the guest's order of bytes.
    data: AtomicU64,
}

impl Entry {
    fn read(&self) -> Option<CoalescedWrite> {
        let address = self.address.load(Ordering::Relaxed);
        let address = match self.pio.load(Ordering::Relaxed) {
            0 => IoAddress::Mmio(address),
            1 => IoAddress::Pio(address.try_into().ok()?),
            _ => return None,
        };
        let data = self.data.load(Ordering::Relaxed).to_ne_bytes();
        let len = usize::try_from(self.len.load(Ordering::Relaxed)).ok()?;
        CoalescedWrite::new(address, data.get(..len)?)
    }
}

/// The page.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Ring {
    /// The oldest write. Stored by this process alone.
    first: AtomicU32,
    /// Behind the newest write. Stored by KVM alone.
    last: AtomicU32,
    entries: [Entry; ENTRIES],
}

impl Ring {
    /// Whether there is nothing to take.
    pub(crate) fn is_empty(&self) -> bool {
        // The newest first: then all that was there at that moment has been taken. The other way round
        // the ring may have gone round in between. Acquire: who sees that a write was taken sees what
        // its taker did before.
        let last = self.last.load(Ordering::Acquire);
        self.first.load(Ordering::Acquire) == last
    }

    /// Takes the oldest write; one caller at a time. `EIO` if the page holds what KVM never writes.
    fn take(&self) -> Result<Option<CoalescedWrite>, Errno> {
        let first = self.first.load(Ordering::Relaxed);
        let last = self.last.load(Ordering::Acquire);
        let max = ENTRIES as u32;
        if first >= max || last >= max {
            return Err(Errno::EIO);
        }
        if first == last {
            return Ok(None);
        }
        let entry = self.entries.get(first as usize).ok_or(Errno::EIO)?;
        let write = entry.read().ok_or(Errno::EIO)?;
        self.first.store((first + 1) % max, Ordering::Release);
        Ok(Some(write))
    }
}

/// What a VM knows of its ring.
#[derive(Debug, Default)]
pub(crate) struct Coalesced {
    /// The page of a vCPU's mapping it is, once a zone was registered; none on a host without.
    page: OnceLock<Option<usize>>,
    /// Held by who takes a write.
    taker: Mutex<()>,
}

impl Coalesced {
    /// Learns which page the ring is, from the value of `KVM_CAP_COALESCED_MMIO`; once.
    pub(crate) fn find(&self, value: impl FnOnce() -> i32) {
        self.page.get_or_init(|| usize::try_from(value()).ok());
    }

    /// The ring in the mapping of a vCPU; none while there can be nothing in it.
    #[inline]
    pub(crate) fn ring<'a>(&self, page: &'a RunPage) -> Option<&'a Ring> {
        page.coalesced_ring((*self.page.get()?)?)
    }

    /// Takes the oldest write.
    pub(crate) fn take(&self, page: &RunPage) -> Result<Option<CoalescedWrite>, Errno> {
        let Some(ring) = self.ring(page) else { return Ok(None) };
        let _taker = self.taker.lock().unwrap_or_else(PoisonError::into_inner);
        ring.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
    use std::mem::offset_of;

    fn ring() -> Ring {
        let entries = std::array::from_fn(|_| Entry::default());
        Ring { first: AtomicU32::new(0), last: AtomicU32::new(0), entries }
    }

    /// As KVM does; false if there is no room.
    fn put(ring: &Ring, address: u64, len: u32, pio: u32, data: [u8; 8]) -> bool {
        let last = ring.last.load(Ordering::Relaxed);
        let next = (last + 1) % ENTRIES as u32;
        if next == ring.first.load(Ordering::Acquire) {
            return false;
        }
        let entry = &ring.entries[last as usize];
        entry.address.store(address, Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        entry.pio.store(pio, Ordering::Relaxed);
        entry.data.store(u64::from_ne_bytes(data), Ordering::Relaxed);
        ring.last.store(next, Ordering::Release);
        true
    }

    #[test]
    fn the_page_is_laid_out_as_in_the_kernel_header() {
        assert_eq!(size_of::<Entry>(), size_of::<kvm_coalesced_mmio>());
        assert_eq!(offset_of!(Entry, address), offset_of!(kvm_coalesced_mmio, phys_addr));
        assert_eq!(offset_of!(Entry, len), offset_of!(kvm_coalesced_mmio, len));
        assert_eq!(offset_of!(Entry, pio), offset_of!(kvm_coalesced_mmio, __bindgen_anon_1));
        assert_eq!(offset_of!(Entry, data), offset_of!(kvm_coalesced_mmio, data));
        assert_eq!(offset_of!(Ring, first), offset_of!(kvm_coalesced_mmio_ring, first));
        assert_eq!(offset_of!(Ring, last), offset_of!(kvm_coalesced_mmio_ring, last));
        assert_eq!(offset_of!(Ring, entries), size_of::<kvm_coalesced_mmio_ring>());
        assert_eq!(ENTRIES, 170);
    }

    #[test]
    fn writes_come_out_as_they_went_in_round_and_round() {
        let ring = ring();
        assert!(ring.is_empty());
        assert_eq!(ring.take(), Ok(None));
        for n in 0..1000u64 {
            assert!(put(&ring, n, 4, 0, n.to_ne_bytes()));
            assert!(put(&ring, n % 0x1_0000, 1, 1, [n as u8; 8]));
            assert!(!ring.is_empty());
            let mmio = CoalescedWrite::new(IoAddress::Mmio(n), &n.to_ne_bytes()[..4]);
            assert_eq!(ring.take(), Ok(mmio));
            let port = CoalescedWrite::new(IoAddress::Pio(n as u16), &[n as u8]);
            assert_eq!(ring.take(), Ok(port));
        }
        assert!(ring.is_empty());
    }

    #[test]
    fn a_full_ring_has_all_but_one_entry() {
        let ring = ring();
        assert_eq!((0..).take_while(|&n| put(&ring, n, 8, 0, [1; 8])).count(), 169);
        assert!(ring.take().unwrap().is_some());
        assert!(put(&ring, 0, 1, 0, [1; 8]));
    }

    #[test]
    fn indices_that_kvm_never_writes_take_nothing() {
        let ring = ring();
        for (first, last) in [(170, 0), (0, 170), (u32::MAX, 0), (0, u32::MAX), (170, 170)] {
            ring.first.store(first, Ordering::Relaxed);
            ring.last.store(last, Ordering::Relaxed);
            assert_eq!(ring.take(), Err(Errno::EIO), "{first} {last}");
            assert_eq!(ring.first.load(Ordering::Relaxed), first);
        }
    }

    #[test]
    fn entries_that_kvm_never_writes_take_nothing() {
        for (address, len, pio) in
            [(0, 0, 0), (0, 9, 0), (0, u32::MAX, 0), (0, 1, 2), (0x1_0000, 1, 1)]
        {
            let ring = ring();
            assert!(put(&ring, address, len, pio, [1; 8]));
            assert_eq!(ring.take(), Err(Errno::EIO), "{address:#x} {len} {pio}");
            assert!(!ring.is_empty());
        }
    }

    #[test]
    fn without_a_zone_there_is_no_ring_and_nothing_is_asked() {
        let (page, _) = crate::run_page::without_vcpu(3 * 4096).unwrap();
        let coalesced = Coalesced::default();
        assert!(coalesced.ring(&page).is_none());
        assert_eq!(coalesced.take(&page), Ok(None));
        coalesced.find(|| 2);
        coalesced.find(|| 7);
        assert!(coalesced.ring(&page).is_some(), "what was learned first stays");
        for without in [0, -1] {
            let coalesced = Coalesced::default();
            coalesced.find(|| without);
            assert!(coalesced.ring(&page).is_none());
        }
    }

    #[test]
    fn takers_on_many_threads_take_each_write_once() {
        const WRITES: u64 = 20_000;
        let (page, _) = crate::run_page::without_vcpu(3 * 4096).unwrap();
        let coalesced = Coalesced::default();
        coalesced.find(|| 2);
        let ring = page.coalesced_ring(2).unwrap();
        let mut taken: Vec<u64> = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut mine = Vec::new();
                        loop {
                            match coalesced.take(&page).unwrap() {
                                Some(write) if write.address.value() == u64::MAX => return mine,
                                Some(write) => mine.push(write.address.value()),
                                None => std::thread::yield_now(),
                            }
                        }
                    })
                })
                .collect();
            // Then an end for each.
            for n in (0..WRITES).chain([u64::MAX; 3]) {
                while !put(ring, n, 8, 0, [0; 8]) {
                    std::thread::yield_now();
                }
            }
            takers
                .into_iter()
                .flat_map(|taker| {
                    let mine = taker.join().unwrap();
                    assert!(mine.is_sorted(), "each sees them in their order");
                    mine
                })
                .collect()
        });
        taken.sort_unstable();
        assert!(taken.into_iter().eq(0..WRITES));
    }
}
