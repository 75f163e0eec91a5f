//! Opening the KVM that the command line names.

use hv_core::{DeviceChoice, OpenError};
use hv_kvm::Kvm;

/// Opens `choice`, a node or an inherited descriptor.
///
/// # Errors
/// An [`OpenError`] with the errno of opening it, or of its first ioctl.
pub(crate) fn open(choice: &DeviceChoice) -> Result<Kvm, OpenError> {
    Kvm::open_device(choice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::{Errno, OpenErrorKind};

    fn error(choice: &str) -> OpenError {
        open(&choice.parse().unwrap()).unwrap_err()
    }

    #[test]
    fn what_is_no_kvm_is_refused_by_its_errno() {
        assert_eq!(error("/no/such/node").errno, Errno::ENOENT);
        assert_eq!(error("/dev/null").kind(), OpenErrorKind::NotKvm);
        assert_eq!(error("fd:2147483647").kind(), OpenErrorKind::BadDescriptor);
        assert_eq!(error("/no/such/node").choice.to_string(), "/no/such/node");
    }
}
