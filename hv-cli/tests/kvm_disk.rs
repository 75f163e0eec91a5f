//! Disks on real KVM: what a guest was told to be safe is there, whatever becomes of `hv`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;
mod disk;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Image, LINUX_CMDLINE, Ran, Running, artefact, hv};
use disk::{BATCH, BLOCK, BLOCKS, check, flushed, writer};
use serde_json::Value;

fn empty_disk() -> Image {
    Image::new(&vec![0; BLOCKS as usize * BLOCK])
}

/// What is in the file of a disk that no machine has any more.
fn contents(disk: &Image) -> Vec<u8> {
    let mut file = File::open(disk.path()).unwrap();
    let deadline = Instant::now() + common::LIMIT;
    // The kernel lets go of what a killed process had under way, and then of its locks.
    while let Err(error) = file.try_lock() {
        assert!(matches!(error, TryLockError::WouldBlock), "{error}");
        assert!(Instant::now() < deadline, "the disk is still locked");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_guest_writes_flushes_and_powers_off() {
    const GENERATIONS: u32 = 10;
    for io in ["uring", "sync"] {
        let (guest, disk, stats) = (writer(GENERATIONS), empty_disk(), Image::new(b""));
        let option = format!("{},io={io}", disk.path());
        let kernel = ["run", "--memory", "16M", "--kernel", guest.path()];
        let ran = hv(&[&kernel[..], &["--disk", &option, "--stats-json", stats.path()]].concat());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(flushed(&ran.stdout), GENERATIONS, "{ran:?}");
        check(&contents(&disk), GENERATIONS);

        let stats = std::fs::read_to_string(stats.path()).unwrap();
        let stats: Value = serde_json::from_str(&stats).unwrap();
        let device = &stats["devices"][0];
        assert_eq!(device["name"], "disk0");
        let requests = GENERATIONS * (BATCH + 1);
        assert_eq!((&device["requests"], &device["errors"]), (&requests.into(), &0.into()));
        let bytes = u64::from(requests) * 16 + u64::from(GENERATIONS * BATCH) * BLOCK as u64;
        assert_eq!(device["bytes-from-guest"], bytes);
        assert_eq!(device["bytes-to-guest"], requests);
        assert_eq!(device["notifications"], 2 * GENERATIONS);
        assert_eq!(device["notification-exits"], 0, "doorbells are ioeventfds");
    }
}

/// What a writer of so many generations asks of KVM, by the name of the call, and what is counted of its
/// disk.
fn traced(generations: u32) -> (BTreeMap<String, u64>, Value) {
    let (guest, disk, stats) = (writer(generations), empty_disk(), Image::new(b""));
    let trace = Image::new(b"");
    let kernel = ["run", "--memory", "16M", "--kernel", guest.path(), "--disk", disk.path()];
    let observed = ["--stats-json", stats.path(), "--trace", trace.path()];
    let ran = hv(&[&kernel[..], &observed].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(flushed(&ran.stdout), generations, "{ran:?}");
    let mut calls = BTreeMap::new();
    for line in fs::read_to_string(trace.path()).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let call = line["call"].as_str().unwrap();
        if call.starts_with("KVM_") {
            *calls.entry(call.to_owned()).or_insert(0) += 1;
        }
    }
    let stats: Value = serde_json::from_str(&fs::read_to_string(stats.path()).unwrap()).unwrap();
    (calls, stats["devices"][0].clone())
}

/// Doorbells are no exits to `hv`, and interrupts no calls: a guest with more requests runs longer, and
/// that is all KVM is asked for.
#[test]
fn more_requests_and_interrupts_are_no_more_calls() {
    let [(few, of_few), (many, of_many)] = [3, 30].map(|generations| {
        let (mut calls, disk) = traced(generations);
        assert!(calls.remove("KVM_RUN").is_some());
        assert_eq!(disk["requests"], generations * (BATCH + 1));
        assert_eq!(disk["notifications"], 2 * generations);
        assert_eq!(disk["notification-exits"], 0);
        assert!(disk["interrupts"].as_u64().unwrap() >= 2 * u64::from(generations), "{disk}");
        (calls, disk)
    });
    eprintln!("{few:?}\nfor {of_few}\nfor {of_many}");
    assert_eq!(few, many);
    // The routes of the machine; those of its one device, when its driver is ready; and without them.
    assert!(few["KVM_SET_GSI_ROUTING"] <= 3, "{few:?}");
}

#[test]
fn what_was_flushed_is_there_after_sigkill() {
    let guest = writer(u32::MAX);
    let mut generations = Vec::new();
    for round in 0..20 {
        let disk = empty_disk();
        let io = ["uring", "sync"][round % 2];
        let option = format!("{},io={io}", disk.path());
        let args = ["run", "--memory", "16M", "--kernel", guest.path(), "--disk", &option];
        let mut running = Running::start(&args);
        // A generation is 12 characters: each round ends at another point of it.
        running.wait_until("enough output", |seen| seen.len() >= 12 + 17 * round);
        let ran = running.kill();
        assert_eq!(ran.code, None, "it was killed: {ran:?}");
        let last = flushed(&ran.stdout);
        check(&contents(&disk), last);
        generations.push(last);
    }
    eprintln!("generations flushed before each kill: {generations:?}");
    assert!(generations.iter().all(|last| *last > 0), "{generations:?}");
}

/// A program of the host, which must succeed.
fn host(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}", output.status);
    text
}

/// An ext4 file system that Linux can have its root on, with the init of the test guest.
fn linux_root() -> Image {
    let root = tempfile::tempdir().unwrap();
    for directory in ["dev", "proc"] {
        fs::create_dir(root.path().join(directory)).unwrap();
    }
    let init = root.path().join("init");
    fs::copy(artefact("HV_GUEST_INIT"), &init).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let image = Image::new(b"");
    let root = root.path().to_str().unwrap();
    host("mke2fs", &["-q", "-F", "-t", "ext4", "-d", root, image.path(), "128M"]);
    image
}

/// Linux with its root on this disk; what else is in `args`.
fn boot(root: &str, args: &[&str]) -> Running {
    let kernel = artefact("HV_GUEST_VMLINUX");
    let cmdline = format!("{LINUX_CMDLINE} root=/dev/vda rw init=/init hv.check=disk");
    let fixed = ["run", "--kernel", kernel.to_str().unwrap(), "--cmdline", &cmdline];
    Running::start(&[&fixed[..], &["--memory", "128M", "--disk", root], args].concat())
}

/// The checksum that the guest's init makes of what it writes.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0, |sum, word| {
        let word = u64::from_le_bytes(word.try_into().unwrap());
        (sum ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    })
}

