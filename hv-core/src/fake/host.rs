//! What a host's KVM is like: every value a VMM can ask for or run into, settable.
//!
//! The defaults are those measured on Linux 6.18 on x86-64.

use std::collections::BTreeMap;

use kvm_bindings::kvm_cpuid_entry2;

use super::guest::GuestStep;
use crate::Capability;

/// A made-up host.
///
/// A capability with value 0 is absent, and with it the ioctls and flags it stands for: they fail as
/// on a kernel that never heard of them (`ENOTTY` for an ioctl, `EINVAL` for a flag).
///
/// ```
/// use hv_core::fake::{FakeHost, FakeKvm};
/// use hv_core::{Capability, Errno, Hypervisor, IrqBackend, Msi, Vm};
/// let host = FakeHost::default()
///     .with(Capability::IrqRouting, 1024)
///     .without(Capability::SignalMsi)
///     .with_system(Capability::X2apicApi, 0);
/// let vm = FakeKvm::new(host).create_vm(0)?;
/// assert_eq!(vm.check_extension(Capability::IrqRouting)?, 1024);
/// vm.create_irqchip()?;
/// assert_eq!(vm.signal_msi(Msi::default()).unwrap_err().errno, Errno::ENOTTY);
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct FakeHost {
    pub(super) api_version: i32,
    system: BTreeMap<Capability, i32>,
    vm: BTreeMap<Capability, i32>,
    pub(super) vcpu_mmap_size: usize,
    pub(super) msrs: Vec<u32>,
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) tsc_khz: u32,
    pub(super) io_devices: usize,
    pub(super) physical_bits: u32,
    pub(super) guests: BTreeMap<u32, Vec<GuestStep>>,
}

/// The default value of a capability, as Linux 6.18 answers.
fn default(cap: Capability) -> i32 {
    use Capability as C;
    match cap {
        C::NrVcpus => 2,
        C::NrMemslots => 32764,
        C::CoalescedMmio => 2,
        C::IrqRouting | C::MaxVcpuId => 4096,
        // KVM_CLOCK_TSC_STABLE, _REALTIME, _HOST_TSC.
        C::AdjustClock => 14,
        C::MaxVcpus => 1024,
        C::Pci23 | C::MultiAddressSpace => 0,
        // Both scopes; a VM without a split irqchip leaves out one bit.
        C::X2apicApi => 15,
        // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, _INITIALLY_SET.
        C::ManualDirtyLogProtect2 => 3,
        C::DirtyLogRing | C::DirtyLogRingAcqRel => 1 << 20,
        C::Xsave2 => 4096,
        _ => 1,
    }
}

/// MSRs of `KVM_GET_MSR_INDEX_LIST` that every host of the last ten years has.
const MSRS: [u32; 20] = [
    0x10,
    0x3b,
    0x174,
    0x175,
    0x176,
    0x277,
    0x1a0,
    0x17a,
    0x9e,
    0x6e0, // TSC to TSC_DEADLINE
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103, // syscall, GS
    0x4b56_4d00,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03, // kvmclock, async page fault, steal time
];

