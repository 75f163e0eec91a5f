//! Where a console is shown: writing that never waits.
//!
//! The descriptor may be shared with other processes, so it is not made non-blocking itself: that would
//! change it for them too.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, major, minor, open};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustix::termios::tcgetwinsize;

/// What a console is shown on.
#[derive(Debug)]
pub struct ConsoleOutput {
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Writing does not wait: a regular file, or a terminal or pipe that was opened anew for that.
    Direct,
    Socket,
    /// It can't be opened anew, and takes one byte without waiting when poll(2) says that it is ready.
    Polled,
}

/// What became of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// So many were written: at least one.
    Bytes(usize),
    /// Nothing was, for now.
    Busy,
    /// They can't be: nobody reads, or there is no room.
    Lost,
}

impl ConsoleOutput {
    /// Shows on what `fd` is.
    ///
    /// # Errors
    /// It is no open descriptor, or the process has none left.
    pub fn new(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = fstat(fd)?;
        let anew = || {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).ok()
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => Kind::Socket,
            FileType::Fifo | FileType::CharacterDevice if !opens_another(&stat) => match anew() {
                Some(fd) => return Ok(Self { fd, kind: Kind::Direct }),
                None => Kind::Polled,
            },
            FileType::CharacterDevice => Kind::Polled,
            _ => Kind::Direct,
        };
        Ok(Self { fd: fd.try_clone_to_owned()?, kind })
    }

    /// Columns and rows as the configuration space has them, if it is a terminal.
    pub(super) fn size(&self) -> Option<[u8; 4]> {
        let size = tcgetwinsize(&self.fd).ok()?;
        let ([a, b], [c, d]) = (size.ws_col.to_le_bytes(), size.ws_row.to_le_bytes());
        Some([a, b, c, d])
    }

    /// Writes what there is room for.
    pub(super) fn write(&self, bytes: &[u8]) -> Written {
        loop {
            let written = match self.kind {
                Kind::Direct => rustix::io::write(&self.fd, bytes),
                Kind::Socket => send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
                Kind::Polled => match self.wait(Duration::ZERO) {
                    Ok(true) => rustix::io::write(&self.fd, bytes.get(..1).unwrap_or_default()),
                    Ok(false) => Err(Errno::AGAIN),
                    Err(error) => Err(error),
                },
            };
            return match written {
                Ok(0) | Err(Errno::AGAIN) => Written::Busy,
                Ok(n) => Written::Bytes(n),
                Err(Errno::INTR) => continue,
                Err(_) => Written::Lost,
            };
        }
    }

    /// Waits until it takes something, or an error is to be had; false if it still does not.
    pub(super) fn wait(&self, limit: Duration) -> Result<bool, Errno> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
        match poll(&mut fds, Some(&limit)) {
            Ok(n) => Ok(n > 0),
            // Whoever waits looks again.
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// `/dev/ptmx` (5, 2): whoever opens it anew gets another terminal.
fn opens_another(stat: &Stat) -> bool {
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && device == (5, 2)
}

impl AsFd for ConsoleOutput {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    fn output(fd: &impl AsFd) -> ConsoleOutput {
        ConsoleOutput::new(fd.as_fd()).unwrap()
    }

    /// Writes until it is busy, and returns how much that was.
    fn fill(output: &ConsoleOutput) -> usize {
        let mut all = 0;
        loop {
            match output.write(&[b'x'; 1000]) {
                Written::Bytes(n) => all += n,
                Written::Busy => return all,
                Written::Lost => panic!("lost after {all} bytes"),
            }
        }
    }

    #[test]
    fn a_full_pipe_is_busy_and_is_not_changed_for_others() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let output = output(&writer);
        assert_eq!(output.kind, Kind::Direct);
        let all = fill(&output);
        assert!(all > 0 && !output.wait(Duration::ZERO).unwrap());
        assert!(!fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
        let mut read = vec![0; all];
        reader.read_exact(&mut read).unwrap();
        assert!(output.wait(Duration::ZERO).unwrap());
        drop(reader);
        assert_eq!(output.write(b"x"), Written::Lost);
    }

    #[test]
    fn a_full_socket_is_busy() {
        let (here, there) = UnixStream::pair().unwrap();
        let output = output(&here);
        assert!(fill(&output) > 0);
        drop(there);
        assert_eq!(output.write(b"x"), Written::Lost);
    }

    #[test]
    fn a_terminal_that_is_not_read_is_busy_and_has_a_size() {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        use rustix::termios::{Winsize, tcsetwinsize};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 300, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
        let shown = output(&terminal);
        assert_eq!(shown.size(), Some([44, 1, 24, 0]));
        assert!(fill(&shown) > 0);
        // The other side would be opened as a new terminal: it is written byte by byte.
        assert_eq!(output(&controller).kind, Kind::Polled);
    }

    #[test]
    fn what_can_not_be_opened_anew_is_asked_before_each_byte() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let output = ConsoleOutput { fd: writer.into(), kind: Kind::Polled };
        assert_eq!(output.write(b"xyz"), Written::Bytes(1));
        assert!(fill(&output) > 0);
    }

    #[test]
    fn a_file_goes_on_where_it_is_and_a_full_one_loses() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        assert_eq!(output(&file).write(b"after"), Written::Bytes(5));
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before after");
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(output(&full).write(b"x"), Written::Lost);
        assert_eq!(output(&full).size(), None);
    }
}
