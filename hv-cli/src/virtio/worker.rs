//! The thread of a device.
//!
//! The transport tells it when the driver is ready and when it resets the device, and never waits for
//! it: an answer is a number that the transport looks at. The thread ends when its [`Worker`] is
//! dropped. If it should end by itself, which is a bug, the device needs a reset that can't help, and
//! the rest of the machine goes on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};

use hv_core::EventFd;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::poller::Poller;
use super::queue::QueueSetup;
use super::session::{DEVICE_TOKENS, host};
use super::{
    Counters, DeviceConfig, DeviceError, DeviceInterrupts, Interest, Memory, Ready, Session,
    VirtioDevice, Virtqueue,
};
use crate::event::Event;
use crate::isolation::{Kind, Sandbox};

/// Tokens of the poller: what wakes the thread besides doorbells and the device's own descriptors.
const COMMAND: u64 = 0;
const LINE_ENDED: u64 = 1;
/// The doorbell of the first queue.
const DOORBELLS: u64 = 2;

/// What the thread of a device needs.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) memory: Memory,
    pub(crate) config: DeviceConfig,
    pub(crate) interrupts: Arc<DeviceInterrupts>,
    pub(crate) counters: Arc<Counters>,
    /// What each queue's doorbell signals.
    pub(crate) doorbells: Vec<EventFd>,
    /// Signalled when the guest ends the interrupt of the line.
    pub(crate) line_ended: Option<EventFd>,
}

enum Command {
    /// The driver is ready: the features it took, and the queues as it set them up.
    Activate {
        features: u64,
        queues: Vec<QueueSetup>,
    },
    Reset,
}

/// What the thread tells.
#[derive(Debug, Default)]
struct Told {
    /// How many resets are done.
    resets: AtomicU64,
    needs_reset: AtomicBool,
    gone: AtomicBool,
    /// What the transport tells: the machine ends.
    stopping: Arc<AtomicBool>,
}

/// The thread of a device. Dropping it stops and joins the thread.
pub(crate) struct Worker {
    commands: Option<Sender<Command>>,
    wake: Event,
    told: Arc<Told>,
    /// How many resets were asked for.
    resets: u64,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread; the device is idle.
    ///
    /// # Errors
    /// The system has no descriptor or no thread left.
    pub(crate) fn start(parts: Parts) -> io::Result<Self> {
        let wake = Event::new()?;
        let poller = Poller::new()?;
        watch_always(&poller, &wake, parts.line_ended.as_ref())?;
        let (commands, receiver) = channel();
        let told = Arc::new(Told::default());
        let name = parts.name.clone();
        let thread = Thread {
            parts,
            poller,
            wake: wake.clone(),
            commands: receiver,
            told: told.clone(),
            ready: Vec::new(),
        };
        let calls = thread.parts.device.system_calls();
        let sandbox = Sandbox::new(Kind::Device, calls)?.removing(thread.parts.device.removes());
        let run = move || {
            sandbox.enter_or_end();
            thread.run();
        };
        let thread = thread::Builder::new().name(name).spawn(run)?;
        Ok(Self { commands: Some(commands), wake, told, resets: 0, thread: Some(thread) })
    }

    /// The driver is ready.
    pub(crate) fn activate(&self, features: u64, queues: Vec<QueueSetup>) {
        self.send(Command::Activate { features, queues });
    }

    /// The driver resets the device; [`Self::is_idle`] tells when that is done.
    pub(crate) fn reset(&mut self) {
        self.resets += 1;
        self.send(Command::Reset);
    }

    /// The driver wrote to the configuration space.
    pub(crate) fn config_written(&self) {
        self.wake.signal();
    }

    /// Whether all resets are done.
    pub(crate) fn is_idle(&self) -> bool {
        self.told.resets.load(Ordering::Acquire) == self.resets
            || self.told.gone.load(Ordering::Acquire)
    }

