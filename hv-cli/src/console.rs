//! The main thread of a running machine: waits for the end, and carries input to its console.
//!
//! It sleeps in poll(2) until a vCPU stops the machine, a signal arrives or the user types. Raw
//! terminal mode lives exactly as long as [`Console::serve`] runs.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2,
    SIGVTALRM, SIGWINCH, SIGXCPU, SIGXFSZ,
};
use signal_hook::flag::{self, register_conditional_default};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

use crate::devices::Com1;
use crate::event::Event;
use crate::exit_code::StopReason;
use crate::machine::bus::Shared;
use crate::machine::stop::Stopper;
use crate::terminal::{Action, EscapeParser, KEYS_HELP, RawMode, TerminalError, in_foreground};

/// The standard output, or the standard error, as a serial port's wire.
///
/// A reader that does not read may stall the guest, but must not keep the machine from being
/// stopped: what can't be written after the stop is dropped.
pub struct Wire {
    out: BorrowedFd<'static>,
    stopper: Stopper,
}

impl Wire {
    /// The wire of the machine that `stopper` stops, to the standard output.
    #[must_use]
    pub fn new(stopper: Stopper) -> Self {
        Self { out: rustix::stdio::stdout(), stopper }
    }

    /// The same to the standard error.
    #[must_use]
    pub fn to_stderr(stopper: Stopper) -> Self {
        Self { out: rustix::stdio::stderr(), stopper }
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            let mut fds = [
                PollFd::new(&self.out, PollFlags::OUT),
                PollFd::new(self.stopper.event(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [out, stop] = &fds;
            if !out.revents().is_empty() {
                match rustix::io::write(self.out, buf) {
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    result => return Ok(result?),
                }
            } else if !stop.revents().is_empty() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The signals that would end the process. While the main loop serves a machine they reach it, so
/// that the terminal is restored; before and after, when nothing looks for them, they do what they
/// do to any program.
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    /// Whether each signal does what it does by default.
    default: Arc<AtomicBool>,
}

/// All whose default is to end the process, except those that tell of a bug.
const ENDING: [i32; 11] = [
    SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGIO,
];

impl Signals {
    /// Takes the signals, and ignores SIGXFSZ: a console that may not grow is one that is full.
    ///
    /// # Errors
    /// The system refuses a socket pair or a handler.
    pub fn take() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        let default = Arc::new(AtomicBool::new(true));
        for signal in ENDING {
            register_conditional_default(signal, default.clone())?;
        }
        flag::register(SIGXFSZ, Arc::default())?;
        let signals = ENDING.into_iter().chain([SIGCONT, SIGWINCH]);
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, signals)?;
        Ok(Self { delivery, default })
    }
}

/// Restores the default of the signals when the main loop ends, however it does.
struct Serving<'a>(&'a AtomicBool);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What a person may type ahead of a guest that does not read. Beyond it, keys are dropped, but for
/// the escape key, which must work whatever the guest does.
const TYPED_AHEAD: usize = 4096;

/// What is still to be typed into the guest.
#[derive(Default)]
struct Input {
    parser: EscapeParser,
    /// Whether the guest takes any.
    wanted: bool,
    /// Whether the escape key means anything: only what a person types has one.
    escapes: bool,
    pending: Vec<u8>,
    ended: bool,
}

impl Input {
    /// Reads what is there. At most one read, so that the end of the machine is never kept waiting.
    fn read(&mut self, stopper: &Stopper) {
        let mut buffer = [0; 256];
        let n = match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
            Ok(0) => {
                self.ended = true;
                return;
            }
            Ok(n) => n,
            Err(Errno::INTR | Errno::AGAIN) => return,
            Err(_) => {
                self.ended = true;
                return;
            }
        };
        for &byte in buffer.iter().take(n) {
            if !self.escapes {
                self.pending.push(byte);
                continue;
            }
            match self.parser.push(byte, &mut self.pending) {
                Some(Action::Quit) => stopper.stop(StopReason::UserQuit),
                Some(Action::Help) => show_keys(),
                None => {}
            }
            self.pending.truncate(TYPED_AHEAD);
        }
        if !self.wanted {
            self.pending.clear();
        }
    }

    /// Gives the guest what it takes.
    fn offer(&mut self, to: &dyn GuestInput) {
        let taken = to.offer(&self.pending);
        self.pending.drain(..taken.min(self.pending.len()));
    }
}

/// Shows the keys, unless that would have to wait.
fn show_keys() {
    let stderr = rustix::stdio::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    if let Ok(1) = poll(&mut fds, Some(&Timespec::default())) {
        let _ = rustix::io::write(stderr, KEYS_HELP.as_bytes());
    }
}

/// A port that is busy or in loop-back mode takes no input and does not say when it would again.
const RETRY: Duration = Duration::from_millis(50);

/// Nothing tells a job that it has come to the foreground.
const LOOK_FOR_TERMINAL: Duration = Duration::from_secs(1);

