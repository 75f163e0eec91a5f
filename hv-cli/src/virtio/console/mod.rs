//! The console device (virtio 1.2, 5.3): a single port, which has the terminal.
//!
//! A request to send is completed when its bytes are written, not before: a driver that waits for that
//! has lost nothing when it powers off. Meanwhile an output that takes no more keeps the request, and
//! nothing else. What is typed waits in a bounded buffer until the driver has a place for it.

mod input;
mod output;

use std::io;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::session::host;
use super::{Chain, DeviceConfig, DeviceError, Interest, Ready, Session, VirtioDevice};
use crate::event::Event;
use crate::isolation::SystemCall;

pub use input::ConsoleInput;
pub use output::ConsoleOutput;
use output::Written;

/// `VIRTIO_CONSOLE_F_SIZE`: the configuration has the size of the terminal.
const F_SIZE: u32 = 0;

/// The queue of what is typed, and of what is shown.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 64;

/// Configuration: columns, rows, the number of ports (one), a register that is not offered.
const NO_SIZE: [u8; 12] = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Tokens of what is watched.
const INPUT: u32 = 0;
const OUTPUT: u32 = 1;
const AGAIN: u32 = 2;

/// Bytes that are read from, or written to, guest memory at once.
const CHUNK: usize = 4096;
/// The most bytes that are sent in one call: a request may have 4 GiB.
const AT_ONCE: usize = 16 * CHUNK;
/// How long an output that takes no more is waited for when the machine ends.
const GRACE: Duration = Duration::from_secs(3);

/// A console device.
pub struct ConsoleDevice {
    input: ConsoleInput,
    output: ConsoleOutput,
    config: DeviceConfig,
    /// The request that is being sent, and how much of it was.
    sending: Option<(Chain, u32)>,
    /// Whether the output takes no more and is watched.
    busy: bool,
    /// Signalled when there is more to send than one call does.
    again: Event,
    buffer: Box<[u8; CHUNK]>,
}

impl ConsoleDevice {
    /// A device that gets what is typed from `input` and shows on `output`.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new(input: ConsoleInput, output: ConsoleOutput) -> io::Result<Self> {
        let config = DeviceConfig::new(NO_SIZE);
        if let Some(size) = output.size() {
            config.set(0, &size);
        }
        let buffer = Box::new([0; CHUNK]);
        Ok(Self { input, output, config, sending: None, busy: false, again: Event::new()?, buffer })
    }

    /// Tells the driver the size of the terminal, if that has changed.
    fn resize(&self, session: &mut Session) {
        let mut known = [0; 4];
        self.config.get(0, &mut known);
        if let Some(size) = self.output.size()
            && size != known
        {
            session.change_config(0, &size);
        }
    }

    /// Gives the driver what was typed.
    fn receive(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        while !self.input.is_empty() {
            let Some(request) = session.queue(RECEIVE)?.pop()? else { break };
            let room = usize::try_from(request.writable_len()).unwrap_or(CHUNK).min(CHUNK);
            if room == 0 {
                session.count_error();
            }
            let len = self.input.take(self.buffer.get_mut(..room).unwrap_or_default());
            request.write_at(0, self.buffer.get(..len).unwrap_or_default())?;
            session.queue(RECEIVE)?.push(request, len as u32)?;
        }
        Ok(())
    }

    /// Shows what the driver sent, as far as the output takes it.
    fn send(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let mut left = AT_ONCE;
        loop {
            let next = match self.sending.take() {
                Some(sending) => Some(sending),
                None => session.queue(TRANSMIT)?.pop()?.map(|request| (request, 0)),
            };
            let Some((request, mut sent)) = next else { return Ok(()) };
            while sent < request.readable_len() {
                if left == 0 {
                    self.again.signal();
                    self.sending = Some((request, sent));
                    return Ok(());
                }
                let rest = (request.readable_len() - sent) as usize;
                let len = rest.min(CHUNK).min(left);
                let bytes = self.buffer.get_mut(..len).unwrap_or_default();
                request.read_at(sent, bytes)?;
                match self.output.write(bytes) {
                    Written::Bytes(n) => {
                        sent += n as u32;
                        left -= n;
                    }
                    Written::Busy => {
                        self.sending = Some((request, sent));
                        return self.wait_for_output(session);
                    }
                    Written::Lost => {
                        session.count_error();
                        sent = request.readable_len();
                    }
                }
            }
            session.queue(TRANSMIT)?.push(request, 0)?;
        }
    }

    fn wait_for_output(&mut self, session: &Session) -> Result<(), DeviceError> {
        if !self.busy {
            session.watch(&self.output, OUTPUT, Interest::WRITE)?;
            self.busy = true;
        }
        Ok(())
    }

    fn output_is_ready(&mut self, session: &Session) -> Result<(), DeviceError> {
        if std::mem::take(&mut self.busy) {
            session.unwatch(&self.output)?;
        }
        Ok(())
    }
}

impl VirtioDevice for ConsoleDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        u64::from(self.output.size().is_some()) << F_SIZE
    }

    fn system_calls(&self) -> &'static [SystemCall] {
        const CALLS: &[SystemCall] =
            &[SystemCall::new(libc::SYS_sendto), SystemCall::ioctl(libc::TIOCGWINSZ)];
        CALLS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> DeviceConfig {
        self.config.clone()
    }

    fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        session.watch(self.input.event(), INPUT, Interest::READ)?;
        session.watch(&self.again, AGAIN, Interest::READ)?;
        self.resize(session);
        Ok(())
    }

    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        match queue {
            TRANSMIT => self.send(session),
            _ => self.receive(session),
        }
    }

    fn host_ready(&mut self, session: &mut Session, ready: Ready) -> Result<(), DeviceError> {
        match ready.token {
            INPUT => {
                if self.input.was_resized() {
                    self.resize(session);
                }
                self.receive(session)
            }
            OUTPUT => {
                self.output_is_ready(session)?;
                self.send(session)
            }
            _ => {
                let _ = self.again.take();
                self.send(session)
            }
        }
    }

    fn finish(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        let deadline = Instant::now() + GRACE;
        loop {
            self.send(session)?;
            if self.sending.is_none() {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = self
                .output
                .wait(left)
                .map_err(|errno| host("poll of the output", &errno.into()))?;
            if left.is_zero() || !ready {
                session.count_error();
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {
        self.sending = None;
        self.busy = false;
    }
}
