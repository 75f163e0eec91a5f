//! A difference between a transcript and what a VMM does, told so that a person sees it.
//!
//! Fields are compared by name and shown one per line. What is shown is bounded, whatever the two
//! sides are.

use std::fmt;
use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;

use crate::layer::Object;
use crate::layer::transcript::{CallLine, TranscriptError};

/// Differing fields that are shown; more are counted.
const MAX_FIELDS: usize = 16;

/// Characters of a value that are shown.
const MAX_SHOWN: usize = 120;

/// A call with its arguments: what the transcript has, or what the VMM did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The object it is made on.
    pub on: Object,
    /// Its name, as in the transcript.
    pub call: String,
    /// Its arguments as JSON, if it has any.
    pub args: Option<String>,
}

impl Made {
    /// A call of the VMM.
    pub(super) fn new(on: Object, call: &str, args: Option<&RawValue>) -> Self {
        Self { on, call: call.to_owned(), args: args.map(|args| args.get().to_owned()) }
    }

    /// Whether `line` is this call.
    pub(super) fn is(&self, line: &CallLine) -> bool {
        self.on == line.on
            && self.call == line.call
            && same(self.args.as_deref(), line.args.as_deref().map(RawValue::get))
    }
}

impl From<&CallLine> for Made {
    fn from(line: &CallLine) -> Self {
        Self::new(line.on, &line.call, line.args.as_deref())
    }
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", Shown(&self.call), self.on)?;
        match &self.args {
            Some(args) => write!(f, " {}", Shown(args)),
            None => Ok(()),
        }
    }
}

/// Whether two texts are the same JSON. Byte for byte is the rule; that a person who edited a
/// transcript may have put spaces elsewhere is the exception.
fn same(a: Option<&str>, b: Option<&str>) -> bool {
    a == b || value(a).is_some_and(|a| Some(a) == value(b))
}

/// Nothing if the text is not JSON, or nested too deeply for a value.
fn value(text: Option<&str>) -> Option<Value> {
    serde_json::from_str(text?).ok()
}

/// Why a replay stopped.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// The VMM made another call than the transcript has, or the same with other arguments.
    #[error("{}", Sides { line: *.line, expected, actual, later: *.later })]
    Other {
        /// The line of the transcript.
        line: u64,
        /// The call that stands there.
        expected: Made,
        /// The call the VMM made.
        actual: Made,
        /// The line where the VMM's call stands, if it does further on.
        later: Option<u64>,
    },
    /// The VMM made a call after all those of the transcript (or of the vCPU in it).
    #[error("the transcript has no more calls on {}, but the VMM made one\n  actual:   {actual}", actual.on)]
    Extra {
        /// The call the VMM made.
        actual: Made,
    },
    /// The VMM did not make a call that the transcript has.
    #[error(
        "line {line} of the transcript is a call the VMM did not make ({why})\n  expected: {expected}"
    )]
    Missing {
        /// The line of the transcript.
        line: u64,
        /// The call that stands there.
        expected: Made,
        /// Why it will not come any more.
        why: Why,
    },
    /// Nothing happened for too long while a call waited for its turn.
    #[error("{}", Waited { line: *.line, expected, limit: *.limit, waiting })]
    Stuck {
        /// The line of the transcript whose turn it was.
        line: u64,
        /// The call that stands there and was not made. `None` if the one before was not written
        /// down by the [`Record`](crate::layer::Record) over this replay.
        expected: Option<Made>,
        /// How long nothing happened.
        limit: Duration,
        /// A call that waited.
        waiting: Made,
    },
    /// The result in the transcript is not one of that call.
    #[error("line {line} of the transcript is not a result of {call}: {error}")]
    Result {
        /// The line of the transcript.
        line: u64,
        /// The call.
        call: String,
        /// What is wrong with it.
        error: std::sync::Arc<serde_json::Error>,
    },
    /// The transcript can't be read on.
    #[error(transparent)]
    Transcript(#[from] TranscriptError),
}

/// Why a call will not come any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The replay is finished.
    Finished,
    /// The vCPU it is made on was dropped.
    Dropped,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "it has finished",
            Self::Dropped => "it has dropped the vCPU",
        })
    }
}

impl Difference {
    /// The line of the transcript it is about, if one.
    #[must_use]
    pub fn line(&self) -> Option<u64> {
        match self {
            Self::Other { line, .. }
            | Self::Missing { line, .. }
            | Self::Stuck { line, .. }
            | Self::Result { line, .. } => Some(*line),
            Self::Extra { .. } => None,
            Self::Transcript(error) => error.line(),
        }
    }
}

