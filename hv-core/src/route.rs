//! Interrupt routes, lines and messages as plain data (`KVM_SET_GSI_ROUTING`, `KVM_IRQFD`,
//! `KVM_IRQ_LINE_STATUS`, `KVM_SIGNAL_MSI`).
//!
//! Nothing here decides whether a table is legal: hv-irq does before it commits, KVM when it is
//! asked.

use std::fmt;

use crate::EventFd;

/// A global system interrupt: the number a route, an irqfd or an interrupt line goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Gsi(pub u32);

impl fmt::Display for Gsi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An in-kernel interrupt controller, by its number in the KVM API (`KVM_IRQCHIP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IrqchipId(pub u32);

impl IrqchipId {
    /// The master 8259 PIC, pins 0 to 7.
    pub const PIC_MASTER: Self = Self(0);
    /// The slave 8259 PIC, pins 0 to 7.
    pub const PIC_SLAVE: Self = Self(1);
    /// The I/O APIC, pins 0 to 23.
    pub const IOAPIC: Self = Self(2);
}

/// A message signalled interrupt: what a device writes, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Msi {
    /// The address the message goes to (Intel SDM volume 3, "Message Address Register Format").
    pub address: u64,
    /// The message ("Message Data Register Format").
    pub data: u32,
    /// The device id (`KVM_MSI_VALID_DEVID`), which x86 accepts and ignores.
    pub device: Option<u32>,
}

/// Where a GSI leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum RouteTarget {
    /// A pin of an in-kernel interrupt controller (`KVM_IRQ_ROUTING_IRQCHIP`).
    Pin {
        /// The controller.
        chip: IrqchipId,
        /// The pin of that controller.
        pin: u32,
    },
    /// A message (`KVM_IRQ_ROUTING_MSI`).
    Msi(Msi),
    /// A synthetic interrupt of a Hyper-V guest (`KVM_IRQ_ROUTING_HV_SINT`).
    HypervSint {
        /// The virtual processor.
        vcpu: u32,
        /// The synthetic interrupt source.
        sint: u32,
    },
}

/// One entry of the routing table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Route {
    /// The interrupt that is routed.
    pub gsi: Gsi,
    /// Where it leads.
    pub target: RouteTarget,
}

/// An eventfd bound to a GSI: writing to it raises the interrupt without the VMM.
///
/// KVM holds no descriptor of it: when the last one of `event` closes, wherever it is (a duplicate,
/// another process), KVM unbinds it, and lowers the line that a resample irqfd held. `resample` may
/// be closed; KVM then goes on signalling what nobody reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Irqfd {
    /// The eventfd that raises the interrupt.
    pub event: EventFd,
    /// The GSI it raises. KVM does not check that it is routed, or below the limit.
    pub gsi: Gsi,
    /// For a level-triggered interrupt, the eventfd KVM signals when the guest ends it.
    pub resample: Option<EventFd>,
}

/// What became of an interrupt line that was set (`KVM_IRQ_LINE_STATUS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LineStatus {
    /// Injected, to this many vCPUs.
    Delivered(u32),
    /// An earlier one is still pending: the two are seen as one.
    Coalesced,
    /// Masked, or not routed anywhere.
    Ignored,
}

/// What became of a message (`KVM_SIGNAL_MSI`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MsiStatus {
    /// The guest received it.
    Delivered,
    /// The guest blocked it.
    Blocked,
    /// No vCPU is its target. KVM says this with `EPERM`, which is no failure of the call.
    NoTarget,
}
