//! Eventfds that stand in for those of the VMM, so that what KVM signals is seen.
//!
//! KVM is given an eventfd of ours for every one it is to signal: a doorbell (`KVM_IOEVENTFD`), or
//! what says that a level-triggered interrupt has ended (`KVM_IRQFD_FLAG_RESAMPLE`). Whoever sees
//! it signalled passes that on to the VMM's. This module does not know when that is right.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

use crate::layer::signals::Signals;
use crate::layer::{Object, Request};
use crate::{Call, Errno, Error, EventFd};

/// What KVM signals, to be waited for as one.
#[derive(Default)]
pub(super) struct Doorbells(OnceLock<Waited>);

struct Waited {
    /// All stand-ins.
    epoll: OwnedFd,
    /// Ends who waits.
    stop: EventFd,
}

fn failed(errno: rustix::io::Errno) -> Error {
    Error::new(Call::Eventfd, Errno(errno.raw_os_error()))
}

fn new_event() -> Result<EventFd, Error> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(EventFd::from).map_err(failed)
}

impl Doorbells {
    /// Makes it possible to wait, once.
    pub(super) fn open(&self) -> Result<(), Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        let stop = new_event()?;
        let _ = self.0.set(Waited { epoll, stop });
        Ok(())
    }

    /// Whether a stand-in was signalled.
    pub(super) fn rang(&self) -> bool {
        let Some(Waited { epoll, .. }) = self.0.get() else { return false };
        let mut ready = [PollFd::new(epoll, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut ready, Some(&now)), Ok(1..))
    }

    /// Waits until a stand-in is signalled; `false` if it is over.
    pub(super) fn wait(&self) -> bool {
        let Some(Waited { epoll, stop }) = self.0.get() else { return false };
        loop {
            let mut ready = [
                PollFd::new(epoll, PollFlags::IN),
                PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
                Ok(_) => {
                    let [_, stop] = &ready;
                    return stop.revents().is_empty();
                }
            }
        }
    }

    /// Ends every wait.
    pub(super) fn stop(&self) {
        if let Some(Waited { stop, .. }) = self.0.get() {
            stop.signal();
        }
    }

    fn add(&self, event: &EventFd) -> Result<(), Error> {
        let Some(Waited { epoll, .. }) = self.0.get() else { return Ok(()) };
        let data = epoll::EventData::new_u64(0);
        epoll::add(epoll, event, data, epoll::EventFlags::IN).map_err(failed)
    }

    fn remove(&self, event: &EventFd) {
        if let Some(Waited { epoll, .. }) = self.0.get() {
            let _ = epoll::delete(epoll, event);
        }
    }
}

/// The stand-ins there are.
#[derive(Default)]
pub(super) struct StandIns(Vec<StandIn>);

struct StandIn {
    vm: u32,
    /// The number the kernel gave `event`.
    id: u64,
    /// The VMM's.
    event: EventFd,
    /// What KVM has instead.
    own: EventFd,
    /// Calls with it that have not returned.
    calls: u32,
    /// What it is assigned to.
    uses: Vec<Signals>,
}

impl StandIns {
    /// What stands in for `event`, for one call.
    pub(super) fn get(
        &mut self,
        vm: u32,
        event: &EventFd,
        doorbells: &Doorbells,
    ) -> Result<Option<EventFd>, Error> {
        // KVM is to refuse what is no eventfd, and say so itself.
        let Some(id) = event.id() else { return Ok(None) };
        if let Some(found) = self.find(vm, id) {
            found.calls += 1;
            return Ok(Some(found.own.clone()));
        }
        let own = new_event()?;
        doorbells.add(&own)?;
        let (event, uses) = (event.clone(), Vec::new());
        self.0.push(StandIn { vm, id, event, own: own.clone(), calls: 1, uses });
        Ok(Some(own))
    }

    fn find(&mut self, vm: u32, id: u64) -> Option<&mut StandIn> {
        self.0.iter_mut().find(|it| (it.vm, it.id) == (vm, id))
    }

    /// A call has returned: those that are used for nothing go.
    pub(super) fn called(
        &mut self,
        on: Object,
        request: &Request<'_>,
        ok: bool,
        doorbells: &Doorbells,
    ) {
        let Object::Vm(vm) = on else { return };
        let assigned = Signals::assigned_by(request);
        let ended = Signals::ended_by(request);
        let given = match *request {
            Request::IoeventfdDeassign(doorbell) => Some(&doorbell.event),
            _ => assigned.as_ref().map(|(_, event)| *event),
        };
        if let Some(it) = given.and_then(EventFd::id).and_then(|id| self.find(vm, id)) {
            it.calls = it.calls.saturating_sub(1);
            it.uses.extend(assigned.map(|(signals, _)| signals).filter(|_| ok));
        }
        if let Some(ended) = ended.filter(|_| ok) {
            for it in self.0.iter_mut().filter(|it| it.vm == vm) {
                it.uses.retain(|its| *its != ended);
            }
        } else if given.is_none() {
            return;
        }
        self.keep(doorbells, |it| it.calls > 0 || !it.uses.is_empty());
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// A VM is gone.
    pub(super) fn end(&mut self, vm: u32, doorbells: &Doorbells) {
        self.keep(doorbells, |it| it.vm != vm);
    }

    fn keep(&mut self, doorbells: &Doorbells, keep: impl Fn(&StandIn) -> bool) {
        self.0.retain(|it| {
            let kept = keep(it);
            if !kept {
                doorbells.remove(&it.own);
            }
            kept
        });
    }

    /// Those that were signalled since, and how often: the VMM's eventfds.
    pub(super) fn take(&self) -> impl Iterator<Item = (&EventFd, u32)> {
        self.0.iter().filter_map(|it| {
            let count = it.own.take()?;
            Some((&it.event, u32::try_from(count).unwrap_or(u32::MAX)))
        })
    }
}
