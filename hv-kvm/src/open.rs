//! Getting hold of the system descriptor: from a path or from a descriptor the process was given.
//!
//! Whatever it comes from, it has answered `KVM_GET_API_VERSION` before anything else is sent to
//! it. Which version it answered is judged by [`hv_core`]'s init, not here.

use std::fmt;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hv_core::Errno;

use crate::raw;

/// Where a system descriptor comes from, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// A device node.
    Path(PathBuf),
    /// A descriptor of this process.
    Descriptor(RawFd),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Path(path) => path.display().fmt(f),
            Device::Descriptor(fd) => write!(f, "file descriptor {fd}"),
        }
    }
}

/// Why there is no system descriptor.
///
/// ```
/// use hv_core::Errno;
/// use hv_kvm::{Kvm, OpenError};
/// let error = Kvm::open("/nowhere/kvm").unwrap_err();
/// assert!(matches!(error, OpenError::Open { errno: Errno::ENOENT, .. }));
/// assert!(error.to_string().starts_with("could not access /nowhere/kvm: ENOENT"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The node could not be opened (`open(2)`).
    #[error("could not access {}: {errno}{}", .path.display(), clause(.errno, open_remedy))]
    Open {
        /// The node.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// The number of an inherited descriptor could not be duplicated (`fcntl(2)`,
    /// `F_DUPFD_CLOEXEC`).
    #[error("could not duplicate file descriptor {fd}: {errno}{}", clause(.errno, inherit_remedy))]
    Inherit {
        /// The number.
        fd: RawFd,
        /// Why.
        errno: Errno,
    },
    /// It could be opened, but did not answer `KVM_GET_API_VERSION`.
    #[error(
        "{device} is not a KVM device: KVM_GET_API_VERSION failed: {errno}; the KVM device is /dev/kvm unless this machine says otherwise"
    )]
    NotKvm {
        /// What is not KVM's.
        device: Device,
        /// What it answered.
        errno: Errno,
    },
}

impl OpenError {
    /// The errno behind it.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Open { errno, .. } | Self::Inherit { errno, .. } | Self::NotKvm { errno, .. } => {
                *errno
            }
        }
    }
}

fn clause(errno: &Errno, remedy: fn(Errno) -> Option<&'static str>) -> String {
    remedy(*errno).map_or_else(String::new, |remedy| format!("; {remedy}"))
}

/// What to do about a node that can't be opened.
fn open_remedy(errno: Errno) -> Option<&'static str> {
    Some(match errno {
        Errno::ENOENT => {
            "load the module (modprobe kvm_intel, or kvm_amd); if it does not load, enable \
             virtualization (VT-x, AMD-V) in the firmware, or nested virtualization in the \
             hypervisor this machine runs on; in a container, pass the device in"
        }
        Errno::EACCES | Errno::EPERM => {
            "the user may not use it: add the user to the group that owns it (usually kvm: \
             usermod -aG kvm USER) and log in again, or in a container allow the device"
        }
        Errno::ENODEV | Errno::ENXIO => {
            "the node is there but no driver behind it: load kvm_intel or kvm_amd, and enable \
             virtualization in the firmware if that fails"
        }
        Errno::EBUSY => "another hypervisor holds the virtualization extensions: stop it",
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        Errno::ENFILE => "the host has its maximum of open files (sysctl fs.file-max)",
        Errno::EISDIR => "this is a directory: name the device node",
        Errno::EROFS => "the node must be opened for writing too",
        _ => return None,
    })
}

/// What to do about a number that can't be duplicated.
fn inherit_remedy(errno: Errno) -> Option<&'static str> {
    Some(match errno {
        Errno::EBADF => {
            "no such descriptor is open: the parent must open the device and pass it on without \
             close-on-exec"
        }
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        _ => return None,
    })
}

/// Opens `path` as KVM's device.
pub(crate) fn path(path: &Path) -> Result<kvm_ioctls::Kvm, OpenError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // Whatever the path turns out to be, opening it must neither wait nor give this process a
        // controlling terminal. std adds O_CLOEXEC.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| OpenError::Open { path: path.to_owned(), errno: Errno::from(&error) })?;
    checked(file.into(), || Device::Path(path.to_owned()))
}

