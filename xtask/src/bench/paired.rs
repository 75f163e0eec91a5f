//! Comparing loops that took turns in short rounds: the median of the ratios of each round.
//!
//! What else a machine does hits whoever runs at that moment, for longer than a round. The loops of
//! one round share it, and a round in which only one was hit is one of many.

use std::collections::BTreeMap;

use thiserror::Error;

/// What a benchmark prints that is not what is expected of it.
#[derive(Debug, Error, PartialEq)]
pub(crate) enum Error {
    #[error("the benchmark printed `{0}`, which is not `round: NAME=NANOSECONDS ...`")]
    Malformed(String),
    #[error("the benchmark has no round with both {measured} and {base}")]
    Nothing { measured: &'static str, base: &'static str },
}

/// The quartiles: half of the rounds lie between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// The rounds of a benchmark.
#[derive(Debug, Default)]
pub(crate) struct Rounds(Vec<BTreeMap<String, f64>>);

impl Rounds {
    /// Takes a line of the benchmark's output; other lines than those of rounds are none of ours.
    pub(crate) fn take(&mut self, line: &str) -> Result<(), Error> {
        let Some(columns) = line.strip_prefix("round: ") else { return Ok(()) };
        let malformed = || Error::Malformed(line.to_owned());
        let mut round = BTreeMap::new();
        for column in columns.split(' ') {
            let (name, value) = column.split_once('=').ok_or_else(malformed)?;
            let value: u32 = value.parse().map_err(|_| malformed())?;
            if value == 0 || round.insert(name.to_owned(), f64::from(value)).is_some() {
                return Err(malformed());
            }
        }
        self.0.push(round);
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// `measured` over `base` in each round: the median and how far half of the rounds spread.
    pub(crate) fn ratio(
        &self,
        measured: &'static str,
        base: &'static str,
    ) -> Result<(f64, Spread), Error> {
        let ratio = |round: &BTreeMap<String, f64>| Some(round.get(measured)? / round.get(base)?);
        let mut ratios: Vec<f64> = self.0.iter().filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let quantile = |quarters| quantile(&ratios, quarters);
        match (quantile(1), quantile(2), quantile(3)) {
            (Some(low), Some(median), Some(high)) => Ok((median, Spread { low, high })),
            _ => Err(Error::Nothing { measured, base }),
        }
    }
}

/// The value below which so many quarters of them lie.
fn quantile(sorted: &[f64], quarters: usize) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(last * quarters / 4).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(lines: &[&str]) -> Rounds {
        let mut rounds = Rounds::default();
        lines.iter().for_each(|line| rounds.take(line).unwrap());
        rounds
    }

    #[test]
    fn a_round_that_something_else_hit_does_not_count() {
        let rounds = rounds(&[
            "round: raw=100 traits=101",
            "Benchmarking run_loop/raw",
            "round: raw=200 traits=204",
            "round: raw=100 traits=9000",
            "round: raw=5000 traits=100",
            "round: raw=100 traits=103",
        ]);
        assert_eq!(rounds.len(), 5);
        let (median, spread) = rounds.ratio("traits", "raw").unwrap();
        assert_eq!((median, spread), (1.02, Spread { low: 1.01, high: 1.03 }));
    }

    #[test]
    fn a_loop_that_was_not_measured_is_named() {
        let rounds = rounds(&["round: raw=100"]);
        let error = rounds.ratio("traits", "raw").unwrap_err();
        assert_eq!(error, Error::Nothing { measured: "traits", base: "raw" });
        assert!(Rounds::default().ratio("raw", "raw").is_err());
    }

    #[test]
    fn a_line_that_is_no_round_is_shown() {
        for line in ["round: ", "round: raw", "round: raw=-1", "round: raw=0", "round: a=1 a=2"] {
            let error = Rounds::default().take(line).unwrap_err();
            assert_eq!(error, Error::Malformed(line.to_owned()));
        }
    }
}
