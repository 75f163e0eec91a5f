//! What is at the other side of a device. Each act is bytes, of which the first says what is done; nothing
//! blocks, and what fails, fails.

use std::io::{PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use hv_cli::console::GuestInput;
use hv_cli::virtio::ConsoleInput;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tempfile::TempDir;

/// The other side of a device.
pub(crate) trait Host: 'static {
    /// Does something.
    fn act(&mut self, data: &[u8]);
}

/// More than any of them gives at once.
const MOST: usize = 1 << 17;

/// Reads what there is.
fn read(from: &mut impl Read) {
    let mut buffer = vec![0; MOST];
    let _ = from.read(&mut buffer);
}

/// Somebody in the same network, or nobody any more.
pub(crate) struct Frames(Option<UnixDatagram>);

impl Frames {
    pub(crate) fn new(socket: UnixDatagram) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self(Some(socket))
    }
}

impl Host for Frames {
    fn act(&mut self, data: &[u8]) {
        let Some(socket) = &self.0 else { return };
        match *data {
            [] => {}
            [0, ..] => {
                let mut frame = vec![0; MOST];
                while socket.recv(&mut frame).is_ok() {}
            }
            [1] => self.0 = None,
            [2, a, b, ..] => {
                let _ = socket.send(&vec![b; usize::from(u16::from_le_bytes([a, b]))]);
            }
            [_, ref frame @ ..] => {
                let _ = socket.send(frame);
            }
        }
    }
}

/// The same, as a stream: what is sent may be no frame.
pub(crate) struct Stream(Option<UnixStream>);

impl Stream {
    pub(crate) fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self(Some(socket))
    }
}

impl Host for Stream {
    fn act(&mut self, data: &[u8]) {
        let Some(socket) = &mut self.0 else { return };
        match *data {
            [] => {}
            [0, ..] => read(socket),
            [1] => self.0 = None,
            [1, ..] => drop(socket.shutdown(Shutdown::Write)),
            [2, a, b, ..] => {
                let len = u32::from(u16::from_le_bytes([a, b]));
                let _ = socket.write(&len.to_be_bytes());
                let _ = socket.write(&vec![b; len as usize]);
            }
            [3, ref frame @ ..] => {
                let _ = socket.write(&(frame.len() as u32).to_be_bytes());
                let _ = socket.write(frame);
            }
            [_, ref bytes @ ..] => drop(socket.write(bytes)),
        }
    }
}

/// Somebody at a terminal.
pub(crate) struct Typist {
    input: ConsoleInput,
    output: Option<PipeReader>,
}

impl Typist {
    pub(crate) fn new(input: ConsoleInput, output: PipeReader) -> Self {
        rustix::io::ioctl_fionbio(&output, true).expect("a pipe");
        // The least there is, so that it is full soon.
        rustix::pipe::fcntl_setpipe_size(&output, 4096).expect("a pipe");
        Self { input, output: Some(output) }
    }
}

impl Host for Typist {
    fn act(&mut self, data: &[u8]) {
        match *data {
            [] => self.input.resized(),
            [0] => self.output = None,
            [0, len, ..] => {
                let mut buffer = vec![0; usize::from(len) * 16];
                if let Some(output) = &mut self.output {
                    let _ = output.read(&mut buffer);
                }
            }
            [1, byte, ..] => drop(self.input.offer(&[byte; 5000])),
            [_, ref typed @ ..] => drop(self.input.offer(typed)),
        }
    }
}

/// Who connects to the guest, and what listens for it.
pub(crate) struct Sockets {
    path: PathBuf,
    listener: UnixListener,
    streams: Vec<UnixStream>,
    _directory: TempDir,
}

/// The port that is listened at.
const PORT: u8 = 52;
const MOST_STREAMS: usize = 64;

impl Sockets {
    pub(crate) fn new(directory: TempDir, path: PathBuf) -> Self {
        let listener = directory.path().join(format!("vsock_{PORT}"));
        let listener = UnixListener::bind(listener).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        Self { path, listener, streams: Vec::new(), _directory: directory }
    }

    /// Another stream, which is the last from now on.
    fn add(&mut self, stream: UnixStream) -> Option<&mut UnixStream> {
        if self.streams.len() < MOST_STREAMS {
            self.streams.push(stream);
        }
        self.streams.last_mut()
    }
}

impl Host for Sockets {
    fn act(&mut self, data: &[u8]) {
        let Some((how, data)) = data.split_first() else { return };
        let which = usize::from(how >> 3) % self.streams.len().max(1);
        match how & 7 {
            0 => {
                let stream = connect(&self.path).and_then(|stream| self.add(stream));
                drop(stream.map(|stream| stream.write(data)));
                return;
            }
            1 => {
                let Some((port, data)) = data.split_first() else { return };
                if let Some(stream) = connect(&self.path).and_then(|stream| self.add(stream)) {
                    let _ = stream.write(format!("CONNECT {port}\n").as_bytes());
                    let _ = stream.write(data);
                }
                return;
            }
            2 => {
                if let Ok((stream, _)) = self.listener.accept() {
                    stream.set_nonblocking(true).expect("a socket");
                    self.add(stream);
                }
                return;
            }
            _ => {}
        }
        let Some(stream) = self.streams.get_mut(which) else { return };
        match (how & 7, data.first().copied().unwrap_or_default()) {
            (3, _) => drop(stream.write(data)),
            (4, _) => read(stream),
            (5, 0) => drop(stream.shutdown(Shutdown::Read)),
            (5, 1) => drop(stream.shutdown(Shutdown::Write)),
            (5, _) => drop(stream.shutdown(Shutdown::Both)),
            (6, _) => drop(self.streams.swap_remove(which)),
            (_, byte) => drop(stream.write(&vec![byte; MOST])),
        }
    }
}

/// Connects, unless too many wait already.
fn connect(path: &Path) -> Option<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).ok()?).ok()?;
    Some(socket.into())
}
