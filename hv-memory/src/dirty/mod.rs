//! Which pages of guest memory were written, by the guest and by the VMM.
//!
//! The slot manager has it all under its lock and knows when a slot goes; what is here knows how KVM
//! tells, and forgets nothing that was read.

mod how;
mod pages;
mod rings;
mod tracker;
mod watch;
mod words;
mod writes;

pub use how::{DirtyError, DirtyTracking};
pub use pages::{DirtyPages, DirtyRanges};
pub(crate) use tracker::{Logging, Slots, Tracker};
pub use writes::WriteLog;
