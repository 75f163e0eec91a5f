//! Requests that KVM takes and the traits can't express, because nobody should make them.

use std::os::fd::RawFd;

use crate::MemorySlot;

/// One `struct kvm_irq_routing_entry`, field by field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawRoute {
    /// `gsi`.
    pub gsi: u32,
    /// `type`.
    pub kind: u32,
    /// `flags`.
    pub flags: u32,
    /// The union `u`: chip and pin; or the message's low and high address, data and device id.
    pub words: [u32; 4],
}

/// A request with fields as KVM has them.
///
/// Whatever is asked, the platform must stay sound: memory that KVM should take by mistake is
/// never let go.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RawRequest {
    /// `KVM_SET_GSI_ROUTING`.
    SetGsiRouting {
        /// Flags of the table.
        flags: u32,
        /// The entries.
        entries: Vec<RawRoute>,
    },
    /// `KVM_IRQFD`, with descriptors by number.
    Irqfd {
        /// `fd`.
        fd: RawFd,
        /// `gsi`.
        gsi: u32,
        /// `flags`: bit 0 deassign, bit 1 resample.
        flags: u32,
        /// `resamplefd`.
        resample: RawFd,
    },
    /// `KVM_SIGNAL_MSI`.
    SignalMsi {
        /// The low half of the address.
        address: u32,
        /// The message.
        data: u32,
        /// `flags`: bit 0 is `KVM_MSI_VALID_DEVID`.
        flags: u32,
        /// `devid`.
        device: u32,
    },
    /// `KVM_IOEVENTFD`, with a descriptor by number.
    Ioeventfd {
        /// `addr`.
        address: u64,
        /// `len`.
        length: u32,
        /// `fd`.
        fd: RawFd,
        /// `flags`: bit 0 datamatch, bit 1 pio, bit 2 deassign.
        flags: u32,
        /// `datamatch`.
        datamatch: u64,
    },
    /// `KVM_SET_USER_MEMORY_REGION` of a slot with all bits of its flags given.
    SetMemorySlot {
        /// The slot; its `flags` are not looked at.
        slot: MemorySlot,
        /// `flags`.
        flags: u32,
    },
    /// `KVM_SET_USER_MEMORY_REGION` with a host address that is not canonical, so no process can
    /// have it.
    NonCanonicalMemory {
        /// `slot`.
        slot: u32,
        /// `guest_phys_addr`.
        guest: u64,
        /// `memory_size`.
        size: u64,
    },
    /// `KVM_SET_USER_MEMORY_REGION` of size 0, the other fields as given.
    DeleteMemorySlot {
        /// `slot`.
        slot: u32,
        /// `flags`.
        flags: u32,
        /// `guest_phys_addr`.
        guest: u64,
        /// `userspace_addr`.
        host: u64,
    },
    /// `KVM_REGISTER_COALESCED_MMIO` or `KVM_UNREGISTER_COALESCED_MMIO`.
    CoalescedZone {
        /// Whether it is registered.
        register: bool,
        /// `addr`.
        address: u64,
        /// `size`.
        size: u32,
        /// `pio`: 1 for a port.
        pio: u32,
    },
    /// `KVM_CLEAR_DIRTY_LOG` with a null bitmap, for what is refused before it is looked at.
    ClearDirtyLog {
        /// `slot`.
        slot: u32,
        /// `first_page`.
        first: u64,
        /// `num_pages`.
        pages: u32,
    },
    /// `KVM_ENABLE_CAP` on the VM.
    EnableCap {
        /// `cap`.
        cap: u32,
        /// `flags`.
        flags: u32,
        /// `args`.
        args: [u64; 4],
    },
}
