//! What a caller asks of init, as plain data.

use crate::{CoalescedZone, DeviceChoice, IoEvent, MemorySlot};

/// The base page of an x86 guest in bytes: the unit of memory slots.
pub const GUEST_PAGE_SIZE: u64 = 4096;

/// The interrupt controllers KVM has of a VM. As a request it is met or refused, never replaced by
/// another one; in the [`super::Record`] it is what the VM got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Irqchip {
    /// None: the VMM has all of them and injects every interrupt.
    Off,
    /// PICs, I/O APIC and local APICs (`KVM_CREATE_IRQCHIP`).
    Kernel {
        /// With the 8254 timer, its speaker port a dummy (`KVM_CREATE_PIT2`).
        pit: bool,
    },
    /// Local APICs only (`KVM_CAP_SPLIT_IRQCHIP`); the VMM has PICs, I/O APIC and timer.
    Split {
        /// Routes 0 to `pins` - 1 are reserved for the pins of the VMM's I/O APIC; 24 on a PC.
        pins: u32,
    },
}

/// What [`super::init`] is asked for.
///
/// ```
/// use hv_core::init::{Config, Irqchip};
/// let mut config = Config::new(4096, 2);
/// config.irqchip = Irqchip::Split { pins: 24 };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// The KVM to use; `/dev/kvm`.
    pub device: DeviceChoice,
    /// The host's page size in bytes (`sysconf(_SC_PAGESIZE)`).
    pub host_page_size: u64,
    /// How many vCPUs the VM will have.
    pub vcpus: u32,
    /// The highest vCPU id (APIC id) it will have, where ids have gaps; at least `vcpus` - 1.
    pub highest_vcpu_id: u32,
    /// The VM type for `KVM_CREATE_VM`; 0.
    pub vm_type: u64,
    /// The interrupt controllers; all of them in the kernel, with the timer.
    pub irqchip: Irqchip,
    /// Limits the pages of the shadow MMU (`KVM_SET_NR_MMU_PAGES`); not set.
    pub nr_mmu_pages: Option<u64>,
    /// Go on without `KVM_CAP_JOIN_MEMORY_REGIONS_WORKS`: the caller then never joins slots, but adds
    /// the old part again beside the new one. No.
    pub accept_broken_memory_regions: bool,
    /// Memory slots, set before anything that would make KVM wait for a grace period to add one.
    pub slots: Vec<MemorySlot>,
    /// ioeventfds, assigned after the irqchip. The caller keeps the descriptors.
    pub ioeventfds: Vec<IoEvent>,
    /// Coalesced zones, registered after the irqchip.
    pub coalesced_zones: Vec<CoalescedZone>,
    /// Probe whether one port takes seven ioeventfds; no. Removing them makes KVM wait for a grace
    /// period: 7 ms and more of a start, measured on Linux 6.18; closing a second VM that had them
    /// waits as long. The answer can be no before Linux 2.6.34 only, where an I/O bus had room for
    /// six devices, and those kernels lack required capabilities.
    pub probe_many_ioeventfds: bool,
}

impl Config {
    /// What [`super::init`] does by default on a host with this page size, for this many vCPUs.
    #[must_use]
    pub fn new(host_page_size: u64, vcpus: u32) -> Self {
        Self {
            device: DeviceChoice::default(),
            host_page_size,
            vcpus,
            highest_vcpu_id: 0,
            vm_type: 0,
            irqchip: Irqchip::Kernel { pit: true },
            nr_mmu_pages: None,
            accept_broken_memory_regions: false,
            slots: Vec::new(),
            ioeventfds: Vec::new(),
            coalesced_zones: Vec::new(),
            probe_many_ioeventfds: false,
        }
    }
}
