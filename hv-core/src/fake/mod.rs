//! A KVM in memory, with KVM's rules.

mod backends;
mod bus;
mod count;
mod findings;
mod guest;
mod host;
mod io;
mod irq;
mod kick;
mod kvm;
mod memory;
mod paging;
mod registers;
mod run;
mod state;
mod vcpu;
mod view;
mod vm;

pub use bus::Wrote;
pub use count::{CallCounts, Live};
pub use findings::{Finding, Leftover, Loss};
pub use guest::{GuestStep, Seen};
pub use host::FakeHost;
pub use irq::{Interrupt, Kind};
pub use kick::FakeKick;
pub use kvm::FakeKvm;
pub use vcpu::FakeVcpu;
pub use view::VmView;
pub use vm::FakeVm;
