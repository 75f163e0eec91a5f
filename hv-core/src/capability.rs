//! Every KVM capability the project asks for, as data.
//!
//! A capability's value is an integer and stays one: `KVM_CAP_IRQ_ROUTING` answers 4096, and
//! `KVM_CAP_COALESCED_MMIO` a page index. This module says what exists and what follows from its
//! absence; whether a VM may run without it is decided in [`crate::init`].

use std::fmt;

/// Which descriptor answers for a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Asked on the system descriptor, before a VM exists.
    System,
    /// Asked on the VM descriptor, because KVM may answer per VM. Hosts without
    /// [`Capability::CheckExtensionVm`] answer on the system descriptor only. (On x86 Linux 6.1
    /// answers the same on both for all that is listed here; later ones may not for every VM type.)
    Vm,
}

impl Scope {
    /// `"system"` or `"vm"`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Scope::System => "system",
            Scope::Vm => "vm",
        }
    }
}

macro_rules! capabilities {
    ($($variant:ident = $number:literal $name:literal, $scope:ident, since $since:literal, $absence:literal;)*) => {
        /// A KVM capability (`KVM_CHECK_EXTENSION`), numbered as in `linux/kvm.h`.
        ///
        /// ```
        /// use hv_core::{Capability, Scope};
        /// let cap = Capability::IrqRouting;
        /// assert_eq!((cap.name(), cap.number()), ("KVM_CAP_IRQ_ROUTING", 25));
        /// assert_eq!(cap.scope(), Scope::Vm);
        /// assert!(cap.absence().contains("HPET"));
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        #[non_exhaustive]
        pub enum Capability {
            $(#[doc = concat!("`", $name, "`; without it: ", $absence, ".")] $variant = $number,)*
        }

        impl Capability {
            /// Every capability the project asks for, by number.
            pub const ALL: &[Capability] = &[$(Capability::$variant,)*];

            /// The name in `linux/kvm.h`, such as `"KVM_CAP_IRQCHIP"`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Capability::$variant => $name,)* }
            }

            /// The descriptor that answers for it.
            #[must_use]
            pub const fn scope(self) -> Scope {
                match self { $(Capability::$variant => Scope::$scope,)* }
            }

            /// The first Linux version that reports it on x86, such as `"2.6.30"`. Distributions
            /// backport, so only the value says whether a host has it.
            #[must_use]
            pub const fn since(self) -> &'static str {
                match self { $(Capability::$variant => $since,)* }
            }

            /// What follows from its absence, as a clause without a full stop.
            #[must_use]
            pub const fn absence(self) -> &'static str {
                match self { $(Capability::$variant => $absence,)* }
            }
        }
    };
}

