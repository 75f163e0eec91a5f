//! What the upper layers need of a VM, by concern: interrupts, memory, I/O events.
//!
//! Each trait is what one layer is generic over, small enough to mock. Every method is one ioctl.

use crate::{CoalescedZone, Error, EventFd, Gsi, IoEvent, Irqfd, LineStatus, MemorySlot, Msi};
use crate::{MsiStatus, Route, SlotId};

/// Interrupts of a VM. All methods need an irqchip, in the kernel or split.
pub trait IrqBackend {
    /// Replaces the whole routing table, KVM's default pins included (`KVM_SET_GSI_ROUTING`).
    ///
    /// # Errors
    /// `EINVAL` for an illegal table or without an irqchip; the previous table stays in force.
    fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error>;

    /// Binds an eventfd to a GSI (`KVM_IRQFD`). An eventfd that is already signalled delivers at
    /// once. KVM does not check the GSI.
    ///
    /// The caller must keep the eventfd open for as long as it is to work: closing its last
    /// descriptor unbinds it, without a word.
    ///
    /// # Errors
    /// `EBUSY` if the eventfd is already bound, since Linux 6.17 also if that is in another VM;
    /// `EINVAL` for a resample eventfd in split mode.
    fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error>;

    /// Unbinds an eventfd from a GSI (`KVM_IRQFD` with `KVM_IRQFD_FLAG_DEASSIGN`). A binding that
    /// does not exist is no error.
    ///
    /// # Errors
    /// `EINVAL` for a descriptor that is not an eventfd.
    fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error>;

    /// Sets an interrupt line (`KVM_IRQ_LINE`).
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel irqchip.
    fn irq_line(&self, gsi: Gsi, level: bool) -> Result<(), Error>;

    /// Sets an interrupt line and says what became of it (`KVM_IRQ_LINE_STATUS`, needs
    /// `KVM_CAP_IRQ_INJECT_STATUS`).
    ///
    /// # Errors
    /// `ENXIO` without an in-kernel irqchip.
    fn irq_line_status(&self, gsi: Gsi, level: bool) -> Result<LineStatus, Error>;

    /// Sends a message without a route (`KVM_SIGNAL_MSI`, needs `KVM_CAP_SIGNAL_MSI`).
    ///
    /// # Errors
    /// `EINVAL` without an irqchip. A message without a target is no error.
    fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error>;
}

/// Memory of a VM.
pub trait MemoryBackend {
    /// Creates a slot, moves it to another guest address, or changes whether it logs dirty pages
    /// (`KVM_SET_USER_MEMORY_REGION`). The backend keeps the slot's host memory alive until the
    /// slot is deleted or the VM is gone.
    ///
    /// # Errors
    /// `EEXIST` for an overlap; `EINVAL` for misalignment, a slot id beyond the limit, or a change
    /// that a live slot does not allow.
    fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error>;

    /// Deletes a slot (`KVM_SET_USER_MEMORY_REGION` with size 0). Its dirty bits go with it.
    ///
    /// # Errors
    /// `EINVAL` for a slot that does not exist.
    fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error>;

    /// Reads, and unless manual protection is enabled clears, the dirty bits of a slot
    /// (`KVM_GET_DIRTY_LOG`): bit n of word n / 64 is page n of the slot.
    ///
    /// # Errors
    /// `ENOENT` for a slot that is absent or does not log; `ENXIO` with a dirty ring; `EINVAL` for a
    /// bad id, or a bitmap with fewer words than the slot has blocks of 64 pages.
    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error>;

    /// Clears dirty bits of `pages` pages from `first` and protects those pages again
    /// (`KVM_CLEAR_DIRTY_LOG`, needs manual protection).
    ///
    /// # Errors
    /// `EINVAL` if `first` is no multiple of 64, `pages` is none and does not reach the end, the range
    /// passes the end, or the bitmap has fewer words than the range has blocks of 64 pages.
    fn clear_dirty_log(
        &self,
        id: SlotId,
        first: u64,
        pages: u32,
        bitmap: &[u64],
    ) -> Result<(), Error>;

    /// Takes back what was collected from the dirty rings of all vCPUs, and protects those pages
    /// again (`KVM_RESET_DIRTY_RINGS`, needs `KVM_CAP_DIRTY_LOG_RING` or `_ACQ_REL` to be enabled):
    /// how many entries. A signal may end it early, and then there are some left.
    ///
    /// # Errors
    /// `EINVAL` without dirty rings.
    fn reset_dirty_rings(&self) -> Result<u32, Error>;

    /// Lets KVM collect the writes to a zone (`KVM_REGISTER_COALESCED_MMIO`), to
    /// be taken by [`Vcpu::take_coalesced_write`](crate::Vcpu::take_coalesced_write).
    ///
    /// # Errors
    /// `ENOSPC` beyond the limit of zones.
    fn register_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error>;

    /// Ends that (`KVM_UNREGISTER_COALESCED_MMIO`). A zone that does not exist is no error. What it
    /// has collected stays to be taken.
    ///
    /// # Errors
    /// `EINVAL` for an unknown address space.
    fn unregister_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error>;
}

/// Doorbells of a VM.
pub trait IoEventBackend {
    /// Lets a guest write signal an eventfd (`KVM_IOEVENTFD`).
    ///
    /// # Errors
    /// `EEXIST` if one covers the same write, `EINVAL` for a bad length or descriptor, `ENOSPC` beyond
    /// the limit.
    fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error>;

    /// Ends that (`KVM_IOEVENTFD` with `KVM_IOEVENTFD_FLAG_DEASSIGN`).
    ///
    /// # Errors
    /// `ENOENT` unless address, length, value and eventfd all match.
    fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error>;
}
