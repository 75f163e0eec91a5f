//! `cargo xtask bench virtio`: what a request costs a device, and what is asked of KVM for it.
//!
//! QEMU is not beside it: there are no device-only figures of QEMU, and the guest that both could run, the
//! bare-metal writer of the tests, is interpreted on some KVMs, so that its time would be the guest's.

use super::callgrind;
use super::paired::{self, Rounds};
use super::table::Row;
use super::{Error, executable, measure};
use crate::workspace::KVM_TESTS;

/// So many times devices are compared with new ones: some seconds.
const SERIES: u32 = 10;

/// Runs the benchmarks.
pub(crate) fn run() -> Result<Vec<Row>, Error> {
    let program = executable("hv-cli", "virtio_queue", &[])?;
    callgrind::ensure()?;
    let vm = callgrind::instructions_per_turn(&program, "queue-vm")?;
    let hv = callgrind::instructions_per_turn(&program, "queue-hv")?;
    anstream::println!(
        "virtio_queue: {vm:.0} instructions a request by virtio-queue's Queue, {hv:.0} by Direct and \
         a device that does nothing"
    );
    let what = "request, instructions: device that does nothing / virtio-queue";
    let mut rows = vec![Row { what, ratio: hv / vm, spread: None, target: None }];
    let requests = measure(&program, SERIES)?;
    anstream::println!("virtio_queue: {} rounds", requests.len());
    rows.extend(judge(&requests, REQUESTS)?);
    let counts = measure(&executable("hv-cli", "virtio_counts", &[KVM_TESTS])?, 1)?;
    rows.extend(judge(&counts, COUNTS)?);
    Ok(rows)
}

/// What is compared, with what, and how much of that it may cost.
type Comparison = (&'static str, &'static str, &'static str, Option<f64>);

/// Requests by time: beside the system call that each is for, and beside memcpy of the same bytes.
const REQUESTS: &[Comparison] = &[
    ("request, time: virtio-queue / the same (noise)", "control", "queue-vm", None),
    ("request, time: device that does nothing / virtio-queue", "queue-hv", "queue-vm", None),
    ("request, time: device that does nothing / memcpy of 4 KiB", "queue-hv", "copy-4096", None),
    ("blk, 4 KiB read, io=sync / pread", "read-sync", "pread", None),
    ("blk, 4 KiB read, io=sync / memcpy", "read-sync", "copy-4096", None),
    ("blk, 4 KiB read, io=uring / pread", "read-uring", "pread", None),
    ("blk, 4 KiB read, io=uring / memcpy", "read-uring", "copy-4096", None),
    ("blk, 4 KiB write, io=sync / pwrite", "write-sync", "pwrite", None),
    ("blk, 4 KiB write, io=sync / memcpy", "write-sync", "copy-4096", None),
    ("blk, 4 KiB write, io=uring / pwrite", "write-uring", "pwrite", None),
    ("blk, 4 KiB write, io=uring / memcpy", "write-uring", "copy-4096", None),
    ("net, 64 B sent / send", "send-64", "raw-send-64", None),
    ("net, 64 B sent / memcpy", "send-64", "copy-64", None),
    ("net, 64 B received / recv", "receive-64", "raw-receive-64", None),
    ("net, 64 B received / memcpy", "receive-64", "copy-64", None),
    ("net, 1500 B sent / send", "send-1500", "raw-send-1500", None),
    ("net, 1500 B sent / memcpy", "send-1500", "copy-1500", None),
    ("net, 1500 B received / recv", "receive-1500", "raw-receive-1500", None),
    ("net, 1500 B received / memcpy", "receive-1500", "copy-1500", None),
    ("rng, 64 B / getrandom", "rng", "getrandom", None),
    ("rng, 64 B / memcpy", "rng", "copy-64", None),
    ("console, 64 B to /dev/null / write", "console", "write", None),
    ("console, 64 B to /dev/null / memcpy", "console", "copy-64", None),
    ("balloon, a page / discarding it", "balloon", "discard", None),
];

/// Counts, in which nothing may be added by a request.
const COUNTS: &[Comparison] = &[
    ("KVM's calls but KVM_RUN: 270 requests / 27", "many-calls", "few-calls", Some(1.0)),
    ("doorbells and their exits to hv / doorbells", "doorbells-and-exits", "doorbells", Some(1.0)),
];

fn judge(rounds: &Rounds, comparisons: &[Comparison]) -> Result<Vec<Row>, paired::Error> {
    let row = |&(what, measured, base, target): &Comparison| {
        let (ratio, spread) = rounds.ratio(measured, base)?;
        Ok(Row { what, ratio, spread: Some(spread), target })
    };
    comparisons.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missed(line: &str) -> Vec<&'static str> {
        let mut rounds = Rounds::default();
        rounds.take(line).unwrap();
        let rows = judge(&rounds, COUNTS).unwrap();
        rows.iter().filter(|row| row.is_missed()).map(|row| row.what).collect()
    }

    #[test]
    fn one_call_or_exit_more_is_a_miss() {
        let line = |many: u32, exits: u32| {
            let rung = 60 + exits;
            format!("round: few-calls=61 many-calls={many} doorbells=60 doorbells-and-exits={rung}")
        };
        assert!(missed(&line(61, 0)).is_empty());
        assert_eq!(missed(&line(62, 0)), ["KVM's calls but KVM_RUN: 270 requests / 27"]);
        assert_eq!(missed(&line(61, 1)), ["doorbells and their exits to hv / doorbells"]);
    }

    #[test]
    fn a_loop_the_benchmark_left_out_is_an_error() {
        let mut rounds = Rounds::default();
        rounds.take("round: control=1 queue-vm=1").unwrap();
        assert!(judge(&rounds, REQUESTS).is_err());
        assert!(judge(&rounds, COUNTS).is_err());
    }
}
