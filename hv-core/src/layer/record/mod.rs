//! `Record`: writes a transcript of every call.
//!
//! A transcript is only as good as its order. A line is written before anyone can see what the call
//! did: except `KVM_RUN`, which takes as long as the guest likes, a call is made and written down
//! as one step, and what KVM signals comes through [`doorbells`] and is written down before it is
//! passed on. Nothing here changes a call or its result.

mod doorbells;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use serde_json::value::RawValue;

use self::doorbells::{Doorbells, StandIns};
use super::signals::signal;
use super::transcript::{CallLine, Line, Meta, RecordError, Writer};
use super::{Answer, Interceptor, Names, Object, Replay, Request};
use crate::{Call, Errno, Error, EventFd};

/// A layer that writes a transcript of every call, which [`Replay`] replays.
///
/// A clone writes the same transcript: keep one to [`finish`](Record::finish) it. What the VMM
/// signals itself (irqfds) and guest memory are not in a transcript.
///
/// ```
/// # #[cfg(feature = "mock")] {
/// use hv_core::layer::{Interceptor, Record, Replay};
/// use hv_core::{Capability, Hypervisor};
/// # use std::{io::Write, sync::{Arc, Mutex}};
/// # #[derive(Clone, Default)] struct File(Arc<Mutex<Vec<u8>>>);
/// # impl File { fn open(&self) -> std::io::Cursor<Vec<u8>> { std::io::Cursor::new(self.0.lock().unwrap().clone()) } }
/// # impl Write for File {
/// #     fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> { self.0.lock().unwrap().write(bytes) }
/// #     fn flush(&mut self) -> std::io::Result<()> { Ok(()) }
/// # }
/// # let file = File::default();
/// # let mut kvm = hv_core::mock::MockHypervisor::new();
/// # kvm.expect_check_extension().return_const(Ok(4096));
/// let record = Record::new(file.clone());
/// let kvm = record.over(kvm);
/// assert_eq!(kvm.check_extension(Capability::IrqRouting), Ok(4096));
/// record.finish()?;
///
/// let replay = Replay::new(file.open())?;
/// assert_eq!(replay.check_extension(Capability::IrqRouting), Ok(4096));
/// replay.finish()?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Record {
    recorder: Arc<Recorder>,
    /// Takes the doorbells of a VM away with its last handle.
    _vm: Option<Arc<VmEnd>>,
}

struct Recorder {
    state: Mutex<State>,
    doorbells: Arc<Doorbells>,
    /// The thread that passes on what KVM signals while no call returns.
    waits: Mutex<Option<JoinHandle<()>>>,
    /// What is recorded is a replay: the order is its.
    follows: Option<Replay>,
}

struct State {
    writer: Writer,
    names: Names,
    threads: HashMap<ThreadId, u32>,
    stand_ins: StandIns,
    /// The vCPUs that run.
    running: BTreeSet<Object>,
}

impl Record {
    /// Writes to `output`, which had better be buffered.
    pub fn new(output: impl Write + Send + 'static) -> Self {
        Self::with(Box::new(output), &Meta::new(), None)
    }

    /// Writes to `output`, with texts for the first line.
    pub fn with_meta(output: impl Write + Send + 'static, meta: &Meta) -> Self {
        Self::with(Box::new(output), meta, None)
    }

    /// Records what is replayed: over `replay`, with its texts and in its order, so that a VMM which
    /// does what it did before gives the transcript it was given, byte for byte. All its calls must
    /// come through this layer.
    pub fn of_replay(output: impl Write + Send + 'static, replay: &Replay) -> Self {
        replay.order().follow();
        Self::with(Box::new(output), replay.meta(), Some(replay.clone()))
    }

    fn with(output: Box<dyn Write + Send>, meta: &Meta, follows: Option<Replay>) -> Self {
        let state = State {
            writer: Writer::new(output, meta),
            names: Names::default(),
            threads: HashMap::new(),
            stand_ins: StandIns::default(),
            running: BTreeSet::new(),
        };
        let recorder = Recorder {
            state: Mutex::new(state),
            doorbells: Arc::default(),
            waits: Mutex::default(),
            follows,
        };
        Self { recorder: Arc::new(recorder), _vm: None }
    }

    /// Writes the last line. Calls after it are not recorded.
    ///
    /// # Errors
    /// The first failure to write the transcript, which is cut off there.
    pub fn finish(&self) -> Result<(), RecordError> {
        let mut state = self.recorder.lock();
        self.recorder.forward(&mut state);
        state.writer.finish()
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").finish_non_exhaustive()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.doorbells.stop();
        let waits = self.waits.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The last handle may be that of the thread itself.
        if let Some(thread) = waits.filter(|it| it.thread().id() != thread::current().id()) {
            let _ = thread.join();
        }
    }
}

