//! What does the jobs of a disk.

use std::fs::File;
use std::os::fd::BorrowedFd;

use hv_core::Errno;

use super::calls::Calls;
use super::job::{Done, Job};
use super::ring::Ring;
use crate::config::DiskIo;
use crate::isolation::SystemCall;

/// What does the jobs of a disk, and its file. The file goes last.
pub(super) struct Engine {
    way: Way,
    file: File,
}

enum Way {
    Ring(Box<Ring>),
    Calls(Calls),
}

impl Engine {
    /// One for so many jobs at a time.
    ///
    /// # Errors
    /// io_uring was asked for, and there is none.
    pub(super) fn new(file: File, io: DiskIo, most: u32) -> Result<Self, Errno> {
        let ring = match io {
            DiskIo::Sync => None,
            DiskIo::Auto => Ring::new(most).ok(),
            DiskIo::Uring => Some(Ring::new(most).map_err(|error| Errno::from(&error))?),
        };
        let way =
            ring.map_or_else(|| Way::Calls(Calls::default()), |ring| Way::Ring(Box::new(ring)));
        Ok(Self { way, file })
    }

    /// The system calls that this makes, those of what it does without a ring included: one may become of
    /// no use.
    pub(super) fn system_calls(&self) -> &'static [SystemCall] {
        const CALLS: [SystemCall; 5] = [
            SystemCall::new(libc::SYS_preadv),
            SystemCall::new(libc::SYS_pwritev2),
            SystemCall::new(libc::SYS_fdatasync),
            SystemCall::new(libc::SYS_fallocate),
            SystemCall::new(libc::SYS_io_uring_enter),
        ];
        match &self.way {
            Way::Ring(_) => &CALLS,
            Way::Calls(_) => CALLS.split_last().map_or(&[], |(_, calls)| calls),
        }
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What is ready to be read from when [`Self::next`] has something, if there is such a thing.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.way {
            Way::Ring(ring) => Some(ring.fd()),
            Way::Calls(_) => None,
        }
    }

    /// Begins the next op of a job.
    pub(super) fn start(&mut self, job: Job) {
        match &mut self.way {
            Way::Ring(ring) => ring.start(&self.file, job),
            Way::Calls(calls) => calls.start(&self.file, job),
        }
    }

    /// Has all that was begun done.
    ///
    /// # Errors
    /// The kernel does not do it, and will not.
    pub(super) fn submit(&mut self) -> Result<(), Errno> {
        match &mut self.way {
            Way::Ring(ring) => ring.submit(),
            Way::Calls(_) => Ok(()),
        }
    }

    /// A job whose op is done, as far as is known without waiting.
    pub(super) fn next(&mut self) -> Option<(Job, Done)> {
        match &mut self.way {
            Way::Ring(ring) => ring.next(),
            Way::Calls(calls) => calls.next(),
        }
    }

    /// Waits for what is under way, and forgets all jobs.
    pub(super) fn finish(&mut self) {
        match &mut self.way {
            Way::Ring(ring) => {
                ring.finish();
                if ring.is_broken() {
                    self.way = Way::Calls(Calls::default());
                }
            }
            Way::Calls(calls) => calls.finish(),
        }
    }
}
