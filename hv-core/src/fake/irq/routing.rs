//! The routing table and what makes one legal (`KVM_SET_GSI_ROUTING`).

use std::collections::{BTreeMap, BTreeSet};

use crate::{Errno, Gsi, IrqchipId, Msi, Route, RouteTarget};

/// Pins of one 8259.
pub(super) const PIC_PINS: u32 = 8;
/// Pins of the I/O APIC.
pub(super) const IOAPIC_PINS: u32 = 24;

/// What decides whether a table is legal, beside the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// The most entries, and the number of GSIs (`KVM_CAP_IRQ_ROUTING`).
    pub(super) limit: u32,
    /// Whether there are pins (not in split mode).
    pub(super) pins: bool,
    /// Whether APIC ids have 32 bits in messages.
    pub(super) wide_ids: bool,
}

/// A routing table.
#[derive(Debug, Default)]
pub(super) struct Table {
    routes: Vec<Route>,
    by_gsi: BTreeMap<Gsi, Vec<RouteTarget>>,
    /// The GSI of a pin; of the last entry if several name it.
    by_pin: BTreeMap<(IrqchipId, u32), Gsi>,
}

impl Table {
    /// What a fresh full irqchip has: GSI n on pin n of the I/O APIC, and the first 16 on the 8259
    /// pair too.
    pub(super) fn of_pins() -> Self {
        let route =
            |gsi, chip, pin| Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip, pin } };
        let mut routes = Vec::new();
        for gsi in 0..IOAPIC_PINS {
            routes.push(route(gsi, IrqchipId::IOAPIC, gsi));
            match gsi / PIC_PINS {
                0 => routes.push(route(gsi, IrqchipId::PIC_MASTER, gsi)),
                1 => routes.push(route(gsi, IrqchipId::PIC_SLAVE, gsi % PIC_PINS)),
                _ => {}
            }
        }
        Self::build(routes)
    }

    /// A table, if it is legal.
    ///
    /// # Errors
    /// `EINVAL`: too many entries, a GSI beyond the limit, a pin that does not exist, or two entries
    /// for a GSI that are not pins of different chips.
    pub(super) fn new(routes: &[Route], rules: Rules) -> Result<Self, Errno> {
        if u32::try_from(routes.len()).is_ok_and(|n| n <= rules.limit)
            && routes.iter().all(|route| legal(route, rules))
            && shared_by_chips_only(routes)
        {
            Ok(Self::build(routes.to_vec()))
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn build(routes: Vec<Route>) -> Self {
        let mut table = Self::default();
        for route in &routes {
            table.by_gsi.entry(route.gsi).or_default().push(route.target);
            if let RouteTarget::Pin { chip, pin } = route.target {
                table.by_pin.insert((chip, pin), route.gsi);
            }
        }
        Self { routes, ..table }
    }

    pub(super) fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Where a GSI leads.
    pub(super) fn targets(&self, gsi: Gsi) -> &[RouteTarget] {
        self.by_gsi.get(&gsi).map_or(&[], Vec::as_slice)
    }

    /// The GSI of a pin.
    pub(super) fn gsi_of(&self, chip: IrqchipId, pin: u32) -> Option<Gsi> {
        self.by_pin.get(&(chip, pin)).copied()
    }
}

/// Whether a message sets address bits that are reserved once APIC ids have 32 bits.
pub(super) fn reserved_bits(msi: Msi, wide_ids: bool) -> bool {
    wide_ids && msi.address >> 32 & 0xff != 0
}

fn legal(route: &Route, rules: Rules) -> bool {
    route.gsi.0 < rules.limit
        && match route.target {
            RouteTarget::Pin { chip, pin } => {
                rules.pins
                    && match chip {
                        IrqchipId::PIC_MASTER | IrqchipId::PIC_SLAVE => pin < PIC_PINS,
                        IrqchipId::IOAPIC => pin < IOAPIC_PINS,
                        _ => false,
                    }
            }
            RouteTarget::Msi(msi) => !reserved_bits(msi, rules.wide_ids),
            RouteTarget::HypervSint { .. } => true,
        }
}

/// Several entries may share a GSI if each is a pin, and each of another chip.
fn shared_by_chips_only(routes: &[Route]) -> bool {
    let mut chips = BTreeSet::new();
    let mut alone = BTreeSet::new();
    routes.iter().all(|&Route { gsi, target }| match target {
        RouteTarget::Pin { chip, .. } => !alone.contains(&gsi) && chips.insert((gsi, chip)),
        RouteTarget::Msi(_) | RouteTarget::HypervSint { .. } => {
            chips.range((gsi, IrqchipId(0))..=(gsi, IrqchipId(u32::MAX))).next().is_none()
                && alone.insert(gsi)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { limit: 4096, pins: true, wide_ids: false };

    fn pin(gsi: u32, chip: IrqchipId, pin: u32) -> Route {
        Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip, pin } }
    }

    fn msi(gsi: u32) -> Route {
        Route { gsi: Gsi(gsi), target: RouteTarget::Msi(Msi::default()) }
    }

    #[test]
    fn legal_and_illegal_tables() {
        const MASTER: IrqchipId = IrqchipId::PIC_MASTER;
        const SLAVE: IrqchipId = IrqchipId::PIC_SLAVE;
        const IOAPIC: IrqchipId = IrqchipId::IOAPIC;
        let device = Msi { device: Some(0x18), ..Msi::default() };
        let legal: &[&[Route]] = &[
            &[],
            &[pin(4, MASTER, 4), pin(4, IOAPIC, 4)],
            &[pin(4, MASTER, 4), pin(4, SLAVE, 4), pin(4, IOAPIC, 4)],
            &[pin(4, IOAPIC, 4), pin(5, IOAPIC, 4)],
            &[msi(3)],
            &[msi(4095)],
            &[Route { gsi: Gsi(30), target: RouteTarget::Msi(device) }],
            &[Route { gsi: Gsi(30), target: RouteTarget::HypervSint { vcpu: 0, sint: 2 } }],
            &(0..4096).map(msi).collect::<Vec<_>>(),
        ];
        for table in legal {
            assert_eq!(Table::new(table, RULES).unwrap().routes(), *table);
        }
        let illegal: &[&[Route]] = &[
            &[msi(24), msi(24)],
            &[msi(4), pin(4, IOAPIC, 4)],
            &[pin(4, IOAPIC, 4), msi(4)],
            &[pin(4, IOAPIC, 4), pin(4, IOAPIC, 5)],
            &[pin(4, IOAPIC, 24)],
            &[pin(4, MASTER, 8)],
            &[pin(4, SLAVE, 8)],
            &[pin(4, IrqchipId(3), 0)],
            &[msi(4096)],
            &[msi(u32::MAX)],
            &(0..4097).map(|gsi| msi(gsi % 4096)).collect::<Vec<_>>(),
        ];
        for table in illegal {
            assert_eq!(Table::new(table, RULES).unwrap_err(), Errno::EINVAL, "{table:?}");
        }
    }

    #[test]
    fn what_else_decides() {
        let small = Rules { limit: 1024, ..RULES };
        assert!(Table::new(&[msi(1023)], small).is_ok());
        assert!(Table::new(&[msi(1024)], small).is_err());
        let split = Rules { pins: false, ..RULES };
        assert!(Table::new(&[msi(1)], split).is_ok());
        assert!(Table::new(&[pin(1, IrqchipId::IOAPIC, 1)], split).is_err());
        let far = Msi { address: 0x0000_0001_fee0_0000, ..Msi::default() };
        let far = [Route { gsi: Gsi(30), target: RouteTarget::Msi(far) }];
        assert!(Table::new(&far, RULES).is_ok());
        assert!(Table::new(&far, Rules { wide_ids: true, ..RULES }).is_err(), "reserved bits");
    }

    #[test]
    fn the_default_table_has_every_pin() {
        let table = Table::of_pins();
        assert_eq!(table.routes().len(), 40);
        assert_eq!(Table::new(table.routes(), RULES).unwrap().routes(), table.routes());
        assert_eq!(table.targets(Gsi(10)).len(), 2);
        assert_eq!(table.targets(Gsi(16)).len(), 1);
        assert!(table.targets(Gsi(24)).is_empty());
        assert_eq!(table.gsi_of(IrqchipId::PIC_SLAVE, 2), Some(Gsi(10)));
    }

    #[test]
    fn a_pin_answers_to_the_last_gsi_that_names_it() {
        let routes = [pin(4, IrqchipId::IOAPIC, 4), pin(9, IrqchipId::IOAPIC, 4)];
        let table = Table::new(&routes, RULES).unwrap();
        assert_eq!(table.gsi_of(IrqchipId::IOAPIC, 4), Some(Gsi(9)));
    }
}
