//! The system descriptor: [`Hypervisor`] over `/dev/kvm`.

use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use hv_core::{Call, Capability, Context, Error, Hypervisor, Ioctl, MsrIndexList};
use kvm_bindings::kvm_cpuid_entry2;

use crate::{KvmVm, OpenError, kick, open, raw};

/// KVM, by its system descriptor.
///
/// Opening it says whether it can be used by this user at all; what this host's KVM can do is asked
/// by [`hv_core`]'s init.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Where the device node is, unless the machine says otherwise.
    pub const DEVICE: &str = "/dev/kvm";

    /// Opens a device node (`O_RDWR | O_CLOEXEC`).
    ///
    /// # Errors
    /// [`OpenError::Open`], or [`OpenError::NotKvm`] for a node of something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Ok(Self { fd: open::path(path.as_ref())? })
    }

    /// Takes over a descriptor that is open. It is closed if it is not KVM's.
    ///
    /// # Errors
    /// [`OpenError::NotKvm`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        Ok(Self { fd: open::owned(fd)? })
    }

    /// Uses a descriptor this process was started with, by its number, as it comes from a command
    /// line. It is duplicated with close-on-exec (`F_DUPFD_CLOEXEC`): the number stays open and
    /// whose it was, and a wrong one does no harm.
    ///
    /// # Errors
    /// [`OpenError::Inherit`] if the number is no open descriptor, [`OpenError::NotKvm`].
    pub fn from_inherited(fd: RawFd) -> Result<Self, OpenError> {
        Ok(Self { fd: open::inherited(fd)? })
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn api_version(&self) -> Result<i32, Error> {
        raw::checked(self.fd.get_api_version())
            .map_err(|errno| Error::new(Ioctl::GetApiVersion, errno))
    }

    fn check_extension(&self, cap: Capability) -> Result<i32, Error> {
        raw::checked(self.fd.check_extension_raw(cap.number().into())).map_err(|errno| {
            Error::new(Ioctl::CheckExtension, errno).about(Context::Capability(cap))
        })
    }

    fn vcpu_mmap_size(&self) -> Result<usize, Error> {
        self.fd
            .get_vcpu_mmap_size()
            .map_err(|error| Error::new(Ioctl::GetVcpuMmapSize, raw::errno(error)))
    }

    fn msr_index_list(&self, room: usize) -> Result<MsrIndexList, Error> {
        raw::msr_index_list(&self.fd, room)
            .map_err(|errno| Error::new(Ioctl::GetMsrIndexList, errno))
    }

    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        raw::supported_cpuid(&self.fd).map_err(|errno| Error::new(Ioctl::GetSupportedCpuid, errno))
    }

    fn create_vm(&self, vm_type: u64) -> Result<KvmVm, Error> {
        // kvm-ioctls also asks for the size of the vCPU mapping, which is a constant of the kernel
        // and does not fail: an error is one of KVM_CREATE_VM.
        let fd = self
            .fd
            .create_vm_with_type(vm_type)
            .map_err(|error| Error::new(Ioctl::CreateVm, raw::errno(error)))?;
        Ok(KvmVm::new(fd))
    }

    fn eventfd(&self) -> Result<OwnedFd, Error> {
        raw::eventfd().map_err(|errno| Error::new(Call::Eventfd, errno))
    }

    fn install_kick(&self) -> Result<(), Error> {
        kick::install()
    }
}
