//! Doing jobs by system calls, one at a time: for kernels that don't let us use io_uring.

#![allow(
    unsafe_code,
    reason = "preadv(2) and pwritev2(2) on guest memory, of which no reference can be made"
)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use hv_core::Errno;
use rustix::fs::{fallocate, fdatasync};

use super::job::{Done, Durable, Job, Op};
use super::request::Allocation;

/// Jobs whose op is done.
#[derive(Default)]
pub(super) struct Calls(VecDeque<(Job, Done)>);

impl Calls {
    /// Does the next op of a job.
    pub(super) fn start(&mut self, file: &File, job: Job) {
        let done = match job.op() {
            Some(op) => call(file, &op),
            None => Ok(0),
        };
        self.0.push_back((job, done));
    }

    /// A job whose op is done.
    pub(super) fn next(&mut self) -> Option<(Job, Done)> {
        self.0.pop_front()
    }

    /// Forgets the jobs; nothing is being done for them.
    pub(super) fn finish(&mut self) {
        for (job, _) in self.0.drain(..) {
            job.mark_written();
        }
    }
}

fn call(file: &File, op: &Op<'_>) -> Done {
    let fd = file.as_raw_fd();
    match *op {
        Op::Read { offset, parts } => {
            let (offset, count) = (position(offset)?, parts.len() as i32);
            // SAFETY: the parts are guest memory, mapped while the job of this op is there. The kernel
            // writes what a guest may change at any time as well; there are no references to it.
            transferred(unsafe { libc::preadv(fd, parts.as_ptr(), count, offset) })
        }
        Op::Write { offset, parts, durable: Durable(durable) } => {
            let (offset, count) = (position(offset)?, parts.len() as i32);
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above; the kernel only reads.
            transferred(unsafe { libc::pwritev2(fd, parts.as_ptr(), count, offset, flags) })
        }
        Op::Sync => nothing(fdatasync(file)),
        Op::Allocate(Allocation { flags, offset, len }) => {
            nothing(fallocate(file, flags, offset, len))
        }
    }
}

fn position(offset: u64) -> Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::EINVAL)
}

fn transferred(result: isize) -> Done {
    usize::try_from(result).map_err(|_| Errno::from(&io::Error::last_os_error()))
}

fn nothing(result: Result<(), rustix::io::Errno>) -> Done {
    result.map(|()| 0).map_err(|errno| Errno(errno.raw_os_error()))
}
