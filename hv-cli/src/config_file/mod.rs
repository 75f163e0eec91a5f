//! `--config FILE` and `hv config`: the configuration of a machine as TOML.
//!
//! A key is the name of a flag of `hv run` without its dashes, and its value is what the flag would be
//! given: there is no second list of either. The file is turned into arguments, put before those of the
//! user, and parsed with them; so a new flag has its key from the start, with its checks, its defaults
//! and what it can't be used with. Only what a path in a value is relative to has to be said, in
//! `paths.rs`, if the value is not just a path.
//!
//! Not here: what any flag means.

mod expand;
mod file;
mod paths;
mod print;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use file::{ConfigFileError, Location, Problem};

pub(crate) use expand::{ExpandError, Expanded, expand, extend};
use file::ConfigFile;
pub(crate) use print::Complete;
pub(crate) use vocabulary::Vocabulary;
