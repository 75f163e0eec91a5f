//! Counting tests: the `test result:` lines that every Rust test binary prints.

use std::fmt;
use std::ops::AddAssign;

/// How many tests did what.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Tally {
    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`; anything else is not a result.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_verdict, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut tally = Self::default();
        for part in counts.split("; ") {
            match part.split_once(' ') {
                Some((n, "passed")) => tally.passed = n.parse().ok()?,
                Some((n, "failed")) => tally.failed = n.parse().ok()?,
                Some((n, "ignored")) => tally.ignored = n.parse().ok()?,
                _ => {}
            }
        }
        Some(tally)
    }

    /// How many ran.
    pub(crate) fn ran(self) -> u64 {
        self.passed.saturating_add(self.failed)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed = self.passed.saturating_add(other.passed);
        self.failed = self.failed.saturating_add(other.failed);
        self.ignored = self.ignored.saturating_add(other.ignored);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libtest_prints() {
        let ok = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; \
                  finished in 0.02s";
        assert_eq!(Tally::parse(ok), Some(Tally { passed: 12, failed: 0, ignored: 1 }));
        let failed = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered \
                      out; finished in 1.50s";
        assert_eq!(Tally::parse(failed), Some(Tally { passed: 1, failed: 2, ignored: 0 }));
    }

    #[test]
    fn other_lines_are_no_result() {
        for line in ["", "running 3 tests", "test a ... ok", "test result: ", "test result: ok"] {
            assert_eq!(Tally::parse(line), None, "{line}");
        }
    }

    #[test]
    fn adds_up() {
        let mut tally = Tally { passed: 1, failed: 2, ignored: 3 };
        tally += Tally { passed: 10, failed: 20, ignored: 30 };
        assert_eq!(tally, Tally { passed: 11, failed: 22, ignored: 33 });
        assert_eq!(tally.ran(), 33);
    }
}
