//! What a guest writes to an MSI-X table, its pending bits and its message control, against a model.
//!
//! Over the KVM in memory, with few GSIs or many. After each step the guest must read what the model
//! says, and KVM must have exactly the irqfds and routes that the model's vectors need.

use std::sync::Arc;

use hv_cli::pci::{ConfigSpace, Identity, MSIX_ENTRY, Msix};
use hv_core::fake::{FakeKvm, FakeVm, Finding};
use hv_core::{Hypervisor, Msi, RouteTarget, Vm};
use hv_irq::{GsiRoute, IrqRouter, LegacyPins, RouterConfig};

use crate::Input;

/// GSIs below are of the legacy pins.
const LEGACY: u32 = 38;
const ENTRY: usize = MSIX_ENTRY as usize;
const TABLE_BYTES: u16 = 1 << 12;

struct Model {
    entries: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
    /// Those that have needed a GSI since the vectors were enabled.
    routed: Vec<bool>,
    enabled: bool,
    masked: bool,
    active: bool,
}

impl Model {
    fn is_live(&self, index: usize) -> bool {
        self.enabled && self.active && !self.masked && self.entries[index][12] & 1 == 0
    }

    /// What follows from a change.
    fn settle(&mut self) {
        for index in 0..self.entries.len() {
            if self.is_live(index) {
                self.pending[index] = false;
                self.routed[index] = true;
            } else if !(self.enabled && self.active) {
                self.routed[index] = false;
            }
        }
    }

    fn message(&self, index: usize) -> Msi {
        let entry = self.entries[index];
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"));
        let address = u64::from(word(0)) | u64::from(word(4)) << 32;
        Msi { address, data: word(8), device: None }
    }
}

struct Bench {
    msix: Msix<FakeVm>,
    config: ConfigSpace,
    capability: u16,
    router: IrqRouter<FakeVm>,
    vm: Arc<FakeVm>,
    /// GSIs that somebody else has.
    others: Vec<GsiRoute<FakeVm>>,
    scarce: bool,
    model: Model,
}

/// Runs a program.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (Some(vectors), Some(gsis)) = (input.below(80), input.byte()) else { return };
    let vectors = vectors + 1;
    let scarce = gsis < 0x80;
    let kvm = FakeKvm::default();
    let vm = Arc::new(kvm.create_vm(0).expect("a VM"));
    vm.create_irqchip().expect("an irqchip");
    let vcpus: Vec<_> = (0..2).map(|id| vm.create_vcpu(id).expect("a vCPU")).collect();
    (0..2).for_each(|id| vm.view().enable_apic(id));
    let limit = if scarce { LEGACY + u32::from(gsis % 16) } else { 4096 };
    let router = RouterConfig::new(limit, LegacyPins::Kernel);
    let router = IrqRouter::new(vm.clone(), router).expect("a router");

    let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
    let mut config = ConfigSpace::new(&identity);
    let pending = TABLE_BYTES.into();
    let msix = Msix::new(&mut config, &router, vectors, 0, 0, pending).expect("descriptors");
    let capability = u16::from(config.get::<1>(0x34)[0]);
    let mut entry = [0; ENTRY];
    entry[12] = 1;
    let model = Model {
        entries: vec![entry; vectors],
        pending: vec![false; vectors],
        routed: vec![false; vectors],
        enabled: false,
        masked: false,
        active: false,
    };
    let others = Vec::new();
    let mut bench = Bench { msix, config, capability, router, vm, others, scarce, model };
    bench.check();
    while bench.step(&mut input).is_some() {
        bench.check();
    }

    let Bench { msix, config: _, router, vm, others, .. } = bench;
    drop((msix, others));
    assert!(router.allocated().is_empty(), "{:?}", router.allocated());
    assert!(vm.view().irqfds().is_empty());
    drop((router, vcpus, vm));
    // That a message names nobody is the guest's.
    let findings = kvm.take_findings();
    let expected = |finding: &Finding| matches!(finding, Finding::LostEvent { .. });
    assert!(findings.iter().all(expected), "{findings:?}");
}

