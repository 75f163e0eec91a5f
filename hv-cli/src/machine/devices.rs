//! The PCI bus of a machine and the virtio devices on it.
//!
//! A machine that is given no such device has no bus either: it makes the same calls, and shows its
//! guest the same, as before there were any.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use hv_core::init::Record;
use hv_core::{IoEventBackend, IrqBackend};
use hv_irq::RouterError;
use hv_memory::IoEventRegistry;
use hv_memory::RamMemory;
use vm_memory::GuestMemoryBackend;

use super::bus::BusError;
use super::exits::Outside;
use super::host::HostFacts;
use super::interrupts::Interrupts;
use crate::config::{MemorySize, VirtioConfig};
use crate::layout;
use crate::pci::{Ecam, PciBus, PciError, Window, Windows};
use crate::stats::DeviceStats;
use crate::virtio::{
    Blk, Counters, DiskError, Net, NetError, Passt, Platform, Rng, VirtioDevice, VirtioError,
    VirtioPci, Vsock, VsockError,
};

/// Why the devices can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// They don't fit on the bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A disk can't be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// One of them can't be made.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// A network device can't be connected.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Interrupts could not be set up.
    #[error("PCI interrupts: {0}")]
    Interrupts(#[from] RouterError),
    /// There can't be a way to the guest's sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// More is to be in the balloon than there is.
    #[error("--balloon {asked} is more than --memory {memory}: ask for less")]
    Balloon {
        /// What was asked for.
        asked: MemorySize,
        /// What there is.
        memory: MemorySize,
    },
    /// There is no descriptor for one of them.
    #[error("virtio devices: {0}; raise the limit of open files (ulimit -n)")]
    System(#[from] io::Error),
    /// This KVM can't raise message-signalled interrupts by eventfds.
    #[error("virtio devices need interrupts by eventfd (KVM_CAP_IRQFD), which this KVM lacks")]
    NoIrqfds,
}

/// The bus and its devices. The ledger of ioeventfds goes first: what it has goes with the VM, which
/// costs less than removing each.
pub(super) struct Devices<V: IoEventBackend> {
    ioeventfds: Option<Arc<IoEventRegistry<V>>>,
    bus: Option<Arc<PciBus>>,
    devices: Vec<Device>,
    /// After the devices they were started for.
    passts: Vec<Passt>,
}

/// What is known of a device besides the device.
#[derive(Clone)]
struct Device {
    name: String,
    slot: u8,
    counters: Arc<Counters>,
}

/// A virtio device and its name.
pub(super) type Named = (String, Box<dyn VirtioDevice>);

/// Devices, and the programs that were started for them. Those are ended by the main thread: the thread
/// of a device may reach no other process.
#[derive(Default)]
pub(super) struct Opened {
    devices: Vec<Named>,
    passts: Vec<Passt>,
}

impl Opened {
    /// Has further devices on the bus, after these.
    pub(super) fn extend(&mut self, devices: impl IntoIterator<Item = Named>) {
        self.devices.extend(devices);
    }
}

/// Opens what `config` asks for: the devices in the order of their slots. Nothing of it needs KVM.
///
/// # Errors
/// What can't be had of the host.
pub(super) fn open(config: &VirtioConfig) -> Result<Opened, DevicesError> {
    let Opened { mut devices, mut passts } = Opened::default();
    if config.rng {
        devices.push(("rng0".to_owned(), Box::new(Rng::new())));
    }
    for (index, disk) in config.disks.iter().enumerate() {
        devices.push((format!("disk{index}"), Box::new(Blk::open(disk)?)));
    }
    for (index, net) in config.nets.iter().enumerate() {
        let mut net = Net::open(net)?;
        passts.extend(net.take_passt());
        devices.push((format!("net{index}"), Box::new(net)));
    }
    if let Some(vsock) = &config.vsock {
        devices.push(("vsock0".to_owned(), Box::new(Vsock::new(vsock.cid, &vsock.path)?)));
    }
    Ok(Opened { devices, passts })
}

impl<V: IrqBackend + IoEventBackend + Send + Sync + 'static> Devices<V> {
    /// Puts these devices on a bus, each with its thread, which is idle. Without any there is nothing.
    ///
    /// # Errors
    /// What can't be had; nothing of it is left.
    pub(super) fn new(
        wanted: Opened,
        vm: &Arc<V>,
        record: &Record,
        memory: &RamMemory,
        host: &HostFacts,
        interrupts: &Interrupts<V>,
    ) -> Result<Self, DevicesError> {
        let Opened { devices: wanted, passts } = wanted;
        let mut this = Self { ioeventfds: None, bus: None, devices: Vec::new(), passts };
        if wanted.is_empty() {
            return Ok(this);
        }
        if !record.irqfds.msi {
            return Err(DevicesError::NoIrqfds);
        }
        this.ioeventfds = record.ioeventfds.then(|| Arc::new(IoEventRegistry::new(vm.clone())));
        let bus = Arc::new(PciBus::new(windows(memory, host)));
        this.bus = Some(bus.clone());
        let memory = Arc::new(memory.clone());
        for (name, device) in wanted {
            let line = interrupts.level(layout::PCI_IRQ, record)?;
            let platform = Platform {
                memory: memory.clone(),
                router: interrupts.router(),
                ioeventfds: this.ioeventfds.as_ref(),
                line: line.map(|pin| (layout::PCI_IRQ, pin)),
            };
            let function = VirtioPci::new(&name, device, platform)?;
            let counters = function.counters();
            let slot = bus.add(Box::new(function))?;
            this.devices.push(Device { name, slot, counters });
        }
        Ok(this)
    }

    /// The bus, if there is one.
    pub(super) fn bus(&self) -> Option<&Arc<PciBus>> {
        self.bus.as_ref()
    }

    /// Puts the bus where the guest looks for it, but for its ports.
    ///
    /// # Errors
    /// Something else is there.
    pub(super) fn attach(&self, outside: &mut Outside) -> Result<(), BusError> {
        let Some(bus) = &self.bus else { return Ok(()) };
        let memory = &mut outside.memory;
        super::build::put(memory, "PCI", layout::PCI_ECAM, Ecam::SIZE, Ecam::new(bus.clone()))?;
        let Windows { low, high } = bus.windows();
        for Range { start, end } in [Some(low), high].into_iter().flatten() {
            super::build::put(memory, "PCI", start, end - start, Window::new(bus.clone(), start))?;
        }
        Ok(())
    }

    /// What is counted, for others to look at.
    pub(super) fn counting(&self) -> DeviceCounting {
        DeviceCounting { bus: self.bus.clone(), devices: self.devices.clone() }
    }

    /// Ends the devices, after the last vCPU, and tells what they did.
    pub(super) fn stop(self) -> Vec<DeviceStats> {
        let Self { ioeventfds, bus, devices, passts } = self;
        drop(ioeventfds);
        if let Some(bus) = bus {
            bus.clear();
        }
        drop(passts);
        devices.iter().map(Device::stats).collect()
    }
}

