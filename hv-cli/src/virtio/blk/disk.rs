//! The file of a disk: what can be one, and who may have it.
//!
//! A disk is opened once, before the machine runs. A writer has it alone, readers share it: by flock(2),
//! which ends with the process however that ends.

use std::fs::{File, FileType, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hv_core::Errno;

use super::request::SECTOR;
use crate::config::DiskConfig;

/// Why a disk can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file can't be opened.
    #[error("disk {}: can't open it: {errno}{}", path.display(), advice(*errno))]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// It can be read, and was to be written.
    #[error(
        "disk {}: can't open it for writing: {errno}; add ,readonly if the guest need not write",
        path.display()
    )]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// It is a directory, a terminal, a pipe…
    #[error("disk {} is {what}, which can't be a disk", path.display())]
    NoDisk {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It is a block device, and nobody said that it may be.
    #[error(
        "disk {} is a block device: add ,device if the guest may have all of it",
        path.display()
    )]
    Device {
        /// The device node.
        path: PathBuf,
    },
    /// Someone else has it.
    #[error(
        "disk {} is in use {}; each must have a disk of its own, or all of them ,readonly",
        path.display(),
        if *read_only { "by a machine that writes to it" } else { "by another machine, or twice" }
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Whether it was only to be read.
        read_only: bool,
    },
    /// Its size is none of a disk.
    #[error(
        "disk {} has {bytes} bytes; a disk has at least one sector and whole sectors of 512 bytes \
         (truncate -s SIZE makes it so)",
        path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It looks like something else than a raw disk.
    #[error(
        "disk {} is a qcow2 image, which can't be used: make a raw one with qemu-img convert -O raw, or \
         add ,format=raw if it is the guest that has made it look so",
        path.display()
    )]
    Qcow2 {
        /// The file.
        path: PathBuf,
    },
    /// It can't be locked, read or measured.
    #[error("disk {}: {what}: {errno}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        errno: Errno,
    },
    /// io_uring was asked for, and the kernel refuses it.
    #[error(
        "disk {}: io=uring: {errno}; leave it out, or see the sysctl kernel.io_uring_disabled",
        path.display()
    )]
    NoRing {
        /// The file.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
}

impl DiskError {
    /// Whether what was asked for can't be, whatever the state of the host.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::NoRing { .. })
    }
}

fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT => "; make one with truncate -s SIZE FILE",
        Errno::EBUSY => "; the host has it mounted, or another program has it",
        _ => "",
    }
}

/// The file of a disk, opened and locked.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: File,
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
}

impl Disk {
    pub(super) fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let path = &config.path;
        let opened = |error: &io::Error| match (Errno::from(error), config.read_only) {
            (errno @ (Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ETXTBSY), false) => {
                DiskError::NotWritable { path: path.clone(), errno }
            }
            (errno, _) => DiskError::Open { path: path.clone(), errno },
        };
        let host = |what| {
            move |error: io::Error| {
                let errno = Errno::from(&error);
                DiskError::Host { path: path.clone(), what, errno }
            }
        };
        // Before opening, which can have effects of its own for what is no file.
        let kind = std::fs::metadata(path).map_err(|error| opened(&error))?.file_type();
        check_kind(path, kind, config.device)?;
        let mut options = OpenOptions::new();
        options.read(true).write(!config.read_only);
        if kind.is_block_device() && !config.read_only {
            // Of a block device: not if the host uses it.
            options.custom_flags(libc::O_EXCL);
        }
        let mut file = options.open(path).map_err(|error| opened(&error))?;
        let kind = file.metadata().map_err(host("stat"))?.file_type();
        check_kind(path, kind, config.device)?;
        lock(&file, config)?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(host("finding its size"))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { path: path.clone(), bytes });
        }
        let mut magic = [0; 4];
        file.rewind().map_err(host("reading its start"))?;
        file.read_exact(&mut magic).map_err(host("reading its start"))?;
        if &magic == b"QFI\xfb" && !config.raw {
            return Err(DiskError::Qcow2 { path: path.clone() });
        }
        Ok(Self { file, sectors: bytes / SECTOR })
    }
}

