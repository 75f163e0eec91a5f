//! Names for what differs from run to run: eventfds, numbered in order of appearance.
//!
//! A descriptor's number says nothing to a reader and is used again for something else, so what is
//! written of a run names eventfds by this registry alone.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::EventFd;

/// Numbers for eventfds, in the order in which they first appear: two descriptors of one eventfd
/// have one number.
///
/// ```
/// # #[cfg(feature = "mock")] {
/// # use hv_core::{EventFd, layer::Names};
/// # use rustix::event::{EventfdFlags, eventfd};
/// # use std::os::fd::AsFd;
/// # let make = || EventFd::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
/// let (first, second) = (make(), make());
/// let copy = EventFd::from(first.as_fd().try_clone_to_owned().unwrap());
/// let names = Names::default();
/// assert_eq!((names.event(&second), names.event(&first)), (Some(0), Some(1)));
/// assert_eq!(names.event(&copy), Some(1));
/// # }
/// ```
///
/// A clone goes on by itself.
#[derive(Debug, Default)]
pub struct Names {
    /// By the kernel's number, which is never used twice.
    events: Mutex<Events>,
}

#[derive(Debug, Clone, Default)]
struct Events {
    numbers: HashMap<u64, u32>,
    /// Those that go by the number of another.
    same: HashMap<u64, u64>,
}

impl Names {
    /// The number of an eventfd. `None` for what is no eventfd, and before Linux 5.2, which does
    /// not say which eventfd a descriptor is.
    #[must_use]
    pub fn event(&self, event: &EventFd) -> Option<u32> {
        let id = event.id()?;
        let mut events = self.lock();
        let id = *events.same.get(&id).unwrap_or(&id);
        let next = u32::try_from(events.numbers.len()).ok()?;
        Some(*events.numbers.entry(id).or_insert(next))
    }

    /// The number of an eventfd that has one.
    pub(super) fn known(&self, event: &EventFd) -> Option<u32> {
        let (id, events) = (event.id()?, self.lock());
        let id = events.same.get(&id).unwrap_or(&id);
        events.numbers.get(id).copied()
    }

    /// Lets an eventfd go by the number of another from now on.
    pub(super) fn same(&self, event: &EventFd, other: &EventFd) {
        if let (Some(id), Some(other)) = (event.id(), other.id()) {
            self.lock().same.insert(id, other);
        }
    }

    /// How many eventfds have a number.
    pub(super) fn len(&self) -> usize {
        self.lock().numbers.len()
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clone for Names {
    fn clone(&self) -> Self {
        Self { events: Mutex::new(self.lock().clone()) }
    }
}
