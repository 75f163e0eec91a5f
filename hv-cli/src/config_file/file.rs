//! A configuration file, read and checked key by key.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use hv_core::Errno;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::vocabulary::{Key, Kind, Vocabulary, argument};
use crate::output::printable;

/// The longest file, in bytes.
const LONGEST: u64 = 1 << 20;
/// The longest value, in bytes: more than the system takes for an argument is of no use.
const LONGEST_VALUE: usize = 64 << 10;
/// The most values of a key.
const MOST_VALUES: usize = 256;

/// Where something is in a file, from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The line.
    pub line: usize,
    /// The character in it.
    pub column: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why a configuration file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFileError {
    /// It can't be read.
    #[error("--config '{}' can't be read: {errno}", printable(.path))]
    Read {
        /// The file.
        path: PathBuf,
        /// What reading it left.
        errno: Errno,
    },
    /// It is longer than a configuration can be.
    #[error("--config '{}' has more than {} KiB: is it a configuration?", printable(.path), LONGEST >> 10)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is no text.
    #[error("--config '{}' is no text: byte {at} is no UTF-8", printable(.path))]
    NotText {
        /// The file.
        path: PathBuf,
        /// How much of it is.
        at: usize,
    },
    /// Something in it can't be.
    #[error("{}:{at}: {problem}", printable(.path))]
    At {
        /// The file.
        path: PathBuf,
        /// Where.
        at: Location,
        /// What.
        problem: Problem,
    },
    /// What it asks for can't be together, or lacks something, with what the command line adds.
    #[error("{}: {problem}", printable(.path))]
    Together {
        /// The file.
        path: PathBuf,
        /// What clap says.
        problem: String,
    },
}

/// What is wrong at a place of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is no TOML.
    #[error("{0}")]
    Syntax(String),
    /// There is no such key.
    #[error("there is no key {key}{}; the keys are the flags of hv run without --", did_you_mean(.nearest))]
    UnknownKey {
        /// What is there.
        key: String,
        /// What was perhaps meant.
        nearest: Option<String>,
    },
    /// The value is of another kind.
    #[error("{key}: {expected} is expected, not {found}")]
    Kind {
        /// The key.
        key: String,
        /// What it takes.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// The value can't be.
    #[error("{key}: {} can't be: {reason}", shortened(.value))]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// Why not.
        reason: String,
    },
    /// There is too much of it.
    #[error("{key}: at most {MOST_VALUES} values of {} KiB", LONGEST_VALUE >> 10)]
    TooMuch {
        /// The key.
        key: String,
    },
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |key| format!("; did you mean {key}?"))
}

/// A value for a message, on one line.
fn shortened(value: &str) -> String {
    match value.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}…", value.get(..end).unwrap_or_default()),
        None => format!("{value:?}"),
    }
}

/// A configuration file whose keys and values can be.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    settings: Vec<(Key, Vec<OsString>)>,
}

