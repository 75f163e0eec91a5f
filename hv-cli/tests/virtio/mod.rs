//! A machine without vCPU threads for virtio devices, on the KVM in memory, and a driver.
//!
//! Everything a driver does goes the way it has in a guest: through configuration space, through
//! BARs, and through KVM, which rings the doorbells it has as ioeventfds and delivers what irqfds
//! signal. The device's thread is real, so what it does is waited for; a limit is there to end what
//! hangs.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_cli::pci::{PciBus, Windows};
use hv_cli::virtio::registers::{
    COMMON, DEVICE, ISR, MSIX_BAR, NOTIFY, NOTIFY_MULTIPLIER, REGISTER_BAR,
};
use hv_cli::virtio::{CounterValues, Counters, Memory, Platform, VirtioDevice, VirtioPci};
use hv_core::fake::{FakeKvm, FakeVcpu, FakeVm, Finding, Interrupt, VmView, Wrote};
use hv_core::layer::{Interceptor as _, Layered, LayeredVm, Trace};
use hv_core::{Hypervisor, IoAddress, Ioctl, MemoryBackend as _, Vm};
use hv_irq::{GsiRoute, IrqRouter, LegacyPins, RouterConfig};
use hv_memory::{GuestRam, GuestRange, IoEventRegistry, RamLayout};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

/// RAM of the machine: [`LOW_RAM`] from 0, and as much again after a hole.
pub(crate) const RAM: u64 = 2 * LOW_RAM;
pub(crate) const LOW_RAM: u64 = 1 << 20;
pub(crate) const HIGH_RAM: u64 = 1 << 32;
pub(crate) const VCPUS: u32 = 2;
pub(crate) const LINE: u8 = 11;

const PATIENCE: Duration = Duration::from_secs(60);
const IOAPIC: u64 = 0xfec0_0000;

/// Device status bits.
pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// Registers of the common configuration.
pub(crate) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(crate) const DEVICE_FEATURE: u64 = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(crate) const DRIVER_FEATURE: u64 = 12;
    pub(crate) const CONFIG_VECTOR: u64 = 16;
    pub(crate) const STATUS: u64 = 20;
    pub(crate) const QUEUE_SELECT: u64 = 22;
    pub(crate) const QUEUE_SIZE: u64 = 24;
    pub(crate) const QUEUE_VECTOR: u64 = 26;
    pub(crate) const QUEUE_ENABLE: u64 = 28;
    pub(crate) const QUEUE_DESC: u64 = 32;
    pub(crate) const QUEUE_DRIVER: u64 = 40;
    pub(crate) const QUEUE_DEVICE: u64 = 48;
}

pub(crate) type CountedVm = LayeredVm<FakeVm, Trace>;

pub(crate) struct Machine {
    pub(crate) bus: Arc<PciBus>,
    pub(crate) memory: Memory,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) view: VmView,
    pub(crate) ioeventfds: Arc<IoEventRegistry<CountedVm>>,
    router: IrqRouter<CountedVm>,
    kvm: Layered<FakeKvm, Trace>,
    fake: FakeKvm,
    _vcpus: Vec<FakeVcpu>,
    vm: Arc<CountedVm>,
}

