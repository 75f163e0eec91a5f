//! virtio over PCI on the KVM in memory, by a driver that does what it should.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use hv_cli::virtio::{DeviceConfig, DeviceError, Rng, Session, VirtioDevice};
use hv_core::fake::Wrote;
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const BUFFER: u64 = 0x8_0000;

fn never(_: &hv_core::fake::Finding) -> bool {
    false
}

fn ready(machine: &Machine) -> (Driver<'_>, Ring) {
    let driver = machine.add(Rng::new());
    let ring = Ring::new(machine, 0x1_0000, 16);
    driver.msix_control(true, false);
    driver.msix_message(0, 1, 0x41);
    driver.msix_mask(0, false);
    driver.start(VERSION_1, &ring);
    (driver, ring)
}

#[test]
fn the_entropy_device_is_what_a_driver_looks_for() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    assert_eq!(driver.config_read(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(driver.features(), VERSION_1 | INDIRECT | EVENT_IDX);
    assert_eq!(driver.config_read::<2>(0x3c), [LINE, 1]);
    assert_eq!(driver.status(), 0);
    machine.end(never);
}

#[test]
fn a_request_goes_to_the_device_and_comes_back_by_msi_without_an_ioctl_or_an_exit() {
    let machine = Machine::new();
    let (driver, ring) = ready(&machine);
    let zeros = [0; 64];
    let (calls, mut all) = (machine.all_calls(), Vec::new());
    for n in 1..=20 {
        machine.memory.write_slice(&zeros, GuestAddress(BUFFER)).unwrap();
        ring.descriptor(0, BUFFER, 64, WRITE, 0);
        ring.offer(0);
        assert_eq!(driver.ring(0), Wrote::Signalled);
        driver.wait_for_requests(n);
        driver.wait_for_signals(n);
        assert_eq!(machine.take_all(), [(1, 0x41)]);
        let mut bytes = [0; 64];
        machine.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        assert_eq!(ring.used_element(n as u16 - 1), (0, 64));
        all.push(bytes);
    }
    assert_eq!(machine.all_calls(), calls);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 20, "no two are the same");
    let counters = driver.counters();
    assert_eq!((counters.requests, counters.bytes_to_guest), (20, 20 * 64));
    assert_eq!((counters.interrupts, counters.notification_exits), (20, 0));
    machine.end(never);
}

#[test]
fn a_device_enable_is_one_routing_table_whatever_the_order_of_its_driver() {
    for mask_first in [true, false] {
        let machine = Machine::new();
        let driver = machine.add(Queues(8, 0));
        let tables = machine.tables();
        // As Linux does: everything masked while the table is written, then vector by vector.
        driver.msix_control(true, mask_first);
        for vector in 0..9 {
            driver.msix_message(vector, u32::from(vector) % VCPUS, 0x40 + vector as u8);
        }
        driver.msix_control(true, false);
        (0..9).for_each(|vector| driver.msix_mask(vector, false));
        driver.reset();
        driver.negotiate(VERSION_1);
        let rings: Vec<_> =
            (0..8).map(|n| Ring::new(&machine, 0x1_0000 + n * 0x1000, 16)).collect();
        for (index, ring) in (0..).zip(&rings) {
            driver.set_up_queue(index, ring, index + 1);
        }
        assert_eq!(machine.tables(), tables);
        driver.driver_ok();
        assert_eq!(machine.tables(), tables + 1);
        assert_eq!(machine.view.irqfds().len(), 9 + 1, "each vector, and the line");
        driver.reset();
        assert_eq!(machine.tables(), tables + 2);
        machine.end(never);
    }
}

/// A device with a number of queues; a request in any is completed with as many bytes as it has, and
/// one with a zero changes its configuration. The second number is the bits of its features.
struct Queues(usize, u64);

impl VirtioDevice for Queues {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        self.1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16; self.0]
    }
    fn config(&self) -> DeviceConfig {
        DeviceConfig::new([1, 2, 3, 4, 5, 6, 7, 8]).writable(4..8)
    }
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(request) = session.queue(queue)?.pop()? {
            let wants_change = request.readable_len() > 0 && request.read_obj::<u8>(0)? == 0;
            let len = request.writable_len();
            session.queue(queue)?.push(request, len)?;
            if wants_change {
                session.change_config(0, &[9, 9]);
            }
        }
        Ok(())
    }
    fn config_written(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        session.change_config(3, &[0xaa]);
        Ok(())
    }
}

