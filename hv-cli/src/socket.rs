//! A unix socket that others connect to: made for its owner alone, and gone when its user is.
//!
//! What it is for is the business of its user: the GDB server, the API.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use hv_core::Errno;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::output::printable;

/// The longest path of a unix socket (`sun_path` without its NUL).
pub const MAX_PATH: usize = 107;

/// Why there is no socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// There is something else.
    #[error("'{}' exists and is no socket; choose another path", printable(.0))]
    NotASocket(PathBuf),
    /// Another process listens there.
    #[error("another process listens on '{}'; choose another path", printable(.0))]
    InUse(PathBuf),
    /// The system refuses.
    #[error("'{}': {errno}; {}", printable(.path), advice(*.errno))]
    System {
        /// Where.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
}

fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT => "its directory must exist",
        Errno::EACCES | Errno::EPERM | Errno::EROFS => "choose a place you may write to",
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        Errno::ENAMETOOLONG => "the path of a socket has at most 107 bytes",
        _ => "choose another path",
    }
}

/// The file of a socket: removed when the socket goes, if it is still that file.
#[derive(Debug)]
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

/// A socket that listens, without blocking.
#[derive(Debug)]
pub struct UnixSocket {
    socket: UnixListener,
    inode: Inode,
}

impl UnixSocket {
    /// Listens on `path`, where `backlog` may wait to be accepted. A socket left by a process that is
    /// gone is replaced; nothing else is.
    ///
    /// # Errors
    /// Something else is there, or the system refuses.
    pub fn bind(path: &Path, backlog: i32) -> Result<Self, BindError> {
        clear(path)?;
        bind(path, backlog).map_err(|error| system(path, &error))
    }

    /// The next that connects, if one waits. Reads and writes do not block.
    ///
    /// # Errors
    /// `EAGAIN`: nobody waits. Others: the system has nothing left for it.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inode.path
    }
}

impl AsFd for UnixSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn system(path: &Path, error: &io::Error) -> BindError {
    BindError::System { path: path.to_owned(), errno: Errno::from(error) }
}

/// Removes a socket that nobody listens on any more.
fn clear(path: &Path) -> Result<(), BindError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    // One that is busy is not waited for.
    match connect(path) {
        Err(rustix::io::Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|error| system(path, &error))
        }
        // One whose process can't be asked is left alone, too.
        _ => Err(BindError::InUse(path.to_owned())),
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn connect(path: &Path) -> rustix::io::Result<()> {
    rustix::net::connect(socket()?, &SocketAddrUnix::new(path)?)
}

fn bind(path: &Path, backlog: i32) -> io::Result<UnixSocket> {
    let socket = socket()?;
    // Linux makes the file with the mode of the socket: at no time may anyone else connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let metadata = fs::symlink_metadata(path)?;
    let inode = Inode { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
    rustix::net::listen(&socket, backlog)?;
    Ok(UnixSocket { socket: socket.into(), inode })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use tempfile::TempDir;

    fn error(path: &Path) -> BindError {
        UnixSocket::bind(path, 1).unwrap_err()
    }

    #[test]
    fn a_socket_is_its_owners_and_goes_with_the_listener() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let socket = UnixSocket::bind(&path, 1).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _client = UnixStream::connect(&path).unwrap();
        socket.accept().unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_not_touched() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("file"), "precious").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        for name in ["file", "link", "dangling", "."] {
            let path = dir.path().join(name);
            assert_eq!(error(&path), BindError::NotASocket(path.clone()), "{name}");
        }
        assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "precious");
    }

    #[test]
    fn a_socket_is_replaced_only_if_nobody_listens() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let first = UnixSocket::bind(&path, 1).unwrap();
        // The first fills the backlog.
        let _waiting = [(); 4].map(|()| connect(&path));
        assert_eq!(error(&path), BindError::InUse(path.clone()));
        // As a process leaves it that was killed.
        std::mem::forget(first.inode);
        drop(first.socket);
        assert!(path.exists());
        UnixSocket::bind(&path, 1).unwrap();
    }

    #[test]
    fn a_path_that_is_another_socket_by_now_is_left() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("socket");
        let socket = UnixSocket::bind(&path, 1).unwrap();
        fs::rename(&path, dir.path().join("old")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn errors_name_the_path_the_errno_and_what_to_do() {
        let text = error(Path::new("/no/such/place\n")).to_string();
        assert_eq!(
            text,
            "'/no/such/place\\n': ENOENT (No such file or directory); its directory must exist"
        );
        let text = error(Path::new(&format!("/tmp/{}", "x".repeat(120)))).to_string();
        assert!(text.contains("ENAMETOOLONG") && text.ends_with("at most 107 bytes"), "{text}");
    }
}
