//! A group of vectors as plain data, and back.

use std::collections::BTreeSet;

use hv_core::{EventFd, Gsi, IrqBackend, Msi, RouteTarget};

use super::{Control, Entry, MsiVectors, Vector};
use crate::state::State;
use crate::{IrqRouter, RestoreError, RouterError};

/// A group of vectors at one moment; see [`MsiVectors::save`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct MsiVectorsState {
    /// Whether the group is enabled.
    pub enabled: bool,
    /// Whether it is masked as a whole.
    pub masked: bool,
    /// Its vectors.
    pub vectors: Vec<VectorState>,
}

/// A vector at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VectorState {
    /// Its message.
    pub message: Msi,
    /// Whether it is masked itself.
    pub masked: bool,
    /// Whether an event was held back.
    pub pending: bool,
    /// The GSI it owns.
    pub gsi: Option<Gsi>,
}

impl<V: IrqBackend> MsiVectors<V> {
    /// What the group is, to be restored with its router ([`crate::Restored::vectors`]).
    ///
    /// # Errors
    /// The router is gone.
    pub fn save(&self) -> Result<MsiVectorsState, RouterError> {
        let Control { enabled, masked } = self.control;
        let save = |(index, vector): (usize, &Vector)| {
            let Entry { message, masked } = vector.entry;
            let pending = self.is_pending(index)?;
            Ok::<_, RouterError>(VectorState { message, masked, pending, gsi: vector.gsi })
        };
        let vectors = self.vectors.iter().enumerate().map(save).collect::<Result<_, _>>()?;
        Ok(MsiVectorsState { enabled, masked, vectors })
    }

    /// A group that owns the GSIs of `saved`, which are `unclaimed`.
    pub(crate) fn restore(
        router: &IrqRouter<V>,
        saved: &MsiVectorsState,
        events: Vec<EventFd>,
        unclaimed: &BTreeSet<Gsi>,
    ) -> Result<Self, RestoreError> {
        let control = Control { enabled: saved.enabled, masked: saved.masked };
        check(saved, control, events.len(), &router.shared.state(), unclaimed)?;

        let mut group = Self::new(router, events);
        for (vector, saved) in group.vectors.iter_mut().zip(&saved.vectors) {
            vector.gsi = saved.gsi;
        }
        let entries = saved.vectors.iter().map(|saved| saved.entry()).enumerate().collect();
        if let Err(error) = group.commit(control, entries) {
            // They stay unclaimed.
            group.vectors.clear();
            return Err(error.into());
        }
        for (vector, saved) in group.vectors.iter().zip(&saved.vectors) {
            if saved.pending {
                vector.event.signal();
            }
        }
        Ok(group)
    }
}

impl VectorState {
    fn entry(&self) -> Entry {
        Entry { message: self.message, masked: self.masked }
    }
}

fn check(
    saved: &MsiVectorsState,
    control: Control,
    events: usize,
    state: &State,
    unclaimed: &BTreeSet<Gsi>,
) -> Result<(), RestoreError> {
    if saved.vectors.len() != events {
        return Err(RestoreError::OtherVectors { saved: saved.vectors.len(), events });
    }
    let mut seen = BTreeSet::new();
    for (index, vector) in saved.vectors.iter().enumerate() {
        let live = vector.entry().is_live(control, state);
        let Some(gsi) = vector.gsi else {
            if live {
                return Err(RestoreError::VectorGsi(index));
            }
            continue;
        };
        if !control.enabled {
            return Err(RestoreError::VectorGsi(index));
        }
        if !unclaimed.contains(&gsi) || !seen.insert(gsi) {
            return Err(RestoreError::NotToClaim(gsi));
        }
        let mut targets = state.table.targets(gsi);
        if live && targets.next() != Some(RouteTarget::Msi(vector.message)) {
            return Err(RestoreError::OtherRoute(gsi));
        }
    }
    Ok(())
}