#[test]
fn doorbells_are_ioeventfds_where_the_registers_are() {
    let machine = Machine::new();
    let driver = machine.add(Queues(4, 0));
    let places = |machine: &Machine| machine.ioeventfds.assigned().len();
    assert_eq!(places(&machine), 4);
    driver.config_write(4, &[0, 0]);
    assert_eq!(places(&machine), 0);
    // To the window above 4 GiB while disabled, as an operating system would.
    driver.config_write(0x18, &0u32.to_le_bytes());
    driver.config_write(0x1c, &4u32.to_le_bytes());
    assert_eq!(places(&machine), 0);
    driver.config_write(4, &[2, 0]);
    assert_eq!(driver.registers(), 1 << 34);
    let at: Vec<_> = machine.ioeventfds.assigned().iter().map(|m| m.address.value()).collect();
    assert_eq!(at, [0, 4, 8, 12].map(|n| (1 << 34) + 0x3000 + n));

    let ring = Ring::new(&machine, HIGH_RAM, 16);
    driver.reset();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(3, &ring, 0);
    driver.driver_ok();
    ring.descriptor(2, 0x1000, 4, WRITE, 0);
    ring.offer(2);
    assert_eq!(driver.ring(3), Wrote::Signalled);
    driver.wait_for_requests(1);
    assert_eq!(ring.used_element(0), (2, 4));
    // A write of another width is an exit, and rings as well.
    ring.offer(2);
    assert_eq!(driver.write(0x3000 + 12, &3u32.to_le_bytes()), Wrote::Exit);
    driver.wait_for_requests(2);
    assert_eq!(driver.counters().notification_exits, 1);
    machine.end(never);
}

#[test]
fn features_are_offered_and_what_was_not_is_refused() {
    let machine = Machine::new();
    let driver = machine.add(Queues(1, 0b1001));
    assert_eq!(driver.features(), VERSION_1 | INDIRECT | EVENT_IDX | 0b1001);
    driver.negotiate(VERSION_1 | 1);
    driver.reset();
    for features in [1, VERSION_1 | 0b10, 0, VERSION_1 | 1 << 34] {
        driver.set_status(ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            driver.write(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            driver.write(common::DRIVER_FEATURE, &half.to_le_bytes());
        }
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        driver.driver_ok();
        assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER, "not without features");
        driver.reset();
    }
    machine.end(never);
}

#[test]
fn the_configuration_is_shared_and_its_changes_are_told() {
    let machine = Machine::new();
    let driver = machine.add(Queues(1, 0));
    let ring = Ring::new(&machine, 0x1_0000, 16);
    assert_eq!(driver.device_config(0), [1, 2, 3, 4, 5, 6, 7, 8, 0]);
    driver.msix_control(true, false);
    driver.msix_message(1, 0, 0x51);
    driver.msix_mask(1, false);
    driver.reset();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, &ring, 0xffff);
    driver.set_config_vector(1);
    driver.driver_ok();
    let [generation] = driver.read(21);
    machine.memory.write_slice(&[0, 1], GuestAddress(BUFFER)).unwrap();
    ring.descriptor(0, BUFFER, 1, 0, 0);
    ring.offer(0);
    driver.ring(0);
    // The queue has no vector: told of once, and once not.
    driver.wait_for_signals(2);
    assert_eq!(machine.take_all(), [(0, 0x51)]);
    assert_eq!(driver.device_config(0), [9, 9, 3, 4]);
    assert_ne!(driver.read(21), [generation]);
    assert_eq!(driver.counters().suppressed, 1);

    driver.write_device_config(4, &[0x55; 4]);
    driver.wait_for_signals(3);
    assert_eq!(driver.device_config(0), [9, 9, 3, 0xaa, 0x55, 0x55, 0x55, 0x55]);
    let refused = driver.counters().refused;
    driver.write_device_config(0, &[0]);
    driver.write_device_config(7, &[0; 2]);
    assert_eq!(driver.counters().refused, refused + 2);
    machine.end(never);
}

/// The vector of the shared line, to vCPU 1.
const SHARED: u8 = 0x61;

/// Waits for the shared interrupt.
fn wait_for_line(machine: &Machine) {
    wait_for("the interrupt", || !machine.view.take_interrupts(1).is_empty());
}

/// Serves the shared interrupt as a driver does, until its device was the cause. One that is raised
/// again just when its cause is read has none.
fn serve_line(driver: &Driver<'_>) {
    let mut cause = 0;
    while cause == 0 {
        wait_for_line(driver.machine);
        cause = driver.isr();
        driver.machine.view.end_of_interrupt(1, SHARED);
    }
    assert_eq!(cause, 1);
}