/// A text, cut where it gets long.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(MAX_SHOWN) {
            Some((end, _)) => write!(f, "{}...", self.0.get(..end).unwrap_or_default()),
            None => f.write_str(self.0),
        }
    }
}

struct Waited<'a> {
    line: u64,
    expected: &'a Option<Made>,
    limit: Duration,
    waiting: &'a Made,
}

impl fmt::Display for Waited<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, expected, limit, waiting } = self;
        match expected {
            Some(expected) => {
                writeln!(f, "line {line} of the transcript was not called within {limit:?}")?;
                writeln!(f, "  expected: {expected}")?;
            }
            None => writeln!(
                f,
                "the call before line {line} of the transcript was not recorded within {limit:?}: \
                 all calls must come through the layer that records"
            )?,
        }
        write!(f, "  waiting:  {waiting}")
    }
}

struct Sides<'a> {
    line: u64,
    expected: &'a Made,
    actual: &'a Made,
    later: Option<u64>,
}

impl fmt::Display for Sides<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, expected, actual, later } = self;
        if (expected.on, &expected.call) == (actual.on, &actual.call) {
            write!(f, "line {line} of the transcript, {} on {}, differs", actual.call, actual.on)?;
            return write!(f, "{}", fields(expected, actual));
        }
        writeln!(f, "line {line} of the transcript is another call")?;
        writeln!(f, "  expected: {expected}")?;
        write!(f, "  actual:   {actual}")?;
        match later {
            Some(later) => write!(f, "\n  (what the VMM called is line {later})"),
            None => Ok(()),
        }
    }
}

/// The fields in which the arguments differ.
fn fields(expected: &Made, actual: &Made) -> Fields {
    let mut fields = Fields::default();
    let sides = [expected, actual].map(|made| match &made.args {
        Some(text) => value(Some(text)).unwrap_or_else(|| Value::String(text.clone())),
        None => Value::Null,
    });
    let [expected, actual] = &sides;
    fields.compare(&mut "args".to_owned(), Some(expected), Some(actual));
    fields
}

/// Differing fields, ready to be shown.
#[derive(Default)]
struct Fields {
    shown: Vec<String>,
    more: usize,
}

impl Fields {
    /// Adds where `expected` and `actual` differ. Values are nested at most 128 deep, as their parser
    /// has it.
    fn compare(&mut self, path: &mut String, expected: Option<&Value>, actual: Option<&Value>) {
        if expected == actual {
            return;
        }
        match (expected, actual) {
            (Some(Value::Object(expected)), Some(Value::Object(actual))) => {
                for (key, value) in expected {
                    self.at(path, &format!(".{key}"), Some(value), actual.get(key));
                }
                for (key, value) in actual.iter().filter(|(key, _)| !expected.contains_key(*key)) {
                    self.at(path, &format!(".{key}"), None, Some(value));
                }
            }
            (Some(Value::Array(expected)), Some(Value::Array(actual))) => {
                for i in 0..expected.len().max(actual.len()) {
                    self.at(path, &format!("[{i}]"), expected.get(i), actual.get(i));
                }
            }
            _ => self.add(path, expected, actual),
        }
    }

    fn at(&mut self, path: &mut String, step: &str, a: Option<&Value>, b: Option<&Value>) {
        let len = path.len();
        path.push_str(step);
        self.compare(path, a, b);
        path.truncate(len);
    }

    fn add(&mut self, path: &str, expected: Option<&Value>, actual: Option<&Value>) {
        if self.shown.len() == MAX_FIELDS {
            self.more += 1;
            return;
        }
        let from = match (expected, actual) {
            (Some(Value::String(a)), Some(Value::String(b))) => far(a, b),
            _ => 0,
        };
        let show = |side: Option<&Value>| match side {
            None => "absent".to_owned(),
            Some(Value::String(text)) if from > 0 => {
                format!("...{:?}", text.chars().skip(from).take(32).collect::<String>())
            }
            Some(side) => Shown(&side.to_string()).to_string(),
        };
        let place = if from > 0 { format!(" from character {from}") } else { String::new() };
        let (path, expected, actual) = (Shown(path), show(expected), show(actual));
        self.shown.push(format!("{path}{place}: expected {expected}, actual {actual}"));
    }
}

/// Where two long texts, such as bytes in hexadecimal, first differ, less a little that is shown
/// before it; 0 if both are short.
fn far(a: &str, b: &str) -> usize {
    const SHORT: usize = 64;
    if a.len() <= SHORT && b.len() <= SHORT {
        return 0;
    }
    let at = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
    at.saturating_sub(8)
}

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.shown {
            write!(f, "\n  {line}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
