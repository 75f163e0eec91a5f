//! A driver's program over the queues of a device.
//!
//! The driver sets queues up at addresses of its choice, writes descriptors, indices and anything else
//! into guest memory, rings, writes the configuration space and resets the device; the host sends
//! something in between. Nothing of it may make the device panic or keep it busy.
//!
//! As long as the program has only made well-formed requests, the used rings must say what a driver
//! relies on: only requests that were made and not completed yet, with no more bytes than there was
//! room for.

use std::sync::Arc;

use hv_cli::virtio::{Memory, RingSetup};
use hv_memory::{GuestRam, GuestRange, RamLayout, RamMemory};
use signal_hook::consts::SIGPIPE;
use vm_memory::{Bytes, GuestAddress};

use crate::{DEVICES, Input, Subject};

/// RAM: 64 KiB, a hole, 64 KiB. Rings are in the first half of the lower part, a page each; buffers
/// elsewhere.
const RAM: u64 = 0x1_0000;
const HIGH: u64 = 0x2_0000;
const BUFFERS: u64 = 0x8000;
const MOST_QUEUES: usize = 8;

/// In the page of a queue, which has 64 descriptors at most.
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Tables of indirect descriptors, 8 descriptors each.
const TABLES: u64 = 0xc00;
const TABLE: u16 = 8;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// How often a device may say that there is more without the driver doing anything.
const MOST_TURNS: usize = 64;

/// Before all programs: a pipe or socket that nobody reads is an error, as it is in every Rust program.
/// libFuzzer's `main` is none.
///
/// # Panics
/// The system refuses: that is no finding.
pub fn init() {
    signal_hook::flag::register(SIGPIPE, Arc::default()).expect("a signal handler");
}

/// Runs a program.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(make) = input.below(DEVICES.len()).and_then(|index| DEVICES.get(index)) else {
        return;
    };
    let hole = GuestRange::new(GuestAddress(RAM), HIGH - RAM).expect("a range");
    let layout = RamLayout::new(2 * RAM, &[hole], 46).expect("a layout");
    let ram = Arc::new(GuestRam::new(&layout).expect("memory"));
    let memory = Arc::new(ram.memory().clone());
    let subject = make(&ram);
    let mut driver = Driver { memory, subject, queues: Vec::new(), honest: true, buffers: BUFFERS };
    while driver.step(&mut input).is_some() {}
    driver.settle();
    driver.subject.direct.reset();
}

struct Driver {
    memory: Memory,
    subject: Subject,
    queues: Vec<Ring>,
    /// It has kept to the rules since the last reset.
    honest: bool,
    /// Where the next buffer is.
    buffers: u64,
}

/// A queue where the driver believes it to be.
struct Ring {
    page: u64,
    setup: RingSetup,
    next: u16,
    /// Which request was made next, and which was seen to be completed.
    available: u16,
    used: u16,
    /// Requests that are not completed: the first descriptor, how many, and the room they have.
    waiting: Vec<(u16, u16, u32)>,
}

/// What a segment of a request is.
struct Segment {
    writable: bool,
    address: u64,
    len: u32,
}

