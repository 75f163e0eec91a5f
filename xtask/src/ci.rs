//! `cargo xtask ci`: everything a change must pass, in the order in which it fails soonest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use thiserror::Error;

use crate::readme::{self, Kind};
use crate::{fuzz, kvm_test, layers, process, public_api, test, workspace};

/// How long a command of the README may take, building included.
const README_LIMIT: Duration = Duration::from_secs(15 * 60);

/// How long the fuzz targets run, in all.
const FUZZING: Duration = Duration::from_secs(60);

const HEADING: Style = AnsiColor::Cyan.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();

/// Which step failed, and how.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    #[error(transparent)]
    Layers(#[from] layers::Error),
    #[error(transparent)]
    PublicApi(#[from] public_api::Error),
    #[error(transparent)]
    Test(#[from] test::Error),
    #[error(transparent)]
    Fuzz(#[from] fuzz::Error),
    #[error(transparent)]
    KvmTest(#[from] kvm_test::Error),
    #[error("reading {} failed: {source}", path.display())]
    Readme { path: PathBuf, source: io::Error },
    #[error("README.md shows `{line}`, but there is no such xtask command")]
    UnknownXtask { line: String },
}

/// Runs every step and ends with what each did.
pub(crate) fn run(xtask_commands: &[String], tested: bool, limit: Duration) -> Result<(), Error> {
    let metadata = workspace::metadata()?;
    let root = metadata.workspace_root.as_std_path();
    let kvm = kvm_test::check_node(Path::new(kvm_test::NODE));
    let mut steps = Steps::default();

    steps.run("formatting", || {
        process::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;
        // A workspace of its own.
        let fuzz = root.join("fuzz/Cargo.toml");
        process::run(workspace::cargo().args(["fmt", "--check", "--manifest-path"]).arg(fuzz))?;
        // Not part of a crate: `cargo xtask guest` compiles it.
        let init = root.join("xtask/guest/init.rs");
        process::run(Command::new("rustfmt").args(["--check", "--edition=2024"]).arg(init))?;
        Ok("clean".to_owned())
    })?;
    steps.run("layers", || {
        layers::run()?;
        Ok("as drawn".to_owned())
    })?;
    steps.run("clippy", || {
        let mut clippy = workspace::cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--all-features", "--quiet"]);
        process::run(clippy.args(["--", "--deny=warnings"]))?;
        Ok("clean".to_owned())
    })?;
    steps.run("documentation", || {
        let mut doc = workspace::cargo();
        doc.args(["doc", "--workspace", "--no-deps", "--all-features", "--quiet"]);
        process::run(doc.env("RUSTDOCFLAGS", "--deny=warnings"))?;
        Ok("clean".to_owned())
    })?;
    steps.run("public items", || Ok(format!("{}, as written down", public_api::run(false)?)))?;
    steps.run("packages", || {
        let mut package = workspace::cargo();
        package.args(["package", "--workspace", "--exclude=xtask", "--allow-dirty", "--quiet"]);
        process::run(package.env("RUSTFLAGS", "--deny=warnings"))?;
        Ok("build from what would be published".to_owned())
    })?;
    if !tested {
        steps.run("tests without hardware", || Ok(test::run()?.to_string()))?;
    }
    steps.run("fuzzing", || {
        Ok(fuzz::run(&fuzz::Options { target: None, time: FUZZING, input: None })?)
    })?;
    steps.run("commands of the README", || readme(root, xtask_commands, kvm.is_ok()))?;
    match &kvm {
        Ok(()) => {
            let options = kvm_test::Options { filter: None, limit };
            steps.run("hardware tests", || Ok(kvm_test::run(&options)?.to_string()))?;
        }
        Err(error) => {
            anstream::eprintln!("{WARNING}the hardware tests DID NOT RUN{WARNING:#}: {error}");
            steps.done.push(("hardware tests", "DID NOT RUN".to_owned(), Duration::ZERO));
        }
    }
    for (name, result, took) in &steps.done {
        anstream::println!("{name:24} {:4} s  {result}", took.as_secs());
    }
    Ok(())
}

/// The steps that passed: what they were, how they ended, how long they took.
#[derive(Default)]
struct Steps {
    done: Vec<(&'static str, String, Duration)>,
}

impl Steps {
    fn run(
        &mut self,
        name: &'static str,
        step: impl FnOnce() -> Result<String, Error>,
    ) -> Result<(), Error> {
        anstream::eprintln!("{HEADING}== {name}{HEADING:#}");
        let start = Instant::now();
        let result = step()?;
        self.done.push((name, result, start.elapsed()));
        Ok(())
    }
}

/// Runs what the README shows; xtask commands are steps of their own.
fn readme(root: &Path, xtask_commands: &[String], kvm: bool) -> Result<String, Error> {
    let path = root.join("README.md");
    let text = fs::read_to_string(&path).map_err(|source| Error::Readme { path, source })?;
    let (mut ran, mut skipped) = (0, 0);
    for readme::Command { line, kind } in readme::commands(&text) {
        match kind {
            Kind::Xtask(name) if !xtask_commands.contains(&name) => {
                return Err(Error::UnknownXtask { line });
            }
            Kind::Xtask(_) => {}
            Kind::Kvm if !kvm => {
                anstream::eprintln!("{WARNING}DID NOT RUN{WARNING:#} without /dev/kvm: {line}");
                skipped += 1;
            }
            Kind::Kvm | Kind::Plain => {
                anstream::eprintln!("$ {line}");
                let mut shell = Command::new("sh");
                shell.args(["-c", &line]).current_dir(root);
                process::stream(&mut shell, process::Read::Stdout, Some(README_LIMIT), |event| {
                    if let process::Event::Line(line) = event {
                        anstream::println!("{line}");
                    }
                })?;
                ran += 1;
            }
        }
    }
    Ok(format!("{ran} ran, {skipped} did not"))
}
