//! The address map: from regions with priorities to slots.
//!
//! - [`AddressMap`] has regions and flattens them; it needs no VM.
//! - [`LiveMap`] is the map of a VM: an [`Edit`] of it becomes a [`Plan`] of slot operations.
//!
//! How a change gets there:
//!
//! ```text
//! edit -> table of regions -> view (flat ranges, runs of memory) -> slots wanted -> plan -> KVM
//! ```
//!
//! Each step is taken for the windows that changed alone. It knows nothing of what a machine has where,
//! and does not emulate what traps.

mod address_map;
mod commit;
mod edit;
mod error;
mod live;
mod pieces;
mod plan;
mod region;
mod slots;
mod table;
mod view;

pub use address_map::{AddressMap, FlatMemory, FlatRange, Found};
pub use commit::{PausedPlan, Plan, RunningPlan};
pub use edit::Edit;
pub use error::{AddressMapError, CommitError};
pub use live::{LiveMap, SlotRules};
pub use plan::SlotOperation;
pub use region::{NewRegion, RegionId};
