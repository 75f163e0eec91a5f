#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]
//! Level-triggered pins, in the kernel and in user space, and what a guest can do to an I/O APIC in user
//! space, on the KVM in memory.

mod common;

use common::Machine;
use hv_core::Gsi;
use hv_core::fake::FakeKvm;
use hv_irq::{Ioapic, IrqRouter, LegacyPins, LevelPin};
use proptest::prelude::*;

const PIN: u8 = 20;
const LEVEL: u64 = 0x8000;
const MASKED: u64 = 0x1_0000;

/// A machine whose pins are in the kernel or in user space, and what they have in common.
struct Pins {
    kvm: FakeKvm,
    machine: Machine,
    router: IrqRouter<hv_core::fake::FakeVm>,
    ioapic: Option<Ioapic<hv_core::fake::FakeVm>>,
}

impl Pins {
    fn new(pins: LegacyPins) -> Self {
        let kvm = FakeKvm::default();
        let machine = Machine::new(&kvm, pins);
        let router = machine.router();
        let split = pins == LegacyPins::Userspace;
        let ioapic = split.then(|| Ioapic::new(router.clone()).unwrap());
        Self { kvm, machine, router, ioapic }
    }

    fn bind(&self) -> LevelPin<hv_core::fake::FakeVm> {
        let (trigger, resample) = (self.machine.event(), self.machine.event());
        match &self.ioapic {
            Some(ioapic) => ioapic.bind_level(PIN, trigger, resample).unwrap(),
            None => self.router.bind_level(Gsi(PIN.into()), trigger, resample).unwrap(),
        }
    }

    /// The guest writes the entry of the pin, the lower half last.
    fn program(&self, entry: u64) {
        let Some(ioapic) = &self.ioapic else { return self.machine.program_pin(PIN, entry) };
        for (register, value) in [(0x11 + 2 * PIN, entry >> 32), (0x10 + 2 * PIN, entry)] {
            ioapic.write(0, &[register]).unwrap();
            ioapic.write(0x10, &(value as u32).to_le_bytes()).unwrap();
        }
    }

    /// The guest ends an interrupt; an exit tells the I/O APIC in user space.
    fn end(&self, vcpu: u32, vector: u8) {
        self.machine.view.end_of_interrupt(vcpu, vector);
        if let Some(ioapic) = &self.ioapic {
            ioapic.eoi(vector).unwrap();
        }
    }
}

fn both(test: impl Fn(&Pins)) {
    for pins in [LegacyPins::Kernel, LegacyPins::Userspace] {
        let pins = Pins::new(pins);
        test(&pins);
        assert_eq!(pins.kvm.findings(), []);
    }
}

#[test]
fn an_interrupt_its_end_and_the_next_one() {
    both(|pins| {
        let pin = pins.bind();
        pins.program(LEVEL | 0x41);
        for _ in 0..3 {
            pin.raise();
            assert_eq!(pins.machine.taken(0), [0x41]);
            assert!(!pin.take_end(), "in service");
            pins.end(0, 0x41);
            assert!(pin.take_end(), "so the device looks whether it wants another one");
        }
        assert!(pins.machine.taken(0).is_empty());
        drop(pin);
        assert!(pins.router.irqfds().is_empty());
    });
}

#[test]
fn what_was_raised_while_masked_is_asked_for_when_unmasked() {
    both(|pins| {
        let pin = pins.bind();
        pins.program(MASKED | LEVEL | 0x41);
        pin.raise();
        assert!(pins.machine.taken(0).is_empty());
        pins.program(0x0100_0000_0000_0000 | LEVEL | 0x52);
        assert!(pins.machine.taken(1).is_empty(), "the device may be satisfied by now");
        assert!(pin.take_end());
        pin.raise();
        assert!(pins.machine.taken(0).is_empty(), "to the other vCPU by now");
        assert_eq!(pins.machine.taken(1), [0x52]);
        pins.end(1, 0x52);
        assert!(pin.take_end());
    });
}

#[test]
fn a_pin_masked_while_in_service_is_ended_all_the_same() {
    both(|pins| {
        let pin = pins.bind();
        pins.program(LEVEL | 0x41);
        pin.raise();
        assert_eq!(pins.machine.taken(0), [0x41]);
        pins.program(MASKED | LEVEL | 0x41);
        pins.end(0, 0x41);
        assert!(pin.take_end());
        pin.raise();
        assert!(pins.machine.taken(0).is_empty());
        pins.program(LEVEL | 0x41);
        assert!(pins.machine.taken(0).is_empty() && pin.take_end());
        pin.raise();
        assert_eq!(pins.machine.taken(0), [0x41]);
    });
}

