//! `hv doctor`: why VMs can't run here, and what to do about it.
//!
//! Three parts that stay apart: `facts` looks at the host and judges nothing, `trial` makes a VM and
//! runs its vCPU, `diagnose` turns both into [`Finding`]s and looks at nothing.
//!
//! # JSON
//! ```json
//! {
//!   "schema": 1,
//!   "device": "/dev/kvm",
//!   "vms_can_run": false,
//!   "findings": [
//!     { "check": "device", "status": "fail", "summary": "...", "remedy": "..." }
//!   ]
//! }
//! ```
//! `check` is one of `virtualization`, `module`, `device`, `vm`, `memory`, `open-files`, `network`; `status`
//! is `ok`, `warn` or `fail`; `remedy` is null where nothing needs to be done. Fields may be added
//! to a schema, never changed or removed.

mod diagnose;
mod facts;
mod finding;
mod parse;
mod permission;
mod trial;

use std::io::{self, Write};
use std::path::Path;

use anstyle::{AnsiColor, Style};
use hv_core::{DeviceChoice, Hypervisor, OpenError};
use serde::Serialize;

use crate::exit_code::ExitCode;
use crate::output::{self, OutputError};
pub use finding::{Finding, Status};

/// Everything `hv doctor` says.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    device: String,
    vms_can_run: bool,
    findings: Vec<Finding>,
}

/// Examines this host and the KVM of `device`; writes the report to `out`, as text with ANSI styles
/// (to be stripped by the stream where it is no terminal) or as JSON.
///
/// Returns [`ExitCode::Success`] if VMs can run, else [`ExitCode::Vmm`].
///
/// # Errors
/// Those of writing to `out`.
pub fn run(
    device: &DeviceChoice,
    json: bool,
    out: &mut dyn Write,
) -> Result<ExitCode, OutputError> {
    examine(crate::device::open, device, json, out)
}

fn examine<H: Hypervisor>(
    open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
    device: &DeviceChoice,
    json: bool,
    out: &mut dyn Write,
) -> Result<ExitCode, OutputError> {
    let trial = trial::run(open, device, trial::TIME_LIMIT);
    let findings = diagnose::diagnose(&facts::gather(Path::new("/"), device, trial));
    let vms_can_run = findings.iter().all(|finding| finding.status != Status::Fail);
    let report = Report { schema: 1, device: device.to_string(), vms_can_run, findings };
    let written = if json { output::json(&report, out) } else { write_text(&report, out) };
    output::finish(out, written)?;
    Ok(if vms_can_run { ExitCode::Success } else { ExitCode::Vmm })
}

/// One line a finding, and one with what to do. They are not wrapped: commands are copied from
/// them.
fn write_text(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    for finding in &report.findings {
        let style = Style::new().bold().fg_color(Some(
            match finding.status {
                Status::Ok => AnsiColor::Green,
                Status::Warn => AnsiColor::Yellow,
                Status::Fail => AnsiColor::Red,
            }
            .into(),
        ));
        let (status, check) = (finding.status.name(), finding.check);
        writeln!(out, "{style}{status:<4}{style:#}  {check:<14}  {}", finding.summary)?;
        if let Some(remedy) = &finding.remedy {
            writeln!(out, "{:22}do: {remedy}", "")?;
        }
    }
    let bold = Style::new().bold();
    match report.vms_can_run {
        true => writeln!(out, "{bold}VMs can run here.{bold:#}"),
        false => writeln!(
            out,
            "{bold}VMs can't run here.{bold:#} Fix what is marked fail, from the top, then run this again."
        ),
    }
}

/// A device as it can be shown on a terminal and typed into a shell.
fn shown(device: &DeviceChoice) -> String {
    let text = device.to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:".contains(c);
    if text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace(|c: char| c.is_control() || c == '\'', "?"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::Errno;
    use hv_core::mock::MockHypervisor;

    fn examined(json: bool, out: &mut dyn Write) -> ExitCode {
        let open = |choice: &DeviceChoice| {
            Err::<MockHypervisor, _>(OpenError { choice: choice.clone(), errno: Errno::EBADF })
        };
        examine(open, &DeviceChoice::Fd(99), json, out).unwrap()
    }

    #[test]
    fn json_has_the_documented_fields() {
        let mut out = Vec::new();
        assert_eq!(examined(true, &mut out), ExitCode::Vmm);
        let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(report["schema"], 1);
        assert_eq!(report["device"], "fd:99");
        assert_eq!(report["vms_can_run"], false);
        let findings = report["findings"].as_array().unwrap();
        let device = findings.iter().find(|f| f["check"] == "device").unwrap();
        assert_eq!(device["status"], "fail");
        assert!(device["summary"].is_string() && device["remedy"].is_string());
        let memory = findings.iter().find(|f| f["check"] == "open-files").unwrap();
        assert_eq!(memory.as_object().unwrap().len(), 4);
    }

    #[test]
    fn text_is_a_line_a_finding_a_line_a_remedy_and_the_verdict() {
        let mut out = anstream::StripStream::new(Vec::new());
        examined(false, &mut out);
        let text = String::from_utf8(out.into_inner()).unwrap();
        let device = text.lines().position(|l| l.starts_with("fail  device  ")).unwrap();
        let remedy = text.lines().nth(device + 1).unwrap();
        assert!(remedy.trim_start().starts_with("do: "), "{text}");
        assert!(text.lines().last().unwrap().starts_with("VMs can't run here."), "{text}");
    }

    #[test]
    fn a_device_is_shown_so_that_it_can_be_printed_and_pasted() {
        let shown = |path: &str| super::shown(&DeviceChoice::Path(path.into()));
        assert_eq!(shown("/dev/kvm"), "/dev/kvm");
        assert_eq!(shown("/a b; $(x)"), "'/a b; $(x)'");
        assert_eq!(shown("/\x1b[2J'\n"), "'/?[2J??'");
    }
}
