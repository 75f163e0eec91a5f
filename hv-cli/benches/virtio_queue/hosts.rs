//! Devices with something of the host behind them, and that something alone.

use std::fs::File;
use std::hint::black_box;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use hv_cli::config::{DiskConfig, DiskIo, NetBackend, NetConfig};
use hv_cli::event::Event;
use hv_cli::virtio::{Blk, ConsoleDevice, ConsoleInput, ConsoleOutput, Memory, Net, Rng};
use hv_memory::{GuestRam, RamLayout};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{BUFFERS, NEXT, RAM, Subject, WRITE, memory};
use super::{BATCH, Batch};

const BLOCK: u32 = 4096;
/// Where headers and status bytes are.
const HEADERS: u64 = 0x8_0000;
const STATUS: u64 = 0x9_0000;
const SMALL: u32 = 64;
/// `struct virtio_net_hdr_v1`.
const NET_HEADER: u32 = 12;

fn buffer(n: u16) -> u64 {
    BUFFERS + 0x1_0000 * u64::from(n)
}

/// Memory of a machine, which can be given back.
fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::new(&RamLayout::new(RAM as u64, &[], 40).unwrap()).unwrap())
}

/// A file in memory, of a block for each request.
fn memfd() -> File {
    let mut file: File = memfd_create("bench", MemfdFlags::CLOEXEC).unwrap().into();
    file.write_all(&vec![1; usize::from(BATCH) * BLOCK as usize]).unwrap();
    file
}

/// Half a page: processors copy slowly to a little above the same place in another page.
const APART: usize = 2048;

/// memcpy of the bytes of a batch.
pub(super) struct Copy {
    from: Vec<u8>,
    to: Vec<u8>,
    len: usize,
}

impl Copy {
    pub(super) fn new(len: usize) -> Self {
        let all = usize::from(BATCH) * len;
        Self { from: vec![1; all], to: vec![0; all + APART], len }
    }
}

impl Batch for Copy {
    fn process(&mut self) {
        let to = self.to.get_mut(APART..).unwrap_or_default();
        for (to, from) in to.chunks_exact_mut(self.len).zip(self.from.chunks_exact(self.len)) {
            black_box(to).copy_from_slice(black_box(from));
        }
    }
}

pub(super) struct Disk {
    subject: Subject,
    _file: File,
}

impl Disk {
    pub(super) fn new(io: DiskIo, write: bool) -> Self {
        let file = memfd();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let blk = Blk::open(&DiskConfig { io, ..DiskConfig::new(path) }).unwrap();
        let subject = Subject::new(blk, |ring| {
            for n in 0..BATCH {
                let (header, status) = (HEADERS + 16 * u64::from(n), STATUS + u64::from(n));
                let sector = u64::from(n) * u64::from(BLOCK / 512);
                ring.memory.write_obj(u32::from(write), GuestAddress(header)).unwrap();
                ring.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
                ring.memory.write_obj(0xffu8, GuestAddress(status)).unwrap();
                ring.descriptor(3 * n, header, 16, NEXT);
                let direction = if write { 0 } else { WRITE };
                ring.descriptor(3 * n + 1, buffer(n), BLOCK, NEXT | direction);
                ring.descriptor(3 * n + 2, status, 1, WRITE);
            }
        });
        let mut disk = Self { subject, _file: file };
        disk.process();
        let status: [u8; BATCH as usize] =
            disk.subject.ring.memory.read_obj(GuestAddress(STATUS)).unwrap();
        assert_eq!(status, [0; BATCH as usize], "requests must succeed");
        disk
    }
}

impl Batch for Disk {
    fn process(&mut self) {
        self.subject.process();
    }
}

/// Frames between a pair of sockets, one of which a device may have.
pub(super) struct Frames {
    host: UnixDatagram,
    other: UnixDatagram,
    device: Option<Subject>,
    to_host: bool,
    frame: Vec<u8>,
}

impl Frames {
    fn new(len: usize, to_host: bool, with_device: bool) -> Self {
        let (host, other) = UnixDatagram::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let device = with_device.then(|| {
            let net = Net::open(&NetConfig::new(NetBackend::Fd(other.as_raw_fd()))).unwrap();
            let memory = memory();
            Subject::with_queue(net, &memory, usize::from(to_host), 2, |ring| {
                for n in 0..BATCH {
                    match to_host {
                        true => ring.descriptor(3 * n, buffer(n), NET_HEADER + len as u32, 0),
                        false => ring.descriptor(3 * n, buffer(n), 2048, WRITE),
                    }
                }
            })
        });
        Self { host, other, device, to_host, frame: vec![0; len] }
    }

