//! Which KVM to use, and why it could not be opened.
//!
//! Plain data: the crate that has the system calls opens the device, this module only names it
//! and says what a failure means.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use crate::Errno;

/// Which KVM to use: a device node, or a descriptor this process inherited.
///
/// As text it is a path or `fd:N`; a file of that very name is `./fd:N`.
///
/// ```
/// use hv_core::DeviceChoice;
/// assert_eq!("fd:3".parse(), Ok(DeviceChoice::Fd(3)));
/// assert_eq!("/dev/kvm".parse(), Ok(DeviceChoice::default()));
/// assert_eq!("./fd:3".parse(), Ok(DeviceChoice::Path("./fd:3".into())));
/// assert!("fd:three".parse::<DeviceChoice>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceChoice {
    /// A device node.
    Path(PathBuf),
    /// A descriptor of the KVM device, open in this process.
    Fd(RawFd),
}

impl Default for DeviceChoice {
    /// `/dev/kvm`.
    fn default() -> Self {
        DeviceChoice::Path(PathBuf::from("/dev/kvm"))
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Path(path) => path.display().fmt(f),
            DeviceChoice::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseDeviceError {
    /// The text is empty.
    #[error("the KVM device is empty: name a node such as /dev/kvm, or fd:N")]
    Empty,
    /// What follows `fd:` is no descriptor number.
    #[error("\"fd:{0}\" names no descriptor: write fd:N with N from 0 to {max}", max = RawFd::MAX)]
    BadFd(String),
}

impl FromStr for DeviceChoice {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        if text.is_empty() {
            return Err(ParseDeviceError::Empty);
        }
        let Some(number) = text.strip_prefix("fd:") else {
            return Ok(DeviceChoice::Path(PathBuf::from(text)));
        };
        // `parse` would also take a sign.
        let digits = number.bytes().all(|b| b.is_ascii_digit());
        match number.parse() {
            Ok(fd) if digits => Ok(DeviceChoice::Fd(fd)),
            _ => Err(ParseDeviceError::BadFd(number.to_owned())),
        }
    }
}

/// Why a device can't be opened, by what there is to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The node is not there (`ENOENT`, `ENOTDIR`).
    Missing,
    /// This process may not open it for reading and writing (`EACCES`, `EPERM`).
    NoPermission,
    /// The node is there, its driver is not (`ENODEV`, `ENXIO`).
    NoDriver,
    /// Something else holds the virtualization extensions (`EBUSY`).
    Busy,
    /// The process (`EMFILE`) or the host (`ENFILE`) has no descriptor left.
    TooManyFiles,
    /// What is there is not KVM (`ENOTTY`, `EISDIR`).
    NotKvm,
    /// The descriptor is not open (`EBADF`).
    BadDescriptor,
    /// Any other errno.
    Other,
}

/// A device that could not be opened: which, and with what errno.
///
/// ```
/// use hv_core::{DeviceChoice, Errno, OpenError, OpenErrorKind};
/// let error = OpenError { choice: DeviceChoice::default(), errno: Errno::EACCES };
/// assert_eq!(error.kind(), OpenErrorKind::NoPermission);
/// assert!(error.to_string().starts_with("can't open /dev/kvm: EACCES (Permission denied); "));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub struct OpenError {
    /// The device that was asked for.
    pub choice: DeviceChoice,
    /// The errno of opening it, or of the first ioctl if that showed it is not KVM (`ENOTTY`).
    pub errno: Errno,
}

impl OpenError {
    /// The errno by what there is to do about it.
    #[must_use]
    pub const fn kind(&self) -> OpenErrorKind {
        match self.errno {
            Errno::ENOENT | Errno::ENOTDIR => OpenErrorKind::Missing,
            Errno::EACCES | Errno::EPERM => OpenErrorKind::NoPermission,
            Errno::ENODEV | Errno::ENXIO => OpenErrorKind::NoDriver,
            Errno::EBUSY => OpenErrorKind::Busy,
            Errno::EMFILE | Errno::ENFILE => OpenErrorKind::TooManyFiles,
            Errno::ENOTTY | Errno::EISDIR => OpenErrorKind::NotKvm,
            Errno::EBADF => OpenErrorKind::BadDescriptor,
            _ => OpenErrorKind::Other,
        }
    }

