//! What the traits cost a run loop: a guest that does nothing but write to a port, driven by
//!
//! - `raw`: the ioctl `KVM_RUN` on a descriptor and a mapping of this program's own ([`raw`]),
//! - `control`: the same with another VM, to show what the figures of this machine are worth,
//! - `traits`: [`hv_core::Vcpu`] over hv-kvm,
//! - `layer`: the same through a layer that does nothing,
//! - `trace`: through [`Trace`], which counts,
//! - `json`: through one that also writes a line per call, to nowhere.
//!
//! All look at the exit, its data and interruptions alike. As a criterion benchmark each is
//! measured on its own. With `-- --paired SERIES` they take turns in short rounds, and one line of
//! times is printed per round: neighbours in time share what else the machine does, so the ratios
//! of a round say more than those of averages. `cargo xtask bench traits` judges them.

#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

#[path = "../../tests/common/mod.rs"]
mod common;
mod raw;

use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use hv_core::layer::{Answer, Interceptor, Layered, Object, Request, Trace};
use hv_core::{Error, HostRange, Hypervisor, IoDirection, IoExit, Vcpu, VcpuExit, Vm};
use kvm_bindings::kvm_regs;

use crate::common::{CODE, slot, store};
use crate::raw::RawGuest;

/// Where the guest writes.
const PORT: u16 = 0x10;

/// What it writes.
const VALUE: u8 = 0x5a;

/// `mov al, VALUE; again: out PORT, al; jmp again`, in real mode.
const GUEST: &[u8] = &[0xb0, VALUE, 0xe6, PORT as u8, 0xeb, 0xfc];

/// Exits of one loop in one round: less than a millisecond where an exit is slow, and so many that
/// reading the clock does not count where it is fast.
const EXITS: u64 = 64;

/// Rounds with one set of VMs. A VM may be a little faster than another for as long as it lives, by
/// where its memory is; a new set is made after so many.
const ROUNDS: usize = 100;

/// A guest with the loop that drives it.
trait Guest {
    /// Runs until the guest has written `exits` times.
    fn run(&mut self, exits: u64);

    fn time(&mut self, exits: u64) -> Duration {
        let start = Instant::now();
        self.run(exits);
        start.elapsed()
    }
}

/// A guest behind the traits.
struct TraitGuest<V: Vm> {
    vcpu: V::Vcpu,
    _vm: V,
    _memory: HostRange,
}

impl<V: Vm> TraitGuest<V> {
    fn new(hypervisor: &impl Hypervisor<Vm = V>) -> Self {
        let vm = hypervisor.create_vm(0).unwrap();
        vm.set_tss_addr(raw::TSS).unwrap();
        let memory = common::pages(1);
        store(&memory, 0, GUEST);
        vm.set_memory_slot(&slot(0, CODE, &memory)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
        Self { vcpu, _vm: vm, _memory: memory }
    }
}

impl<V: Vm> Guest for TraitGuest<V> {
    fn run(&mut self, exits: u64) {
        let mut done = 0;
        while done < exits {
            match self.vcpu.run().unwrap() {
                VcpuExit::Io(IoExit {
                    direction: IoDirection::Out,
                    port: PORT,
                    size: 1,
                    count: 1,
                }) => {
                    assert_eq!(black_box(self.vcpu.io_data()), [VALUE]);
                    done += 1;
                }
                VcpuExit::Interrupted => {}
                exit => panic!("unexpected exit: {exit:?}"),
            }
        }
    }
}

/// A layer that does nothing.
#[derive(Clone)]
struct Nothing;

impl Interceptor for Nothing {
    fn call<T: Answer>(
        &self,
        _: Object,
        _: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        real()
    }
}

/// A guest for each loop, by name.
fn guests() -> Vec<(&'static str, Box<dyn Guest>)> {
    let kvm = common::kvm();
    let mut guests: Vec<(&'static str, Box<dyn Guest>)> = vec![
        ("raw", Box::new(RawGuest::new())),
        ("control", Box::new(RawGuest::new())),
        ("traits", Box::new(TraitGuest::new(&kvm))),
        ("layer", Box::new(TraitGuest::new(&Layered::new(common::kvm(), Nothing)))),
        ("trace", Box::new(TraitGuest::new(&Trace::new().over(common::kvm())))),
        ("json", Box::new(TraitGuest::new(&Trace::to_json(io::sink()).over(common::kvm())))),
    ];
    for (_, guest) in &mut guests {
        // What a VM needs once, as page tables.
        guest.run(EXITS);
    }
    guests
}

/// Prints the times of every round, in nanoseconds.
fn paired(series: usize) {
    for _ in 0..series {
        let mut guests = guests();
        let count = guests.len();
        for round in 0..ROUNDS {
            // Who begins changes, and with the direction, who follows whom.
            let step = if (round / count).is_multiple_of(2) { 1 } else { count - 1 };
            let mut times = vec![Duration::ZERO; count];
            for turn in 0..count {
                let at = (round + turn * step) % count;
                times[at] = guests[at].1.time(EXITS);
            }
            let columns = guests.iter().zip(&times);
            let columns: Vec<_> =
                columns.map(|((name, _), time)| format!("{name}={}", time.as_nanos())).collect();
            println!("round: exits={EXITS} {}", columns.join(" "));
        }
    }
}

fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("run_loop");
    group.throughput(Throughput::Elements(1));
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    for (name, mut guest) in guests() {
        group.bench_function(name, |bencher| bencher.iter_custom(|exits| guest.time(exits)));
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
