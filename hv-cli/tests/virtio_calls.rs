//! What virtio devices ask of KVM, counted on the KVM in memory: nothing for a request, and one routing
//! table for a device that a driver enables.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use hv_cli::config::{DiskConfig, DiskIo, NetBackend, NetConfig};
use hv_cli::virtio::{Blk, DeviceError, DiskError, Net, Session, VirtioDevice};
use hv_core::fake::{Finding, Wrote};
use tempfile::NamedTempFile;
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

fn never(_: &Finding) -> bool {
    false
}

const ROUNDS: u16 = 100;

/// MSI-X with as many vectors, from number 0x40 on, all of vCPU 1.
fn messages(driver: &Driver<'_>, vectors: u16) {
    driver.msix_control(true, false);
    for vector in 0..vectors {
        driver.msix_message(vector, 1, 0x40 + vector as u8);
        driver.msix_mask(vector, false);
    }
}

const HEADER: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;
const STATUS: u64 = 0x4_1000;
const BLOCK: u32 = 4096;

/// A disk of two blocks, or nothing, loudly, where the host has no io_uring.
fn disk(file: &NamedTempFile, io: DiskIo) -> Option<Blk> {
    file.as_file().write_all(&[0; 2 * BLOCK as usize]).unwrap();
    match Blk::open(&DiskConfig { io, ..DiskConfig::new(file.path()) }) {
        Ok(blk) => Some(blk),
        Err(error @ DiskError::NoRing { .. }) => {
            eprintln!("SKIPPED on io_uring: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_disk_asks_nothing_of_kvm_for_its_requests() {
    for io in [DiskIo::Sync, DiskIo::Uring] {
        let file = NamedTempFile::new().unwrap();
        let Some(blk) = disk(&file, io) else { continue };
        let machine = Machine::new();
        let driver = machine.add(blk);
        let ring = Ring::new(&machine, 0x1_0000, 16);
        messages(&driver, 1);
        driver.start(VERSION_1, &ring);
        let calls = machine.all_calls();
        for n in 0..ROUNDS {
            // Written and read in turn.
            let kind = u32::from(n % 2 == 0);
            machine.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
            machine.memory.write_obj(8u64, GuestAddress(HEADER + 8)).unwrap();
            machine.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
            ring.descriptor(0, HEADER, 16, NEXT, 1);
            ring.descriptor(1, DATA, BLOCK, NEXT | if kind == 0 { WRITE } else { 0 }, 2);
            ring.descriptor(2, STATUS, 1, WRITE, 0);
            ring.offer(0);
            assert_eq!(driver.ring(0), Wrote::Signalled);
            driver.wait_for_signals(u64::from(n) + 1);
            assert_eq!(machine.take_all(), [(1, 0x40)]);
            assert_eq!(machine.memory_at(STATUS), [0]);
        }
        assert_eq!(machine.all_calls(), calls, "{io:?}");
        let counters = driver.counters();
        let expected = (u64::from(ROUNDS), u64::from(ROUNDS), 0);
        assert_eq!((counters.requests, counters.interrupts, counters.notification_exits), expected);
        machine.end(never);
    }
}

#[test]
fn a_network_device_asks_nothing_of_kvm_for_its_frames() {
    let (ours, host) = UnixDatagram::pair().unwrap();
    let machine = Machine::new();
    let net = Net::open(&NetConfig::new(NetBackend::Fd(ours.as_raw_fd()))).unwrap();
    let driver = machine.add(net);
    let rings = [Ring::new(&machine, 0x1_0000, 16), Ring::new(&machine, 0x2_0000, 16)];
    messages(&driver, 3);
    driver.reset();
    driver.negotiate(VERSION_1);
    for (index, ring) in (0..).zip(&rings) {
        driver.set_up_queue(index, ring, index);
    }
    driver.driver_ok();
    let calls = machine.all_calls();
    for n in 0..ROUNDS {
        rings[0].descriptor(0, DATA, 2048, WRITE, 0);
        rings[0].offer(0);
        assert_eq!(driver.ring(0), Wrote::Signalled);
        host.send(&[n as u8; 60]).unwrap();
        driver.wait_for_signals(2 * u64::from(n) + 1);
        assert_eq!(machine.take_all(), [(1, 0x40)]);
        machine.memory.write_slice(&[0; 12], GuestAddress(HEADER)).unwrap();
        rings[1].descriptor(0, HEADER, 12 + 60, 0, 0);
        rings[1].offer(0);
        assert_eq!(driver.ring(1), Wrote::Signalled);
        assert_eq!(host.recv(&mut [0; 100]).unwrap(), 60);
        driver.wait_for_signals(2 * u64::from(n) + 2);
        assert_eq!(machine.take_all(), [(1, 0x41)]);
    }
    assert_eq!(machine.all_calls(), calls);
    let counters = driver.counters();
    let both = 2 * u64::from(ROUNDS);
    assert_eq!(
        (counters.requests, counters.interrupts, counters.notification_exits),
        (both, both, 0)
    );
    machine.end(never);
}

/// With the one of the configuration, a device has eight vectors.
const QUEUES: u16 = 7;
const VECTORS: u16 = QUEUES + 1;
const DEVICES: usize = 8;

struct Idle;

impl VirtioDevice for Idle {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16; QUEUES.into()]
    }
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(request) = session.queue(queue)?.pop()? {
            session.queue(queue)?.push(request, 0)?;
        }
        Ok(())
    }
}