impl Driver {
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.below(12)? {
            0 | 1 => self.request(input)?,
            2 => self.ring(input)?,
            3 => {
                self.settle();
            }
            4 => self.set_up(input)?,
            5 => {
                let (offset, data) = (input.byte()?, input.bytes(8)?);
                let _ = self.subject.direct.write_config(offset.into(), data);
            }
            6 => {
                let data = input.bytes(64)?;
                if let Some(host) = &mut self.subject.host {
                    host(data);
                }
                self.settle();
            }
            7 => {
                let (address, data) = (address(input)?, input.bytes(32)?);
                self.write(address, data);
            }
            8 => {
                let (queue, index, address) = (self.queue(input)?, input.byte()?, address(input)?);
                let (len, flags, next) = (length(input)?, input.byte()?, input.byte()?);
                let at = queue.setup.descriptors.wrapping_add(16 * u64::from(index));
                let bytes = descriptor(address, len, flags.into(), next.into());
                self.write(at, &bytes);
            }
            9 => {
                let head = input.byte()?;
                let queue = self.queue(input)?;
                let (size, index) = (queue.setup.size.max(1), queue.available);
                queue.available = index.wrapping_add(1);
                let ring = queue.setup.available;
                let slot = ring.wrapping_add(4 + 2 * u64::from(index % size));
                self.write(slot, &u16::from(head).to_le_bytes());
                self.write(ring.wrapping_add(2), &index.wrapping_add(1).to_le_bytes());
            }
            10 => {
                // Flags, index, or from which request on it wants to be told.
                let (what, value) = (input.below(3)?, input.u16()?);
                let RingSetup { size, available, .. } = self.queue(input)?.setup;
                let at = [0, 2, 4 + 2 * u64::from(size)][what];
                if what == 1 {
                    self.write(available.wrapping_add(at), &value.to_le_bytes());
                } else {
                    // Every driver may do that.
                    let at = GuestAddress(available.wrapping_add(at));
                    let _ = self.memory.write_obj(value, at);
                }
            }
            _ => {
                self.subject.direct.reset();
                self.queues.clear();
            }
        }
        Some(())
    }

    /// Anything, anywhere: what the driver does to its own rings is not counted on any more.
    fn write(&mut self, address: u64, data: &[u8]) {
        self.honest = false;
        let _ = self.memory.write(data, GuestAddress(address));
    }

    fn queue(&mut self, input: &mut Input<'_>) -> Option<&mut Ring> {
        let count = self.queues.len();
        let index = input.below(count)?;
        self.queues.get_mut(index)
    }

    /// Resets the device and sets its queues up: features, a byte for each queue, more for those that
    /// are not where they should be.
    fn set_up(&mut self, input: &mut Input<'_>) -> Option<()> {
        self.subject.direct.reset();
        self.queues.clear();
        self.honest = true;
        // The low bits are those of the device, the high ones of the rings: by one byte each.
        let (low, rings) = (input.u32()?, input.byte()?);
        let features = u64::from(low & 0x0fff_ffff) | u64::from(rings) << 28;
        let mut setups = Vec::new();
        for index in 0..input.below(MOST_QUEUES + 1)? {
            let how = input.byte()?;
            let page = 0x1000 * index as u64;
            let mut setup = RingSetup {
                size: 1 << (how % 7),
                descriptors: page,
                available: page + AVAILABLE,
                used: page + USED,
            };
            match how >> 5 {
                0 => {
                    setup.size = input.u16()?;
                    setup.descriptors = address(input)?;
                    setup.available = address(input)?;
                    setup.used = address(input)?;
                    self.honest = false;
                }
                1 => {
                    setups.push(None);
                    continue;
                }
                _ => {}
            }
            let _ = self.memory.write_slice(&[0; 0x1000], GuestAddress(page));
            setups.push(Some(setup));
            let (waiting, next, available, used) = (Vec::new(), 0, 0, 0);
            self.queues.push(Ring { page, setup, next, available, used, waiting });
        }
        // Then numbers are those of the device only if all of them are enabled.
        if setups.contains(&None) {
            self.honest = false;
        }
        let _ = self.subject.direct.activate(features, &setups);
        Some(())
    }

    /// A well-formed request: what is read first, then segments. Whether it is in an indirect table is
    /// said by the first byte.
    fn request(&mut self, input: &mut Input<'_>) -> Option<()> {
        let indirect = input.flag()?;
        let count = self.queues.len();
        let index = input.below(count)?;
        let header = input.bytes(64)?;
        let mut segments = Vec::new();
        if !header.is_empty() {
            segments.push(self.segment(false, header.len() as u32));
            let at = segments.first().map_or(0, |segment| segment.address);
            let _ = self.memory.write_slice(header, GuestAddress(at));
        }
        for _ in 0..input.below(TABLE.into())? {
            let kind = input.byte()?;
            // Those that are read come first.
            let writable = kind & 1 != 0 || segments.last().is_some_and(|last| last.writable);
            let len = if kind & 2 != 0 { input.u16()?.min(0x4000) } else { (kind >> 2).into() };
            segments.push(self.segment(writable, len.into()));
        }
        segments.truncate(TABLE.into());
        if self.subject.rings_change == Some(index) {
            self.honest = false;
        }
        let room = segments.iter().filter(|s| s.writable).map(|s| s.len).sum();
        let queue = self.queues.get_mut(index)?;
        let head = queue.next % queue.setup.size.max(1);
        if indirect && !segments.is_empty() {
            let others = &queue.waiting;
            if others.iter().any(|(other, ..)| other % TABLE == head % TABLE) {
                return Some(());
            }
            let table = queue.page + TABLES + 128 * u64::from(head % TABLE);
            put(&self.memory, table, 0, TABLE, &segments);
            let len = 16 * segments.len() as u32;
            let entry = descriptor(table, len, F_INDIRECT, 0);
            queue.take(head, 1, room)?;
            let at = queue.setup.descriptors.wrapping_add(16 * u64::from(head));
            let _ = self.memory.write_slice(&entry, GuestAddress(at));
        } else {
            let len = segments.len() as u16;
            if len == 0 || len > queue.setup.size || queue.take(head, len, room).is_none() {
                return Some(());
            }
            put(&self.memory, queue.setup.descriptors, head, queue.setup.size, &segments);
        }
        let (size, available) = (queue.setup.size.max(1), queue.available);
        queue.available = available.wrapping_add(1);
        let ring = queue.setup.available;
        let slot = ring.wrapping_add(4 + 2 * u64::from(available % size));
        let _ = self.memory.write_obj(head, GuestAddress(slot));
        let _ = self.memory.write_obj(queue.available, GuestAddress(ring.wrapping_add(2)));
        Some(())
    }

    fn segment(&mut self, writable: bool, len: u32) -> Segment {
        if self.buffers + u64::from(len) > HIGH + RAM {
            self.buffers = BUFFERS;
        }
        if self.buffers < HIGH && self.buffers + u64::from(len) > RAM {
            self.buffers = HIGH;
        }
        let address = self.buffers;
        self.buffers += u64::from(len);
        Segment { writable, address, len }
    }

    fn ring(&mut self, input: &mut Input<'_>) -> Option<()> {
        let queue = input.below(MOST_QUEUES)?;
        let _ = self.subject.direct.ring(queue);
        self.look();
        Some(())
    }

    /// Lets the device do what it still has to do, as far as nothing else is needed. A device that is
    /// woken again and again and completes nothing would keep a thread busy for ever.
    fn settle(&mut self) {
        let done = |driver: &Self| driver.subject.direct.counters().requests;
        let before = done(self);
        let mut turns = 0..MOST_TURNS;
        let rests = turns.any(|_| !matches!(self.subject.direct.turn(), Ok(true)));
        assert!(rests || done(self) > before, "{MOST_TURNS} turns and nothing done");
        self.look();
    }

    /// What the driver finds in the used rings.
    fn look(&mut self) {
        if !self.honest {
            return;
        }
        for ring in &mut self.queues {
            let used = ring.setup.used;
            let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).expect("the used ring");
            let fresh = index.wrapping_sub(ring.used);
            let waiting = ring.waiting.len();
            assert!(usize::from(fresh) <= waiting, "{fresh} completed of {waiting}");
            while ring.used != index {
                let slot = used + 4 + 8 * u64::from(ring.used % ring.setup.size);
                let id: u32 = self.memory.read_obj(GuestAddress(slot)).expect("the used ring");
                let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).expect("the used ring");
                let at = ring.waiting.iter().position(|(head, ..)| u32::from(*head) == id);
                let Some(at) = at else { panic!("nobody waits for request {id}") };
                let (_, _, room) = ring.waiting.swap_remove(at);
                assert!(len <= room, "{len} bytes in room for {room}");
                ring.used = ring.used.wrapping_add(1);
            }
        }
    }
}

