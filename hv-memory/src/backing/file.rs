//! Files that guest memory is put in.
//!
//! An access to a mapped page that its file no longer has kills the process (`SIGBUS`), and nothing
//! but a signal handler could stop that. So this module answers one question before anything is
//! mapped: who sees to it that the file keeps its size? It must not map anything.

use std::fs::{self, File, FileType};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use hv_core::Errno;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SealFlags};
use rustix::io::retry_on_intr;
use thiserror::Error;
use vm_memory::FileOffset;

use crate::page_size;

/// A file that can't hold guest memory, and why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{file}: {problem}")]
pub struct FileError {
    /// Its path in quotes, or the name it was given.
    pub file: String,
    /// What is wrong with it.
    pub problem: FileProblem,
}

/// What is wrong with a file for guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FileProblem {
    /// It can't be opened.
    #[error("it can't be opened: {errno}{}", open_remedy(*.errno))]
    Open {
        /// What `open(2)` left.
        errno: Errno,
    },
    /// It is a directory, a device, a pipe or a socket.
    #[error("it is {0}, not a regular file")]
    NotRegular(&'static str),
    /// It ends before the memory does.
    #[error(
        "it has {size:#x} bytes, but the memory needs {:#x} (offset {offset:#x}, length {len:#x}); \
         make it longer (truncate -s {0})", .offset.saturating_add(*.len)
    )]
    TooShort {
        /// Bytes it has.
        size: u64,
        /// Where the memory begins in it.
        offset: u64,
        /// Bytes of memory.
        len: u64,
    },
    /// No file has such an offset.
    #[error("offset {offset:#x} and length {len:#x} are beyond the end of any file")]
    Beyond {
        /// Where the memory would begin.
        offset: u64,
        /// Bytes of memory.
        len: u64,
    },
    /// Nobody keeps it from becoming shorter, which would kill the process.
    #[error(
        "it can't be sealed, so that it may become shorter while it is in use, which would kill this \
         process (SIGBUS); use a memfd that can be sealed, or promise that nobody shortens it"
    )]
    NotSealable,
    /// Another program holds its lock.
    #[error("it is in use: another program has it locked (flock); stop that, or use another file")]
    InUse,
    /// Its file system has no room for all of it.
    #[error(
        "there is no room for all {len:#x} bytes of it: {errno}; make room, or use another place"
    )]
    NoRoom {
        /// Bytes of memory.
        len: u64,
        /// What `fallocate(2)` left.
        errno: Errno,
    },
    /// It became shorter while it was in use.
    #[error(
        "it was shortened to {size:#x} bytes while {needed:#x} of it were the memory of a guest; what \
         is beyond is lost, and an access there ends this process (SIGBUS)"
    )]
    Shrunk {
        /// Bytes it has now.
        size: u64,
        /// Bytes it must have.
        needed: u64,
    },
    /// It can't be mapped as asked for.
    #[error("it can't be mapped: {errno}{}", map_remedy(*.errno))]
    Map {
        /// What `mmap(2)` left.
        errno: Errno,
    },
    /// Another call on it failed.
    #[error("{call} failed: {errno}")]
    System {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

fn open_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT => "; make it first (truncate -s SIZE FILE)",
        Errno::EACCES | Errno::EPERM | Errno::EROFS => "; it has to be readable and writable",
        Errno::EMFILE => "; raise the limit of open files (ulimit -n)",
        _ => "",
    }
}

fn map_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EACCES => "; it has to be open for reading, and for writing too if it is shared",
        Errno::EPERM => "; it may be sealed against writing",
        Errno::ENODEV => "; its file system has no memory mappings",
        _ => "",
    }
}

/// Whether what is written to memory is written to its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes go to the file (`MAP_SHARED`), which must be open for writing. Its contents are what the
    /// guest left, and other processes can map them.
    Shared,
    /// The file is what memory holds at first; writes are this process's own (`MAP_PRIVATE`).
    Private,
}

