//! What a VM can do, as init found it.
//!
//! Nothing here asks KVM anything and nothing changes once init is over.

use std::collections::BTreeMap;
use std::fmt;

use super::Irqchip;
use crate::Capability;

/// What init found out and set up.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// KVM's API version, which is 12.
    pub api_version: i32,
    /// How many vCPUs this VM may have.
    pub vcpus: VcpuLimits,
    /// Every capability init asked for, with its value; 0 is absence.
    pub capabilities: BTreeMap<Capability, i32>,
    /// The page of the coalesced ring in a vCPU's mapping, in units of 4 KiB; `None` if there is no
    /// ring.
    pub coalesced_page: Option<u32>,
    /// Whether memory slots can be joined. If not, the part of a slot that stays must be added again
    /// as it was.
    pub joins_memory_regions: bool,
    /// Memory slots a VM can have: their ids are below.
    pub nr_memslots: u32,
    /// Whether memory slots can be readonly.
    pub readonly_memory: bool,
    /// The vCPU and timer state that can be read and set.
    pub state: StateIoctls,
    /// How MSIs are sent.
    pub msi: MsiMode,
    /// Whether KVM masks INTx of the devices it assigns itself (`KVM_CAP_PCI_2_3`).
    pub pci_2_3: bool,
    /// Whether a line that is set says if the interrupt was coalesced: `KVM_IRQ_LINE_STATUS` instead
    /// of `KVM_IRQ_LINE`.
    pub inject_status: bool,
    /// The model-specific registers that can be saved.
    pub msrs: Vec<u32>,
    /// Guest-physical addresses KVM keeps for itself.
    pub reserved: Reserved,
    /// The interrupt controllers the VM has got.
    pub irqchip: Irqchip,
    /// Interrupt routing; `None` if GSIs can't be routed.
    pub routing: Option<Routing>,
    /// What eventfds can do for interrupts.
    pub irqfds: Irqfds,
    /// Whether KVM takes ioeventfds (`KVM_IOEVENTFD`).
    pub ioeventfds: bool,
    /// Whether one port takes many of them.
    pub many_ioeventfds: ManyIoeventfds,
    /// What this VM lacks or must do otherwise.
    pub consequences: Vec<Consequence>,
}

impl Record {
    /// Whether an interrupt may be raised from any thread: with an irqchip in the kernel, also a
    /// split one.
    #[must_use]
    pub const fn async_interrupts(&self) -> bool {
        !matches!(self.irqchip, Irqchip::Off)
    }
}

/// Limits of the vCPUs of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VcpuLimits {
    /// How many there can be.
    pub hard: u32,
    /// How many there should be, for performance.
    pub recommended: u32,
    /// Ids (APIC ids) are below this.
    pub ids: u32,
}

/// Which state can be read and set beyond what every KVM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateIoctls {
    /// Pending exceptions and interrupts (`KVM_GET_VCPU_EVENTS`).
    pub vcpu_events: bool,
    /// Single steps are reliable over `popf` and interrupts.
    pub robust_singlestep: bool,
    /// Debug registers (`KVM_GET_DEBUGREGS`).
    pub debugregs: bool,
    /// Extended processor state (`KVM_GET_XSAVE`).
    pub xsave: bool,
    /// XCR0 (`KVM_GET_XCRS`).
    pub xcrs: bool,
    /// All of the timer's state (`KVM_GET_PIT2`).
    pub pit_state2: bool,
}

/// How an MSI without a route of its own is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MsiMode {
    /// As it is (`KVM_SIGNAL_MSI`).
    Direct,
    /// Through a route made when it is first sent and kept for the next.
    DynamicRoutes,
}

/// Guest-physical addresses KVM keeps for itself, to be reserved in the guest's memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reserved {
    /// The page with the identity map.
    pub identity_map: u64,
    /// The three pages of the task state segment, right after it.
    pub tss: u64,
    /// Bytes from `identity_map` to the end of the task state segment.
    pub len: u64,
}

