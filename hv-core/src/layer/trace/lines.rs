//! The JSON lines of a trace, and what became of them.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::Error;
use crate::layer::{Answer, Names, Object, Request};

/// Writing the lines of a trace failed. The calls were made all the same.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "the trace is not whole: writing failed after {written} lines, {lost} are missing: {source}"
)]
pub struct TraceError {
    /// Lines that were written.
    pub written: u64,
    /// Lines that were not.
    pub lost: u64,
    /// Why: the first error.
    #[source]
    pub source: Arc<io::Error>,
}

/// Where lines go. One lock, and one buffer that is used again.
pub(super) struct Lines(Mutex<State>);

struct State {
    output: Box<dyn Write + Send>,
    line: Vec<u8>,
    written: u64,
    lost: u64,
    error: Option<Arc<io::Error>>,
}

/// A line may be as long as a dirty log; the room for such a one is not kept.
const KEPT: usize = 64 << 10;

impl Lines {
    pub(super) fn new(output: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(State { output, line: Vec::new(), written: 0, lost: 0, error: None }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A line is begun anew each time, so what a panic left does no harm.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the line that `make` makes.
    pub(super) fn write(&self, make: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) {
        let state = &mut *self.lock();
        if state.error.is_some() {
            state.lost += 1;
            return;
        }
        state.line.clear();
        let made = make(&mut state.line);
        match made.and_then(|()| state.output.write_all(&state.line)) {
            Ok(()) => state.written += 1,
            Err(error) => {
                state.lost += 1;
                state.error = Some(Arc::new(error));
            }
        }
        if state.line.capacity() > KEPT {
            state.line = Vec::new();
        }
    }

    pub(super) fn finish(&self) -> Result<(), TraceError> {
        let state = &mut *self.lock();
        if state.error.is_none() {
            state.error = state.output.flush().err().map(Arc::new);
        }
        let State { written, lost, .. } = *state;
        match &state.error {
            None => Ok(()),
            Some(source) => Err(TraceError { written, lost, source: source.clone() }),
        }
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { written, lost, error, .. } = &*self.lock();
        f.debug_struct("Lines")
            .field("written", written)
            .field("lost", lost)
            .field("error", error)
            .finish()
    }
}

/// Appends the line of a call, with its end.
pub(super) fn line<T: Answer>(
    line: &mut Vec<u8>,
    names: &Names,
    at: u64,
    object: Object,
    request: &Request<'_>,
    result: &Result<T, Error>,
    ns: u64,
) -> io::Result<()> {
    // The parts that are not values have no character that JSON would escape.
    write!(line, r#"{{"at":{at},"on":"{object}","call":"{}","args":"#, request.call().name())?;
    value(line, &request.arguments(names))?;
    match result {
        Ok(answer) => {
            line.extend_from_slice(br#","ok":"#);
            value(line, &answer.json(names))?;
        }
        Err(error) => {
            line.extend_from_slice(br#","err":"#);
            value(line, &error.json(names))?;
        }
    }
    writeln!(line, r#","ns":{ns}}}"#)
}

fn value(line: &mut Vec<u8>, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(line, value).map_err(io::Error::from)
}
