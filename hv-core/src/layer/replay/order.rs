//! The order of a replay: which call is next, who waits, and when the replay stops.
//!
//! The calls of a transcript are replayed in the order of their lines, over all threads: a call
//! that is not the next one waits. It does not wait for what can't happen: calls on a vCPU come
//! from one thread at a time, so its next call is known at once; of a VM or the system, a call that
//! is further on waits only if no earlier line is of the same thread as that one.
//!
//! The first difference ends the replay: it wakes everyone who waits, and every later call fails.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use super::ahead::{Ahead, Next};
use super::diff::{Difference, Made, Why};
use super::vcpu::is_interrupted;
use crate::layer::record::text;
use crate::layer::signals::{Signals, signal};
use crate::layer::transcript::{CallLine, TranscriptError};
use crate::layer::{Names, Object, Request};
use crate::{Call, Context, Errno, Error, EventFd, Ioctl};

/// A call of the VMM.
#[derive(Clone, Copy)]
pub(super) struct Calling<'a> {
    pub(super) on: Object,
    pub(super) request: &'a Request<'a>,
}

impl Calling<'_> {
    fn call(&self) -> Call {
        self.request.call()
    }

    /// Whether there are eventfds among its arguments.
    fn names_eventfds(&self) -> bool {
        matches!(self.call(), Call::Ioctl(Ioctl::Irqfd | Ioctl::Ioeventfd))
    }

    /// The call as a transcript would have it. Eventfds without a name get one.
    fn made(&self, names: &Names) -> Made {
        let args = text(&self.request.arguments(names));
        Made::new(self.on, self.call().name(), args.as_deref())
    }
}

/// What a replay goes by, shared by all its handles.
pub(in crate::layer) struct Order {
    state: Mutex<State>,
    /// Something happened that others may wait for.
    moved: Condvar,
    /// How long nothing may happen while a call waits.
    limit: Duration,
}

pub(super) struct State {
    ahead: Ahead,
    names: Names,
    stopped: Option<(Error, Arc<Difference>)>,
    /// When the last line was used.
    progress: Instant,
    /// What KVM would signal, by VM.
    signals: Vec<(u32, Signals, EventFd)>,
    /// vCPUs that were kicked since they were last interrupted.
    kicked: HashSet<(u32, u32)>,
    /// vCPUs that the VMM runs.
    running: HashSet<Object>,
    /// The vCPUs that ran when the signal was made that the follower has to write down.
    during: Vec<Object>,
    /// vCPUs the VMM has dropped.
    dropped: HashSet<(u32, u32)>,
    /// Whether someone writes down what is replayed, and who has to before the next line is used.
    follower: Option<Turn>,
}

/// Whose line has been used and not yet been written down by who follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Nobody,
    Call(ThreadId),
    Signal,
}

/// What becomes of a call.
pub(super) enum Turned {
    /// It is this line.
    Line(u64, CallLine),
    /// It is no line, and need not be.
    Unwritten,
}