/// A serial port that writes to whatever it is connected to.
pub type SerialPort = Com1<Box<dyn Write + Send>>;

/// Where a guest gets from what is typed. No call waits: the main loop must stay able to end the machine.
pub trait GuestInput: Send + Sync {
    /// Offers bytes; returns how many were taken.
    fn offer(&self, bytes: &[u8]) -> usize;

    /// The terminal has got another size.
    fn resized(&self) {}
}

impl GuestInput for Mutex<SerialPort> {
    /// A port that is busy, maybe waiting for a reader of its output, takes nothing.
    fn offer(&self, bytes: &[u8]) -> usize {
        match self.try_lock() {
            Ok(mut port) => port.input(bytes),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().input(bytes),
            Err(TryLockError::WouldBlock) => 0,
        }
    }
}

/// The user's side of a machine.
pub struct Console {
    /// The serial port.
    pub com1: Shared<SerialPort>,
    /// Who gets what is typed.
    pub input: Arc<dyn GuestInput>,
    /// Signalled when the guest has read all input.
    pub drained: Event,
    /// Stops the machine.
    pub stopper: Stopper,
    /// Whether what is typed goes to the guest; the escape key works in any case.
    pub takes_input: bool,
}

impl Console {
    /// Serves the machine until it is stopped, or stops it for `late` when it runs for longer than
    /// `limit`.
    ///
    /// # Errors
    /// The terminal can't be put into raw mode.
    pub fn serve(
        &self,
        signals: &mut Signals,
        limit: Option<Duration>,
        late: StopReason,
    ) -> Result<(), TerminalError> {
        signals.default.store(false, Ordering::SeqCst);
        let _serving = Serving(&signals.default.clone());
        let mut raw = RawMode::enter(rustix::stdio::stdin())?;
        let mut input = Input {
            escapes: raw.is_some(),
            wanted: self.takes_input,
            // Bytes in a pipe are for the guest, and stay where they are if it takes none.
            ended: raw.is_none() && !self.takes_input,
            ..Input::default()
        };
        let deadline = limit.map(|limit| (Instant::now() + limit, late));
        while !self.stopper.is_stopped() {
            // A job in the background must not read the terminal: it would be stopped.
            let away = raw.is_some() && !in_foreground(rustix::stdio::stdin());
            // What a program writes stays in its pipe while the port has no room for more.
            let room = input.escapes || input.pending.is_empty();
            let reads = !away && !input.ended && room;
            let stdin = rustix::stdio::stdin();
            let mut fds = [
                PollFd::new(self.stopper.event(), PollFlags::IN),
                PollFd::new(signals.delivery.get_read(), PollFlags::IN),
                PollFd::new(&self.drained, PollFlags::IN),
                PollFd::new(&stdin, PollFlags::IN),
            ];
            // poll tells a hang-up even of what it was not asked for, so leave the input out.
            let watched = if reads { 4 } else { 3 };
            let left =
                deadline.as_ref().map(|(at, _)| at.saturating_duration_since(Instant::now()));
            let retry = (!input.pending.is_empty()).then_some(RETRY);
            let look = away.then_some(LOOK_FOR_TERMINAL);
            let timeout = [left, retry, look].into_iter().flatten().min();
            match poll(fds.get_mut(..watched).unwrap_or_default(), timespec(timeout).as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // Short of memory: try again rather than lose the machine.
                Err(_) => std::thread::yield_now(),
            }
            let [_, signalled, emptied, typed] = fds.map(|fd| !fd.revents().is_empty());
            if signalled {
                take_signals(signals, self, raw.as_mut());
            }
            if away && let Some(raw) = &mut raw {
                resume(raw);
            }
            if emptied {
                self.drained.take();
            }
            if typed && reads {
                input.read(&self.stopper);
            }
            if !input.pending.is_empty() {
                input.offer(&*self.input);
            }
            if let Some((at, late)) = &deadline
                && Instant::now() >= *at
            {
                self.stopper.stop(late.clone());
            }
        }
        Ok(())
    }
}

fn timespec(duration: Option<Duration>) -> Option<Timespec> {
    duration.and_then(|duration| Timespec::try_from(duration).ok())
}

fn take_signals(
    signals: &mut Signals,
    console: &Console,
    raw: Option<&mut RawMode<BorrowedFd<'static>>>,
) {
    let pending: Vec<_> = signals.delivery.pending().collect();
    if let Some(&signal) = pending.iter().find(|signal| ENDING.contains(signal)) {
        console.stopper.stop(StopReason::Signal(signal));
        return;
    }
    if pending.contains(&SIGWINCH) {
        console.input.resized();
    }
    if pending.contains(&SIGCONT)
        && let Some(raw) = raw
    {
        // Continued after a stop.
        resume(raw);
    }
}

/// Makes the terminal raw again. One that was hung up can't be, and is no console any more; the
/// machine goes on without.
fn resume(raw: &mut RawMode<BorrowedFd<'static>>) {
    let _ = raw.resume();
}
