//! What a hostile driver does to a virtio device over PCI, on the KVM in memory: the device asks for a
//! reset or ignores it, is well after a reset, and another device does not notice.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use hv_cli::virtio::{DeviceError, Rng, Session, VirtioDevice};
use hv_core::fake::{Finding, Wrote};
use proptest::prelude::*;
use virtio::*;

const BUFFER: u64 = 0x8_0000;
const RING: u64 = 0x1_0000;

fn never(_: &Finding) -> bool {
    false
}

/// Two devices, one of which is attacked; the other has to go on.
fn attack(what: impl Fn(&Driver<'_>, &Ring), failure: &str) {
    let machine = Machine::new();
    let (victim, other) = (machine.add(Rng::new()), machine.add(Rng::new()));
    let ring = Ring::new(&machine, RING, 16);
    let other_ring = Ring::new(&machine, 0x2_0000, 16);
    // Configuration changes by vector 1.
    victim.msix_control(true, false);
    victim.msix_message(1, 0, 0x51);
    victim.msix_mask(1, false);
    victim.reset();
    victim.negotiate(VERSION_1 | INDIRECT);
    victim.set_up_queue(0, &ring, 0);
    victim.set_config_vector(1);
    victim.driver_ok();
    other.start(VERSION_1, &other_ring);

    what(&victim, &ring);
    victim.wait_for_needs_reset();
    wait_for("the interrupt", || machine.take_all() == [(0, 0x51)]);
    assert!(victim.failure().contains(failure), "{}", victim.failure());
    assert_eq!(victim.counters().needs_reset, 1);
    // Nothing it does then is heard, and nothing changes that.
    let requests = victim.counters().requests;
    ring.offer(0);
    victim.ring(0);
    victim.driver_ok();
    assert_ne!(victim.status() & NEEDS_RESET, 0);

    for (driver, ring, before) in [(&other, &other_ring, 0), (&victim, &ring, requests)] {
        if before > 0 || std::ptr::eq(driver, &victim) {
            ring.clear();
            driver.start(VERSION_1, ring);
            assert_eq!(driver.status() & NEEDS_RESET, 0);
        }
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        ring.offer(0);
        driver.ring(0);
        driver.wait_for_requests(before + 1);
    }
    machine.end(never);
}

#[test]
fn a_loop_of_descriptors() {
    attack(
        |driver, ring| {
            ring.descriptor(0, BUFFER, 4, NEXT | WRITE, 1);
            ring.descriptor(1, BUFFER, 4, NEXT | WRITE, 0);
            ring.offer(0);
            driver.ring(0);
        },
        "has no end",
    );
}

#[test]
fn a_chain_past_the_queue() {
    attack(
        |driver, ring| {
            ring.descriptor(0, BUFFER, 4, NEXT | WRITE, 16);
            ring.offer(0);
            driver.ring(0);
        },
        "descriptor 0 has no end",
    );
}

#[test]
fn a_head_past_the_queue() {
    attack(
        |driver, ring| {
            ring.offer(0xffff);
            driver.ring(0);
        },
        "descriptor 65535",
    );
}

#[test]
fn an_indirect_table_outside_memory() {
    attack(
        |driver, ring| {
            ring.descriptor(0, LOW_RAM - 16, 32, TABLE, 0);
            ring.descriptor_at(LOW_RAM - 16, BUFFER, 4, NEXT | WRITE, 1);
            ring.offer(0);
            driver.ring(0);
        },
        "has no end",
    );
}

#[test]
fn addresses_outside_memory_and_at_its_end() {
    let ends = [LOW_RAM, LOW_RAM - 4, HIGH_RAM - 1, HIGH_RAM + LOW_RAM - 7, u64::MAX, u64::MAX - 7];
    for address in ends {
        attack(
            |driver, ring| {
                ring.descriptor(0, address, 8, WRITE, 0);
                ring.offer(0);
                driver.ring(0);
            },
            &format!("not guest memory: 0x8 bytes at {address:#x}"),
        );
    }
}

#[test]
fn a_huge_length() {
    attack(
        |driver, ring| {
            ring.descriptor(0, 0, u32::MAX, WRITE, 0);
            ring.offer(0);
            driver.ring(0);
        },
        "0xffffffff bytes at 0x0",
    );
}

#[test]
fn more_requests_than_descriptors() {
    attack(
        |driver, ring| {
            ring.set_available(17);
            driver.ring(0);
        },
        "more requests are available",
    );
}

#[test]
fn rings_outside_memory() {
    for at in [LOW_RAM - 0x100, LOW_RAM, !0xfff] {
        attack(
            |driver, ring| {
                driver.reset();
                driver.negotiate(VERSION_1);
                let bad = Ring { memory: ring.memory.clone(), at, size: 16, next: 0.into() };
                driver.set_up_queue(0, &bad, 0);
                driver.set_config_vector(1);
                driver.driver_ok();
            },
            "the rings are not aligned or not in guest memory",
        );
    }
}

#[test]
fn rings_that_are_not_aligned() {
    for (register, byte) in
        [(common::QUEUE_DESC, 8), (common::QUEUE_DRIVER, 1), (common::QUEUE_DEVICE, 2)]
    {
        attack(
            |driver, ring| {
                driver.reset();
                driver.negotiate(VERSION_1);
                // Before it is enabled; afterwards its registers are refused.
                driver.write(register, &[byte, 0, 1, 0]);
                driver.write(common::QUEUE_ENABLE, &[1, 0]);
                driver.set_up_queue(0, ring, 0);
                driver.set_config_vector(1);
                driver.driver_ok();
            },
            "the rings are not aligned",
        );
    }
}

#[test]
fn a_request_of_nothing_is_answered_with_nothing() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    let ring = Ring::new(&machine, RING, 16);
    driver.start(VERSION_1, &ring);
    for (n, (address, len, flags)) in (1..).zip([(u64::MAX, 0, WRITE), (BUFFER, 8, 0)]) {
        ring.descriptor(0, address, len, flags, 0);
        ring.offer(0);
        driver.ring(0);
        driver.wait_for_requests(n);
        assert_eq!(ring.used_element(n as u16 - 1), (0, 0));
        assert_eq!(driver.counters().errors, n);
    }
    machine.end(never);
}

