//! What it costs to learn which pages a guest has written, on `/dev/kvm`: one page in a thousand of 4 GiB
//!
//! - `raw`: by the ioctl `KVM_GET_DIRTY_LOG` alone and a scan of the words for bits ([`raw`]),
//! - `control`: the same with another VM, to show what the figures of this machine are worth,
//! - `harvest`: by hv-memory's slot manager over hv-kvm, and all ranges of what it found,
//! - `raw-manual`, `manual`: the same two with manual protection, which is another ioctl.
//!
//! As a criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns, and
//! one line of times is printed per round. The guest's writes are no part of them.
//! `cargo xtask bench memory` judges them.

#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

mod guest;
mod raw;
#[path = "../../tests/kvm/writer.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod writer;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hv_core::{Capability, MemorySlot, Vm};
use hv_kvm::KvmVm;
use hv_memory::{DirtyPages, DirtyTracking, NewSlot, Slot, SlotLimits, SlotManager};

use crate::guest::{Guest, PAGE, WRITTEN};
use crate::raw::RawLog;

/// Rounds with one set of VMs: one may be a little faster than another by where its memory is.
const ROUNDS: usize = 50;

/// Something that collects what was written.
trait Loop {
    /// The guest writes to [`WRITTEN`] pages.
    fn write(&mut self, turn: u64);

    /// How many pages were written since the last time.
    fn collect(&mut self) -> u64;

    fn time(&mut self, turn: u64) -> Duration {
        self.write(turn);
        let start = Instant::now();
        let pages = self.collect();
        let elapsed = start.elapsed();
        assert_eq!(pages, WRITTEN, "each page that was written, and no other");
        elapsed
    }
}

struct Library {
    guest: Guest,
    manager: SlotManager<KvmVm>,
    _slots: Vec<Slot<KvmVm>>,
    pages: DirtyPages,
}

impl Library {
    fn new(how: DirtyTracking) -> Self {
        let guest = Guest::new(|_| {});
        let limits = SlotLimits { slots: 32, address_bits: 36 };
        let own = [("code", guest.own.clone())];
        let (manager, mut slots) = SlotManager::adopt(guest.vm.clone(), own, limits).unwrap();
        manager.track_dirty(how).unwrap();
        let MemorySlot { guest: start, host, flags, .. } = guest.memory.clone();
        let new = NewSlot { name: "RAM".into(), guest: start, host, flags };
        slots.push(manager.add(new).unwrap());
        Self { guest, manager, _slots: slots, pages: DirtyPages::new() }
    }
}

impl Loop for Library {
    fn write(&mut self, turn: u64) {
        self.guest.write(turn);
    }

    fn collect(&mut self) -> u64 {
        self.manager.harvest_dirty(&mut self.pages).unwrap();
        self.pages.ranges().map(|range| black_box(range).len() / PAGE).sum()
    }
}

fn manual(vm: &KvmVm) {
    vm.enable_cap(Capability::ManualDirtyLogProtect2, [1, 0, 0, 0]).unwrap();
}

fn loops() -> Vec<(&'static str, Box<dyn Loop>)> {
    let manually = DirtyTracking::ManualProtect { initially_set: false };
    let mut loops: Vec<(&'static str, Box<dyn Loop>)> = vec![
        ("raw", Box::new(RawLog::new(Guest::new(|_| {}), false))),
        ("control", Box::new(RawLog::new(Guest::new(|_| {}), false))),
        ("harvest", Box::new(Library::new(DirtyTracking::Log))),
        ("raw-manual", Box::new(RawLog::new(Guest::new(manual), true))),
        ("manual", Box::new(Library::new(manually))),
    ];
    for (_, measured) in &mut loops {
        // What is allocated once.
        measured.time(0);
    }
    loops
}

/// Prints the times of every round, in nanoseconds: a harvest of each.
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
                times[at] = loops[at].1.time(round as u64 + 1);
            }
            let columns = loops.iter().zip(&times);
            let columns: Vec<_> =
                columns.map(|((name, _), time)| format!("{name}={}", time.as_nanos())).collect();
            println!("round: {}", columns.join(" "));
        }
    }
}

fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dirty_harvest");
    group.sample_size(10).warm_up_time(Duration::from_millis(100));
    group.measurement_time(Duration::from_millis(500));
    for (name, mut measured) in loops() {
        let mut turn = 0;
        let mut next = || {
            turn += 1;
            measured.time(turn)
        };
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|n| (0..n).map(|_| next()).sum::<Duration>());
        });
    }
    group.finish();
}

fn main() {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--paired").skip(1);
    match arguments.next() {
        Some(series) => paired(series.parse().expect("--paired takes a number of series")),
        None => {
            let mut criterion = Criterion::default().configure_from_args();
            alone(&mut criterion);
            criterion.final_summary();
        }
    }
}