fn check_kind(path: &Path, kind: FileType, device: bool) -> Result<(), DiskError> {
    let what = if kind.is_file() || kind.is_block_device() && device {
        return Ok(());
    } else if kind.is_block_device() {
        return Err(DiskError::Device { path: path.to_owned() });
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a pipe"
    } else {
        "a socket"
    };
    Err(DiskError::NoDisk { path: path.to_owned(), what })
}

fn lock(file: &File, config: &DiskConfig) -> Result<(), DiskError> {
    let (path, read_only) = (config.path.clone(), config.read_only);
    let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(DiskError::Locked { path, read_only }),
        // A file system without locks protects nobody; a reader does no harm.
        Err(TryLockError::Error(_)) if read_only => Ok(()),
        Err(TryLockError::Error(error)) => {
            Err(DiskError::Host { path, what: "locking it", errno: Errno::from(&error) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn open(path: impl Into<PathBuf>, read_only: bool) -> Result<Disk, DiskError> {
        Disk::open(&DiskConfig { read_only, ..DiskConfig::new(path) })
    }

    #[test]
    fn what_is_no_file_is_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let error = open(path, false).unwrap_err();
        assert!(error.to_string().ends_with("is a directory, which can't be a disk"), "{error}");
        assert!(matches!(open("/dev/null", true), Err(DiskError::NoDisk { .. })));
        let pipe = path.join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let error = open(pipe, true).unwrap_err();
        assert!(matches!(error, DiskError::NoDisk { what: "a pipe", .. }), "and does not wait");
        let socket = path.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(matches!(open(socket, true), Err(DiskError::NoDisk { what: "a socket", .. })));
        let error = open(path.join("none"), false).unwrap_err().to_string();
        assert!(error.contains("ENOENT") && error.contains("truncate"), "{error}");
    }

    #[test]
    fn a_block_device_has_to_be_meant() {
        let devices = std::fs::read_dir("/dev").unwrap().filter_map(|entry| entry.ok());
        let mut blocks = devices.filter(|e| e.file_type().is_ok_and(|kind| kind.is_block_device()));
        let Some(block) = blocks.next() else {
            eprintln!("SKIPPED: this host has no block device in /dev");
            return;
        };
        let error = open(block.path(), true).unwrap_err();
        assert!(matches!(error, DiskError::Device { .. }), "{error}");
    }

    #[test]
    fn a_file_that_can_only_be_read_is_no_disk_to_write() {
        // A program that runs can't be written to, by root neither.
        let running = std::env::current_exe().unwrap();
        let error = open(&running, false).unwrap_err();
        assert!(matches!(error, DiskError::NotWritable { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("ETXTBSY") && text.contains(",readonly"), "{text}");
    }

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let file = file(&[0; 1024]);
        let writer = open(file.path(), false).unwrap();
        assert_eq!(writer.sectors, 2);
        for read_only in [false, true] {
            let error = open(file.path(), read_only).unwrap_err();
            assert!(matches!(error, DiskError::Locked { .. }), "{error}");
        }
        drop(writer);
        let readers = [open(file.path(), true).unwrap(), open(file.path(), true).unwrap()];
        assert!(matches!(open(file.path(), false), Err(DiskError::Locked { .. })));
        drop(readers);
        open(file.path(), false).unwrap();
    }

    #[test]
    fn a_disk_has_whole_sectors() {
        for bytes in [0, 1, 511, 513] {
            let file = file(&vec![0; bytes]);
            let error = open(file.path(), true).unwrap_err();
            assert!(matches!(error, DiskError::Size { .. }), "{error}");
        }
    }

    #[test]
    fn a_qcow2_image_is_not_taken_for_a_raw_one() {
        let mut image = vec![0; 512];
        image[..4].copy_from_slice(b"QFI\xfb");
        let file = file(&image);
        let error = open(file.path(), true).unwrap_err();
        assert!(matches!(error, DiskError::Qcow2 { .. }), "{error}");
        let config = DiskConfig { raw: true, ..DiskConfig::new(file.path()) };
        assert_eq!(Disk::open(&config).unwrap().sectors, 1);
    }
}
