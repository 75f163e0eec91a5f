//! What virtio asks of KVM, counted: one line of counts, for `-- --paired`. There is no time in them, so
//! one round is enough; `cargo xtask bench virtio` judges.
//!
//! - `few-calls`, `many-calls`: the calls other than `KVM_RUN` of `hv run --trace` with a guest that writes
//!   to a disk, of which `few-requests` and `many-requests` are asked,
//! - `doorbells`, and `doorbells-and-exits`: how often its driver rang, and with those that came to `hv`.
//!
//! That a device enable is one `KVM_SET_GSI_ROUTING` is a test (`tests/virtio_calls.rs`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a benchmark")]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/disk/mod.rs"]
#[allow(dead_code, reason = "what it wrote is the business of the tests")]
mod disk;

use std::fs;

use common::{Image, hv};
use disk::{BLOCK, BLOCKS, writer};
use serde_json::Value;

/// The calls of KVM other than `KVM_RUN`, and the counters of the disk.
fn traced(generations: u32) -> (usize, Value) {
    let (guest, disk) = (writer(generations), Image::new(&vec![0; BLOCKS as usize * BLOCK]));
    let (stats, trace) = (Image::new(b""), Image::new(b""));
    let kernel = ["run", "--memory", "16M", "--kernel", guest.path(), "--disk", disk.path()];
    let observed = ["--stats-json", stats.path(), "--trace", trace.path()];
    let ran = hv(&[&kernel[..], &observed].concat());
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let trace = fs::read_to_string(trace.path()).unwrap();
    let calls = trace.lines().filter(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        let call = line["call"].as_str().unwrap();
        call.starts_with("KVM_") && call != "KVM_RUN"
    });
    let stats: Value = serde_json::from_str(&fs::read_to_string(stats.path()).unwrap()).unwrap();
    (calls.count(), stats["devices"][0].clone())
}

fn main() {
    if !std::env::args().any(|argument| argument == "--paired") {
        return println!("virtio_counts has nothing to time; -- --paired 1 prints the counts");
    }
    let (few, few_disk) = traced(3);
    let (many, disk) = traced(30);
    let count = |name: &str| disk[name].as_u64().unwrap();
    let (few_requests, requests) = (&few_disk["requests"], count("requests"));
    let (rung, exits) = (count("notifications"), count("notification-exits"));
    println!(
        "round: few-calls={few} many-calls={many} few-requests={few_requests} \
         many-requests={requests} doorbells={rung} doorbells-and-exits={} interrupts={}",
        rung + exits,
        count("interrupts")
    );
}
