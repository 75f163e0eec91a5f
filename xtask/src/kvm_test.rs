//! `cargo xtask kvm-test`: every test and example that needs `/dev/kvm`, with the test guest.
//!
//! It never skips silently: without a usable `/dev/kvm` it says why and fails with an exit code
//! of its own, and it fails when no test ran.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use thiserror::Error;

use crate::debian;
use crate::guest;
use crate::libtest::Tally;
use crate::process::{self, Event, Read};
use crate::workspace::{self, Target};

/// The device that KVM is used through.
pub(crate) const NODE: &str = "/dev/kvm";

/// Why the hardware tests did not pass, or did not run.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{} can't be used: {reason}", path.display())]
    Node { path: PathBuf, reason: NodeError },
    #[error("{NODE} opens but can't run virtual machines: `hv doctor` says why, above")]
    Doctor,
    #[error(transparent)]
    Guest(#[from] guest::Error),
    #[error("tests run {program}, and it does not run here: {source}")]
    Tool { program: &'static str, source: debian::Error },
    #[error(transparent)]
    Workspace(#[from] workspace::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error("no hardware test ran{}", filtered(.0))]
    NothingRan(Option<String>),
}

impl Error {
    /// Whether it is the machine that can't, rather than a test that failed.
    pub(crate) fn is_unusable(&self) -> bool {
        matches!(self, Self::Node { .. } | Self::Doctor)
    }
}

/// Why the device does not open.
#[derive(Debug, Error)]
pub(crate) enum NodeError {
    #[error(
        "it does not exist: load kvm_intel or kvm_amd (`modprobe`), switch virtualization on in \
         the firmware, or pass the device into this container"
    )]
    Absent,
    #[error("no permission: become a member of its group (`ls -l {NODE}`) or run as root")]
    Permission,
    #[error("opening it read-write failed: {0}")]
    Other(io::Error),
}

fn filtered(filter: &Option<String>) -> String {
    filter.as_ref().map(|filter| format!(": none is called like '{filter}'")).unwrap_or_default()
}

/// What to run.
pub(crate) struct Options {
    /// Only tests whose names contain this.
    pub(crate) filter: Option<String>,
    /// How long one test binary may run.
    pub(crate) limit: Duration,
}

/// Opens the device as a hypervisor does.
pub(crate) fn check_node(path: &Path) -> Result<(), Error> {
    let error = |reason| Error::Node { path: path.to_owned(), reason };
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(error(match source.kind() {
            io::ErrorKind::NotFound => NodeError::Absent,
            io::ErrorKind::PermissionDenied => NodeError::Permission,
            _ => NodeError::Other(source),
        })),
    }
}

/// Programs that tests run, what makes them tell their version, and the packages they are in: gdb
/// debugs guests, and the others make and check the file systems on their disks.
const TOOLS: [(&str, &str, &str); 4] = [
    ("gdb", "--version", "gdb"),
    ("mke2fs", "-V", "e2fsprogs"),
    ("e2fsck", "-V", "e2fsprogs"),
    ("debugfs", "-V", "e2fsprogs"),
];

/// Sees to it that these are there.
fn ensure_tools() -> Result<(), Error> {
    for (program, version, package) in TOOLS {
        let output = Command::new(program).arg(version).output();
        if !output.is_ok_and(|output| output.status.success()) {
            debian::ensure("kvm-test", &[package], true)
                .map_err(|source| Error::Tool { program, source })?;
        }
    }
    Ok(())
}

/// Runs the hardware tests one by one, with the guest they boot, and prints how many ran.
pub(crate) fn run(options: &Options) -> Result<Tally, Error> {
    check_node(Path::new(NODE))?;
    let metadata = workspace::metadata()?;
    let mut build = workspace::cargo();
    process::run(build.args(["build", "--quiet", "--package", "hv-cli", "--bin", "hv"]))?;
    let hv = metadata.target_directory.join("debug/hv");
    let mut doctor = Command::new(hv.as_std_path());
    if !process::status(doctor.arg("doctor"))?.success() {
        return Err(Error::Doctor);
    }

    ensure_tools()?;
    let guest = guest::build(true)?;
    let targets = workspace::targets(&metadata)?;
    let targets: Vec<&Target> = targets.iter().filter(|target| target.needs_kvm).collect();
    // Building takes as long as it takes; the limit is for what runs.
    for target in &targets {
        let mut build =
            if target.example { target.command("build") } else { target.command("test") };
        if !target.example {
            build.arg("--no-run");
        }
        process::run(&mut build)?;
    }

    let mut tally = Tally::default();
    let mut examples = 0;
    for target in targets {
        if target.example && options.filter.is_some() {
            continue;
        }
        anstream::println!("{} {} (needs {NODE})", target.package, target.name);
        let mut command = target.command(if target.example { "run" } else { "test" });
        command.envs(guest.environment());
        if !target.example {
            // One virtual machine at a time: they share the host's CPUs.
            command.args(["--", "--test-threads=1"]).args(&options.filter);
        }
        let result = process::stream(&mut command, Read::Stdout, Some(options.limit), |event| {
            if let Event::Line(line) = event {
                anstream::println!("{line}");
                tally += Tally::parse(line).unwrap_or_default();
            }
        });
        if let Err(error) = result {
            anstream::println!("hardware tests in the binaries that ended before: {tally}");
            return Err(error.into());
        }
        examples += u64::from(target.example);
    }
    if tally.ran() == 0 {
        return Err(Error::NothingRan(options.filter.clone()));
    }
    anstream::println!("hardware tests: {tally}; {examples} examples ran");
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_device_is_the_machines_fault_and_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_node(&dir.path().join("kvm")).unwrap_err();
        assert!(error.is_unusable());
        assert!(error.to_string().contains("does not exist: load kvm_intel"), "{error}");
    }

    #[test]
    fn a_device_that_does_not_open_for_writing_is_named() {
        // A directory never opens for writing, whoever asks.
        let dir = tempfile::tempdir().unwrap();
        let error = check_node(dir.path()).unwrap_err();
        assert!(matches!(&error, Error::Node { reason: NodeError::Other(_), .. }), "{error}");
        assert!(error.to_string().starts_with(&dir.path().display().to_string()), "{error}");
    }

    #[test]
    fn a_failed_test_is_not_the_machines_fault() {
        assert!(!Error::NothingRan(None).is_unusable());
        let error = Error::NothingRan(Some("boot".to_owned()));
        assert_eq!(error.to_string(), "no hardware test ran: none is called like 'boot'");
    }
}
