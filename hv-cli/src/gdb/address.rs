//! Where a debugger connects: the argument of `--gdb`.

use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::output::printable;
use crate::socket::MAX_PATH;

/// Where the GDB server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GdbAddress {
    /// A unix socket, which only its owner may connect to.
    Unix(PathBuf),
    /// A loopback address. Port 0 lets the system choose one.
    Tcp(SocketAddr),
}

impl GdbAddress {
    /// The file of the socket, if it has one.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::Unix(path) => Some(path.clone()),
            Self::Tcp(_) => None,
        }
    }
}

/// A text that is no address a GDB server may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseGdbAddressError {
    /// Neither kind.
    #[error("{0:?} is neither unix:PATH nor tcp:127.0.0.1:PORT")]
    Kind(String),
    /// No path, or one that is too long for a socket.
    #[error("the path of a unix socket has 1 to {MAX_PATH} bytes")]
    Path,
    /// Not an address and a port.
    #[error("{0:?} is no IP address with a port; give tcp:127.0.0.1:PORT")]
    Socket(String),
    /// An address others can reach.
    #[error(
        "{0} is no loopback address, and whoever can connect controls the guest; give \
         tcp:127.0.0.1:PORT, and use ssh -L to debug from another host"
    )]
    NotLoopback(SocketAddr),
}

impl FromStr for GdbAddress {
    type Err = ParseGdbAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            let len = path.as_os_str().as_bytes().len();
            return match len {
                1..=MAX_PATH => Ok(Self::Unix(path)),
                _ => Err(ParseGdbAddressError::Path),
            };
        }
        let Some(address) = text.strip_prefix("tcp:") else {
            return Err(ParseGdbAddressError::Kind(text.to_owned()));
        };
        let address: SocketAddr =
            address.parse().map_err(|_| ParseGdbAddressError::Socket(address.to_owned()))?;
        match address.ip().is_loopback() {
            true => Ok(Self::Tcp(address)),
            false => Err(ParseGdbAddressError::NotLoopback(address)),
        }
    }
}

impl fmt::Display for GdbAddress {
    /// As gdb's `target remote` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => f.write_str(&printable(path)),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GdbAddress, ParseGdbAddressError> {
        text.parse()
    }

    #[test]
    fn both_kinds_are_shown_as_gdb_takes_them() {
        let shown = |text| parse(text).unwrap().to_string();
        assert_eq!(shown("unix:/run/vm.gdb"), "/run/vm.gdb");
        assert_eq!(shown("unix:vm.gdb"), "vm.gdb");
        assert_eq!(shown("tcp:127.0.0.1:1234"), "127.0.0.1:1234");
        assert_eq!(shown("tcp:127.8.0.1:0"), "127.8.0.1:0");
        assert_eq!(shown("tcp:[::1]:1234"), "[::1]:1234");
    }

    #[test]
    fn nobody_else_can_be_let_in() {
        for text in ["tcp:0.0.0.0:1234", "tcp:10.0.0.1:1", "tcp:[::]:1", "tcp:128.0.0.1:1"] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, ParseGdbAddressError::NotLoopback(_)), "{text}");
            assert!(error.to_string().contains("127.0.0.1"), "{error}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["", "1234", ":1234", "unix", "udp:127.0.0.1:1"] {
            assert_eq!(parse(text), Err(ParseGdbAddressError::Kind(text.to_owned())));
        }
        for text in ["tcp:", "tcp:1234", "tcp:localhost:1", "tcp:127.0.0.1", "tcp:127.0.0.1:65536"]
        {
            assert!(matches!(parse(text), Err(ParseGdbAddressError::Socket(_))), "{text}");
        }
        let long = format!("unix:/{}", "x".repeat(MAX_PATH));
        for text in ["unix:", &long] {
            assert_eq!(parse(text), Err(ParseGdbAddressError::Path));
        }
        assert!(parse(&long[..long.len() - 1]).is_ok());
    }
}
