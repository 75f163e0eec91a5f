//! The memory balloon (virtio 1.2, 5.5): memory the guest does without is given back to the host.
//!
//! Pages in the balloon, and pages the guest reports as free, are zeros from then on and take up memory
//! again when they are next touched; there is nothing to do when a page leaves the balloon. A driver that names
//! pages it still uses, or that a device is about to write, loses what is in them and nothing else: the
//! mapping stays.

mod target;

use std::io;
use std::sync::Arc;

use hv_memory::GuestRam;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Chain, DeviceConfig, DeviceError, Interest, QueueError, Ready, Session, VirtioDevice};
use target::NUM_PAGES;
pub use target::{BALLOON_PAGE, BalloonTarget};

/// `VIRTIO_BALLOON_F_STATS_VQ`, `_DEFLATE_ON_OOM` and `_REPORTING`.
const F_STATS: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

/// Queues. By the specification free pages are reported in the last, but drivers number only those that
/// there are (Linux before 6.11); so whatever comes in a queue behind the first two is a report, unless
/// it is one of statistics.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const QUEUES: usize = 5;
const QUEUE_SIZE: u16 = 128;

/// The token of the handle's event.
const CHANGED: u32 = 0;

/// The most page numbers of one request that are looked at. Linux has 256 in each.
const NUMBERS: usize = 16 << 10;
/// Bytes of statistics that are looked at.
const STATS_LEN: usize = 1024;

/// A memory balloon.
pub struct Balloon {
    ram: Arc<GuestRam>,
    target: BalloonTarget,
    /// The request the driver gets back when statistics are asked for.
    waiting: Option<Chain>,
    bytes: Vec<u8>,
    numbers: Vec<u32>,
}

impl Balloon {
    /// The balloon of a guest with this memory, which is asked to put so many [pages](BALLOON_PAGE) into it.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(ram: Arc<GuestRam>, pages: u32) -> io::Result<Self> {
        let bytes: u64 = ram.memory().iter().map(GuestMemoryRegion::len).sum();
        let most = u32::try_from(bytes / BALLOON_PAGE).unwrap_or(u32::MAX);
        let target = BalloonTarget::new(most)?;
        target.set_pages(pages);
        Ok(Self { ram, target, waiting: None, bytes: Vec::new(), numbers: Vec::new() })
    }

    /// The handle on it.
    #[must_use]
    pub fn target(&self) -> BalloonTarget {
        self.target.clone()
    }

    /// Gives memory back; what of it is no RAM, or can't be given back, is an error of the request.
    fn discard(&self, session: &Session, start: u64, len: u64) {
        match self.ram.discard(GuestAddress(start), len) {
            Ok(bytes) => {
                self.target.count_given_back(bytes);
                if bytes < len && self.ram.can_discard() {
                    session.count_error();
                }
            }
            Err(_) => session.count_error(),
        }
    }

    /// Takes the pages whose numbers are in a request.
    fn inflate(&mut self, session: &Session, request: &Chain) -> Result<(), QueueError> {
        let len = request.readable_len() as usize;
        let used = len.min(4 * NUMBERS) / 4 * 4;
        if used < len {
            // Half a number, or more than a driver has reason to send: those pages stay where they are.
            session.count_error();
        }
        self.bytes.resize(used, 0);
        request.read_at(0, &mut self.bytes)?;
        self.numbers.clear();
        let (numbers, _) = self.bytes.as_chunks::<4>();
        self.numbers.extend(numbers.iter().map(|number| u32::from_le_bytes(*number)));
        // One call for what is side by side.
        self.numbers.sort_unstable();
        self.numbers.dedup();
        for run in self.numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let first = run.first().copied().unwrap_or_default();
            self.discard(session, u64::from(first) * BALLOON_PAGE, run.len() as u64 * BALLOON_PAGE);
        }
        Ok(())
    }

    /// Gives back the pages that a request consists of.
    fn report(&self, session: &Session, request: &Chain) {
        for buffer in request.writable() {
            self.discard(session, buffer.address.0, buffer.len.into());
        }
    }

    /// Keeps a request with statistics until there are to be others. A second one is a bug of the driver,
    /// which gets the first back.
    fn statistics(&mut self, session: &mut Session, request: Chain) -> Result<(), QueueError> {
        let len = (request.readable_len() as usize).min(STATS_LEN);
        self.bytes.resize(len, 0);
        request.read_at(0, &mut self.bytes)?;
        self.target.told(&self.bytes);
        if let Some(old) = self.waiting.replace(request) {
            session.count_error();
            session.queue(STATS)?.push(old, 0)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> DeviceConfig {
        self.target.config().clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        session.watch(self.target.changed(), CHANGED, Interest::READ)
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        let statistics = queue == STATS && session.has_feature(F_STATS);
        while let Some(request) = session.queue(queue)?.pop()? {
            match queue {
                INFLATE => self.inflate(session, &request)?,
                DEFLATE => {}
                _ if statistics => {
                    self.statistics(session, request)?;
                    continue;
                }
                _ => self.report(session, &request),
            }
            session.queue(queue)?.push(request, 0)?;
        }
        Ok(())
    }

    fn host_ready(&mut self, session: &mut Session, _ready: Ready) -> Result<(), DeviceError> {
        let (resized, asked) = self.target.take();
        if resized {
            // It is there already, and may be another by now.
            session.change_config(NUM_PAGES, &[]);
        }
        if asked && let Some(request) = self.waiting.take() {
            session.queue(STATS)?.push(request, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.waiting = None;
        // A driver that comes next begins with an empty one.
        self.target.config().set(target::ACTUAL, &[0; 4]);
    }
}
