//! A driver's side of the device, right, wrong and hostile, with sockets for tap interfaces.

mod any;
mod control;
mod frames;
mod open;
mod stream;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use hv_core::EventFd;
use hv_memory::RamMemory;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4};
use vm_memory::{Bytes, GuestAddress};

use super::port::{Stream, failed};
use super::*;
use crate::config::{NetBackend, NetConfig};
use crate::event::Event;
use crate::virtio::queue::{QueueSetup, Virtqueue};
use crate::virtio::{CounterValues, Counters, DeviceInterrupts, Memory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Memory of two regions, one right after the other; the rings are in the first.
const SECOND: u64 = 0x10_0000;
const END: u64 = 0x20_0000;
const BUFFERS: u64 = 0x8_0000;
const SIZE: u16 = 32;

const RX: usize = 0;
const TX: usize = 1;
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
const STATUS_FEATURE: u64 = 1 << VIRTIO_NET_F_STATUS;

/// A ring as its driver has it.
struct Ring {
    at: u64,
    offered: u16,
    descriptors: u16,
    seen: u16,
}

impl Ring {
    fn available(&self) -> u64 {
        self.at + 16 * u64::from(SIZE)
    }
    fn used(&self) -> u64 {
        self.at + 0x800
    }
}

struct Rig {
    net: Net,
    session: Session,
    memory: Memory,
    counters: Arc<Counters>,
    rings: Vec<Ring>,
    config_changed: EventFd,
}

fn memory() -> Memory {
    let ranges =
        [(GuestAddress(0), SECOND as usize), (GuestAddress(SECOND), (END - SECOND) as usize)];
    Arc::new(RamMemory::from_ranges(&ranges).unwrap())
}

fn session(
    net: &Net,
    features: u64,
    memory: &Memory,
    counters: &Arc<Counters>,
) -> (Session, Vec<Ring>, EventFd) {
    let count = net.queue_sizes().len();
    let events: Vec<_> = (0..=count).map(|_| Event::new().unwrap().shared()).collect();
    let config_changed = events[count].clone();
    let interrupts = DeviceInterrupts::new(count, events, None, counters.clone());
    interrupts.use_messages(true);
    interrupts.set_config_vector(count as u16);
    let interrupts = Arc::new(interrupts);
    let (mut queues, mut rings) = (Vec::new(), Vec::new());
    for index in 0..count as u16 {
        let at = 0x1000 * (1 + u64::from(index));
        memory.write_slice(&[0; 0x1000], GuestAddress(at)).unwrap();
        let ring = Ring { at, offered: 0, descriptors: 0, seen: 0 };
        let setup = QueueSetup {
            size: SIZE,
            enabled: true,
            descriptors: at,
            available: ring.available(),
            used: ring.used(),
            ..QueueSetup::new(QUEUE_SIZE)
        };
        let shared = (memory.clone(), interrupts.clone(), counters.clone());
        queues.push(Virtqueue::new(index, &setup, false, shared.0, shared.1, shared.2).unwrap());
        rings.push(ring);
    }
    let config = net.config();
    let shared = (memory.clone(), interrupts, counters.clone());
    let session = Session::new(features, queues, shared.0, config, shared.1, shared.2).unwrap();
    (session, rings, config_changed)
}

impl Rig {
    fn new(ports: Vec<Port>, features: u64) -> Self {
        let net = Net::new(ports, 0, [2, 0, 0, 0, 0, 1], None);
        let (memory, counters) = (memory(), Arc::new(Counters::default()));
        let (session, rings, config_changed) = session(&net, features, &memory, &counters);
        let mut rig = Self { net, session, memory, counters, rings, config_changed };
        rig.net.activate(&mut rig.session).unwrap();
        rig.all_queues();
        rig
    }

    /// The driver resets the device and begins anew.
    fn reset(&mut self, features: u64) {
        self.net.reset();
        let (session, rings, changed) = session(&self.net, features, &self.memory, &self.counters);
        (self.session, self.rings, self.config_changed) = (session, rings, changed);
        self.net.activate(&mut self.session).unwrap();
        self.all_queues();
    }

    fn all_queues(&mut self) {
        (0..self.rings.len()).for_each(|queue| self.ring(queue));
    }

    /// Makes a chain available: address, length, flags of each buffer.
    fn offer(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u32 {
        let ring = &mut self.rings[queue];
        let head = ring.descriptors % SIZE;
        for (n, &(address, len, flags)) in buffers.iter().enumerate() {
            let index = ring.descriptors % SIZE;
            let next = if n + 1 < buffers.len() { NEXT } else { 0 };
            let at = ring.at + 16 * u64::from(index);
            let entry = (address, len, flags | next, (index + 1) % SIZE);
            self.memory.write_obj(entry.0, GuestAddress(at)).unwrap();
            self.memory.write_obj(entry.1, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(entry.2, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(entry.3, GuestAddress(at + 14)).unwrap();
            ring.descriptors = ring.descriptors.wrapping_add(1);
        }
        let slot = ring.available() + 4 + 2 * u64::from(ring.offered % SIZE);
        ring.offered = ring.offered.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(ring.offered, GuestAddress(ring.available() + 2)).unwrap();
        head.into()
    }

    /// Offers a frame to be sent, behind a header of zeros.
    fn offer_frame(&mut self, at: u64, frame: &[u8]) {
        self.memory.write_slice(&[0; HEADER], GuestAddress(at)).unwrap();
        self.memory.write_slice(frame, GuestAddress(at + HEADER as u64)).unwrap();
        self.offer(TX, &[(at, (HEADER + frame.len()) as u32, 0)]);
    }

    /// Rings a doorbell, as the device's thread hears it.
    fn ring(&mut self, queue: usize) {
        loop {
            self.begin();
            self.session.queue(queue).unwrap().nothing_more();
            self.net.queue_ready(&mut self.session, queue).unwrap();
            if !self.session.queue(queue).unwrap().has_more() {
                break;
            }
        }
    }

    fn begin(&mut self) {
        self.session.queues().iter_mut().for_each(Virtqueue::begin);
    }

    /// What the device's thread does while something is ready. It must not be woken without end.
    fn poll(&mut self) -> usize {
        for rounds in 0.. {
            assert!(rounds < 10_000, "it is woken for nothing");
            let mut ready = Vec::new();
            self.session.poller.wait(true, &mut ready).unwrap();
            if ready.is_empty() {
                return rounds;
            }
            for (_, what) in ready {
                self.begin();
                self.net.host_ready(&mut self.session, what).unwrap();
            }
            for queue in 0..self.rings.len() {
                if self.session.queue(queue).unwrap().has_more() {
                    self.ring(queue);
                }
            }
        }
        0
    }

    /// What was completed since: heads and lengths.
    fn completed(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = &mut self.rings[queue];
        let index: u16 = self.memory.read_obj(GuestAddress(ring.used() + 2)).unwrap();
        let mut all = Vec::new();
        while ring.seen != index {
            let at = ring.used() + 4 + 8 * u64::from(ring.seen % SIZE);
            let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
            all.push((head, len));
            ring.seen = ring.seen.wrapping_add(1);
        }
        all
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn values(&self) -> CounterValues {
        self.counters.values()
    }

    fn link_is_up(&self) -> bool {
        let mut status = [0; 2];
        self.net.config().get(STATUS, &mut status);
        status == [1, 0]
    }
}

fn frames() -> (Port, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).unwrap();
    }
    (Port { fd: ours.into(), kind: Kind::Frames }, theirs)
}

fn stream() -> (Port, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).unwrap();
    }
    (Port { fd: ours.into(), kind: Kind::Stream(Stream::default()) }, theirs)
}

/// A frame like no other.
fn frame(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|n| (seed * 31 + n * 7 + n / 256) as u8).collect()
}

fn received(socket: &UnixDatagram) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 1 << 17];
    let len = socket.recv(&mut buffer).ok()?;
    buffer.truncate(len);
    Some(buffer)
}

fn in_stream(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}
