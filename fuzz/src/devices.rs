//! The devices whose queues are fuzzed. None of them waits for its host's side, nor the host's side for it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;

use hv_cli::config::{DiskConfig, DiskIo, MacAddress, NetBackend, NetConfig};
use hv_cli::event::Event;
use hv_cli::virtio::{
    Balloon, Blk, ConsoleDevice, ConsoleInput, ConsoleOutput, Direct, Net, Rng, VirtioDevice, Vsock,
};
use hv_memory::GuestRam;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::hosts::{Frames, Host, Sockets, Stream, Typist};
use crate::plain::Plain;

/// A device, and what sends it something from the host.
pub struct Subject {
    /// The device.
    pub direct: Direct,
    /// The host's side: a socket, a tap, a terminal. It must not block.
    pub host: Option<Box<dyn FnMut(&[u8])>>,
    /// A queue whose requests may have the device change the rings, as is the driver's right.
    pub rings_change: Option<usize>,
}

/// Every device; the first byte of an input chooses. New ones go at the end, so that inputs stay what
/// they are.
pub const DEVICES: &[fn(&Arc<GuestRam>) -> Subject] = &[
    |ram| Subject::new(Plain::default(), ram),
    |ram| Subject::new(Rng::new(), ram),
    blk,
    net,
    console,
    vsock,
    balloon,
    net_stream,
];

impl Subject {
    /// A device that gets nothing from the host.
    ///
    /// # Panics
    /// No descriptor is left: that is no finding.
    #[must_use]
    pub fn new(device: impl VirtioDevice, ram: &GuestRam) -> Self {
        let memory = Arc::new(ram.memory().clone());
        let direct = Direct::new(Box::new(device), memory).expect("descriptors");
        Self { direct, host: None, rings_change: None }
    }

    /// A device that gets what `host` is given.
    #[must_use]
    pub fn with_host(
        device: impl VirtioDevice,
        ram: &GuestRam,
        host: impl FnMut(&[u8]) + 'static,
    ) -> Self {
        Self { host: Some(Box::new(host)), ..Self::new(device, ram) }
    }

    fn with(device: impl VirtioDevice, ram: &GuestRam, mut host: impl Host) -> Self {
        Self::with_host(device, ram, move |data| host.act(data))
    }
}

const SECTOR: u64 = 512;
const SECTORS: u8 = 64;

/// A disk of a few sectors. The host gives its file another size.
fn blk(ram: &Arc<GuestRam>) -> Subject {
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file");
    ftruncate(&file, SECTOR * u64::from(SECTORS)).expect("room for a disk");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let serial = "a serial number".to_owned();
    let config = DiskConfig { serial, queues: 2, io: DiskIo::Sync, ..DiskConfig::new(path) };
    let device = Blk::open(&config).expect("the disk");
    Subject::with_host(device, ram, move |data| {
        let sectors = data.first().map_or(0, |sectors| sectors % (SECTORS + 1));
        ftruncate(&file, SECTOR * u64::from(sectors)).expect("room for a disk");
    })
}

/// A network where each frame is a datagram.
fn net(ram: &Arc<GuestRam>) -> Subject {
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    Subject::with(net_at(theirs.into()), ram, Frames::new(ours))
}

/// A network where frames are in a stream, as of passt.
fn net_stream(ram: &Arc<GuestRam>) -> Subject {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    Subject::with(net_at(theirs.into()), ram, Stream::new(ours))
}

fn net_at(socket: OwnedFd) -> Net {
    let backend = NetBackend::Fd(socket.as_raw_fd());
    let mac = Some(MacAddress([2, 0, 0, 0, 0, 1]));
    // It duplicates the descriptor.
    Net::open(&NetConfig { backend, mac, queues: 1 }).expect("the network")
}

/// A terminal that is a pair of pipes.
fn console(ram: &Arc<GuestRam>) -> Subject {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let input = ConsoleInput::new(Event::new().expect("an event")).expect("an event");
    let output = ConsoleOutput::new(writer.as_fd()).expect("the output");
    let device = ConsoleDevice::new(input.clone(), output).expect("an event");
    Subject::with(device, ram, Typist::new(input, reader))
}

fn vsock(ram: &Arc<GuestRam>) -> Subject {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("vsock");
    let device = Vsock::new(3, &path).expect("the socket");
    Subject::with(device, ram, Sockets::new(directory, path))
}

/// The host asks for another size, or for statistics.
fn balloon(ram: &Arc<GuestRam>) -> Subject {
    let device = Balloon::new(ram.clone(), 1).expect("an event");
    let target = device.target();
    let mut subject = Subject::with_host(device, ram, move |data| {
        match *data {
            [pages] => target.set_pages(pages.into()),
            [a, b, c, d, ..] => target.set_pages(u32::from_le_bytes([a, b, c, d])),
            _ => {
                target.ask_statistics();
                target.actual()
            }
        };
    });
    // Pages with rings may be put into it.
    subject.rings_change = Some(0);
    subject
}