impl Order {
    pub(super) fn new(ahead: Ahead, limit: Duration) -> Self {
        let state = State {
            ahead,
            names: Names::default(),
            stopped: None,
            progress: Instant::now(),
            signals: Vec::new(),
            kicked: HashSet::new(),
            running: HashSet::new(),
            during: Vec::new(),
            dropped: HashSet::new(),
            follower: None,
        };
        Self { state: Mutex::new(state), moved: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn of a call and takes its line. `taken` sees the line before anyone else
    /// goes on.
    pub(super) fn call(
        &self,
        calling: Calling<'_>,
        taken: impl FnOnce(&Names, &CallLine),
    ) -> Result<Turned, Error> {
        let runs = calling.call() == RUN;
        if runs {
            self.lock().running.insert(calling.on);
        }
        let turned = self.turned(calling, taken);
        if runs {
            self.lock().running.remove(&calling.on);
        }
        turned
    }

    fn turned(
        &self,
        calling: Calling<'_>,
        taken: impl FnOnce(&Names, &CallLine),
    ) -> Result<Turned, Error> {
        let mut state = self.lock();
        let since = Instant::now();
        // The line that is waited for.
        let mut awaited = None;
        loop {
            if let Some((error, _)) = state.stopped {
                return Err(error);
            }
            if state.settle() {
                self.moved.notify_all();
            }
            match state.turn(calling, &mut awaited) {
                Ok(Progress::Taken(number)) => {
                    let Some(line) = state.ahead.take() else { continue };
                    taken(&state.names, &line);
                    state.used(calling, &line);
                    self.moved.notify_all();
                    return Ok(Turned::Line(number, line));
                }
                Ok(Progress::Unwritten) => return Ok(Turned::Unwritten),
                Ok(Progress::Wait) => state = self.wait(state, calling, since),
                Err(difference) => {
                    let error = state.stop(calling.call(), *difference);
                    self.moved.notify_all();
                    return Err(error);
                }
            }
        }
    }

    /// Whether a call is the next one on its object in the transcript, by its name; then it waits
    /// for its turn, but takes no line. False once the replay has stopped: the call will say why.
    pub(super) fn is_next(&self, calling: Calling<'_>) -> bool {
        let mut state = self.lock();
        let since = Instant::now();
        loop {
            if state.stopped.is_some() {
                return false;
            }
            if state.settle() {
                self.moved.notify_all();
            }
            match state.ahead.of(calling.on).next() {
                Some((_, line)) if line.call != calling.call().name() => return false,
                Some((number, _)) => {
                    let turn = matches!(state.ahead.next(), Next::Call(next, _) if next == number);
                    if turn && state.is_free() {
                        return true;
                    }
                }
                None if state.ahead.is_whole() => return false,
                None => {}
            }
            state = self.wait(state, calling, since);
        }
    }

    /// Waits until something happens, or stops the replay because nothing does, neither `since` nor
    /// for as long before.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        calling: Calling<'_>,
        since: Instant,
    ) -> MutexGuard<'a, State> {
        let idle = state.progress.max(since).elapsed();
        let left = self.limit.saturating_sub(idle);
        if !left.is_zero() {
            return self.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let waiting = calling.made(&state.names_for(calling));
        let (line, expected) = match state.ahead.next() {
            Next::Call(line, expected) if state.is_free() => (line, Some(expected.into())),
            Next::Signal { number: line, during, .. } if state.is_free() => {
                (line, state.missing_run(during))
            }
            Next::Call(line, _) | Next::Signal { number: line, .. } => (line, None),
            Next::End | Next::Unreadable(_) => (0, None),
        };
        state
            .stop(calling.call(), Difference::Stuck { line, expected, limit: self.limit, waiting });
        self.moved.notify_all();
        state
    }

    /// Lets the last line have been used `time` ago.
    #[cfg(test)]
    pub(super) fn was_idle(&self, time: Duration) {
        self.lock().progress = Instant::now().checked_sub(time).unwrap();
    }

    /// Stops the replay from outside a call.
    pub(super) fn fail(&self, call: Call, difference: Difference) -> Error {
        let mut state = self.lock();
        self.moved.notify_all();
        state.stop(call, difference)
    }

    /// The first difference, if there is one.
    pub(super) fn difference(&self) -> Option<Arc<Difference>> {
        self.lock().stopped.as_ref().map(|(_, difference)| difference.clone())
    }

    /// Whether all was used that has to be.
    pub(super) fn finish(&self) -> Result<(), Arc<Difference>> {
        let mut state = self.lock();
        if state.stopped.is_none()
            && let Some(difference) = state.rest()
        {
            state.stop(Call::Open, difference);
            self.moved.notify_all();
        }
        match &state.stopped {
            Some((_, difference)) => Err(difference.clone()),
            None => Ok(()),
        }
    }

    /// The VMM has dropped a vCPU.
    pub(super) fn dropped(&self, vm: u32, id: u32) {
        let mut state = self.lock();
        state.dropped.insert((vm, id));
        state.settle();
        self.moved.notify_all();
    }

    /// The VMM has dropped a VM: nothing rings its doorbells any more.
    pub(super) fn dropped_vm(&self, vm: u32) {
        self.lock().signals.retain(|(its, ..)| *its != vm);
    }

    /// From now on a line is used only when the one before was written down.
    pub(in crate::layer) fn follow(&self) {
        self.lock().follower.get_or_insert(Turn::Nobody);
    }

    /// The vCPUs that ran when the signal was made that the follower has to write down.
    pub(in crate::layer) fn signalled_during(&self) -> Vec<Object> {
        self.lock().during.clone()
    }

    /// The follower gives `stand_in` where the VMM gave `event`.
    pub(in crate::layer) fn stands_in(&self, stand_in: &EventFd, event: &EventFd) {
        self.lock().names.same(stand_in, event);
    }

    /// The follower has written down the call of this thread.
    pub(in crate::layer) fn wrote_call(&self) {
        self.wrote(Turn::Call(thread::current().id()));
    }

    /// The follower has written down a signal.
    pub(in crate::layer) fn wrote_signal(&self) {
        self.wrote(Turn::Signal);
    }

    fn wrote(&self, turn: Turn) {
        let mut state = self.lock();
        if state.follower == Some(turn) {
            state.follower = Some(Turn::Nobody);
            state.settle();
            self.moved.notify_all();
        }
    }
}

enum Progress {
    /// The next line, of this number, is the call.
    Taken(u64),
    /// The call is no line, and need not be.
    Unwritten,
    Wait,
}

impl State {
    /// Whether it is the turn of a call.
    fn turn(
        &mut self,
        calling: Calling<'_>,
        awaited: &mut Option<u64>,
    ) -> Result<Progress, Box<Difference>> {
        if let Object::Kick { vm, id } = calling.on
            && self.is_redundant(vm, id)
        {
            self.kicked.insert((vm, id));
            return Ok(Progress::Unwritten);
        }
        if !self.is_free() {
            return Ok(Progress::Wait);
        }
        let next = match self.ahead.next() {
            Next::Call(number, _) => Some(number),
            Next::Unreadable(error) => return Err(Box::new(error.clone().into())),
            Next::Signal { .. } | Next::End => None,
        };
        // What was awaited may have been the call of another thread.
        if awaited.is_none_or(|awaited| next.is_none_or(|next| awaited < next)) {
            *awaited = self.find(calling)?;
        }
        if awaited.is_none() && self.is_interrupted(calling) {
            return Ok(Progress::Unwritten);
        }
        match (*awaited, self.ahead.next()) {
            (Some(awaited), Next::Call(number, line)) if awaited == number => {
                // The names are kept only if this is the call.
                let names = self.names_for(calling);
                let actual = calling.made(&names);
                if !actual.is(line) {
                    let (expected, later) = (Made::from(line), self.later(number, &actual));
                    let line = number;
                    return Err(Box::new(Difference::Other { line, expected, actual, later }));
                }
                if calling.names_eventfds() {
                    self.names = names;
                }
                Ok(Progress::Taken(number))
            }
            _ => Ok(Progress::Wait),
        }
    }

