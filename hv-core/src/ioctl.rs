//! The calls a hypervisor backend makes, by name.
//!
//! Errors and traces say which call they mean; this module only names them. Numbers and argument
//! layouts belong to the backend that issues them.

use std::fmt;

macro_rules! ioctls {
    ($($variant:ident $name:literal,)*) => {
        /// A KVM ioctl, named as in the KVM API documentation.
        ///
        /// ```
        /// assert_eq!(hv_core::Ioctl::CreateVm.name(), "KVM_CREATE_VM");
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Ioctl {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl Ioctl {
            /// Every ioctl the project can issue, in the order of declaration.
            pub const ALL: &[Ioctl] = &[$(Ioctl::$variant,)*];

            /// The name in the KVM API documentation, such as `"KVM_CREATE_VM"`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Ioctl::$variant => $name,)*
                }
            }
        }
    };
}

ioctls! {
    // System
    GetApiVersion "KVM_GET_API_VERSION",
    CheckExtension "KVM_CHECK_EXTENSION",
    GetVcpuMmapSize "KVM_GET_VCPU_MMAP_SIZE",
    GetMsrIndexList "KVM_GET_MSR_INDEX_LIST",
    GetSupportedCpuid "KVM_GET_SUPPORTED_CPUID",
    CreateVm "KVM_CREATE_VM",
    // VM
    EnableCap "KVM_ENABLE_CAP",
    SetIdentityMapAddr "KVM_SET_IDENTITY_MAP_ADDR",
    SetTssAddr "KVM_SET_TSS_ADDR",
    SetNrMmuPages "KVM_SET_NR_MMU_PAGES",
    CreateIrqchip "KVM_CREATE_IRQCHIP",
    GetIrqchip "KVM_GET_IRQCHIP",
    SetIrqchip "KVM_SET_IRQCHIP",
    CreatePit2 "KVM_CREATE_PIT2",
    GetPit2 "KVM_GET_PIT2",
    SetPit2 "KVM_SET_PIT2",
    GetClock "KVM_GET_CLOCK",
    SetClock "KVM_SET_CLOCK",
    CreateVcpu "KVM_CREATE_VCPU",
    // Interrupts
    SetGsiRouting "KVM_SET_GSI_ROUTING",
    Irqfd "KVM_IRQFD",
    IrqLine "KVM_IRQ_LINE",
    IrqLineStatus "KVM_IRQ_LINE_STATUS",
    SignalMsi "KVM_SIGNAL_MSI",
    // Memory
    SetUserMemoryRegion "KVM_SET_USER_MEMORY_REGION",
    GetDirtyLog "KVM_GET_DIRTY_LOG",
    ClearDirtyLog "KVM_CLEAR_DIRTY_LOG",
    ResetDirtyRings "KVM_RESET_DIRTY_RINGS",
    RegisterCoalescedMmio "KVM_REGISTER_COALESCED_MMIO",
    UnregisterCoalescedMmio "KVM_UNREGISTER_COALESCED_MMIO",
    // I/O events
    Ioeventfd "KVM_IOEVENTFD",
    // vCPU
    Run "KVM_RUN",
    GetRegs "KVM_GET_REGS",
    SetRegs "KVM_SET_REGS",
    GetSregs "KVM_GET_SREGS",
    SetSregs "KVM_SET_SREGS",
    GetFpu "KVM_GET_FPU",
    SetFpu "KVM_SET_FPU",
    GetXcrs "KVM_GET_XCRS",
    SetXcrs "KVM_SET_XCRS",
    GetDebugregs "KVM_GET_DEBUGREGS",
    SetDebugregs "KVM_SET_DEBUGREGS",
    GetMpState "KVM_GET_MP_STATE",
    SetMpState "KVM_SET_MP_STATE",
    GetVcpuEvents "KVM_GET_VCPU_EVENTS",
    SetVcpuEvents "KVM_SET_VCPU_EVENTS",
    GetLapic "KVM_GET_LAPIC",
    SetLapic "KVM_SET_LAPIC",
    GetMsrs "KVM_GET_MSRS",
    SetMsrs "KVM_SET_MSRS",
    GetCpuid2 "KVM_GET_CPUID2",
    SetCpuid2 "KVM_SET_CPUID2",
    Interrupt "KVM_INTERRUPT",
    Nmi "KVM_NMI",
    Translate "KVM_TRANSLATE",
    SetGuestDebug "KVM_SET_GUEST_DEBUG",
    GetTscKhz "KVM_GET_TSC_KHZ",
}

impl fmt::Display for Ioctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What failed: a KVM ioctl, or one of the few other system calls a backend needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// A KVM ioctl.
    Ioctl(Ioctl),
    /// `open(2)` of the device node.
    Open,
    /// `mmap(2)` of the `kvm_run` page of a vCPU.
    Mmap,
    /// `mmap(2)` of the dirty ring of a vCPU.
    MmapDirtyRing,
    /// A look into the ring of collected writes, which is no system call.
    CoalescedRing,
    /// `eventfd(2)`.
    Eventfd,
    /// `sigaction(2)` for the signal that kicks.
    Sigaction,
    /// `tgkill(2)`, which kicks a vCPU thread out of `KVM_RUN`.
    Kick,
}

impl Call {
    /// The name in the KVM API documentation or of the manual page, such as `"KVM_RUN"` or
    /// `"mmap"`, or of our own where neither says enough. No two have the same.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Call::Ioctl(ioctl) => ioctl.name(),
            Call::Open => "open",
            Call::Mmap => "mmap",
            Call::MmapDirtyRing => "mmap_dirty_ring",
            Call::CoalescedRing => "coalesced_mmio_ring",
            Call::Eventfd => "eventfd",
            Call::Sigaction => "sigaction",
            Call::Kick => "tgkill",
        }
    }

    /// Every call the project can make: all ioctls, then the others.
    pub fn all() -> impl Iterator<Item = Call> {
        let others = [
            Call::Open,
            Call::Mmap,
            Call::MmapDirtyRing,
            Call::CoalescedRing,
            Call::Eventfd,
            Call::Sigaction,
            Call::Kick,
        ];
        Ioctl::ALL.iter().copied().map(Call::Ioctl).chain(others)
    }
}

impl From<Ioctl> for Call {
    fn from(ioctl: Ioctl) -> Self {
        Call::Ioctl(ioctl)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Ioctl(ioctl) => ioctl.fmt(f),
            Call::Open => f.write_str("open"),
            Call::Mmap => f.write_str("mmap of kvm_run"),
            Call::MmapDirtyRing => f.write_str("mmap of the dirty ring"),
            Call::CoalescedRing => f.write_str("taking a collected write"),
            Call::Eventfd => f.write_str("eventfd"),
            Call::Sigaction => f.write_str("sigaction of the kick signal"),
            Call::Kick => f.write_str("tgkill of a vCPU thread"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_of_the_api() {
        let names: HashSet<_> = Ioctl::ALL.iter().map(|i| i.name()).collect();
        assert_eq!(names.len(), Ioctl::ALL.len());
        assert!(names.iter().all(|n| n.starts_with("KVM_")));
    }

    #[test]
    fn calls_have_names_of_their_own() {
        let names: HashSet<_> = Call::all().map(Call::name).collect();
        assert_eq!(names.len(), Ioctl::ALL.len() + 7);
        assert_eq!(Call::from(Ioctl::Run).name(), "KVM_RUN");
    }

    #[test]
    fn a_call_shows_the_ioctl_it_is() {
        assert_eq!(Call::from(Ioctl::Irqfd).to_string(), "KVM_IRQFD");
    }
}
