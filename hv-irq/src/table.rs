//! The routing table: what each GSI leads to, and the rules KVM has for it.
//!
//! A route KVM would refuse is refused here, when it is inserted, so that no bad entry waits in the
//! table to fail every later commit. It must not issue ioctls.

use hv_core::{Gsi, IrqchipId, Msi, Route, RouteTarget};
use thiserror::Error;

/// Why a route can't be in the table. The table is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RouteError {
    /// KVM has no such GSI.
    #[error("GSI {gsi} can't be routed: this VM has {count} GSIs")]
    GsiOutOfRange {
        /// The GSI.
        gsi: Gsi,
        /// How many there are.
        count: u32,
    },
    /// The table has as many entries as KVM takes.
    #[error("the routing table is full: KVM takes {limit} entries")]
    TableFull {
        /// The most entries (`KVM_CAP_IRQ_ROUTING`).
        limit: u32,
    },
    /// There is no such pin.
    #[error("pin {pin} of irqchip {} does not exist", .chip.0)]
    NoSuchPin {
        /// The irqchip.
        chip: IrqchipId,
        /// The pin.
        pin: u32,
    },
    /// There is no such synthetic interrupt source.
    #[error("synthetic interrupt source {sint} does not exist: a Hyper-V guest has 0 to 15")]
    NoSuchSint {
        /// The source.
        sint: u32,
    },
    /// KVM refuses the message: with 32-bit APIC ids in messages, the low byte of the upper half of the
    /// address must be 0.
    #[error(
        "message address {address:#x} is refused by KVM, which takes 32-bit APIC ids: bits 32 to 39 must be 0"
    )]
    IllegalMessage {
        /// The address.
        address: u64,
    },
    /// Pins are routed by the kernel only if the kernel has the irqchip.
    #[error("GSI {gsi} can't lead to a pin: the irqchip is split, its pins are not in the kernel")]
    PinInSplitMode {
        /// The GSI.
        gsi: Gsi,
    },
    /// The GSI already leads somewhere that excludes this target.
    #[error(
        "GSI {gsi} already has a route: a GSI leads to one message, or to one pin of each irqchip"
    )]
    Conflict {
        /// The GSI.
        gsi: Gsi,
    },
}

/// What one GSI leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Targets {
    #[default]
    None,
    /// One thing that is no pin.
    Single(RouteTarget),
    /// At most one pin of each irqchip, by the number of the irqchip.
    Pins([Option<u32>; IRQCHIPS]),
}

const IRQCHIPS: usize = 3;

impl Targets {
    /// One target.
    fn of(target: RouteTarget, gsi: Gsi) -> Result<Self, RouteError> {
        match target {
            RouteTarget::Pin { chip, pin } => with_pin([None; IRQCHIPS], chip, pin, gsi),
            target => Ok(Targets::Single(target)),
        }
    }

    fn len(self) -> u32 {
        match self {
            Targets::None => 0,
            Targets::Single(_) => 1,
            Targets::Pins(pins) => pins.iter().map(|pin| u32::from(pin.is_some())).sum(),
        }
    }

    fn iter(self) -> impl Iterator<Item = RouteTarget> {
        let (single, pins) = match self {
            Targets::None => (None, [None; IRQCHIPS]),
            Targets::Single(target) => (Some(target), [None; IRQCHIPS]),
            Targets::Pins(pins) => (None, pins),
        };
        let pins = (0..).zip(pins).filter_map(|(chip, pin)| {
            pin.map(|pin| RouteTarget::Pin { chip: IrqchipId(chip), pin })
        });
        single.into_iter().chain(pins)
    }
}

/// A routing table that KVM accepts.
///
/// ```
/// use hv_core::{Gsi, Msi, Route, RouteTarget};
/// use hv_irq::{RouteError, RoutingTable};
///
/// let mut table = RoutingTable::new(4096, 4096, true);
/// let route = Route { gsi: Gsi(24), target: RouteTarget::Msi(Msi::default()) };
/// table.insert(route)?;
/// assert_eq!(table.insert(route), Err(RouteError::Conflict { gsi: Gsi(24) }));
/// assert_eq!(table.routes(), [route]);
/// # Ok::<(), RouteError>(())
/// ```
#[derive(Debug, Clone)]
pub struct RoutingTable {
    /// By GSI; as long as the highest GSI that ever had a route needs.
    targets: Vec<Targets>,
    gsi_count: u32,
    limit: u32,
    kernel_pins: bool,
    x2apic_format: bool,
    len: u32,
}

