//! What a vCPU of the fake runs instead of code: a script of accesses.
//!
//! A step does what an instruction would do on KVM: what the kernel serves happens without the
//! VMM, everything else is an exit.

use super::irq::Interrupt;
use crate::{ExitReply, IoAddress, VcpuExit};

/// One thing a guest does.
///
/// ```
/// use hv_core::fake::{FakeHost, FakeKvm, GuestStep};
/// use hv_core::{ExitReply, Hypervisor, IoAddress, MmioExit, Vcpu, VcpuExit, Vm};
///
/// let host = FakeHost::default().guest(0, [
///     GuestStep::write(IoAddress::Pio(0x3f8), b"A"),
///     GuestStep::read(IoAddress::Mmio(0xd000_0000), 4),
/// ]);
/// let vm = FakeKvm::new(host).create_vm(0)?;
/// let mut vcpu = vm.create_vcpu(0)?;
/// assert!(matches!(vcpu.run()?, VcpuExit::Io(io) if io.port == 0x3f8));
/// assert_eq!(vcpu.io_data(), b"A");
/// let read = MmioExit { address: 0xd000_0000, len: 4, written: None };
/// assert_eq!(vcpu.run()?, VcpuExit::Mmio(read));
/// vcpu.reply(ExitReply::Mmio(*b"abcd\0\0\0\0"));
/// assert_eq!(vcpu.run()?, VcpuExit::Hlt);
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestStep {
    /// Writes. To memory of a slot, in the pages it has; to a device, in pieces of at most 8 bytes
    /// that cross no page. To a port, 1, 2 or 4 bytes are one access, any other number a string of
    /// bytes.
    Write {
        /// Where.
        address: IoAddress,
        /// What.
        data: Vec<u8>,
    },
    /// Reads, in the same pieces. What was read is told by [`super::VmView::take_seen`].
    Read {
        /// Where.
        address: IoAddress,
        /// Bytes.
        len: u16,
    },
    /// Ends an interrupt at the local APIC. A real guest does not say which: its APIC ends the one of
    /// highest priority, and so does a [`GuestStep::Write`] to the EOI register at `0xfee0_00b0`.
    EndOfInterrupt(u8),
    /// Takes all interrupts that are pending, by priority, whatever the interrupt flag says. Told by
    /// [`super::VmView::take_seen`].
    TakeInterrupts,
    /// Halts until an interrupt is pending, which it does not take. Without an in-kernel irqchip
    /// that is [`VcpuExit::Hlt`].
    WaitForInterrupt,
    /// Makes this exit, with this as its data if it is port I/O.
    Exit(VcpuExit, Vec<u8>),
}

impl GuestStep {
    /// [`GuestStep::Write`].
    #[must_use]
    pub fn write(address: IoAddress, data: impl Into<Vec<u8>>) -> Self {
        GuestStep::Write { address, data: data.into() }
    }

    /// [`GuestStep::Read`].
    #[must_use]
    pub fn read(address: IoAddress, len: u16) -> Self {
        GuestStep::Read { address, len }
    }

    /// [`GuestStep::Exit`] without data.
    #[must_use]
    pub fn exit(exit: VcpuExit) -> Self {
        GuestStep::Exit(exit, Vec::new())
    }
}

/// What a guest got to see.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Seen {
    /// What it read, from memory, from a chip of the kernel or from the VMM.
    Read {
        /// Where.
        address: IoAddress,
        /// What.
        data: Vec<u8>,
    },
    /// The interrupts it took.
    Interrupts(Vec<Interrupt>),
    /// What the VMM answered to an exit that is no read.
    Reply(ExitReply),
}
