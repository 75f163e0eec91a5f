//! The VM descriptor, and what must live as long as the VM does in the kernel.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, OnceLock};

use hv_core::{Call, Capability, Context, Error, Ioctl, Vm};
use kvm_bindings::{kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2};
use kvm_ioctls::VmFd;

use crate::coalesced::Coalesced;
use crate::memory::Slots;
use crate::{KvmVcpu, raw, run_page};

/// A VM.
///
/// It ends when this and all its [`KvmVcpu`]s are dropped, in any order. Only then is the memory of
/// its slots let go.
#[derive(Debug)]
pub struct KvmVm {
    pub(crate) inner: Arc<VmInner>,
}

/// What the VM and its vCPUs share. A vCPU descriptor keeps the VM alive in the kernel, and with it
/// the kernel's use of the memory behind the slots, so every vCPU holds this.
#[derive(Debug)]
pub(crate) struct VmInner {
    /// Before the slots: fields are dropped in this order, and the last descriptor must be closed
    /// before the memory may go.
    pub(crate) fd: VmFd,
    pub(crate) slots: Mutex<Slots>,
    /// Bytes of the dirty ring of each vCPU, once rings are enabled.
    pub(crate) dirty_ring: OnceLock<u32>,
    pub(crate) coalesced: Coalesced,
}

impl KvmVm {
    pub(crate) fn new(fd: VmFd) -> Self {
        Self {
            inner: Arc::new(VmInner {
                fd,
                slots: Mutex::default(),
                dirty_ring: OnceLock::new(),
                coalesced: Coalesced::default(),
            }),
        }
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.inner.fd
    }
}

impl AsFd for KvmVm {
    /// The VM descriptor, for ioctls the traits don't have. The memory of the slots is not kept by
    /// duplicates of it: no vCPU made through one may outlive this and its [`KvmVcpu`]s.
    fn as_fd(&self) -> BorrowedFd<'_> {
        raw::borrowed(self.fd())
    }
}

/// Makes the error of an ioctl from kvm-ioctls' error.
fn failed(ioctl: Ioctl) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::new(ioctl, raw::errno(error))
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn check_extension(&self, cap: Capability) -> Result<i32, Error> {
        raw::checked(self.fd().check_extension_raw(cap.number().into())).map_err(|errno| {
            Error::new(Ioctl::CheckExtension, errno).about(Context::Capability(cap))
        })
    }

    fn enable_cap(&self, cap: Capability, args: [u64; 4]) -> Result<(), Error> {
        let argument = kvm_enable_cap { cap: cap.number(), args, ..Default::default() };
        self.fd()
            .enable_cap(&argument)
            .map_err(failed(Ioctl::EnableCap))
            .map_err(|error| error.about(Context::Capability(cap)))?;
        if matches!(cap, Capability::DirtyLogRing | Capability::DirtyLogRingAcqRel) {
            // KVM has looked at 32 bits of it, and takes a size only once.
            let [bytes, ..] = args;
            self.inner.dirty_ring.get_or_init(|| bytes as u32);
        }
        Ok(())
    }

    fn set_identity_map_addr(&self, address: u64) -> Result<(), Error> {
        self.fd()
            .set_identity_map_address(address)
            .map_err(failed(Ioctl::SetIdentityMapAddr))
            .map_err(|error| error.about(Context::Address(address)))
    }

    fn set_tss_addr(&self, address: u64) -> Result<(), Error> {
        // Lossless: this crate is for 64-bit hosts, see the check in lib.rs.
        self.fd()
            .set_tss_address(address as usize)
            .map_err(failed(Ioctl::SetTssAddr))
            .map_err(|error| error.about(Context::Address(address)))
    }

    fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Error> {
        raw::set_nr_mmu_pages(self.fd(), pages)
            .map_err(|errno| Error::new(Ioctl::SetNrMmuPages, errno))
    }

    fn create_irqchip(&self) -> Result<(), Error> {
        self.fd().create_irq_chip().map_err(failed(Ioctl::CreateIrqchip))
    }

    fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, Error> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.fd().get_irqchip(&mut chip).map_err(failed(Ioctl::GetIrqchip))?;
        Ok(chip)
    }

    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Error> {
        self.fd().set_irqchip(chip).map_err(failed(Ioctl::SetIrqchip))
    }

    fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error> {
        self.fd().create_pit2(config).map_err(failed(Ioctl::CreatePit2))
    }

    fn pit2(&self) -> Result<kvm_pit_state2, Error> {
        self.fd().get_pit2().map_err(failed(Ioctl::GetPit2))
    }

    fn set_pit2(&self, state: &kvm_pit_state2) -> Result<(), Error> {
        self.fd().set_pit2(state).map_err(failed(Ioctl::SetPit2))
    }

    fn clock(&self) -> Result<kvm_clock_data, Error> {
        self.fd().get_clock().map_err(failed(Ioctl::GetClock))
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Error> {
        self.fd().set_clock(clock).map_err(failed(Ioctl::SetClock))
    }

    fn create_vcpu(&self, id: u32) -> Result<KvmVcpu, Error> {
        let about = Context::Vcpu(id);
        let map_failed = |errno| Error::new(Call::Mmap, errno).about(about);
        let fd = raw::create_vcpu(self.fd(), id)
            .map_err(|errno| Error::new(Ioctl::CreateVcpu, errno).about(about))?;
        let (page, exit) = run_page::map(&fd, self.fd().run_size()).map_err(map_failed)?;
        let fd = raw::vcpu(self.fd(), fd).map_err(map_failed)?;
        Ok(KvmVcpu::new(id, fd, page, exit, self.inner.clone()))
    }
}
