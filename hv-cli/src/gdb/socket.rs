//! The socket a debugger connects to.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hv_core::Errno;

use super::GdbAddress;
use crate::socket::{BindError, UnixSocket};

/// Why there is no socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// The unix socket can't be had.
    #[error("--gdb: {0}")]
    Unix(#[from] BindError),
    /// The system refuses the TCP socket.
    #[error("--gdb '{address}': {errno}; {}", advice(*.errno))]
    Tcp {
        /// Where.
        address: GdbAddress,
        /// Why.
        errno: Errno,
    },
}

fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EADDRINUSE => "another process listens there: choose another port",
        Errno::EADDRNOTAVAIL => "this host has no such address: try 127.0.0.1",
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        _ => "choose another address",
    }
}

enum Socket {
    Unix(UnixSocket),
    Tcp(TcpListener),
}

/// A socket that listens for debuggers.
pub struct Listener {
    socket: Socket,
    address: GdbAddress,
}

impl Listener {
    /// Listens on `address`. A socket left by a process that is gone is replaced.
    ///
    /// # Errors
    /// Something else is there, or the system refuses.
    pub fn bind(address: &GdbAddress) -> Result<Self, ListenError> {
        let failed = |error: io::Error| ListenError::Tcp {
            address: address.clone(),
            errno: Errno::from(&error),
        };
        match address {
            GdbAddress::Unix(path) => {
                let socket = Socket::Unix(UnixSocket::bind(path, 1)?);
                Ok(Self { socket, address: address.clone() })
            }
            GdbAddress::Tcp(asked) => {
                let socket = TcpListener::bind(asked).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let address = GdbAddress::Tcp(socket.local_addr().map_err(failed)?);
                Ok(Self { socket: Socket::Tcp(socket), address })
            }
        }
    }

    /// Where it listens: with the port the system chose.
    #[must_use]
    pub fn address(&self) -> &GdbAddress {
        &self.address
    }

    /// The next debugger, if one waits. Reads and writes do not block.
    pub(super) fn accept(&self) -> Option<OwnedFd> {
        match &self.socket {
            Socket::Unix(socket) => Some(socket.accept().ok()?.into()),
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                // Answers are small, and each is waited for.
                stream.set_nodelay(true).ok()?;
                Some(stream.into())
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(address: &GdbAddress) -> String {
        Listener::bind(address).err().unwrap().to_string()
    }

    #[test]
    fn errors_name_the_option_the_address_the_errno_and_what_to_do() {
        let text = error(&GdbAddress::Unix("/no/such/place".into()));
        assert!(text.starts_with("--gdb: '/no/such/place': ENOENT"), "{text}");
        assert!(text.ends_with("its directory must exist"), "{text}");
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let text = error(first.address());
        assert!(text.contains("EADDRINUSE") && text.contains("another port"), "{text}");
    }
}
