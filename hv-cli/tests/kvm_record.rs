//! `hv run --trace` and `--record` on real KVM; what is recorded replays at once, in memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;
mod replaying;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Image, Running, artefact, hv};
use hv_cli::config::{IrqchipMode, RunConfig};
use hv_cli::exit_code::StopReason;
use replaying::{Replaying, built_in, with_kernel};
use serde_json::Value;
use tempfile::TempDir;

/// Ends the machine by the ACPI sleep control value: mov dx,0x600; mov al,0x34; out dx,al; hlt.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];

fn file(dir: &TempDir, name: &str) -> (PathBuf, String) {
    let path = dir.path().join(name);
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The names of the calls that have `on`, with their objects.
fn calls(lines: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let calls = lines.iter().filter(|line| line["on"].is_string());
    calls.map(|line| (text(&line["on"]), text(&line["call"]))).collect()
}

/// Records `hv run` with these arguments, and replays that as `config`.
fn recorded_and_replayed(args: &[&str], config: &RunConfig) {
    let dir = TempDir::new().unwrap();
    let (record, record_name) = file(&dir, "record");
    let ran = hv(&[&["run", "--record", &record_name], args].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains(&format!("hv: recorded to '{record_name}'")), "{}", ran.stderr);
    let replaying = Replaying::new(&std::fs::read(record).unwrap());
    let replayed = replaying.run(config);
    replaying.assert_same();
    assert_eq!(replayed.outcome.reason, StopReason::PowerOff);
    if let Some(report) = replayed.report {
        let recorded: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(serde_json::to_value(report).unwrap(), recorded);
    }
}

#[test]
fn the_built_in_guest_recorded_and_replayed() {
    recorded_and_replayed(&["--json"], &built_in(2, IrqchipMode::Kernel));
    let split = ["--json", "--irqchip", "split"];
    recorded_and_replayed(&split, &built_in(2, IrqchipMode::Split));
}

#[test]
fn a_kernel_recorded_and_replayed() {
    let kernel = Image::linux(POWER_OFF);
    let args = ["--kernel", kernel.path(), "--cpus", "2"];
    recorded_and_replayed(&args, &with_kernel(kernel.path().into(), 2));
}

#[test]
fn trace_and_record_together_have_the_same_calls() {
    let dir = TempDir::new().unwrap();
    let ((trace, trace_name), (record, record_name)) = (file(&dir, "trace"), file(&dir, "record"));
    let ran = hv(&["run", "--cpus", "1", "--trace", &trace_name, "--record", &record_name]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let (trace, record) = (lines(&trace), lines(&record));
    assert_eq!(calls(&trace), calls(&record));
    let said = format!("hv: {} calls traced to '{trace_name}'", trace.len());
    assert!(ran.stderr.contains(&said), "{}", ran.stderr);
    for line in &trace {
        assert!(line["ns"].is_u64() && line["at"].is_u64(), "{line}");
    }
    let runs = calls(&trace).iter().filter(|(_, call)| call == "KVM_RUN").count();
    assert!(ran.stderr.contains(&format!("{runs} exits")), "{}", ran.stderr);
}

#[test]
fn a_full_disk_costs_the_file_and_the_exit_code_but_not_the_guest() {
    for option in ["--trace", "--record"] {
        let ran = hv(&["run", "--cpus", "1", option, "/dev/full"]);
        assert_eq!(ran.code, Some(4), "{ran:?}");
        assert!(ran.stdout.contains("18 passed, 0 failed"), "{}", ran.stdout);
        for part in ["the guest powered off", &format!("{option} '/dev/full'"), "ENOSPC"] {
            assert!(ran.stderr.contains(part), "{part:?} is missing: {}", ran.stderr);
        }
    }
}

/// Starts `kernel` and kills `hv` as soon as the guest runs; the lines of what was recorded until
/// then.
fn killed_when_it_runs(kernel: &str) -> Vec<Value> {
    let dir = TempDir::new().unwrap();
    let (record, record_name) = file(&dir, "record");
    let running =
        Running::start(&["run", "--kernel", kernel, "--cpus", "2", "--record", &record_name]);
    let deadline = Instant::now() + common::LIMIT;
    let has_run = || std::fs::read_to_string(&record).is_ok_and(|text| text.contains("KVM_RUN"));
    while !has_run() {
        assert!(Instant::now() < deadline, "the guest does not run");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(running); // kills it
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.ends_with('\n'), "a line was cut");
    lines(&record)
}

/// `tests/replay.rs` replays the one with the other.
#[test]
fn linux_and_a_kernel_of_one_page_are_set_up_by_the_same_calls() {
    // Both read a port, so that there is a run that returns: mov dx,0x3fd; in al,dx; jmp back.
    let small = Image::linux(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xeb, 0xfd]);
    let linux = artefact("HV_GUEST_VMLINUX");
    let [small, linux] = [small.path(), linux.to_str().unwrap()].map(|kernel| {
        let lines = killed_when_it_runs(kernel);
        assert!(lines.iter().all(|line| line.get("end").is_none()), "it was killed");
        let of_set_up = lines.into_iter().skip(1).take_while(|line| line["call"] != "KVM_RUN");
        of_set_up
            .map(|mut line| {
                // What KVM answers is its own: CPUID tells on which of the host's processors.
                let line = line.as_object_mut().unwrap();
                line.remove("ok");
                if line["call"] == "KVM_SET_CPUID2" {
                    line.remove("args");
                }
                Value::from(line.clone())
            })
            .collect::<Vec<_>>()
    });
    assert!(small.len() > 40, "{small:?}");
    assert_eq!(small, linux);
}
