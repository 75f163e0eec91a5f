//! An eventfd with an owner: how threads wake each other, and what KVM signals or is signalled by.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// A counter the kernel keeps (`eventfd(2)`), close-on-exec and non-blocking. Clones share it.
#[derive(Debug, Clone)]
pub struct Event(Arc<OwnedFd>);

impl Event {
    /// A new one, at 0.
    ///
    /// # Errors
    /// The process or the system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Adds 1. At its maximum the counter stays there, which wakes just as well.
    pub fn signal(&self) {
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// The descriptor, for an owner that keeps it open.
    #[must_use]
    pub fn shared(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Takes the count, if it is not 0.
    pub fn take(&self) -> Option<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&*self.0, &mut count) {
            Ok(8) => Some(u64::from_ne_bytes(count)),
            _ => None,
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_and_are_taken_once() {
        let event = Event::new().unwrap();
        assert_eq!(event.take(), None);
        event.signal();
        event.clone().signal();
        assert_eq!(event.take(), Some(2));
        assert_eq!(event.take(), None);
    }
}
