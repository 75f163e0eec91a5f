//! A command line with the file it names put into it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, value_parser};

use super::vocabulary::{CONFIG, Key, Kind, is_relation, one_line};
use super::{ConfigFile, ConfigFileError, Vocabulary};

/// Adds to the commands of `hv` what a derived description can't say: `--config` to `run`, and to
/// `config print` the flags of `run`.
pub(crate) fn extend(root: Command) -> Command {
    let vocabulary = root.find_subcommand("run").map(Vocabulary::new);
    let flags: Vec<_> = vocabulary.iter().flat_map(Vocabulary::lenient).collect();
    let flags = flags.into_iter().filter(|flag| flag.get_long() != Some("json"));
    root.mut_subcommand("run", |run| run.arg(config())).mut_subcommand("config", |config| {
        config.mut_subcommand("print", |print| print.args(flags))
    })
}

fn config() -> Arg {
    Arg::new(CONFIG)
        .long(CONFIG)
        .value_name("FILE")
        .value_parser(value_parser!(PathBuf))
        .help(
            "Take flags from FILE: TOML, a key for each flag, without its dashes. A flag given here \
             has precedence, or is added where there can be several. Paths in FILE are relative to \
             its directory",
        )
        .display_order(0)
}

/// A command line as clap is to parse it.
#[derive(Debug)]
pub(crate) struct Expanded {
    pub(crate) args: Vec<OsString>,
    /// The file that is in it.
    file: Option<PathBuf>,
}

/// Why a command line can't be expanded.
#[derive(Debug)]
pub(crate) enum ExpandError {
    Clap(clap::Error),
    File(ConfigFileError),
}

impl From<ConfigFileError> for ExpandError {
    fn from(error: ConfigFileError) -> Self {
        Self::File(error)
    }
}

impl Expanded {
    /// The arguments of `hv run` that a file and the flags in `flags` make together.
    ///
    /// # Errors
    /// The file can't be used.
    pub(crate) fn new(
        file: Option<&Path>,
        vocabulary: &Vocabulary,
        flags: &ArgMatches,
    ) -> Result<Self, ConfigFileError> {
        let run = with_file(file, vocabulary, flags)?;
        let args = ["hv", "run"].map(OsString::from).into_iter().chain(run).collect();
        Ok(Self { args, file: file.map(Path::to_owned) })
    }

    /// An error of parsing it. What can't be together may be said in two places.
    pub(crate) fn error(&self, error: clap::Error) -> ExpandError {
        match &self.file {
            Some(path) if is_relation(&error) => {
                let (path, problem) = (path.clone(), one_line(&error));
                ExpandError::File(ConfigFileError::Together { path, problem })
            }
            _ => ExpandError::Clap(error),
        }
    }
}

/// Puts the file that `hv run --config FILE` names into the command line. Any other stays as it is.
///
/// `root` is the description of `hv` without [`extend`].
pub(crate) fn expand(root: &Command, args: Vec<OsString>) -> Result<Expanded, ExpandError> {
    let names_file = |arg: &OsString| {
        let arg = arg.to_string_lossy();
        arg == "--config" || arg.starts_with("--config=")
    };
    let (Some(command), Some(run)) = (args.get(1), root.find_subcommand("run")) else {
        return Ok(Expanded { args, file: None });
    };
    let rest = args.get(2..).unwrap_or_default();
    if command != "run" || !rest.iter().any(names_file) {
        return Ok(Expanded { args, file: None });
    }
    let vocabulary = Vocabulary::new(run);
    let lenient = Command::new("run").bin_name("hv run").arg(config()).args(vocabulary.lenient());
    let given = std::iter::once(command).chain(rest);
    let matches = lenient.try_get_matches_from(given).map_err(ExpandError::Clap)?;
    // Not given: clap took the word for something else, and says what.
    let Some(path) = matches.get_one::<PathBuf>(CONFIG) else {
        return Ok(Expanded { args, file: None });
    };
    Ok(Expanded::new(Some(path), &vocabulary, &matches)?)
}

/// The arguments of `hv run` that a file and the flags in `matches` make together.
fn with_file(
    path: Option<&Path>,
    vocabulary: &Vocabulary,
    matches: &ArgMatches,
) -> Result<Vec<OsString>, ConfigFileError> {
    let given = |key: &Key| {
        matches.try_contains_id(&key.id).unwrap_or(false)
            && matches.value_source(&key.id) == Some(ValueSource::CommandLine)
    };
    let mut args = match path {
        Some(path) => ConfigFile::read(path, vocabulary)?.arguments(given),
        None => Vec::new(),
    };
    for key in vocabulary.keys().iter().filter(|key| given(key)) {
        if key.kind == Kind::Switch {
            args.push(format!("--{}", key.name).into());
            continue;
        }
        for value in matches.get_raw(&key.id).into_iter().flatten() {
            let mut arg = OsString::from(format!("--{}=", key.name));
            arg.push(value);
            args.push(arg);
        }
    }
    Ok(args)
}
