//! The system descriptor: [`Hypervisor`] over `/dev/kvm`.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use hv_core::{
    Call, Capability, Context, DeviceChoice, Error, EventFd, Hypervisor, Ioctl, MsrIndexList,
    OpenError,
};
use kvm_bindings::kvm_cpuid_entry2;

use crate::{KvmVm, kick, open, raw};

/// KVM, by its system descriptor.
///
/// Opening it says whether it can be used by this user at all; what this host's KVM can do is asked
/// by [`hv_core`]'s init.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens the device a user chose. Fits [`hv_core::init`]: `init(Kvm::open_device, &config)`.
    ///
    /// # Errors
    /// Those of [`Kvm::open`] and [`Kvm::from_inherited`].
    pub fn open_device(choice: &DeviceChoice) -> Result<Self, OpenError> {
        match choice {
            DeviceChoice::Path(path) => Self::open(path),
            DeviceChoice::Fd(fd) => Self::from_inherited(*fd),
        }
    }

    /// Opens a device node, normally `/dev/kvm` (`O_RDWR | O_CLOEXEC`).
    ///
    /// # Errors
    /// An [`OpenError`] with the errno of `open(2)`, or of `KVM_GET_API_VERSION` if what is there
    /// is not KVM.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        match open::path(path) {
            Ok(fd) => Ok(Self { fd }),
            Err(errno) => Err(OpenError { choice: DeviceChoice::Path(path.to_owned()), errno }),
        }
    }

    /// Takes over a descriptor of the device. It is closed if it is not KVM's.
    ///
    /// # Errors
    /// An [`OpenError`] with the errno of `KVM_GET_API_VERSION` if it is not KVM's.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenError> {
        let choice = DeviceChoice::Fd(fd.as_raw_fd());
        match open::owned(fd) {
            Ok(fd) => Ok(Self { fd }),
            Err(errno) => Err(OpenError { choice, errno }),
        }
    }

    /// Uses a descriptor this process was started with, by its number, as it comes from a command
    /// line. It is duplicated with close-on-exec (`F_DUPFD_CLOEXEC`): the number stays open and
    /// whose it was, and a wrong one does no harm.
    ///
    /// # Errors
    /// An [`OpenError`] with `EBADF` if the number is no open descriptor, `EMFILE`, or the errno of
    /// `KVM_GET_API_VERSION` if it is not KVM's.
    pub fn from_inherited(fd: RawFd) -> Result<Self, OpenError> {
        match open::inherited(fd) {
            Ok(kvm) => Ok(Self { fd: kvm }),
            Err(errno) => Err(OpenError { choice: DeviceChoice::Fd(fd), errno }),
        }
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

    fn eventfd(&self) -> Result<EventFd, Error> {
        raw::eventfd().map(EventFd::from).map_err(|errno| Error::new(Call::Eventfd, errno))
    }

    fn install_kick(&self) -> Result<(), Error> {
        kick::install()
    }
}
