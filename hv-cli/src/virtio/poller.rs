//! What the thread of a device sleeps in: epoll(7), with a number for each descriptor.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

/// What a descriptor is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interest {
    /// That it can be read from.
    pub read: bool,
    /// That it can be written to.
    pub write: bool,
}

impl Interest {
    /// That it can be read from.
    pub const READ: Self = Self { read: true, write: false };
    /// That it can be written to.
    pub const WRITE: Self = Self { read: false, write: true };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, self.read);
        flags.set(epoll::EventFlags::OUT, self.write);
        flags
    }
}

/// What a watched descriptor is ready for. Watching is level-triggered: what is not dealt with is told
/// again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The number it is watched with.
    pub token: u32,
    /// Reading returns something, the end or an error.
    pub read: bool,
    /// Writing takes something or returns an error.
    pub write: bool,
    /// The other side has gone, or there is an error. Told whatever is watched for.
    pub hangup: bool,
}

/// A set of descriptors to wait for.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

/// The most that is told at once.
const EVENTS: usize = 32;

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    pub(crate) fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    pub(crate) fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits until some are ready, or only looks: their tokens and what they are ready for.
    pub(crate) fn wait(&self, look_only: bool, all: &mut Vec<(u64, Ready)>) -> io::Result<()> {
        all.clear();
        let timeout = look_only.then(Timespec::default);
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let events = match epoll::wait(&self.0, &mut events, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        all.extend(events.iter().map(|event| {
            let (token, flags) = (event.data.u64(), event.flags);
            let hangup = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            let ready = Ready {
                token: token as u32,
                read: flags.contains(epoll::EventFlags::IN) || hangup,
                write: flags.contains(epoll::EventFlags::OUT) || hangup,
                hangup,
            };
            (token, ready)
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn look(poller: &Poller) -> Vec<(u64, Ready)> {
        let mut all = Vec::new();
        poller.wait(true, &mut all).unwrap();
        all
    }

    #[test]
    fn what_is_ready_is_told_until_it_is_dealt_with() {
        let poller = Poller::new().unwrap();
        let event = Event::new().unwrap();
        poller.add(&event, 1 << 32 | 7, Interest::READ).unwrap();
        assert!(look(&poller).is_empty());
        event.signal();
        let readable = Ready { token: 7, read: true, write: false, hangup: false };
        assert_eq!(look(&poller), [(1 << 32 | 7, readable)]);
        assert_eq!(look(&poller).len(), 1);
        let _ = event.take();
        assert!(look(&poller).is_empty());
        assert!(poller.add(&event, 2, Interest::READ).is_err(), "once");
    }

    #[test]
    fn interest_changes_and_a_hangup_is_always_told() {
        let poller = Poller::new().unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        poller.add(&there, 1, Interest::READ).unwrap();
        here.write_all(b"x").unwrap();
        assert!(look(&poller)[0].1.read);
        poller.modify(&there, 1, Interest::default()).unwrap();
        assert!(look(&poller).is_empty());
        drop(here);
        assert!(look(&poller)[0].1.hangup);
        poller.remove(&there).unwrap();
        assert!(look(&poller).is_empty());
    }
}
