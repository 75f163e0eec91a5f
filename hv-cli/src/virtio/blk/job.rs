//! A request that is being done: what is left of it, and the guest memory it needs meanwhile.

#![allow(unsafe_code, reason = "addresses of guest memory are kept, and sent to another thread")]

use std::ops::ControlFlow;

use hv_core::Errno;

use super::request::{Allocation, Failure, HEADER};
use crate::virtio::{Chain, QueueError, Slice};

/// Parts of guest memory, as readv(2) takes them.
struct Parts(Vec<libc::iovec>);

// SAFETY: these are addresses and lengths, and nothing is done with them but by who has the job, which
// also has the chain that keeps the memory mapped. No thread owns guest memory.
unsafe impl Send for Parts {}

impl Parts {
    /// Those of pieces of memory, of which long ones become several.
    fn new(pieces: impl Iterator<Item = (*mut u8, usize)>) -> Self {
        let split = |(start, len): (*mut u8, usize)| {
            (0..len).step_by(MOST_BYTES).map(move |at| libc::iovec {
                iov_base: start.wrapping_add(at).cast(),
                iov_len: MOST_BYTES.min(len - at),
            })
        };
        Self(pieces.flat_map(split).collect())
    }
}

/// The most parts a call takes (`IOV_MAX`, `UIO_MAXIOV`).
const MOST_IOVECS: usize = 1024;

/// The most bytes of a transfer that are done at once: a driver can ask for almost 4 GiB in one request, and the
/// end of the machine waits for what is under way.
const MOST_BYTES: usize = 1 << 20;

/// A request that is being done.
///
/// Whoever does it owns it until that is over. So the guest memory that [`Op`] points to is mapped as
/// long as it may be accessed: the chain has a share of the guest's memory.
pub(super) struct Job {
    chain: Chain,
    queue: usize,
    work: Work,
}

enum Work {
    Transfer {
        /// `None` for a read.
        write: Option<Durable>,
        /// Where in the file the rest goes.
        offset: u64,
        parts: Parts,
        /// The first part that is left.
        next: usize,
        /// Bytes that are done.
        done: u32,
    },
    Steps {
        all: Vec<Allocation>,
        /// The first that is left.
        next: usize,
        /// Whether a sync is left, after them.
        sync: bool,
    },
}

/// Whether a write is only over when it is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Durable(pub(super) bool);

