//! The socket a debugger connects to: made for its owner alone, and gone when the machine is.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use hv_core::Errno;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::GdbAddress;

/// Why there is no socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// There is something else.
    #[error("--gdb: '{0}' exists and is no socket; choose another path")]
    NotASocket(GdbAddress),
    /// Another process listens there.
    #[error("--gdb: another process listens on '{0}'; choose another path")]
    InUse(GdbAddress),
    /// The system refuses.
    #[error("--gdb '{address}': {errno}; {}", advice(*.errno))]
    System {
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
        Errno::ENOENT => "its directory must exist",
        Errno::EACCES | Errno::EPERM | Errno::EROFS => "choose a place you may write to",
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        _ => "choose another address",
    }
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// The file of a unix socket: removed when the socket goes, if it is still that file.
struct Inode {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for Inode {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|it| (it.dev(), it.ino()) == (self.device, self.inode));
        if is_ours {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A socket that listens for debuggers.
pub struct Listener {
    socket: Socket,
    address: GdbAddress,
    _path: Option<Inode>,
}

impl Listener {
    /// Listens on `address`. A socket left by a process that is gone is replaced.
    ///
    /// # Errors
    /// Something else is there, or the system refuses.
    pub fn bind(address: &GdbAddress) -> Result<Self, ListenError> {
        let failed = |error: io::Error| ListenError::System {
            address: address.clone(),
            errno: Errno::from(&error),
        };
        match address {
            GdbAddress::Unix(path) => {
                clear(path, address)?;
                let (socket, guard) = bind_unix(path).map_err(failed)?;
                let (socket, _path) = (Socket::Unix(socket), Some(guard));
                Ok(Self { socket, address: address.clone(), _path })
            }
            GdbAddress::Tcp(asked) => {
                let socket = TcpListener::bind(asked).map_err(failed)?;
                socket.set_nonblocking(true).map_err(failed)?;
                let address = GdbAddress::Tcp(socket.local_addr().map_err(failed)?);
                Ok(Self { socket: Socket::Tcp(socket), address, _path: None })
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
            Socket::Unix(socket) => {
                let (stream, _) = socket.accept().ok()?;
                stream.set_nonblocking(true).ok()?;
                Some(stream.into())
            }
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

/// Removes a socket that nobody listens on any more.
fn clear(path: &Path, address: &GdbAddress) -> Result<(), ListenError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(address.clone()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| ListenError::System {
                address: address.clone(),
                errno: Errno::from(&error),
            }),
        // One whose process can't be asked is left alone, too.
        _ => Err(ListenError::InUse(address.clone())),
    }
}

fn bind_unix(path: &Path) -> io::Result<(UnixListener, Inode)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux makes the file with the mode of the socket: at no time may anyone else connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let metadata = fs::symlink_metadata(path)?;
    let guard = Inode { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
    rustix::net::listen(&socket, 1)?;
    Ok((socket.into(), guard))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    fn at(dir: &TempDir, name: &str) -> GdbAddress {
        GdbAddress::Unix(dir.path().join(name))
    }

    fn error(address: &GdbAddress) -> ListenError {
        Listener::bind(address).err().unwrap()
    }

    #[test]
    fn a_unix_socket_is_its_owners_and_goes_with_the_listener() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("gdb");
        let listener = Listener::bind(&at(&dir, "gdb")).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(listener.accept().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_not_touched() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("file"), "precious").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        for name in ["file", "link", "dangling", "."] {
            let address = at(&dir, name);
            assert_eq!(error(&address), ListenError::NotASocket(address.clone()), "{name}");
        }
        assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "precious");
    }

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens() {
        let dir = TempDir::new().unwrap();
        let address = at(&dir, "gdb");
        let first = Listener::bind(&address).unwrap();
        assert_eq!(error(&address), ListenError::InUse(address.clone()));
        // As a process leaves it that was killed.
        std::mem::forget(first._path);
        drop(first.socket);
        assert!(dir.path().join("gdb").exists());
        Listener::bind(&address).unwrap();
    }

    #[test]
    fn a_path_that_is_another_socket_by_now_is_left() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("gdb");
        let listener = Listener::bind(&at(&dir, "gdb")).unwrap();
        fs::rename(&path, dir.path().join("old")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn errors_name_the_address_the_errno_and_what_to_do() {
        let text = error(&GdbAddress::Unix("/no/such/place".into())).to_string();
        assert!(text.starts_with("--gdb '/no/such/place': ENOENT"), "{text}");
        assert!(text.ends_with("its directory must exist"), "{text}");
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let text = error(first.address()).to_string();
        assert!(text.contains("EADDRINUSE") && text.contains("another port"), "{text}");
    }
}
