//! Memory populated before a guest needs it: in pieces, so that a user sees how far it is and can
//! stop it. Afterwards no vCPU waits for a page, and a host without enough memory has said so.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU8, Ordering};

use hv_core::Errno;
use rustix::io::retry_on_intr;
use rustix::mm::Advice;
use thiserror::Error;

use super::file::FileError;
use super::mapping::Mapping;

/// How far populating memory has got, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that have their pages.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Why memory was not populated to its end. What was done is kept, and nothing is in it that was not
/// there before.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PrefaultError {
    /// The caller broke it off.
    #[error("populating memory was stopped after {:#x} of {:#x} bytes", .0.done, .0.total)]
    Stopped(Progress),
    /// The host can't give a page.
    #[error(
        "populating memory failed after {:#x} of {:#x} bytes in madvise of MADV_POPULATE_WRITE: \
         {errno}{}", .progress.done, .progress.total, remedy(*.errno)
    )]
    Page {
        /// How far it had got.
        progress: Progress,
        /// Its errno.
        errno: Errno,
    },
    /// The file behind the memory has become shorter.
    #[error(transparent)]
    File(#[from] FileError),
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOMEM => "; the host, or this process's cgroup, has no more memory: ask for less",
        Errno::EHWPOISON => "; the host's memory is damaged there",
        Errno::EFAULT => {
            "; the page can't be had: its file system is full, or its huge pages are gone"
        }
        _ => "",
    }
}

/// Bytes populated at once: tens of milliseconds.
const PIECE: usize = 64 << 20;

/// How pages are populated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// `MADV_POPULATE_WRITE`, since Linux 5.14.
    Madvise,
    /// A write that changes nothing.
    Touch,
}

impl Mapping {
    /// Gives every page memory of the host now, as a write would, and changes nothing that is in it.
    /// `progress` is told after each piece, and may stop it. A guest may run meanwhile.
    ///
    /// # Errors
    /// The host has no page, or the caller stopped it. No signal: but on a kernel before 5.14 pages are
    /// touched, and what can't be had then kills the process.
    pub fn prefault(
        &self,
        progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), PrefaultError> {
        self.prefault_by(Means::Madvise, progress)
    }

    pub(super) fn prefault_by(
        &self,
        mut means: Means,
        mut progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), PrefaultError> {
        // A page is never longer than a process's addresses.
        let page = self.page_size() as usize;
        let piece = PIECE.max(page);
        let bytes = self.pages.bytes();
        let total = bytes.len() as u64;
        let mut offset = 0;
        for bytes in bytes.chunks(piece) {
            self.check()?;
            if means == Means::Madvise {
                let populate =
                    || self.pages.advise(offset, bytes.len(), Advice::LinuxPopulateWrite);
                match retry_on_intr(populate) {
                    Ok(()) => {}
                    Err(rustix::io::Errno::INVAL) => means = Means::Touch,
                    Err(errno) => {
                        self.check()?;
                        let progress = Progress { done: offset as u64, total };
                        let errno = Errno(errno.raw_os_error());
                        return Err(PrefaultError::Page { progress, errno });
                    }
                }
            }
            if means == Means::Touch {
                bytes.iter().step_by(page).for_each(touch);
            }
            offset += bytes.len();
            let told = Progress { done: offset as u64, total };
            if progress(told).is_break() && told.done < total {
                return Err(PrefaultError::Stopped(told));
            }
        }
        Ok(())
    }
}

/// Writes what is there. A compare-and-exchange, because a compiler may make an addition of zero a
/// read; if someone else changed the byte meanwhile, it has its page.
fn touch(byte: &AtomicU8) {
    let value = byte.load(Ordering::Relaxed);
    let _ = byte.compare_exchange(value, value, Ordering::Relaxed, Ordering::Relaxed);
}
