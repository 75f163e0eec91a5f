//! The keys of a configuration file: the flags of `hv run`, as clap has them.

use std::ffi::OsString;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command};

use super::paths::{PathForm, path_form};

/// The flag that names the file; a file can't name another.
pub(super) const CONFIG: &str = "config";

/// What a key is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// true or false.
    Switch,
    /// A value.
    One,
    /// Any number of values.
    Many,
}

/// A key: a flag of `hv run`.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) name: String,
    /// What clap calls it.
    pub(super) id: String,
    pub(crate) kind: Kind,
    /// What it is without being given.
    pub(super) default: Option<String>,
    /// What is shown for its value in the help.
    pub(super) value_name: String,
    /// Where there is a path in a value.
    pub(super) path: Option<PathForm>,
}

/// All keys.
#[derive(Debug, Clone)]
pub(crate) struct Vocabulary {
    run: Command,
    keys: Vec<Key>,
}

impl Vocabulary {
    /// That of the command `hv run`.
    pub(crate) fn new(run: &Command) -> Self {
        let keys = run.get_arguments().filter_map(key).collect();
        Self { run: run.clone(), keys }
    }

    pub(crate) fn keys(&self) -> &[Key] {
        &self.keys
    }

    pub(super) fn get(&self, name: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The key that a word which is none was perhaps meant to be.
    pub(super) fn nearest(&self, word: &str) -> Option<String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let word = word.to_ascii_lowercase().replace('_', "-");
        if self.get(&word).is_some() {
            return Some(word);
        }
        if word.len() > 40 || !word.chars().all(plain) {
            return None;
        }
        let error = self.parse(&[format!("--{word}").into()]).err()?;
        match error.get(ContextKind::SuggestedArg)? {
            ContextValue::String(flag) => flag.strip_prefix("--").map(str::to_owned),
            _ => None,
        }
    }

    /// Whether a key can have a value; if not, why.
    pub(super) fn check(&self, key: &Key, value: &str) -> Result<(), String> {
        match self.parse(&[argument(key, value)]) {
            Ok(()) => Ok(()),
            // What it can't be without, or beside, is seen when all is together.
            Err(error) if is_relation(&error) => Ok(()),
            Err(error) => Err(reason(&error)),
        }
    }

    fn parse(&self, args: &[OsString]) -> Result<(), clap::Error> {
        let name = OsString::from("hv run");
        self.run.clone().try_get_matches_from(std::iter::once(&name).chain(args)).map(drop)
    }

    /// The flags for a command line that is to be put behind a file: without what must be beside them or
    /// can't be.
    pub(super) fn lenient(&self) -> impl Iterator<Item = Arg> {
        let flags = self.run.get_arguments().filter(|arg| key(arg).is_some()).cloned();
        flags.map(|flag| flag.requires(Resettable::Reset).conflicts_with(Resettable::Reset))
    }
}

/// The key of an argument, if it is a flag that a file can have.
fn key(arg: &Arg) -> Option<Key> {
    let name = arg.get_long().filter(|name| *name != CONFIG)?.to_owned();
    let kind = match arg.get_action() {
        ArgAction::SetTrue => Kind::Switch,
        ArgAction::Set => Kind::One,
        ArgAction::Append => Kind::Many,
        _ => return None,
    };
    let value_name = arg.get_value_names().and_then(|names| names.first());
    let value_name = value_name.map_or_else(|| name.to_uppercase(), ToString::to_string);
    let default = arg.get_default_values().first();
    let default = default.map(|value| value.to_string_lossy().into_owned());
    let path = path_form(&name, arg);
    Some(Key { id: arg.get_id().to_string(), name, kind, default, value_name, path })
}

/// The argument that gives a key its value.
pub(super) fn argument(key: &Key, value: &str) -> OsString {
    format!("--{}={value}", key.name).into()
}

/// Whether what is wrong is only what is there beside it, or is not.
pub(super) fn is_relation(error: &clap::Error) -> bool {
    matches!(error.kind(), ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict)
}

/// Why a value can't be, in words that don't speak of a command line.
fn reason(error: &clap::Error) -> String {
    use std::error::Error;
    if let Some(source) = error.source() {
        return source.to_string();
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) if !values.is_empty() => {
            format!("it is one of {}", values.join(", "))
        }
        _ => "a value is required".to_owned(),
    }
}

/// An error of clap in one line, without its usage.
pub(super) fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.lines().take_while(|line| !line.starts_with("Usage")).map(str::trim);
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}
