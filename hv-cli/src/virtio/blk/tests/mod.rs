//! A driver's side of the device, on virtio-queue's mock queues: what it does right, wrong and with
//! intent. Each on io_uring and on system calls.

mod bad_disk;
mod dirty;
mod durable;
mod hostile;
mod queues;
mod requests;
mod resets;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hv_memory::Mapping;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::request::{MOST_SECTORS, MOST_SEGMENTS};
use super::*;
use crate::config::DiskIo;
use crate::virtio::queue::{QueueSetup, Virtqueue};
use crate::virtio::{CounterValues, Counters, DeviceInterrupts, Memory, QueueError};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Where a request's parts are in guest memory; the rest is the rings'.
const HEADER_AT: u64 = 0x1_0000;
const STATUS_AT: u64 = 0x1_1000;
const DATA_AT: u64 = 0x2_0000;
/// Half of the data of a request that is in two regions of memory.
const SECOND_REGION: u64 = 0x10_0000;
const MEMORY_END: u64 = 0x20_0000;
/// Where the rings of the queues are.
const RING: u64 = 0x8_0000;
const RING_BYTES: u64 = 0x4000;
/// Where a chain's own table is.
const TABLE_AT: u64 = 0xc_0000;

/// What is in the status byte when the device has not written it.
const NONE: u8 = 0xaa;

const SECTORS: u64 = 64;

struct Rig {
    blk: Blk,
    session: Session,
    memory: Memory,
    /// What the memory is in.
    mappings: [Arc<Mapping>; 2],
    counters: Arc<Counters>,
    rings: Vec<Ring>,
    /// The queue that is used.
    queue: usize,
    file: File,
}

/// A queue as its driver sees it.
struct Ring {
    descriptors: u64,
    available: u64,
    used: u64,
    /// Descriptors that were written.
    made: u16,
    /// Elements of the used ring that were looked at.
    taken: u16,
}

impl Ring {
    fn new(memory: &Memory, index: u16) -> Self {
        let at = GuestAddress(RING + RING_BYTES * u64::from(index));
        let mock = MockSplitQueue::create(&**memory, at, QUEUE_SIZE);
        let (available, used) = (mock.avail_addr().0, mock.used_addr().0);
        Self { descriptors: at.0, available, used, made: 0, taken: 0 }
    }

    fn setup(&self) -> QueueSetup {
        let &Self { descriptors, available, used, .. } = self;
        QueueSetup { enabled: true, descriptors, available, used, ..QueueSetup::new(QUEUE_SIZE) }
    }
}

fn both(test: impl Fn(DiskIo)) {
    test(DiskIo::Sync);
    match ring::Ring::new(8) {
        Ok(_) => test(DiskIo::Uring),
        Err(error) => eprintln!("SKIPPED on io_uring, which this host refuses: {error}"),
    }
}

/// Sector N is full of bytes N + 1.
fn pattern() -> Vec<u8> {
    (1..=SECTORS as u8).flat_map(|byte| [byte; 512]).collect()
}

fn image() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern()).unwrap();
    file
}

/// A device for which every write is ENOSPC, and which can't be synced.
fn full() -> File {
    File::options().read(true).write(true).open("/dev/full").unwrap()
}

impl Rig {
    fn new(io: DiskIo) -> Self {
        Self::on(image(), io, FLUSH, |_| {})
    }

    fn read_only(io: DiskIo) -> Self {
        Self::on(image(), io, 0, |config| config.read_only = true)
    }

    fn on(file: File, io: DiskIo, features: u64, change: impl Fn(&mut DiskConfig)) -> Self {
        let mut config = DiskConfig::new("disk");
        change(&mut config);
        let ranges = [0..SECOND_REGION, SECOND_REGION..MEMORY_END];
        let mappings = ranges
            .clone()
            .map(|range| Arc::new(Mapping::anonymous(range.end - range.start).unwrap()));
        let regions = mappings.iter().zip(ranges).map(|(mapping, range)| {
            GuestRegionMmap::with_arc(mapping.region(), GuestAddress(range.start)).unwrap()
        });
        let memory = Arc::new(GuestMemoryMmap::from_regions(regions.collect()).unwrap());
        let counters = Arc::new(Counters::default());
        let geometry = Geometry { sectors: SECTORS, read_only: config.read_only };
        let engine = Engine::new(file.try_clone().unwrap(), io, QUEUE_SIZE.into()).unwrap();
        let blk = Blk::new(engine, geometry, &config);
        let (session, rings) = session(&blk, features, &memory, &counters);
        let mut rig = Self { blk, session, memory, mappings, counters, rings, queue: 0, file };
        rig.blk.activate(&mut rig.session).unwrap();
        rig
    }

    /// The device is reset, and has a driver again.
    fn reset(&mut self) {
        self.blk.reset();
        (self.session, self.rings) = session(&self.blk, FLUSH, &self.memory, &self.counters);
        self.blk.activate(&mut self.session).unwrap();
    }

    /// Makes a chain available.
    fn offer(&mut self, parts: &[Part]) {
        let ring = &mut self.rings[self.queue];
        if usize::from(ring.made) + parts.len() > usize::from(QUEUE_SIZE) {
            ring.made = 0; // no test has that many waiting
        }
        let first = ring.made;
        ring.made += parts.len() as u16;
        let at = ring.descriptors + 16 * u64::from(first);
        self.write_chain(at, first, parts);
        self.offer_head(first);
    }

    /// Makes a chain available that has its descriptors in a table of its own.
    fn offer_indirect(&mut self, parts: &[Part]) {
        self.write_chain(TABLE_AT, 0, parts);
        let ring = &mut self.rings[self.queue];
        let first = ring.made;
        ring.made += 1;
        let len = 16 * parts.len() as u32;
        let table = Descriptor::new(TABLE_AT, len, VRING_DESC_F_INDIRECT as u16, 0);
        let at = GuestAddress(ring.descriptors + 16 * u64::from(first));
        self.memory.write_obj(RawDescriptor::from(table), at).unwrap();
        self.offer_head(first);
    }