/// The next thing to do for a job.
pub(super) enum Op<'a> {
    /// preadv(2): the memory is for the kernel to write.
    Read { offset: u64, parts: &'a [libc::iovec] },
    /// pwritev2(2), with `RWF_DSYNC` if it is to be durable.
    Write { offset: u64, parts: &'a [libc::iovec], durable: Durable },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Allocate(Allocation),
}

/// What came of an [`Op`]: for a transfer the number of bytes.
pub(super) type Done = Result<usize, Errno>;

/// How a job ended.
pub(super) struct Ended {
    pub(super) chain: Chain,
    pub(super) queue: usize,
    /// Bytes of data in the writable part.
    pub(super) written: u32,
    pub(super) result: Result<(), Failure>,
    /// That it failed may mean that what was written earlier is lost.
    pub(super) lost: bool,
    /// It was to make what was written safe.
    pub(super) synced: bool,
}

impl Job {
    /// Fills the writable part but for the last byte from the file.
    pub(super) fn read(chain: Chain, queue: usize, offset: u64) -> Result<Self, QueueError> {
        let len = chain.writable_len().saturating_sub(1);
        let slices = chain.writable_slices(0, len as usize)?;
        let part = |slice: &Slice<'_>| (slice.ptr_guard_mut().as_ptr(), slice.len());
        let parts = Parts::new(slices.iter().map(part));
        drop(slices);
        let work = Work::Transfer { write: None, offset, parts, next: 0, done: 0 };
        Ok(Self { chain, queue, work })
    }

    /// Writes the readable part behind the header to the file.
    pub(super) fn write(
        chain: Chain,
        queue: usize,
        offset: u64,
        durable: Durable,
    ) -> Result<Self, QueueError> {
        let len = chain.readable_len().saturating_sub(HEADER);
        let slices = chain.readable_slices(HEADER, len as usize)?;
        let part = |slice: &Slice<'_>| (slice.ptr_guard().as_ptr().cast_mut(), slice.len());
        let parts = Parts::new(slices.iter().map(part));
        drop(slices);
        let work = Work::Transfer { write: Some(durable), offset, parts, next: 0, done: 0 };
        Ok(Self { chain, queue, work })
    }

    /// Makes what was written safe.
    pub(super) fn sync(chain: Chain, queue: usize) -> Self {
        Self::allocate(chain, queue, Vec::new(), Durable(true))
    }

    /// Changes ranges of the file, in their order.
    pub(super) fn allocate(
        chain: Chain,
        queue: usize,
        all: Vec<Allocation>,
        Durable(sync): Durable,
    ) -> Self {
        Self { chain, queue, work: Work::Steps { all, next: 0, sync } }
    }

    /// What is to be done next; without, the job is over.
    pub(super) fn op(&self) -> Option<Op<'_>> {
        match &self.work {
            Work::Transfer { write, offset, parts, next, .. } => {
                let parts = parts.0.get(*next..).unwrap_or_default();
                let parts = parts.get(..MOST_IOVECS).unwrap_or(parts);
                let mut bytes = 0_usize;
                let within = parts.iter().take_while(|part| {
                    bytes = bytes.saturating_add(part.iov_len);
                    bytes <= MOST_BYTES
                });
                // No part is longer.
                let parts = parts.get(..within.count()).unwrap_or(parts);
                let offset = *offset;
                (!parts.is_empty()).then_some(match write {
                    None => Op::Read { offset, parts },
                    Some(durable) => Op::Write { offset, parts, durable: *durable },
                })
            }
            Work::Steps { all, next, sync } => match all.get(*next) {
                Some(allocation) => Some(Op::Allocate(*allocation)),
                None => sync.then_some(Op::Sync),
            },
        }
    }

    /// The kernel is done with an op, however that ended. What it read into guest memory did not go
    /// through vm-memory, which marks the pages that are written.
    pub(super) fn mark_written(&self) {
        if let Work::Transfer { write: None, .. } = self.work {
            self.chain.mark_written(self.chain.writable_len().saturating_sub(1));
        }
    }

    /// The op was done: the job goes on, or has ended.
    pub(super) fn advance(mut self, done: Done) -> ControlFlow<Ended, Self> {
        self.mark_written();
        let result = match done {
            // Nothing was done.
            Err(Errno::EINTR) => return ControlFlow::Continue(self),
            Err(errno) => {
                let lost = self.may_have_lost(errno);
                return ControlFlow::Break(self.ended(Err(failure(errno)), lost));
            }
            Ok(n) => self.progress(n),
        };
        match result {
            Ok(()) if self.op().is_some() => ControlFlow::Continue(self),
            result => ControlFlow::Break(self.ended(result, false)),
        }
    }

    fn progress(&mut self, n: usize) -> Result<(), Failure> {
        match &mut self.work {
            // The file is shorter than it was.
            Work::Transfer { .. } if n == 0 => Err(Failure::Io),
            Work::Transfer { offset, parts, next, done, .. } => {
                *offset = offset.saturating_add(n as u64);
                // Less than 4 GiB, as the chain is.
                *done = done.saturating_add(n as u32);
                let mut left = n;
                while let Some(part) = parts.0.get_mut(*next) {
                    let step = part.iov_len.min(left);
                    part.iov_len -= step;
                    part.iov_base = part.iov_base.cast::<u8>().wrapping_add(step).cast();
                    left -= step;
                    if part.iov_len > 0 {
                        break;
                    }
                    *next += 1;
                }
                Ok(())
            }
            Work::Steps { all, next, sync } => {
                if *next < all.len() {
                    *next += 1;
                } else {
                    *sync = false;
                }
                Ok(())
            }
        }
    }

    /// Whether failing like that may take with it what was written before: the kernel tells of an error
    /// of its writeback once, and then takes the pages for clean.
    fn may_have_lost(&self, errno: Errno) -> bool {
        match self.op() {
            Some(Op::Sync) => true,
            Some(Op::Write { durable: Durable(true), .. }) => errno == Errno::EIO,
            _ => false,
        }
    }

    /// The end of it.
    pub(super) fn ended(self, result: Result<(), Failure>, lost: bool) -> Ended {
        let (written, synced) = match &self.work {
            Work::Transfer { write: None, done, .. } => (*done, false),
            Work::Transfer { .. } => (0, false),
            Work::Steps { all, .. } => (0, all.is_empty()),
        };
        Ended { chain: self.chain, queue: self.queue, written, result, lost, synced }
    }
}

fn failure(errno: Errno) -> Failure {
    match errno {
        Errno::EOPNOTSUPP | Errno::ENOSYS => Failure::Unsupported,
        _ => Failure::Io,
    }
}
