//! Running other programs: shown or read line by line, never through a shell, and with errors
//! that name the command.
//!
//! A command with a time limit gets a process group of its own, so that a hardware test that
//! hangs ends together with the virtual machines it started.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, PipeReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;

/// How often a running command is looked at.
const TICK: Duration = Duration::from_millis(200);

/// Why a command did not do what it was run for.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("`{command}` could not be started: {source}")]
    Start { command: String, source: io::Error },
    #[error("waiting for `{command}` failed: {source}")]
    Wait { command: String, source: io::Error },
    #[error("`{command}` failed: {status}")]
    Failed { command: String, status: ExitStatus },
    #[error("`{command}` was stopped: it did not end within {} s", limit.as_secs())]
    TimeLimit { command: String, limit: Duration },
    #[error("`{command}` was stopped: interrupted")]
    Interrupted { command: String },
}

/// What a running command does.
pub(crate) enum Event<'a> {
    /// It printed a line.
    Line(&'a str),
    /// It is still running.
    Tick,
}

/// Which output of a command its reader gets; the rest goes where ours goes.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Read {
    Stdout,
    StdoutAndStderr,
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        let plain = !argument.is_empty() && !argument.contains([' ', '"', '\'', '$', '(', '*']);
        let _ = if plain { write!(line, " {argument}") } else { write!(line, " '{argument}'") };
    }
    line
}

/// Runs the command with its output where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<(), Error> {
    let status = status(command)?;
    check(command, status)
}

/// Runs the command with its output where ours goes, for its exit status.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus, Error> {
    command
        .stdin(Stdio::null())
        .status()
        .map_err(|source| Error::Start { command: shown(command), source })
}

