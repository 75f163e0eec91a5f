//! How KVM is to tell which pages a guest writes.
//!
//! A VM has one way, chosen once: KVM refuses to mix some of them and does not notice others.

use std::sync::Arc;

use hv_core::{Capability, Error, Vm};
use thiserror::Error;

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`.
const MANUAL_PROTECT_ENABLE: u64 = 1;
/// `KVM_DIRTY_LOG_INITIALLY_SET`.
const INITIALLY_SET: u64 = 2;

/// How KVM tells which pages a guest writes ([`crate::SlotManager::track_dirty`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DirtyTracking {
    /// Reading the log of a slot (`KVM_GET_DIRTY_LOG`) clears it, and protects all its dirty pages
    /// again at once. What every VM begins with.
    #[default]
    Log,
    /// Reading leaves the log as it is, and pages are protected again as they are cleared, 64 of them
    /// at least (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `KVM_CLEAR_DIRTY_LOG`).
    ManualProtect {
        /// A slot that begins to log has all its pages dirty, and none of them is protected before
        /// it is cleared (`KVM_DIRTY_LOG_INITIALLY_SET`).
        initially_set: bool,
    },
}

/// Why dirty pages can't be told. None of those that were written is forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DirtyError {
    /// KVM refused to read or to clear a log.
    #[error("the dirty pages of memory {name:?} stay untold: {error}")]
    Kvm {
        /// What the memory is called.
        name: Arc<str>,
        /// Its answer.
        error: Error,
    },
    /// The host's KVM does not have it.
    #[error("this KVM has no {wanted:?}: {} is {offered:#x} here", .capability.name())]
    Unsupported {
        /// What was asked for.
        wanted: DirtyTracking,
        /// What it needs.
        capability: Capability,
        /// Its value on this host.
        offered: i32,
    },
    /// Another way was chosen before.
    #[error("dirty pages are tracked by {chosen:?} already, and can't be by {wanted:?} as well")]
    Chosen {
        /// What was chosen.
        chosen: DirtyTracking,
        /// What was asked for.
        wanted: DirtyTracking,
    },
    /// KVM refused to enable it; dirty pages are told as before.
    #[error("{wanted:?} can't be enabled: {error}")]
    Enable {
        /// What was asked for.
        wanted: DirtyTracking,
        /// Its answer.
        error: Error,
    },
}

impl DirtyTracking {
    /// Changes a VM from `self` to `wanted`.
    pub(super) fn change<V: Vm>(self, vm: &V, wanted: Self) -> Result<(), DirtyError> {
        if self == wanted {
            return Ok(());
        }
        let refused = |error| DirtyError::Enable { wanted, error };
        let (capability, argument) = match (self, wanted) {
            (Self::Log, Self::ManualProtect { initially_set }) => {
                let flags = if initially_set { INITIALLY_SET } else { 0 };
                (Capability::ManualDirtyLogProtect2, MANUAL_PROTECT_ENABLE | flags)
            }
            (chosen, _) => return Err(DirtyError::Chosen { chosen, wanted }),
        };
        let offered = vm.check_extension(capability).map_err(refused)?;
        if u64::from(offered.unsigned_abs()) & argument != argument {
            return Err(DirtyError::Unsupported { wanted, capability, offered });
        }
        vm.enable_cap(capability, [argument, 0, 0, 0]).map_err(refused)
    }
}
