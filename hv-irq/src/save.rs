//! The state of a router as plain data.
//!
//! What owners have: not the routes of a cache, nor what KVM would not let go of. An eventfd is not
//! data, so of a binding it says which GSI was raised by one. Bringing it back is [`crate::Restored`].

use std::collections::BTreeSet;

use hv_core::{Gsi, IrqBackend, Route};

use crate::{IrqRouter, LegacyPins};

/// A router's GSIs, routes and bindings at one moment; see [`IrqRouter::save`].
///
/// With the feature `serde` it can be written and read. It is checked when it is restored, so it may
/// come from anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RouterState {
    /// Who has the legacy pins.
    pub pins: LegacyPins,
    /// The GSIs that are owned, ascending.
    pub allocated: Vec<Gsi>,
    /// The routing table.
    pub routes: Vec<Route>,
    /// The GSIs that an eventfd raised, ascending, once for each eventfd. What is routed and not here
    /// was masked.
    pub bound: Vec<Gsi>,
}

impl<V: IrqBackend> IrqRouter<V> {
    /// What the owners of GSIs and pins have, to be restored elsewhere
    /// ([`IrqRouter::restore`]). Owners save what is theirs by themselves
    /// ([`crate::MsiVectors::save`], [`crate::Ioapic::save`]).
    #[must_use]
    pub fn save(&self) -> RouterState {
        let state = self.shared.state();
        let ownerless: BTreeSet<Gsi> = state.ownerless().collect();
        let owned = |gsi: &Gsi| !ownerless.contains(gsi);
        let bound = state.irqfds.iter().filter(|irqfd| !state.is_abandoned(irqfd));
        let mut bound: Vec<Gsi> = bound.map(|irqfd| irqfd.gsi).collect();
        bound.sort_unstable();
        RouterState {
            pins: self.shared.config.pins,
            allocated: state.gsis.iter().filter(owned).collect(),
            routes: state.table.routes().into_iter().filter(|route| owned(&route.gsi)).collect(),
            bound,
        }
    }
}
