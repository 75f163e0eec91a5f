//! What it costs to give GSIs out: [`GsiBitmap`] against
//!
//! - `id`: vm-allocator's [`IdAllocator`], a set of what was freed,
//! - `scan`: a bitmap without a summary, searched from its first word on,
//!
//! in three loops, all on 4096 GSIs:
//!
//! - `one`: with all of them in use, one is freed and allocated again,
//! - `order`: all are freed, lowest first, and allocated again,
//! - `mixed`: the same, freed in an order without a pattern.
//!
//! As a criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns in
//! short rounds, and one line of times is printed per round. `cargo xtask bench irq` judges them.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hv_core::Gsi;
use hv_irq::GsiBitmap;
use vm_allocator::IdAllocator;

/// As many as KVM has on x86 (`KVM_CAP_IRQ_ROUTING`).
const GSIS: u32 = 4096;

/// How often one is freed and allocated in a round: tens of microseconds, so that reading the clock
/// does not count.
const ONES: u64 = 2048;

/// Rounds with one set of allocators. One may be a little faster than another by where its memory
/// is; a new set is made after so many.
const ROUNDS: usize = 100;

/// Gives the lowest free number out.
trait Allocator {
    /// With the numbers below [`GSIS`], all free.
    fn new() -> Self;
    fn allocate(&mut self) -> u32;
    fn free(&mut self, id: u32);

    /// With all of them taken.
    fn taken() -> Self
    where
        Self: Sized,
    {
        let mut allocator = Self::new();
        for id in 0..GSIS {
            assert_eq!(allocator.allocate(), id);
        }
        allocator
    }
}

impl Allocator for GsiBitmap {
    fn new() -> Self {
        GsiBitmap::new(GSIS)
    }

    fn allocate(&mut self) -> u32 {
        GsiBitmap::allocate(self).unwrap().0
    }

    fn free(&mut self, id: u32) {
        GsiBitmap::free(self, Gsi(id)).unwrap();
    }
}

impl Allocator for IdAllocator {
    fn new() -> Self {
        IdAllocator::new(0, GSIS - 1).unwrap()
    }

    fn allocate(&mut self) -> u32 {
        self.allocate_id().unwrap()
    }

    fn free(&mut self, id: u32) {
        self.free_id(id).unwrap();
    }
}

/// Bit n of word n / 64: n is taken.
struct Scan(Vec<u64>);

impl Allocator for Scan {
    fn new() -> Self {
        Self(vec![0; (GSIS / u64::BITS) as usize])
    }

    fn allocate(&mut self) -> u32 {
        let index = self.0.iter().position(|&word| word != u64::MAX).unwrap();
        let bit = self.0[index].trailing_ones();
        self.0[index] |= 1 << bit;
        index as u32 * u64::BITS + bit
    }

    fn free(&mut self, id: u32) {
        let (word, bit) = (&mut self.0[(id / u64::BITS) as usize], 1 << (id % u64::BITS));
        assert_ne!(*word & bit, 0);
        *word &= !bit;
    }
}

/// Every number below [`GSIS`] once, without a pattern that would be to the liking of one of them.
fn mixed() -> Vec<u32> {
    // A permutation: an odd factor and an offset, modulo a power of two, then the bits reversed.
    (0..GSIS)
        .map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(97) % GSIS).reverse_bits() >> 20)
        .collect()
}

/// Frees one and allocates it again, so many times.
fn one<A: Allocator>(order: Vec<u32>) -> impl FnMut(u64) {
    let mut allocator = A::taken();
    let mut turn = 0;
    move |turns| {
        for _ in 0..turns {
            let id = order[turn % order.len()];
            allocator.free(black_box(id));
            assert_eq!(allocator.allocate(), id, "the only one that is free");
            turn += 1;
        }
    }
}

/// Frees all and allocates them again, so many times.
fn all<A: Allocator>(order: Vec<u32>) -> impl FnMut(u64) {
    let mut allocator = A::taken();
    move |turns| {
        for _ in 0..turns {
            for &id in &order {
                allocator.free(black_box(id));
            }
            for id in 0..GSIS {
                assert_eq!(allocator.allocate(), id, "the lowest that is free");
            }
        }
    }
}

/// What is measured.
struct Loop {
    name: &'static str,
    /// Turns in one round.
    turns: u64,
    run: Box<dyn FnMut(u64)>,
}

impl Loop {
    fn new(name: &'static str, turns: u64, run: impl FnMut(u64) + 'static) -> Self {
        Self { name, turns, run: Box::new(run) }
    }

    fn time(&mut self, turns: u64) -> Duration {
        let start = Instant::now();
        (self.run)(turns);
        start.elapsed()
    }
}

/// The loops, those to be compared with each other side by side.
fn loops() -> Vec<Loop> {
    let order: Vec<u32> = (0..GSIS).collect();
    vec![
        Loop::new("one-bitmap", ONES, one::<GsiBitmap>(mixed())),
        Loop::new("one-id", ONES, one::<IdAllocator>(mixed())),
        Loop::new("one-scan", ONES, one::<Scan>(mixed())),
        Loop::new("order-bitmap", 1, all::<GsiBitmap>(order.clone())),
        Loop::new("order-id", 1, all::<IdAllocator>(order.clone())),
        Loop::new("order-scan", 1, all::<Scan>(order)),
        Loop::new("mixed-bitmap", 1, all::<GsiBitmap>(mixed())),
        Loop::new("mixed-id", 1, all::<IdAllocator>(mixed())),
        Loop::new("mixed-scan", 1, all::<Scan>(mixed())),
    ]
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
                let turns = loops[at].turns;
                times[at] = loops[at].time(turns);
            }
            let columns = loops.iter().zip(&times);
            let columns: Vec<_> =
                columns.map(|(l, time)| format!("{}={}", l.name, time.as_nanos())).collect();
            println!("round: {}", columns.join(" "));
        }
    }
}

fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gsi");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    for mut measured in loops() {
        group.bench_function(measured.name, |bencher| {
            bencher.iter_custom(|turns| measured.time(turns));
        });
    }
    group.finish();
}

fn main() {
    let mut sorted = mixed();
    sorted.sort_unstable();
    assert!(sorted.into_iter().eq(0..GSIS), "each number once");

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
