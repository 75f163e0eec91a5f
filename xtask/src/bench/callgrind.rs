//! Counting instructions with valgrind's callgrind: the same on a busy machine as on an idle one.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use thiserror::Error;

use crate::debian;
use crate::process::{self, Event, Read};

/// How long a program may run under valgrind.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Why instructions were not counted.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("instructions are counted with valgrind, and it does not run here: {0}")]
    Valgrind(#[from] debian::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error("`{0}` did not say how many instructions it counted")]
    NoCount(String),
    #[error("{program} {name}: {few} instructions for {FEW} turns, {many} for {MANY}")]
    NoLoop { program: String, name: String, few: u64, many: u64 },
}

/// Turns of a loop: what a process does besides is the same in both, and drops out.
const FEW: u64 = 100_000;
const MANY: u64 = 300_000;

/// Sees to it that valgrind is there.
pub(crate) fn ensure() -> Result<(), Error> {
    let version = Command::new("valgrind").arg("--version").output();
    if version.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    debian::ensure("bench", &["valgrind"], true)?;
    Ok(())
}

/// The instructions of one turn of the loop `name`, which `program NAME TURNS` runs.
pub(crate) fn instructions_per_turn(program: &Path, name: &str) -> Result<f64, Error> {
    let few = instructions(program, name, FEW)?;
    let many = instructions(program, name, MANY)?;
    per_turn(few, many).ok_or_else(|| Error::NoLoop {
        program: program.display().to_string(),
        name: name.to_owned(),
        few,
        many,
    })
}

/// At least one instruction per turn, or it was no loop.
fn per_turn(few: u64, many: u64) -> Option<f64> {
    let difference = many.checked_sub(few)?;
    let turns = MANY - FEW;
    (difference >= turns).then(|| difference as f64 / turns as f64)
}

/// The instructions of the whole process.
fn instructions(program: &Path, name: &str, turns: u64) -> Result<u64, Error> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    valgrind.arg(program).args([name, &turns.to_string()]);
    let mut counted = None;
    process::stream(&mut valgrind, Read::StdoutAndStderr, Some(LIMIT), |event| {
        if let Event::Line(line) = event {
            counted = counted.or_else(|| collected(line));
        }
    })?;
    counted.ok_or_else(|| Error::NoCount(process::shown(&valgrind)))
}

/// The number in `==PID== Collected : NUMBER`.
fn collected(line: &str) -> Option<u64> {
    let (_, number) = line.strip_prefix("==")?.split_once("== Collected : ")?;
    number.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_valgrind_says() {
        assert_eq!(collected("==31020== Collected : 7021265"), Some(7_021_265));
        assert_eq!(collected("==31020== I   refs:      7,021,265"), None);
        assert_eq!(collected("==31020== Collected : "), None);
        assert_eq!(collected("Collected : 12"), None);
    }

    #[test]
    fn a_loop_that_is_not_there_is_not_measured() {
        assert_eq!(per_turn(1_000_000, 7_000_000), Some(30.0));
        assert_eq!(per_turn(1_000_000, 1_000_100), None);
        assert_eq!(per_turn(1_000_100, 1_000_000), None);
    }
}
