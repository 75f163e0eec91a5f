//! A KVM in memory, with KVM's rules.

mod findings;
mod io;
mod irq;
mod memory;

pub use findings::{Finding, Leftover, Loss};
pub use irq::{Interrupt, Kind};