#[test]
fn a_driver_without_msix_gets_the_shared_line_until_it_has_read_the_cause() {
    let machine = Machine::new();
    let (one, other) = (machine.add(Rng::new()), machine.add(Rng::new()));
    // Level-triggered, active low, as for PCI.
    machine.program_pin(LINE, 1, 1 << 15 | 1 << 13 | u32::from(SHARED));
    let rings = [0x1_0000, 0x2_0000].map(|at| Ring::new(&machine, at, 16));
    for (driver, ring) in [&one, &other].into_iter().zip(&rings) {
        driver.start(VERSION_1, ring);
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
    }
    let request = |driver: &Driver<'_>, ring: &Ring| {
        ring.offer(0);
        driver.ring(0);
    };
    let calls = machine.all_calls();
    for _ in 0..3 {
        for (driver, ring) in [(&one, &rings[0]), (&other, &rings[1])] {
            let before = driver.counters().requests;
            request(driver, ring);
            driver.wait_for_requests(before + 1);
            wait_for("the cause", || driver.config_read::<2>(6)[0] & 8 != 0);
            serve_line(driver);
            assert_eq!(driver.config_read::<2>(6)[0] & 8, 0);
        }
    }
    assert_eq!(machine.all_calls(), calls, "no ioctl");
    // Not read: it comes again at the end of each interrupt.
    request(&one, &rings[0]);
    for _ in 0..3 {
        wait_for_line(&machine);
        machine.view.end_of_interrupt(1, SHARED);
    }
    // Disabled in the command register: not any more, but for what was under way.
    one.config_write(5, &[4]);
    let quiet = || {
        let before = one.counters().suppressed;
        request(&one, &rings[0]);
        wait_for("a request", || one.counters().suppressed == before + 1);
        let interrupts = machine.view.take_interrupts(1);
        machine.view.end_of_interrupt(1, SHARED);
        interrupts
    };
    while !quiet().is_empty() {}
    assert_eq!(one.isr(), 1);
    assert_eq!(quiet(), []);
    // Enabled again, the cause that is still there interrupts.
    one.config_write(5, &[0]);
    serve_line(&one);
    machine.end(|finding| matches!(finding, hv_core::fake::Finding::LostEvent { .. }));
}

#[test]
fn a_driver_is_told_only_when_it_wants_to_be() {
    for event_idx in [false, true] {
        let machine = Machine::new();
        let (driver, ring) = {
            let driver = machine.add(Rng::new());
            let ring = Ring::new(&machine, 0x1_0000, 16);
            driver.msix_control(true, false);
            driver.msix_message(0, 0, 0x41);
            driver.msix_mask(0, false);
            driver.start(VERSION_1 | if event_idx { EVENT_IDX } else { 0 }, &ring);
            (driver, ring)
        };
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        let request = |n| {
            ring.offer(0);
            driver.ring(0);
            driver.wait_for_signals(n);
        };
        let (quiet, loud): (&dyn Fn(u16), &dyn Fn(u16)) = match event_idx {
            true => (&|n| ring.set_used_event(n + 100), &|n| ring.set_used_event(n)),
            false => (&|_| ring.set_flags(1), &|_| ring.set_flags(0)),
        };
        quiet(0);
        request(1);
        quiet(1);
        request(2);
        assert!(machine.take_all().is_empty());
        loud(2);
        request(3);
        assert_eq!(machine.take_all(), [(0, 0x41)]);
        let counters = driver.counters();
        assert_eq!((counters.interrupts, counters.suppressed), (1, 2), "{event_idx}");
        machine.end(never);
    }
}

#[test]
fn a_reset_at_any_point_leaves_a_device_that_works() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    let ring = Ring::new(&machine, 0x1_0000, 16);
    let steps: &[&dyn Fn()] = &[
        &|| driver.set_status(ACKNOWLEDGE),
        &|| driver.negotiate(VERSION_1),
        &|| driver.set_up_queue(0, &ring, 0),
        &|| driver.driver_ok(),
        &|| {
            ring.descriptor(0, BUFFER, 8, WRITE, 0);
            ring.offer(0);
            driver.ring(0);
        },
        &|| {
            ring.set_available(1000);
            driver.ring(0);
        },
    ];
    for n in 0..=steps.len() {
        ring.clear();
        steps.iter().take(n).for_each(|step| step());
        driver.reset();
        assert_eq!(driver.read(common::QUEUE_VECTOR), [0xff, 0xff]);
        assert_eq!(driver.read(common::QUEUE_ENABLE), [0, 0]);
        let before = driver.counters().requests;
        ring.clear();
        driver.start(VERSION_1, &ring);
        ring.descriptor(0, BUFFER, 8, WRITE, 0);
        ring.offer(0);
        driver.ring(0);
        driver.wait_for_requests(before + 1);
        driver.reset();
    }
    machine.end(never);
}

