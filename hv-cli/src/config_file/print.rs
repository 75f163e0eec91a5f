//! A complete configuration, shown: TOML that `--config` takes again, or JSON.

use std::fmt;
use std::path;

use clap::ArgMatches;
use clap::parser::ValueSource;
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::vocabulary::{Key, Kind, Vocabulary};

/// Every key with its value, in the order of the help.
#[derive(Debug)]
pub(crate) struct Complete {
    entries: Vec<(Key, Value)>,
}

#[derive(Debug)]
enum Value {
    Switch(bool),
    /// Nothing is given, and there is no default.
    None,
    One(String),
    Many(Vec<String>),
}

impl Complete {
    /// What `matches` of `hv run` have, with `defaults` for what is not there. Paths are absolute, so that
    /// it means the same wherever it is put. What is no text is shown as well as can be.
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        matches: &ArgMatches,
        defaults: &[(&str, String)],
    ) -> Self {
        let value = |key: &Key| {
            if key.kind == Kind::Switch {
                return Value::Switch(matches.get_flag(&key.id));
            }
            let raw = matches.get_raw(&key.id).into_iter().flatten();
            let mut values: Vec<_> =
                raw.map(|value| value.to_string_lossy().into_owned()).collect();
            if matches.value_source(&key.id) != Some(ValueSource::DefaultValue)
                && let Some(form) = &key.path
            {
                let absolute =
                    |path: &path::Path| path::absolute(path).unwrap_or_else(|_| path.to_owned());
                values.iter_mut().for_each(|value| *value = form.change(value, absolute));
            }
            if key.kind == Kind::Many {
                return Value::Many(values);
            }
            let default = || defaults.iter().find(|(name, _)| *name == key.name);
            let value = values.pop().or_else(|| default().map(|(_, value)| value.clone()));
            value.map_or(Value::None, Value::One)
        };
        let entries = vocabulary.keys().iter().map(|key| (key.clone(), value(key))).collect();
        Self { entries }
    }
}

/// A value as a number if that says the same.
fn number(text: &str) -> Option<i64> {
    text.parse().ok().filter(|number: &i64| number.to_string() == text)
}

fn toml(text: &str) -> toml::Value {
    number(text).map_or_else(|| toml::Value::String(text.to_owned()), toml::Value::Integer)
}

impl fmt::Display for Complete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (Key { name, value_name, .. }, value) in &self.entries {
            match value {
                Value::Switch(on) => writeln!(f, "{name} = {on}")?,
                Value::None => writeln!(f, "# {name} = {value_name}")?,
                Value::One(value) => writeln!(f, "{name} = {}", toml(value))?,
                Value::Many(values) => {
                    let values = values.iter().map(|value| toml(value)).collect();
                    writeln!(f, "{name} = {}", toml::Value::Array(values))?;
                }
            }
        }
        Ok(())
    }
}

impl Serialize for Complete {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (key, value) in &self.entries {
            match value {
                Value::Switch(on) => map.serialize_entry(&key.name, on)?,
                Value::None => map.serialize_entry(&key.name, &None::<()>)?,
                Value::One(value) => map.serialize_entry(&key.name, &toml(value))?,
                Value::Many(values) => {
                    let values: Vec<_> = values.iter().map(|value| toml(value)).collect();
                    map.serialize_entry(&key.name, &values)?;
                }
            }
        }
        map.end()
    }
}
