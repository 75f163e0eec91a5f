//! A KVM in memory, with KVM's rules.

mod findings;

pub use findings::{Finding, Leftover, Loss};
