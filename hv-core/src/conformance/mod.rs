//! The rules of KVM as named cases, for any implementation of [`Hypervisor`].
//!
//! KVM's documentation leaves out most of what a VMM stumbles over: which routing tables are
//! refused, when an event is lost, what may change on a live slot. Each such rule is a [`Case`] here.
//! The same cases run on the KVM in memory (`hv_core::fake`) and on `/dev/kvm`, so a rule that only
//! one of them has can't stay unnoticed. Where they disagree, KVM is right.
//!
//! What the suite needs beyond the traits is a [`Platform`]: guests that execute a few accesses, and
//! the requests the traits can't express. Nothing here knows which platform it runs on; a case that
//! a platform can't answer is *not applicable* and says why.
//!
//! ```text
//! let report = conformance::run(&platform, "");
//! println!("{report}");
//! assert!(report.conforms());
//! ```

mod bench;
mod case;
mod cases;
mod expect;
mod guest;
mod memory;
mod platform;
mod raw;
mod report;

pub use case::{Case, Checked, Kernels, Miss};
pub use cases::cases;
pub use guest::{GUEST_MEMORY, GUEST_PORTS, Guest, Seen};
pub use memory::pages;
pub use platform::{Platform, VcpuOf, VmOf};
pub use raw::{RawRequest, RawRoute};
pub use report::{Outcome, Report, Row, run};

#[cfg(doc)]
use crate::Hypervisor;