capabilities! {
    Irqchip = 0 "KVM_CAP_IRQCHIP", Vm, since "2.6.24", "no in-kernel interrupt controllers: interrupts are injected by the VMM";
    Hlt = 1 "KVM_CAP_HLT", Vm, since "2.6.24", "HLT does not exit to the VMM";
    UserMemory = 3 "KVM_CAP_USER_MEMORY", Vm, since "2.6.25", "guest memory can't be given by the VMM: no VM can run";
    SetTssAddr = 4 "KVM_CAP_SET_TSS_ADDR", Vm, since "2.6.25", "Intel hosts can't run real-mode code: no VM can run";
    ExtCpuid = 7 "KVM_CAP_EXT_CPUID", Vm, since "2.6.25", "guest CPUID can't be set: no VM can run";
    NrVcpus = 9 "KVM_CAP_NR_VCPUS", System, since "2.6.26", "the recommended number of vCPUs is taken to be 4";
    NrMemslots = 10 "KVM_CAP_NR_MEMSLOTS", Vm, since "2.6.26", "the number of memory slots is taken to be 32";
    MpState = 14 "KVM_CAP_MP_STATE", Vm, since "2.6.26", "the run state of a vCPU can't be read or set: no VM can run";
    CoalescedMmio = 15 "KVM_CAP_COALESCED_MMIO", Vm, since "2.6.27", "no coalesced MMIO zones: every MMIO write exits";
    DestroyMemoryRegionWorks = 21 "KVM_CAP_DESTROY_MEMORY_REGION_WORKS", Vm, since "2.6.29", "memory slots can't be deleted: no VM can run";
    SetGuestDebug = 23 "KVM_CAP_SET_GUEST_DEBUG", Vm, since "5.7", "breakpoints and single step from the VMM may work all the same: KVM_SET_GUEST_DEBUG is from 2.6.30";
    IrqRouting = 25 "KVM_CAP_IRQ_ROUTING", Vm, since "2.6.30", "no interrupt routing, so no 0->2 override and no HPET";
    IrqInjectStatus = 26 "KVM_CAP_IRQ_INJECT_STATUS", Vm, since "2.6.30", "an injected line does not report whether it was coalesced";
    JoinMemoryRegionsWorks = 30 "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS", Vm, since "2.6.30", "adjacent memory slots can't be joined safely";
    Irqfd = 32 "KVM_CAP_IRQFD", Vm, since "2.6.32", "no irqfds: every device interrupt is an ioctl";
    Pit2 = 33 "KVM_CAP_PIT2", Vm, since "2.6.32", "no in-kernel PIT with its speaker port";
    PitState2 = 35 "KVM_CAP_PIT_STATE2", Vm, since "2.6.32", "the state of the PIT can't be saved whole";
    Ioeventfd = 36 "KVM_CAP_IOEVENTFD", Vm, since "2.6.32", "no ioeventfds: every doorbell exits";
    SetIdentityMapAddr = 37 "KVM_CAP_SET_IDENTITY_MAP_ADDR", Vm, since "2.6.32", "the identity map page stays at 0xfffbc000";
    AdjustClock = 39 "KVM_CAP_ADJUST_CLOCK", Vm, since "2.6.33", "the guest's kvmclock can't be read or set";
    InternalErrorData = 40 "KVM_CAP_INTERNAL_ERROR_DATA", Vm, since "2.6.33", "an internal error comes without its data and instruction bytes";
    VcpuEvents = 41 "KVM_CAP_VCPU_EVENTS", Vm, since "2.6.33", "pending exceptions and interrupts can't be read or set";
    DebugRegs = 50 "KVM_CAP_DEBUGREGS", Vm, since "2.6.35", "the debug registers can't be read or set";
    X86RobustSinglestep = 51 "KVM_CAP_X86_ROBUST_SINGLESTEP", Vm, since "2.6.34", "single steps over popf and interrupts are unreliable";
    Xsave = 55 "KVM_CAP_XSAVE", Vm, since "2.6.36", "the extended processor state can't be read or set";
    Xcrs = 56 "KVM_CAP_XCRS", Vm, since "2.6.36", "XCR0 can't be read or set";
    GetTscKhz = 61 "KVM_CAP_GET_TSC_KHZ", Vm, since "3.0", "the frequency of the guest's TSC is not known";
    MaxVcpus = 66 "KVM_CAP_MAX_VCPUS", System, since "3.2", "the recommended number of vCPUs is also the hard limit";
    TscDeadlineTimer = 72 "KVM_CAP_TSC_DEADLINE_TIMER", Vm, since "3.2", "the local APIC timer has no TSC-deadline mode";
    Pci23 = 75 "KVM_CAP_PCI_2_3", Vm, since "3.4", "no INTx masking for devices KVM assigns itself, which newer kernels leave to VFIO";
    SignalMsi = 77 "KVM_CAP_SIGNAL_MSI", Vm, since "3.5", "an MSI needs a route: dynamic routes instead of direct MSIs";
    ReadonlyMem = 81 "KVM_CAP_READONLY_MEM", Vm, since "3.7", "no readonly memory slots: ROM is writable by the guest";
    IrqfdResample = 82 "KVM_CAP_IRQFD_RESAMPLE", Vm, since "3.7", "no level-triggered irqfds";
    EnableCapVm = 98 "KVM_CAP_ENABLE_CAP_VM", Vm, since "4.2", "capabilities can't be enabled per VM: no split irqchip";
    IoeventfdNoLength = 100 "KVM_CAP_IOEVENTFD_NO_LENGTH", Vm, since "3.16", "an ioeventfd always matches an access size";
    CheckExtensionVm = 105 "KVM_CAP_CHECK_EXTENSION_VM", System, since "3.17", "capabilities are asked on the system descriptor only";
    MultiAddressSpace = 118 "KVM_CAP_MULTI_ADDRESS_SPACE", Vm, since "4.2", "one address space only: no separate SMM memory";
    SplitIrqchip = 121 "KVM_CAP_SPLIT_IRQCHIP", Vm, since "4.4", "no split irqchip";
    IoeventfdAnyLength = 122 "KVM_CAP_IOEVENTFD_ANY_LENGTH", Vm, since "4.4", "a zero-length ioeventfd does not match all access sizes";
    MaxVcpuId = 128 "KVM_CAP_MAX_VCPU_ID", System, since "4.7", "vCPU ids are limited like the number of vCPUs";
    X2apicApi = 129 "KVM_CAP_X2APIC_API", Vm, since "4.8", "MSIs and APIC state can't name APIC ids above 254";
    ImmediateExit = 136 "KVM_CAP_IMMEDIATE_EXIT", Vm, since "4.11", "a kick that arrives just before KVM_RUN can be lost: no VM can run";
    CoalescedPio = 162 "KVM_CAP_COALESCED_PIO", Vm, since "4.20", "no coalesced port I/O zones";
    ExceptionPayload = 164 "KVM_CAP_EXCEPTION_PAYLOAD", Vm, since "4.20", "a pending exception's CR2 or DR6 is already in the register";
    ManualDirtyLogProtect2 = 168 "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", Vm, since "5.2", "reading the dirty log always clears it";
    DirtyLogRing = 192 "KVM_CAP_DIRTY_LOG_RING", Vm, since "5.11", "no dirty ring";
    Xsave2 = 208 "KVM_CAP_XSAVE2", Vm, since "5.17", "extended processor state above 4 KiB can't be saved";
    DirtyLogRingAcqRel = 223 "KVM_CAP_DIRTY_LOG_RING_ACQ_REL", Vm, since "6.1", "no dirty ring with acquire/release ordering";
    MemoryFaultInfo = 232 "KVM_CAP_MEMORY_FAULT_INFO", Vm, since "6.8", "a failed memory access does not say where";
}

