//! `cargo xtask fuzz`: builds the fuzz targets in `fuzz/` and runs them, one after the other.
//!
//! They are built with what cargo-fuzz adds to the compiler's flags, but for its sanitizer: that needs a
//! nightly compiler, while the coverage a fuzzer is led by does not. So there is nothing to install but a
//! C++ compiler for libFuzzer. What a run finds worth keeping is in `target/fuzz/corpus`, what it finds
//! wrong in `target/fuzz/findings`.

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cargo_metadata::{MetadataCommand, TargetKind};
use thiserror::Error;

use crate::process::{self, Event, Read};
use crate::{debian, workspace};

/// Flags of cargo-fuzz: what libFuzzer is told about is every edge taken and every comparison made.
const COVERAGE: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-sanitizer-coverage-stack-depth",
    "-Clink-dead-code",
    "-Ccodegen-units=1",
    "-Dwarnings",
];

/// What a single input may take. None takes a second, so what does is not the machine's fault.
const INPUT_SECONDS: u32 = 60;
const MEBIBYTES: u32 = 1024;
/// The longest input that is tried.
const LONGEST: u32 = 4096;

/// What a target may take beyond its time before it is stopped from outside.
const GRACE: Duration = Duration::from_secs(600);

/// What makes `fuzz/Cargo.lock` of the versions of the workspace.
const LOCK: &str = "cp Cargo.lock fuzz/ && \
                    cargo metadata --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null";

/// Why the targets did not pass.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error(transparent)]
    Metadata(#[from] cargo_metadata::Error),
    #[error(
        "fuzz/Cargo.lock does not go with the dependencies of the workspace: {0}\n\
         The fuzz targets have a lock file of their own. When a dependency changes, commit what this makes:\n  \
         {LOCK}"
    )]
    Lock(String),
    #[error("libFuzzer needs a C++ compiler: {0}")]
    Compiler(#[from] debian::Error),
    #[error("`rustc -vV` does not say which host it is for")]
    NoHost,
    #[error("there is no fuzz target {name}; there are {}", known.join(", "))]
    NoTarget { name: String, known: Vec<String> },
    #[error("making {} failed: {source}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "{target} found something: {failed}\nIt is in {}; again with:\n  \
         cargo xtask fuzz {target} --input FILE", findings.display()
    )]
    Found { target: String, failed: process::Error, findings: PathBuf },
}

/// What to run.
pub(crate) struct Options {
    /// The one target to run.
    pub(crate) target: Option<String>,
    /// How long, in all.
    pub(crate) time: Duration,
    /// Run this input of the target, and nothing else.
    pub(crate) input: Option<PathBuf>,
}

/// What a target has done.
#[derive(Debug, Default, PartialEq)]
struct Ran {
    runs: u64,
    /// Edges of the program that were taken.
    edges: u64,
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} runs, {} edges", self.runs, self.edges)
    }
}

/// Builds and runs them; returns what was done, in a line.
pub(crate) fn run(options: &Options) -> Result<String, Error> {
    let metadata = MetadataCommand::new().no_deps().exec()?;
    let root = metadata.workspace_root.as_std_path();
    let known = targets(root)?;
    let chosen: Vec<_> = match &options.target {
        Some(name) if known.contains(name) => vec![name.clone()],
        Some(name) => return Err(Error::NoTarget { name: name.clone(), known }),
        None => known,
    };
    check_lock(&root.join("fuzz/Cargo.toml"))?;
    let built = build(root)?;
    if let (Some(input), [target]) = (&options.input, &chosen[..]) {
        process::run(Command::new(built.join(target)).arg(input))?;
        return Ok(format!("{target} has nothing against {}", input.display()));
    }
    let count = u32::try_from(chosen.len()).unwrap_or(u32::MAX).max(1);
    let time = (options.time / count).max(Duration::from_secs(1));
    let mut told = Vec::new();
    for target in &chosen {
        let ran = fuzz(root, &built, target, time)?;
        anstream::println!("{target}: {ran} in {} s, nothing found", time.as_secs());
        told.push(format!("{target}: {ran}"));
    }
    Ok(told.join("; "))
}