    pub(super) fn sent_by_device(len: usize) -> Self {
        Self::new(len, true, true)
    }

    pub(super) fn received_by_device(len: usize) -> Self {
        Self::new(len, false, true)
    }

    /// By system calls alone.
    pub(super) fn sent(len: usize) -> Self {
        Self::new(len, true, false)
    }

    pub(super) fn received(len: usize) -> Self {
        Self::new(len, false, false)
    }

    fn send(&self, socket: &UnixDatagram) {
        (0..BATCH).for_each(|_| assert_eq!(socket.send(&self.frame).unwrap(), self.frame.len()));
    }

    fn receive(&self, socket: &UnixDatagram) {
        let mut frame = [0; 2048];
        (0..BATCH).for_each(|_| assert_eq!(socket.recv(&mut frame).unwrap(), self.frame.len()));
    }
}

impl Batch for Frames {
    fn before(&mut self) {
        if !self.to_host {
            self.send(&self.host);
        }
    }

    fn process(&mut self) {
        match &mut self.device {
            Some(device) => device.process(),
            None if self.to_host => self.send(&self.other),
            None => self.receive(&self.other),
        }
    }

    fn after(&mut self) {
        if self.to_host {
            self.receive(&self.host);
        }
    }
}

pub(super) struct Random(Subject);

impl Random {
    pub(super) fn new() -> Self {
        Self(Subject::new(Rng::new(), |ring| {
            (0..BATCH).for_each(|n| ring.descriptor(3 * n, buffer(n), SMALL, WRITE));
        }))
    }
}

impl Batch for Random {
    fn process(&mut self) {
        self.0.process();
    }
}

/// What a guest prints, to where nothing is kept.
pub(super) struct Console(Subject);

impl Console {
    pub(super) fn new() -> Self {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let input = ConsoleInput::new(Event::new().unwrap()).unwrap();
        let output = ConsoleOutput::new(null.as_fd()).unwrap();
        let device = ConsoleDevice::new(input, output).unwrap();
        let memory = memory();
        Self(Subject::with_queue(device, &memory, 1, 2, |ring| {
            (0..BATCH).for_each(|n| ring.descriptor(3 * n, buffer(n), SMALL, 0));
        }))
    }
}

impl Batch for Console {
    fn process(&mut self) {
        self.0.process();
    }
}

/// A page goes into the balloon with each request.
pub(super) struct Balloon(Subject);

impl Balloon {
    pub(super) fn new() -> Self {
        let ram = ram();
        let device = hv_cli::virtio::Balloon::new(ram.clone(), 0).unwrap();
        let memory: Memory = Arc::new(ram.memory().clone());
        Self(Subject::with_queue(device, &memory, 0, 2, |ring| {
            for n in 0..BATCH {
                let number = HEADERS + 4 * u64::from(n);
                let page = (buffer(n) / 4096) as u32;
                ring.memory.write_obj(page, GuestAddress(number)).unwrap();
                ring.descriptor(3 * n, number, 4, 0);
            }
        }))
    }
}

impl Batch for Balloon {
    fn process(&mut self) {
        self.0.process();
    }
}

/// What is done for the requests of a batch without a device.
pub(super) struct SystemCalls(Box<dyn FnMut(u16)>);

impl SystemCalls {
    pub(super) fn pread() -> Self {
        let (file, mut block) = (memfd(), vec![0; BLOCK as usize]);
        Self(Box::new(move |n| {
            file.read_exact_at(&mut block, u64::from(n) * u64::from(BLOCK)).unwrap();
        }))
    }

    pub(super) fn pwrite() -> Self {
        let (file, block) = (memfd(), vec![1; BLOCK as usize]);
        Self(Box::new(move |n| file.write_all_at(&block, u64::from(n) * u64::from(BLOCK)).unwrap()))
    }

    pub(super) fn getrandom() -> Self {
        let mut bytes = [0; SMALL as usize];
        Self(Box::new(move |_| {
            assert_eq!(getrandom(&mut bytes, GetRandomFlags::empty()), Ok(bytes.len()));
        }))
    }

    pub(super) fn write() -> Self {
        let mut null = File::options().write(true).open("/dev/null").unwrap();
        Self(Box::new(move |_| null.write_all(&[1; SMALL as usize]).unwrap()))
    }

    pub(super) fn discard() -> Self {
        let ram = ram();
        Self(Box::new(move |n| {
            ram.discard(GuestAddress(buffer(n)), BLOCK.into()).unwrap();
        }))
    }
}

impl Batch for SystemCalls {
    fn process(&mut self) {
        (0..BATCH).for_each(&mut self.0);
    }
}
