//! A machine whose interrupts hv-irq routes, and what its guests receive.
//!
//! Everything here is written for any hypervisor, so that the KVM in memory and `/dev/kvm` are driven by
//! the same code and have to deliver the same interrupts. What is taken but was not expected fails the
//! next expectation: each scenario ends with one, after its devices are gone.

#![allow(
    dead_code,
    unused_macros,
    unused_imports,
    reason = "every test binary uses a part of this"
)]

pub(crate) mod lines;
pub(crate) mod messages;
pub(crate) mod model;
pub(crate) mod moves;
pub(crate) mod plug;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_core::conformance::{Guest, Seen};
use hv_core::layer::{Interceptor as _, Layered, LayeredVm, Trace};
use hv_core::{Capability, EventFd, Hypervisor, IoAddress, Ioctl, Msi, Vcpu, VcpuExit, Vm};
use hv_irq::{Ioapic, IrqRouter, LegacyPins, RouterConfig};

/// vCPUs of each machine, whose ids are their APIC ids.
pub(crate) const VCPUS: u32 = 2;

/// An APIC id that none of them has.
pub(crate) const NOBODY: u32 = 9;

/// How long an interrupt that must come may take on the slowest machine. Only failures wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// Registers of the I/O APIC on a PC.
const IOAPIC: std::ops::Range<u64> = 0xfec0_0000..0xfec0_1000;

/// Local APIC registers that are in service: 32 vectors every 16 bytes.
const ISR: usize = 0x100;

/// An I/O APIC entry that is level-triggered.
pub(crate) const LEVEL: u64 = 1 << 15;

/// An I/O APIC entry that is masked.
pub(crate) const MASKED: u64 = 1 << 16;

/// A vector that a vCPU took.
pub(crate) type Taken = (u32, u8);

/// A hypervisor, and guests that run on it.
pub(crate) trait Host {
    type Hypervisor: Hypervisor<Vm: Send + Sync>;
    type Guest: Guest<Vcpu = <VmOf<Self> as Vm>::Vcpu>;

    fn open() -> Self;

    fn hypervisor(&self) -> Self::Hypervisor;

    fn guest(&self, vm: &VmOf<Self>, vcpu: <VmOf<Self> as Vm>::Vcpu) -> Self::Guest;

    /// None of these is an irqfd of the VM; events that wait in them may go.
    fn assert_unbound(&self, vm: &VmOf<Self>, events: &[EventFd]);

    /// Looks for what the hypervisor let pass, if it can say.
    fn check(&self);
}

pub(crate) type VmOf<H> = <<H as Host>::Hypervisor as Hypervisor>::Vm;

/// A VM whose calls are counted.
pub(crate) type Counted<H> = LayeredVm<VmOf<H>, Trace>;

pub(crate) type Router<H> = IrqRouter<Counted<H>>;

/// A VM with its irqchip and two guests, each on a vCPU.
pub(crate) struct Machine<H: Host> {
    pub(crate) vm: Arc<Counted<H>>,
    pub(crate) config: RouterConfig,
    /// Where the guests find an I/O APIC if it is in user space.
    pub(crate) ioapic: Option<Ioapic<Counted<H>>>,
    kvm: Layered<H::Hypervisor, Trace>,
    guests: Vec<H::Guest>,
}

impl<H: Host> Machine<H> {
    pub(crate) fn new(host: &H, pins: LegacyPins) -> Self {
        let kvm = Trace::new().over(host.hypervisor());
        let vm = kvm.create_vm(0).unwrap();
        match pins {
            LegacyPins::Kernel => vm.create_irqchip().unwrap(),
            LegacyPins::Userspace => {
                vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
            }
        }
        let guest = |id| host.guest(vm.inner(), vm.inner().create_vcpu(id).unwrap());
        let guests = (0..VCPUS).map(guest).collect();
        let gsi_count = vm.check_extension(Capability::IrqRouting).unwrap();
        let config = RouterConfig::new(gsi_count.try_into().unwrap(), pins);
        Self { vm: Arc::new(vm), config, ioapic: None, kvm, guests }
    }

    /// A router, and the I/O APIC if it is to be in user space.
    pub(crate) fn router(&mut self) -> Router<H> {
        let router = IrqRouter::new(self.vm.clone(), self.config).unwrap();
        if self.config.pins == LegacyPins::Userspace {
            self.ioapic = Some(Ioapic::new(router.clone()).unwrap());
        }
        router
    }

    pub(crate) fn event(&self) -> EventFd {
        self.kvm.eventfd().unwrap()
    }

    pub(crate) fn events(&self, n: usize) -> Vec<EventFd> {
        (0..n).map(|_| self.event()).collect()
    }

    /// How often `KVM_SET_GSI_ROUTING` was called.
    pub(crate) fn tables(&self) -> u64 {
        self.kvm.interceptor().counts().get(Ioctl::SetGsiRouting).calls
    }

    /// How often `KVM_IRQFD` was called.
    pub(crate) fn irqfds(&self) -> u64 {
        self.kvm.interceptor().counts().get(Ioctl::Irqfd).calls
    }

    /// A guest stores 32 bits, perhaps to the I/O APIC in user space.
    fn store(&mut self, vcpu: u32, address: u64, value: u32) {
        let data = value.to_le_bytes();
        let seen = self.guest(vcpu).write(IoAddress::Mmio(address), &data).unwrap();
        match (seen, &self.ioapic) {
            (Seen::ByKernel, None) => {}
            (Seen::ByVmm(VcpuExit::Mmio(_)), Some(ioapic)) if IOAPIC.contains(&address) => {
                ioapic.write(address - IOAPIC.start, &data).unwrap();
            }
            _ => panic!("nobody expects {seen:x?}"),
        }
    }