impl ConfigFile {
    /// Reads a file.
    pub(crate) fn read(path: &Path, vocabulary: &Vocabulary) -> Result<Self, ConfigFileError> {
        let errno = |error| ConfigFileError::Read { path: path.into(), errno: Errno::from(&error) };
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
            .map_err(errno)?;
        if bytes.len() as u64 > LONGEST {
            return Err(ConfigFileError::TooLong { path: path.into() });
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            ConfigFileError::NotText { path: path.into(), at }
        })?;
        Self::parse(path, &text, vocabulary)
    }

    /// Reads what is in the file at `path`.
    pub(super) fn parse(
        path: &Path,
        text: &str,
        vocabulary: &Vocabulary,
    ) -> Result<Self, ConfigFileError> {
        let error = |(span, problem): Wrong| {
            let at = location(text, span.start);
            ConfigFileError::At { path: path.into(), at, problem }
        };
        let syntax = |wrong: toml::de::Error| {
            // Some of its messages have several lines.
            let message = wrong.message().split_whitespace().collect::<Vec<_>>().join(" ");
            error((wrong.span().unwrap_or_default(), Problem::Syntax(message)))
        };
        let table = DeTable::parse(text).map_err(syntax)?;
        // The directory of "vm.toml" is "", which is no name for it.
        let directory = path.parent().unwrap_or(Path::new(""));
        let mut settings = Vec::new();
        for (name, value) in table.get_ref() {
            let Some(key) = vocabulary.get(name.get_ref()) else {
                let key = shortened(name.get_ref());
                let nearest = vocabulary.nearest(name.get_ref());
                return Err(error((name.span(), Problem::UnknownKey { key, nearest })));
            };
            let args = arguments(vocabulary, key, value, directory).map_err(error)?;
            settings.push((key.clone(), args));
        }
        Ok(Self { settings })
    }

    /// The arguments that say the same. `given` are the keys the command line has values for: it has
    /// precedence, and adds to what there can be several of.
    pub(super) fn arguments(&self, given: impl Fn(&Key) -> bool) -> Vec<OsString> {
        let all = self.settings.iter();
        let ours = all.filter(|(key, _)| key.kind == Kind::Many || !given(key));
        ours.flat_map(|(_, args)| args).cloned().collect()
    }
}

/// What is wrong, and where.
type Wrong = (Range<usize>, Problem);

/// The arguments for a key.
fn arguments(
    vocabulary: &Vocabulary,
    key: &Key,
    value: &Spanned<DeValue<'_>>,
    directory: &Path,
) -> Result<Vec<OsString>, Wrong> {
    let wrong = |value: &Spanned<DeValue<'_>>, expected| {
        let (key, found) = (key.name.clone(), value.get_ref().type_str());
        (value.span(), Problem::Kind { key, expected, found })
    };
    let too_much =
        |value: &Spanned<DeValue<'_>>| (value.span(), Problem::TooMuch { key: key.name.clone() });
    let one = |value: &Spanned<DeValue<'_>>, expected| {
        let text = match value.get_ref() {
            DeValue::String(text) => text.clone().into_owned(),
            DeValue::Integer(number) => {
                let whole = i64::from_str_radix(number.as_str(), number.radix());
                whole.map_err(|_| too_much(value))?.to_string()
            }
            _ => return Err(wrong(value, expected)),
        };
        if text.len() > LONGEST_VALUE {
            return Err(too_much(value));
        }
        let bad = |reason: String| {
            let (key, value_text) = (key.name.clone(), text.clone());
            (value.span(), Problem::Value { key, value: value_text, reason })
        };
        if text.contains('\0') {
            return Err(bad("no value can have a NUL".to_owned()));
        }
        vocabulary.check(key, &text).map_err(bad)?;
        // Some flags need others beside them, but not to be what they are without.
        if key.kind == Kind::One && key.default.as_ref() == Some(&text) {
            return Ok(None);
        }
        let text = match &key.path {
            Some(form) => form.change(&text, |path| directory.join(path)),
            None => text,
        };
        Ok(Some(argument(key, &text)))
    };
    match (key.kind, value.get_ref()) {
        (Kind::Switch, DeValue::Boolean(true)) => Ok(vec![format!("--{}", key.name).into()]),
        (Kind::Switch, DeValue::Boolean(false)) => Ok(Vec::new()),
        (Kind::Switch, _) => Err(wrong(value, "true or false")),
        (Kind::One, _) => Ok(one(value, "a string or a number")?.into_iter().collect()),
        (Kind::Many, DeValue::Array(values)) if values.len() <= MOST_VALUES => {
            let args = values.iter().filter_map(|value| one(value, "a string").transpose());
            args.collect()
        }
        (Kind::Many, DeValue::Array(_)) => Err(too_much(value)),
        (Kind::Many, _) => {
            Ok(one(value, "an array of strings, or one string")?.into_iter().collect())
        }
    }
}

/// The line and the character of a byte.
fn location(text: &str, at: usize) -> Location {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let column = before.get(start..).unwrap_or_default().chars().count() + 1;
    Location { line, column }
}