/// When a driver does what with MSI-X.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    /// The whole table, then MSI-X is enabled.
    TableThenEnable,
    /// As Linux: MSI-X enabled with the function masked while the masked entries are written, then the
    /// function unmasked, then each vector written again and unmasked.
    Linux,
    /// MSI-X enabled, then each entry written and unmasked.
    EnableThenTable,
    /// The device is ready, and then the table written and MSI-X enabled.
    Late,
}

const ORDERS: [Order; 4] =
    [Order::TableThenEnable, Order::Linux, Order::EnableThenTable, Order::Late];

fn table(driver: &Driver<'_>, unmask: bool) {
    for vector in 0..VECTORS {
        driver.msix_message(vector, u32::from(vector) % VCPUS, 0x40 + vector as u8);
        if unmask {
            driver.msix_mask(vector, false);
        }
    }
}

fn set_up_msix(driver: &Driver<'_>, order: Order) {
    match order {
        Order::TableThenEnable | Order::Late => {
            table(driver, true);
            driver.msix_control(true, false);
        }
        Order::Linux => {
            driver.msix_control(true, true);
            (0..VECTORS).for_each(|vector| driver.msix_mask(vector, true));
            table(driver, false);
            driver.msix_control(true, false);
            table(driver, true);
        }
        Order::EnableThenTable => {
            driver.msix_control(true, false);
            table(driver, true);
        }
    }
}

#[test]
fn eight_devices_with_64_vectors_are_a_routing_table_each_whatever_the_order_of_their_driver() {
    for order in ORDERS {
        let machine = Machine::new();
        let drivers: Vec<_> = (0..DEVICES).map(|_| machine.add(Idle)).collect();
        let (before, irqfds) = (machine.tables(), machine.view.irqfds().len());
        for (n, driver) in (0..).zip(&drivers) {
            let tables = machine.tables();
            let place = |queue: u64| 0x1_0000 + (n * u64::from(QUEUES) + queue) * 0x1000;
            let rings: Vec<_> =
                (0..QUEUES.into()).map(|queue| Ring::new(&machine, place(queue), 16)).collect();
            driver.reset();
            if order != Order::Late {
                set_up_msix(driver, order);
            }
            driver.negotiate(VERSION_1);
            driver.set_config_vector(0);
            for (index, ring) in (0..).zip(&rings) {
                driver.set_up_queue(index, ring, index + 1);
            }
            driver.driver_ok();
            if order == Order::Late {
                set_up_msix(driver, order);
            }
            assert!(machine.tables() <= tables + 1, "{order:?}, device {n}");
            // Each vector works, and using it costs nothing.
            let calls = machine.all_calls();
            for (index, ring) in (0..QUEUES).zip(&rings) {
                ring.descriptor(0, DATA, 8, WRITE, 0);
                ring.offer(0);
                assert_eq!(driver.ring(index), Wrote::Signalled);
                let vector = index + 1;
                let expected = (u32::from(vector) % VCPUS, 0x40 + vector as u8);
                wait_for("the interrupt", || machine.take_all() == [expected]);
            }
            assert_eq!(machine.all_calls(), calls, "{order:?}, device {n}");
        }
        assert_eq!(machine.view.irqfds().len() - irqfds, DEVICES * usize::from(VECTORS));
        assert!(machine.tables() <= before + DEVICES as u64, "{order:?}");
        machine.end(never);
    }
}
