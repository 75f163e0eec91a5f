//! `cargo xtask bench traits`: what the traits of hv-core, and layers over them, cost a run loop.

use super::callgrind;
use super::paired::{self, Rounds};
use super::table::Row;
use super::{Error, executable, measure};
use crate::workspace::KVM_TESTS;

/// So many times the run loops are compared with new VMs: some seconds.
const SERIES: u32 = 30;

/// Runs both benchmarks.
pub(crate) fn run() -> Result<Vec<Row>, Error> {
    let mut rows = instructions()?;
    rows.extend(times()?);
    Ok(rows)
}

/// Loops over a stub, in instructions.
fn instructions() -> Result<Vec<Row>, Error> {
    callgrind::ensure()?;
    let program = executable("hv-core", "stub_loop", &[])?;
    let direct = callgrind::instructions_per_turn(&program, "direct")?;
    let traits = callgrind::instructions_per_turn(&program, "traits")?;
    let layer = callgrind::instructions_per_turn(&program, "layer")?;
    anstream::println!(
        "stub_loop: {direct:.2} instructions per exit directly, {traits:.2} through the traits, \
         {layer:.2} through a layer that does nothing"
    );
    let row = |what, ratio, target| Row { what, ratio, spread: None, target };
    Ok(vec![
        row("stub, instructions: traits / direct", traits / direct, Some(1.02)),
        row("stub, instructions: empty layer / traits", layer / traits, None),
    ])
}

/// Loops over KVM, in time.
fn times() -> Result<Vec<Row>, Error> {
    let program = executable("hv-kvm", "run_loop", &[KVM_TESTS])?;
    let rounds = measure(&program, SERIES)?;
    anstream::println!("run_loop: {} rounds", rounds.len());
    Ok(judge(&rounds)?)
}

/// What is compared with what, and how much more it may cost.
fn judge(rounds: &Rounds) -> Result<Vec<Row>, paired::Error> {
    [
        ("KVM, time: raw ioctl / the same (noise)", "control", "raw", None),
        ("KVM, time: traits / raw ioctl", "traits", "raw", Some(1.02)),
        ("KVM, time: empty layer / traits", "layer", "traits", None),
        ("KVM, time: Trace / traits", "trace", "traits", Some(1.05)),
        ("KVM, time: Trace with JSON lines / traits", "json", "traits", None),
    ]
    .into_iter()
    .map(|(what, measured, base, target)| {
        let (ratio, spread) = rounds.ratio(measured, base)?;
        Ok(Row { what, ratio, spread: Some(spread), target })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traits_are_judged_against_the_raw_loop_and_trace_against_the_traits() {
        let missed = |line| {
            let mut rounds = Rounds::default();
            rounds.take(line).unwrap();
            let rows = judge(&rounds).unwrap();
            rows.iter().filter(|row| row.is_missed()).map(|row| row.what).collect::<Vec<_>>()
        };
        assert_eq!(
            missed(
                "round: exits=64 raw=1000 control=1100 traits=1021 layer=9000 trace=1072 json=1"
            ),
            ["KVM, time: traits / raw ioctl"]
        );
        assert_eq!(
            missed(
                "round: exits=64 raw=1000 control=1100 traits=1020 layer=9000 trace=1072 json=1"
            ),
            ["KVM, time: Trace / traits"]
        );
    }

    #[test]
    fn a_loop_the_benchmark_left_out_is_an_error() {
        let mut rounds = Rounds::default();
        rounds.take("round: raw=1000 control=1000").unwrap();
        assert!(judge(&rounds).is_err());
    }
}
