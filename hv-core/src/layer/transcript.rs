//! The transcript: what [`Record`](super::Record) writes and [`Replay`](super::Replay) reads.
//!
//! A transcript is text in UTF-8, one JSON object per line (JSON Lines), so that `diff`, `grep`
//! and `jq` work on it. Version 1:
//!
//! ```text
//! {"hv-transcript":1,"meta":{"host":"Linux 6.18"}}
//! {"thread":0,"on":"system","call":"KVM_GET_API_VERSION","ok":12}
//! {"thread":0,"on":"vm0","call":"KVM_SET_TSS_ADDR","args":{"address":"0xfeffd000"}}
//! {"thread":1,"on":"vm0/vcpu1","call":"KVM_RUN","args":{...},"ok":{...}}
//! {"signal":0,"count":2,"during":["vm0/vcpu1"]}
//! {"end":true}
//! ```
//!
//! - The first line has the version, and texts that belong to the whole (`meta`).
//! - The last line is `{"end":true}`; without it the transcript was cut off.
//! - A line with `signal` says that KVM signalled an eventfd that the VMM gave it for a doorbell
//!   (`KVM_IOEVENTFD`) or to hear of the end of an interrupt (`KVM_IRQFD`), by its number, how much
//!   was added to it, and which vCPUs ran then: one of them rang.
//! - Every other line is a call that has returned. `on` is the object (`system`, `vm0`,
//!   `vm0/vcpu1`, and for kicks `vm0/kick1`; VMs are numbered as they are created, vCPUs have their
//!   id), `call` its name in the KVM API or the system call, `args` its arguments (absent: none),
//!   and then either `ok`, its result (absent: nothing to say), or `err`, its error. `thread` numbers the
//!   threads of the VMM in the order of their first line.
//!
//! No line has a pointer, a descriptor or a time. Eventfds are numbered in order of appearance,
//! host memory is told by its length. What each call's `args` and `ok` look like is told where they
//! are made (`layer/json`); of `KVM_RUN` they are what the VMM answered to the exit before, and the
//! exit with its data.
//!
//! The reader is strict: a line that is too long, not JSON, has a member this version does not
//! have or lacks one is an error with its number. This module knows no call; it must not.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::sync::Arc;

use serde::de::{self, Deserializer};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Object;

/// The version of the format that is written, and the only one that is read.
pub const VERSION: u64 = 1;

/// Bytes of the longest line, its end included: room for the dirty log of a slot of 64 GiB.
pub const MAX_LINE: usize = 8 << 20;

/// Texts that belong to a transcript as a whole: whose it is, of which host.
pub type Meta = BTreeMap<String, String>;

/// Why a transcript can't be read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TranscriptError {
    /// Reading failed.
    #[error("line {line} of the transcript can't be read: {error}")]
    Read {
        /// The line that was to be read, from 1.
        line: u64,
        /// What the reader said.
        error: Arc<io::Error>,
    },
    /// A line is longer than [`MAX_LINE`].
    #[error("line {line} of the transcript is longer than {MAX_LINE} bytes")]
    TooLong {
        /// The line.
        line: u64,
    },
    /// A line is not JSON, or not of this format.
    #[error("line {line} of the transcript is not a line of version {VERSION}: {error}")]
    Malformed {
        /// The line.
        line: u64,
        /// What is wrong with it.
        error: Arc<serde_json::Error>,
    },
    /// A line has members that do not belong together, or not all that do.
    #[error("line {line} of the transcript is {what}")]
    Mixed {
        /// The line.
        line: u64,
        /// What it is instead.
        what: &'static str,
    },
    /// The first line is not that of a transcript.
    #[error("this is not a transcript: its first line is not {{\"hv-transcript\":{VERSION},...}}")]
    NotATranscript,
    /// A version this program does not know.
    #[error("the transcript is of version {found}; this program reads version {VERSION}")]
    Version {
        /// Its version.
        found: u64,
    },
    /// It ends before its last line, or in the middle of one.
    #[error(
        "the transcript ends after line {lines}, without its last line {{\"end\":true}}: \
         it was cut off"
    )]
    CutOff {
        /// Whole lines it has.
        lines: u64,
    },
}

impl TranscriptError {
    /// The line that is wrong, from 1.
    #[must_use]
    pub fn line(&self) -> Option<u64> {
        match self {
            Self::Read { line, .. }
            | Self::TooLong { line }
            | Self::Malformed { line, .. }
            | Self::Mixed { line, .. } => Some(*line),
            Self::CutOff { lines } => lines.checked_add(1),
            Self::NotATranscript | Self::Version { .. } => Some(1),
        }
    }
}

/// What a line says.
#[derive(Debug, Clone)]
pub(super) enum Line {
    /// A call that has returned.
    Call(CallLine),
    /// KVM signalled a doorbell's eventfd.
    Signal {
        /// The eventfd, by its number.
        event: u32,
        /// What was added to it.
        count: u32,
        /// The vCPUs that ran then.
        during: Vec<Object>,
    },
}

