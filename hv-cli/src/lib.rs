//! `hv`, a virtual machine monitor made of the hv crates: the library behind the binary.
//!
//! It is the reference for how the crates fit together: hv-core's `init` makes the VM, hv-memory its
//! memory, hv-irq its interrupts, and hv-kvm does it all over `/dev/kvm`. Everything here is generic
//! over [`hv_core::Hypervisor`], so it is tested without hardware.

pub mod acpi;
pub mod api;
pub mod cli;
pub mod complete;
pub mod config;
pub mod config_file;
pub mod console;
pub mod ctl;
mod device;
pub mod devices;
pub mod doctor;
pub mod event;
pub mod exit_code;
pub mod gdb;
pub mod guest;
pub mod isolation;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod observe;
pub mod output;
pub mod pci;
pub mod probe;
pub mod run;
pub mod socket;
pub mod stats;
pub mod terminal;
pub mod virtio;