/// Interrupt routing: how many GSIs there are and how large a bitmap of them is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Routing {
    /// GSIs are below this; also the most entries of a table (`KVM_CAP_IRQ_ROUTING`).
    pub gsi_count: u32,
    /// Bits of a bitmap of the GSIs in whole words of 64.
    pub bitmap_bits: u32,
}

impl Routing {
    /// Bits of the bitmap that are no GSI and must be taken from the start.
    #[must_use]
    pub const fn over_allocated_bits(&self) -> std::ops::Range<u32> {
        self.gsi_count..self.bitmap_bits
    }
}

/// What eventfds can do for interrupts (`KVM_IRQFD`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Irqfds {
    /// An eventfd can raise an interrupt.
    pub allowed: bool,
    /// For level-triggered interrupts too: KVM tells the end of one by an eventfd.
    pub resample: bool,
    /// The interrupt can be an MSI.
    pub msi: bool,
}

/// Whether one port takes seven ioeventfds that differ in the value only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ManyIoeventfds {
    /// It does.
    Yes,
    /// KVM has no ioeventfds, or no room for that many.
    No,
    /// Not asked for, or something else was in the way.
    NotProbed,
}

/// Something this VM lacks or must do otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Consequence {
    /// More vCPUs were asked for than are recommended.
    ManyVcpus {
        /// How many were asked for.
        asked: u32,
        /// How many are recommended.
        recommended: u32,
    },
    /// KVM has no interrupt controllers of this VM.
    NoIrqchip,
    /// Only the local APICs are in the kernel.
    SplitIrqchip,
    /// Without routing there must be no HPET.
    NoHpet,
    /// The probe of step 16 could not remove all its ioeventfds.
    ProbeLeftovers {
        /// How many are left, on port 0.
        count: u32,
    },
    /// What follows from the absence of a capability.
    Lacks(Capability),
}

impl fmt::Display for Consequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Consequence::ManyVcpus { asked, recommended } => write!(
                f,
                "{asked} vCPUs are more than the {recommended} recommended on this host: they will wait for each other"
            ),
            Consequence::NoIrqchip => f.write_str(
                "no interrupt controller in the kernel: the VMM injects every interrupt, and there is no routing, irqfd or MSI",
            ),
            Consequence::SplitIrqchip => f.write_str(
                "split irqchip: PICs, I/O APIC and timer are the VMM's, and there are no level-triggered irqfds",
            ),
            Consequence::NoHpet => f.write_str(
                "no HPET: without interrupt routing the override of interrupt 0 to pin 2 can't be made",
            ),
            Consequence::ProbeLeftovers { count } => write!(
                f,
                "{count} ioeventfds of the probe could not be removed: 2-byte writes to port 0 may be lost"
            ),
            Consequence::Lacks(cap) => write!(f, "no {cap}: {}", cap.absence()),
        }
    }
}

/// What follows from what was found.
pub(super) fn consequences(record: &Record, vcpus: u32, leftovers: u32) -> Vec<Consequence> {
    let recommended = record.vcpus.recommended;
    let many = Consequence::ManyVcpus { asked: vcpus, recommended };
    let left = Consequence::ProbeLeftovers { count: leftovers };
    let no_hpet = record.async_interrupts() && record.routing.is_none();
    let irqchip = match record.irqchip {
        Irqchip::Off => Some(Consequence::NoIrqchip),
        Irqchip::Split { .. } => Some(Consequence::SplitIrqchip),
        Irqchip::Kernel { .. } => None,
    };
    // What the absence of routing means is said by `NoHpet`.
    let lacks = record
        .capabilities
        .iter()
        .filter(|&(&cap, &value)| value <= 0 && cap != Capability::IrqRouting);
    [
        (vcpus > recommended).then_some(many),
        irqchip,
        no_hpet.then_some(Consequence::NoHpet),
        (leftovers > 0).then_some(left),
    ]
    .into_iter()
    .flatten()
    .chain(lacks.map(|(&cap, _)| Consequence::Lacks(cap)))
    .collect()
}