    /// A guest programs a pin of the I/O APIC, wherever that is, to interrupt `vcpu`. The upper half
    /// of the entry first: the lower has the mask.
    pub(crate) fn program_pin(&mut self, pin: u8, vcpu: u32, entry: u64) {
        let halves = [(0x11 + 2 * pin, vcpu << 24), (0x10 + 2 * pin, entry as u32)];
        for (register, value) in halves {
            self.store(0, IOAPIC.start, register.into());
            self.store(0, IOAPIC.start + 0x10, value);
        }
    }

    /// A guest programs the PICs as a PC does: vectors from `master` and `slave`, edge-triggered, slave
    /// on pin 2, automatic end of interrupt, no pin masked (8259A manual, ICW1 to 4).
    pub(crate) fn program_pics(&mut self, master: u8, slave: u8) {
        for (command, data, words) in [(0x20, 0x21, [master, 4, 3]), (0xa0, 0xa1, [slave, 2, 3])] {
            let writes = [(command, 0x11)].into_iter().chain(words.map(|word| (data, word)));
            for (port, byte) in writes.chain([(data, 0)]) {
                let seen = self.guest(0).write(IoAddress::Pio(port), &[byte]).unwrap();
                assert_eq!(seen, Seen::ByKernel, "the PICs are in the kernel");
            }
        }
    }

    /// The guest on a vCPU takes what is pending and does not end it.
    pub(crate) fn take(&mut self, vcpu: u32) -> Vec<u8> {
        self.guest(vcpu).take_interrupts().unwrap()
    }

    /// The guest on a vCPU ends `vector`; the I/O APIC in user space is told if KVM says so.
    pub(crate) fn end(&mut self, vcpu: u32, vector: u8) {
        let seen = self.guest(vcpu).end_of_interrupt(vector).unwrap();
        match (seen, &self.ioapic) {
            (Seen::ByKernel, _) => {}
            (Seen::ByVmm(VcpuExit::IoapicEoi { vector }), Some(ioapic)) => {
                ioapic.eoi(vector).unwrap();
            }
            _ => panic!("nobody expects {seen:x?}"),
        }
    }

    /// Whether `vector`, which was taken, is in service. Some software KVMs end it when it is taken.
    pub(crate) fn is_in_service(&mut self, vcpu: u32, vector: u8) -> bool {
        let lapic = self.guest(vcpu).vcpu().lapic().unwrap();
        let byte = ISR + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        lapic.regs[byte].cast_unsigned() & 1 << (vector % 8) != 0
    }

    /// All guests take and end interrupts until none is pending: which.
    pub(crate) fn interrupts(&mut self) -> Vec<Taken> {
        let mut all = Vec::new();
        for vcpu in 0..VCPUS {
            loop {
                let taken = self.take(vcpu);
                if taken.is_empty() {
                    break;
                }
                // The last one taken is of the highest priority in service.
                taken.iter().rev().for_each(|vector| self.end(vcpu, *vector));
                all.extend(taken.into_iter().map(|vector| (vcpu, vector)));
                assert!(all.len() < 4096, "interrupts keep coming: {all:x?}");
            }
        }
        all
    }

    /// Exactly these interrupts come, in whatever order. KVM delivers some of them from a worker, so
    /// it may take a moment.
    pub(crate) fn expect(&mut self, expected: impl IntoIterator<Item = Taken>, when: &str) {
        let mut expected: Vec<Taken> = expected.into_iter().collect();
        let (start, mut got) = (Instant::now(), self.interrupts());
        while got.len() < expected.len() {
            let late = start.elapsed() > PATIENCE;
            assert!(!late, "{when}: {expected:x?} must come, only {got:x?} did");
            std::thread::yield_now();
            got.extend(self.interrupts());
        }
        expected.sort_unstable();
        got.sort_unstable();
        assert_eq!(got, expected, "{when}");
    }

    fn guest(&mut self, vcpu: u32) -> &mut H::Guest {
        &mut self.guests[vcpu as usize]
    }
}

/// Waits for what must happen.
pub(crate) fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// A fixed, edge-triggered message.
pub(crate) fn msi(vcpu: u32, vector: u8) -> Msi {
    Msi { address: 0xfee0_0000 | u64::from(vcpu) << 12, data: vector.into(), device: None }
}

/// All scenarios as tests on a [`Host`].
macro_rules! scenarios {
    ($host:ty: $($module:ident::{$($scenario:ident),* $(,)?};)*) => {$($(
        #[test]
        fn $scenario() {
            let host = <$host as $crate::irq::Host>::open();
            $crate::irq::$module::$scenario(&host);
            $crate::irq::Host::check(&host);
        }
    )*)*};
    ($host:ty) => {
        $crate::irq::scenarios! { $host:
            messages::{
                an_edge_is_one_interrupt,
                a_live_vector_is_retargeted,
                an_event_behind_a_mask_is_delivered_once_and_to_the_new_vcpu,
                changes_of_single_routes_are_one_table,
                a_device_of_256_vectors_costs_one_table,
                messages_without_a_route_get_dynamic_ones,
            };
            model::{what_a_guest_does_to_its_device_has_the_interrupts_of_the_model};
            lines::{
                legacy_lines_reach_pic_and_ioapic,
                a_split_ioapic_delivers_edges_and_levels_of_its_lines,
                a_level_interrupts_until_its_device_is_satisfied,
                a_level_behind_a_mask_is_not_lost,
                devices_share_a_level,
            };
            moves::{
                a_saved_router_goes_on_in_another_vm,
                a_saved_ioapic_goes_on_in_another_vm,
                a_rebuilt_router_drives_its_new_vm,
            };
        }
    };
}
pub(crate) use scenarios;
