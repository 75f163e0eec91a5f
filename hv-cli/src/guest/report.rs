//! The results, for people and for programs.

use std::fmt::Display;
use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use serde::Serialize;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// The guest and the host both saw what had to be.
    Passed,
    /// They did not, or the check did not finish.
    Failed,
    /// This machine has not got what the check is about.
    NotApplicable,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckResult {
    /// Its name, which does not change between versions.
    pub name: &'static str,
    /// How it ended.
    pub status: Status,
    /// What was observed, or why it is not applicable.
    pub observed: String,
}

/// The results of a run: one for every check, in the order they run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checks.
    pub checks: Vec<CheckResult>,
    /// What the guest did that no check accounts for; nothing, if all is well.
    pub problem: Option<String>,
}

impl Report {
    /// Whether everything applicable passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.problem.is_none() && self.checks.iter().all(|check| check.status != Status::Failed)
    }

    /// How many checks ended so.
    #[must_use]
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    /// Writes a line a check and a summary, with colours as ANSI escapes: give it a writer that
    /// strips them where they are not wanted.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for CheckResult { name, status, observed } in &self.checks {
            let (label, colour) = match status {
                Status::Passed => ("ok  ", AnsiColor::Green),
                Status::Failed => ("FAIL", AnsiColor::Red),
                Status::NotApplicable => ("n/a ", AnsiColor::Yellow),
            };
            let label = styled(label, Style::new().fg_color(Some(colour.into())).bold());
            writeln!(to, "{label}  {name:width$}  {observed}")?;
        }
        if let Some(problem) = &self.problem {
            let red = Style::new().fg_color(Some(AnsiColor::Red.into())).bold();
            writeln!(to, "{}  {problem}", styled("FAIL", red))?;
        }
        let [passed, failed, not_applicable] =
            [Status::Passed, Status::Failed, Status::NotApplicable].map(|s| self.count(s));
        writeln!(to, "{passed} passed, {failed} failed, {not_applicable} not applicable")
    }
}

fn styled(text: impl Display, style: Style) -> impl Display {
    format!("{style}{text}{style:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &'static str, status: Status) -> CheckResult {
        CheckResult { name, status, observed: format!("saw {name}") }
    }

    fn text(report: &Report) -> String {
        let mut stripped = anstream::StripStream::new(Vec::new());
        report.write(&mut stripped).unwrap();
        String::from_utf8(stripped.into_inner()).unwrap()
    }

    #[test]
    fn a_line_a_check_and_a_summary() {
        let report = Report {
            checks: vec![
                result("one", Status::Passed),
                result("three", Status::Failed),
                result("four", Status::NotApplicable),
            ],
            problem: None,
        };
        assert_eq!(
            text(&report),
            "ok    one    saw one\n\
             FAIL  three  saw three\n\
             n/a   four   saw four\n\
             1 passed, 1 failed, 1 not applicable\n"
        );
        assert!(!report.passed());
    }

    #[test]
    fn not_applicable_does_not_fail_a_run_but_a_problem_does() {
        let checks = vec![result("one", Status::Passed), result("two", Status::NotApplicable)];
        let mut report = Report { checks, problem: None };
        assert!(report.passed());
        report.problem = Some("the guest began check 77".into());
        assert!(!report.passed());
        assert!(text(&report).contains("FAIL  the guest began check 77\n"));
    }

    #[test]
    fn programs_read_the_same() {
        let report = Report { checks: vec![result("x", Status::NotApplicable)], problem: None };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"checks":[{"name":"x","status":"not-applicable","observed":"saw x"}],"problem":null}"#
        );
    }
}