#[test]
fn a_device_served_while_its_pin_was_masked_interrupts_no_more() {
    both(|pins| {
        let pin = pins.bind();
        pins.program(LEVEL | 0x41);
        pin.raise();
        assert_eq!(pins.machine.taken(0), [0x41]);
        // A handler in a thread: mask, end, serve the device, unmask.
        pins.program(MASKED | LEVEL | 0x41);
        pins.end(0, 0x41);
        assert!(pin.take_end());
        pin.raise(); // not served yet
        pins.program(LEVEL | 0x41);
        assert!(pins.machine.taken(0).is_empty());
        assert!(pin.take_end(), "asked, and served by now");
    });
}

#[test]
fn devices_share_a_pin_and_are_all_told() {
    both(|pins| {
        let (one, other) = (pins.bind(), pins.bind());
        pins.program(LEVEL | 0x41);
        one.raise();
        assert_eq!(pins.machine.taken(0), [0x41]);
        pins.end(0, 0x41);
        assert!(one.take_end() && other.take_end());
        drop(one);
        other.raise();
        assert_eq!(pins.machine.taken(0), [0x41], "the other one is still bound");
    });
}

#[derive(Debug, Clone)]
enum Access {
    Register(u8, u32),
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Line(u8, bool),
    Pulse(u8),
    End(u8),
    Raise,
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let access = prop_oneof![
        6 => (0x10..0x40_u8, any::<u32>()).prop_map(|(r, v)| Access::Register(r, v)),
        2 => (any::<u8>(), any::<u32>()).prop_map(|(r, v)| Access::Register(r, v)),
        1 => (0..0x50_u64, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, data)| Access::Write(offset, data)),
        1 => (any::<u64>(), 0..9_usize).prop_map(|(offset, len)| Access::Read(offset, len)),
        4 => (0..24_u8, any::<bool>()).prop_map(|(pin, level)| Access::Line(pin, level)),
        2 => (0..24_u8).prop_map(Access::Pulse),
        4 => any::<u8>().prop_map(Access::End),
        2 => Just(Access::Raise),
    ];
    prop::collection::vec(access, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn a_guest_can_do_anything_to_its_i_o_apic(accesses in accesses()) {
        let machine = Machine::new(&FakeKvm::default(), LegacyPins::Userspace);
        let vm = machine.faulty();
        let router = IrqRouter::new(vm.clone(), machine.config).unwrap();
        let ioapic = Ioapic::new(router.clone()).unwrap();
        let pins: Vec<_> = (0..24)
            .map(|pin| ioapic.bind_level(pin, machine.event(), machine.event()).unwrap())
            .collect();
        for access in &accesses {
            let before = machine.kvm.calls();
            match access {
                Access::Register(register, value) => {
                    ioapic.write(0, &[*register]).unwrap();
                    ioapic.write(0x10, &value.to_le_bytes()).unwrap();
                    let calls = machine.kvm.calls().since(&before).total();
                    prop_assert!(calls <= 3, "table, irqfd, message: {calls}");
                }
                Access::Write(offset, data) => ioapic.write(*offset, data).unwrap(),
                Access::Read(offset, len) => ioapic.read(*offset, &mut vec![0; *len]),
                Access::Line(pin, level) => ioapic.set_line(*pin, *level).unwrap(),
                Access::Pulse(pin) => ioapic.pulse(*pin).unwrap(),
                Access::End(vector) => ioapic.eoi(*vector).unwrap(),
                Access::Raise => pins.iter().for_each(LevelPin::raise),
            }
            prop_assert_eq!(vm.complaints(), [""; 0]);
            prop_assert_eq!(router.routes(), machine.view.routes());
            // A pin that is not masked is bound, a masked one is not.
            let entries = ioapic.save().entries;
            let open = (0..).zip(&entries).filter(|(_, entry)| **entry & MASKED == 0);
            let open: Vec<Gsi> = open.map(|(pin, _)| Gsi(pin)).collect();
            let mut bound: Vec<Gsi> = machine.view.irqfds().iter().map(|i| i.gsi).collect();
            bound.sort_unstable();
            prop_assert_eq!(bound, open);
        }
        // Whatever the guest left there can be restored.
        let other = Machine::new(&FakeKvm::default(), LegacyPins::Userspace);
        let mut state = router.save();
        state.bound.clear();
        let restored = IrqRouter::restore(other.vm.clone(), other.config, &state).unwrap();
        let again = Ioapic::restore(restored.finish().unwrap(), &ioapic.save()).unwrap();
        prop_assert_eq!(again.save(), ioapic.save());
        drop(pins);
        prop_assert!(machine.view.irqfds().is_empty());
    }
}
