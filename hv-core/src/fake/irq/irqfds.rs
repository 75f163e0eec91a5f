//! The eventfds bound to GSIs (`KVM_IRQFD`): which there are, and which were signalled.
//!
//! An epoll instance tells of signals, edge-triggered, because KVM sees the signals and not the
//! counter: an eventfd whose counter was not 0 when it was assigned keeps it and stays quiet until
//! the next signal.
//!
//! The bindings keep no eventfd open for anyone else: one ends when the last [`EventFd`] of its eventfd
//! goes, with what was signalled until then. A descriptor that was duplicated by other means keeps a
//! binding of KVM, and none here.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::event::WatchedEventFd;
use crate::{Errno, EventFd, Gsi, Irqfd};

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// How many signals are asked for at a time.
const BATCH: usize = 64;

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno(errno.raw_os_error())
}

#[derive(Debug)]
struct Bound {
    event: WatchedEventFd,
    gsi: Gsi,
    resample: Option<WatchedEventFd>,
    /// What of its counter was there when it was assigned.
    stale: u64,
    /// Whether epoll is still to tell that it was there.
    primed: bool,
}

/// The assigned irqfds, by the kernel's number of their eventfd.
#[derive(Debug)]
pub(super) struct Irqfds {
    epoll: OwnedFd,
    bound: BTreeMap<u64, Bound>,
}

impl Bound {
    fn wire(&self) -> Wire {
        Wire { gsi: self.gsi, resamples: self.resample.is_some() }
    }
}

/// Where the events of an irqfd go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wire {
    pub(super) gsi: Gsi,
    /// Whether it has a resample eventfd: its events are a level, not a pulse.
    pub(super) resamples: bool,
}

impl From<&Irqfd> for Wire {
    fn from(irqfd: &Irqfd) -> Self {
        Self { gsi: irqfd.gsi, resamples: irqfd.resample.is_some() }
    }
}

/// A binding that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unbound {
    pub(super) wire: Wire,
    /// Whether it was signalled just before.
    pub(super) signalled: bool,
}

impl Irqfds {
    /// # Errors
    /// Those of `epoll_create1(2)`.
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).map_err(errno)?,
            bound: BTreeMap::new(),
        })
    }

    /// Becomes readable when an assigned eventfd is signalled.
    pub(super) fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Those whose eventfds are open.
    pub(super) fn list(&self) -> impl Iterator<Item = Irqfd> {
        self.bound.values().filter_map(|bound| {
            let resample = bound.resample.as_ref();
            // KVM goes on signalling a resample eventfd that is closed.
            let resample = resample.map(|r| r.upgrade().unwrap_or_else(|| r.event().clone()));
            Some(Irqfd { event: bound.event.upgrade()?, gsi: bound.gsi, resample })
        })
    }

    /// The GSIs that have irqfds.
    pub(super) fn gsis(&self) -> impl Iterator<Item = Gsi> {
        self.bound.values().map(|bound| bound.gsi)
    }

    /// Whether an eventfd is bound, by the kernel's number of it.
    pub(super) fn is_bound(&self, id: u64) -> bool {
        self.bound.contains_key(&id)
    }

    /// Binds an eventfd; whether it was already signalled.
    ///
    /// # Errors
    /// `EINVAL` for what is no eventfd, `EBUSY` for one that is bound, here or `elsewhere`, those of
    /// `epoll_ctl(2)`.
    pub(super) fn assign(&mut self, irqfd: &Irqfd, elsewhere: bool) -> Result<bool, Errno> {
        let id = irqfd.event.id().ok_or(Errno::EINVAL)?;
        if irqfd.resample.as_ref().is_some_and(|resample| resample.id().is_none()) {
            return Err(Errno::EINVAL);
        }
        if elsewhere || self.is_bound(id) {
            return Err(Errno::EBUSY);
        }
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.epoll, &irqfd.event, EventData::new_u64(id), flags).map_err(errno)?;
        // A signal from here on is in this count, or makes another.
        let stale = count(&irqfd.event);
        let primed = stale > 0;
        let event = WatchedEventFd::new(&irqfd.event);
        let resample = irqfd.resample.as_ref().map(WatchedEventFd::new);
        self.bound.insert(id, Bound { event, gsi: irqfd.gsi, resample, stale, primed });
        Ok(primed)
    }

    /// Unbinds an eventfd and, as KVM does, takes what its counter has. `None` if there was no such
    /// binding.
    ///
    /// # Errors
    /// `EINVAL` for what is no eventfd.
    pub(super) fn deassign(&mut self, event: &EventFd, gsi: Gsi) -> Result<Option<Unbound>, Errno> {
        let id = event.id().ok_or(Errno::EINVAL)?;
        if self.bound.get(&id).is_none_or(|bound| bound.gsi != gsi) {
            return Ok(None);
        }
        Ok(self.unbind(id))
    }

    /// Unbinds the eventfds that were closed.
    pub(super) fn closed(&mut self) -> Vec<Unbound> {
        let closed = self.bound.iter().filter(|(_, bound)| !bound.event.is_held());
        let closed: Vec<u64> = closed.map(|(&id, _)| id).collect();
        closed.into_iter().filter_map(|id| self.unbind(id)).collect()
    }

    fn unbind(&mut self, id: u64) -> Option<Unbound> {
        let bound = self.bound.remove(&id)?;
        let event = bound.event.event();
        let _ = epoll::delete(&self.epoll, event);
        Some(Unbound { wire: bound.wire(), signalled: drain(event) > bound.stale })
    }

    /// The irqfds that were signalled since this was last asked; their counters are taken.
    pub(super) fn signalled(&mut self) -> Vec<Wire> {
        let mut signalled = Vec::new();
        let mut events = Vec::with_capacity(BATCH);
        // Whoever signals all the time is heard next time.
        for _ in 0..=self.bound.len() / BATCH {
            events.clear();
            // What epoll_wait(2) can say here is EINTR: the next call asks again.
            let Ok(_) = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&NOW)) else {
                break;
            };
            for event in &events {
                if let Some(bound) = self.bound.get_mut(&event.data.u64()) {
                    let primed = std::mem::take(&mut bound.primed);
                    let event = bound.event.event();
                    if primed && count(event) == bound.stale {
                        continue;
                    }
                    drain(event);
                    bound.stale = 0;
                    signalled.push(bound.wire());
                }
            }
            if events.len() < BATCH {
                break;
            }
        }
        signalled
    }

    /// Whether a GSI has an irqfd with a resample eventfd.
    pub(super) fn resamples(&self, gsi: Gsi) -> bool {
        self.bound.values().any(|bound| bound.gsi == gsi && bound.resample.is_some())
    }

    /// Signals the resample eventfds of a GSI.
    pub(super) fn resample(&self, gsi: Gsi) {
        for bound in self.bound.values().filter(|bound| bound.gsi == gsi) {
            let resample = bound.resample.as_ref().map(WatchedEventFd::event);
            if let Some(resample) = resample.filter(|e| ready(e, PollFlags::OUT)) {
                resample.signal();
            }
        }
    }
}

