//! `hv`, a virtual machine monitor made of the hv crates: the library behind the binary.
//!
//! It is the reference for how the crates fit together: hv-core's `init` makes the VM, hv-memory its
//! memory, hv-irq its interrupts, and hv-kvm does it all over `/dev/kvm`. Everything here is generic
//! over [`hv_core::Hypervisor`], so it is tested without hardware.

pub mod complete;
pub mod devices;
pub mod exit_code;
pub mod layout;
pub mod machine;
pub mod terminal;