impl Capability {
    /// The number in `linux/kvm.h`, the argument of `KVM_CHECK_EXTENSION`.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings as k;

    #[test]
    fn numbers_are_unique_and_ascending() {
        assert!(Capability::ALL.windows(2).all(|w| w[0].number() < w[1].number()));
    }

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        let header = [
            (Capability::Irqchip, k::KVM_CAP_IRQCHIP),
            (Capability::Hlt, k::KVM_CAP_HLT),
            (Capability::UserMemory, k::KVM_CAP_USER_MEMORY),
            (Capability::SetTssAddr, k::KVM_CAP_SET_TSS_ADDR),
            (Capability::ExtCpuid, k::KVM_CAP_EXT_CPUID),
            (Capability::NrVcpus, k::KVM_CAP_NR_VCPUS),
            (Capability::NrMemslots, k::KVM_CAP_NR_MEMSLOTS),
            (Capability::MpState, k::KVM_CAP_MP_STATE),
            (Capability::CoalescedMmio, k::KVM_CAP_COALESCED_MMIO),
            (Capability::DestroyMemoryRegionWorks, k::KVM_CAP_DESTROY_MEMORY_REGION_WORKS),
            (Capability::SetGuestDebug, k::KVM_CAP_SET_GUEST_DEBUG),
            (Capability::IrqRouting, k::KVM_CAP_IRQ_ROUTING),
            (Capability::IrqInjectStatus, k::KVM_CAP_IRQ_INJECT_STATUS),
            (Capability::JoinMemoryRegionsWorks, k::KVM_CAP_JOIN_MEMORY_REGIONS_WORKS),
            (Capability::Irqfd, k::KVM_CAP_IRQFD),
            (Capability::Pit2, k::KVM_CAP_PIT2),
            (Capability::PitState2, k::KVM_CAP_PIT_STATE2),
            (Capability::Ioeventfd, k::KVM_CAP_IOEVENTFD),
            (Capability::SetIdentityMapAddr, k::KVM_CAP_SET_IDENTITY_MAP_ADDR),
            (Capability::AdjustClock, k::KVM_CAP_ADJUST_CLOCK),
            (Capability::InternalErrorData, k::KVM_CAP_INTERNAL_ERROR_DATA),
            (Capability::VcpuEvents, k::KVM_CAP_VCPU_EVENTS),
            (Capability::DebugRegs, k::KVM_CAP_DEBUGREGS),
            (Capability::X86RobustSinglestep, k::KVM_CAP_X86_ROBUST_SINGLESTEP),
            (Capability::Xsave, k::KVM_CAP_XSAVE),
            (Capability::Xcrs, k::KVM_CAP_XCRS),
            (Capability::GetTscKhz, k::KVM_CAP_GET_TSC_KHZ),
            (Capability::MaxVcpus, k::KVM_CAP_MAX_VCPUS),
            (Capability::TscDeadlineTimer, k::KVM_CAP_TSC_DEADLINE_TIMER),
            (Capability::Pci23, k::KVM_CAP_PCI_2_3),
            (Capability::SignalMsi, k::KVM_CAP_SIGNAL_MSI),
            (Capability::ReadonlyMem, k::KVM_CAP_READONLY_MEM),
            (Capability::IrqfdResample, k::KVM_CAP_IRQFD_RESAMPLE),
            (Capability::EnableCapVm, k::KVM_CAP_ENABLE_CAP_VM),
            (Capability::IoeventfdNoLength, k::KVM_CAP_IOEVENTFD_NO_LENGTH),
            (Capability::CheckExtensionVm, k::KVM_CAP_CHECK_EXTENSION_VM),
            (Capability::MultiAddressSpace, k::KVM_CAP_MULTI_ADDRESS_SPACE),
            (Capability::SplitIrqchip, k::KVM_CAP_SPLIT_IRQCHIP),
            (Capability::IoeventfdAnyLength, k::KVM_CAP_IOEVENTFD_ANY_LENGTH),
            (Capability::MaxVcpuId, k::KVM_CAP_MAX_VCPU_ID),
            (Capability::X2apicApi, k::KVM_CAP_X2APIC_API),
            (Capability::ImmediateExit, k::KVM_CAP_IMMEDIATE_EXIT),
            (Capability::CoalescedPio, k::KVM_CAP_COALESCED_PIO),
            (Capability::ExceptionPayload, k::KVM_CAP_EXCEPTION_PAYLOAD),
            (Capability::ManualDirtyLogProtect2, k::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            (Capability::DirtyLogRing, k::KVM_CAP_DIRTY_LOG_RING),
            (Capability::Xsave2, k::KVM_CAP_XSAVE2),
            (Capability::DirtyLogRingAcqRel, k::KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
            (Capability::MemoryFaultInfo, k::KVM_CAP_MEMORY_FAULT_INFO),
        ];
        assert_eq!(header.len(), Capability::ALL.len());
        for (ours, theirs) in header {
            assert_eq!(ours.number(), theirs, "{ours}");
        }
    }

    #[test]
    fn each_says_when_it_came_and_what_its_absence_means() {
        for cap in Capability::ALL {
            assert!(cap.name().starts_with("KVM_CAP_"));
            assert!(cap.since().starts_with(|c: char| c.is_ascii_digit()), "{cap}");
            assert!(!cap.absence().is_empty() && !cap.absence().ends_with('.'), "{cap}");
        }
    }
}
