//! The network device over PCI, on the KVM in memory, with a thread of its own: frames, interrupts, and
//! resets at any point. What it does with each request is tested beside it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hv_cli::config::{NetBackend, NetConfig};
use hv_cli::virtio::Net;
use hv_core::fake::{FakeKvm, Finding, Wrote};
use hv_core::{Hypervisor, MemoryBackend};
use hv_memory::{DirtyPages, DirtyTracking, SlotLimits, SlotManager};
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const RX: u64 = 0x1_0000;
const TX: u64 = 0x2_0000;
const BUFFERS: u64 = 0x4_0000;
const SENT: u64 = 0x8_0000;
const HEADER: u64 = 12;
const STATUS: u64 = 1 << 16;

fn never(_: &Finding) -> bool {
    false
}

fn on_socket(socket: impl AsRawFd) -> Net {
    // It has a descriptor of its own then.
    Net::open(&NetConfig::new(NetBackend::Fd(socket.as_raw_fd()))).unwrap()
}

/// From a reset to a device that is used, with these buffers to receive into.
fn start(machine: &Machine, driver: &Driver<'_>, features: u64, buffers: u16) -> [Ring; 2] {
    let rings = [Ring::new(machine, RX, 16), Ring::new(machine, TX, 16)];
    driver.reset();
    driver.negotiate(VERSION_1 | features);
    driver.set_up_queue(0, &rings[0], 0);
    driver.set_up_queue(1, &rings[1], 1);
    driver.set_config_vector(2);
    for index in 0..buffers {
        rings[0].descriptor(index, BUFFERS + 4096 * u64::from(index), 2048, WRITE, 0);
        rings[0].offer(index);
    }
    driver.driver_ok();
    rings
}

fn frame(number: u8) -> [u8; 60] {
    [number; 60]
}

fn send(machine: &Machine, driver: &Driver<'_>, ring: &Ring, number: u8) {
    machine.memory.write_slice(&[0; HEADER as usize], GuestAddress(SENT)).unwrap();
    machine.memory.write_slice(&frame(number), GuestAddress(SENT + HEADER)).unwrap();
    ring.descriptor(0, SENT, HEADER as u32 + 60, 0, 0);
    ring.offer(0);
    assert_eq!(driver.ring(1), Wrote::Signalled);
}

#[test]
fn frames_go_both_ways_and_each_queue_interrupts_by_its_vector() {
    let (ours, host) = UnixDatagram::pair().unwrap();
    let machine = Machine::new();
    let driver = machine.add(on_socket(ours));
    driver.msix_control(true, false);
    for vector in 0..3 {
        driver.msix_message(vector, 1, 0x50 + vector as u8);
        driver.msix_mask(vector, false);
    }
    let [_, tx] = start(&machine, &driver, STATUS, 4);
    let calls = machine.all_calls();
    host.send(&frame(7)).unwrap();
    wait_for("an interrupt", || machine.take_all() == [(1, 0x50)]);
    assert_eq!(machine.memory_at::<60>(BUFFERS + HEADER), frame(7));
    send(&machine, &driver, &tx, 9);
    let mut got = [0; 100];
    assert_eq!(host.recv(&mut got).unwrap(), 60);
    assert_eq!(got[..60], frame(9));
    wait_for("an interrupt", || machine.take_all() == [(1, 0x51)]);
    assert_eq!(machine.all_calls(), calls, "the kernel of the host is asked for nothing");
    let counters = driver.counters();
    assert_eq!((counters.requests, counters.errors, counters.notification_exits), (2, 0, 0));
    machine.end(never);
}

/// The header is in one page, the frame, which the kernel writes, in another.
#[test]
fn what_is_received_is_among_the_dirty_pages() {
    let (ours, host) = UnixDatagram::pair().unwrap();
    let machine = Machine::new();
    let driver = machine.add(on_socket(ours));
    let [rx, _] = start(&machine, &driver, 0, 0);
    let frame_at = BUFFERS + 0x3000;
    rx.descriptor(0, BUFFERS, HEADER as u32, NEXT | WRITE, 1);
    rx.descriptor(1, frame_at, 2048, WRITE, 0);
    rx.offer(0);
    // The slots as another VM has them, which logs.
    let vm = Arc::new(FakeKvm::default().create_vm(0).unwrap());
    let logging = machine.ram.slots().iter().cloned().map(|mut slot| {
        slot.flags.log_dirty = true;
        vm.set_memory_slot(&slot).unwrap();
        ("RAM", slot)
    });
    let logging: Vec<_> = logging.collect();
    let limits = SlotLimits { slots: 32, address_bits: 40 };
    let (manager, _slots) = SlotManager::adopt(vm, logging, limits).unwrap();
    manager.track_dirty(DirtyTracking::Log).unwrap();
    let mut pages = DirtyPages::new();
    manager.harvest_dirty(&mut pages).unwrap();

    host.send(&frame(1)).unwrap();
    driver.ring(0);
    driver.wait_for_requests(1);
    manager.harvest_dirty(&mut pages).unwrap();
    let dirty = |at| pages.ranges().any(|range| (range.start().0..=range.last().0).contains(&at));
    assert!(dirty(frame_at) && dirty(BUFFERS), "{pages:?}");
    assert!(!dirty(frame_at + 0x1000) && !dirty(frame_at - 0x1000), "{pages:?}");
    machine.end(never);
}