/// Takes a descriptor as KVM's.
pub(crate) fn owned(fd: OwnedFd) -> Result<kvm_ioctls::Kvm, OpenError> {
    let number = fd.as_raw_fd();
    checked(fd, || Device::Descriptor(number))
}

/// Duplicates the descriptor with this number and takes that as KVM's.
pub(crate) fn inherited(fd: RawFd) -> Result<kvm_ioctls::Kvm, OpenError> {
    let duplicate = raw::duplicate(fd).map_err(|errno| OpenError::Inherit { fd, errno })?;
    checked(duplicate, || Device::Descriptor(fd))
}

fn checked(fd: OwnedFd, device: impl FnOnce() -> Device) -> Result<kvm_ioctls::Kvm, OpenError> {
    let kvm = raw::system(fd);
    match raw::checked(kvm.get_api_version()) {
        Ok(_) => Ok(kvm),
        Err(errno) => Err(OpenError::NotKvm { device: device(), errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kvm;
    use std::io::{PipeReader, Write, pipe};

    fn open(errno: Errno) -> String {
        OpenError::Open { path: "/dev/kvm".into(), errno }.to_string()
    }

    #[test]
    fn every_errno_that_happens_says_what_to_do() {
        for (errno, words) in [
            (Errno::ENOENT, "modprobe kvm_intel"),
            (Errno::EACCES, "usermod -aG kvm"),
            (Errno::EPERM, "usermod -aG kvm"),
            (Errno::ENODEV, "no driver"),
            (Errno::ENXIO, "no driver"),
            (Errno::EBUSY, "another hypervisor"),
            (Errno::EMFILE, "ulimit -n"),
            (Errno::ENFILE, "fs.file-max"),
            (Errno::EISDIR, "directory"),
        ] {
            let text = open(errno);
            let start = format!("could not access /dev/kvm: {}", errno.name().unwrap());
            assert!(text.starts_with(&start) && text.contains(words), "{text}");
        }
    }

    #[test]
    fn an_errno_without_a_remedy_ends_the_sentence() {
        assert_eq!(open(Errno::EIO), "could not access /dev/kvm: EIO (Input/output error)");
    }

    #[test]
    fn a_path_that_is_not_there() {
        let error = Kvm::open("/dev/no-such-kvm").unwrap_err();
        assert_eq!(
            error,
            OpenError::Open { path: "/dev/no-such-kvm".into(), errno: Errno::ENOENT }
        );
    }

    #[test]
    fn a_directory() {
        assert_eq!(Kvm::open("/").unwrap_err().errno(), Errno::EISDIR);
    }

    #[test]
    fn another_device() {
        let error = Kvm::open("/dev/null").unwrap_err();
        assert_eq!(
            error,
            OpenError::NotKvm { device: Device::Path("/dev/null".into()), errno: Errno::ENOTTY }
        );
        assert!(error.to_string().starts_with(
            "/dev/null is not a KVM device: KVM_GET_API_VERSION failed: ENOTTY (Inappropriate ioctl"
        ));
    }

    #[test]
    fn a_descriptor_that_is_something_else() {
        let (reader, _writer) = pipe().unwrap();
        let number = reader.as_raw_fd();
        let error = Kvm::from_fd(reader.into()).unwrap_err();
        assert_eq!(
            error,
            OpenError::NotKvm { device: Device::Descriptor(number), errno: Errno::ENOTTY }
        );
    }

    #[test]
    fn an_inherited_descriptor_stays_open_whatever_it_is() {
        let (reader, mut writer): (PipeReader, _) = pipe().unwrap();
        let number = reader.as_raw_fd();
        for _ in 0..3 {
            let error = Kvm::from_inherited(number).unwrap_err();
            assert!(error.to_string().starts_with(&format!("file descriptor {number} is not")));
        }
        writer.write_all(b"still open").unwrap();
        drop(writer);
        assert_eq!(std::io::read_to_string(reader).unwrap(), "still open");
    }

    #[test]
    fn numbers_that_are_no_descriptors() {
        for fd in [-1, i32::MIN, i32::MAX] {
            let error = Kvm::from_inherited(fd).unwrap_err();
            assert_eq!(error, OpenError::Inherit { fd, errno: Errno::EBADF });
            assert!(error.to_string().contains("close-on-exec"), "{error}");
        }
    }
}
