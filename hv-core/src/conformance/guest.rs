//! Guests that do what a case tells them, one access at a time.

use std::ops::Range;

use super::Miss;
use crate::{IoAddress, Vcpu, VcpuExit};

/// What became of a guest's access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// KVM served it: memory, an in-kernel device, an ioeventfd or a coalesced zone. Nothing
    /// came to the VMM.
    ByKernel,
    /// It came to the VMM as this exit.
    ByVmm(VcpuExit),
}

/// Guest-physical addresses of the guests' own code and tables: 64 KiB per vCPU, for ids up to 255.
pub const GUEST_MEMORY: Range<u64> = 0xd000_0000..0xd100_0000;

/// Ports by which guests talk to their platform.
pub const GUEST_PORTS: Range<u16> = 0x5a0..0x5a4;

/// Guest code on one vCPU, told step by step what to do.
///
/// It begins with its interrupts off, and its local APIC, if the VM has an irqchip, enabled with
/// spurious vector 0xff; everything else is as after reset. It needs what no case may use: for
/// vCPU n slot `KVM_CAP_NR_MEMSLOTS - 1 - n`, 64 KiB of [`GUEST_MEMORY`] and [`GUEST_PORTS`].
///
/// Interrupts are only taken in [`Guest::take_interrupts`], where each is in service until it is
/// ended: as on hardware, one in service holds back those of its own and lower classes
/// (vector / 16). Not every implementation does that: some end an interrupt when it is taken, or at
/// least one whose end nobody waits for. A case that depends on it looks at the in-service register.
///
/// On a vCPU whose dirty ring is full an access ends with [`VcpuExit::DirtyRingFull`] instead, and may
/// have been made or not.
pub trait Guest {
    /// The vCPU it runs on.
    type Vcpu: Vcpu;

    /// Its vCPU, to look at or change state while the guest does nothing.
    fn vcpu(&mut self) -> &mut Self::Vcpu;

    /// Writes 1, 2, 4 or (not to a port) 8 bytes with one instruction.
    ///
    /// # Errors
    /// A [`Miss`] if the guest stopped with anything but this access.
    fn write(&mut self, address: IoAddress, data: &[u8]) -> Result<Seen, Miss>;

    /// Reads 1, 2, 4 or (not from a port) 8 bytes with one instruction. If that comes to the
    /// VMM, it answers with all bits set.
    ///
    /// # Errors
    /// A [`Miss`] if the guest stopped with anything but this access.
    fn read(&mut self, address: IoAddress, data: &mut [u8]) -> Result<Seen, Miss>;

    /// Takes the interrupts that are pending and not held back, in the order they are taken, by
    /// their vectors (2 is a non-maskable one). None of them is ended.
    ///
    /// # Errors
    /// A [`Miss`] if the guest stopped with something else.
    fn take_interrupts(&mut self) -> Result<Vec<u8>, Miss>;

    /// Ends the interrupt of the highest priority in service at the local APIC, which is `vector`:
    /// a write of 0 to its EOI register. [`Seen::ByVmm`] if the VMM was told
    /// ([`VcpuExit::IoapicEoi`]), now or already when the interrupt was taken.
    ///
    /// # Errors
    /// A [`Miss`] if the guest stopped with something else.
    fn end_of_interrupt(&mut self, vector: u8) -> Result<Seen, Miss>;
}
