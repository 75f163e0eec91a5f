//! The registers and lines of an I/O APIC as plain data, and back.

use std::sync::{Arc, Mutex};

use hv_core::{Gsi, IrqBackend, RouteTarget};

use super::level::Triggers;
use super::redirection::RedirectionEntry;
use super::{Chip, ID, Ioapic, PINS, Registers};
use crate::state::Op;
use crate::{IrqRouter, LegacyPins, RestoreError, RouterError};

/// An I/O APIC at one moment; see [`Ioapic::save`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct IoapicState {
    /// The select register.
    pub select: u8,
    /// The identification register.
    pub id: u32,
    /// The 24 redirection entries, as the guest reads them.
    pub entries: Vec<u64>,
    /// Bit n: the line to pin n is asserted.
    pub lines: u32,
}

impl<V: IrqBackend> Ioapic<V> {
    /// What the registers and lines are. Eventfds that drive pins are the devices', which raise their
    /// pins again where they are restored, as a level is told again.
    #[must_use]
    pub fn save(&self) -> IoapicState {
        let registers = self.chip.registers();
        let entries = registers.entries.iter().map(|entry| entry.bits()).collect();
        IoapicState { select: registers.select, id: registers.id, entries, lines: registers.lines }
    }

    /// An I/O APIC as it was. Where the router was restored, too, its routes are there already and
    /// nothing is committed.
    ///
    /// # Errors
    /// The state is not one of an I/O APIC, or contradicts the routes of the router; the kernel has the
    /// pins of this VM; or KVM refuses the routes.
    pub fn restore(router: IrqRouter<V>, saved: &IoapicState) -> Result<Self, RestoreError> {
        if router.config().pins == LegacyPins::Kernel {
            return Err(RouterError::PinsInKernel.into());
        }
        let refuse = |register, value| Err(RestoreError::Ioapic { register, value });
        if saved.id & !ID != 0 {
            return refuse("the identification register", saved.id.into());
        }
        if saved.lines >> PINS != 0 {
            return refuse("the set of asserted lines", saved.lines.into());
        }
        if saved.entries.len() != PINS {
            return refuse("the number of redirection entries", saved.entries.len() as u64);
        }
        let mut entries = [RedirectionEntry::RESET; PINS];
        for (entry, &bits) in entries.iter_mut().zip(&saved.entries) {
            match RedirectionEntry::from_bits(bits) {
                Some(saved) => *entry = saved,
                None => return refuse("a redirection entry", bits),
            }
        }
        let mut routes = Vec::new();
        for (gsi, entry) in (0..).map(Gsi).zip(entries) {
            let target = RouteTarget::Msi(entry.message());
            match router.shared.state().table.targets(gsi).next() {
                Some(route) if route != target => return Err(RestoreError::OtherRoute(gsi)),
                // One that was never written has no route.
                None if entry != RedirectionEntry::RESET => routes.push(Op::Set(gsi, target)),
                _ => {}
            }
        }
        router.batch(|batch| {
            routes.into_iter().for_each(|route| batch.stage(route));
            Ok(())
        })?;
        let (triggers, &IoapicState { select, id, lines, .. }) = (Triggers::default(), saved);
        let registers = Mutex::new(Registers { select, id, entries, lines, triggers });
        Ok(Self { chip: Arc::new(Chip { router, registers }) })
    }
}
