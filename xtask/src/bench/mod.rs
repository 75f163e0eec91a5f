//! `cargo xtask bench`: measures what is promised about cost, and says whether it holds.
//!
//! Everything is a ratio of two things measured together: no figure of one machine says anything
//! about another. No test depends on these.

mod callgrind;
mod irq;
mod memory;
mod paired;
mod table;
mod traits;
mod virtio;

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cargo_metadata::{Message, TargetKind};
use clap::ValueEnum;
use thiserror::Error;

use crate::kvm_test;
use crate::process::{self, Event, Read};
use crate::workspace;
use paired::Rounds;
use table::{Row, Table};

/// How long a benchmark may run.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Bench {
    /// What the traits, and layers over them, cost a run loop
    Traits,
    /// What giving GSIs out, and committing routes, costs
    Irq,
    /// What guest memory costs
    Memory,
    /// What a request costs a virtio device, and what is asked of KVM for it
    Virtio,
}

/// Why there is no result, or that it is not good enough.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Unusable(#[from] kvm_test::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Callgrind(#[from] callgrind::Error),
    #[error(transparent)]
    Paired(#[from] paired::Error),
    #[error("cargo did not build the benchmark {name} of {package}")]
    NotBuilt { package: &'static str, name: &'static str },
    #[error("{0} of the targets missed")]
    Missed(usize),
}

impl Error {
    /// Whether it is the machine that can't.
    pub(crate) fn is_unusable(&self) -> bool {
        matches!(self, Self::Unusable(error) if error.is_unusable())
    }
}

/// Measures one thing, or all, and prints one table.
pub(crate) fn run(bench: Option<Bench>) -> Result<(), Error> {
    kvm_test::check_node(Path::new(kvm_test::NODE))?;
    let benches = bench.map_or_else(|| Bench::value_variants().to_vec(), |bench| vec![bench]);
    let mut rows: Vec<Row> = Vec::new();
    for bench in benches {
        rows.extend(match bench {
            Bench::Traits => traits::run()?,
            Bench::Irq => irq::run()?,
            Bench::Memory => memory::run()?,
            Bench::Virtio => virtio::run()?,
        });
    }
    let table = Table(&rows);
    anstream::println!("\n{table}");
    match table.missed() {
        0 => Ok(()),
        missed => Err(Error::Missed(missed)),
    }
}

/// Builds a benchmark as a release, and returns its program.
fn executable(
    package: &'static str,
    name: &'static str,
    features: &[&str],
) -> Result<PathBuf, Error> {
    let mut build = workspace::cargo();
    build.args(["bench", "--no-run", "--message-format=json-render-diagnostics"]);
    build.args(["--package", package, "--bench", name, "--features", &features.join(",")]);
    let mut messages = String::new();
    process::stream(&mut build, Read::Stdout, None, |event| {
        if let Event::Line(line) = event {
            messages.push_str(line);
            messages.push('\n');
        }
    })?;
    built(&messages, name).ok_or(Error::NotBuilt { package, name })
}

/// Shows what criterion says of each loop of a benchmark, and returns its rounds.
fn measure(program: &Path, series: u32) -> Result<Rounds, Error> {
    let mut criterion = Command::new(program);
    // Two runs on a busy machine differ for no reason that would be worth a report.
    criterion.args(["--bench", "--discard-baseline"]);
    process::stream(&mut criterion, Read::Stdout, Some(LIMIT), |event| {
        if let Event::Line(line) = event {
            anstream::println!("{line}");
        }
    })?;

    let mut rounds = Rounds::default();
    let mut malformed = None;
    let mut pairs = Command::new(program);
    pairs.args(["--paired", &series.to_string()]);
    process::stream(&mut pairs, Read::Stdout, Some(LIMIT), |event| {
        if let Event::Line(line) = event
            && let Err(error) = rounds.take(line)
        {
            malformed.get_or_insert(error);
        }
    })?;
    malformed.map_or(Ok(()), Err)?;
    Ok(rounds)
}

/// The program of the benchmark `name` in what cargo said about a build.
fn built(messages: &str, name: &str) -> Option<PathBuf> {
    Message::parse_stream(Cursor::new(messages)).filter_map(Result::ok).find_map(|message| {
        let Message::CompilerArtifact(artifact) = message else { return None };
        let bench = artifact.target.kind.contains(&TargetKind::Bench);
        let program = artifact.executable.filter(|_| bench && artifact.target.name == name)?;
        Some(program.into_std_path_buf())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_among_what_cargo_built() {
        let artifact = |kind: &str, name: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"p","manifest_path":"/p/Cargo.toml",
                "target":{{"kind":["{kind}"],"crate_types":["bin"],"name":"{name}",
                "src_path":"/p/main.rs","edition":"2024"}},"profile":{{"opt_level":"3",
                "debuginfo":0,"debug_assertions":false,"overflow_checks":false,"test":false}},
                "features":[],"filenames":[],"executable":{executable},"fresh":true}}"#
            )
            .replace('\n', "")
        };
        let messages = [
            artifact("lib", "run_loop", "null"),
            artifact("bin", "run_loop", "\"/t/bin\""),
            artifact("bench", "stub_loop", "\"/t/stub\""),
            artifact("bench", "run_loop", "\"/t/run\""),
        ]
        .join("\n");
        assert_eq!(built(&messages, "run_loop").as_deref(), Some(Path::new("/t/run")));
        assert_eq!(built(&messages, "other"), None);
        assert_eq!(built("not JSON\n", "run_loop"), None);
    }

    #[test]
    fn only_the_machine_makes_it_unusable() {
        let absent = kvm_test::check_node(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(Error::from(absent).is_unusable());
        assert!(!Error::Missed(1).is_unusable());
    }
}