/// What is counted of the bus and its devices.
#[derive(Default)]
pub(super) struct DeviceCounting {
    bus: Option<Arc<PciBus>>,
    devices: Vec<Device>,
}

impl DeviceCounting {
    /// How often the guest put a BAR where none can be.
    pub(super) fn refused_bars(&self) -> u64 {
        self.bus.as_ref().map_or(0, |bus| bus.refusals())
    }

    /// What the devices did until now.
    pub(super) fn stats(&self) -> Vec<DeviceStats> {
        self.devices.iter().map(Device::stats).collect()
    }
}

impl Device {
    fn stats(&self) -> DeviceStats {
        DeviceStats {
            name: self.name.clone(),
            slot: self.slot,
            counters: self.counters.values(),
            failure: self.counters.failure().map(|error| error.to_string()),
        }
    }
}

/// Where BARs can be: below 4 GiB where RAM is not, and above the last RAM if there are addresses.
fn windows(memory: &RamMemory, host: &HostFacts) -> Windows {
    let low = layout::PCI_WINDOW_START..layout::PCI_WINDOW_END;
    let ram_end = memory.last_addr().0.max(layout::MMIO_HOLE_END);
    let size = layout::PCI_HIGH_WINDOW;
    let start = ram_end.checked_next_multiple_of(size);
    let end = start.and_then(|start| start.checked_add(size));
    let most = 1 << host.physical_address_bits.min(52);
    let high = start.zip(end).filter(|(_, end)| *end <= most).map(|(start, end)| start..end);
    Windows { low, high }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn windows_are_beside_ram_and_within_the_address_bits() {
        let memory = |start, size| {
            RamMemory::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(start), size)]).unwrap()
        };
        let host = |bits| HostFacts { physical_address_bits: bits, ..HostFacts::detect() };
        let high = |start, bits| windows(&memory(start, 4096), &host(bits)).high;
        assert_eq!(high(0x1000, 36), Some(1 << 34..2 << 34));
        assert_eq!(high((1 << 34) - 0x1000, 36), Some(1 << 34..2 << 34));
        assert_eq!(high(1 << 34, 36), Some(2 << 34..3 << 34));
        assert_eq!(high(3 << 34, 36), None);
        assert_eq!(high(0x1000, 34), None);
    }
}
