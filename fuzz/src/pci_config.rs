//! What a guest writes to configuration space, by the ports 0xcf8 and 0xcfc and by ECAM, and to BARs it
//! has moved anywhere.
//!
//! On the bus are the host bridge, functions with BARs of all kinds, and a virtio device on the KVM in
//! memory. After each step the mapped BARs must be apart and in the windows, and KVM must have the
//! doorbells of the virtio device where its BAR is.

use std::sync::Arc;

use hv_cli::machine::bus::Device;
use hv_cli::pci::{
    Bar, BarKind, ConfigPorts, ConfigSpace, Ecam, Identity, MEMORY_SPACE, PciBus, PciFunction,
    Window, Windows,
};
use hv_cli::virtio::registers::{NOTIFY, REGISTER_BAR};
use hv_cli::virtio::{Platform, Rng, VirtioPci};
use hv_core::fake::{FakeKvm, FakeVm, Finding};
use hv_core::{Hypervisor, IoAddress, Vm};
use hv_irq::{IrqRouter, LegacyPins, RouterConfig};
use hv_memory::{IoEventRegistry, RamMemory};
use vm_memory::GuestAddress;

use crate::Input;

const LOW: std::ops::Range<u64> = 0xc000_0000..0xc040_0000;
const HIGH: std::ops::Range<u64> = 0x4_0000_0000..0x4_0100_0000;

/// Slots of the bus that have something, and one that has not.
const SLOTS: usize = 5;
const VIRTIO: u8 = 3;

/// A function whose BARs answer with their number, and which knows where they are.
struct Plain {
    config: ConfigSpace,
    at: [Option<u64>; 6],
}

impl Plain {
    fn new(bars: &[(u8, BarKind, u64)]) -> Self {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let mut config = ConfigSpace::new(&identity);
        for &(index, kind, size) in bars {
            let bar = Bar { index, kind, size, prefetchable: kind == BarKind::Memory64 };
            config.add_bar(bar).expect("a BAR");
        }
        config.add_capability(9, &[0; 12], &[0xff; 12]).expect("a capability");
        Self { config, at: [None; 6] }
    }

    fn check(&self, bar: u8, offset: u64, len: usize) {
        let size = self.config.bars().iter().find(|b| b.index == bar).map_or(0, |b| b.size);
        assert!(self.at[usize::from(bar)].is_some(), "an access to BAR {bar}, which is nowhere");
        assert!(offset < size && len as u64 <= size - offset, "past the end of BAR {bar}");
    }
}

impl PciFunction for Plain {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        self.check(bar, offset, data.len());
        data.fill(bar);
    }
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.check(bar, offset, data.len());
    }
    fn bar_mapped(&mut self, bar: u8, address: Option<u64>) {
        self.at[usize::from(bar)] = address;
    }
}

struct Nothing;

