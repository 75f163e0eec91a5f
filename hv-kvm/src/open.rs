//! Getting hold of the system descriptor: from a path or from a descriptor the process was given.
//!
//! Whatever it comes from, it has answered `KVM_GET_API_VERSION` before anything else is sent to
//! it. Which version it answered is judged by [`hv_core::init`], not here.

use std::fs::OpenOptions;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hv_core::Errno;

use crate::raw;

/// Opens `path` as KVM's device.
pub(crate) fn path(path: &Path) -> Result<kvm_ioctls::Kvm, Errno> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // Whatever the path turns out to be, opening it must neither wait nor give this process a
        // controlling terminal. std adds O_CLOEXEC.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| errno_of(&error))?;
    owned(file.into())
}

/// Takes a descriptor as KVM's.
pub(crate) fn owned(fd: OwnedFd) -> Result<kvm_ioctls::Kvm, Errno> {
    let kvm = raw::system(fd);
    raw::checked(kvm.get_api_version())?;
    Ok(kvm)
}

/// Duplicates the descriptor with this number and takes that as KVM's.
pub(crate) fn inherited(fd: RawFd) -> Result<kvm_ioctls::Kvm, Errno> {
    owned(raw::duplicate(fd)?)
}

/// The errno of opening a file. One error is std's own and has none: a path with a NUL in it.
fn errno_of(error: &std::io::Error) -> Errno {
    match error.raw_os_error() {
        Some(errno) => Errno(errno),
        None => Errno::EINVAL,
    }
}

#[cfg(test)]
mod tests {
    use crate::Kvm;
    use hv_core::{DeviceChoice, Errno, OpenError, OpenErrorKind};
    use std::io::{Write, pipe};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_path_that_is_not_there() {
        let error = Kvm::open("/dev/no-such-kvm").unwrap_err();
        let choice = DeviceChoice::Path("/dev/no-such-kvm".into());
        assert_eq!(error, OpenError { choice, errno: Errno::ENOENT });
        assert_eq!(Kvm::open("/dev/kvm\0").unwrap_err().errno, Errno::EINVAL);
        assert_eq!(Kvm::open("").unwrap_err().errno, Errno::ENOENT);
    }

    #[test]
    fn a_directory_and_another_device() {
        assert_eq!(Kvm::open("/").unwrap_err().errno, Errno::EISDIR);
        let error = Kvm::open("/dev/null").unwrap_err();
        assert_eq!((error.errno, error.kind()), (Errno::ENOTTY, OpenErrorKind::NotKvm));
        assert!(error.to_string().starts_with("can't open /dev/null: ENOTTY"), "{error}");
    }

    #[test]
    fn a_descriptor_that_is_something_else() {
        let (reader, _writer) = pipe().unwrap();
        let choice = DeviceChoice::Fd(reader.as_raw_fd());
        let error = Kvm::from_fd(reader.into()).unwrap_err();
        assert_eq!(error, OpenError { choice, errno: Errno::ENOTTY });
    }

    #[test]
    fn an_inherited_descriptor_stays_open_whatever_it_is() {
        let (reader, mut writer) = pipe().unwrap();
        let choice = DeviceChoice::Fd(reader.as_raw_fd());
        for _ in 0..3 {
            let error = Kvm::open_device(&choice).unwrap_err();
            assert_eq!(error, OpenError { choice: choice.clone(), errno: Errno::ENOTTY });
        }
        writer.write_all(b"still open").unwrap();
        drop(writer);
        assert_eq!(std::io::read_to_string(reader).unwrap(), "still open");
    }

    #[test]
    fn numbers_that_are_no_descriptors() {
        for fd in [-1, i32::MIN, i32::MAX] {
            let error = Kvm::from_inherited(fd).unwrap_err();
            let choice = DeviceChoice::Fd(fd);
            assert_eq!(error, OpenError { choice, errno: Errno::EBADF });
            assert_eq!(error.kind(), OpenErrorKind::BadDescriptor);
        }
    }
}
