//! Kernel and initrd files.
//!
//! Nothing is read before it is known to be wanted, nor more of it than was checked to exist: a
//! file's size, whatever it is, costs no memory.

use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use hv_core::Errno;
use rustix::fs::OFlags;
use vm_memory::GuestMemoryBackend;

use super::error::{LoadError, Problem};
use super::space::{Part, Space};
use crate::output::printable;

/// Size of the pieces in which a file goes to guest memory.
const PIECE: usize = 256 << 10;

/// Why a file can't be used as an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// `open(2)` failed.
    #[error("it can't be opened: {errno}")]
    Open {
        /// The error number.
        errno: Errno,
    },
    /// A directory, device, pipe or socket.
    #[error("it is {kind}, not a regular file")]
    NotRegular {
        /// What it is, with its article.
        kind: &'static str,
    },
    /// No bytes at all.
    #[error("it is empty")]
    Empty,
    /// Reading failed.
    #[error("reading {len} bytes at offset {offset:#x} failed: {errno}")]
    Read {
        /// Offset in the file.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// The error number.
        errno: Errno,
    },
    /// The image ends before something its headers promise.
    #[error(
        "it is truncated: {what} has {len} bytes at offset {offset:#x}, but it ends at {size:#x}"
    )]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where that starts, in the file.
        offset: u64,
        /// Its size in bytes.
        len: u64,
        /// Size of the image in bytes.
        size: u64,
    },
}

/// A kernel or initrd: an open regular file, or bytes in memory.
#[derive(Debug)]
pub struct Image {
    name: String,
    size: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File(File),
    Bytes(Vec<u8>),
}

impl Image {
    /// Opens the regular file at `path`. Its contents are not read yet.
    ///
    /// # Errors
    /// It can't be opened, is not a regular file (a FIFO is not waited for), or is empty.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let name = printable(path);
        Self::open_regular(path)
            .and_then(|(file, size)| Self::new(name.clone(), size, Data::File(file)))
            .map_err(|error| Problem::from(error).of(&name))
    }

    /// The image called `name` with these contents.
    ///
    /// # Errors
    /// There are none.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, LoadError> {
        Self::new(name.to_owned(), bytes.len() as u64, Data::Bytes(bytes))
            .map_err(|error| Problem::from(error).of(name))
    }

    fn new(name: String, size: u64, data: Data) -> Result<Self, FileError> {
        if size == 0 { Err(FileError::Empty) } else { Ok(Self { name, size, data }) }
    }

    fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
        let failed = |error: io::Error| FileError::Open { errno: errno(&error) };
        // Asked first, because merely opening a device can do something (a watchdog starts), and
        // again afterwards, because the path may by then be something else.
        regular(fs::metadata(path).map_err(failed)?.file_type())?;
        // Without O_NONBLOCK, opening a FIFO waits for a writer.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        regular(metadata.file_type())?;
        Ok((file, metadata.len()))
    }

    /// The path, or the name given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes, at least 1.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Says that `what` is cut off, unless it lies inside the image.
    pub(super) fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), FileError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(FileError::Truncated { what, offset, len, size: self.size }),
        }
    }

    /// Fills `buffer` with the bytes at `offset`, which are `what`.
    pub(super) fn read_at(
        &self,
        what: &'static str,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), FileError> {
        let len = buffer.len();
        self.check(what, offset, len as u64)?;
        let truncated = || FileError::Truncated { what, offset, len: len as u64, size: self.size };
        match &self.data {
            Data::File(file) => {
                file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
                    // The file shrank since it was opened.
                    io::ErrorKind::UnexpectedEof => truncated(),
                    _ => FileError::Read { offset, len, errno: errno(&error) },
                })
            }
            Data::Bytes(bytes) => {
                let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..));
                let source = from.and_then(|rest| rest.get(..len)).ok_or_else(truncated)?;
                buffer.copy_from_slice(source);
                Ok(())
            }
        }
    }

    /// The first bytes, as many as there are up to `limit`.
    pub(super) fn head(&self, limit: usize) -> Result<Vec<u8>, FileError> {
        let len = usize::try_from(self.size).unwrap_or(usize::MAX).min(limit);
        let mut head = vec![0; len];
        self.read_at("the header", 0, &mut head)?;
        Ok(head)
    }

    /// Copies the `len` bytes at `offset`, which are `what`, into the guest at `at`, claimed as
    /// `part` before.
    pub(super) fn copy_to<M: GuestMemoryBackend>(
        &self,
        what: &'static str,
        (offset, len): (u64, u64),
        space: &Space<'_, M>,
        part: Part,
        at: u64,
    ) -> Result<(), Problem> {
        self.check(what, offset, len)?;
        let mut buffer = vec![0; PIECE.min(usize::try_from(len).unwrap_or(PIECE))];
        let mut done = 0;
        while done < len {
            let size = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            let piece = buffer.get_mut(..size).unwrap_or_default();
            // No overflow: the check above and the claim bound both sums.
            self.read_at(what, offset + done, piece)?;
            space.write(part, at + done, piece)?;
            done += size as u64;
        }
        Ok(())
    }
}

fn regular(kind: FileType) -> Result<(), FileError> {
    let kind = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a character device"
    };
    Err(FileError::NotRegular { kind })
}

fn errno(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn problem(path: &Path) -> String {
        Image::open(path).unwrap_err().to_string()
    }

    #[test]
    fn refuses_what_is_not_a_regular_file_and_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(problem(dir.path()).ends_with("it is a directory, not a regular file"));
        assert!(problem(&fifo).ends_with("it is a FIFO, not a regular file"));
        assert!(problem(Path::new("/dev/null")).contains("a character device"));
        assert!(problem(&socket).ends_with("it is a socket, not a regular file"));
    }

    #[test]
    fn names_the_path_and_the_errno() {
        let text = problem(Path::new("/nonexistent/vmlinux"));
        assert!(text.starts_with("cannot load '/nonexistent/vmlinux'"), "{text}");
        assert!(text.contains("ENOENT"), "{text}");
    }

    #[test]
    fn refuses_an_empty_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Image::open(file.path()).unwrap_err();
        assert_eq!(error.problem, Problem::File(FileError::Empty));
        assert!(Image::from_bytes("x", Vec::new()).is_err());
    }

    #[test]
    fn reads_inside_and_never_past_the_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"0123456789").unwrap();
        let bytes = Image::from_bytes("bytes", b"0123456789".to_vec()).unwrap();
        for image in [Image::open(file.path()).unwrap(), bytes] {
            let mut buffer = [0; 4];
            image.read_at("x", 6, &mut buffer).unwrap();
            assert_eq!(&buffer, b"6789");
            for offset in [7, 11, u64::MAX] {
                let error = image.read_at("x", offset, &mut buffer).unwrap_err();
                assert_eq!(error, FileError::Truncated { what: "x", offset, len: 4, size: 10 });
            }
            assert_eq!(image.head(100).unwrap(), b"0123456789");
            assert_eq!(image.head(3).unwrap(), b"012");
        }
    }

    #[test]
    fn a_file_that_shrinks_after_it_was_opened_is_truncated_not_trusted() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[1; 100]).unwrap();
        let image = Image::open(file.path()).unwrap();
        file.as_file().set_len(10).unwrap();
        let error = image.read_at("x", 50, &mut [0; 10]).unwrap_err();
        assert!(matches!(error, FileError::Truncated { .. }), "{error}");
    }
}