impl Device for Nothing {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

struct Bench {
    bus: Arc<PciBus>,
    ports: ConfigPorts<Nothing>,
    ecam: Ecam,
    windows: [(std::ops::Range<u64>, Window); 2],
    ioeventfds: Arc<IoEventRegistry<FakeVm>>,
    vm: Arc<FakeVm>,
}

/// Runs a program.
pub fn run(data: &[u8]) {
    let kvm = FakeKvm::default();
    let vm = Arc::new(kvm.create_vm(0).expect("a VM"));
    vm.create_irqchip().expect("an irqchip");
    let router = RouterConfig::new(4096, LegacyPins::Kernel);
    let router = IrqRouter::new(vm.clone(), router).expect("a router");
    let ioeventfds = Arc::new(IoEventRegistry::new(vm.clone()));
    let ranges = [(GuestAddress(0), 0x1_0000)];
    let memory = Arc::new(RamMemory::from_ranges(&ranges).expect("memory"));
    let platform = Platform { memory, router: &router, ioeventfds: Some(&ioeventfds), line: None };
    let virtio = VirtioPci::new("rng", Box::new(Rng::new()), platform).expect("descriptors");

    use BarKind::{Memory32, Memory64};
    let bus = Arc::new(PciBus::new(Windows { low: LOW, high: Some(HIGH) }));
    let all =
        [(0, Memory32, 16), (1, Memory64, 0x1000), (3, Memory32, 0x8_0000), (4, Memory64, 32)];
    let large = [(0, Memory64, 1 << 20), (2, Memory64, 0x4000), (5, Memory32, 0x100)];
    bus.add(Box::new(Plain::new(&all))).expect("a slot");
    bus.add(Box::new(Plain::new(&large))).expect("a slot");
    assert_eq!(bus.add(Box::new(virtio)), Ok(VIRTIO));

    let mut bench = Bench {
        ports: ConfigPorts::new(bus.clone(), Nothing),
        ecam: Ecam::new(bus.clone()),
        windows: [LOW, HIGH].map(|range| (range.clone(), Window::new(bus.clone(), range.start))),
        bus,
        ioeventfds,
        vm,
    };
    let mut input = Input::new(data);
    while bench.step(&mut input).is_some() {
        bench.check();
    }
    let Bench { bus, ioeventfds, vm, .. } = bench;
    bus.clear();
    assert!(ioeventfds.assigned().is_empty() && vm.view().ioeventfds().is_empty());
    assert!(router.allocated().is_empty() && vm.view().irqfds().is_empty());
    drop((router, ioeventfds, vm));
    let findings = kvm.take_findings();
    let expected = |finding: &Finding| matches!(finding, Finding::LostEvent { .. });
    assert!(findings.iter().all(expected), "{findings:?}");
}

impl Bench {
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.below(9)? {
            0 => {
                let (offset, data) = (input.below(8)?, input.bytes(8)?);
                self.ports.write(offset as u64, data);
            }
            1 => {
                let (offset, len) = (input.below(8)?, input.below(9)?);
                self.ports.read(offset as u64, &mut vec![0; len]);
            }
            2 => {
                // A register by the ports, as a driver does it.
                let (slot, register) = (input.below(SLOTS)?, input.byte()?);
                let address = 0x8000_0000 | (slot as u32) << 11 | u32::from(register & 0xfc);
                self.ports.write(0, &address.to_le_bytes());
                let data = input.bytes(4)?;
                self.ports.write(4 + u64::from(register & 3), data);
                let mut by_ports = [0; 4];
                let mut by_ecam = [0; 4];
                self.ports.read(4, &mut by_ports);
                // Reading some registers has effects.
                if slot != usize::from(VIRTIO) {
                    let at = (slot as u64) << 15 | u64::from(register & 0xfc);
                    self.ecam.read(at, &mut by_ecam);
                    assert_eq!(by_ports, by_ecam);
                }
            }
            3 => {
                let (at, data) = (ecam(input)?, input.bytes(16)?);
                self.ecam.write(at, data);
            }
            4 => {
                let (at, len) = (ecam(input)?, input.below(17)?);
                self.ecam.read(at, &mut vec![0; len]);
            }
            5 => {
                let (slot, bar, address) = (input.below(SLOTS)?, input.below(6)?, place(input)?);
                let at = (slot as u64) << 15 | (0x10 + 4 * bar as u64);
                self.ecam.write(at, &(address as u32).to_le_bytes());
                if input.flag()? && bar < 5 {
                    self.ecam.write(at + 4, &((address >> 32) as u32).to_le_bytes());
                }
            }
            6 => {
                let (slot, on) = (input.below(SLOTS)?, input.flag()?);
                let command = if on { MEMORY_SPACE } else { 0 };
                self.ecam.write((slot as u64) << 15 | 4, &command.to_le_bytes());
            }
            7 => {
                let (address, data) = (place(input)?, input.bytes(16)?);
                self.access(address, |window, offset| window.write(offset, data));
            }
            _ => {
                let (address, len) = (place(input)?, input.below(17)?);
                self.access(address, |window, offset| window.read(offset, &mut vec![0; len]));
            }
        }
        Some(())
    }

    /// An access of the guest to memory: to the window that is there.
    fn access(&mut self, address: u64, access: impl FnOnce(&mut Window, u64)) {
        let there = self.windows.iter_mut().find(|(range, _)| range.contains(&address));
        if let Some((range, window)) = there {
            access(window, address - range.start);
        }
    }

    fn check(&self) {
        let mapped = self.bus.mapped();
        for mapping in &mapped {
            let range = &mapping.range;
            let inside = |window: std::ops::Range<u64>| {
                window.start <= range.start && range.end <= window.end && range.start < range.end
            };
            assert!(inside(LOW) || inside(HIGH), "{mapping:?}");
        }
        for pair in mapped.windows(2) {
            assert!(pair[0].range.end <= pair[1].range.start, "{pair:?}");
        }
        let mut bells = mapped.iter().filter(|m| m.slot == VIRTIO && m.bar == REGISTER_BAR);
        let expected: Vec<_> =
            bells.by_ref().map(|m| IoAddress::Mmio(m.range.start + NOTIFY)).collect();
        let assigned: Vec<_> = self.ioeventfds.assigned().iter().map(|m| m.address).collect();
        let kvm: Vec<_> = self.vm.view().ioeventfds().iter().map(|event| event.address).collect();
        assert_eq!((&assigned, &kvm), (&expected, &expected));
        // Whatever was written, they are still who they were.
        for (slot, id) in [0x0008_1b36, 0x0002_0001, 0x0002_0001, 0x1044_1af4].iter().enumerate() {
            let mut data = [0; 4];
            self.bus.config_read((slot as u64) << 15, &mut data);
            assert_eq!(u32::from_le_bytes(data), *id, "slot {slot}");
        }
    }
}

/// An offset of ECAM: mostly in the first 256 bytes of the first function of a device.
fn ecam(input: &mut Input<'_>) -> Option<u64> {
    let (slot, what) = (input.below(SLOTS)? as u64, input.byte()?);
    Some(match what % 8 {
        0 => slot << 15 | u64::from(what >> 3) << 12 | u64::from(input.u16()? & 0xfff),
        1 => input.u32()?.into(),
        _ => slot << 15 | u64::from(input.byte()?),
    })
}

/// An address that may be that of a BAR.
fn place(input: &mut Input<'_>) -> Option<u64> {
    let (base, offset) = (input.below(8)?, u64::from(input.u16()?));
    let bases =
        [LOW.start, HIGH.start, LOW.end - 0x1000, HIGH.end - 0x1000, 0, 0xfee0_0000, u64::MAX, 0];
    Some(match base {
        6 => u64::MAX - offset,
        7 => offset << 48 | u64::from(input.u32()?) << 16,
        _ => bases[base].wrapping_add(offset << 4),
    })
}
