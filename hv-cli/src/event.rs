//! How threads wake each other: an eventfd made here, where the hypervisor is not at hand.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use hv_core::EventFd;
use rustix::event::{EventfdFlags, eventfd};

/// A counter the kernel keeps (`eventfd(2)`), close-on-exec and non-blocking. Clones share it.
#[derive(Debug, Clone)]
pub struct Event(EventFd);

impl Event {
    /// A new one, at 0.
    ///
    /// # Errors
    /// The process or the system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into()))
    }

    /// Adds 1. At its maximum the counter stays there, which wakes just as well.
    pub fn signal(&self) {
        self.0.signal();
    }

    /// The eventfd, for the hypervisor.
    ///
    /// Layers over the hypervisor tell eventfds by their number, which is looked up here: the thread that
    /// hands this one to KVM, often a vCPU's, may not open the file it is in.
    #[must_use]
    pub fn shared(&self) -> EventFd {
        let _ = self.0.id();
        self.0.clone()
    }

    /// Takes the count, if it is not 0.
    pub fn take(&self) -> Option<u64> {
        self.0.take()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
