//! The sockets of the host: one that listens for those who want to reach the guest, and those the guest
//! reaches.
//!
//! Whoever connects writes `CONNECT <port>`, a port of the guest, and a newline; when the guest accepts,
//! it gets `OK <port>`, that of the host, and from then on it has the connection. The guest reaches what
//! listens at the same path with `_<port>` behind it. It is what other monitors do as well.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::output::printable;
use crate::socket::{BindError, UnixSocket};

/// The most that wait to be accepted.
const BACKLOG: i32 = 64;

/// The longest path of a socket: the system's 108 bytes, less the NUL and `_4294967295`.
const LONGEST_PATH: usize = 107 - 11;

/// The longest line of somebody who connects: `CONNECT 4294967295`, and a carriage return.
const LONGEST_LINE: usize = 19;

/// Why there is no way to the guest.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The path is too long.
    #[error("--vsock uds='{0}': a path may have {LONGEST_PATH} bytes at most")]
    LongPath(String),
    /// There can't be a socket.
    #[error("--vsock uds={0}")]
    Bind(#[from] BindError),
}

/// The listening socket, and where the guest's connections go. The file goes with it.
#[derive(Debug)]
pub(super) struct Host {
    listener: UnixSocket,
    path: PathBuf,
}

impl Host {
    pub(super) fn bind(path: &Path) -> Result<Self, VsockError> {
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(VsockError::LongPath(printable(path)));
        }
        let listener = UnixSocket::bind(path, BACKLOG)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// The path of the listening socket.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next who connects. Reads and writes do not block.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept()
    }

    /// Connects to what listens for the guest's connections to `port`, without waiting for it.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }
}

impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Somebody who has connected and not yet said whereto.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// What came of reading on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing whole yet.
    Nothing,
    /// A port.
    Port(u32),
    /// What makes no sense, or it has gone.
    Nonsense,
}

impl Greeting {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, and nothing beyond the line: that is for the guest.
    pub(super) fn read(&mut self) -> Said {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1..) if byte == *b"\n" => return port(&self.line),
                Ok(1..) if self.line.len() < LONGEST_LINE => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Said::Nothing,
                _ => return Said::Nonsense,
            }
        }
    }
}

fn port(line: &[u8]) -> Said {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits =
        line.strip_prefix(b"CONNECT ").filter(|digits| digits.iter().all(u8::is_ascii_digit));
    let number = digits.and_then(|digits| str::from_utf8(digits).ok()?.parse().ok());
    number.map_or(Said::Nonsense, Said::Port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_greeting_is_a_line_and_not_more() {
        for (text, said) in [
            ("CONNECT 52\n", Said::Port(52)),
            ("CONNECT 4294967295\r\n", Said::Port(u32::MAX)),
            ("CONNECT 52", Said::Nothing),
            ("CONNECT \n", Said::Nonsense),
            ("CONNECT +5\n", Said::Nonsense),
            ("CONNECT 4294967296\n", Said::Nonsense),
            ("connect 52\n", Said::Nonsense),
            ("CONNECT 52 \n", Said::Nonsense),
            ("\n", Said::Nonsense),
            ("CONNECT 00000000000000000052\n", Said::Nonsense),
        ] {
            let (here, mut there) = UnixStream::pair().unwrap();
            here.set_nonblocking(true).unwrap();
            there.write_all(text.as_bytes()).unwrap();
            assert_eq!(Greeting::new(here).read(), said, "{text:?}");
        }
        let (here, mut there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        there.write_all(b"CONNECT 1\ndata").unwrap();
        let mut greeting = Greeting::new(here);
        assert_eq!(greeting.read(), Said::Port(1));
        let mut rest = [0; 4];
        greeting.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"data");
        let (here, there) = UnixStream::pair().unwrap();
        drop(there);
        assert_eq!(Greeting::new(here).read(), Said::Nonsense);
    }
}