/// Synthetic interrupt sources of a virtual processor (Hyper-V TLFS, "Synthetic Interrupt Sources").
const SINTS: u32 = 16;

impl RoutingTable {
    /// An empty table for GSIs below `gsi_count` with at most `limit` entries (both the value of
    /// `KVM_CAP_IRQ_ROUTING`). `kernel_pins` says whether the irqchip is wholly in the kernel.
    #[must_use]
    pub fn new(gsi_count: u32, limit: u32, kernel_pins: bool) -> Self {
        Self { targets: Vec::new(), gsi_count, limit, kernel_pins, x2apic_format: false, len: 0 }
    }

    /// Says whether messages name 32-bit APIC ids (`KVM_CAP_X2APIC_API` with
    /// `KVM_X2APIC_API_USE_32BIT_IDS`), in which case there are messages that KVM refuses.
    #[must_use]
    pub fn with_x2apic_format(self, x2apic_format: bool) -> Self {
        Self { x2apic_format, ..self }
    }

    /// Entries.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The entries in the order of GSIs, those of one GSI in the order of irqchips.
    #[must_use]
    pub fn routes(&self) -> Vec<Route> {
        let mut routes = Vec::new();
        self.write_to(&mut routes);
        routes
    }

    /// Replaces what is in `routes` by the entries.
    pub(crate) fn write_to(&self, routes: &mut Vec<Route>) {
        routes.clear();
        routes.reserve(self.len as usize);
        for (gsi, &targets) in (0..).map(Gsi).zip(&self.targets) {
            match targets {
                // Nearly all there are, of thousands at times.
                Targets::None => {}
                Targets::Single(target) => routes.push(Route { gsi, target }),
                pins => routes.extend(pins.iter().map(|target| Route { gsi, target })),
            }
        }
    }

    /// Where `gsi` leads.
    pub fn targets(&self, gsi: Gsi) -> impl Iterator<Item = RouteTarget> {
        self.get(gsi).iter()
    }

    /// Adds a route beside those the GSI has.
    ///
    /// # Errors
    /// KVM would refuse the table ([`RouteError`]).
    pub fn insert(&mut self, route: Route) -> Result<(), RouteError> {
        let Route { gsi, target } = route;
        self.check(route)?;
        let targets = match (self.get(gsi), target) {
            (Targets::None, target) => Targets::of(target, gsi)?,
            (Targets::Pins(pins), RouteTarget::Pin { chip, pin }) => {
                with_pin(pins, chip, pin, gsi)?
            }
            _ => return Err(RouteError::Conflict { gsi }),
        };
        if self.len >= self.limit {
            return Err(RouteError::TableFull { limit: self.limit });
        }
        self.put(gsi, targets);
        Ok(())
    }

    /// Replaces all the GSI leads to by one target.
    ///
    /// # Errors
    /// KVM would refuse the table ([`RouteError`]).
    pub fn replace(&mut self, route: Route) -> Result<(), RouteError> {
        let Route { gsi, target } = route;
        self.check(route)?;
        let targets = Targets::of(target, gsi)?;
        if self.len - self.get(gsi).len() >= self.limit {
            return Err(RouteError::TableFull { limit: self.limit });
        }
        self.put(gsi, targets);
        Ok(())
    }

    /// Removes every entry of a GSI, and says how many there were.
    pub fn remove(&mut self, gsi: Gsi) -> u32 {
        self.put(gsi, Targets::None).len()
    }

    pub(crate) fn get(&self, gsi: Gsi) -> Targets {
        self.targets.get(gsi.0 as usize).copied().unwrap_or_default()
    }

    /// Sets what a GSI leads to without checks, for a state this table had before. Returns what it
    /// led to.
    pub(crate) fn put(&mut self, gsi: Gsi, targets: Targets) -> Targets {
        let index = gsi.0 as usize;
        if index >= self.targets.len() {
            if targets == Targets::None {
                return Targets::None;
            }
            self.targets.resize(index + 1, Targets::None);
        }
        let Some(slot) = self.targets.get_mut(index) else { return Targets::None };
        let before = std::mem::replace(slot, targets);
        self.len = self.len - before.len() + targets.len();
        before
    }

