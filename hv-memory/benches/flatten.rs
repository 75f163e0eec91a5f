//! What a change of one region costs in an [`AddressMap`] of
//!
//! - `few`: 10 regions,
//! - `many`: 1000,
//! - `control`: 10 again, to show what the figures of this machine are worth,
//! - `deep`: 1000 that lie one over the other, each with a priority of its own, of which the changed
//!   one overlaps two,
//! - `rebuild`: 1000, of which all are flattened anew.
//!
//! Each change moves a device of a page over RAM and back, so that the RAM is split and joined.
//!
//! As a criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns in
//! short rounds, and one line of times is printed per round: for a hundred changes, but one rebuild.
//! `cargo xtask bench memory` judges them.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hv_core::HostRange;
use hv_memory::{AddressMap, Mapping, NewRegion, RegionId};
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;

/// Pages from one region to the next.
const STRIDE: u64 = 8;

/// Changes in a round, so that reading the clock does not count.
const CHANGES: u64 = 100;

/// Rounds with one set of maps. One may be a little faster than another by where its memory is; a new
/// set is made after so many.
const ROUNDS: usize = 100;

/// A map of `count` regions of RAM, none beside another, with a device that goes from one to the next.
struct Map {
    map: AddressMap,
    regions: Vec<RegionId>,
    device: RegionId,
    turn: u64,
}

impl Map {
    /// Each region of 4 pages; or `deep`, of 12, so that it hides a part of the one before.
    fn new(count: u64, deep: bool) -> Self {
        let memory = Arc::new(Mapping::anonymous(12 * PAGE).unwrap());
        let pages = if deep { 12 } else { 4 };
        let host = HostRange::new(memory, 0, usize::try_from(pages * PAGE).unwrap()).unwrap();
        let mut map = AddressMap::new(46);
        let (regions, device) = map
            .edit(|edit| {
                let regions = (0..count)
                    .map(|n| {
                        let priority = if deep { i32::try_from(n).unwrap() } else { 0 };
                        let place = GuestAddress(n * STRIDE * PAGE);
                        edit.add(NewRegion::ram("RAM", host.clone()).at(place, priority))
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                Ok((regions, edit.add(NewRegion::mmio("device", PAGE))?))
            })
            .unwrap();
        Self { map, regions, device, turn: 0 }
    }

    /// Puts the device over the second page of a region, and takes it away again the next time.
    fn change(&mut self) {
        let count = self.regions.len() as u64;
        let region = (self.turn / 2).wrapping_mul(2_654_435_761) % count;
        let place = GuestAddress((region * STRIDE + 1) * PAGE);
        let comes = self.turn.is_multiple_of(2);
        self.turn += 1;
        self.map
            .edit(|edit| match comes {
                true => edit.place(self.device, place, i32::MAX),
                false => edit.unplace(self.device),
            })
            .unwrap();
    }

    /// Every region becomes readonly, or writable again.
    fn rebuild(&mut self) {
        let readonly = self.turn.is_multiple_of(2);
        self.turn += 1;
        self.map
            .edit(|edit| {
                self.regions.iter().try_for_each(|&region| edit.set_readonly(region, readonly))
            })
            .unwrap();
    }
}

/// What is measured.
struct Loop {
    name: &'static str,
    /// Turns in one round.
    turns: u64,
    map: Map,
    turn: fn(&mut Map),
}

impl Loop {
    fn time(&mut self, turns: u64) -> Duration {
        let start = Instant::now();
        for _ in 0..turns {
            (self.turn)(&mut self.map);
        }
        start.elapsed()
    }
}

fn loops() -> Vec<Loop> {
    let changes = |name, map| Loop { name, turns: CHANGES, map, turn: Map::change as fn(&mut Map) };
    vec![
        changes("few", Map::new(10, false)),
        changes("control", Map::new(10, false)),
        changes("many", Map::new(1000, false)),
        changes("deep", Map::new(1000, true)),
        Loop { name: "rebuild", turns: 1, map: Map::new(1000, false), turn: Map::rebuild },
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
    let mut group = criterion.benchmark_group("flatten");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    for mut measured in loops() {
        group.bench_function(measured.name, |bencher| {
            bencher.iter_custom(|turns| measured.time(turns));
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
