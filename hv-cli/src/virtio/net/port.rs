//! What a pair of queues is connected to, and how a frame gets there and back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hv_core::Errno;
use virtio_bindings::virtio_net::VIRTIO_NET_HDR_GSO_NONE;

use super::sys::{Iovecs, Part};
use super::{HEADER, MOST_FRAME};
use crate::virtio::{Chain, QueueError};

/// Bytes before each frame in a stream: its length, big-endian.
pub(super) const STREAM_HEADER: usize = 4;

/// What a pair of queues is connected to.
pub(super) struct Port {
    pub(super) fd: OwnedFd,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    /// A queue of a tap interface that has the header of virtio before each frame. Reads and writes are
    /// of one frame each.
    Tap,
    /// Reads and writes are of one frame each, without a header.
    Frames,
    /// Frames one after the other, each after its length.
    Stream(Stream),
}

/// How far a stream is. It goes on where it is when the driver resets the device.
#[derive(Default)]
pub(super) struct Stream {
    /// What was read of a length.
    pub(super) length: [u8; STREAM_HEADER],
    pub(super) length_read: usize,
    /// What was read of the frame.
    pub(super) frame_read: usize,
    /// The rest of the frame is for nobody.
    pub(super) discard: bool,
    /// What could not be written yet of a frame.
    unsent: Vec<u8>,
}

impl Stream {
    /// How long the frame that is being read is, if that is known.
    pub(super) fn frame(&self) -> Option<usize> {
        let known = self.length_read == STREAM_HEADER;
        known.then(|| u32::from_be_bytes(self.length) as usize)
    }
}

/// What became of a frame of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is on its way.
    Yes,
    /// It can't be sent, whenever.
    No,
    /// Not now: the other side has no room.
    Later,
    /// Nor will any other: the other side is gone.
    Gone,
}

impl Port {
    /// Whether the header of virtio goes with the frame.
    pub(super) fn has_header(&self) -> bool {
        matches!(self.kind, Kind::Tap)
    }

    /// Sends the frame of a request, behind its header.
    pub(super) fn send(&mut self, chain: &Chain, iovecs: &mut Iovecs) -> Result<Sent, QueueError> {
        let len = (chain.readable_len() as usize).saturating_sub(HEADER);
        if !(1..=MOST_FRAME).contains(&len) {
            return Ok(Sent::No);
        }
        if !self.has_header() {
            let mut header = [0; 2];
            chain.read_at(0, &mut header)?;
            // It wants what was not offered: a checksum to be made, or the frame to be cut.
            if header != [0, VIRTIO_NET_HDR_GSO_NONE as u8] {
                return Ok(Sent::No);
            }
        }
        let fd = &self.fd;
        let sent = |result| match result {
            Ok(_) => Sent::Yes,
            Err(errno) => failed(errno),
        };
        let frame = chain.readable_parts(HEADER as u32);
        Ok(match &mut self.kind {
            Kind::Tap => sent(again(|| iovecs.write(fd, &[], chain.readable_parts(0)))),
            Kind::Frames => {
                sent(again(|| iovecs.write(fd, &[], chain.readable_parts(HEADER as u32))))
            }
            Kind::Stream(stream) => match stream.flush(fd.as_fd()) {
                Sent::Yes => stream.send(fd.as_fd(), chain, len, frame, iovecs)?,
                not => not,
            },
        })
    }

    /// Sends what is left of an earlier frame.
    pub(super) fn flush(&mut self) -> Sent {
        match &mut self.kind {
            Kind::Stream(stream) => stream.flush(self.fd.as_fd()),
            _ => Sent::Yes,
        }
    }

    /// The driver is gone: what it was getting is for nobody.
    pub(super) fn reset(&mut self) {
        if let Kind::Stream(stream) = &mut self.kind {
            stream.discard |= stream.frame_read > 0;
        }
    }
}

impl Stream {
    fn send<'m>(
        &mut self,
        fd: BorrowedFd<'_>,
        chain: &Chain,
        len: usize,
        frame: impl Iterator<Item = Part<'m>>,
        iovecs: &mut Iovecs,
    ) -> Result<Sent, QueueError> {
        let head = (len as u32).to_be_bytes();
        let written = match iovecs.write(fd, &head, frame) {
            Ok(written) => written,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Ok(failed_stream(errno)),
        };
        // There was room for a part of it: the rest is kept.
        if written < STREAM_HEADER + len {
            self.unsent.extend(head.get(written..).unwrap_or_default());
            let from = written.saturating_sub(STREAM_HEADER);
            let start = self.unsent.len();
            self.unsent.resize(start + len - from, 0);
            let rest = self.unsent.get_mut(start..).unwrap_or_default();
            chain.read_at((HEADER + from) as u32, rest)?;
        }
        Ok(Sent::Yes)
    }

    fn flush(&mut self, fd: BorrowedFd<'_>) -> Sent {
        while !self.unsent.is_empty() {
            match rustix::io::write(fd, &self.unsent) {
                Ok(written) => drop(self.unsent.drain(..written.min(self.unsent.len()))),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return failed_stream(Errno(errno.raw_os_error())),
            }
        }
        Sent::Yes
    }
}

/// Does it again when a signal came in between.
pub(super) fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// What a frame that can't be written says of the frame and of the other side.
pub(super) fn failed(errno: Errno) -> Sent {
    match errno {
        Errno::EAGAIN => Sent::Later,
        // A tap interface that was removed.
        Errno::EBADFD | Errno::ENODEV => Sent::Gone,
        // What the kernel refuses for what is in it (EINVAL, EMSGSIZE), an interface that is down (EIO,
        // ENETDOWN), nobody at the other end of a socket, no memory: other frames may fare better.
        _ => Sent::No,
    }
}

fn failed_stream(errno: Errno) -> Sent {
    match errno {
        Errno::EAGAIN => Sent::Later,
        // Where the next frame starts, nobody knows.
        _ => Sent::Gone,
    }
}