    /// The rules that concern one entry alone.
    fn check(&self, route: Route) -> Result<(), RouteError> {
        let Route { gsi, target } = route;
        if gsi.0 >= self.gsi_count {
            return Err(RouteError::GsiOutOfRange { gsi, count: self.gsi_count });
        }
        match target {
            RouteTarget::Pin { .. } if !self.kernel_pins => Err(RouteError::PinInSplitMode { gsi }),
            RouteTarget::Pin { chip, pin } if pin >= pins(chip) => {
                Err(RouteError::NoSuchPin { chip, pin })
            }
            RouteTarget::Msi(msi) => self.check_message(msi),
            RouteTarget::HypervSint { sint, .. } if sint >= SINTS => {
                Err(RouteError::NoSuchSint { sint })
            }
            _ => Ok(()),
        }
    }

    /// Whether KVM takes a message. It takes any, whatever a guest makes up, but for one case.
    pub(crate) fn check_message(&self, Msi { address, .. }: Msi) -> Result<(), RouteError> {
        if self.x2apic_format && (address >> 32) & 0xff != 0 {
            return Err(RouteError::IllegalMessage { address });
        }
        Ok(())
    }
}

fn pins(chip: IrqchipId) -> u32 {
    match chip {
        IrqchipId::PIC_MASTER | IrqchipId::PIC_SLAVE => 8,
        IrqchipId::IOAPIC => 24,
        _ => 0,
    }
}

