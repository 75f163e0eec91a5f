//! Counters by call, and the table of them that people read.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::layer::Object;
use crate::{Call, Ioctl};

/// Calls there are: ioctls, then the others.
const CALLS: usize = Ioctl::ALL.len() + 7;

/// Shards of the counters, so that vCPUs do not contend for a cache line.
const SHARDS: usize = 8;

#[derive(Debug, Default)]
struct Counter {
    calls: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
}

#[derive(Debug)]
#[repr(align(128))]
struct Shard([Counter; CALLS]);

/// All counters. Their sums say what was counted; the order of additions does not matter.
#[derive(Debug)]
pub(super) struct Counters(Box<[Shard; SHARDS]>);

impl Default for Counters {
    fn default() -> Self {
        Self(Box::new(std::array::from_fn(|_| Shard(std::array::from_fn(|_| Counter::default())))))
    }
}

#[inline]
const fn index(call: Call) -> usize {
    let others = Ioctl::ALL.len();
    match call {
        Call::Ioctl(ioctl) => ioctl as usize,
        Call::Open => others,
        Call::Mmap => others + 1,
        Call::MmapDirtyRing => others + 2,
        Call::CoalescedRing => others + 3,
        Call::Eventfd => others + 4,
        Call::Sigaction => others + 5,
        Call::Kick => others + 6,
    }
}

impl Counters {
    #[inline]
    pub(super) fn add(&self, object: Object, call: Call, nanoseconds: u64, failed: bool) {
        let shard = match object {
            Object::Vcpu { id, .. } => id as usize % SHARDS,
            Object::System | Object::Vm(_) | Object::Kick { .. } => 0,
        };
        let Some(counter) = self.0.get(shard).and_then(|shard| shard.0.get(index(call))) else {
            return;
        };
        counter.calls.fetch_add(1, Ordering::Relaxed);
        counter.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        if failed {
            counter.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn sum(&self) -> TraceCounts {
        let of = |call| {
            let counters = self.0.iter().filter_map(|shard| shard.0.get(index(call)));
            counters.fold(CallCount::default(), |sum, counter| CallCount {
                calls: sum.calls + counter.calls.load(Ordering::Relaxed),
                errors: sum.errors + counter.errors.load(Ordering::Relaxed),
                time: sum.time + Duration::from_nanos(counter.nanoseconds.load(Ordering::Relaxed)),
            })
        };
        let counts = Call::all().map(|call| (call, of(call)));
        TraceCounts(counts.filter(|(_, count)| count.calls != 0).collect())
    }
}

/// How often a call was made, and how long that took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallCount {
    /// Calls, failed ones included.
    pub calls: u64,
    /// Those that failed.
    pub errors: u64,
    /// Time spent in all of them together. Of `KVM_RUN` that includes the guest's.
    pub time: Duration,
}

impl CallCount {
    /// Time spent in one of them, on average.
    #[must_use]
    pub fn average(&self) -> Duration {
        let total = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(total.checked_div(self.calls).unwrap_or(0))
    }
}

/// What a trace counted. Shown, it is a table of the calls that were made, those that took longest
/// first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceCounts(Vec<(Call, CallCount)>);

impl TraceCounts {
    /// Of one call.
    #[must_use]
    pub fn get(&self, call: impl Into<Call>) -> CallCount {
        let call = call.into();
        self.iter().find(|(other, _)| *other == call).map_or_else(CallCount::default, |(_, n)| n)
    }

    /// Of all calls that were made, by [`Call::all`].
    pub fn iter(&self) -> impl Iterator<Item = (Call, CallCount)> {
        self.0.iter().copied()
    }

    /// Of all calls together.
    #[must_use]
    pub fn total(&self) -> CallCount {
        self.iter().fold(CallCount::default(), |sum, (_, count)| CallCount {
            calls: sum.calls + count.calls,
            errors: sum.errors + count.errors,
            time: sum.time + count.time,
        })
    }
}

impl fmt::Display for TraceCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<_> = self.iter().map(|(call, count)| (call.name(), count)).collect();
        rows.sort_by_key(|(_, count)| std::cmp::Reverse(count.time));
        rows.push(("total", self.total()));
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        write!(
            f,
            "{:width$} {:>10} {:>8} {:>10} {:>10}",
            "call", "calls", "errors", "time", "average"
        )?;
        for (name, count) in rows {
            let CallCount { calls, errors, .. } = count;
            let (time, average) = (Time(count.time), Time(count.average()));
            write!(f, "\n{name:width$} {calls:>10} {errors:>8} {time:>10} {average:>10}")?;
        }
        Ok(())
    }
}

/// A duration in the unit that suits it, to three digits.
struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos() as f64;
        let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us")];
        let text = match units.into_iter().find(|(unit, _)| ns >= *unit) {
            Some((unit, name)) => {
                let number = ns / unit;
                let decimals = if number < 10.0 { 2 } else { usize::from(number < 100.0) };
                format!("{number:.decimals$} {name}")
            }
            None => format!("{ns:.0} ns"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_a_counter_of_its_own() {
        let indices: Vec<_> = Call::all().map(index).collect();
        assert_eq!(indices, (0..CALLS).collect::<Vec<_>>());
    }

    #[test]
    fn shards_add_up() {
        let counters = Counters::default();
        for id in 0..20 {
            let vcpu = Object::Vcpu { vm: 0, id };
            counters.add(vcpu, Ioctl::Run.into(), 1000, id == 7);
        }
        counters.add(Object::Vm(3), Ioctl::Irqfd.into(), 500, false);
        let counts = counters.sum();
        let run = CallCount { calls: 20, errors: 1, time: Duration::from_micros(20) };
        assert_eq!(counts.get(Ioctl::Run), run);
        assert_eq!(counts.get(Ioctl::Run).average(), Duration::from_micros(1));
        assert_eq!(counts.get(Call::Kick), CallCount::default());
        assert_eq!(counts.total().calls, 21);
        assert_eq!(counts.iter().count(), 2);
    }

    #[test]
    fn the_table_is_for_people() {
        let counters = Counters::default();
        counters.add(Object::System, Ioctl::CheckExtension.into(), 999, false);
        counters.add(Object::Vm(0), Ioctl::Irqfd.into(), 12_345, true);
        counters.add(Object::Vcpu { vm: 0, id: 0 }, Ioctl::Run.into(), 2_500_000_000, false);
        let table = "\
call                     calls   errors       time    average
KVM_RUN                      1        0     2.50 s     2.50 s
KVM_IRQFD                    1        1    12.3 us    12.3 us
KVM_CHECK_EXTENSION          1        0     999 ns     999 ns
total                        3        1     2.50 s    833 ms";
        let shown = counters.sum().to_string();
        assert_eq!(
            shown.split_whitespace().collect::<Vec<_>>(),
            table.split_whitespace().collect::<Vec<_>>()
        );
        let widths: Vec<_> = shown.lines().map(str::len).collect();
        assert!(widths.windows(2).all(|w| w[0] == w[1]), "{shown}");
    }

    #[test]
    fn nothing_counted_is_a_table_too() {
        assert_eq!(TraceCounts::default().to_string().lines().count(), 2);
        assert_eq!(CallCount::default().average(), Duration::ZERO);
    }
}
