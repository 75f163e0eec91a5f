//! One thing found out about the host.

use serde::Serialize;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// VMs run, or would, but not as well as they could.
    Warn,
    /// VMs can't run because of this.
    Fail,
}

impl Status {
    /// `"ok"`, `"warn"` or `"fail"`, as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// One thing found out about the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; a stable name.
    pub check: &'static str,
    /// How good it is.
    pub status: Status,
    /// What was found: one line.
    pub summary: String,
    /// What to do: one line; always there unless the status is [`Status::Ok`].
    pub remedy: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, summary: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, summary: summary.into(), remedy: None }
    }

    pub(super) fn warn(
        check: &'static str,
        summary: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let remedy = Some(remedy.into());
        Self { check, status: Status::Warn, summary: summary.into(), remedy }
    }

    pub(super) fn fail(
        check: &'static str,
        summary: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { status: Status::Fail, ..Self::warn(check, summary, remedy) }
    }
}
