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
pub use finding::{Finding, Status};

/// Everything `hv doctor` says.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    device: String,
    vms_can_run: bool,
    findings: Vec<Finding>,
}

/// Examines this host and the KVM that `open` opens; writes the report to `out`, as text with ANSI
/// styles (to be stripped by the stream where it is no terminal) or as JSON.
///
/// Returns [`ExitCode::Success`] if VMs can run, else [`ExitCode::Vmm`].
///
/// # Errors
/// Those of writing to `out`.
pub fn run<H: Hypervisor>(
    open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
    device: &DeviceChoice,
    json: bool,
    out: &mut dyn Write,
) -> io::Result<ExitCode> {
    let trial = trial::run(open, device, trial::TIME_LIMIT);
    let findings = diagnose::diagnose(&facts::gather(Path::new("/"), device, trial));
    let vms_can_run = findings.iter().all(|finding| finding.status != Status::Fail);
    let report = Report { schema: 1, device: device.to_string(), vms_can_run, findings };
    if json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
    } else {
        write_text(&report, out)?;
    }
    out.flush()?;
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