impl Bench {
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let failures = self.msix.failures();
        match input.below(10)? {
            0 | 1 => {
                // Of an entry there is, mostly.
                let (entry, within) = (input.below(self.model.entries.len() + 1)?, input.byte()?);
                let offset = entry as u64 * MSIX_ENTRY + u64::from(within % 16);
                let data = input.bytes(40)?;
                self.write_table(offset, data);
            }
            2 => {
                let (offset, data) = (input.u64()?, input.bytes(8)?);
                self.write_table(offset, data);
            }
            3 => {
                // A message and its mask, as a driver writes them.
                let index = input.below(self.model.entries.len())?;
                let (target, number, masked) = (input.byte()?, input.byte()?, input.flag()?);
                let address = 0xfee0_0000 | u32::from(target) << 12;
                let words = [address, 0, number.into(), masked.into()];
                let data: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
                self.write_table(index as u64 * MSIX_ENTRY, &data);
            }
            4 | 5 => self.control(input.byte()?, input.u16()?),
            6 => {
                let active = input.flag()?;
                let before = self.model.active;
                match self.msix.set_active(active) {
                    Ok(()) => self.model.active = active,
                    Err(_) => {
                        assert!(self.scarce, "there are GSIs enough");
                        self.model.active = before && active;
                    }
                }
            }
            7 => {
                let index = input.below(self.model.entries.len())?;
                self.msix.events()[index].signal();
                self.model.pending[index] = true;
            }
            8 => {
                let msi = Msi { address: 0xfee0_0000, data: 0x99, device: None };
                if let Ok(route) = self.router.batch(|batch| batch.add_msi(msi)) {
                    self.others.push(route);
                }
                self.others.truncate(64);
            }
            _ => drop(self.others.pop()),
        }
        assert!(self.scarce || self.msix.failures() == failures, "there are GSIs enough");
        self.model.settle();
        Some(())
    }

    fn write_table(&mut self, offset: u64, data: &[u8]) {
        let failures = self.msix.failures();
        self.msix.table_write(offset, data);
        if self.msix.failures() != failures {
            return;
        }
        for (at, new) in (0u64..).map(|i| offset.saturating_add(i)).zip(data) {
            let (index, at) = (at / MSIX_ENTRY, (at % MSIX_ENTRY) as usize);
            let entry = usize::try_from(index).ok().and_then(|i| self.model.entries.get_mut(i));
            if let Some(entry) = entry {
                entry[at] = *new;
                // Of the last word only the mask is there.
                entry[12] &= 1;
                entry[13..].fill(0);
            }
        }
    }

    /// A write near the message control register.
    fn control(&mut self, where_to: u8, value: u16) {
        let (failures, control) = (self.msix.failures(), self.capability + 2);
        let bytes = value.to_le_bytes();
        // Only its first or second byte, or both.
        let (at, data) = match where_to % 4 {
            0 => (control, &bytes[..1]),
            1 => (control + 1, &bytes[1..]),
            _ => (control, &bytes[..]),
        };
        self.config.write(at, data);
        self.msix.control_written(&mut self.config);
        if self.msix.failures() == failures && where_to % 4 != 0 {
            (self.model.enabled, self.model.masked) = (value & 1 << 15 != 0, value & 1 << 14 != 0);
        }
    }

    /// What the guest reads and what KVM has.
    fn check(&self) {
        let Self { msix, model, .. } = self;
        let vectors = model.entries.len();
        let mut table = vec![0xee; vectors * ENTRY + 8];
        msix.table_read(0, &mut table);
        let expected: Vec<u8> = model.entries.iter().flatten().copied().chain([0; 8]).collect();
        assert_eq!(table, expected);

        let view = self.vm.view();
        (0..2).for_each(|id| drop(view.take_interrupts(id)));
        let mut bits = vec![0xee; vectors / 8 + 2];
        msix.pending_read(0, &mut bits);
        let bit = |index: usize| bits[index / 8] >> (index % 8) & 1 != 0;
        for (index, pending) in model.pending.iter().enumerate() {
            assert_eq!(bit(index), *pending, "the pending bit of {index}");
        }
        assert!(
            (vectors..bits.len() * 8).all(|index| !bit(index)),
            "more pending bits than vectors"
        );

        let control =
            u16::from(model.enabled) << 15 | u16::from(model.masked) << 14 | (vectors - 1) as u16;
        assert_eq!(self.config.get::<2>(usize::from(self.capability) + 2), control.to_le_bytes());
        assert_eq!(msix.is_enabled(), model.enabled);

        let routed = model.routed.iter().filter(|routed| **routed).count();
        assert_eq!(self.router.allocated().len(), routed + self.others.len());
        let (irqfds, routes) = (view.irqfds(), view.routes());
        let live = (0..vectors).filter(|index| model.is_live(*index));
        assert_eq!(irqfds.len(), live.clone().count());
        for index in live {
            let event = msix.events()[index].id();
            let irqfd = irqfds.iter().find(|irqfd| irqfd.event.id() == event);
            let Some(irqfd) = irqfd else { panic!("vector {index} has no irqfd") };
            let target = RouteTarget::Msi(model.message(index));
            let found = routes.iter().filter(|route| route.gsi == irqfd.gsi);
            assert!(found.map(|route| route.target).eq([target]), "the route of {index}");
        }
    }
}
