//! The developer commands of the hv workspace: `cargo xtask <command>`.
//!
//! Nothing here is needed at run time, and nothing here knows the hv crates: what they can do, it
//! learns by running them.
//!
//! Exit codes: 0 done; 1 something failed, or the command line is wrong; 2 the machine can't run
//! hardware tests.

mod bench;
mod ci;
mod debian;
mod fuzz;
mod guest;
mod kvm_test;
mod layers;
mod libtest;
mod process;
mod public_api;
mod readme;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::{CommandFactory, Parser, Subcommand};
use thiserror::Error;

const ERROR: Style = AnsiColor::Red.on_default().bold();

/// The machine can't run hardware tests.
const UNUSABLE: u8 = 2;

/// Developer commands of the hv workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every test that needs no hardware; never opens /dev/kvm
    Test,
    /// Run every test that needs /dev/kvm; exit code 2 if the machine can't
    KvmTest {
        /// Run only tests whose names contain this
        filter: Option<String>,
        #[command(flatten)]
        limit: Limit,
    },
    /// Build the Linux guest that hardware tests boot, or find it in the cache
    Guest {
        /// Fail instead of installing Debian packages that are missing
        #[arg(long)]
        no_install: bool,
        /// Print the path of this file alone
        #[arg(long, value_name = "FILE")]
        path: Option<guest::Artefact>,
    },
    /// Measure what is promised about cost, and say whether it holds; needs /dev/kvm
    Bench {
        /// Measure only this
        name: Option<bench::Bench>,
    },
    /// Build the fuzz targets and run them; whatever they find is an error
    Fuzz {
        /// Run only this one
        target: Option<String>,
        /// How long, in all
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        seconds: u64,
        /// Run this input alone: one that was found
        #[arg(long, value_name = "FILE", requires = "target")]
        input: Option<PathBuf>,
    },
    /// Check which crates depend on which, and that rust-vmm crates have one version each
    Layers,
    /// Compare the public items of the libraries with the snapshots in their directories
    PublicApi {
        /// Make the snapshots anew
        #[arg(long)]
        accept: bool,
    },
    /// Run everything that a change must pass
    Ci {
        /// The tests that need no hardware have just passed: don't run them again
        #[arg(long)]
        tested: bool,
        #[command(flatten)]
        limit: Limit,
    },
}

#[derive(clap::Args)]
struct Limit {
    /// Stop a hardware test binary that runs longer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    time_limit: u64,
}

impl Limit {
    fn duration(&self) -> Duration {
        Duration::from_secs(self.time_limit)
    }
}

#[derive(Debug, Error)]
enum Error {
    #[error(transparent)]
    Test(#[from] test::Error),
    #[error(transparent)]
    KvmTest(#[from] kvm_test::Error),
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error(transparent)]
    Bench(#[from] bench::Error),
    #[error(transparent)]
    Fuzz(#[from] fuzz::Error),
    #[error(transparent)]
    Layers(#[from] layers::Error),
    #[error(transparent)]
    PublicApi(#[from] public_api::Error),
    #[error(transparent)]
    Ci(#[from] ci::Error),
}

impl Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::KvmTest(error) | Self::Ci(ci::Error::KvmTest(error)) if error.is_unusable() => {
                ExitCode::from(UNUSABLE)
            }
            Self::Bench(error) if error.is_unusable() => ExitCode::from(UNUSABLE),
            _ => ExitCode::FAILURE,
        }
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing is left to be done about a closed standard error.
            let _ = error.print();
            // clap's own code for a wrong command line means something else here.
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("{ERROR}error{ERROR:#}: {error}");
            error.exit_code()
        }
    }
}

fn run(task: Task) -> Result<(), Error> {
    match task {
        Task::Test => {
            test::run()?;
        }
        Task::KvmTest { filter, limit } => {
            kvm_test::run(&kvm_test::Options { filter, limit: limit.duration() })?;
        }
        Task::Guest { no_install, path } => guest::run(!no_install, path)?,
        Task::Bench { name } => bench::run(name)?,
        Task::Fuzz { target, seconds, input } => {
            let time = Duration::from_secs(seconds);
            let told = fuzz::run(&fuzz::Options { target, time, input })?;
            anstream::println!("fuzzing: {told}");
        }
        Task::Layers => layers::run()?,
        Task::PublicApi { accept } => {
            let items = public_api::run(accept)?;
            anstream::println!("{items} public items");
        }
        Task::Ci { tested, limit } => {
            let names = Arguments::command();
            let names: Vec<_> = names.get_subcommands().map(|c| c.get_name().to_owned()).collect();
            ci::run(&names, tested, limit.duration())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn only_an_unusable_machine_has_its_own_exit_code() {
        let absent = kvm_test::check_node("/nonexistent/kvm".as_ref()).unwrap_err();
        assert_eq!(Error::from(absent).exit_code(), ExitCode::from(2));
        let absent = kvm_test::check_node("/nonexistent/kvm".as_ref()).unwrap_err();
        assert_eq!(Error::Ci(absent.into()).exit_code(), ExitCode::from(2));
        let absent = kvm_test::check_node("/nonexistent/kvm".as_ref()).unwrap_err();
        assert_eq!(Error::Bench(absent.into()).exit_code(), ExitCode::from(2));
        assert_eq!(Error::from(bench::Error::Missed(1)).exit_code(), ExitCode::FAILURE);
        let failed = kvm_test::Error::NothingRan(None);
        assert_eq!(Error::from(failed).exit_code(), ExitCode::FAILURE);
    }
}
