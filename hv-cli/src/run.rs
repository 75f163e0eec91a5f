//! `hv run`: from a configuration to the exit code, with everything the user is told on the way.

use std::fmt::Display;
use std::io::Write;

use anstyle::{AnsiColor, Style};
use hv_core::init::Consequence;

use crate::config::RunConfig;
use crate::console::{Console, Signals};
use crate::device;
use crate::exit_code::{ExitCode, StopReason};
use crate::guest::Checks;
use crate::machine::host::HostFacts;
use crate::machine::{Machine, Outcome};
use crate::output;

const ERROR: Style = AnsiColor::Red.on_default().bold();
const WARNING: Style = AnsiColor::Yellow.on_default().bold();

/// Says something on the standard error. If that can't be written to, there is nobody to tell.
fn say(text: impl Display) {
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// Shows an error on one line and returns its exit code.
pub(crate) fn fail(code: ExitCode, error: &dyn Display) -> u8 {
    say(format_args!("hv: {ERROR}error:{ERROR:#} {error}"));
    code as u8
}

/// Runs the machine `config` describes on `/dev/kvm` and returns the exit code of the process.
pub fn run(config: &RunConfig) -> u8 {
    // Before the first thread, so that every thread has the same signals.
    let mut signals = match Signals::take() {
        Ok(signals) => signals,
        Err(error) => return fail(ExitCode::Vmm, &format_args!("signals: {error}")),
    };
    let machine = match Machine::build(device::open, config, &HostFacts::detect()) {
        Ok(machine) => machine,
        Err(error) if error.is_usage() => return fail(ExitCode::Usage, &error),
        Err(error) => return fail(ExitCode::Vmm, &error),
    };
    for consequence in &machine.record().consequences {
        if let Consequence::ManyVcpus { .. } = consequence {
            say(format_args!("hv: {WARNING}warning:{WARNING:#} {consequence}"));
        }
    }
    let checks = machine.checks().cloned();
    let limit = machine.deadline();
    let serve = |console: &Console| console.serve(&mut signals, limit, StopReason::ChecksFailed);
    let outcome = match machine.run(serve) {
        Ok(outcome) => outcome,
        Err(error) => return fail(ExitCode::Vmm, &error),
    };
    report(&outcome);
    match checks {
        Some(checks) => report_checks(&checks, &outcome, config.json),
        None => outcome.reason.exit_code(),
    }
}

/// Shows the results of the built-in guest and returns the exit code they make.
fn report_checks(checks: &Checks, outcome: &Outcome, json: bool) -> u8 {
    let report = checks.report();
    let mut out = anstream::stdout().lock();
    let written = if json { output::json(&report, &mut out) } else { report.write(&mut out) };
    if let Err(error) = output::finish(&mut out, written) {
        return fail(ExitCode::Vmm, &error);
    }
    match &outcome.reason {
        StopReason::PowerOff if !report.passed() => StopReason::ChecksFailed.exit_code(),
        reason => reason.exit_code(),
    }
}

/// Tells how the run ended: what a crash left, then one line.
fn report(outcome: &Outcome) {
    for crash in &outcome.crashes {
        say(crash);
    }
    let style = match outcome.reason {
        StopReason::PowerOff | StopReason::Reset | StopReason::DebugExit { .. } => Style::new(),
        StopReason::UserQuit | StopReason::Signal(_) => WARNING,
        _ => ERROR,
    };
    say(format_args!("hv: {style}{}{style:#}; {}", outcome.reason, outcome.summary()));
}