/// Waits for what must happen.
pub(crate) fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::yield_now();
    }
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with_gsis(4096)
    }

    /// With room for fewer routes; the legacy interrupts have 38.
    pub(crate) fn with_gsis(gsis: u32) -> Self {
        let fake = FakeKvm::default();
        let kvm = Trace::new().over(fake.clone());
        let vm = kvm.create_vm(0).unwrap();
        let hole = GuestRange::new(GuestAddress(LOW_RAM), HIGH_RAM - LOW_RAM).unwrap();
        let ram = GuestRam::new(&RamLayout::new(RAM, &[hole], 40).unwrap()).unwrap();
        for slot in ram.slots() {
            vm.set_memory_slot(slot).unwrap();
        }
        vm.create_irqchip().unwrap();
        let view = vm.inner().view();
        let vcpu = |id| {
            let vcpu = vm.inner().create_vcpu(id).unwrap();
            view.enable_apic(id);
            vcpu
        };
        let vcpus = (0..VCPUS).map(vcpu).collect();
        let vm = Arc::new(vm);
        let config = RouterConfig::new(gsis, LegacyPins::Kernel);
        let windows = Windows { low: 0xc000_0000..0xd000_0000, high: Some(1 << 34..2 << 34) };
        Self {
            bus: Arc::new(PciBus::new(windows)),
            memory: Arc::new(ram.memory().clone()),
            ram: Arc::new(ram),
            view,
            ioeventfds: Arc::new(IoEventRegistry::new(vm.clone())),
            router: IrqRouter::new(vm.clone(), config).unwrap(),
            kvm,
            fake,
            _vcpus: vcpus,
            vm,
        }
    }

    /// Puts a device on the bus; its driver has enabled its BARs.
    pub(crate) fn add(&self, device: impl VirtioDevice) -> Driver<'_> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into();
        let line = self.router.bind_level(hv_core::Gsi(LINE.into()), event(), event()).unwrap();
        let platform = Platform {
            memory: self.memory.clone(),
            router: &self.router,
            ioeventfds: Some(&self.ioeventfds),
            line: Some((LINE, line)),
        };
        let function = VirtioPci::new("test0", Box::new(device), platform).unwrap();
        let counters = function.counters();
        let slot = self.bus.add(Box::new(function)).unwrap();
        let driver = Driver { machine: self, slot, counters };
        driver.config_write(4, &[0b110, 0]);
        driver
    }

    /// Bytes of RAM.
    pub(crate) fn memory_at<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Takes all GSIs that are free, until they are dropped.
    pub(crate) fn take_all_gsis(&self) -> Vec<GsiRoute<CountedVm>> {
        let msi = hv_core::Msi { address: 0xfee0_0000, data: 0x99, device: None };
        let one = || self.router.batch(|batch| batch.add_msi(msi)).ok();
        std::iter::from_fn(one).collect()
    }

    /// How often the routing table was set.
    pub(crate) fn tables(&self) -> u64 {
        self.calls(Ioctl::SetGsiRouting)
    }

    pub(crate) fn calls(&self, ioctl: Ioctl) -> u64 {
        self.kvm.interceptor().counts().get(ioctl).calls
    }

    /// All calls but those that only look.
    pub(crate) fn all_calls(&self) -> u64 {
        self.kvm.interceptor().counts().total().calls
    }

    /// The vectors that wait at a vCPU; it ends those that are level-triggered.
    pub(crate) fn take(&self, vcpu: u32) -> Vec<u8> {
        let vector = |interrupt| match interrupt {
            Interrupt::Fixed(vector) => {
                self.view.end_of_interrupt(vcpu, vector);
                vector
            }
            other => panic!("{other:?}"),
        };
        self.view.take_interrupts(vcpu).into_iter().map(vector).collect()
    }

    pub(crate) fn take_all(&self) -> Vec<(u32, u8)> {
        (0..VCPUS).flat_map(|vcpu| self.take(vcpu).into_iter().map(move |v| (vcpu, v))).collect()
    }

    /// The guest writes memory that is not RAM.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Wrote {
        let wrote = self.view.guest_write(IoAddress::Mmio(address), data);
        if wrote == Wrote::Exit {
            self.bus.memory_write(address, data);
        }
        wrote
    }

    /// Programs a pin of the I/O APIC.
    pub(crate) fn program_pin(&self, pin: u8, vcpu: u32, low: u32) {
        for (register, value) in [(0x11 + 2 * pin, vcpu << 24), (0x10 + 2 * pin, low)] {
            self.write(IOAPIC, &u32::from(register).to_le_bytes());
            self.write(IOAPIC + 0x10, &value.to_le_bytes());
        }
    }

    /// Ends the devices; then nothing of them may be left, and nothing may have been found that the
    /// test did not cause.
    pub(crate) fn end(self, expected: impl Fn(&Finding) -> bool) {
        let Self { bus, view, ioeventfds, router, fake, .. } = self;
        bus.clear();
        assert!(view.irqfds().is_empty(), "{:?}", view.irqfds());
        assert!(ioeventfds.assigned().is_empty());
        assert!(router.allocated().is_empty());
        let mut findings = fake.take_findings();
        findings.retain(|finding| !expected(finding));
        assert_eq!(findings, []);
    }
}

/// The driver of a device.
pub(crate) struct Driver<'a> {
    pub(crate) machine: &'a Machine,
    slot: u8,
    counters: Arc<Counters>,
}

