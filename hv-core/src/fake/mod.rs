//! A KVM in memory, with KVM's rules.

mod findings;
mod io;
mod memory;

pub use findings::{Finding, Leftover, Loss};
