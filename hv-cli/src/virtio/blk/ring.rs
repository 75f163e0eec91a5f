//! Doing jobs by io_uring: all that the driver has asked for at once.
//!
//! What makes this sound is who owns what. A job is the ring's from the moment its entry is made until
//! the kernel has said that it is done; with it go the list of its buffers and a share of guest memory.
//! A ring that goes, even by unwinding, first waits for what is under way.
//!
//! What the kernel does for an entry no seccomp filter sees. So the ring itself takes no others than those made
//! here: whoever takes the thread over can't open a file by it.

#![allow(unsafe_code, reason = "an entry of the ring is made of raw pointers")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use hv_core::Errno;
use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::job::{Done, Durable, Job, Op};
use super::request::Allocation;

/// How often, and after what time, a kernel that is out of something is asked again.
const ATTEMPTS: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);

/// A ring, and the jobs that are under way.
pub(super) struct Ring {
    ring: IoUring,
    /// By the number their entries have.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs for which there was no place.
    refused: Vec<Job>,
    /// The kernel takes no more entries.
    broken: bool,
}

impl Ring {
    /// A ring for so many jobs at a time.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it, or has one that lacks what is needed (before Linux 5.10).
    pub(super) fn new(most: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(most)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let codes = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let params = ring.params();
        if !params.is_feature_nodrop()
            || !params.is_feature_submit_stable()
            || !codes.into_iter().all(|code| probe.is_supported(code))
        {
            return Err(rustix::io::Errno::NOSYS.into());
        }
        let mut only = codes.map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut only)?;
        ring.submitter().register_enable_rings()?;
        let (jobs, free, refused) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { ring, jobs, free, refused, broken: false })
    }

    /// Ready to be read from when [`Self::next`] has something.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Makes an entry of the next op of a job.
    pub(super) fn start(&mut self, file: &File, job: Job) {
        let Some(entry) = job.op().map(|op| entry(file, &op)) else {
            self.refused.push(job);
            return;
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let Some(place) = self.jobs.get_mut(index) else { return };
        *place = Some(job);
        let entry = entry.user_data(index as u64);
        // SAFETY: the job, which the entry points into, stays in its place until the kernel says that it
        // is done (`next`), or until nothing is under way and the entry is not looked at (`finish`).
        // Moving a job does not move the list of its buffers, and nothing changes that meanwhile. The
        // file is open until the entry is submitted: the engine has both, and finishes the ring first.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            let job = self.take(index);
            self.refused.extend(job);
        }
    }

    /// Hands all entries to the kernel.
    ///
    /// # Errors
    /// It does not take them, and will not.
    pub(super) fn submit(&mut self) -> Result<(), Errno> {
        let mut attempts = 0;
        while !self.broken && !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(1..) => attempts = 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => self.pause(&mut attempts, Errno::EAGAIN)?,
                Err(error) => self.pause(&mut attempts, Errno::from(&error))?,
            }
        }
        Ok(())
    }

    fn pause(&mut self, attempts: &mut u32, errno: Errno) -> Result<(), Errno> {
        *attempts += 1;
        let passes = matches!(errno, Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM);
        if !passes || *attempts == ATTEMPTS {
            self.broken = true;
            return Err(errno);
        }
        thread::sleep(PAUSE);
        Ok(())
    }

    /// A job whose op is done.
    pub(super) fn next(&mut self) -> Option<(Job, Done)> {
        if let Some(job) = self.refused.pop() {
            return Some((job, Err(Errno::EAGAIN)));
        }
        let entry = self.ring.completion().next()?;
        let job = self.take(usize::try_from(entry.user_data()).unwrap_or(usize::MAX))?;
        let result = entry.result();
        Some((job, usize::try_from(result).map_err(|_| Errno(result.saturating_neg()))))
    }

    fn take(&mut self, index: usize) -> Option<Job> {
        let job = self.jobs.get_mut(index)?.take();
        self.free.extend(job.is_some().then_some(index));
        job
    }

    /// How many jobs there are entries for.
    fn under_way(&self) -> usize {
        self.jobs.len() - self.free.len()
    }

    /// Waits for all that is under way, and forgets it. The ring may be of no use afterwards.
    pub(super) fn finish(&mut self) {
        // Entries the kernel never took are not under way.
        let _ = self.submit();
        loop {
            while let Some((job, _)) = self.next() {
                job.mark_written();
            }
            if self.under_way() <= self.ring.submission().len() {
                break;
            }
            let waited = self.ring.submitter().submit_and_wait(1);
            if waited.is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
                // It can't be waited for like this; that the kernel is done is seen all the same.
                thread::sleep(PAUSE);
            }
        }
        self.broken |= self.under_way() > 0;
        self.jobs.clear();
        self.free.clear();
    }

    /// Whether it can't be used any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.finish();
    }
}

fn entry(file: &File, op: &Op<'_>) -> squeue::Entry {
    let fd = Fd(file.as_raw_fd());
    match *op {
        Op::Read { offset, parts } => {
            opcode::Readv::new(fd, parts.as_ptr(), parts.len() as u32).offset(offset).build()
        }
        Op::Write { offset, parts, durable: Durable(durable) } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            let write = opcode::Writev::new(fd, parts.as_ptr(), parts.len() as u32);
            write.offset(offset).rw_flags(flags).build()
        }
        Op::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Op::Allocate(Allocation { flags, offset, len }) => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(flags.bits() as i32).build()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_takes_no_entries_but_those_of_disks() {
        let Ok(mut ring) = Ring::new(8) else {
            eprintln!("SKIPPED: this host refuses io_uring");
            return;
        };
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
        let nop = opcode::Nop::new().build();
        for entry in [open, nop] {
            // SAFETY: what the entry points to is static.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            let result = ring.ring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES);
        }
    }
}