    /// What to do, where that is known: a clause without a full stop.
    #[must_use]
    pub const fn remedy(&self) -> Option<&'static str> {
        Some(match self.kind() {
            OpenErrorKind::Missing => {
                "there is no such node: load the module (modprobe kvm_intel or kvm_amd) and enable virtualization in the firmware if it does not load, or in a container pass the device in"
            }
            OpenErrorKind::NoPermission => {
                "join the group that owns the node (usually kvm), or in a container allow the device for reading and writing"
            }
            OpenErrorKind::NoDriver => {
                "the node is there but no driver serves it: enable virtualization in the firmware and load kvm_intel or kvm_amd"
            }
            OpenErrorKind::Busy => {
                "another hypervisor holds the virtualization extensions: stop it"
            }
            OpenErrorKind::TooManyFiles => match self.errno {
                Errno::ENFILE => "the host has its maximum of open files (sysctl fs.file-max)",
                _ => "raise the limit of open files (ulimit -n)",
            },
            OpenErrorKind::NotKvm => "this is not KVM: name its node, normally /dev/kvm",
            OpenErrorKind::BadDescriptor => {
                "the descriptor is not open in this process: open it there (in a shell: 3<>/dev/kvm)"
            }
            OpenErrorKind::Other => return None,
        })
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.choice {
            DeviceChoice::Path(_) => "open",
            DeviceChoice::Fd(_) => "use",
        };
        write!(f, "can't {verb} {}: {}", self.choice, self.errno)?;
        match self.remedy() {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_or_a_descriptor_by_its_text() {
        for (text, choice) in [
            ("/dev/kvm", DeviceChoice::Path("/dev/kvm".into())),
            ("kvm", DeviceChoice::Path("kvm".into())),
            ("FD:3", DeviceChoice::Path("FD:3".into())),
            ("fd:0", DeviceChoice::Fd(0)),
            ("fd:2147483647", DeviceChoice::Fd(i32::MAX)),
        ] {
            assert_eq!(text.parse(), Ok(choice.clone()), "{text}");
            assert_eq!(choice.to_string(), text);
        }
    }

    #[test]
    fn a_bad_text_is_named_in_the_error() {
        for bad in ["", "-1", "+1", "2147483648", "three", "3 ", "٣"] {
            let error = format!("fd:{bad}").parse::<DeviceChoice>().unwrap_err();
            assert_eq!(error, ParseDeviceError::BadFd(bad.into()));
            assert!(error.to_string().contains(&format!("\"fd:{bad}\"")), "{error}");
        }
        assert_eq!("".parse::<DeviceChoice>(), Err(ParseDeviceError::Empty));
    }

    #[test]
    fn every_errno_of_opening_says_what_to_do() {
        use OpenErrorKind as K;
        for (errno, kind, says) in [
            (Errno::ENOENT, K::Missing, "modprobe"),
            (Errno::ENOTDIR, K::Missing, "modprobe"),
            (Errno::EACCES, K::NoPermission, "group"),
            (Errno::EPERM, K::NoPermission, "container"),
            (Errno::ENODEV, K::NoDriver, "firmware"),
            (Errno::ENXIO, K::NoDriver, "firmware"),
            (Errno::EBUSY, K::Busy, "another hypervisor"),
            (Errno::EMFILE, K::TooManyFiles, "ulimit -n"),
            (Errno::ENFILE, K::TooManyFiles, "fs.file-max"),
            (Errno::ENOTTY, K::NotKvm, "/dev/kvm"),
            (Errno::EISDIR, K::NotKvm, "/dev/kvm"),
            (Errno::EBADF, K::BadDescriptor, "not open"),
        ] {
            let error = OpenError { choice: DeviceChoice::Path("/x/kvm".into()), errno };
            let text = error.to_string();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(text.starts_with(&format!("can't open /x/kvm: {errno}; ")), "{text}");
            assert!(text.contains(says), "{text}");
        }
        let error = OpenError { choice: DeviceChoice::Fd(9), errno: Errno::ENOMEM };
        assert_eq!(error.kind(), K::Other);
        assert_eq!(error.to_string(), "can't use fd:9: ENOMEM (Cannot allocate memory)");
    }
}