    /// The names as they would be after a call.
    fn names_for(&self, calling: Calling<'_>) -> Names {
        if calling.names_eventfds() { self.names.clone() } else { Names::default() }
    }

    /// The line a call has to wait for; `None` if it may be one that is not known yet.
    fn find(&mut self, calling: Calling<'_>) -> Result<Option<u64>, Box<Difference>> {
        // An eventfd that has no name yet may get another one than it would get now.
        let names = self.names_for(calling);
        let actual = calling.made(&names);
        let named = !calling.names_eventfds() || names.len() == self.names.len();
        let is = |line: &CallLine| match named {
            true => actual.is(line),
            false => (actual.on, &actual.call) == (line.on, &line.call),
        };

        let (mut first, mut skipped) = (None, None);
        for (number, line) in self.ahead.of(calling.on) {
            first = first.or(Some((number, line)));
            if is(line) {
                match self.ahead.before(number, line.thread) {
                    None => return Ok(Some(number)),
                    // What the thread that makes this call has left out.
                    Some(before) => skipped = skipped.or(Some((before, number))),
                }
            }
            if !shared(calling.on) {
                break;
            }
        }
        let ((line, expected), later) = match (skipped, first) {
            (Some((before, number)), _) => (before, Some(number)),
            (None, Some(first)) => (first, self.later(first.0, &actual)),
            (None, None) if self.is_extra(calling) => {
                return Err(Box::new(Difference::Extra { actual }));
            }
            (None, None) => return Ok(None),
        };
        Err(Box::new(Difference::Other { line, expected: expected.into(), actual, later }))
    }

