//! Lines of the legacy interrupt controllers, in the kernel and in user space.

use hv_core::Gsi;
use hv_irq::{LegacyPins, LevelPin};

use super::{Counted, Host, LEVEL, MASKED, Machine, Router, Taken, VCPUS, wait_for};

const PIN: u8 = 20;
const BOTH: [LegacyPins; 2] = [LegacyPins::Kernel, LegacyPins::Userspace];

/// GSIs 0 to 15 of a PC lead to a PIC and to the I/O APIC; 0 to pin 2 there, and 2 nowhere.
pub(crate) fn legacy_lines_reach_pic_and_ioapic<H: Host>(host: &H) {
    let mut machine = Machine::new(host, LegacyPins::Kernel);
    let router = machine.router();
    machine.program_pics(0x20, 0x28);
    let pin_of = |gsi: u8| if gsi == 0 { 2 } else { gsi };
    let vcpu_of = |gsi: u8| u32::from(gsi) % VCPUS;
    let gsis = (0..16).filter(|gsi| *gsi != 2);
    for gsi in gsis.clone() {
        machine.program_pin(pin_of(gsi), vcpu_of(gsi), u64::from(0x60 + gsi));
    }
    let start = (machine.tables(), router.save());
    for gsi in gsis {
        let by_pic = (0, 0x20 + gsi);
        let by_ioapic = (vcpu_of(gsi), 0x60 + gsi);
        let event = machine.event();
        let line = router.bind_pin(Gsi(gsi.into()), event.clone()).unwrap();
        for _ in 0..2 {
            event.signal();
            machine.expect([by_pic, by_ioapic], "an event is an edge at both");
        }
        drop(line);
        event.signal();
        machine.expect([], "not bound");
        assert_eq!(event.take(), Some(1), "kept");
        host.assert_unbound(machine.vm.inner(), &[event]);

        for _ in 0..2 {
            router.set_line(Gsi(gsi.into()), true).unwrap();
            machine.expect([by_pic, by_ioapic], "a rising line is an edge at both");
            router.set_line(Gsi(gsi.into()), false).unwrap();
            machine.expect([], "a falling one is none");
        }
    }
    assert_eq!((machine.tables(), router.save()), start, "lines need no table");
}

pub(crate) fn a_split_ioapic_delivers_edges_and_levels_of_its_lines<H: Host>(host: &H) {
    let mut machine = Machine::new(host, LegacyPins::Userspace);
    let _router = machine.router();
    let ioapic = machine.ioapic.clone().unwrap();
    let (edge, level) = (4, 10);
    machine.program_pin(edge, 1, 0x41);
    for _ in 0..3 {
        ioapic.pulse(edge).unwrap();
        machine.expect([(1, 0x41)], "a pulse");
    }
    ioapic.set_line(edge, true).unwrap();
    ioapic.set_line(edge, true).unwrap();
    machine.expect([(1, 0x41)], "it rose once");
    machine.program_pin(edge, 1, MASKED | 0x41);
    ioapic.pulse(edge).unwrap();
    machine.program_pin(edge, 0, 0x42);
    machine.expect([], "an edge on a masked pin is lost, as on hardware");
    ioapic.pulse(edge).unwrap();
    machine.expect([(0, 0x42)], "to the other vCPU");

    machine.program_pin(level, 1, LEVEL | 0x51);
    ioapic.set_line(level, true).unwrap();
    assert_eq!(machine.take(1), [0x51]);
    ioapic.set_line(level, true).unwrap();
    assert_eq!(machine.take(1), [0; 0], "not ended yet");
    machine.end(1, 0x51);
    assert_eq!(machine.take(1), [0x51], "still asserted at its end");
    ioapic.set_line(level, false).unwrap();
    machine.end(1, 0x51);
    machine.expect([], "not asserted any more");
    machine.program_pin(level, 1, MASKED | LEVEL | 0x51);
    ioapic.set_line(level, true).unwrap();
    machine.expect([], "masked");
    machine.program_pin(level, 0, LEVEL | 0x52);
    assert_eq!(machine.take(0), [0x52], "asserted when unmasked");
    ioapic.set_line(level, false).unwrap();
    machine.end(0, 0x52);
    machine.expect([], "all is ended");
}

/// A device on a level-triggered pin that wants a number of interrupts.
struct Device<H: Host> {
    pin: LevelPin<Counted<H>>,
    wants: u32,
}