/// Who sees to it that a file does not become shorter while it is mapped.
///
/// | | [`Sealed`](Self::Sealed) | [`Promised`](Self::Promised) |
/// | --- | --- | --- |
/// | which files | a memfd with `MFD_ALLOW_SEALING` or `F_SEAL_SHRINK` | any regular file |
/// | shortening it | fails with `EPERM`, whoever tries | succeeds, if someone breaks the promise |
/// | then the guest | - | its next access beyond the end ends `KVM_RUN` with `EFAULT`, or with `KVM_EXIT_MMIO` where KVM emulates the instruction |
/// | then this process | - | an access of its own beyond the end kills it (`SIGBUS`) |
///
/// [`Mapping::check`](crate::Mapping::check) tells of a broken promise, without touching the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptSize {
    /// The kernel: the file is sealed (`F_SEAL_SHRINK`), for good, when it is mapped. A file that
    /// can't be is refused. This is what to ask for when somebody else holds the file too.
    Sealed,
    /// The caller, who promises it because the file is his own. A file opened by its path is also
    /// locked (`flock(2)`), which programs that ask for the lock respect, such as another VMM.
    Promised,
}

/// A regular file for guest memory, open. Clones share it and its lock.
#[derive(Debug, Clone)]
pub struct BackingFile {
    file: Arc<File>,
    name: Arc<str>,
    offset: u64,
    sharing: Sharing,
    kept: KeptSize,
    file_system: FileSystem,
}

/// What matters of a file system.
#[derive(Debug, Clone, Copy)]
struct FileSystem {
    /// Bytes of its pages.
    page: u64,
    /// Whether a hole in a file may find no room when it is filled.
    can_be_full: bool,
}

impl BackingFile {
    /// Opens the regular file at `path`.
    ///
    /// # Errors
    /// It can't be opened, is no regular file (a device is not even opened, a FIFO not waited for),
    /// or another program has it locked.
    pub fn open(path: &Path, sharing: Sharing, kept: KeptSize) -> Result<Self, FileError> {
        let name = format!("{path:?}");
        let failed = |error: io::Error| FileProblem::Open { errno: Errno::from(&error) }.of(&name);
        // Asked first, because merely opening a device can do something.
        let metadata = fs::metadata(path).map_err(failed)?;
        regular(metadata.file_type()).map_err(|problem| problem.of(&name))?;
        let file = File::options()
            .read(true)
            .write(sharing == Sharing::Shared)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(failed)?;
        let this = Self::of(file, &name, sharing, kept)?;
        if kept == KeptSize::Promised {
            this.lock()?;
        }
        Ok(this)
    }

    /// A file that is open already, called `name` in messages: for one that was handed over.
    ///
    /// # Errors
    /// It is no regular file.
    pub fn from_fd(
        fd: OwnedFd,
        name: &str,
        sharing: Sharing,
        kept: KeptSize,
    ) -> Result<Self, FileError> {
        Self::of(File::from(fd), name, sharing, kept)
    }

    fn of(file: File, name: &str, sharing: Sharing, kept: KeptSize) -> Result<Self, FileError> {
        let problem = |problem: FileProblem| problem.of(name);
        let metadata = file.metadata().map_err(|error| {
            problem(FileProblem::System { call: "fstat", errno: Errno::from(&error) })
        })?;
        regular(metadata.file_type()).map_err(problem)?;
        let file_system = FileSystem::of(&file).map_err(problem)?;
        let (file, name) = (Arc::new(file), name.into());
        Ok(Self { file, name, offset: 0, sharing, kept, file_system })
    }

