#![doc = include_str!("../README.md")]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("hv-kvm is for KVM on 64-bit x86 Linux");

mod coalesced;
mod dirty_ring;
mod exit;
mod irq;
mod kick;
mod layout;
mod memory;
mod open;
mod raw;
mod run_page;
mod system;
mod vcpu;
mod vm;

pub use kick::{KICK_SIGNAL, KvmKick};
pub use system::Kvm;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;
