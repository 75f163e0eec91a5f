//! Who answers at which port or guest-physical address.
//!
//! The map is built before the first vCPU runs and never changes, so vCPUs look it up without a
//! lock; each device has its own lock, because two vCPUs may touch it at once. A lookup is a binary
//! search: no allocation on the exit path.
//!
//! Locks: a thread holds at most one device's lock, taken here. A device may take the lock of a PCI bus,
//! then those of hv-irq and hv-memory while it answers, and that of the [`Stopper`](super::stop::Stopper) last; never the
//! other way round. The main thread only tries a device's lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A device on a bus. Offsets count from the start of its range; an access never reaches past the
/// end of it.
pub trait Device: Send {
    /// The guest reads: fill `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device shared between a bus and the thread that feeds it.
pub type Shared<D> = Arc<Mutex<D>>;

/// Why a device could not be put on a bus.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range has no length, or wraps.
    #[error("{name} can't have {len:#x} bytes at {start:#x}")]
    BadRange {
        /// The device.
        name: &'static str,
        /// Its first address.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// Another device is there.
    #[error("{name} at {start:#x} overlaps {other} at {other_start:#x}")]
    Overlap {
        /// The device.
        name: &'static str,
        /// Its first address.
        start: u64,
        /// The device that is there.
        other: &'static str,
        /// Its first address.
        other_start: u64,
    },
}

struct Entry {
    start: u64,
    len: u64,
    name: &'static str,
    device: Arc<Mutex<dyn Device>>,
}

/// The devices of one address space.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start; no two overlap.
    entries: Vec<Entry>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// Puts a device at `start..start + len`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another device's.
    pub fn insert(
        &mut self,
        name: &'static str,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn Device>>,
    ) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|n| start.checked_add(n));
        let Some(last) = last else {
            return Err(BusError::BadRange { name, start, len });
        };
        let at = self.entries.partition_point(|e| e.start <= last);
        if let Some(other) = at.checked_sub(1).and_then(|i| self.entries.get(i))
            && other.start + (other.len - 1) >= start
        {
            let (other, other_start) = (other.name, other.start);
            return Err(BusError::Overlap { name, start, other, other_start });
        }
        self.entries.insert(at, Entry { start, len, name, device });
        Ok(())
    }

    /// The guest reads. Bytes no device answers for are all ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some((entry, offset)) = self.find(address) else {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let room = usize::try_from(entry.len - offset).unwrap_or(usize::MAX).min(data.len());
        if let Some(data) = data.get_mut(..room) {
            entry.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// The guest writes. Bytes no device answers for are dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        let Some((entry, offset)) = self.find(address) else {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let room = usize::try_from(entry.len - offset).unwrap_or(usize::MAX).min(data.len());
        if let Some(data) = data.get(..room) {
            entry.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// Accesses that no device answered.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn find(&self, address: u64) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.start <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = address - entry.start;
        (offset < entry.len).then_some((entry, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Ram([u8; 4], Vec<(u64, Vec<u8>)>);

    impl Device for Ram {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = self.0[offset as usize + i];
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.1.push((offset, data.to_vec()));
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::default();
        for &(start, len) in ranges {
            bus.insert("ram", start, len, Arc::new(Mutex::new(Ram::default()))).unwrap();
        }
        bus
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let ram = Arc::new(Mutex::new(Ram([1, 2, 3, 4], Vec::new())));
        let mut bus = Bus::default();
        bus.insert("ram", 0x10, 4, ram.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x11, &mut data);
        assert_eq!(data, [2, 3]);
        bus.write(0x13, &[9]);
        assert_eq!(ram.lock().unwrap().1, [(3, vec![9])]);
        assert_eq!(bus.unclaimed(), 0);
    }

    #[test]
    fn what_passes_the_end_never_reaches_the_device() {
        let ram = Arc::new(Mutex::new(Ram([1, 2, 3, 4], Vec::new())));
        let mut bus = Bus::default();
        bus.insert("ram", 0x10, 4, ram.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [3, 4, 0xff, 0xff]);
        bus.write(0x13, &[7, 8]);
        assert_eq!(ram.lock().unwrap().1, [(3, vec![7])]);
    }

    #[test]
    fn nobody_there_reads_all_ones_and_is_counted() {
        let bus = bus_with(&[(0x10, 4)]);
        for address in [0, 0xf, 0x14, u64::MAX] {
            let mut data = [0; 8];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 8], "{address:#x}");
            bus.write(address, &[1]);
        }
        assert_eq!(bus.unclaimed(), 8);
    }

    #[test]
    fn ranges_that_can_not_be_are_refused() {
        let mut bus = bus_with(&[(0x10, 4), (u64::MAX, 1)]);
        let mut try_at = |start, len| {
            bus.insert("x", start, len, Arc::new(Mutex::new(Ram::default()))).unwrap_err()
        };
        for (start, len) in [(0x13, 1), (0xf, 2), (0, 0x20), (0x10, 4), (0x12, 0x100)] {
            let error = try_at(start, len);
            assert!(matches!(error, BusError::Overlap { other_start: 0x10, .. }), "{error}");
        }
        assert!(matches!(try_at(5, 0), BusError::BadRange { .. }));
        assert!(matches!(try_at(u64::MAX, 2), BusError::BadRange { .. }));
    }
}