impl<H: Host> Device<H> {
    fn bind(machine: &Machine<H>, router: &Router<H>) -> Self {
        let (trigger, resample) = (machine.event(), machine.event());
        let pin = match &machine.ioapic {
            Some(ioapic) => ioapic.bind_level(PIN, trigger, resample).unwrap(),
            None => router.bind_level(Gsi(PIN.into()), trigger, resample).unwrap(),
        };
        Self { pin, wants: 0 }
    }

    fn want(&mut self, interrupts: u32) {
        self.wants = interrupts;
        self.pin.raise();
    }

    /// The guest's handler serves it.
    fn serve(&mut self) {
        self.wants = self.wants.saturating_sub(1);
    }

    /// Looks whether it was asked, as its thread would.
    fn poll(&self) -> bool {
        let asked = self.pin.take_end();
        if asked && self.wants > 0 {
            self.pin.raise();
        }
        asked
    }
}

/// Lets guest and device talk until the device has all it wants, each interrupt being `target`: how
/// many there were.
fn satisfy<H: Host>(machine: &mut Machine<H>, device: &mut Device<H>, target: Taken) -> u32 {
    let mut interrupts = 0;
    wait_for("the satisfaction of the device", || {
        for taken in machine.interrupts() {
            assert_eq!(taken, target);
            interrupts += 1;
            device.serve();
        }
        device.poll();
        device.wants == 0
    });
    interrupts
}

pub(crate) fn a_level_interrupts_until_its_device_is_satisfied<H: Host>(host: &H) {
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        let mut device = Device::bind(&machine, &router);
        machine.program_pin(PIN, 1, LEVEL | 0x41);
        machine.expect([], "nothing was raised");
        for wants in [1, 3, 1] {
            device.want(wants);
            assert_eq!(satisfy(&mut machine, &mut device, (1, 0x41)), wants, "{pins:?}");
            machine.expect([], "it is satisfied");
            device.poll();
        }
        // Told of the end not before it, if KVM has such a moment.
        device.want(1);
        let mut taken = Vec::new();
        wait_for("the interrupt", || {
            taken.extend(machine.take(1));
            !taken.is_empty()
        });
        assert_eq!(taken, [0x41]);
        if machine.is_in_service(1, 0x41) {
            assert!(!device.poll(), "in service");
        }
        device.serve();
        machine.end(1, 0x41);
        wait_for("the end", || device.poll());
        machine.expect([], "it is satisfied");

        let (trigger, resample) = (device.pin.trigger().clone(), device.pin.resample().clone());
        drop(device);
        trigger.signal();
        machine.expect([], "without the device");
        assert_eq!((trigger.take(), resample.take()), (Some(1), None), "nobody listens");
        host.assert_unbound(machine.vm.inner(), &[trigger]);
    }
}

/// What a pin was raised for while it was masked interrupts once when it is unmasked, at the vCPU of
/// then: KVM delivers it, or (since Linux 6.4) asks the device, which raises it again.
pub(crate) fn a_level_behind_a_mask_is_not_lost<H: Host>(host: &H) {
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        let mut device = Device::bind(&machine, &router);
        for round in 0..4 {
            let (vcpu, vector) = (round % VCPUS, 0x41 + round as u8);
            machine.program_pin(PIN, vcpu, MASKED | LEVEL | u64::from(vector));
            device.want(1);
            machine.expect([], "masked");
            machine.program_pin(PIN, vcpu, LEVEL | u64::from(vector));
            let interrupts = satisfy(&mut machine, &mut device, (vcpu, vector));
            assert_eq!(interrupts, 1, "{pins:?}");
            machine.expect([], "it is satisfied");
            device.poll();
        }
        drop(device);
        machine.expect([], "without the device");
    }
}

pub(crate) fn devices_share_a_level<H: Host>(host: &H) {
    for pins in BOTH {
        let mut machine = Machine::new(host, pins);
        let router = machine.router();
        let mut one = Device::bind(&machine, &router);
        let mut other = Device::bind(&machine, &router);
        machine.program_pin(PIN, 0, LEVEL | 0x41);
        one.want(1);
        let mut taken = Vec::new();
        let told = |device: &Device<H>, what: &str| wait_for(what, || device.poll());
        wait_for("the interrupt", || {
            taken.extend(machine.interrupts());
            !taken.is_empty()
        });
        assert_eq!(taken, [(0, 0x41)]);
        one.serve();
        told(&one, "the end at the device that raised it");
        told(&other, "the end at the other one");
        machine.expect([], "both are satisfied");
        drop(one);
        other.want(1);
        assert_eq!(satisfy(&mut machine, &mut other, (0, 0x41)), 1, "it is still bound");
        drop(other);
        machine.expect([], "without the devices");
    }
}