    /// Whether the device asks for a reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.told.needs_reset.load(Ordering::Acquire) || self.told.gone.load(Ordering::Acquire)
    }

    /// Stops the thread and waits for it.
    pub(crate) fn stop(&mut self) {
        self.told.stopping.store(true, Ordering::Relaxed);
        self.commands = None;
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            // A panic has been shown, and the device has said that it is gone.
            let _ = thread.join();
        }
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A thread that is gone has said so.
            let _ = commands.send(command);
            self.wake.signal();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn watch_always(poller: &Poller, wake: &Event, line_ended: Option<&EventFd>) -> io::Result<()> {
    poller.add(wake, COMMAND, Interest::READ)?;
    match line_ended {
        Some(event) => poller.add(event, LINE_ENDED, Interest::READ),
        None => Ok(()),
    }
}

/// Why a session ends.
enum End {
    Reset,
    Stop,
}

struct Thread {
    parts: Parts,
    /// For the time without a session.
    poller: Poller,
    wake: Event,
    commands: Receiver<Command>,
    told: Arc<Told>,
    ready: Vec<(u64, Ready)>,
}

/// Tells of the end of the thread, however it comes.
struct Ending(Arc<Told>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Release);
    }
}

impl Thread {
    fn run(mut self) {
        let _ending = Ending(self.told.clone());
        loop {
            match self.idle() {
                Ok(Command::Activate { features, queues }) => {
                    let end = self.serve(features, &queues);
                    self.parts.device.reset();
                    match end {
                        End::Reset => self.reset_done(),
                        End::Stop => return,
                    }
                }
                Ok(Command::Reset) => self.reset_done(),
                Err(Stopped) => return,
            }
        }
    }

    /// Waits for a command.
    fn idle(&mut self) -> Result<Command, Stopped> {
        loop {
            match self.commands.try_recv() {
                Ok(command) => return Ok(command),
                Err(TryRecvError::Disconnected) => return Err(Stopped),
                Err(TryRecvError::Empty) => {}
            }
            self.poller.wait(false, &mut self.ready).map_err(|_| Stopped)?;
            for (token, _) in std::mem::take(&mut self.ready) {
                self.always(token);
            }
        }
    }

    /// What is done whether there is a session or not.
    fn always(&self, token: u64) {
        match (token, &self.parts.line_ended) {
            (COMMAND, _) => {
                let _ = self.wake.take();
            }
            (LINE_ENDED, Some(event)) if event.take().is_some() => self.parts.interrupts.again(),
            _ => {}
        }
    }

    fn reset_done(&self) {
        for doorbell in &self.parts.doorbells {
            let _ = doorbell.take();
        }
        self.told.needs_reset.store(false, Ordering::Release);
        self.told.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// A session from its beginning to its end.
    fn serve(&mut self, features: u64, queues: &[QueueSetup]) -> End {
        let mut session = self.begin(features, queues);
        let error = match &mut session {
            Ok(session) => match self.work(session) {
                Ok(end) => return end,
                Err(error) => error,
            },
            Err(error) => *error,
        };
        self.parts.counters.failed(error);
        self.told.needs_reset.store(true, Ordering::Release);
        self.parts.interrupts.config();
        // What the device still has of the session, it keeps until the reset.
        loop {
            match self.idle() {
                Ok(Command::Reset) => return End::Reset,
                Ok(Command::Activate { .. }) => {}
                Err(Stopped) => return End::Stop,
            }
        }
    }

    fn begin(&self, features: u64, setups: &[QueueSetup]) -> Result<Session, DeviceError> {
        let mut session = self.parts.session(features, setups)?;
        session.stopping = self.told.stopping.clone();
        let watch = || {
            watch_always(&session.poller, &self.wake, self.parts.line_ended.as_ref())?;
            let enabled = self.parts.doorbells.iter().zip(&session.queues).zip(DOORBELLS..);
            enabled.filter(|((_, queue), _)| queue.is_enabled()).try_for_each(
                |((doorbell, _), token)| session.poller.add(doorbell, token, Interest::READ),
            )
        };
        watch().map_err(|error| host("waiting for events", &error))?;
        Ok(session)
    }

    fn work(&mut self, session: &mut Session) -> Result<End, DeviceError> {
        self.parts.activate(session)?;
        let mut ready = Vec::new();
        loop {
            match self.commands.try_recv() {
                Ok(Command::Reset) => return Ok(End::Reset),
                Ok(Command::Activate { .. }) | Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    self.parts.call(session, |device, session| device.finish(session))?;
                    return Ok(End::Stop);
                }
            }
            self.parts.config_written(session)?;
            let again = session.queues.iter().any(Virtqueue::has_more);
            let waited = session.poller.wait(again, &mut ready);
            waited.map_err(|error| host("waiting for events", &error))?;
            for &(token, what) in &ready {
                if token >= DEVICE_TOKENS {
                    self.parts.host_ready(session, what)?;
                } else if let Some(index) = token.checked_sub(DOORBELLS) {
                    self.rung(session, index as usize)?;
                } else {
                    self.always(token);
                }
            }
            self.parts.again(session)?;
        }
    }