fn said(ran: &Ran, what: &str) -> u64 {
    let line = ran.stdout.lines().find_map(|line| line.trim_end().strip_prefix(what));
    line.unwrap_or_else(|| panic!("{what:?} is missing: {ran:?}")).parse().unwrap()
}

#[test]
fn linux_writes_to_its_ext4_root_and_leaves_it_clean() {
    let (root, other, stats) = (linux_root(), Image::new(&[0; 8 * 512]), Image::new(b""));
    let first = format!("{},queues=2,serial=root", root.path());
    let second = format!("{},readonly", other.path());
    let args = ["--cpus", "2", "--disk", &second, "--stats-json", stats.path()];
    let mut linux = boot(&first, &args);
    linux.wait_for("hv-guest: ready");
    linux.send("\n");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("hv-guest: check disk: ok: 64 MiB written"), "{}", ran.stdout);
    assert!(ran.stdout.contains("hv-guest: power off"), "{}", ran.stdout);
    assert!(ran.stdout.contains("[vdb] 8 512-byte logical blocks"), "{}", ran.stdout);
    let sum = said(&ran, "hv-guest: disk: all written, checksum ");
    assert_eq!(said(&ran, "hv-guest: disk: all read, checksum "), sum);

    host("e2fsck", &["-f", "-n", root.path()]);
    let data = Image::new(b"");
    host("debugfs", &["-R", &format!("dump /data {}", data.path()), root.path()]);
    let data = fs::read(data.path()).unwrap();
    assert_eq!((data.len(), checksum(&data)), (64 << 20, sum));

    let stats: Value = serde_json::from_str(&fs::read_to_string(stats.path()).unwrap()).unwrap();
    let names = [0, 1].map(|index| &stats["devices"][index]["name"]);
    assert_eq!(names, ["disk0", "disk1"]);
    let disk = &stats["devices"][0];
    assert_eq!((&disk["errors"], &disk["failure"]), (&0.into(), &Value::Null));
    let count = |name: &str| disk[name].as_u64().unwrap();
    assert!(count("bytes-from-guest") >= 64 << 20 && count("bytes-to-guest") >= 64 << 20);
    assert_eq!(count("notification-exits"), 0, "doorbells are ioeventfds");
    // Each queue has its vector.
    for queue in ["virtio0-req.0", "virtio0-req.1"] {
        let line = ran.stdout.lines().find(|line| line.contains(queue));
        assert!(line.is_some_and(|line| line.contains("PCI-MSI")), "{queue}: {}", ran.stdout);
    }
}

#[test]
fn linux_finds_its_root_whole_after_sigkill() {
    let root = linux_root();
    let mut linux = boot(root.path(), &[]);
    linux.wait_for("hv-guest: disk: 16 MiB written");
    let ran = linux.kill();
    assert_eq!(ran.code, None, "it was killed: {ran:?}");
    drop(contents(&root)); // no machine has it any more
    // Replays the journal and repairs nothing else by itself: what is left to repair is an error.
    let replayed = host("e2fsck", &["-E", "journal_only", "-p", root.path()]);
    assert!(replayed.contains("recovering journal"), "{replayed}");
    host("e2fsck", &["-f", "-n", root.path()]);
}