fn with_pin(
    mut pins: [Option<u32>; IRQCHIPS],
    chip: IrqchipId,
    pin: u32,
    gsi: Gsi,
) -> Result<Targets, RouteError> {
    match pins.get_mut(chip.0 as usize) {
        Some(slot @ None) => *slot = Some(pin),
        Some(Some(_)) => return Err(RouteError::Conflict { gsi }),
        None => return Err(RouteError::NoSuchPin { chip, pin }),
    }
    Ok(Targets::Pins(pins))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(gsi: u32, chip: IrqchipId, pin: u32) -> Route {
        Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip, pin } }
    }

    fn msi(gsi: u32, data: u32) -> Route {
        let msi = Msi { address: 0xfee0_0000, data, device: None };
        Route { gsi: Gsi(gsi), target: RouteTarget::Msi(msi) }
    }

    fn table() -> RoutingTable {
        RoutingTable::new(4096, 4096, true)
    }

    #[test]
    fn takes_what_kvm_takes() {
        let device = Msi { address: 0, data: 0, device: Some(7) };
        let legal = [
            pin(5, IrqchipId::PIC_MASTER, 5),
            pin(5, IrqchipId::IOAPIC, 5),
            pin(6, IrqchipId::IOAPIC, 5), // two GSIs on one pin
            pin(7, IrqchipId::IOAPIC, 23),
            pin(8, IrqchipId::PIC_SLAVE, 7),
            msi(3, 0x41),
            msi(4095, 0),
            Route { gsi: Gsi(100), target: RouteTarget::Msi(device) },
            Route { gsi: Gsi(101), target: RouteTarget::HypervSint { vcpu: 0, sint: 2 } },
        ];
        let mut table = table();
        for route in legal {
            table.insert(route).unwrap();
        }
        let mut routes = table.routes();
        routes.sort_unstable();
        let mut expected = legal.to_vec();
        expected.sort_unstable();
        assert_eq!(routes, expected);
        assert_eq!(table.len() as usize, legal.len());
    }

    #[test]
    fn refuses_what_kvm_refuses_and_stays_as_it_was() {
        let mut table = table();
        for route in [pin(5, IrqchipId::PIC_MASTER, 5), pin(5, IrqchipId::IOAPIC, 5), msi(30, 1)] {
            table.insert(route).unwrap();
        }
        let before = table.routes();
        let conflict = |gsi| RouteError::Conflict { gsi: Gsi(gsi) };
        let no_pin = |chip, pin| RouteError::NoSuchPin { chip, pin };
        for (route, error) in [
            (msi(30, 2), conflict(30)),
            (pin(30, IrqchipId::IOAPIC, 1), conflict(30)),
            (msi(5, 1), conflict(5)),
            (pin(5, IrqchipId::IOAPIC, 6), conflict(5)),
            (pin(6, IrqchipId::IOAPIC, 24), no_pin(IrqchipId::IOAPIC, 24)),
            (pin(6, IrqchipId::PIC_MASTER, 8), no_pin(IrqchipId::PIC_MASTER, 8)),
            (pin(6, IrqchipId::PIC_SLAVE, 8), no_pin(IrqchipId::PIC_SLAVE, 8)),
            (pin(6, IrqchipId(3), 0), no_pin(IrqchipId(3), 0)),
            (msi(4096, 1), RouteError::GsiOutOfRange { gsi: Gsi(4096), count: 4096 }),
            (msi(u32::MAX, 1), RouteError::GsiOutOfRange { gsi: Gsi(u32::MAX), count: 4096 }),
        ] {
            assert_eq!(table.insert(route), Err(error), "{route:?}");
            assert_eq!(table.routes(), before, "{route:?}");
        }
    }

    #[test]
    fn a_split_irqchip_has_no_pins_in_the_kernel() {
        let mut split = RoutingTable::new(4096, 4096, false);
        let error = split.insert(pin(5, IrqchipId::IOAPIC, 5)).unwrap_err();
        assert_eq!(error, RouteError::PinInSplitMode { gsi: Gsi(5) });
        split.insert(msi(5, 1)).unwrap();
    }

    #[test]
    fn a_synthetic_source_exists_or_not() {
        let sint = |sint| Route { gsi: Gsi(30), target: RouteTarget::HypervSint { vcpu: 7, sint } };
        let mut table = table();
        assert_eq!(table.insert(sint(16)), Err(RouteError::NoSuchSint { sint: 16 }));
        table.insert(sint(15)).unwrap();
        assert_eq!(table.insert(msi(30, 1)), Err(RouteError::Conflict { gsi: Gsi(30) }));
    }

    #[test]
    fn any_message_is_taken_unless_apic_ids_have_32_bits() {
        let route = |address| {
            let msi = Msi { address, data: u32::MAX, device: Some(u32::MAX) };
            Route { gsi: Gsi(30), target: RouteTarget::Msi(msi) }
        };
        let mut x2apic = table().with_x2apic_format(true);
        for address in [0, u64::MAX, 0xff_fee0_0000, 0x1_0000_0000, 0xdead_be00_0000_0000] {
            table().insert(route(address)).unwrap();
            let refused = Err(RouteError::IllegalMessage { address });
            let legal = address & 0xff_0000_0000 == 0;
            assert_eq!(x2apic.replace(route(address)), if legal { Ok(()) } else { refused });
        }
        assert_eq!(x2apic.routes(), [route(0xdead_be00_0000_0000)], "the last legal one");
    }

    #[test]
    fn entries_are_limited_apart_from_gsis() {
        let mut table = RoutingTable::new(4096, 3, true);
        table.insert(pin(0, IrqchipId::PIC_MASTER, 0)).unwrap();
        table.insert(pin(0, IrqchipId::IOAPIC, 2)).unwrap();
        table.insert(msi(24, 1)).unwrap();
        assert_eq!(table.insert(msi(25, 1)), Err(RouteError::TableFull { limit: 3 }));
        assert_eq!(
            table.insert(pin(0, IrqchipId::PIC_SLAVE, 0)),
            Err(RouteError::TableFull { limit: 3 })
        );
        table.replace(msi(24, 2)).unwrap();
        assert_eq!(table.remove(Gsi(0)), 2, "all entries of a GSI at once");
        assert_eq!(table.remove(Gsi(0)), 0, "and once");
        assert_eq!(table.routes(), [msi(24, 2)]);
    }

    #[test]
    fn a_replacement_that_is_refused_changes_nothing() {
        let mut table = table();
        table.insert(msi(24, 1)).unwrap();
        table.replace(pin(24, IrqchipId::IOAPIC, 99)).unwrap_err();
        assert_eq!(table.routes(), [msi(24, 1)]);
        table.replace(msi(5000, 1)).unwrap_err();
        assert_eq!(table.len(), 1);
    }
}