/// A call that has returned. Arguments, result and error stay the text they are in the file.
#[derive(Debug, Clone)]
pub(super) struct CallLine {
    /// The thread that made it.
    pub(super) thread: u32,
    /// The object it was made on.
    pub(super) on: Object,
    /// Its name.
    pub(super) call: String,
    /// Its arguments, if any.
    pub(super) args: Option<Box<RawValue>>,
    /// Its result, if there is anything to say, or its error.
    pub(super) result: Result<Option<Box<RawValue>>, Box<RawValue>>,
}

/// A line as it stands in the file; members in this order.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    thread: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    on: Option<On>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    call: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    args: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ok: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    err: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signal: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    count: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    during: Vec<On>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    end: Option<bool>,
}

/// An object by its name.
struct On(Object);

impl Serialize for On {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for On {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let wrong = || de::Error::custom(format_args!("no object is named {name:?}"));
        object(&name).filter(|on| on.to_string() == name).map(Self).ok_or_else(wrong)
    }
}

/// The object that may have this name.
fn object(name: &str) -> Option<Object> {
    if name == "system" {
        return Some(Object::System);
    }
    let name = name.strip_prefix("vm")?;
    let Some((vm, of)) = name.split_once('/') else { return Some(Object::Vm(name.parse().ok()?)) };
    let vm = vm.parse().ok()?;
    match (of.strip_prefix("vcpu"), of.strip_prefix("kick")) {
        (Some(id), _) => Some(Object::Vcpu { vm, id: id.parse().ok()? }),
        (_, Some(id)) => Some(Object::Kick { vm, id: id.parse().ok()? }),
        _ => None,
    }
}

/// What the first line of every version has.
#[derive(Deserialize)]
struct JustVersion {
    #[serde(rename = "hv-transcript")]
    version: u64,
}

/// The first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct First {
    #[serde(rename = "hv-transcript")]
    version: u64,
    #[serde(default)]
    meta: Meta,
}

impl From<Line> for Written {
    fn from(line: Line) -> Self {
        match line {
            Line::Call(CallLine { thread, on, call, args, result }) => {
                let (ok, err) = match result {
                    Ok(ok) => (ok, None),
                    Err(err) => (None, Some(err)),
                };
                let (thread, on, call) = (Some(thread), Some(On(on)), Some(call));
                Self { thread, on, call, args, ok, err, ..Self::default() }
            }
            Line::Signal { event, count, during } => {
                let during = during.into_iter().map(On).collect();
                Self { signal: Some(event), count: Some(count), during, ..Self::default() }
            }
        }
    }
}

/// What a line of the file is.
enum Parsed {
    Line(Line),
    End,
}

impl TryFrom<Written> for Parsed {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, &'static str> {
        match written {
            Written {
                thread: Some(thread),
                on: Some(On(on)),
                call: Some(call),
                args,
                ok,
                err,
                signal: None,
                count: None,
                during,
                end: None,
            } if during.is_empty() => {
                let result = match (ok, err) {
                    (ok, None) => Ok(ok),
                    (None, Some(err)) => Err(err),
                    _ => return Err("a call with both ok and err"),
                };
                Ok(Self::Line(Line::Call(CallLine { thread, on, call, args, result })))
            }
            Written {
                thread: None,
                on: None,
                call: None,
                args: None,
                ok: None,
                err: None,
                signal,
                count,
                during,
                end,
            } => match (signal, count, end) {
                (Some(event), Some(count), None) => {
                    let during = during.into_iter().map(|On(on)| on).collect();
                    Ok(Self::Line(Line::Signal { event, count, during }))
                }
                (None, None, Some(true)) if during.is_empty() => Ok(Self::End),
                _ => Err("neither a call, a signal nor the end"),
            },
            _ => Err("not a whole call (thread, on, call), or has what does not belong to one"),
        }
    }
}

/// What a line holds. serde would take a list for a structure as well.
fn object_of<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, serde_json::Error> {
    match line.trim_ascii_start().first() {
        Some(b'{') | None => serde_json::from_slice(line),
        Some(_) => Err(de::Error::custom("not an object")),
    }
}

/// Reads a transcript line by line.
pub(super) struct Reader<R> {
    input: R,
    /// The line being read. At most [`MAX_LINE`] bytes and one.
    buffer: Vec<u8>,
    /// Whole lines read.
    lines: u64,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads the first line.
    pub(super) fn open(input: R) -> Result<(Self, Meta), TranscriptError> {
        let mut reader = Self { input, buffer: Vec::new(), lines: 0, ended: false };
        let (line, _) = reader.read()?.ok_or(TranscriptError::NotATranscript)?;
        // The version first: what else stands there depends on it.
        let JustVersion { version } =
            object_of(line).map_err(|_| TranscriptError::NotATranscript)?;
        if version != VERSION {
            return Err(TranscriptError::Version { found: version });
        }
        let First { meta, .. } = object_of(line)
            .map_err(|error| TranscriptError::Malformed { line: 1, error: Arc::new(error) })?;
        Ok((reader, meta))
    }

