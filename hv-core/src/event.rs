//! eventfds as values.
//!
//! KVM takes descriptors by number, and a number may have been closed and be something else by
//! now. Whoever names an eventfd here holds it open, so it can't. Nothing else about eventfds is
//! decided here: making one is [`crate::Hypervisor::eventfd`].

use std::cmp::Ordering;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// An eventfd (`eventfd(2)`), shared by its clones: what an interrupt is raised by, or a doorbell
/// rings.
///
/// It is made from any descriptor; KVM refuses one that is no eventfd. It should be non-blocking.
/// Two are equal if they are the same descriptor.
#[derive(Debug, Clone)]
pub struct EventFd(Arc<File>);

impl EventFd {
    /// Adds 1. At its maximum the counter stays there, which wakes just as well.
    pub fn signal(&self) {
        let _ = (&*self.0).write(&1u64.to_ne_bytes());
    }

    /// Takes the count, if it is not 0.
    #[must_use]
    pub fn take(&self) -> Option<u64> {
        let mut count = [0; 8];
        match (&*self.0).read(&mut count) {
            Ok(8) => Some(u64::from_ne_bytes(count)),
            _ => None,
        }
    }

    /// The number the kernel gave the eventfd (`eventfd-id` of `/proc/self/fdinfo`, since Linux 5.2):
    /// the same for all descriptors of one eventfd, never used twice. `None` for what is no eventfd.
    #[must_use]
    pub fn id(&self) -> Option<u64> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_raw_fd())).ok()?;
        let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?;
        id.trim().parse().ok()
    }
}

#[cfg(feature = "fake")]
impl EventFd {
    /// Tells whether someone still holds it, without holding it.
    pub(crate) fn downgrade(&self) -> std::sync::Weak<File> {
        Arc::downgrade(&self.0)
    }
}

impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        Self(Arc::new(fd.into()))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

// Both are open, so their numbers tell them apart.
impl PartialEq for EventFd {
    fn eq(&self, other: &Self) -> bool {
        self.as_raw_fd() == other.as_raw_fd()
    }
}

impl Eq for EventFd {}

impl PartialOrd for EventFd {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for EventFd {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_raw_fd().cmp(&other.as_raw_fd())
    }
}

impl Hash for EventFd {
    fn hash<S: Hasher>(&self, state: &mut S) {
        self.as_raw_fd().hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn event() -> EventFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
    }

    #[test]
    fn signals_add_up_and_are_taken_once() {
        let event = event();
        assert_eq!(event.take(), None);
        event.signal();
        event.clone().signal();
        assert_eq!(event.take(), Some(2));
        assert_eq!(event.take(), None);
    }

    #[test]
    fn a_copy_of_the_descriptor_is_another_descriptor_of_the_same_eventfd() {
        let event = event();
        let copy = EventFd::from(event.as_fd().try_clone_to_owned().unwrap());
        assert_ne!(copy, event);
        assert_eq!(copy.id(), event.id());
        assert!(event.id().is_some());
        assert_ne!(super::tests::event().id(), event.id());
        assert_eq!(EventFd::from(OwnedFd::from(File::open("/dev/null").unwrap())).id(), None);
    }
}