impl Recorder {
    /// Starts to wait for what KVM signals, once.
    fn start(self: &Arc<Self>) -> Result<(), Error> {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        if waits.is_some() {
            return Ok(());
        }
        let doorbells = self.doorbells.clone();
        doorbells.open()?;
        let recorder = Arc::downgrade(self);
        let wait = move || {
            while doorbells.wait() {
                let Some(recorder) = recorder.upgrade() else { return };
                recorder.forward(&mut recorder.lock());
            }
        };
        let thread = thread::Builder::new().name("record".to_owned()).spawn(wait);
        *waits = Some(thread.map_err(|e| Error::new(Call::Eventfd, Errno::from(&e)))?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what KVM has signalled, and passes it on.
    fn forward(&self, state: &mut State) {
        if !self.doorbells.rang() {
            return;
        }
        let State { writer, names, stand_ins, running, .. } = state;
        for (event, count) in stand_ins.take() {
            if let Some(number) = names.event(event) {
                let during = match &self.follows {
                    Some(replay) => replay.order().signalled_during(),
                    None => running.iter().copied().collect(),
                };
                writer.write(Line::Signal { event: number, count, during });
            }
            signal(event, count);
            if let Some(replay) = &self.follows {
                replay.order().wrote_signal();
            }
        }
    }
}

impl State {
    fn call<T: Answer>(&mut self, on: Object, request: &Request<'_>, result: &Result<T, Error>) {
        let next = u32::try_from(self.threads.len()).unwrap_or(u32::MAX);
        let thread = *self.threads.entry(thread::current().id()).or_insert(next);
        // The arguments come first: they name their eventfds before the result does.
        let args = text(&request.arguments(&self.names));
        let result = match result {
            Ok(answer) => Ok(text(&answer.json(&self.names))),
            Err(error) => Err(text(&error.json(&self.names)).unwrap_or_default()),
        };
        let call = request.call().name().to_owned();
        self.writer.write(Line::Call(CallLine { thread, on, call, args, result }));
    }
}

/// A value as it stands in a transcript, unless it says nothing.
pub(super) fn text(value: &impl serde::Serialize) -> Option<Box<RawValue>> {
    let text = serde_json::value::to_raw_value(value).ok()?;
    (!matches!(text.get(), "{}" | "null")).then_some(text)
}

impl Interceptor for Record {
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let recorder = &*self.recorder;
        // What a call does may be seen by others before it returns: nothing they do then may be
        // written before it. A replay takes care of that itself, and lets calls wait.
        let takes_long = matches!(request, Request::Run(_)) || recorder.follows.is_some();
        let mut held = Some(recorder.lock());
        if let Request::Run(_) = request {
            held.as_mut().map(|state| state.running.insert(object));
        }
        let held = held.filter(|_| !takes_long);
        let result = real();
        let mut state = held.unwrap_or_else(|| recorder.lock());
        recorder.forward(&mut state);
        state.running.remove(&object);
        state.call(object, &request, &result);
        if let Some(replay) = &recorder.follows {
            replay.order().wrote_call();
        }
        state.stand_ins.called(object, &request, result.is_ok(), &recorder.doorbells);
        result
    }

    fn wants_data(&self) -> bool {
        true
    }

    fn stand_in(&self, object: Object, event: &EventFd) -> Result<Option<EventFd>, Error> {
        let Object::Vm(vm) = object else { return Ok(None) };
        self.recorder.start()?;
        let own = self.recorder.lock().stand_ins.get(vm, event, &self.recorder.doorbells)?;
        if let (Some(replay), Some(own)) = (&self.recorder.follows, &own) {
            replay.order().stands_in(own, event);
        }
        Ok(own)
    }

    fn of_vm(&self, vm: u32) -> Self {
        let end = VmEnd { recorder: self.recorder.clone(), vm };
        Self { recorder: self.recorder.clone(), _vm: Some(Arc::new(end)) }
    }
}

/// The end of a VM: nothing signals its doorbells any more.
struct VmEnd {
    recorder: Arc<Recorder>,
    vm: u32,
}

impl Drop for VmEnd {
    fn drop(&mut self) {
        let mut state = self.recorder.lock();
        self.recorder.forward(&mut state);
        state.stand_ins.end(self.vm, &self.recorder.doorbells);
    }
}