    /// The first line after `line` that is `made`.
    fn later(&self, line: u64, made: &Made) -> Option<u64> {
        let mut lines = self.ahead.of(made.on).filter(|(number, _)| *number > line);
        lines.find(|(_, line)| made.is(line)).map(|(number, _)| number)
    }

    /// Whether the transcript has no line for a call on an object it has no more lines of.
    fn is_extra(&self, calling: Calling<'_>) -> bool {
        let kick_to_come = match calling.on {
            // How a VMM stops its vCPUs may depend on timing: a kick may end one run more.
            Object::Vcpu { vm, id } if calling.call() == RUN => {
                self.kicked.contains(&(vm, id))
                    || self.ahead.of(Object::Kick { vm, id }).next().is_some()
            }
            _ => false,
        };
        self.ahead.is_whole() && !kick_to_come
    }

    /// Whether a call is one more run of a vCPU that is not run any more in the transcript, ended
    /// by a kick.
    fn is_interrupted(&mut self, calling: Calling<'_>) -> bool {
        let Object::Vcpu { vm, id } = calling.on else { return false };
        calling.call() == RUN && self.ahead.is_whole() && self.kicked.remove(&(vm, id))
    }

    /// Whether a kick does nothing that the transcript shows: the vCPU was already kicked and will
    /// be interrupted before it is kicked again, or nothing more is known of it.
    fn is_redundant(&self, vm: u32, id: u32) -> bool {
        let kick = self.ahead.of(Object::Kick { vm, id }).next().map(|(number, _)| number);
        let mut runs = self.ahead.of(Object::Vcpu { vm, id });
        let interrupted = runs.find(|(_, line)| is_interrupted(line)).map(|(number, _)| number);
        match (interrupted, kick) {
            (Some(interrupted), Some(kick)) if interrupted > kick => false,
            (Some(_), _) => self.kicked.contains(&(vm, id)),
            (None, Some(_)) => false,
            (None, None) => self.ahead.is_whole(),
        }
    }

    /// Whether a line may be used.
    fn is_free(&self) -> bool {
        matches!(self.follower, None | Some(Turn::Nobody))
    }

    /// Keeps account of a line that was used.
    fn used(&mut self, calling: Calling<'_>, line: &CallLine) {
        self.progress = Instant::now();
        self.running.remove(&line.on);
        match line.on {
            Object::Vm(vm) if line.result.is_ok() => {
                if let Some((signals, event)) = Signals::assigned_by(calling.request) {
                    self.signals.push((vm, signals, event.clone()));
                } else if let Some(ended) = Signals::ended_by(calling.request) {
                    self.signals.retain(|(its, signals, _)| (*its, signals) != (vm, &ended));
                }
            }
            Object::Kick { vm, id } => {
                self.kicked.insert((vm, id));
            }
            Object::Vcpu { vm, id } if is_interrupted(line) => {
                self.kicked.remove(&(vm, id));
            }
            _ => {}
        }
        match &mut self.follower {
            Some(turn) => *turn = Turn::Call(thread::current().id()),
            None => {
                self.settle();
            }
        }
    }

