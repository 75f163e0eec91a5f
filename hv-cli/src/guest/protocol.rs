//! What the guest and the host agree on: ports, addresses, vectors.
//!
//! The assembly gets these as constants, so each is written down once.

/// First port of the check device.
pub const PORTS: u16 = 0x500;
/// Ports it takes.
pub const PORTS_LEN: u64 = 0x40;
/// First address of the check device's MMIO page.
pub const MMIO: u64 = 0xd000_0000;
/// Bytes of MMIO: the page, and behind it the read-only page, whose writes come out as MMIO.
pub const MMIO_LEN: u64 = 0x2000;
/// The page of read-only memory, a slot of its own.
pub const ROM: u64 = MMIO + 0x1000;

/// Ports, as offsets from [`PORTS`]. All but `DATA` and `STRING` are 4 bytes wide.
pub(super) mod port {
    /// Write: this check begins.
    pub(in crate::guest) const BEGIN: u16 = 0x00;
    /// Write: something the check observed.
    pub(in crate::guest) const VALUE: u16 = 0x04;
    /// Write: this check is done.
    pub(in crate::guest) const DONE: u16 = 0x08;
    /// Write: all checks are done.
    pub(in crate::guest) const END: u16 = 0x0c;
    /// Read: bit n says whether check n is to run.
    pub(in crate::guest) const CHECKS: u16 = 0x10;
    /// Write: send the interrupt with this vector, one of `vector::MSI` and `vector::IRQFD`.
    pub(in crate::guest) const SEND: u16 = 0x14;
    /// Write: this exception happened; the last three values are error code, RIP and CR2.
    pub(in crate::guest) const FAULT: u16 = 0x18;
    /// Read: a value of the host's choice; write: anything.
    pub(in crate::guest) const DATA: u16 = 0x20;
    /// The same, for string instructions.
    pub(in crate::guest) const STRING: u16 = 0x24;
}

/// Registers of the MMIO page, as offsets from [`MMIO`].
pub(super) mod mmio {
    /// Read: a value of the host's choice; write: anything.
    pub(in crate::guest) const DATA: u64 = 0x000;
    /// The same, for string instructions: [`STRING_LEN`] bytes.
    pub(in crate::guest) const STRING: u64 = 0x100;
    /// Eight accesses each of 1, 2, 4 and 8 bytes.
    pub(in crate::guest) const STRING_LEN: u64 = 8 * (1 + 2 + 4 + 8);
    /// The ioeventfd: 4-byte writes of [`super::DOORBELL_VALUE`] don't leave the kernel.
    pub(in crate::guest) const DOORBELL: u64 = 0x800;
    /// Where the guest reads and writes the read-only page.
    pub(in crate::guest) const ROM: u64 = 0x1010;
}

/// Where the doorbell is: the address of the ioeventfd, 4 bytes long.
pub const DOORBELL: u64 = MMIO + mmio::DOORBELL;
/// What the guest writes to ring it: the value of the ioeventfd.
pub const DOORBELL_VALUE: u32 = 0x0be1_1000;
/// Another value, which the ioeventfd must let pass.
pub(super) const DOORBELL_OTHER: u32 = 0x0be1_1001;
/// How often the guest rings it.
pub(super) const DOORBELL_RINGS: u64 = 3;

/// Interrupt vectors. All are below [`vector::COUNT`].
pub(super) mod vector {
    /// The PIT, through I/O APIC pin 2.
    pub(in crate::guest) const PIT: u32 = 0x30;
    /// I/O APIC pin 0, where the PIT must not arrive.
    pub(in crate::guest) const PIN0: u32 = 0x31;
    /// The local APIC's timer.
    pub(in crate::guest) const TIMER: u32 = 0x32;
    /// The message the host sends with `KVM_SIGNAL_MSI`.
    pub(in crate::guest) const MSI: u32 = 0x33;
    /// The message of the irqfd.
    pub(in crate::guest) const IRQFD: u32 = 0x34;
    /// From the boot CPU to the second.
    pub(in crate::guest) const PING: u32 = 0x35;
    /// The second CPU's answer.
    pub(in crate::guest) const PONG: u32 = 0x36;
    /// COM1, through its I/O APIC pin.
    pub(in crate::guest) const COM1: u32 = 0x37;
    /// Spurious interrupts of the local APIC.
    pub(in crate::guest) const SPURIOUS: u32 = 0x3f;
    /// Gates of the IDT.
    pub(in crate::guest) const COUNT: u32 = 0x40;
}

/// What the guest sends itself through COM1 in loopback mode.
pub(super) const LOOPBACK: u8 = 0x96;
/// What the guest sends on COM1.
pub(super) const BANNER: &str = "hello from the built-in guest\r\n";
