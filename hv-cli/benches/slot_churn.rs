//! What a slot costs that is added and deleted on `/dev/kvm`, among others:
//!
//! - `slot-one`, `slot-many`: by hv-memory's slot manager, beside one other slot and beside 1000,
//! - `control`: the first again with another VM, to show what the figures of this machine are worth,
//! - `map-one`, `map-many`: by edits of a [`LiveMap`] that has the others as well, each planned and
//!   committed,
//! - `raw-one`, `raw-many`: by the two calls alone.
//!
//! As a criterion benchmark each is measured on its own. With `-- --paired SERIES` they take turns, and
//! one line of times is printed per round. `cargo xtask bench memory` judges them.
//!
//! KVM waits until no vCPU can be using the old slots, as long as that takes on a machine that does other
//! things, too. So a line also has the time the thread was on a processor (`slot-one-cpu`), without
//! that wait: it is the same for all, and only hides what they differ in.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark")]
#![allow(clippy::indexing_slicing, reason = "a benchmark")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use hv_core::{
    Capability, HostRange, Hypervisor as _, MemoryBackend as _, MemorySlot, SlotFlags, SlotId,
    Vm as _,
};
use hv_kvm::{Kvm, KvmVm};
use hv_memory::{AddressMap, LiveMap, Mapping, NewRegion, NewSlot, SlotRules, VcpusPaused};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;

/// Where slots are: no two are beside each other.
const STRIDE: u64 = 0x10_0000;

/// Slots that come and go in a round.
const TURNS: u64 = 16;

/// Rounds with one set of VMs. One may be a little faster than another by where its memory is; a
/// new set is made after so many.
const ROUNDS: usize = 100;

/// How long slots took.
#[derive(Clone, Copy, Default)]
struct Times {
    elapsed: Duration,
    on_cpu: Duration,
}

/// How long this thread has been on a processor, in the kernel or not.
fn on_cpu() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

struct NoVcpus;
impl VcpusPaused for NoVcpus {}

/// How a slot comes and goes.
#[derive(Clone, Copy)]
enum By {
    Ioctl,
    Manager,
    Map,
}

/// A VM with some slots, all of them of a map.
struct Slots {
    map: LiveMap<KvmVm>,
    vm: Arc<KvmVm>,
    by: By,
    host: HostRange,
    others: u64,
    turn: u64,
}

impl Slots {
    fn new(others: u64, by: By) -> Self {
        let vm = Arc::new(Kvm::open("/dev/kvm").unwrap().create_vm(0).unwrap());
        let memory = Arc::new(Mapping::anonymous(PAGE).unwrap());
        let host = HostRange::new(memory, 0, usize::try_from(PAGE).unwrap()).unwrap();
        let slots = vm.check_extension(Capability::NrMemslots).unwrap().cast_unsigned();
        let rules = SlotRules { slots, joins: true, readonly: true };
        let mut map = LiveMap::adopt(vm.clone(), AddressMap::new(40), rules).unwrap();
        map.edit(|edit| {
            (0..others).try_for_each(|n| {
                let place = GuestAddress(2 * n * STRIDE);
                edit.add(NewRegion::ram("other", host.clone()).at(place, 0)).map(drop)
            })
        })
        .unwrap()
        .commit(|_| NoVcpus)
        .unwrap();
        assert_eq!(map.slots().len() as u64, others);
        Self { map, vm, by, host, others, turn: 0 }
    }

    /// A slot comes between two others, and goes.
    fn turn(&mut self) {
        self.turn += 1;
        let other = self.turn.wrapping_mul(2_654_435_761) % self.others;
        let guest = GuestAddress((2 * other + 1) * STRIDE);
        let (host, flags) = (self.host.clone(), SlotFlags::default());
        match self.by {
            By::Ioctl => {
                let id = SlotId(u32::try_from(self.others).unwrap());
                self.vm.set_memory_slot(&MemorySlot { id, guest, host, flags }).unwrap();
                self.vm.delete_memory_slot(id).unwrap();
            }
            By::Manager => {
                let new = NewSlot { name: "slot".into(), guest, host, flags };
                self.map.manager().add(new).unwrap().remove().unwrap();
            }
            By::Map => {
                let region = NewRegion::ram("slot", host).at(guest, 0);
                let plan = self.map.edit(|edit| edit.add(region)).unwrap();
                let added = plan.commit(|_| NoVcpus).unwrap();
                let plan = self.map.edit(|edit| edit.remove(added)).unwrap();
                plan.commit(|_| NoVcpus).unwrap();
            }
        }
    }

    fn time(&mut self, turns: u64) -> Times {
        let (start, start_on_cpu) = (Instant::now(), on_cpu());
        for _ in 0..turns {
            self.turn();
        }
        Times { on_cpu: on_cpu() - start_on_cpu, elapsed: start.elapsed() }
    }
}

fn loops() -> Vec<(&'static str, Slots)> {
    vec![
        ("slot-one", Slots::new(1, By::Manager)),
        ("control", Slots::new(1, By::Manager)),
        ("slot-many", Slots::new(1000, By::Manager)),
        ("map-one", Slots::new(1, By::Map)),
        ("map-many", Slots::new(1000, By::Map)),
        ("raw-one", Slots::new(1, By::Ioctl)),
        ("raw-many", Slots::new(1000, By::Ioctl)),
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
            let mut times = vec![Times::default(); count];
            for turn in 0..count {
                let at = (round + turn * step) % count;
                times[at] = loops[at].1.time(TURNS);
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
    let mut group = criterion.benchmark_group("slot_churn");
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