#[test]
fn a_ring_that_is_rewritten_during_processing() {
    let machine = Machine::new();
    let (entered, is_entered) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let driver = machine.add(Paused { entered, may_go_on });
    let ring = Ring::new(&machine, RING, 16);
    driver.start(VERSION_1, &ring);
    ring.descriptor(3, BUFFER, 8, WRITE, 0);
    ring.offer(3);
    driver.ring(0);
    is_entered.recv().unwrap();
    for index in 0..16 {
        ring.descriptor(index, u64::MAX, u32::MAX, NEXT | WRITE, index);
    }
    for slot in 0..16 {
        ring.offer(slot ^ 0x5555);
    }
    ring.set_available(1);
    go_on.send(()).unwrap();
    driver.wait_for_requests(1);
    assert_eq!(ring.used_element(0), (3, 8));
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    machine.end(never);
}

/// Waits in the middle of its work.
struct Paused {
    entered: std::sync::mpsc::Sender<()>,
    may_go_on: std::sync::mpsc::Receiver<()>,
}

impl VirtioDevice for Paused {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(request) = session.queue(queue)?.pop()? {
            let _ = self.entered.send(());
            let _ = self.may_go_on.recv();
            request.write_at(0, &[7; 8])?;
            session.queue(queue)?.push(request, 8)?;
        }
        Ok(())
    }
}

#[test]
fn kicks_for_queues_that_do_not_exist_or_are_not_ready() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    // Before the driver is ready, KVM rings and nobody listens.
    assert_eq!(driver.ring(0), Wrote::Signalled);
    let refused = driver.counters().refused;
    for queue in [1, 2, 500, 1023] {
        assert_eq!(driver.ring(queue), Wrote::Exit);
    }
    assert_eq!(driver.counters().refused, refused + 4);
    driver.write(0x3000, &[0]);
    assert_eq!(driver.counters().refused, refused + 5, "an exit, before it is ready");
    let ring = Ring::new(&machine, RING, 16);
    driver.start(VERSION_1, &ring);
    for queue in [1, 500] {
        driver.ring(queue);
    }
    assert_eq!(driver.counters().refused, refused + 7);
    // The one before the reset is forgotten, and an endless storm is only more work.
    for _ in 0..1000 {
        driver.ring(0);
    }
    ring.descriptor(0, BUFFER, 8, WRITE, 0);
    ring.offer(0);
    driver.ring(0);
    driver.wait_for_requests(1);
    machine.end(never);
}