/// The names of the targets.
fn targets(root: &Path) -> Result<Vec<String>, Error> {
    let manifest = root.join("fuzz/Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec()?;
    let all = metadata.packages.iter().flat_map(|package| &package.targets);
    let bins = all.filter(|target| target.kind.contains(&TargetKind::Bin));
    Ok(bins.map(|target| target.name.clone()).collect())
}

/// Whether the lock file beside a manifest has what the manifest needs.
fn check_lock(manifest: &Path) -> Result<(), Error> {
    let mut command = MetadataCommand::new();
    command.manifest_path(manifest).other_options(["--locked".to_owned()]);
    match command.exec() {
        Err(cargo_metadata::Error::CargoMetadata { stderr }) if stderr.contains("lock file") => {
            Err(Error::Lock(stderr.trim().to_owned()))
        }
        result => Ok(result.map(drop)?),
    }
}

/// Builds them and returns where they are.
fn build(root: &Path) -> Result<PathBuf, Error> {
    if process::status(Command::new("c++").arg("--version").stdout(Stdio::null())).is_err() {
        debian::ensure("fuzzing", &["g++"], true)?;
    }
    let target_dir = root.join("target/fuzz");
    // With a target named, the flags are not those of build scripts and procedural macros.
    let triple = host()?;
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--locked", "--quiet", "--target", &triple]);
    build.arg("--manifest-path").arg(root.join("fuzz/Cargo.toml"));
    build.arg("--target-dir").arg(&target_dir);
    build.env_remove("RUSTFLAGS").env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"));
    process::run(&mut build)?;
    Ok(target_dir.join(triple).join("release"))
}

/// What the compiler compiles for.
fn host() -> Result<String, Error> {
    let mut host = None;
    process::stream(Command::new("rustc").arg("-vV"), Read::Stdout, None, |event| {
        if let Event::Line(line) = event {
            host = line.strip_prefix("host: ").map(str::to_owned).or(host.take());
        }
    })?;
    host.ok_or(Error::NoHost)
}

fn fuzz(root: &Path, built: &Path, target: &str, time: Duration) -> Result<Ran, Error> {
    let corpus = root.join("target/fuzz/corpus").join(target);
    let findings = root.join("target/fuzz/findings").join(target);
    for path in [&corpus, &findings] {
        let made = fs::create_dir_all(path);
        made.map_err(|source| Error::Directory { path: path.clone(), source })?;
    }
    let mut command = Command::new(built.join(target));
    command.args([
        format!("-max_total_time={}", time.as_secs()),
        format!("-timeout={INPUT_SECONDS}"),
        format!("-rss_limit_mb={MEBIBYTES}"),
        format!("-max_len={LONGEST}"),
        format!("-artifact_prefix={}/", findings.display()),
    ]);
    command.args([&corpus, &root.join("fuzz/seeds").join(target)]);
    // The last lines tell what was found; those before, how the search went.
    let mut last = VecDeque::new();
    let mut ran = Ran::default();
    let result =
        process::stream(&mut command, Read::StdoutAndStderr, Some(time + GRACE), |event| {
            if let Event::Line(line) = event {
                ran.read(line);
                last.push_back(line.to_owned());
                if last.len() > 60 {
                    last.pop_front();
                }
            }
        });
    result.map_err(|failed| {
        last.iter().for_each(|line| anstream::eprintln!("{line}"));
        Error::Found { target: target.to_owned(), failed, findings }
    })?;
    Ok(ran)
}

impl Ran {
    /// Takes what a line of libFuzzer tells: `#123  NEW  cov: 45 ...` or `Done 123 runs in 4 second(s)`.
    fn read(&mut self, line: &str) {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |at: Option<&&str>| at.and_then(|word| word.parse().ok());
        if let ["Done", runs, "runs", ..] = words[..] {
            self.runs = number(Some(&runs)).unwrap_or(self.runs);
        } else if line.starts_with('#')
            && let Some(at) = words.iter().position(|word| *word == "cov:")
        {
            self.edges = number(words.get(at + 1)).unwrap_or(self.edges);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_read_from_what_libfuzzer_tells() {
        let mut ran = Ran::default();
        for line in [
            "INFO: Loaded 1 modules   (90000 inline 8-bit counters)",
            "#2\tINITED cov: 17 ft: 18 corp: 1/1b exec/s: 0 rss: 44Mb",
            "#87\tNEW    cov: 1752 ft: 5867 corp: 291/3705b lim: 33 exec/s: 1664 rss: 48Mb L: 26/33",
            "Done 25354 runs in 16 second(s)",
            "cov: 3",
        ] {
            ran.read(line);
        }
        assert_eq!(ran, Ran { runs: 25354, edges: 1752 });
    }

    #[test]
    fn a_lock_file_that_lacks_a_dependency_is_told_with_what_mends_it() {
        let root = tempfile::tempdir().unwrap();
        let (manifest, needed) = (root.path().join("Cargo.toml"), root.path().join("needed"));
        let package = |name| format!("[package]\nname = \"{name}\"\nedition = \"2024\"\n");
        for dir in [root.path(), &needed] {
            fs::create_dir_all(dir.join("src")).unwrap();
            fs::write(dir.join("src/lib.rs"), "").unwrap();
        }
        fs::write(needed.join("Cargo.toml"), package("needed")).unwrap();
        let alone = package("targets") + "[workspace]\n";
        fs::write(&manifest, &alone).unwrap();
        let lock = "version = 4\n[[package]]\nname = \"targets\"\nversion = \"0.0.0\"\n";
        fs::write(root.path().join("Cargo.lock"), lock).unwrap();
        check_lock(&manifest).unwrap();
        let more = alone + "[dependencies]\nneeded = { path = \"needed\" }\n";
        fs::write(&manifest, more).unwrap();
        let told = check_lock(&manifest).unwrap_err().to_string();
        assert!(told.contains("fuzz/Cargo.lock") && told.ends_with(LOCK), "{told}");
    }

    #[test]
    fn the_targets_are_those_of_the_crate() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let names = targets(root).unwrap();
        for name in &names {
            let seeds = fs::read_dir(root.join("fuzz/seeds").join(name)).unwrap();
            let sizes: Vec<_> = seeds.map(|seed| seed.unwrap().metadata().unwrap().len()).collect();
            assert!(
                !sizes.is_empty() && sizes.iter().all(|size| *size <= 1024),
                "{name}: {sizes:?}"
            );
        }
        assert!(names.contains(&"queue".to_owned()), "{names:?}");
    }
}