/// Whether an eventfd can be read (or written) without waiting, which is asked first because it may
/// be a blocking one.
fn ready(event: &EventFd, for_what: PollFlags) -> bool {
    let mut fds = [PollFd::new(event, for_what)];
    poll(&mut fds, Some(&NOW)).is_ok_and(|n| n > 0)
}

/// Takes the count of an eventfd.
fn drain(event: &EventFd) -> u64 {
    if ready(event, PollFlags::IN) { event.take().unwrap_or(0) } else { 0 }
}

/// The count of an eventfd, which stays.
fn count(event: &EventFd) -> u64 {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd()));
    let info = info.unwrap_or_default();
    let text = info.lines().find_map(|line| line.strip_prefix("eventfd-count:"));
    text.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn event() -> EventFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
    }

    fn irqfd(event: &EventFd, gsi: u32) -> Irqfd {
        Irqfd { event: event.clone(), gsi: Gsi(gsi), resample: None }
    }

    fn gsis(signalled: &[Wire]) -> Vec<u32> {
        signalled.iter().map(|wire| wire.gsi.0).collect()
    }

    fn unbound(gsi: u32, signalled: bool) -> Option<Unbound> {
        Some(Unbound { wire: Wire { gsi: Gsi(gsi), resamples: false }, signalled })
    }

    #[test]
    fn signals_are_taken_and_told_once() {
        let (mut irqfds, a, b) = (Irqfds::new().unwrap(), event(), event());
        assert_eq!(irqfds.assign(&irqfd(&a, 4), false), Ok(false));
        assert_eq!(irqfds.assign(&irqfd(&b, 4), false), Ok(false), "two on one GSI");
        assert!(irqfds.signalled().is_empty());
        a.signal();
        a.signal();
        assert_eq!(gsis(&irqfds.signalled()), [4]);
        assert!(irqfds.signalled().is_empty());
        assert_eq!(a.take(), None);
    }

    #[test]
    fn a_count_from_before_stays_until_the_next_signal() {
        let (mut irqfds, a) = (Irqfds::new().unwrap(), event());
        a.signal();
        assert_eq!(irqfds.assign(&irqfd(&a, 4), false), Ok(true));
        assert!(irqfds.signalled().is_empty());
        assert!(irqfds.signalled().is_empty());
        assert_eq!(count(&a), 1);
        a.signal();
        assert_eq!(gsis(&irqfds.signalled()), [4]);
        assert_eq!(count(&a), 0);
    }

    #[test]
    fn a_signal_right_after_the_assignment_is_told() {
        let (mut irqfds, a) = (Irqfds::new().unwrap(), event());
        a.signal();
        irqfds.assign(&irqfd(&a, 4), false).unwrap();
        a.signal();
        assert_eq!(gsis(&irqfds.signalled()), [4]);
    }

    #[test]
    fn one_eventfd_is_bound_once() {
        let (mut irqfds, a) = (Irqfds::new().unwrap(), event());
        irqfds.assign(&irqfd(&a, 4), false).unwrap();
        let copy = EventFd::from(a.as_fd().try_clone_to_owned().unwrap());
        assert_eq!(irqfds.assign(&irqfd(&a, 4), false), Err(Errno::EBUSY));
        assert_eq!(irqfds.assign(&irqfd(&copy, 5), false), Err(Errno::EBUSY));
        assert_eq!(irqfds.deassign(&copy, Gsi(5)), Ok(None), "wrong GSI");
        assert_eq!(irqfds.deassign(&copy, Gsi(4)), Ok(unbound(4, false)));
        assert_eq!(irqfds.deassign(&a, Gsi(4)), Ok(None));
        assert_eq!(irqfds.assign(&irqfd(&copy, 5), false), Ok(false));
    }

    #[test]
    fn deassigning_takes_the_counter() {
        let (mut irqfds, a) = (Irqfds::new().unwrap(), event());
        irqfds.assign(&irqfd(&a, 4), false).unwrap();
        a.signal();
        assert_eq!(irqfds.deassign(&a, Gsi(4)), Ok(unbound(4, true)));
        assert_eq!(a.take(), None);
        a.signal();
        assert_eq!(irqfds.assign(&irqfd(&a, 4), false), Ok(true), "kept while it was not assigned");
        assert_eq!(irqfds.deassign(&a, Gsi(4)), Ok(unbound(4, false)));
        assert_eq!(a.take(), None);
    }

    #[test]
    fn a_closed_eventfd_is_unbound_and_what_it_was_signalled_is_told() {
        let (mut irqfds, resample) = (Irqfds::new().unwrap(), event());
        for (count, signals) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let a = event();
            (0..count).for_each(|_| a.signal());
            let level = Irqfd { resample: Some(resample.clone()), ..irqfd(&a, 4) };
            irqfds.assign(&level, false).unwrap();
            let copy = a.clone();
            drop((a, level));
            assert!(irqfds.closed().is_empty());
            assert!(irqfds.list().map(|irqfd| irqfd.event).eq([copy.clone()]));
            (0..signals).for_each(|_| copy.signal());
            drop(copy);
            assert_eq!(irqfds.list().count(), 0);
            let wire = Wire { gsi: Gsi(4), resamples: true };
            assert_eq!(irqfds.closed(), [Unbound { wire, signalled: signals > 0 }]);
            assert!(irqfds.closed().is_empty() && !irqfds.resamples(Gsi(4)));
        }
    }

    #[test]
    fn a_closed_resample_eventfd_unbinds_nothing() {
        let (mut irqfds, a) = (Irqfds::new().unwrap(), event());
        irqfds.assign(&Irqfd { resample: Some(event()), ..irqfd(&a, 4) }, false).unwrap();
        assert!(irqfds.closed().is_empty() && irqfds.resamples(Gsi(4)));
        assert!(irqfds.list().all(|irqfd| irqfd.resample.is_some()));
        irqfds.resample(Gsi(4));
        // Nor does an eventfd that is its own keep itself.
        let b = event();
        irqfds.assign(&Irqfd { resample: Some(b.clone()), ..irqfd(&b, 5) }, false).unwrap();
        drop(b);
        assert_eq!(irqfds.closed().len(), 1);
    }

    #[test]
    fn what_is_no_eventfd() {
        let mut irqfds = Irqfds::new().unwrap();
        let null = EventFd::from(OwnedFd::from(fs::File::open("/dev/null").unwrap()));
        assert_eq!(irqfds.assign(&irqfd(&null, 4), false), Err(Errno::EINVAL));
        let resample = Irqfd { resample: Some(null.clone()), ..irqfd(&event(), 4) };
        assert_eq!(irqfds.assign(&resample, false), Err(Errno::EINVAL));
        assert_eq!(irqfds.deassign(&null, Gsi(4)), Err(Errno::EINVAL));
    }

    #[test]
    fn a_blocking_eventfd_blocks_nobody() {
        let mut irqfds = Irqfds::new().unwrap();
        let blocking = EventFd::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        irqfds.assign(&irqfd(&blocking, 4), false).unwrap();
        blocking.signal();
        assert_eq!(irqfds.signalled().len(), 1);
        irqfds.deassign(&blocking, Gsi(4)).unwrap();
        let full = EventFd::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let held = event();
        let resample = Irqfd { resample: Some(full), ..irqfd(&held, 5) };
        irqfds.assign(&resample, false).unwrap();
        irqfds.resample(Gsi(5));
    }

    #[test]
    fn more_signals_than_are_asked_for_at_a_time() {
        let mut irqfds = Irqfds::new().unwrap();
        let events: Vec<_> = (0..200).map(|_| event()).collect();
        for (gsi, event) in (0..).zip(&events) {
            irqfds.assign(&irqfd(event, gsi), false).unwrap();
            event.signal();
        }
        let mut told = gsis(&irqfds.signalled());
        told.sort_unstable();
        assert_eq!(told, (0..200).collect::<Vec<_>>());
    }
}