    /// The same file with the memory at `offset` bytes.
    #[must_use]
    pub fn at(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// The same file with the memory `bytes` further on.
    pub(super) fn after(&self, bytes: u64) -> Result<Self, FileError> {
        let beyond = FileProblem::Beyond { offset: self.offset, len: bytes };
        let offset = self.offset.checked_add(bytes).ok_or_else(|| beyond.of(&self.name))?;
        Ok(self.clone().at(offset))
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// Bytes of the pages the file is made of.
    pub(super) fn page(&self) -> u64 {
        self.file_system.page
    }

    /// Whether a hole in it may find no room when it is filled.
    pub(super) fn can_be_full(&self) -> bool {
        self.file_system.can_be_full
    }

    pub(super) fn file_offset(&self) -> FileOffset {
        FileOffset::from_arc(self.file.clone(), self.offset)
    }

    pub(super) fn error(&self, problem: FileProblem) -> FileError {
        problem.of(&self.name)
    }

    fn lock(&self) -> Result<(), FileError> {
        let operation = match self.sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockExclusive,
            Sharing::Private => FlockOperation::NonBlockingLockShared,
        };
        match retry_on_intr(|| rustix::fs::flock(&*self.file, operation)) {
            // Not every file system has locks. The lock is a help; the promise is the caller's.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(self.error(FileProblem::InUse)),
            Err(errno) => Err(self.failed("flock", errno)),
        }
    }

    fn failed(&self, call: &'static str, errno: rustix::io::Errno) -> FileError {
        self.error(FileProblem::System { call, errno: Errno(errno.raw_os_error()) })
    }

    fn size(&self) -> Result<u64, FileError> {
        let metadata = self.file.metadata().map_err(|error| {
            self.error(FileProblem::System { call: "fstat", errno: Errno::from(&error) })
        })?;
        Ok(metadata.len())
    }

    /// Where `len` bytes of memory end in the file.
    fn end(&self, len: u64) -> Result<u64, FileError> {
        let beyond = FileProblem::Beyond { offset: self.offset, len };
        let end = self.offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        end.ok_or_else(|| self.error(beyond))
    }

    /// The file has `len` bytes of memory.
    pub(super) fn has(&self, len: u64) -> Result<(), FileError> {
        let (end, size) = (self.end(len)?, self.size()?);
        if size < end {
            return Err(self.error(FileProblem::TooShort { size, offset: self.offset, len }));
        }
        Ok(())
    }

    /// The file still has the `len` bytes of memory it had.
    pub(super) fn still_has(&self, len: u64) -> Result<(), FileError> {
        let (needed, size) = (self.end(len)?, self.size()?);
        if size < needed {
            return Err(self.error(FileProblem::Shrunk { size, needed }));
        }
        Ok(())
    }

    /// Makes sure that the file keeps the `len` bytes of memory, and has room for them: the last
    /// step of mapping it, because a seal stays.
    pub(super) fn keep(&self, len: u64) -> Result<(), FileError> {
        if self.sharing == Sharing::Shared && self.file_system.can_be_full {
            self.make_room(len)?;
        }
        if self.kept == KeptSize::Sealed {
            let seals = rustix::fs::fcntl_get_seals(&*self.file);
            let sealed = seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
            if !sealed && rustix::fs::fcntl_add_seals(&*self.file, SealFlags::SHRINK).is_err() {
                return Err(self.error(FileProblem::NotSealable));
            }
        }
        // It may have become shorter before it was sealed.
        self.has(len)
    }

    /// Fills the holes: later there may be no room for them, which is a SIGBUS too.
    fn make_room(&self, len: u64) -> Result<(), FileError> {
        let allocate =
            || rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, self.offset, len);
        match retry_on_intr(allocate) {
            // Not every file system can; the promise is the caller's.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(errno @ (rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)) => {
                let errno = Errno(errno.raw_os_error());
                Err(self.error(FileProblem::NoRoom { len, errno }))
            }
            Err(errno) => Err(self.failed("fallocate", errno)),
        }
    }
}

impl FileSystem {
    fn of(file: &File) -> Result<Self, FileProblem> {
        const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        let stat = rustix::fs::fstatfs(file).map_err(|errno| FileProblem::System {
            call: "fstatfs",
            errno: Errno(errno.raw_os_error()),
        })?;
        // Its pages are reserved when a file is mapped.
        if stat.f_type == HUGETLBFS_MAGIC {
            let page = u64::try_from(stat.f_bsize).unwrap_or_default().max(page_size());
            return Ok(Self { page, can_be_full: false });
        }
        // A memfd is on a tmpfs without a limit.
        let can_be_full = stat.f_type != TMPFS_MAGIC || stat.f_blocks != 0;
        Ok(Self { page: page_size(), can_be_full })
    }
}

impl FileProblem {
    fn of(self, file: &str) -> FileError {
        FileError { file: file.to_owned(), problem: self }
    }
}

fn regular(kind: FileType) -> Result<(), FileProblem> {
    let kind = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_block_device() => "a block device",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        _ => "something else",
    };
    Err(FileProblem::NotRegular(kind))
}