/// The leaves of a plain 64-bit processor with XSAVE of x87, SSE and AVX state.
fn cpuid() -> Vec<kvm_cpuid_entry2> {
    const INDEXED: u32 = 1; // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        index,
        flags: if matches!(function, 4 | 7 | 0xd) { INDEXED } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    vec![
        // "GenuineIntel", leaves up to 0xd.
        leaf(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        // SSE3 to SSE4.2, x2APIC, TSC deadline, XSAVE, AVX, hypervisor; the baseline of 64-bit in EDX.
        leaf(1, 0, [0x0005_0650, 0x0001_0800, 0x95b8_2201, 0x078b_fbff]),
        leaf(7, 0, [0; 4]),
        leaf(0xd, 0, [7, 0x340, 0x340, 0]),
        leaf(0xd, 1, [0; 4]),
        // "KVMKVMKVM", clocksource and async page faults.
        leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, 0, [0x0100_000b, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        // SYSCALL, NX, 1 GiB pages, long mode.
        leaf(0x8000_0001, 0, [0, 0, 1, 0x2c10_0800]),
        // 46 physical and 48 linear address bits.
        leaf(0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ]
}

impl Default for FakeHost {
    /// Linux 6.18 on x86-64.
    fn default() -> Self {
        let values: BTreeMap<_, _> =
            Capability::ALL.iter().map(|&cap| (cap, default(cap))).collect();
        Self {
            api_version: 12,
            system: values.clone(),
            vm: values,
            vcpu_mmap_size: 3 * 4096,
            msrs: MSRS.to_vec(),
            cpuid: cpuid(),
            tsc_khz: 2_000_000,
            io_devices: 1000,
            physical_bits: 52,
            guests: BTreeMap::new(),
        }
    }
}

impl FakeHost {
    /// The value of a capability, whichever descriptor is asked.
    #[must_use]
    pub fn with(self, cap: Capability, value: i32) -> Self {
        self.with_system(cap, value).with_vm(cap, value)
    }

    /// The value of a capability on the system descriptor alone. What VMs really do follows
    /// [`Self::with_vm`].
    #[must_use]
    pub fn with_system(mut self, cap: Capability, value: i32) -> Self {
        self.system.insert(cap, value);
        self
    }

    /// The value of a capability on the VM descriptors alone.
    #[must_use]
    pub fn with_vm(mut self, cap: Capability, value: i32) -> Self {
        self.vm.insert(cap, value);
        self
    }

    /// A host that lacks a capability.
    #[must_use]
    pub fn without(self, cap: Capability) -> Self {
        self.with(cap, 0)
    }

    /// The answer of `KVM_GET_API_VERSION`; 12.
    #[must_use]
    pub fn with_api_version(mut self, version: i32) -> Self {
        self.api_version = version;
        self
    }

    /// The answer of `KVM_GET_MSR_INDEX_LIST`; 20 well-known ones.
    #[must_use]
    pub fn with_msrs(mut self, indices: Vec<u32>) -> Self {
        self.msrs = indices;
        self
    }

    /// The answer of `KVM_GET_SUPPORTED_CPUID`; a plain 64-bit processor.
    #[must_use]
    pub fn with_cpuid(mut self, leaves: Vec<kvm_cpuid_entry2>) -> Self {
        self.cpuid = leaves;
        self
    }

    /// The frequency of the TSC in kHz; 2,000,000.
    #[must_use]
    pub fn with_tsc_khz(mut self, khz: u32) -> Self {
        self.tsc_khz = khz;
        self
    }

    /// How many devices each of the two I/O buses of a VM has room for; 1000 (`NR_IOBUS_DEVS`). Each
    /// coalesced zone is one, and what the kernel has there of interrupt controllers and timer.
    /// ioeventfds are not counted, but a full bus takes none.
    #[must_use]
    pub fn with_io_devices(mut self, devices: usize) -> Self {
        self.io_devices = devices;
        self
    }

    /// What vCPU `id` of every VM does when it is run: see [`GuestStep`].
    #[must_use]
    pub fn guest(mut self, vcpu: u32, steps: impl IntoIterator<Item = GuestStep>) -> Self {
        self.guests.insert(vcpu, steps.into_iter().collect());
        self
    }

    /// What the system descriptor answers.
    pub(super) fn system_value(&self, cap: Capability) -> i32 {
        self.system.get(&cap).copied().unwrap_or(0)
    }

    /// What a VM descriptor answers, before what the VM itself adds.
    pub(super) fn vm_value(&self, cap: Capability) -> i32 {
        self.vm.get(&cap).copied().unwrap_or(0)
    }

    /// Whether VMs have a capability.
    pub(super) fn has(&self, cap: Capability) -> bool {
        self.vm_value(cap) > 0
    }

    /// The value of a capability as a count; 0 if it is absent.
    pub(super) fn count(&self, cap: Capability) -> u32 {
        u32::try_from(self.vm_value(cap)).unwrap_or(0)
    }
}