/// Runs the command and hands over its output line by line while it runs, at most for `limit`.
pub(crate) fn stream(
    command: &mut Command,
    read: Read,
    limit: Option<Duration>,
    mut on: impl FnMut(Event<'_>),
) -> Result<(), Error> {
    let start = |source| Error::Start { command: shown(command), source };
    let group = limit.map(|limit| Limit::new(limit).map_err(start)).transpose()?;
    let (reader, writer) = io::pipe().map_err(start)?;
    if read == Read::StdoutAndStderr {
        let both = writer.try_clone().map_err(start)?;
        command.stderr(both);
    }
    if group.is_some() {
        command.process_group(0);
    }
    let child = command.stdin(Stdio::null()).stdout(writer).spawn();
    // The command holds copies of the pipe's write end, which would keep the reader waiting.
    command.stdout(Stdio::null()).stderr(Stdio::inherit());
    let mut child = child.map_err(|source| Error::Start { command: shown(command), source })?;

    match follow(&mut child, reader, group.as_ref(), &mut on) {
        Ok(status) => check(command, status),
        Err(End::TimeLimit(limit)) => Err(Error::TimeLimit { command: shown(command), limit }),
        Err(End::Interrupted) => Err(Error::Interrupted { command: shown(command) }),
        Err(End::Wait(source)) => Err(Error::Wait { command: shown(command), source }),
    }
}

/// Why a command was followed no longer.
enum End {
    TimeLimit(Duration),
    Interrupted,
    Wait(io::Error),
}

/// Follows the command until it has ended and its output is read.
fn follow(
    child: &mut Child,
    reader: PipeReader,
    limit: Option<&Limit>,
    on: &mut impl FnMut(Event<'_>),
) -> Result<ExitStatus, End> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let mut open = true;
    let mut ended = None;
    loop {
        if open {
            match lines.recv_timeout(TICK) {
                Ok(line) => on(Event::Line(&line)),
                Err(RecvTimeoutError::Timeout) => on(Event::Tick),
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
        }
        if ended.is_none() {
            ended = child.try_wait().map_err(End::Wait)?;
            if ended.is_some() && limit.is_some() {
                // What it left running would hold the pipe open.
                kill_group(child);
            }
        }
        match ended {
            Some(status) if !open => return Ok(status),
            None if !open => thread::sleep(TICK),
            _ => {}
        }
        if let Some(end) = limit.and_then(Limit::reached) {
            kill_group(child);
            child.wait().map_err(End::Wait)?;
            // What it printed last: a test that hangs has printed its name, without a line end.
            while let Ok(line) = lines.recv_timeout(TICK) {
                on(Event::Line(&line));
            }
            return Err(end);
        }
    }
}

/// Ends every process of the command's own group; none being left is what we want.
fn kill_group(child: &Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// Ends a command that runs too long, or that the terminal can no longer interrupt because it is
/// in a process group of its own.
struct Limit {
    duration: Duration,
    start: Instant,
    interrupted: Arc<AtomicBool>,
}

impl Limit {
    fn new(duration: Duration) -> io::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
        }
        Ok(Self { duration, start: Instant::now(), interrupted })
    }

    fn reached(&self) -> Option<End> {
        if self.interrupted.load(Ordering::Relaxed) {
            Some(End::Interrupted)
        } else if self.start.elapsed() > self.duration {
            Some(End::TimeLimit(self.duration))
        } else {
            None
        }
    }
}

fn check(command: &Command, status: ExitStatus) -> Result<(), Error> {
    if status.success() { Ok(()) } else { Err(Error::Failed { command: shown(command), status }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn lines(script: &str, read: Read) -> Vec<String> {
        let mut lines = Vec::new();
        stream(&mut sh(script), read, None, |event| {
            if let Event::Line(line) = event {
                lines.push(line.to_owned());
            }
        })
        .unwrap();
        lines
    }

    #[test]
    fn shows_the_command_as_typed() {
        assert_eq!(shown(Command::new("make").args(["-j2", "a b", ""])), "make -j2 'a b' ''");
    }

    #[test]
    fn every_line_arrives_even_one_that_is_not_ended() {
        assert_eq!(lines("echo a; printf 'b\\377\\nc'", Read::Stdout), ["a", "b\u{fffd}", "c"]);
    }

    #[test]
    fn stderr_is_read_only_when_asked_for() {
        let script = "echo a; exec 2>&1; exec >&-; echo b >&2";
        assert_eq!(lines(&format!("exec 2>/dev/null; echo b >&2; {script}"), Read::Stdout)[0], "a");
        assert_eq!(lines("echo a; echo b >&2", Read::StdoutAndStderr), ["a", "b"]);
    }

    #[test]
    fn a_failure_names_the_command_and_the_status() {
        let error = run(&mut sh("exit 3")).unwrap_err();
        assert_eq!(error.to_string(), "`sh -c 'exit 3'` failed: exit status: 3");
    }

    #[test]
    fn a_command_that_does_not_exist_is_named() {
        let error = run(&mut Command::new("/nonexistent/program")).unwrap_err();
        assert!(matches!(&error, Error::Start { command, .. } if command.contains("program")));
    }

    #[test]
    fn a_process_that_outlives_a_limited_command_does_not_keep_it_waiting() {
        let limit = Some(Duration::from_secs(600));
        let start = Instant::now();
        stream(&mut sh("sleep 1000 & true"), Read::Stdout, limit, |_| {}).unwrap();
        assert!(start.elapsed() < Duration::from_secs(300));
    }

    #[test]
    fn a_time_limit_ends_the_command_and_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script =
            format!("sleep 1000 & echo $! > {}; printf 'test hangs ... '; wait", pid.display());
        // Long enough that the file is there; the command would run for much longer.
        let limit = Some(Duration::from_secs(3));
        let mut last = String::new();
        let error = stream(&mut sh(&script), Read::Stdout, limit, |event| {
            if let Event::Line(line) = event {
                line.clone_into(&mut last);
            }
        });
        let error = error.unwrap_err();
        assert!(matches!(error, Error::TimeLimit { .. }), "{error}");
        assert_eq!(last, "test hangs ... ");
        let pid = std::fs::read_to_string(&pid).unwrap();
        // Killed: soon gone, or a zombie until its new parent has waited for it.
        let running = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        let start = Instant::now();
        while running() {
            assert!(start.elapsed() < Duration::from_secs(300), "sleep {pid} still runs");
            thread::sleep(TICK);
        }
    }
}
