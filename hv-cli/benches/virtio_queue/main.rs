//! What a request costs a virtio device, without a VM: the device is called by hand ([`Direct`]), its
//! driver is a few stores to a ring in memory. A batch of [`BATCH`] requests is made available, one
//! doorbell rung, and the device called until all are used; the driver wants no interrupt.
//!
//! - `queue-vm`: virtio-queue's `Queue` alone, as a device of vm-virtio would use it; `control`: the same
//!   once more, to show what the figures of this machine are worth; `queue-hv`: a device that does nothing,
//! - `read-sync`, `write-sync`, `read-uring`, `write-uring`: a disk in a memfd, 4 KiB a request; `pread`,
//!   `pwrite`: the system calls alone, of the same bytes,
//! - `send-64`, `send-1500`, `receive-64`, `receive-1500`: a network device on a pair of sockets, and
//!   `raw-send-64` and so on: the system calls alone,
//! - `rng`, `getrandom`: 64 bytes; `console`, `write`: 64 bytes to `/dev/null`; `balloon`, `discard`: a page,
//! - `copy-4096`, `copy-1500`, `copy-64`: memcpy of the same bytes, from memory to memory.
//!
//! As a criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns, and
//! one line of times is printed per round. With `-- NAME TURNS` (`queue-vm`, `queue-hv`) so many requests go
//! through, for counting instructions: there is no system call in those. `cargo xtask bench virtio` judges.
//!
//! vsock is not here: its requests need a connection, and credit that the host's side gives back, so that
//! what is measured would mostly be the host's socket.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, clippy::panic, reason = "a benchmark")]

mod driver;
mod hosts;

use std::time::{Duration, Instant};

use criterion::Criterion;
use driver::{Null, Raw, Subject};
use hosts::{Balloon, Console, Copy, Disk, Frames, Random, SystemCalls};
use hv_cli::config::DiskIo;

/// Requests at a time: a socket here takes ten frames before someone reads them.
const BATCH: u16 = 8;

/// Batches in a round of each loop.
const TURNS: u64 = 8;

/// Rounds with one set of devices. One may be a little faster than another by where its memory is; a
/// new set is made after so many.
const ROUNDS: usize = 50;

/// What is measured: a batch of requests.
trait Batch {
    /// What the other side does before, which is not measured.
    fn before(&mut self) {}
    /// The device's part.
    fn process(&mut self);
    /// What the other side does after.
    fn after(&mut self) {}
}

fn time(batch: &mut dyn Batch, turns: u64) -> Duration {
    let mut elapsed = Duration::ZERO;
    for _ in 0..turns {
        batch.before();
        let start = Instant::now();
        batch.process();
        elapsed += start.elapsed();
        batch.after();
    }
    elapsed
}

type Loop = (&'static str, Box<dyn Batch>);

fn loops() -> Vec<Loop> {
    let mut loops: Vec<Loop> = vec![
        ("queue-vm", Box::new(Raw::new())),
        ("control", Box::new(Raw::new())),
        ("queue-hv", Box::new(Subject::new(Null, |_| {}))),
        ("copy-4096", Box::new(Copy::new(4096))),
        ("copy-1500", Box::new(Copy::new(1500))),
        ("copy-64", Box::new(Copy::new(64))),
        ("read-sync", Box::new(Disk::new(DiskIo::Sync, false))),
        ("write-sync", Box::new(Disk::new(DiskIo::Sync, true))),
        ("read-uring", Box::new(Disk::new(DiskIo::Uring, false))),
        ("write-uring", Box::new(Disk::new(DiskIo::Uring, true))),
        ("pread", Box::new(SystemCalls::pread())),
        ("pwrite", Box::new(SystemCalls::pwrite())),
        ("rng", Box::new(Random::new())),
        ("getrandom", Box::new(SystemCalls::getrandom())),
        ("console", Box::new(Console::new())),
        ("write", Box::new(SystemCalls::write())),
        ("balloon", Box::new(Balloon::new())),
        ("discard", Box::new(SystemCalls::discard())),
    ];
    for (names, len) in [
        (["send-64", "receive-64", "raw-send-64", "raw-receive-64"], 64),
        (["send-1500", "receive-1500", "raw-send-1500", "raw-receive-1500"], 1500),
    ] {
        let [send, receive, raw_send, raw_receive] = names;
        loops.push((send, Box::new(Frames::sent_by_device(len))));
        loops.push((receive, Box::new(Frames::received_by_device(len))));
        loops.push((raw_send, Box::new(Frames::sent(len))));
        loops.push((raw_receive, Box::new(Frames::received(len))));
    }
    loops
}

/// Prints the times of every round, in nanoseconds.
fn paired(series: usize) {
    for _ in 0..series {
        let mut loops = loops();
        let count = loops.len();
        for round in 0..ROUNDS {
            // Who begins changes, and with the direction, who follows whom.
            let step = if (round / count).is_multiple_of(2) { 1 } else { count - 1 };
            let mut times = vec![Duration::ZERO; count];
            for turn in 0..count {
                let at = (round + turn * step) % count;
                times[at] = time(&mut *loops[at].1, TURNS);
            }
            let columns = loops.iter().zip(&times);
            let columns: Vec<_> =
                columns.map(|((name, _), time)| format!("{name}={}", time.as_nanos())).collect();
            println!("round: {}", columns.join(" "));
        }
    }
}

/// Prints what the requests of each loop cost, per request.
fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtio_queue");
    group.throughput(criterion::Throughput::Elements(BATCH.into()));
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    for (name, mut batch) in loops() {
        group.bench_function(name, |bencher| bencher.iter_custom(|n| time(&mut *batch, n)));
    }
    group.finish();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [name @ ("queue-vm" | "queue-hv"), requests] => {
            let mut batch: Box<dyn Batch> = match name {
                "queue-vm" => Box::new(Raw::new()),
                _ => Box::new(Subject::new(Null, |_| {})),
            };
            let requests: u64 = requests.parse().expect("a number of requests");
            (0..requests / u64::from(BATCH)).for_each(|_| batch.process());
        }
        ["--paired", series, ..] => paired(series.parse().expect("--paired takes a number")),
        _ => {
            let mut criterion = Criterion::default().configure_from_args();
            alone(&mut criterion);
            criterion.final_summary();
        }
    }
}
