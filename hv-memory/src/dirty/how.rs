//! How KVM is to tell which pages a guest writes.
//!
//! A VM has one way, chosen once: KVM refuses to mix some of them and does not notice others.

use std::sync::Arc;

use hv_core::{Capability, Errno, Error, Vm};
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
    /// Each vCPU tells in a ring which pages it writes (`KVM_CAP_DIRTY_LOG_RING`): the cost is that of
    /// what is written, whatever the size of the memory. Before the first vCPU only. Each vCPU's ring
    /// is to be given to the manager before the vCPU runs ([`crate::SlotManager::add_dirty_ring`]), and
    /// to be emptied when it is full ([`crate::SlotManager::empty_dirty_ring`]).
    Ring {
        /// Bytes of each ring, 16 for an entry: a power of two, at least a page, at most what
        /// the capability says.
        bytes: u32,
    },
}

/// Why dirty pages can't be told. None of those that were written is forgotten, unless it says so.
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
    /// The rings of the vCPUs could not be reset, so that what was collected from them would not be
    /// told again when it is written again. It stays dirty.
    #[error("dirty pages stay untold: {0}")]
    Rings(Error),
    /// There are no rings, since pages are tracked in another way.
    #[error("a vCPU has no dirty ring: dirty pages are tracked by {chosen:?}")]
    NoRings {
        /// What was chosen.
        chosen: DirtyTracking,
    },
    /// The ring of a vCPU can't be had.
    #[error("the dirty ring of vCPU {vcpu} can't be had: {error}")]
    NoRing {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        error: Error,
    },
    /// A vCPU has a ring that the manager was not given: pages it wrote are not among those that were
    /// told.
    #[error("the dirty ring of vCPU {vcpu} is full, and was never given to the slot manager")]
    RingNotAdded {
        /// The vCPU.
        vcpu: u32,
    },
    /// A vCPU stops for a full ring in which there is nothing to take: KVM has reported more than it
    /// had room for, and some pages that the vCPU wrote are not told. Copy all memory, and use larger
    /// rings.
    #[error(
        "the dirty ring of vCPU {vcpu} overflowed, and some pages it wrote are lost: use larger rings"
    )]
    Overflow {
        /// The vCPU.
        vcpu: u32,
    },
    /// KVM refused to enable it; dirty pages are told as before.
    #[error("{wanted:?} can't be enabled: {error}{}", remedy(.wanted, .error.errno))]
    Enable {
        /// What was asked for.
        wanted: DirtyTracking,
        /// Its answer.
        error: Error,
    },
}

fn remedy(wanted: &DirtyTracking, errno: Errno) -> &'static str {
    match (wanted, errno) {
        (DirtyTracking::Ring { .. }, Errno::EINVAL) => {
            "; enable it before the first vCPU, with a power of two of bytes, at least a page"
        }
        (DirtyTracking::Ring { .. }, Errno::E2BIG) => "; ask for smaller rings",
        _ => "",
    }
}

impl DirtyTracking {
    /// Changes a VM from `self` to `wanted`.
    pub(super) fn change<V: Vm>(self, vm: &V, wanted: Self) -> Result<(), DirtyError> {
        if self == wanted {
            return Ok(());
        }
        let refused = |error| DirtyError::Enable { wanted, error };
        let value = |capability| vm.check_extension(capability).map_err(refused);
        let (capability, argument) = match (self, wanted) {
            (Self::Log, Self::ManualProtect { initially_set }) => {
                let flags = if initially_set { INITIALLY_SET } else { 0 };
                let capability = Capability::ManualDirtyLogProtect2;
                let (offered, argument) = (value(capability)?, MANUAL_PROTECT_ENABLE | flags);
                if u64::from(offered.unsigned_abs()) & argument != argument {
                    return Err(DirtyError::Unsupported { wanted, capability, offered });
                }
                (capability, argument)
            }
            (Self::Log, Self::Ring { bytes }) => {
                // x86 has both, and makes no difference between them.
                let ordered = Capability::DirtyLogRingAcqRel;
                let capability =
                    if value(ordered)? > 0 { ordered } else { Capability::DirtyLogRing };
                let offered = value(capability)?;
                if offered == 0 {
                    return Err(DirtyError::Unsupported { wanted, capability, offered });
                }
                (capability, bytes.into())
            }
            (chosen, _) => return Err(DirtyError::Chosen { chosen, wanted }),
        };
        vm.enable_cap(capability, [argument, 0, 0, 0]).map_err(refused)
    }
}
