//! `hv run`: from a configuration to the exit code, with everything the user is told on the way.

use std::fmt::Display;
use std::io::Write;

use anstyle::{AnsiColor, Style};
use hv_core::init::Consequence;
use hv_core::layer::Interceptor;
use hv_core::{DeviceChoice, Hypervisor, OpenError, Vm};

use crate::api::{self, Limits};
use crate::config::RunConfig;
use crate::console::{Console, Signals};
use crate::device;
use crate::exit_code::{ExitCode, StopReason};
use crate::gdb::{Listener, Server};
use crate::guest::Checks;
use crate::isolation::{self, Kind, Policy, Sandbox};
use crate::machine::host::HostFacts;
use crate::machine::{Machine, Outcome};
use crate::observe::Observers;
use crate::output;
use crate::socket::UnixSocket;
use crate::stats::Stats;

/// Who may wait to be accepted by the API.
const BACKLOG: i32 = 16;

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
    let policy = Policy { seccomp: config.seccomp, inspects_descriptors: config.record.is_some() };
    if let Err(error) = isolation::start(policy) {
        return fail(ExitCode::Vmm, &error);
    }
    let host = HostFacts::detect();
    let observers = match Observers::create(config, &host) {
        Ok(observers) => observers,
        Err(error) => return fail(ExitCode::Usage, &error),
    };
    // Each is a machine of its own, so that one that nobody observes does not pay for it.
    let code = match (observers.trace(), observers.record()) {
        (None, None) => run_on(device::open, config, &host, &mut signals, &observers),
        (Some(trace), None) => {
            let open = |choice: &DeviceChoice| Ok(trace.over(device::open(choice)?));
            run_on(open, config, &host, &mut signals, &observers)
        }
        (None, Some(record)) => {
            let open = |choice: &DeviceChoice| Ok(record.over(device::open(choice)?));
            run_on(open, config, &host, &mut signals, &observers)
        }
        (Some(trace), Some(record)) => {
            // The trace below, so that its durations are those of KVM.
            let open = |choice: &DeviceChoice| Ok(record.over(trace.over(device::open(choice)?)));
            run_on(open, config, &host, &mut signals, &observers)
        }
    };
    observers.finish().fold(code, |code, written| match written {
        Ok(text) => {
            say(format_args!("hv: {text}"));
            code
        }
        Err(error) => fail(ExitCode::Vmm, &error),
    })
}

/// Runs the machine on the hypervisor that `open` opens. When this returns, it is gone.
fn run_on<H>(
    open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
    config: &RunConfig,
    host: &HostFacts,
    signals: &mut Signals,
    observers: &Observers,
) -> u8
where
    H: Hypervisor,
    H::Vm: Send + Sync + 'static,
    <H::Vm as Vm>::Vcpu: 'static,
{
    let listener = match config.gdb.as_ref().map(|gdb| Listener::bind(&gdb.address)).transpose() {
        Ok(listener) => listener,
        Err(error) => return fail(ExitCode::Usage, &error),
    };
    let sandbox = match Sandbox::new(Kind::Main, &[]) {
        Ok(sandbox) => sandbox,
        Err(error) => return fail(ExitCode::Vmm, &error),
    };
    let api_socket = match config
        .api_socket
        .as_deref()
        .map(|path| UnixSocket::bind(path, BACKLOG))
        .transpose()
    {
        Ok(socket) => socket,
        Err(error) => return fail(ExitCode::Usage, &format_args!("--api-socket: {error}")),
    };
    let machine = match Machine::build(open, config, host) {
        Ok(machine) => machine,
        Err(error) if error.is_usage() => return fail(ExitCode::Usage, &error),
        Err(error) => return fail(ExitCode::Vmm, &error),
    };
    for consequence in &machine.record().consequences {
        if let Consequence::ManyVcpus { .. } = consequence {
            say(format_args!("hv: {WARNING}warning:{WARNING:#} {consequence}"));
        }
    }
    let mut api = match (api_socket, machine.control()) {
        (Some(socket), Some(control)) => {
            let path = output::printable(socket.path());
            match api::Server::start(socket, control, machine.stopper().clone(), Limits::default())
            {
                Ok(server) => {
                    say(format_args!("hv: the API is at {path}: hv ctl --socket {path} state"));
                    Some(server)
                }
                Err(error) => {
                    return fail(
                        ExitCode::Vmm,
                        &format_args!("can't start a thread for the API: {error}"),
                    );
                }
            }
        }
        _ => None,
    };
    let server = match listener.zip(machine.debugger()).map(|(listener, debugger)| {
        let address = listener.address().clone();
        Server::start(listener, debugger.clone()).map(|server| (server, address))
    }) {
        Some(Ok((server, address))) => {
            let waits = config.gdb.as_ref().is_some_and(|gdb| gdb.wait);
            let guest = if waits { "; the guest waits for it" } else { "" };
            say(format_args!("hv: gdb can connect with: target remote {address}{guest}"));
            Some(server)
        }
        Some(Err(error)) => {
            return fail(ExitCode::Vmm, &format_args!("can't start a thread for gdb: {error}"));
        }
        None => None,
    };
    let checks = machine.checks().cloned();
    let limit = machine.deadline();
    let serve = |console: &Console| {
        // Now every thread is there, with rules of its own, and every file is open.
        sandbox.enter_or_end();
        let result = console.serve(signals, limit, StopReason::ChecksFailed);
        // The API goes before the machine that it has shares of, and only when that has stopped.
        console.stopper.stop(StopReason::UserQuit);
        if let Some(api) = api.take() {
            api.join();
        }
        result
    };
    let result = machine.run(serve);
    if let Some(api) = api {
        api.join();
    }
    if let Some(server) = server {
        server.join();
    }
    let outcome = match result {
        Ok(outcome) => outcome,
        Err(error) => return fail(ExitCode::Vmm, &error),
    };
    report(&outcome);
    let code = match checks {
        Some(checks) => report_checks(&checks, &outcome, config.json),
        None => outcome.reason.exit_code(),
    };
    match observers.write_stats(&Stats::from(&outcome)) {
        Ok(()) => code,
        Err(error) => fail(ExitCode::Vmm, &error),
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

/// Tells how the run ended: what a crash left, what the virtio devices did, then one line.
fn report(outcome: &Outcome) {
    for crash in &outcome.crashes {
        say(crash);
    }
    if let Some(error) = &outcome.lost_memory {
        say(format_args!("hv: {ERROR}error:{ERROR:#} --memory-file {error}"));
    }
    for device in &outcome.devices {
        say(format_args!("hv: {device}"));
    }
    let style = match outcome.reason {
        StopReason::PowerOff | StopReason::Reset | StopReason::DebugExit { .. } => Style::new(),
        StopReason::UserQuit
        | StopReason::Killed
        | StopReason::Requested
        | StopReason::Signal(_) => WARNING,
        _ => ERROR,
    };
    say(format_args!("hv: {style}{}{style:#}; {}", outcome.reason, outcome.summary()));
}
