//! The outside's handle on a balloon.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::event::Event;
use crate::virtio::DeviceConfig;

/// Bytes of the pages a balloon counts in, whatever the guest's are (virtio 1.2, 5.5).
pub const BALLOON_PAGE: u64 = 4096;

/// Where `num_pages` and `actual` are in the configuration.
pub(super) const NUM_PAGES: usize = 0;
pub(super) const ACTUAL: usize = 4;

/// Names of the statistics a driver may tell, by their tags (virtio 1.2, 5.5.6.3).
const STATISTICS: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// How large a balloon is to be, how large it is, and what its driver says about memory. Any thread may
/// use it, at any time; clones are of the same balloon, and no call waits.
///
/// The driver does what it can to get there and may never: this is a request.
#[derive(Debug, Clone)]
pub struct BalloonTarget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// What the driver reads and writes.
    config: DeviceConfig,
    /// The most pages that can be asked for.
    most: u32,
    /// Signalled when something is to be done.
    changed: Event,
    resized: AtomicBool,
    asked: AtomicBool,
    given_back: AtomicU64,
    statistics: Mutex<BTreeMap<&'static str, u64>>,
}

impl BalloonTarget {
    /// One of a guest with so many pages of memory.
    pub(super) fn new(most: u32) -> io::Result<Self> {
        let config = DeviceConfig::new([0; 8]).writable(ACTUAL..ACTUAL + 4);
        Ok(Self(Arc::new(Shared {
            config,
            most,
            changed: Event::new()?,
            resized: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            given_back: AtomicU64::new(0),
            statistics: Mutex::default(),
        })))
    }

    /// Asks for a balloon of so many [pages](BALLOON_PAGE), at most all the guest's memory. Returns how many
    /// that are.
    pub fn set_pages(&self, pages: u32) -> u32 {
        let pages = pages.min(self.0.most);
        self.0.config.set(NUM_PAGES, &pages.to_le_bytes());
        self.0.resized.store(true, Ordering::Release);
        self.0.changed.signal();
        pages
    }

    /// How many pages were asked for.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.word(NUM_PAGES)
    }

    /// How many pages the driver says that the balloon has.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.word(ACTUAL)
    }

    /// Bytes that were given back to the host so far, those the guest reported as free included. Pages count
    /// again when they are given back again.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.0.given_back.load(Ordering::Relaxed)
    }

    /// Asks the driver for statistics. They are there some time later, if it has any.
    pub fn ask_statistics(&self) {
        self.0.asked.store(true, Ordering::Release);
        self.0.changed.signal();
    }

    /// What the driver told last: bytes or counts, by name.
    #[must_use]
    pub fn statistics(&self) -> BTreeMap<&'static str, u64> {
        self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn word(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.0.config.get(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn config(&self) -> &DeviceConfig {
        &self.0.config
    }

    pub(super) fn changed(&self) -> &Event {
        &self.0.changed
    }

    /// Whether another size was asked for, and whether statistics were. The event is taken.
    pub(super) fn take(&self) -> (bool, bool) {
        let _ = self.0.changed.take();
        let (resized, asked) = (&self.0.resized, &self.0.asked);
        (resized.swap(false, Ordering::AcqRel), asked.swap(false, Ordering::AcqRel))
    }

    pub(super) fn count_given_back(&self, bytes: u64) {
        self.0.given_back.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The driver tells: a tag of two bytes and a value of eight each. Unknown ones are passed over.
    pub(super) fn told(&self, bytes: &[u8]) {
        let (entries, _) = bytes.as_chunks::<10>();
        let known = entries.iter().filter_map(|&[a, b, ref value @ ..]| {
            let name = STATISTICS.get(usize::from(u16::from_le_bytes([a, b])))?;
            Some((*name, u64::from_le_bytes(*value)))
        });
        let known = known.collect();
        *self.0.statistics.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }
}
