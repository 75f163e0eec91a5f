//! `cargo xtask bench irq`: what GSIs and routes cost in hv-irq.

use super::paired::{self, Rounds};
use super::table::Row;
use super::{Error, executable, measure};
use crate::workspace::KVM_TESTS;

/// So many times the allocators of GSIs are compared with new ones: some seconds.
const GSI_SERIES: u32 = 20;

/// So many times commits are compared with new VMs: some seconds, of which KVM mostly waits.
const COMMIT_SERIES: u32 = 20;

/// Runs both benchmarks.
pub(crate) fn run() -> Result<Vec<Row>, Error> {
    let gsis = measure(&executable("hv-irq", "gsi", &[])?, GSI_SERIES)?;
    anstream::println!("gsi: {} rounds", gsis.len());
    let commits = measure(&executable("hv-cli", "route_commit", &[KVM_TESTS])?, COMMIT_SERIES)?;
    anstream::println!("route_commit: {} rounds", commits.len());
    let mut rows = judge(&gsis, GSIS)?;
    rows.extend(judge(&commits, COMMITS)?);
    Ok(rows)
}

/// What is compared, with what, and how much of that it may cost.
type Comparison = (&'static str, &'static str, &'static str, Option<f64>);

/// Giving GSIs out, of 4096.
const GSIS: &[Comparison] = &[
    ("GSI freed, allocated: GsiBitmap / IdAllocator", "one-bitmap", "one-id", Some(0.5)),
    ("GSI freed, allocated: GsiBitmap / first-zero scan", "one-bitmap", "one-scan", None),
    ("4096 GSIs, in order: GsiBitmap / IdAllocator", "order-bitmap", "order-id", Some(0.2)),
    ("4096 GSIs, in order: GsiBitmap / first-zero scan", "order-bitmap", "order-scan", None),
    ("4096 GSIs, mixed: GsiBitmap / IdAllocator", "mixed-bitmap", "mixed-id", Some(0.2)),
    ("4096 GSIs, mixed: GsiBitmap / first-zero scan", "mixed-bitmap", "mixed-scan", None),
];

/// Committing 4096 routes. On the processor, because waiting, which is the same for all, only makes
/// the ratios smaller, and is as long as whatever else runs wants it.
const COMMITS: &[Comparison] = &[
    ("4096 routes, CPU: raw ioctl / the same (noise)", "control-cpu", "raw-cpu", None),
    ("4096 routes, CPU: commit of one change / raw ioctl", "one-cpu", "raw-cpu", Some(1.1)),
    ("4096 routes, CPU: commit of 4058 changes / raw ioctl", "all-cpu", "raw-cpu", None),
    ("4096 routes, time: raw ioctl / the same (noise)", "control", "raw", None),
    ("4096 routes, time: commit of one change / raw ioctl", "one", "raw", None),
    ("4096 routes, time: commit of 4058 changes / raw ioctl", "all", "raw", None),
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

    fn missed(line: &str, comparisons: &[Comparison]) -> Vec<&'static str> {
        let mut rounds = Rounds::default();
        rounds.take(line).unwrap();
        let rows = judge(&rounds, comparisons).unwrap();
        rows.iter().filter(|row| row.is_missed()).map(|row| row.what).collect()
    }

    #[test]
    fn the_bitmap_is_judged_against_the_set_and_not_against_the_scan() {
        let scans = "one-scan=1 order-scan=1 mixed-scan=1";
        let ids = "one-id=1000 order-id=1000 mixed-id=1000";
        let bitmaps = "one-bitmap=500 order-bitmap=200 mixed-bitmap=200";
        assert!(missed(&format!("round: {scans} {ids} {bitmaps}"), GSIS).is_empty());
        let bitmaps = "one-bitmap=501 order-bitmap=201 mixed-bitmap=200";
        assert_eq!(
            missed(&format!("round: {scans} {ids} {bitmaps}"), GSIS),
            [
                "GSI freed, allocated: GsiBitmap / IdAllocator",
                "4096 GSIs, in order: GsiBitmap / IdAllocator"
            ]
        );
    }

    #[test]
    fn a_commit_is_judged_by_its_time_on_a_processor() {
        let waits = "raw=1000 control=9000 one=9000 all=9000";
        let on_cpu = "raw-cpu=1000 control-cpu=9000 all-cpu=9000";
        assert!(missed(&format!("round: {waits} {on_cpu} one-cpu=1100"), COMMITS).is_empty());
        assert_eq!(
            missed(&format!("round: {waits} {on_cpu} one-cpu=1101"), COMMITS),
            ["4096 routes, CPU: commit of one change / raw ioctl"]
        );
    }

    #[test]
    fn a_loop_the_benchmark_left_out_is_an_error() {
        let mut rounds = Rounds::default();
        rounds.take("round: raw=1000 raw-cpu=900").unwrap();
        assert!(judge(&rounds, COMMITS).is_err());
        assert!(judge(&rounds, GSIS).is_err());
    }
}
