//! A KVM in memory, with KVM's rules, for tests without `/dev/kvm`.
//!
//! [`FakeKvm`] implements the traits of this crate and answers as KVM does: to illegal routing tables,
//! overlapping slots, a wrong order of creation, irqfds on GSIs that don't exist. It delivers: a
//! signalled irqfd, a line or a message goes through the routing table, the I/O APIC, the 8259 pair and
//! the local APICs to a log of each vCPU; is lost where KVM loses it, and kept where KVM keeps it.
//! eventfds are real ones. What a guest writes reaches memory, dirty bits or rings, ioeventfds and
//! coalesced zones, or comes out as an exit.
//!
//! - What the host is like is said by a [`FakeHost`]: capabilities (on either descriptor), limits.
//! - What the guest does is said by [`GuestStep`]s, which a vCPU works off when it is run, or by the
//!   `guest_…` methods of [`VmView`], which need no vCPU thread.
//! - What happened is asked of [`FakeKvm`] (calls by kind, what is still held) and [`VmView`] (routes,
//!   slots, irqfds, interrupts).
//! - What KVM silently lets pass, but nobody wants, is a [`Finding`].
//!
//! ```
//! use hv_core::fake::{FakeHost, FakeKvm, GuestStep, Seen};
//! use hv_core::init::{Config, Irqchip, init};
//! use hv_core::{IoAddress, Vcpu, VcpuExit, Vm};
//!
//! let host = FakeHost::default().guest(0, [
//!     // The version register of the local APIC, which the kernel has.
//!     GuestStep::read(IoAddress::Mmio(0xfee0_0030), 4),
//!     GuestStep::write(IoAddress::Pio(0x3f8), *b"A"),
//! ]);
//! let kvm = FakeKvm::new(host);
//! let mut config = Config::new(4096, 1);
//! config.irqchip = Irqchip::Kernel { pit: true };
//! let vm = init(|_| Ok(kvm.clone()), &config)?;
//!
//! let mut vcpu = vm.vm().create_vcpu(0)?;
//! assert!(matches!(vcpu.run()?, VcpuExit::Io(io) if io.port == 0x3f8));
//! let version = Seen::Read { address: IoAddress::Mmio(0xfee0_0030), data: vec![0x14, 0, 5, 0] };
//! assert_eq!(vm.vm().view().take_seen(0), [version]);
//! drop((vcpu, vm));
//! assert_eq!(kvm.live().vms, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What it does not do: run code, tick (timers, clocks and the PIT stand still), x2APIC mode, and
//! system management mode. A descriptor of an eventfd that was duplicated other than by cloning its
//! [`EventFd`](crate::EventFd) does not keep an irqfd. Every call settles first: signals that were
//! made before it count before it.

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
#[cfg(test)]
mod tests;
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
