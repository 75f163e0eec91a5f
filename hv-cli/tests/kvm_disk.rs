//! Disks on real KVM: what a guest was told to be safe is there, whatever becomes of `hv`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;
mod disk;

use std::fs::{File, TryLockError};
use std::io::Read;
use std::time::{Duration, Instant};

use common::{Image, Running, hv};
use disk::{BATCH, BLOCK, BLOCKS, check, flushed, writer};

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
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
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