#[test]
fn a_queue_that_was_not_enabled() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    driver.reset();
    driver.negotiate(VERSION_1);
    driver.driver_ok();
    driver.ring(0);
    driver.reset();
    assert_eq!(driver.counters().requests, 0);
    assert_eq!(driver.counters().needs_reset, 0);
    machine.end(never);
}

#[test]
fn bars_moved_over_ram_or_each_other() {
    let machine = Machine::new();
    let (driver, other) = (machine.add(Rng::new()), machine.add(Rng::new()));
    let (ring, other_ring) = (Ring::new(&machine, RING, 16), Ring::new(&machine, 0x2_0000, 16));
    driver.start(VERSION_1, &ring);
    other.start(VERSION_1, &other_ring);
    let home = driver.registers();
    let place = |at: u64| {
        driver.config_write(0x18, &(at as u32).to_le_bytes());
        driver.config_write(0x1c, &((at >> 32) as u32).to_le_bytes());
    };
    let places = [0, RING, LOW_RAM, 0xfec0_0000, 0xfee0_0000, HIGH_RAM, other.registers(), 1 << 52];
    for at in places.into_iter().chain([u64::MAX]) {
        place(at);
        assert_eq!(machine.ioeventfds.assigned().len(), 1, "{at:#x}: only the other's");
        assert_eq!(machine.bus.mapped().len(), 3);
        // RAM is RAM, and the other device is where it was.
        let zeros: [u8; 8] = driver.machine.memory_at(RING);
        assert_eq!(zeros, [0; 8]);
        assert_ne!(other.status(), 0);
    }
    assert!(machine.bus.refusals() > places.len() as u64);
    // Its own MSI-X BAR.
    place(u64::from(u32::from_le_bytes(driver.config_read(0x10))));
    assert_eq!(machine.bus.mapped().len(), 3);
    place(home);
    assert_eq!(machine.ioeventfds.assigned().len(), 2);
    for (driver, ring) in [(&driver, &ring), (&other, &other_ring)] {
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        ring.offer(0);
        assert_eq!(driver.ring(0), Wrote::Signalled);
        driver.wait_for_requests(1);
    }
    machine.end(never);
}

#[test]
fn an_msix_table_full_of_garbage() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    let ring = Ring::new(&machine, RING, 16);
    driver.start(VERSION_1, &ring);
    driver.msix_control(true, false);
    let table = driver.bar(0);
    let mut seed = 1u64;
    for round in 0..200 {
        for offset in (0..0x1000).step_by(4 + round % 5) {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let data = seed.to_le_bytes();
            machine.bus.memory_write(table + offset as u64, &data[..1 + round % 8]);
            if offset > 64 && round > 3 {
                break;
            }
        }
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        ring.offer(0);
        driver.ring(0);
        driver.wait_for_signals(round as u64 + 1);
        // Whatever it is, it does no harm; NMIs, SMIs and the like included.
        for vcpu in 0..VCPUS {
            for interrupt in machine.view.take_interrupts(vcpu) {
                if let hv_core::fake::Interrupt::Fixed(vector) = interrupt {
                    machine.view.end_of_interrupt(vcpu, vector);
                }
            }
        }
    }
    // A table that makes sense again works again.
    driver.msix_message(0, 1, 0x66);
    driver.msix_mask(0, false);
    let signals = driver.counters().interrupts + driver.counters().suppressed;
    ring.offer(0);
    driver.ring(0);
    driver.wait_for_signals(signals + 1);
    machine.end(|finding| matches!(finding, Finding::LostEvent { .. }));
}

#[test]
fn no_gsi_left_for_the_vectors() {
    let machine = Machine::with_gsis(48);
    let driver = machine.add(Rng::new());
    let ring = Ring::new(&machine, RING, 16);
    driver.msix_control(true, false);
    driver.msix_message(0, 0, 0x41);
    driver.msix_mask(0, false);
    let all = machine.take_all_gsis();
    driver.reset();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, &ring, 0);
    driver.driver_ok();
    assert_ne!(driver.status() & NEEDS_RESET, 0, "it can't interrupt");
    assert!(driver.failure().contains("routing its interrupts"), "{}", driver.failure());
    drop(all);
    driver.start(VERSION_1, &ring);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
    machine.end(never);
}

