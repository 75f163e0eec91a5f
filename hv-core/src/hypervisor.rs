//! The system and VM traits: what creates VMs and vCPUs and says what the host can do.
//!
//! Every method is one ioctl, so that a layer over a hypervisor sees what KVM sees. What needs
//! several, in an order, is in [`crate::init`].

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip, kvm_pit_config, kvm_pit_state2};

use crate::{Capability, Error, EventFd, IoEventBackend, IrqBackend, MemoryBackend, Vcpu};

/// The answer to one `KVM_GET_MSR_INDEX_LIST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsrIndexList {
    /// How many indices there are.
    pub available: usize,
    /// The indices; empty if there was not room for all of them (`E2BIG`).
    pub indices: Vec<u32>,
}

/// A hypervisor: the system descriptor of KVM.
pub trait Hypervisor {
    /// Its VMs.
    type Vm: Vm;

    /// The API version (`KVM_GET_API_VERSION`): 12 on every kernel since 2.6.22.
    ///
    /// # Errors
    /// `ENOTTY` if the descriptor is not KVM's.
    fn api_version(&self) -> Result<i32, Error>;

    /// The value of a capability (`KVM_CHECK_EXTENSION` on the system descriptor); 0 is absence.
    ///
    /// # Errors
    /// Those of the ioctl.
    fn check_extension(&self, cap: Capability) -> Result<i32, Error>;

    /// Bytes of the mapping of a vCPU (`KVM_GET_VCPU_MMAP_SIZE`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn vcpu_mmap_size(&self) -> Result<usize, Error>;

    /// The model-specific registers that can be saved (`KVM_GET_MSR_INDEX_LIST`), if there are at
    /// most `room`; else how many there are.
    ///
    /// # Errors
    /// Those of the ioctl, except `E2BIG`.
    fn msr_index_list(&self, room: usize) -> Result<MsrIndexList, Error>;

    /// The CPUID leaves this host can give a guest (`KVM_GET_SUPPORTED_CPUID`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error>;

    /// Creates a VM of a type (`KVM_CREATE_VM`); type 0 is the normal one. It is destroyed when the
    /// last handle to it or its vCPUs is dropped.
    ///
    /// # Errors
    /// `EINTR` (try again), `ENOMEM`, `EBUSY`, `EINVAL` for an unknown type.
    fn create_vm(&self, vm_type: u64) -> Result<Self::Vm, Error>;

    /// An eventfd of the host (`eventfd(2)`), close-on-exec and non-blocking. Here because a
    /// hypervisor in memory has its own.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    fn eventfd(&self) -> Result<EventFd, Error>;

    /// Prepares the process so that [`crate::VcpuKick::kick`] works: for KVM, a handler for the
    /// signal that interrupts `KVM_RUN` (`sigaction(2)`). Doing it again is no error.
    ///
    /// # Errors
    /// `EBUSY` if the signal already has another handler.
    fn install_kick(&self) -> Result<(), Error>;
}

/// A VM: what is left once interrupts, memory and I/O events have their own traits.
pub trait Vm: IrqBackend + MemoryBackend + IoEventBackend {
    /// Its vCPUs.
    type Vcpu: Vcpu;

    /// The value of a capability for this VM (`KVM_CHECK_EXTENSION` on the VM descriptor, needs
    /// `KVM_CAP_CHECK_EXTENSION_VM`); 0 is absence.
    ///
    /// # Errors
    /// `ENOTTY` on kernels before 3.17.
    fn check_extension(&self, cap: Capability) -> Result<i32, Error>;

    /// Enables a capability of this VM (`KVM_ENABLE_CAP`), such as the split irqchip with its number
    /// of pins in `args[0]`.
    ///
    /// # Errors
    /// `EINVAL` for one that can't be enabled or bad arguments, `EEXIST` for a second irqchip.
    fn enable_cap(&self, cap: Capability, args: [u64; 4]) -> Result<(), Error>;

    /// Where the identity-mapped page goes (`KVM_SET_IDENTITY_MAP_ADDR`).
    ///
    /// # Errors
    /// `EINVAL` once a vCPU exists.
    fn set_identity_map_addr(&self, address: u64) -> Result<(), Error>;

    /// Where the three pages of the task state segment go (`KVM_SET_TSS_ADDR`).
    ///
    /// # Errors
    /// `EINVAL` unless all of it is below 4 GiB.
    fn set_tss_addr(&self, address: u64) -> Result<(), Error>;

    /// Limits the pages of the shadow MMU (`KVM_SET_NR_MMU_PAGES`).
    ///
    /// # Errors
    /// `EINVAL` below 64 (`KVM_MIN_ALLOC_MMU_PAGES`).
    fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Error>;

    /// Creates the two PICs, the I/O APIC and the local APICs in the kernel
    /// (`KVM_CREATE_IRQCHIP`).
    ///
    /// # Errors
    /// `EEXIST` if there is one, `EINVAL` once a vCPU exists.
    fn create_irqchip(&self) -> Result<(), Error>;

    /// The state of an in-kernel interrupt controller (`KVM_GET_IRQCHIP`); `chip_id` says which.
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel irqchip.
    fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, Error>;

    /// Sets that state (`KVM_SET_IRQCHIP`).
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel irqchip.
    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Error>;

    /// Creates the timer in the kernel (`KVM_CREATE_PIT2`).
    ///
    /// # Errors
    /// `ENOENT` without a full in-kernel irqchip, `EEXIST` if there is one.
    fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error>;

    /// The state of the timer (`KVM_GET_PIT2`).
    ///
    /// # Errors
    /// `ENXIO` without one.
    fn pit2(&self) -> Result<kvm_pit_state2, Error>;

    /// Sets that state (`KVM_SET_PIT2`).
    ///
    /// # Errors
    /// `ENXIO` without one.
    fn set_pit2(&self, state: &kvm_pit_state2) -> Result<(), Error>;

    /// The guest's clock (`KVM_GET_CLOCK`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn clock(&self) -> Result<kvm_clock_data, Error>;

    /// Sets it (`KVM_SET_CLOCK`).
    ///
    /// # Errors
    /// `EINVAL` for unknown flags.
    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Error>;

    /// Creates a vCPU (`KVM_CREATE_VCPU`, then its mapping); the id is its APIC id.
    ///
    /// # Errors
    /// `EEXIST` for an id in use, `EINVAL` for one beyond the limits.
    fn create_vcpu(&self, id: u32) -> Result<Self::Vcpu, Error>;
}
