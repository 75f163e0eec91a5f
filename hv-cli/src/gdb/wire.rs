//! The bytes to and from a debugger, over a connected socket that does not block.
//!
//! What is written is collected and sent whole. A debugger that does not read is waited for, but not
//! longer than the machine runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use gdbstub::conn::Connection;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::machine::stop::Stopper;

/// What is collected before it is sent. An answer may be longer.
const COLLECTED: usize = 4096;

pub(super) struct Wire {
    socket: OwnedFd,
    stopper: Stopper,
    out: Vec<u8>,
}

impl Wire {
    pub(super) fn new(socket: OwnedFd, stopper: Stopper) -> Self {
        Self { socket, stopper, out: Vec::with_capacity(COLLECTED) }
    }

    /// Reads what is there: no byte if there is nothing yet.
    ///
    /// # Errors
    /// The connection is closed, or broken.
    pub(super) fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        match rustix::io::read(&self.socket, &mut *buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => Ok(buffer.get(..n).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => Ok(&[]),
            Err(errno) => Err(errno.into()),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let mut rest = &*self.out;
        while !rest.is_empty() {
            match rustix::io::write(&self.socket, rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait()?,
                Err(errno) => return Err(errno.into()),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// Waits until the debugger reads.
    fn wait(&self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.socket, PollFlags::OUT),
            PollFd::new(self.stopper.event(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let [socket, stop] = &fds;
        if socket.revents().is_empty() && !stop.revents().is_empty() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.write_all(&[byte])
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.extend_from_slice(bytes);
        if self.out.len() >= COLLECTED { self.send() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