    /// The next line, with its number and its bytes; `None` once the end was read.
    pub(super) fn next(&mut self) -> Result<Option<Numbered>, TranscriptError> {
        if self.ended {
            return Ok(None);
        }
        let lines = self.lines;
        let Some((text, line)) = self.read()? else {
            return Err(TranscriptError::CutOff { lines });
        };
        let bytes = text.len();
        let written: Written = object_of(text)
            .map_err(|error| TranscriptError::Malformed { line, error: Arc::new(error) })?;
        match written.try_into().map_err(|what| TranscriptError::Mixed { line, what })? {
            Parsed::Line(what) => Ok(Some(Numbered { number: line, bytes, line: what })),
            Parsed::End => {
                self.ended = true;
                match self.read()? {
                    None => Ok(None),
                    Some((_, line)) => {
                        Err(TranscriptError::Mixed { line, what: "after the end of it" })
                    }
                }
            }
        }
    }

    /// The next line without its end, and its number; `None` at the end of the file.
    fn read(&mut self) -> Result<Option<(&[u8], u64)>, TranscriptError> {
        self.buffer.clear();
        let line = self.lines.saturating_add(1);
        let limit = MAX_LINE as u64 + 1;
        self.input
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut self.buffer)
            .map_err(|error| TranscriptError::Read { line, error: Arc::new(error) })?;
        if self.buffer.len() > MAX_LINE {
            return Err(TranscriptError::TooLong { line });
        }
        match self.buffer.strip_suffix(b"\n") {
            Some(text) => {
                self.lines = line;
                Ok(Some((text, line)))
            }
            None if self.buffer.is_empty() => Ok(None),
            None => Err(TranscriptError::CutOff { lines: self.lines }),
        }
    }
}

/// A line with its number.
#[derive(Debug)]
pub(super) struct Numbered {
    /// Its number in the file, from 1.
    pub(super) number: u64,
    /// Its length.
    pub(super) bytes: usize,
    /// What it says.
    pub(super) line: Line,
}

/// Why a transcript is not whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Writing failed; nothing was written after.
    #[error("line {line} of the transcript can't be written: {error}; it is cut off there")]
    Write {
        /// The line, from 1.
        line: u64,
        /// What the writer said.
        error: io::Error,
    },
    /// A line would be longer than [`MAX_LINE`]; nothing was written after.
    #[error(
        "line {line} of the transcript, {call}, would be longer than {MAX_LINE} bytes; \
         it is cut off there"
    )]
    TooLong {
        /// The line.
        line: u64,
        /// The call.
        call: String,
    },
    /// It was already finished.
    #[error("the transcript was already finished")]
    Finished,
}

/// Writes a transcript line by line. After the first failure it writes nothing more.
pub(super) struct Writer {
    output: Box<dyn Write + Send>,
    /// The line being written.
    buffer: Vec<u8>,
    /// Lines written.
    lines: u64,
    state: WriterState,
}

enum WriterState {
    Writing,
    Failed(RecordError),
    Finished,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("lines", &self.lines).finish_non_exhaustive()
    }
}

impl Writer {
    /// Writes the first line.
    pub(super) fn new(output: Box<dyn Write + Send>, meta: &Meta) -> Self {
        let mut writer = Self { output, buffer: Vec::new(), lines: 0, state: WriterState::Writing };
        writer.put(&First { version: VERSION, meta: meta.clone() }, "the first");
        writer
    }

    /// Writes a line.
    pub(super) fn write(&mut self, line: Line) {
        let call = match &line {
            Line::Call(line) => line.call.clone(),
            Line::Signal { .. } => "a signal".to_owned(),
        };
        self.put(&Written::from(line), &call);
    }

    /// Writes the last line and all that is still buffered.
    pub(super) fn finish(&mut self) -> Result<(), RecordError> {
        self.put(&Written { end: Some(true), ..Written::default() }, "the last");
        match std::mem::replace(&mut self.state, WriterState::Finished) {
            WriterState::Failed(error) => Err(error),
            WriterState::Finished => Err(RecordError::Finished),
            WriterState::Writing => {
                self.output.flush().map_err(|error| RecordError::Write { line: self.lines, error })
            }
        }
    }

    fn put(&mut self, line: &impl Serialize, call: &str) {
        if !matches!(self.state, WriterState::Writing) {
            return;
        }
        let number = self.lines.saturating_add(1);
        self.buffer.clear();
        let written = serde_json::to_writer(&mut self.buffer, line).map_err(io::Error::from);
        self.buffer.push(b'\n');
        let written = if self.buffer.len() > MAX_LINE {
            Err(RecordError::TooLong { line: number, call: call.to_owned() })
        } else {
            written
                .and_then(|()| self.output.write_all(&self.buffer))
                .map_err(|error| RecordError::Write { line: number, error })
        };
        match written {
            Ok(()) => self.lines = number,
            Err(error) => self.state = WriterState::Failed(error),
        }
    }
}
