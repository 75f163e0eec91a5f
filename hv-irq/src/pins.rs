//! The legacy interrupts of a PC: how GSIs 0 to 23 lead to the pins of the PICs and the I/O APIC.
//!
//! Data only. `KVM_CREATE_IRQCHIP` makes routes of its own, but the first table replaces them all,
//! so this is where every table starts.

use std::ops::Range;

use hv_core::{Gsi, IrqchipId, Route, RouteTarget};

/// Pins of the I/O APIC, and with it the GSIs no message may have: 0 to 23, with the hole at 2.
pub const LEGACY_GSIS: Range<u32> = 0..24;

/// The GSI that does not exist: PIC pin 2 is where the slave PIC is wired.
pub(crate) const CASCADE: u32 = 2;

/// The 38 routes of a PC, on 23 GSIs.
///
/// The timer is ISA interrupt 0 at the PIC but pin 2 at the I/O APIC (the interrupt source override
/// 0 to 2 of the ACPI MADT), and PIC pin 2 is where the slave PIC is wired: so there is no GSI 2.
pub fn pc_default_routes() -> impl Iterator<Item = Route> {
    LEGACY_GSIS.filter(|&gsi| gsi != CASCADE).flat_map(|gsi| {
        let pic = match gsi {
            0..8 => Some((IrqchipId::PIC_MASTER, gsi)),
            8..16 => Some((IrqchipId::PIC_SLAVE, gsi - 8)),
            _ => None,
        };
        let ioapic = (IrqchipId::IOAPIC, if gsi == 0 { 2 } else { gsi });
        let targets = pic.into_iter().chain([ioapic]);
        targets
            .map(move |(chip, pin)| Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip, pin } })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn thirty_eight_entries_on_twenty_three_gsis() {
        let routes: Vec<_> = pc_default_routes().collect();
        assert_eq!(routes.len(), 38);
        let gsis: BTreeSet<_> = routes.iter().map(|route| route.gsi.0).collect();
        assert_eq!(gsis.len(), 23);
        assert!(!gsis.contains(&2));
    }

    #[test]
    fn every_pin_is_used_once_but_those_that_do_not_exist() {
        let pins: Vec<_> = pc_default_routes().map(|route| route.target).collect();
        let of = |chip| {
            let mut pins: Vec<u32> = pins
                .iter()
                .filter_map(|target| match *target {
                    RouteTarget::Pin { chip: c, pin } if c == chip => Some(pin),
                    _ => None,
                })
                .collect();
            pins.sort_unstable();
            pins
        };
        assert_eq!(of(IrqchipId::PIC_MASTER), [0, 1, 3, 4, 5, 6, 7], "pin 2 is the cascade");
        assert_eq!(of(IrqchipId::PIC_SLAVE), (0..8).collect::<Vec<_>>());
        let ioapic: Vec<u32> = (1..24).collect();
        assert_eq!(of(IrqchipId::IOAPIC), ioapic, "nothing leads to pin 0");
    }

    #[test]
    fn the_timer_is_on_pin_2_of_the_ioapic() {
        let timer: Vec<_> = pc_default_routes().filter(|route| route.gsi == Gsi(0)).collect();
        let pin = |chip, pin| Route { gsi: Gsi(0), target: RouteTarget::Pin { chip, pin } };
        assert_eq!(timer, [pin(IrqchipId::PIC_MASTER, 0), pin(IrqchipId::IOAPIC, 2)]);
    }
}
