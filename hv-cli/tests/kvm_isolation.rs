//! The isolation of a `hv` that runs a machine, as the host sees it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use common::{Image, Running, hv};

/// `jmp $`: a flat image that goes on for ever, after it has said so on COM1.
const LOOP: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xeb, 0xfe];

/// The threads of a process: the name of each, with the lines of its status that tell how it is restricted.
fn threads(pid: u32) -> Vec<(String, Vec<String>)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut threads: Vec<_> = tasks
        .map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let value = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap().trim_start_matches(':').trim().to_owned()
            };
            (value("Name"), vec![value("Seccomp"), value("NoNewPrivs")])
        })
        .collect();
    threads.sort();
    threads
}

#[test]
fn every_thread_of_a_machine_has_a_filter_and_gets_no_privileges() {
    let image = Image::new(LOOP);
    let socket = tempfile::tempdir().unwrap();
    let gdb = format!("unix:{}", socket.path().join("gdb").display());
    let args = ["run", "--kernel", image.path(), "--format", "flat", "--cpus", "2", "--rng"];
    let mut running = Running::start(&[&args[..], &["--gdb", &gdb]].concat());
    running.wait_for("R");
    // The main thread enters when it has started the others: wait for it, as long as it takes.
    let deadline = std::time::Instant::now() + common::LIMIT;
    let seen = loop {
        let seen = threads(running.pid());
        if seen.iter().all(|(_, flags)| flags[0] == "2") || std::time::Instant::now() > deadline {
            break seen;
        }
        std::thread::yield_now();
    };
    // KVM has threads of its own in the process; they run no code of it.
    let ours = seen.iter().map(|(name, _)| name.as_str()).filter(|name| !name.starts_with("kvm-"));
    let names: Vec<_> = ours.collect();
    assert_eq!(names, ["gdb", "hv", "rng0", "vcpu0", "vcpu1"]);
    for (name, flags) in &seen {
        assert_eq!(flags[..], ["2", "1"], "{name}");
    }
    running.terminate();
    let ran = running.finish();
    assert_eq!(ran.code, Some(14), "{ran:?}");
}

#[test]
fn without_filters_a_machine_runs_too_and_a_wrong_mode_is_refused() {
    for mode in ["off", "log", "on"] {
        let ran = hv(&["run", "--seccomp", mode]);
        assert_eq!(ran.code, Some(0), "{mode}: {ran:?}");
    }
    assert_eq!(hv(&["run", "--seccomp", "maybe"]).code, Some(2));
}

/// Nobody in particular, but in the group of a node of KVM. This test must run as root to become that.
#[test]
fn a_user_in_the_group_of_the_node_runs_the_built_in_guest() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (node, binary) = (dir.path().join("kvm"), dir.path().join("hv"));
    let device = fs::metadata("/dev/kvm").unwrap().rdev();
    let mode = rustix::fs::Mode::from_raw_mode(0o660);
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        rustix::fs::FileType::CharacterDevice,
        mode,
        device,
    );
    made.unwrap();
    fs::set_permissions(&node, fs::Permissions::from_mode(0o660)).unwrap();
    std::os::unix::fs::chown(&node, Some(0), Some(GROUP)).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_hv"), &binary).unwrap();
    let run = |group: u32| {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid=65534", "--regid=65534", "--bounding-set=-all", "--inh-caps=-all"]);
        setpriv.arg(format!("--groups={group}")).arg(&binary).args(["run", "--kvm"]).arg(&node);
        Running::spawn(setpriv.current_dir("/")).finish()
    };
    let ran = run(GROUP);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("0 failed"), "{ran:?}");
    let other = run(GROUP + 1);
    assert_eq!(other.code, Some(4), "{other:?}");
    assert!(other.stderr.contains("EACCES"), "{other:?}");
}

/// A group that no system has.
const GROUP: u32 = 54_321;