impl Ring {
    /// Takes descriptors from `head` on, if they are free.
    fn take(&mut self, head: u16, count: u16, room: u32) -> Option<()> {
        let (size, first) = (u32::from(self.setup.size), u32::from(head));
        let count = u32::from(count);
        if count > size || self.waiting.iter().any(|other| overlap(size, first, count, other)) {
            return None;
        }
        self.waiting.push((head, count as u16, room));
        self.next = ((first + count) % size) as u16;
        Some(())
    }
}

/// Whether a request has one of `count` descriptors from `first` on. Both may wrap.
fn overlap(size: u32, first: u32, count: u32, (other, len, _): &(u16, u16, u32)) -> bool {
    let (other, len) = (u32::from(*other), u32::from(*len));
    (first + size - other) % size < len || (other + size - first) % size < count
}

/// Writes a chain into a table of `size` descriptors, from `head` on.
fn put(memory: &RamMemory, table: u64, head: u16, size: u16, segments: &[Segment]) {
    for (n, segment) in (0..).zip(segments) {
        let last = usize::from(n) + 1 == segments.len();
        let nth = |n: u16| ((u32::from(head) + u32::from(n)) % u32::from(size)) as u16;
        let (at, next) = (nth(n), if last { 0 } else { nth(n + 1) });
        let flags = if last { 0 } else { F_NEXT } | if segment.writable { F_WRITE } else { 0 };
        let bytes = descriptor(segment.address, segment.len, flags, next);
        let at = table.wrapping_add(16 * u64::from(at));
        let _ = memory.write_slice(&bytes, GuestAddress(at));
    }
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// An address near where something begins or ends, by three bytes.
fn address(input: &mut Input<'_>) -> Option<u64> {
    let bases = [
        0,
        BUFFERS,
        RAM - 16,
        RAM,
        HIGH,
        HIGH + RAM - 16,
        HIGH + RAM,
        1 << 32,
        1 << 63,
        u64::MAX - 15,
    ];
    let base = bases[input.below(bases.len())?];
    Some(base.wrapping_add(input.u16()?.into()))
}

/// A length: any below 64 KiB, or near the ends of what can be.
fn length(input: &mut Input<'_>) -> Option<u32> {
    let len = u32::from(input.u16()?);
    Some(match input.below(4)? {
        0 | 1 => len,
        2 => len << 16 | 0xffff,
        _ => u32::MAX - len,
    })
}