impl Driver<'_> {
    pub(crate) fn counters(&self) -> CounterValues {
        self.counters.values()
    }

    pub(crate) fn failure(&self) -> String {
        self.counters.failure().map_or_else(String::new, |error| error.to_string())
    }

    pub(crate) fn config_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.machine.bus.config_read(u64::from(self.slot) << 15 | offset, &mut data);
        data
    }

    pub(crate) fn config_write(&self, offset: u64, data: &[u8]) {
        self.machine.bus.config_write(u64::from(self.slot) << 15 | offset, data);
    }

    /// Where a BAR is, whether mapped or not.
    pub(crate) fn bar(&self, bar: u8) -> u64 {
        match bar {
            REGISTER_BAR => u64::from_le_bytes(self.config_read(0x18)) & !0xf,
            _ => u64::from(u32::from_le_bytes(self.config_read(0x10)) & !0xf),
        }
    }

    pub(crate) fn registers(&self) -> u64 {
        self.bar(REGISTER_BAR)
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.machine.bus.memory_read(self.registers() + offset, &mut data);
        data
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Wrote {
        self.machine.write(self.registers() + offset, data)
    }

    pub(crate) fn status(&self) -> u8 {
        let [status] = self.read(COMMON + common::STATUS);
        status
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.write(COMMON + common::STATUS, &[status]);
    }

    pub(crate) fn isr(&self) -> u8 {
        let [isr] = self.read(ISR);
        isr
    }

    pub(crate) fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.read(DEVICE + offset)
    }

    pub(crate) fn write_device_config(&self, offset: u64, data: &[u8]) {
        self.write(DEVICE + offset, data);
    }

    pub(crate) fn features(&self) -> u64 {
        let half = |select: u32| {
            self.write(COMMON + common::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(COMMON + common::DEVICE_FEATURE)))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and waits until that is done, as drivers do.
    pub(crate) fn reset(&self) {
        self.set_status(0);
        wait_for("the reset", || self.status() == 0);
    }

    /// Up to `FEATURES_OK`.
    pub(crate) fn negotiate(&self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(COMMON + common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.write(COMMON + common::DRIVER_FEATURE, &half.to_le_bytes());
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status() & FEATURES_OK, FEATURES_OK, "{features:#x}");
    }

    /// Sets up a queue: size, addresses of descriptors, available and used ring, vector.
    pub(crate) fn set_up_queue(&self, index: u16, ring: &Ring, vector: u16) {
        let select = |register: u64, data: &[u8]| self.write(COMMON + register, data);
        select(common::QUEUE_SELECT, &index.to_le_bytes());
        select(common::QUEUE_SIZE, &ring.size.to_le_bytes());
        select(common::QUEUE_VECTOR, &vector.to_le_bytes());
        let addresses = [
            (common::QUEUE_DESC, ring.descriptors()),
            (common::QUEUE_DRIVER, ring.available()),
            (common::QUEUE_DEVICE, ring.used()),
        ];
        for (register, address) in addresses {
            select(register, &(address as u32).to_le_bytes());
            select(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        select(common::QUEUE_ENABLE, &[1, 0]);
    }

    pub(crate) fn set_queue_vector(&self, index: u16, vector: u16) {
        self.write(COMMON + common::QUEUE_SELECT, &index.to_le_bytes());
        self.write(COMMON + common::QUEUE_VECTOR, &vector.to_le_bytes());
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.write(COMMON + common::CONFIG_VECTOR, &vector.to_le_bytes());
    }

    pub(crate) fn driver_ok(&self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// From a reset to a device with one queue whose vector is 0.
    pub(crate) fn start(&self, features: u64, ring: &Ring) {
        self.reset();
        self.negotiate(features);
        self.set_up_queue(0, ring, 0);
        self.driver_ok();
    }

    /// Rings the doorbell of a queue.
    pub(crate) fn ring(&self, queue: u16) -> Wrote {
        let address = NOTIFY + u64::from(NOTIFY_MULTIPLIER) * u64::from(queue);
        self.write(address, &queue.to_le_bytes())
    }

    /// Offset of the MSI-X capability.
    pub(crate) fn msix(&self) -> u64 {
        let mut at = u64::from(self.config_read::<1>(0x34)[0]);
        while at != 0 {
            let [id, next] = self.config_read(at);
            if id == 0x11 {
                return at;
            }
            at = next.into();
        }
        panic!("no MSI-X");
    }

    /// Writes the message control register.
    pub(crate) fn msix_control(&self, enabled: bool, masked: bool) {
        let control = u16::from(enabled) << 15 | u16::from(masked) << 14;
        self.config_write(self.msix() + 2, &control.to_le_bytes());
    }

    /// Writes the message of a vector, in two accesses as a processor makes them.
    pub(crate) fn msix_message(&self, vector: u16, vcpu: u32, number: u8) {
        let entry = self.bar(MSIX_BAR) + 16 * u64::from(vector);
        self.machine.write(entry, &(0xfee0_0000 | u64::from(vcpu) << 12).to_le_bytes());
        self.machine.write(entry + 8, &u32::from(number).to_le_bytes());
    }

    pub(crate) fn msix_mask(&self, vector: u16, masked: bool) {
        let entry = self.bar(MSIX_BAR) + 16 * u64::from(vector);
        self.machine.write(entry + 12, &u32::from(masked).to_le_bytes());
    }

    /// Whether the pending bit of a vector is set.
    pub(crate) fn msix_pending(&self, vector: u16) -> bool {
        let pending: u32 = u32::from_le_bytes(self.config_read(self.msix() + 8)) & !7;
        let mut byte = [0];
        let at = self.bar(MSIX_BAR) + u64::from(pending) + u64::from(vector / 8);
        self.machine.bus.memory_read(at, &mut byte);
        byte[0] >> (vector % 8) & 1 != 0
    }

    /// Waits until the device asks for a reset.
    pub(crate) fn wait_for_needs_reset(&self) {
        wait_for("DEVICE_NEEDS_RESET", || self.status() & NEEDS_RESET != 0);
    }

    pub(crate) fn wait_for_requests(&self, n: u64) {
        wait_for("a request", || self.counters().requests >= n);
    }

    /// Waits until the device has told, or has not told for a reason, so many times.
    pub(crate) fn wait_for_signals(&self, n: u64) {
        let told = || {
            let CounterValues { interrupts, suppressed, .. } = self.counters();
            interrupts + suppressed
        };
        wait_for("an interrupt", || told() >= n);
    }
}

/// A ring in guest memory, written by hand: what a hostile driver writes is not what a library would.
pub(crate) struct Ring {
    pub(crate) memory: Memory,
    pub(crate) at: u64,
    pub(crate) size: u16,
    pub(crate) next: std::cell::Cell<u16>,
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const TABLE: u16 = 4;

impl Ring {
    /// An empty ring at an address.
    pub(crate) fn new(machine: &Machine, at: u64, size: u16) -> Self {
        let ring = Self { memory: machine.memory.clone(), at, size, next: Default::default() };
        ring.clear();
        ring
    }

    pub(crate) fn clear(&self) {
        let zeros = vec![0; (self.used() + 6 + 8 * u64::from(self.size) - self.at) as usize];
        self.memory.write_slice(&zeros, GuestAddress(self.at)).unwrap();
        self.next.set(0);
    }

    pub(crate) fn descriptors(&self) -> u64 {
        self.at
    }

    pub(crate) fn available(&self) -> u64 {
        self.at + 16 * u64::from(self.size)
    }

    pub(crate) fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Writes a descriptor.
    pub(crate) fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(self.at + 16 * u64::from(index), address, len, flags, next);
    }

    pub(crate) fn descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain that starts at a descriptor available.
    pub(crate) fn offer(&self, head: u16) {
        let next = self.next.get();
        let slot = self.available() + 4 + 2 * u64::from(next % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(next.wrapping_add(1));
    }

    /// Sets the index of the available ring.
    pub(crate) fn set_available(&self, index: u16) {
        self.next.set(index);
        self.memory
            .store(index, GuestAddress(self.available() + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
    }

    pub(crate) fn set_flags(&self, flags: u16) {
        self.memory.write_obj(flags, GuestAddress(self.available())).unwrap();
    }

    /// From which request on the driver wants to be told (`used_event`).
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.available() + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// The index of the used ring.
    pub(crate) fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used() + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap()
    }

    /// The used element with a number: head and length.
    pub(crate) fn used_element(&self, index: u16) -> (u32, u32) {
        let at = self.used() + 4 + 8 * u64::from(index % self.size);
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }
}

impl Driver<'_> {
    /// From a reset to a device with these queues, without vectors: whoever looks has to poll.
    pub(crate) fn start_all(&self, features: u64, rings: &[&Ring]) {
        self.reset();
        self.negotiate(features);
        for (index, ring) in (0..).zip(rings) {
            ring.clear();
            self.set_up_queue(index, ring, 0xffff);
        }
        self.driver_ok();
    }

    /// Offers a request of one buffer by descriptor `head`, and rings.
    pub(crate) fn offer(&self, queue: u16, ring: &Ring, head: u16, buffer: (u64, u32, u16)) {
        let (address, len, flags) = buffer;
        ring.descriptor(head, address, len, flags, 0);
        ring.offer(head);
        self.ring(queue);
    }
}

impl Ring {
    /// Waits until so many requests were completed since the ring was made.
    pub(crate) fn wait_for_used(&self, n: u16) {
        wait_for("a completed request", || self.used_index() == n);
    }
}
