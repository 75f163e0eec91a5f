//! A rule, and how it is checked.

use std::fmt;

use super::Platform;
use crate::Error;

/// Why a case did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// The implementation does something else; what.
    Failed(String),
    /// The platform can't be asked; why.
    NotApplicable(String),
}

impl Miss {
    /// A failure.
    pub fn failed(what: impl fmt::Display) -> Self {
        Miss::Failed(what.to_string())
    }

    /// The case can't be asked here.
    pub fn not_applicable(why: impl fmt::Display) -> Self {
        Miss::NotApplicable(why.to_string())
    }

    /// The same, saying during what; for failures.
    #[must_use]
    pub fn during(self, what: impl fmt::Display) -> Self {
        match self {
            Miss::Failed(why) => Miss::Failed(format!("{what}: {why}")),
            other => other,
        }
    }
}

impl From<Error> for Miss {
    /// A call that had to succeed failed.
    fn from(error: Error) -> Self {
        Miss::failed(error)
    }
}

/// What a check comes to.
pub type Checked<T = ()> = Result<T, Miss>;

/// The kernels a rule is known for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Every kernel that was looked at says the same.
    All,
    /// From this version on, `(major, minor)`; what it was before.
    Since(u32, u32, &'static str),
    /// Before this version, `(major, minor)`; what it is since.
    Before(u32, u32, &'static str),
    /// Not promised by anything: another version may say something else. Where it was seen.
    Measured(&'static str),
}

impl Kernels {
    /// Whether the rule is known for a kernel; `None` stands for the newest.
    #[must_use]
    pub fn include(&self, kernel: Option<(u32, u32)>) -> bool {
        match *self {
            Kernels::All | Kernels::Measured(_) => true,
            Kernels::Since(major, minor, _) => kernel.is_none_or(|k| k >= (major, minor)),
            Kernels::Before(major, minor, _) => kernel.is_some_and(|k| k < (major, minor)),
        }
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kernels::All => f.write_str("all kernels"),
            Kernels::Since(major, minor, before) => {
                write!(f, "since Linux {major}.{minor}; before: {before}")
            }
            Kernels::Before(major, minor, since) => {
                write!(f, "before Linux {major}.{minor}; since: {since}")
            }
            Kernels::Measured(on) => write!(f, "measured on {on}"),
        }
    }
}

/// How a case is checked.
pub(super) type Check<P> = Box<dyn Fn(&P) -> Checked>;

/// One rule.
pub struct Case<P: Platform> {
    /// Its name, unique, in words joined by `-`.
    pub name: &'static str,
    /// The rule in a sentence.
    pub rule: &'static str,
    /// The kernels it is known for.
    pub kernels: Kernels,
    pub(super) check: Check<P>,
}

impl<P: Platform> Case<P> {
    /// A rule for all kernels.
    pub(super) fn new(
        name: &'static str,
        rule: &'static str,
        check: impl Fn(&P) -> Checked + 'static,
    ) -> Self {
        Self { name, rule, kernels: Kernels::All, check: Box::new(check) }
    }

    /// The same for some kernels.
    pub(super) fn kernels(self, kernels: Kernels) -> Self {
        Self { kernels, ..self }
    }
}

impl<P: Platform> fmt::Debug for Case<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case")
            .field("name", &self.name)
            .field("rule", &self.rule)
            .field("kernels", &self.kernels)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_holds_from_or_up_to_a_version() {
        let since = Kernels::Since(6, 1, "EINVAL");
        assert!(since.include(Some((6, 1))) && since.include(Some((7, 0))) && since.include(None));
        assert!(!since.include(Some((5, 19))));
        let before = Kernels::Before(6, 1, "EEXIST");
        assert!(before.include(Some((6, 0))));
        assert!(!before.include(Some((6, 1))) && !before.include(None));
    }
}