#[test]
fn the_driver_is_told_that_the_link_is_down_and_the_device_goes_on() {
    let (ours, host) = UnixStream::pair().unwrap();
    let machine = Machine::new();
    let driver = machine.add(on_socket(ours));
    driver.msix_control(true, false);
    driver.msix_message(2, 0, 0x52);
    driver.msix_mask(2, false);
    let [_, tx] = start(&machine, &driver, STATUS, 4);
    assert_eq!(driver.device_config::<2>(6), [1, 0]);
    drop(host);
    wait_for("the interrupt", || machine.take_all().contains(&(0, 0x52)));
    assert_eq!(driver.device_config::<2>(6), [0, 0]);
    send(&machine, &driver, &tx, 1);
    driver.wait_for_requests(1);
    assert_eq!((driver.counters().errors, driver.status() & NEEDS_RESET), (1, 0));
    machine.end(never);
}

#[test]
fn a_hostile_chain_asks_for_a_reset_and_the_device_is_well_after_it() {
    let (ours, host) = UnixDatagram::pair().unwrap();
    let machine = Machine::new();
    let driver = machine.add(on_socket(ours));
    for queue in [0, 1] {
        let rings = start(&machine, &driver, 0, 0);
        rings[queue].descriptor(0, LOW_RAM - 8, 16, if queue == 0 { WRITE } else { 0 }, 0);
        rings[queue].offer(0);
        driver.ring(queue as u16);
        host.send(&frame(1)).unwrap();
        driver.wait_for_needs_reset();
        assert!(driver.failure().contains("not guest memory"), "{}", driver.failure());
    }
    start(&machine, &driver, 0, 4);
    // Those that were sent meanwhile.
    driver.wait_for_requests(2);
    machine.end(never);
}

/// Says that it is over, also if a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Frames come all the time, some are sent, and the driver resets the device wherever it is. After a reset
/// nothing is written to the buffers of before.
#[test]
fn a_reset_at_any_point_leaves_the_memory_to_the_driver() {
    for stream in [false, true] {
        let (datagram, to_datagram) = UnixDatagram::pair().unwrap();
        let (connected, to_stream) = UnixStream::pair().unwrap();
        let machine = Machine::new();
        let net = if stream { on_socket(connected) } else { on_socket(datagram) };
        let driver = machine.add(net);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let bytes = [&60u32.to_be_bytes()[..], &frame(3)].concat();
                to_stream.set_nonblocking(true).unwrap();
                to_datagram.set_nonblocking(true).unwrap();
                let mut rest: &[u8] = &bytes;
                while !stop.load(Ordering::Relaxed) {
                    let sent = if stream {
                        let sent = rustix::io::write(&to_stream, rest).unwrap_or(0);
                        rest = if sent == rest.len() { &bytes } else { &rest[sent..] };
                        sent
                    } else {
                        to_datagram.send(&frame(3)).unwrap_or(0)
                    };
                    if sent == 0 {
                        std::thread::yield_now();
                    }
                }
            });
            let _stop = Stop(&stop);
            for round in 0..100u64 {
                let before = driver.counters().requests;
                let [_, tx] = start(&machine, &driver, 0, 8);
                if round % 3 > 0 {
                    driver.wait_for_requests(before + round % 3);
                }
                send(&machine, &driver, &tx, 5);
                driver.reset();
                let requests = driver.counters().requests;
                machine.memory.write_slice(&[0xee; 8 * 4096], GuestAddress(BUFFERS)).unwrap();
                for _ in 0..10 {
                    std::thread::yield_now();
                }
                let untouched = machine.memory_at::<{ 8 * 4096 }>(BUFFERS);
                assert!(untouched.iter().all(|byte| *byte == 0xee));
                assert_eq!(driver.counters().requests, requests);
            }
        });
        assert_eq!((driver.counters().needs_reset, driver.counters().errors), (0, 0));
        machine.end(never);
    }
}
