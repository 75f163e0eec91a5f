//! A GDB server: `hv run --gdb`.
//!
//! Each vCPU is a thread; when one stops, all do. The protocol is gdbstub's; what happens to the
//! machine is decided by [`Debugger`], which the vCPU threads share with the server's thread, and with
//! the machine's control, which pauses it. Without `--gdb` and `--api-socket` there is none of that, and the
//! run loop is the same: it asks at exits that are rare anyway.
//!
//! # What works where
//!
//! | | on hardware virtualization | on software KVM |
//! | --- | --- | --- |
//! | registers, memory | yes | yes |
//! | software breakpoints (INT3 in guest memory) | `KVM_EXIT_DEBUG` | in kernels, not in real mode: the INT3 is an emulation failure |
//! | hardware breakpoints | yes | in kernels |
//! | watchpoints | yes | no, refused |
//! | single step | yes | in kernels |
//!
//! The second column is what this is tested on (`tests/kvm_gdb.rs`). The first is how KVM documents it;
//! the code for it is tested on mocks. What else such a host answers with is asserted in hv-kvm's
//! `tests/kvm_debug.rs`.
//!
//! A breakpoint is put where its address is mapped when it is set. Before a kernel has its page
//! tables, use `hbreak`, which needs no mapping. Memory is read by the page tables of the thread that is
//! selected, RAM only; a device is never touched. In real mode and with segments that have a base, RIP
//! is an offset, but addresses of memory are linear.
//!
//! # What a debugger can't do
//!
//! Harm the host's side. A packet that is too long or makes no sense, a lost connection or an end by
//! a signal is as a detach: breakpoints go, and the guest goes on. A guest that waits for its first
//! debugger (`--gdb-wait`) waits on until one lets it go or detaches.

mod address;
mod breakpoints;
mod debugger;
mod limits;
mod memory;
mod registers;
mod server;
mod socket;
mod target;
#[cfg(test)]
mod tests;
mod wire;

pub use address::{GdbAddress, ParseGdbAddressError};
pub use debugger::{Action, Debugger, HoldError, Setup, Waker, Why};
pub use server::Server;
pub use socket::{ListenError, Listener};
