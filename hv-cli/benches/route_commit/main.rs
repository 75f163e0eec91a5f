//! What a commit of a full routing table costs, on `/dev/kvm`: the 38 routes of a PC's pins and messages on
//! the rest of 4096, written again and again
//!
//! - `raw`: by the ioctl `KVM_SET_GSI_ROUTING` alone, with a table that is there already ([`raw`]),
//! - `control`: the same with another VM, to show what the figures of this machine are worth,
//! - `one`: by a batch of hv-irq's router over hv-kvm that changes one message,
//! - `all`: by one that changes every message.
//!
//! `raw` and `one` change the same message of the same table each time, so that both write it. As a
//! criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns, and one
//! line of times is printed per round. `cargo xtask bench irq` judges them.
//!
//! KVM waits until no vCPU can be using the old table, as long as that takes on a machine that does other
//! things, too. So a line also has the time each thread was on a processor (`raw-cpu`), without that
//! wait: it is the same for all, and only hides what they differ in.

#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

mod raw;

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hv_core::{Gsi, Hypervisor, Msi, Route, RouteTarget, Vm};
use hv_irq::{GsiRoute, IrqRouter, LEGACY_GSIS, LegacyPins, RouterConfig, pc_default_routes};
use hv_kvm::{Kvm, KvmVm};
use rustix::time::{ClockId, clock_gettime};

use crate::raw::RawTable;

/// The most KVM takes on x86 (`KVM_CAP_IRQ_ROUTING`).
const ROUTES: u32 = 4096;

/// The routes of pins, which come first.
const PINS: usize = 38;

/// The rest.
const MESSAGES: usize = ROUTES as usize - PINS;

/// Rounds with one set of VMs. One VM may be a little faster than another by where its memory is;
/// a new set is made after so many.
const ROUNDS: usize = 100;

fn message(data: u32) -> Msi {
    Msi { address: 0xfee0_0000, data, device: None }
}

/// The table before the first change.
fn first_routes() -> Vec<Route> {
    let gsis = (LEGACY_GSIS.end..).map(Gsi).take(MESSAGES);
    let messages = gsis.map(|gsi| Route { gsi, target: RouteTarget::Msi(message(0)) });
    let routes: Vec<Route> = pc_default_routes().chain(messages).collect();
    assert_eq!(routes.len(), ROUTES as usize);
    routes
}

/// The one message that is changed in a turn.
struct Change {
    /// Its entry in the table.
    index: usize,
    data: u32,
}

/// What is changed, turn by turn: each message in turn, and always to something new.
#[derive(Default)]
struct Changes(u32);

impl Changes {
    fn next(&mut self) -> Change {
        self.0 += 1;
        Change { index: PINS + self.0 as usize * 1571 % MESSAGES, data: self.0 }
    }
}

/// How long commits took.
#[derive(Clone, Copy, Default)]
struct Times {
    elapsed: Duration,
    on_cpu: Duration,
}

/// How long this thread has been on a processor, in the kernel or not.
fn on_cpu() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

/// Something that commits.
trait Loop {
    /// Changes something and writes the table.
    fn commit(&mut self);

    fn time(&mut self, commits: u64) -> Times {
        let (start, start_on_cpu) = (Instant::now(), on_cpu());
        for _ in 0..commits {
            self.commit();
        }
        Times { on_cpu: on_cpu() - start_on_cpu, elapsed: start.elapsed() }
    }
}

/// A router with a full table.
struct Router {
    router: IrqRouter<KvmVm>,
    routes: Vec<GsiRoute<KvmVm>>,
    changes: Changes,
    all: bool,
}

impl Router {
    fn new(all: bool) -> Self {
        let vm = Kvm::open("/dev/kvm").unwrap().create_vm(0).unwrap();
        vm.create_irqchip().unwrap();
        let config = RouterConfig::new(ROUTES, LegacyPins::Kernel);
        let router = IrqRouter::new(Arc::new(vm), config).unwrap();
        let routes = router
            .batch(|batch| (0..MESSAGES).map(|_| batch.add_msi(message(0))).collect())
            .unwrap();
        assert_eq!(router.routes(), first_routes(), "the table that the other has, too");
        Self { router, routes, changes: Changes::default(), all }
    }
}

impl Loop for Router {
    fn commit(&mut self) {
        let change = self.changes.next();
        let changed = if self.all {
            &self.routes[..]
        } else {
            std::slice::from_ref(&self.routes[change.index - PINS])
        };
        let msi = message(change.data);
        self.router
            .batch(|batch| changed.iter().try_for_each(|route| batch.set_msi(route, msi)))
            .unwrap();
    }
}

fn loops() -> Vec<(&'static str, Box<dyn Loop>)> {
    let mut loops: Vec<(&'static str, Box<dyn Loop>)> = vec![
        ("raw", Box::new(RawTable::new())),
        ("control", Box::new(RawTable::new())),
        ("one", Box::new(Router::new(false))),
        ("all", Box::new(Router::new(true))),
    ];
    for (_, measured) in &mut loops {
        // What is allocated once.
        measured.commit();
    }
    loops
}

/// Prints the times of every round, in nanoseconds: a commit of each.
fn paired(series: usize) {
    for _ in 0..series {
        let mut loops = loops();
        let count = loops.len();
        for round in 0..ROUNDS {
            // Who begins changes, and with the direction, who follows whom.
            let step = if (round / count).is_multiple_of(2) { 1 } else { count - 1 };
            let mut times = vec![Times::default(); count];
            for turn in 0..count {
                let at = (round + turn * step) % count;
                times[at] = loops[at].1.time(1);
            }
            let columns = loops.iter().zip(&times);
            let columns: Vec<_> = columns
                .map(|((name, _), Times { elapsed, on_cpu })| {
                    format!("{name}={} {name}-cpu={}", elapsed.as_nanos(), on_cpu.as_nanos())
                })
                .collect();
            println!("round: {}", columns.join(" "));
        }
    }
}

fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route_commit");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (name, mut measured) in loops() {
        group.bench_function(name, |bencher| bencher.iter_custom(|n| measured.time(n).elapsed));
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
