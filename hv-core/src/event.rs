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
use std::sync::{Arc, OnceLock};

/// An eventfd (`eventfd(2)`), shared by its clones: what an interrupt is raised by, or a doorbell
/// rings.
///
/// It is made from any descriptor; KVM refuses one that is no eventfd. It should be non-blocking.
/// Two are equal if they are the same descriptor.
#[derive(Debug, Clone)]
pub struct EventFd {
    file: Arc<File>,
    /// See [`Self::id`], once it was asked for.
    id: Arc<OnceLock<u64>>,
    /// Shared by those who hold the eventfd, as distinct from those who watch it.
    #[cfg_attr(
        not(feature = "fake"),
        expect(dead_code, reason = "only the KVM in memory watches")
    )]
    holders: Arc<()>,
}

impl EventFd {
    /// Adds 1. At its maximum the counter stays there, which wakes just as well.
    pub fn signal(&self) {
        let _ = (&*self.file).write(&1u64.to_ne_bytes());
    }

    /// Takes the count, if it is not 0.
    #[must_use]
    pub fn take(&self) -> Option<u64> {
        let mut count = [0; 8];
        match (&*self.file).read(&mut count) {
            Ok(8) => Some(u64::from_ne_bytes(count)),
            _ => None,
        }
    }

    /// The number the kernel gave the eventfd (`eventfd-id` of `/proc/self/fdinfo`, since Linux 5.2):
    /// the same for all descriptors of one eventfd, never used twice. `None` for what is no eventfd.
    ///
    /// The first call opens a file; later ones, of this or of a clone, need nothing.
    #[must_use]
    pub fn id(&self) -> Option<u64> {
        if let Some(id) = self.id.get() {
            return Some(*id);
        }
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.as_raw_fd())).ok()?;
        let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?;
        let id = id.trim().parse().ok()?;
        Some(*self.id.get_or_init(|| id))
    }
}

/// An eventfd as KVM has it: its signals are seen, but for everyone else it is closed when the last
/// [`EventFd`] is.
#[cfg(feature = "fake")]
#[derive(Debug)]
pub(crate) struct WatchedEventFd {
    event: EventFd,
    holders: std::sync::Weak<()>,
}

#[cfg(feature = "fake")]
impl WatchedEventFd {
    pub(crate) fn new(event: &EventFd) -> Self {
        let watcher =
            EventFd { file: event.file.clone(), id: event.id.clone(), holders: Arc::default() };
        Self { event: watcher, holders: event.downgrade() }
    }

    pub(crate) fn is_held(&self) -> bool {
        self.holders.strong_count() > 0
    }

    /// For one more holder, if there is one.
    pub(crate) fn upgrade(&self) -> Option<EventFd> {
        let WatchedEventFd { event, holders } = self;
        Some(EventFd { holders: holders.upgrade()?, ..event.clone() })
    }

    /// Without holding it, also when nobody does.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(feature = "fake")]
impl EventFd {
    /// Tells whether someone still holds it, without holding it.
    pub(crate) fn downgrade(&self) -> std::sync::Weak<()> {
        Arc::downgrade(&self.holders)
    }
}

impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        Self { file: Arc::new(fd.into()), id: Arc::default(), holders: Arc::default() }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
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

    #[test]
    fn a_watcher_is_no_holder() {
        let event = event();
        let watched = WatchedEventFd::new(&event);
        let second = watched.upgrade().unwrap();
        assert_eq!((&second, watched.event()), (&event, &event));
        drop(event);
        assert!(watched.is_held());
        second.signal();
        drop(second);
        assert!(!watched.is_held() && watched.upgrade().is_none());
        assert_eq!(watched.event().take(), Some(1), "its signals are still there");
    }
}
