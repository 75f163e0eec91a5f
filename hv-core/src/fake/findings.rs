//! What KVM silently lets pass, told: the strict mode of the fake.
//!
//! A finding never changes what a call answers. It is for the end of a test, which says that there
//! are none, or which.

use std::fmt;

use crate::{CoalescedZone, Gsi, IoAddress, SlotId};

/// Why an event of an irqfd reached nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loss {
    /// Its GSI has no route.
    Unrouted,
    /// Its GSI is no GSI of this host.
    OutOfRange,
    /// The pin it leads to is masked.
    Masked,
    /// The pin it leads to is level-triggered, and the guest has not ended the interrupt before it.
    InService,
    /// Its message names no local APIC there is.
    NoTarget,
    /// The local APICs it names don't take interrupts (disabled by software or in `APIC_BASE`).
    Disabled,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Loss::Unrouted => "the GSI has no route",
            Loss::OutOfRange => "the GSI is beyond KVM_CAP_IRQ_ROUTING",
            Loss::Masked => "the pin is masked",
            Loss::InService => "the interrupt of its level-triggered pin has not ended",
            Loss::NoTarget => "no local APIC is its target",
            Loss::Disabled => "its target takes no interrupts",
        })
    }
}

/// What a VM still had when it and its last vCPU were dropped. KVM cleans up, so this is no error:
/// a layer that owns what it makes leaves nothing, a VMM that just ends may leave all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Leftover {
    /// A memory slot.
    Slot(SlotId),
    /// An irqfd, by its GSI.
    Irqfd(Gsi),
    /// An ioeventfd, by its address.
    IoEvent(IoAddress),
    /// A coalesced zone.
    Zone(CoalescedZone),
}

/// Something KVM lets pass that its caller hardly meant.
///
/// ```
/// use hv_core::Gsi;
/// use hv_core::fake::{Finding, Loss};
/// let lost = Finding::LostEvent { gsi: Gsi(30), why: Loss::Unrouted };
/// assert_eq!(lost.to_string(), "an event of the irqfd on GSI 30 was lost: the GSI has no route");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Finding {
    /// An irqfd was assigned to a GSI that has no route: events are lost until it gets one.
    UnroutedIrqfd {
        /// The GSI.
        gsi: Gsi,
    },
    /// An irqfd was assigned to a GSI that no route can have.
    GsiOutOfRange {
        /// The GSI.
        gsi: Gsi,
        /// The number of GSIs.
        limit: u32,
    },
    /// An irqfd was unbound that was not bound (to this GSI).
    VainDeassign {
        /// The GSI that was named.
        gsi: Gsi,
    },
    /// The last [`crate::EventFd`] of an irqfd was dropped, which unbound it.
    ClosedIrqfd {
        /// The GSI it was bound to.
        gsi: Gsi,
    },
    /// An event of an irqfd was taken and delivered to nobody.
    LostEvent {
        /// The GSI of the irqfd.
        gsi: Gsi,
        /// Why.
        why: Loss,
    },
    /// A coalesced zone was registered again.
    DuplicateZone(CoalescedZone),
    /// A coalesced zone was unregistered, and none was there.
    VainUnregister(CoalescedZone),
    /// A slot was deleted or ceased to log, or its VM went, while pages of it were dirty that nobody
    /// had asked for: their bits are lost. With dirty rings: it was deleted, or its VM went, while
    /// entries named pages of it that nobody had collected. They stay, and name the next slot of that
    /// number, if anything.
    LostDirtyPages {
        /// The slot.
        slot: SlotId,
        /// How many pages.
        pages: u64,
    },
    /// The VM went, and nobody had taken these writes from the ring of its coalesced zones.
    LostCollectedWrites {
        /// How many.
        writes: usize,
    },
    /// Dirty rings were enabled with `KVM_DIRTY_LOG_INITIALLY_SET` of manual protection, or the
    /// reverse: pages the guest could write when their slot began to log are in no ring when they
    /// are written.
    RingAndInitiallySet,
    /// The VM went, and this was still there.
    Left(Leftover),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::UnroutedIrqfd { gsi } => {
                write!(f, "an irqfd was assigned to GSI {gsi}, which has no route")
            }
            Finding::GsiOutOfRange { gsi, limit } => {
                write!(f, "an irqfd was assigned to GSI {gsi}; GSIs are below {limit}")
            }
            Finding::VainDeassign { gsi } => {
                write!(f, "an irqfd was deassigned from GSI {gsi} that was not assigned to it")
            }
            Finding::ClosedIrqfd { gsi } => {
                write!(f, "the irqfd on GSI {gsi} was unbound because its eventfd was closed")
            }
            Finding::LostEvent { gsi, why } => {
                write!(f, "an event of the irqfd on GSI {gsi} was lost: {why}")
            }
            Finding::DuplicateZone(zone) => {
                write!(f, "the coalesced zone at {:#x} was registered twice", zone.address.value())
            }
            Finding::VainUnregister(zone) => {
                write!(f, "no coalesced zone was at {:#x} to unregister", zone.address.value())
            }
            Finding::LostDirtyPages { slot, pages } => {
                write!(f, "{pages} dirty pages of slot {slot} were lost")
            }
            Finding::LostCollectedWrites { writes } => {
                write!(f, "{writes} writes that coalesced zones had collected were lost")
            }
            Finding::RingAndInitiallySet => {
                f.write_str("dirty rings miss pages with KVM_DIRTY_LOG_INITIALLY_SET")
            }
            Finding::Left(Leftover::Slot(slot)) => write!(f, "slot {slot} was left in the VM"),
            Finding::Left(Leftover::Irqfd(gsi)) => {
                write!(f, "the irqfd on GSI {gsi} was left in the VM")
            }
            Finding::Left(Leftover::IoEvent(address)) => {
                write!(f, "the ioeventfd at {:#x} was left in the VM", address.value())
            }
            Finding::Left(Leftover::Zone(zone)) => {
                write!(f, "the coalesced zone at {:#x} was left in the VM", zone.address.value())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_says_what_it_is_about() {
        let zone = CoalescedZone { address: IoAddress::Mmio(0xa0000), size: 8 };
        for (finding, says) in [
            (Finding::UnroutedIrqfd { gsi: Gsi(31) }, "GSI 31"),
            (Finding::GsiOutOfRange { gsi: Gsi(5000), limit: 4096 }, "below 4096"),
            (Finding::VainDeassign { gsi: Gsi(7) }, "GSI 7"),
            (Finding::ClosedIrqfd { gsi: Gsi(8) }, "GSI 8"),
            (Finding::LostEvent { gsi: Gsi(7), why: Loss::Masked }, "masked"),
            (Finding::DuplicateZone(zone), "0xa0000"),
            (Finding::VainUnregister(zone), "0xa0000"),
            (Finding::LostDirtyPages { slot: SlotId(3), pages: 9 }, "slot 3"),
            (Finding::LostCollectedWrites { writes: 7 }, "7 writes"),
            (Finding::RingAndInitiallySet, "INITIALLY_SET"),
            (Finding::Left(Leftover::Slot(SlotId(4))), "slot 4"),
            (Finding::Left(Leftover::Irqfd(Gsi(8))), "GSI 8"),
            (Finding::Left(Leftover::IoEvent(IoAddress::Pio(0x70))), "0x70"),
            (Finding::Left(Leftover::Zone(zone)), "0xa0000"),
        ] {
            let text = finding.to_string();
            assert!(text.contains(says), "{text}");
        }
    }
}