#[test]
fn what_a_driver_writes_before_the_reset_is_over_is_ignored() {
    let machine = Machine::new();
    let (sender, receiver) = std::sync::mpsc::channel();
    let driver = machine.add(Slow(receiver));
    let ring = Ring::new(&machine, 0x1_0000, 16);
    driver.start(VERSION_1, &ring);
    let refused = driver.counters().refused;
    driver.set_status(0);
    for n in 1..4 {
        assert_ne!(driver.status(), 0, "the device has not let go of the queue");
        driver.set_status(0);
        driver.write(common::QUEUE_SELECT, &[1, 0]);
        driver.set_config_vector(0);
        assert_eq!(driver.counters().refused, refused + 3 * n);
    }
    sender.send(()).unwrap();
    wait_for("the reset", || driver.status() == 0);
    assert_eq!(driver.read(common::CONFIG_VECTOR), [0xff, 0xff]);
    assert_eq!(driver.read(common::QUEUE_SELECT), [0, 0]);
    machine.end(never);
}

/// Stops only when it is told that it may.
struct Slow(std::sync::mpsc::Receiver<()>);

impl VirtioDevice for Slow {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn queue_ready(&mut self, _: &mut Session, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset(&mut self) {
        let _ = self.0.recv();
    }
}

#[test]
fn a_device_whose_thread_is_lost_keeps_asking_for_a_reset_and_holds_nobody_up() {
    let machine = Machine::new();
    let (driver, other) = (machine.add(Buggy), machine.add(Rng::new()));
    let ring = Ring::new(&machine, 0x1_0000, 16);
    for _ in 0..2 {
        driver.start(VERSION_1, &ring);
        driver.ring(0);
        driver.wait_for_needs_reset();
        driver.reset();
    }
    let ring = Ring::new(&machine, 0x2_0000, 16);
    other.start(VERSION_1, &ring);
    ring.descriptor(0, BUFFER, 8, WRITE, 0);
    ring.offer(0);
    other.ring(0);
    other.wait_for_requests(1);
    machine.end(never);
}

/// Has a bug.
struct Buggy;

impl VirtioDevice for Buggy {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn queue_ready(&mut self, _: &mut Session, _: usize) -> Result<(), DeviceError> {
        panic!("a bug, which this test is about");
    }
}

#[test]
fn registers_are_reached_through_configuration_space_too() {
    let machine = Machine::new();
    let driver = machine.add(Rng::new());
    let mut at = u64::from(driver.config_read::<1>(0x34)[0]);
    while driver.config_read::<4>(at)[3] != 5 || driver.config_read::<1>(at) != [9] {
        at = driver.config_read::<2>(at)[1].into();
        assert_ne!(at, 0);
    }
    let target = |bar: u8, offset: u32, len: u32| {
        driver.config_write(at + 4, &[bar]);
        driver.config_write(at + 8, &offset.to_le_bytes());
        driver.config_write(at + 12, &len.to_le_bytes());
    };
    // device_status, even while the BAR is not mapped.
    driver.config_write(4, &[0, 0]);
    target(2, 20, 1);
    driver.config_write(at + 16, &[ACKNOWLEDGE]);
    assert_eq!(driver.config_read::<1>(at + 16), [ACKNOWLEDGE]);
    target(2, 18, 2);
    assert_eq!(driver.config_read::<2>(at + 16), [1, 0]);
    let refused = driver.counters().refused;
    for (n, (bar, offset, len)) in
        (1..).zip([(1, 0, 4), (2, 2, 4), (2, 0, 3), (2, 0x4000, 4), (2, u32::MAX, 1), (9, 0, 0)])
    {
        target(bar, offset, len);
        assert_eq!(driver.config_read::<4>(at + 16), [0; 4]);
        driver.config_write(at + 16, &[1]);
        assert_eq!(driver.counters().refused, refused + 2 * n);
    }
    machine.end(never);
}