    fn rung(&mut self, session: &mut Session, index: usize) -> Result<(), DeviceError> {
        match self.parts.doorbells.get(index).and_then(EventFd::take) {
            Some(count) => {
                self.parts.counters.count_notifications(count);
                self.parts.queue_ready(session, index)
            }
            None => Ok(()),
        }
    }
}

/// What a device is called for, whoever calls it.
impl Parts {
    /// What the device has from now on: the queues as the driver set them up.
    pub(super) fn session(
        &self,
        features: u64,
        setups: &[QueueSetup],
    ) -> Result<Session, DeviceError> {
        let Self { memory, config, interrupts, counters, .. } = self;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = |(index, setup): (u16, &QueueSetup)| {
            let (memory, interrupts) = (memory.clone(), interrupts.clone());
            Virtqueue::new(index, setup, event_idx, memory, interrupts, counters.clone())
        };
        let queues = (0..).zip(setups).map(queue).collect::<Result<_, _>>()?;
        let shared = (memory.clone(), config.clone(), interrupts.clone(), counters.clone());
        let (memory, config, interrupts, counters) = shared;
        Session::new(features, queues, memory, config, interrupts, counters)
            .map_err(|error| host("waiting for events", &error))
    }

    /// The driver is ready: the device is activated, and told of what is in its queues.
    pub(super) fn activate(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        // Whatever the driver wrote before is there when the device is activated.
        let _ = self.config.take_written();
        self.call(session, |device, session| device.activate(session))?;
        (0..session.queues.len()).try_for_each(|index| self.queue_ready(session, index))
    }

    /// The driver may have written to the configuration space.
    pub(super) fn config_written(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        if self.config.take_written() {
            self.call(session, |device, session| device.config_written(session))?;
        }
        Ok(())
    }

    /// A descriptor of the device is ready.
    pub(super) fn host_ready(
        &mut self,
        session: &mut Session,
        ready: Ready,
    ) -> Result<(), DeviceError> {
        self.call(session, |device, session| device.host_ready(session, ready))
    }

    /// What was too much for the last call of the device.
    pub(super) fn again(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        for index in 0..session.queues.len() {
            if session.queues.get(index).is_some_and(Virtqueue::has_more) {
                self.queue_ready(session, index)?;
            }
        }
        Ok(())
    }

    /// A queue has requests, or may have.
    pub(super) fn queue_ready(
        &mut self,
        session: &mut Session,
        index: usize,
    ) -> Result<(), DeviceError> {
        match session.queues.get_mut(index) {
            Some(queue) if queue.is_enabled() => queue.nothing_more(),
            _ => return Ok(()),
        }
        self.call(session, |device, session| device.queue_ready(session, index))
    }

    /// Calls the device, and afterwards tells the driver of what it completed, even if it failed.
    pub(super) fn call(
        &mut self,
        session: &mut Session,
        call: impl FnOnce(&mut dyn VirtioDevice, &mut Session) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        session.queues.iter_mut().for_each(Virtqueue::begin);
        let result = call(&mut *self.device, session);
        for queue in &mut session.queues {
            queue.signal()?;
        }
        result
    }
}

/// The machine ends.
struct Stopped;