    /// Writes a chain to a table, as its descriptors from `first` on.
    fn write_chain(&self, at: u64, first: u16, parts: &[Part]) {
        for (index, &(address, len, writable)) in (0u16..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags = if writable { VRING_DESC_F_WRITE } else { 0 };
            let flags = flags | if last { 0 } else { VRING_DESC_F_NEXT };
            let next = if last { 0 } else { first + index + 1 };
            let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags as u16, next));
            let at = GuestAddress(at + 16 * u64::from(index));
            self.memory.write_obj(descriptor, at).unwrap();
        }
    }

    fn offer_head(&mut self, head: u16) {
        let available = self.rings[self.queue].available;
        let index = self.available_index();
        let place = available + 4 + 2 * u64::from(index % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(place)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(available + 2)).unwrap();
    }

    fn available_index(&self) -> u16 {
        let available = self.rings[self.queue].available;
        self.memory.read_obj(GuestAddress(available + 2)).unwrap()
    }

    /// Calls the device for the queue, once.
    fn ring(&mut self) -> Result<(), DeviceError> {
        self.session.queues().iter_mut().for_each(Virtqueue::begin);
        self.blk.queue_ready(&mut self.session, self.queue)
    }

    /// Rings, and waits for what is under way.
    fn run(&mut self) -> Result<(), DeviceError> {
        self.ring()?;
        self.wait()
    }

    /// Waits for what is under way.
    fn wait(&mut self) -> Result<(), DeviceError> {
        let mut ready = Vec::new();
        while self.blk.under_way.iter().any(|n| *n > 0) {
            self.session.poller.wait(false, &mut ready).unwrap();
            for (_, ready) in std::mem::take(&mut ready) {
                self.blk.host_ready(&mut self.session, ready)?;
            }
        }
        Ok(())
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.rings[self.queue].used + 2)).unwrap()
    }

    /// The next used element's length.
    fn take_used(&mut self) -> u32 {
        let index = self.used_index();
        let ring = &mut self.rings[self.queue];
        assert_ne!(ring.taken, index, "nothing was completed");
        let at = GuestAddress(ring.used + 4 + 8 * u64::from(ring.taken % QUEUE_SIZE));
        ring.taken = ring.taken.wrapping_add(1);
        self.memory.read_obj::<VirtqUsedElem>(at).unwrap().len()
    }

    fn header(&self, kind: u32, sector: u64) {
        self.header_at(HEADER_AT, kind, sector);
        self.memory.write_obj(NONE, GuestAddress(STATUS_AT)).unwrap();
    }

    fn header_at(&self, at: u64, kind: u32, sector: u64) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS_AT)).unwrap()
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(DATA_AT)).unwrap();
        data
    }

    /// A request with these parts between header and status: status and used length.
    fn ask_parts(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        self.header(kind, sector);
        let mut parts = vec![(HEADER_AT, 16, false)];
        parts.extend(data);
        parts.push((STATUS_AT, 1, true));
        self.offer(&parts);
        self.run().unwrap();
        let len = self.take_used();
        (self.status(), len)
    }

    fn read(&mut self, sector: u64, len: u32) -> u8 {
        self.ask_parts(VIRTIO_BLK_T_IN, sector, &[(DATA_AT, len, true)]).0
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.memory.write_slice(data, GuestAddress(DATA_AT)).unwrap();
        self.ask_parts(VIRTIO_BLK_T_OUT, sector, &[(DATA_AT, data.len() as u32, false)]).0
    }

    fn flush(&mut self) -> u8 {
        self.ask_parts(VIRTIO_BLK_T_FLUSH, 0, &[]).0
    }

    /// A discard or a write of zeroes with these segments: sector, sectors, flags.
    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let mut data = Vec::new();
        for (sector, sectors, flags) in segments {
            data.extend(sector.to_le_bytes());
            data.extend(sectors.to_le_bytes());
            data.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&data, GuestAddress(DATA_AT)).unwrap();
        self.ask_parts(kind, 0, &[(DATA_AT, data.len() as u32, false)]).0
    }

    fn contents(&mut self) -> Vec<u8> {
        let mut contents = Vec::new();
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.read_to_end(&mut contents).unwrap();
        contents
    }

    fn counted(&self) -> CounterValues {
        self.counters.values()
    }
}

/// Address, length, whether the device writes it.
type Part = (u64, u32, bool);

/// A session with all queues of the device.
fn session(
    blk: &Blk,
    features: u64,
    memory: &Memory,
    counters: &Arc<Counters>,
) -> (Session, Vec<Ring>) {
    let count = blk.under_way.len() as u16;
    let rings: Vec<Ring> = (0..count).map(|index| Ring::new(memory, index)).collect();
    let line = crate::event::Event::new().unwrap().shared();
    let interrupts = DeviceInterrupts::new(count.into(), Vec::new(), Some(line), counters.clone());
    let interrupts = Arc::new(interrupts);
    let event_idx = features & EVENT_IDX != 0;
    let queue = |(index, ring): (u16, &Ring)| {
        let (memory, interrupts) = (memory.clone(), interrupts.clone());
        Virtqueue::new(index, &ring.setup(), event_idx, memory, interrupts, counters.clone())
    };
    let queues = (0..).zip(&rings).map(queue).collect::<Result<_, _>>().unwrap();
    let (memory, counters) = (memory.clone(), counters.clone());
    let session = Session::new(features, queues, memory, blk.config(), interrupts, counters);
    (session.unwrap(), rings)
}
