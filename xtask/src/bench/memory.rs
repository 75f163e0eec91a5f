//! `cargo xtask bench memory`: what guest memory costs in hv-memory.

use super::paired::{self, Rounds};
use super::table::Row;
use super::{Error, executable, measure};
use crate::workspace::KVM_TESTS;

/// So many times maps are compared with new ones: some seconds.
const MAP_SERIES: u32 = 20;

/// So many times slots are compared with new VMs: some seconds.
const SLOT_SERIES: u32 = 20;

/// So many times harvests are compared with new VMs: most of it is the guest, which writes.
const DIRTY_SERIES: u32 = 6;

/// Runs the benchmarks.
pub(crate) fn run() -> Result<Vec<Row>, Error> {
    let maps = measure(&executable("hv-memory", "flatten", &[])?, MAP_SERIES)?;
    anstream::println!("flatten: {} rounds", maps.len());
    let slots = measure(&executable("hv-cli", "slot_churn", &[KVM_TESTS])?, SLOT_SERIES)?;
    anstream::println!("slot_churn: {} rounds", slots.len());
    let mut rows = judge(&maps, MAPS)?;
    rows.extend(judge(&slots, SLOTS)?);
    let harvests = measure(&executable("hv-cli", "dirty_harvest", &[KVM_TESTS])?, DIRTY_SERIES)?;
    anstream::println!("dirty_harvest: {} rounds", harvests.len());
    rows.extend(judge(&harvests, DIRTY)?);
    Ok(rows)
}

/// What is compared, with what, and how much of that it may cost.
type Comparison = (&'static str, &'static str, &'static str, Option<f64>);

/// A change of one region. A hundred times the regions are 2.8 times the logarithm; a hundred changes
/// are compared with one rebuild, so that a change is a hundredth of the ratio.
const MAPS: &[Comparison] = &[
    ("one region of 10 changed / the same (noise)", "control", "few", None),
    ("one region changed: of 1000 / of 10", "many", "few", Some(2.8)),
    ("one region changed: of 1000 overlapping / of 10", "deep", "few", None),
    ("one of 1000 regions changed, 100 times / all, once", "many", "rebuild", Some(1.0)),
];

/// A slot added and deleted. On the processor, because waiting, which is the same for all, only makes
/// the ratios smaller, and is as long as whatever else runs wants it.
const SLOTS: &[Comparison] = &[
    ("slot beside 1, CPU: SlotManager / the same (noise)", "control-cpu", "slot-one-cpu", None),
    ("SlotManager, CPU: beside 1000 / beside 1", "slot-many-cpu", "slot-one-cpu", Some(1.2)),
    ("LiveMap, CPU: beside 1000 / beside 1", "map-many-cpu", "map-one-cpu", None),
    ("ioctl, CPU: beside 1000 / beside 1", "raw-many-cpu", "raw-one-cpu", None),
    ("slot beside 1000, CPU: SlotManager / ioctl", "slot-many-cpu", "raw-many-cpu", None),
    ("slot beside 1000, CPU: LiveMap / ioctl", "map-many-cpu", "raw-many-cpu", None),
    ("SlotManager, time: beside 1000 / beside 1", "slot-many", "slot-one", None),
    ("LiveMap, time: beside 1000 / beside 1", "map-many", "map-one", None),
];

/// Learning which pages were written.
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
    fn a_change_is_judged_against_few_regions_and_against_a_rebuild() {
        let few = "round: few=1000 control=9000 deep=9000";
        assert!(missed(&format!("{few} many=2800 rebuild=2800"), MAPS).is_empty());
        assert_eq!(
            missed(&format!("{few} many=2801 rebuild=2800"), MAPS),
            [
                "one region changed: of 1000 / of 10",
                "one of 1000 regions changed, 100 times / all, once"
            ]
        );
    }

    #[test]
    fn a_slot_is_judged_by_its_time_on_a_processor() {
        let waits = "slot-one=1 slot-many=9000 map-one=1 map-many=9000";
        let rest =
            "control-cpu=9000 raw-one-cpu=1 raw-many-cpu=9000 map-one-cpu=1 map-many-cpu=9000";
        let line = |many| format!("round: slot-one-cpu=1000 slot-many-cpu={many} {waits} {rest}");
        assert!(missed(&line(1200), SLOTS).is_empty());
        assert_eq!(missed(&line(1201), SLOTS), ["SlotManager, CPU: beside 1000 / beside 1"]);
    }

    #[test]
    fn a_harvest_is_judged_against_what_it_is_made_of() {
        let missed = |line: &str| missed(line, DIRTY).len();
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

    #[test]
    fn a_loop_the_benchmark_left_out_is_an_error() {
        let mut rounds = Rounds::default();
        rounds.take("round: one=1000 few=900").unwrap();
        assert!(judge(&rounds, MAPS).is_err());
        assert!(judge(&rounds, SLOTS).is_err());
    }
}