#[test]
fn msix_that_can_not_be_had_is_refused_and_counted() {
    let machine = Machine::with_gsis(48);
    let driver = machine.add(Rng::new());
    let ring = Ring::new(&machine, RING, 16);
    driver.start(VERSION_1, &ring);
    let before = driver.counters().refused;
    let all = machine.take_all_gsis();
    driver.msix_message(0, 0, 0x41);
    driver.msix_mask(0, false);
    driver.msix_control(true, false);
    assert_eq!(driver.counters().refused, before + 1, "there is no route for it");
    drop(all);
    driver.msix_control(true, false);
    assert_eq!(driver.counters().refused, before + 1);
    machine.end(never);
}

/// An access as any vCPU can make it.
#[derive(Debug, Clone)]
enum Access {
    Config(u16, Vec<u8>),
    ReadConfig(u16, usize),
    Bar(u8, u32, Vec<u8>),
    ReadBar(u8, u32, usize),
    Port(u8, Vec<u8>),
    ReadPort(u8, usize),
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let data = || {
        let byte = prop_oneof![4 => any::<u8>(), 1 => Just(0), 1 => Just(0xff)];
        prop::collection::vec(byte, 0..=8)
    };
    let bar = || prop_oneof![Just(0u8), Just(2)];
    let offset = || prop_oneof![3 => 0u32..64, 1 => 0x1000u32..0x1004, 1 => 0x2ff8u32..0x3010, 1 => 0u32..0x4008];
    let access = prop_oneof![
        3 => (0u16..0x120, data()).prop_map(|(at, data)| Access::Config(at, data)),
        1 => (0u16..0x1000, 0usize..9).prop_map(|(at, len)| Access::ReadConfig(at, len)),
        6 => (bar(), offset(), data()).prop_map(|(bar, at, data)| Access::Bar(bar, at, data)),
        2 => (bar(), offset(), 0usize..9).prop_map(|(bar, at, len)| Access::ReadBar(bar, at, len)),
        1 => (0u8..8, data()).prop_map(|(at, data)| Access::Port(at, data)),
        1 => (0u8..8, 0usize..9).prop_map(|(at, len)| Access::ReadPort(at, len)),
    ];
    prop::collection::vec(access, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Accesses of any size anywhere, in any order: no panic, no hang, and the device can be had again.
    #[test]
    fn any_accesses_at_all(accesses in accesses()) {
        use hv_cli::machine::bus::Device;
        use hv_cli::pci::ConfigPorts;

        let machine = Machine::new();
        let driver = machine.add(Rng::new());
        let ring = Ring::new(&machine, RING, 16);
        driver.start(VERSION_1, &ring);
        let (msix, registers) = (driver.bar(0), driver.registers());
        let base = |bar| if bar == 0 { msix } else { registers };
        let mut ports = ConfigPorts::new(machine.bus.clone(), NoReset);
        for access in accesses {
            match access {
                Access::Config(at, data) => driver.config_write(at.into(), &data),
                Access::ReadConfig(at, len) => {
                    machine.bus.config_read((1 << 15) | u64::from(at), &mut vec![0; len]);
                }
                Access::Bar(bar, at, data) => {
                    machine.bus.memory_write(base(bar) + u64::from(at), &data);
                }
                Access::ReadBar(bar, at, len) => {
                    machine.bus.memory_read(base(bar) + u64::from(at), &mut vec![0; len]);
                }
                Access::Port(at, data) => ports.write(at.into(), &data),
                Access::ReadPort(at, len) => ports.read(at.into(), &mut vec![0; len]),
            }
        }
        // Firmware would put it back like this.
        driver.config_write(4, &[6, 0]);
        driver.config_write(0x10, &(msix as u32).to_le_bytes());
        driver.config_write(0x18, &registers.to_le_bytes());
        driver.msix_control(false, false);
        ring.clear();
        let before = driver.counters().requests;
        driver.start(VERSION_1, &ring);
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        ring.offer(0);
        driver.ring(0);
        driver.wait_for_requests(before + 1);
        machine.end(|finding| matches!(finding, Finding::LostEvent { .. }));
    }
}

/// What is at port 0xcf9.
struct NoReset;

impl hv_cli::machine::bus::Device for NoReset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}