    /// Uses the lines that are nobody's call: signals, and the runs of dropped vCPUs that a kick
    /// ended. Returns whether there was one.
    fn settle(&mut self) -> bool {
        let mut moved = false;
        while self.stopped.is_none() && self.is_free() {
            match self.ahead.next() {
                // What rings is a guest that runs, so it can't have been before that.
                Next::Signal { during, .. } if self.missing_run(during).is_some() => break,
                Next::Signal { number, event, count, during } => {
                    if let Some(event) = self.signalled(event) {
                        signal(event, count);
                        if let Some(turn) = &mut self.follower {
                            *turn = Turn::Signal;
                            self.during = during.to_vec();
                        }
                    } else if usize::try_from(event).is_ok_and(|event| event >= self.names.len()) {
                        let what = "a signal of an eventfd that no call has named before";
                        let error = TranscriptError::Mixed { line: number, what };
                        self.stop(Ioctl::Ioeventfd.into(), error.into());
                        return true;
                    }
                    // Otherwise its VM was dropped here before it was in the recording.
                }
                Next::Call(number, line) => match line.on {
                    Object::Vcpu { vm, id } if self.dropped.contains(&(vm, id)) => {
                        if !is_interrupted(line) {
                            let (expected, why) = (Made::from(line), Why::Dropped);
                            let missing = Difference::Missing { line: number, expected, why };
                            self.stop(RUN, missing);
                            return true;
                        }
                    }
                    _ => break,
                },
                Next::End | Next::Unreadable(_) => break,
            }
            self.progress = Instant::now();
            self.ahead.take();
            moved = true;
        }
        moved
    }

    /// A run of one of these vCPUs that the VMM has yet to call.
    fn missing_run(&self, during: &[Object]) -> Option<Made> {
        let ready = |on: &Object| match *on {
            Object::Vcpu { vm, id } => {
                self.running.contains(on) || self.dropped.contains(&(vm, id))
            }
            _ => true,
        };
        let missing = during.iter().find(|on| !ready(on))?;
        Some(Made::new(*missing, RUN.name(), None))
    }

    /// What is left of the transcript and must not be.
    fn rest(&mut self) -> Option<Difference> {
        loop {
            self.settle();
            match self.ahead.next() {
                Next::Call(line, call) => {
                    // Nobody runs any more whom these kicks could stop.
                    if !matches!(call.on, Object::Kick { .. }) {
                        let (expected, why) = (Made::from(call), Why::Finished);
                        return Some(Difference::Missing { line, expected, why });
                    }
                }
                Next::Signal { number: line, during, .. } => {
                    let expected = self.missing_run(during)?;
                    return Some(Difference::Missing { line, expected, why: Why::Finished });
                }
                Next::Unreadable(error) => return Some(error.clone().into()),
                Next::End => return None,
            }
            self.ahead.take();
        }
    }

    /// Stops the replay, unless it was stopped before: the error of every call from now on.
    fn stop(&mut self, call: Call, difference: Difference) -> Error {
        let line = difference.line().unwrap_or(0);
        let error = Error::new(call, Errno::EPROTO).about(Context::Transcript { line });
        self.stopped.get_or_insert_with(|| (error, Arc::new(difference))).0
    }

    /// The eventfd of this name, if KVM would signal it.
    fn signalled(&self, event: u32) -> Option<&EventFd> {
        let mut events = self.signals.iter().map(|(.., event)| event);
        events.find(|its| self.names.known(its) == Some(event))
    }
}

const RUN: Call = Call::Ioctl(Ioctl::Run);

/// Whether several threads may make calls on an object at the same time.
fn shared(on: Object) -> bool {
    !matches!(on, Object::Vcpu { .. })
}
