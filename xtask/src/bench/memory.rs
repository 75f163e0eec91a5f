//! `cargo xtask bench memory`: what guest memory costs in hv-memory.

use super::paired::{self, Rounds};
use super::table::Row;
use super::{Error, executable, measure};
use crate::workspace::KVM_TESTS;

/// So many times harvests are compared with new VMs: most of it is the guest, which writes.
const DIRTY_SERIES: u32 = 6;

/// Runs the benchmarks.
pub(crate) fn run() -> Result<Vec<Row>, Error> {
    dirty()
}

/// Learning which pages were written.
fn dirty() -> Result<Vec<Row>, Error> {
    let rounds = measure(&executable("hv-cli", "dirty_harvest", &[KVM_TESTS])?, DIRTY_SERIES)?;
    anstream::println!("dirty_harvest: {} rounds", rounds.len());
    Ok(judge_dirty(&rounds)?)
}

/// What is compared, with what, and how much of that it may cost.
type Comparison = (&'static str, &'static str, &'static str, Option<f64>);

const DIRTY: &[Comparison] = &[
    ("0.1% of 4 GiB dirty: raw ioctl and scan / the same (noise)", "control", "raw", None),
    ("0.1% of 4 GiB dirty: harvest / raw ioctl and scan", "harvest", "raw", Some(1.2)),
    (
        "0.1% of 4 GiB dirty, manual: harvest / raw ioctls and scan",
        "manual",
        "raw-manual",
        Some(1.2),
    ),
];

fn judge_dirty(rounds: &Rounds) -> Result<Vec<Row>, paired::Error> {
    let row = |&(what, measured, base, target): &Comparison| {
        let (ratio, spread) = rounds.ratio(measured, base)?;
        Ok(Row { what, ratio, spread: Some(spread), target })
    };
    DIRTY.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_harvest_is_judged_against_what_it_is_made_of() {
        let missed = |line: &str| {
            let mut rounds = Rounds::default();
            rounds.take(line).unwrap();
            let rows = judge_dirty(&rounds).unwrap();
            rows.iter().filter(|row| row.is_missed()).count()
        };
        assert_eq!(
            missed("round: raw=1000 control=9000 harvest=1200 raw-manual=500 manual=600"),
            0
        );
        assert_eq!(
            missed("round: raw=1000 control=1000 harvest=1201 raw-manual=500 manual=600"),
            1
        );
        assert_eq!(
            missed("round: raw=1000 control=1000 harvest=1200 raw-manual=500 manual=601"),
            1
        );
    }
}
