//! Running the cases, and saying how it went.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};

use super::{Case, Kernels, Miss, Platform, cases};

/// How a case went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The platform follows the rule.
    Pass,
    /// It does not; what it did instead.
    Fail(String),
    /// It can't be asked; why.
    NotApplicable(String),
}

/// A case that was run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The case's name.
    pub name: &'static str,
    /// The rule in a sentence.
    pub rule: &'static str,
    /// The kernels it is known for.
    pub kernels: Kernels,
    /// How it went.
    pub outcome: Outcome,
}

/// What became of all cases. It shows one line per case, in the same order on every platform, then
/// the totals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What was judged.
    pub platform: String,
    /// The cases.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether no case failed and at least one passed.
    #[must_use]
    pub fn conforms(&self) -> bool {
        self.count(|outcome| matches!(outcome, Outcome::Fail(_))) == 0
            && self.count(|outcome| *outcome == Outcome::Pass) > 0
    }

    fn count(&self, is: impl Fn(&Outcome) -> bool) -> usize {
        self.rows.iter().filter(|row| is(&row.outcome)).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Row { name, rule, kernels, outcome } in &self.rows {
            match outcome {
                Outcome::Pass => write!(f, "pass  {name}")?,
                Outcome::Fail(what) => write!(f, "FAIL  {name}: {what}\n      rule: {rule}")?,
                Outcome::NotApplicable(why) => write!(f, "n/a   {name}: {why}")?,
            }
            match kernels {
                Kernels::All => writeln!(f)?,
                kernels => writeln!(f, " [{kernels}]")?,
            }
        }
        let passed = self.count(|outcome| *outcome == Outcome::Pass);
        let failed = self.count(|outcome| matches!(outcome, Outcome::Fail(_)));
        write!(
            f,
            "{} cases on {}: {passed} passed, {failed} failed, {} not applicable",
            self.rows.len(),
            self.platform,
            self.rows.len() - passed - failed
        )
    }
}

/// Runs every case whose name contains `filter`.
pub fn run<P: Platform>(platform: &P, filter: &str) -> Report {
    let cases = cases::<P>().into_iter().filter(|case| case.name.contains(filter));
    let rows = cases.map(|case| judge(platform, &case)).collect();
    Report { platform: platform.name(), rows }
}

fn judge<P: Platform>(platform: &P, case: &Case<P>) -> Row {
    let Case { name, rule, kernels, ref check } = *case;
    let outcome = if kernels.include(platform.kernel()) {
        // A panic of the implementation under test must not hide the other cases.
        match panic::catch_unwind(AssertUnwindSafe(|| check(platform))) {
            Ok(Ok(())) => Outcome::Pass,
            Ok(Err(Miss::Failed(what))) => Outcome::Fail(what),
            Ok(Err(Miss::NotApplicable(why))) => Outcome::NotApplicable(why),
            Err(_) => Outcome::Fail("panicked; the message is on standard error".into()),
        }
    } else {
        Outcome::NotApplicable(format!("not a rule of this kernel: {kernels}"))
    };
    Row { name, rule, kernels, outcome }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: &[Outcome]) -> Report {
        let row = |outcome: &Outcome| Row {
            name: "a-case",
            rule: "A rule.",
            kernels: Kernels::All,
            outcome: outcome.clone(),
        };
        Report { platform: "nothing".into(), rows: outcomes.iter().map(row).collect() }
    }

    #[test]
    fn one_failure_or_no_pass_does_not_conform() {
        let na = Outcome::NotApplicable("no such thing".into());
        assert!(report(&[Outcome::Pass, na.clone()]).conforms());
        assert!(!report(&[Outcome::Pass, Outcome::Fail("why".into())]).conforms());
        assert!(!report(&[na]).conforms());
        assert!(!report(&[]).conforms());
    }

    #[test]
    fn every_case_is_a_line_and_the_totals_add_up() {
        let outcomes =
            [Outcome::Pass, Outcome::NotApplicable("why".into()), Outcome::Fail("what".into())];
        let text = report(&outcomes).to_string();
        assert!(text.contains("pass  a-case\nn/a   a-case: why\nFAIL  a-case: what\n"), "{text}");
        assert!(
            text.ends_with("3 cases on nothing: 1 passed, 1 failed, 1 not applicable"),
            "{text}"
        );
    }
}
