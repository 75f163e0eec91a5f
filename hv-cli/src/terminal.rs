//! The terminal as a guest's serial console: raw mode for as long as a value lives, and the escape
//! key that still reaches `hv`.
//!
//! A terminal left raw is a broken shell, so what was changed here is undone by a destructor: it
//! runs on a return, an error and a panic. Signals that end the process must therefore be taken by
//! the main loop, which then returns; `process::exit` must not be called while a [`RawMode`] lives.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use hv_core::Errno;
use rustix::io::retry_on_intr;
use rustix::process::{Signal, getpgrp};
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};
use vmm_sys_util::signal::{block_signal, unblock_signal};

/// The escape key, Ctrl-A.
const ESCAPE: u8 = 0x01;

/// The keys that `hv` keeps for itself, for people.
pub const KEYS_HELP: &str = "
Ctrl-A x       end the VM
Ctrl-A h       show this
Ctrl-A a       send one Ctrl-A to the guest (also Ctrl-A Ctrl-A)
Everything else goes to the guest, Ctrl-C and Ctrl-Z too.
";

/// The terminal can't be used as a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TerminalError {
    /// `tcgetattr(3)` failed.
    #[error("the terminal's mode can't be read: tcgetattr failed: {0}")]
    Read(Errno),
    /// `tcsetattr(3)` failed.
    #[error("the terminal can't be put into raw mode: tcsetattr failed: {0}")]
    Set(Errno),
}

/// A terminal in raw mode: every key is input, unechoed and at once, and none makes a signal.
/// Dropping it restores the mode found.
///
/// Output processing stays on, so that what `hv` prints does not become a staircase.
///
/// A terminal that another process group is using is left alone until [`RawMode::resume`]; no
/// call stops the process for being in the background.
#[derive(Debug)]
pub struct RawMode<F: AsFd> {
    terminal: F,
    /// The mode to restore; `None` while nothing was changed.
    found: Option<Termios>,
}

/// The mode that a terminal had first, for [`restore`].
static FIRST_FOUND: OnceLock<Termios> = OnceLock::new();

/// Restores the mode that the terminal had before any [`RawMode`], for a process that ends without
/// destructors. Takes no lock and allocates nothing, so a signal handler may call it.
pub(crate) fn restore() {
    if let Some(found) = FIRST_FOUND.get()
        && in_foreground(rustix::stdio::stdin())
    {
        // A terminal that was hung up has no mode to restore.
        let _ = set(rustix::stdio::stdin(), found);
    }
}

impl<F: AsFd> RawMode<F> {
    /// Puts `terminal` into raw mode; `None` if it is not a terminal.
    ///
    /// # Errors
    /// A terminal whose mode can't be read or set.
    pub fn enter(terminal: F) -> Result<Option<Self>, TerminalError> {
        if !isatty(&terminal) {
            return Ok(None);
        }
        let mut raw = Self { terminal, found: None };
        raw.resume()?;
        Ok(Some(raw))
    }

    /// Puts the terminal into raw mode again: to be called after `SIGCONT`, since the shell used
    /// the terminal while the process was stopped, or the process started in the background.
    ///
    /// # Errors
    /// A terminal whose mode can't be read or set.
    pub fn resume(&mut self) -> Result<(), TerminalError> {
        if !in_foreground(&self.terminal) {
            return Ok(());
        }
        let current = retry_on_intr(|| tcgetattr(&self.terminal))
            .map_err(|e| TerminalError::Read(errno(e)))?;
        let mut raw = current.clone();
        raw.make_raw();
        raw.output_modes |= current.output_modes & OutputModes::OPOST;
        if self.found.is_some() && same_modes(&raw, &current) {
            return Ok(()); // The shell gave us our own mode back: `found` is still the one to restore.
        }
        FIRST_FOUND.get_or_init(|| current.clone());
        set(&self.terminal, &raw).map_err(TerminalError::Set)?;
        self.found = Some(current);
        Ok(())
    }
}

impl<F: AsFd> Drop for RawMode<F> {
    fn drop(&mut self) {
        if let Some(found) = &self.found
            && in_foreground(&self.terminal)
        {
            // A terminal that was hung up has no mode to restore.
            let _ = set(&self.terminal, found);
        }
    }
}

/// Whether this process may use `terminal`: false in the background, where reading it or setting
/// its mode stops the process.
pub fn in_foreground(terminal: impl AsFd) -> bool {
    // An error means there is no job control on it: not our controlling terminal, or its
    // foreground group is not visible from this PID namespace.
    tcgetpgrp(terminal).map_or(true, |group| group == getpgrp())
}

/// `tcsetattr` at once. The answer of [`in_foreground`] may be outdated by the time of the call;
/// with SIGTTOU blocked, the call goes through instead of stopping the process.
fn set(terminal: impl AsFd, mode: &Termios) -> Result<(), Errno> {
    let signal = Signal::TTOU.as_raw();
    let blocked_here = block_signal(signal).is_ok();
    let result = retry_on_intr(|| tcsetattr(&terminal, OptionalActions::Now, mode));
    if blocked_here {
        // Only fails for a number that is no signal.
        let _ = unblock_signal(signal);
    }
    result.map_err(errno)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}

/// Whether two modes are the same where raw mode differs from others.
fn same_modes(a: &Termios, b: &Termios) -> bool {
    a.input_modes == b.input_modes
        && a.output_modes == b.output_modes
        && a.local_modes == b.local_modes
        && a.control_modes == b.control_modes
}

/// What the user asked of `hv` itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// End the VM (Ctrl-A x).
    Quit,
    /// Show [`KEYS_HELP`] (Ctrl-A h).
    Help,
}

/// Takes the keys meant for `hv` out of what is typed.
///
/// Ctrl-A followed by a key that means nothing goes to the guest with that key, so that Ctrl-A can
/// still be used in a guest's shell.
///
/// ```
/// use hv_cli::terminal::{Action, EscapeParser};
/// let mut parser = EscapeParser::default();
/// let mut guest = Vec::new();
/// let actions: Vec<_> = b"ls\n\x01x".iter().filter_map(|&b| parser.push(b, &mut guest)).collect();
/// assert_eq!((guest.as_slice(), actions), (b"ls\n".as_slice(), vec![Action::Quit]));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EscapeParser {
    escaped: bool,
}

impl EscapeParser {
    /// Takes one byte of input; adds what the guest gets (0 to 2 bytes) to `guest`.
    pub fn push(&mut self, byte: u8, guest: &mut Vec<u8>) -> Option<Action> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => self.escaped = true,
            (false, _) => guest.push(byte),
            (true, b'x') => return Some(Action::Quit),
            (true, b'h') => return Some(Action::Help),
            (true, b'a' | ESCAPE) => guest.push(ESCAPE),
            (true, _) => guest.extend([ESCAPE, byte]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, WaitOptions, WaitStatus, ioctl_tiocsctty, setsid, waitpid};
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;
    use std::os::fd::OwnedFd;
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    fn parse(input: &[u8]) -> (Vec<u8>, Vec<Action>) {
        let mut parser = EscapeParser::default();
        let mut guest = Vec::new();
        let actions = input.iter().filter_map(|&b| parser.push(b, &mut guest)).collect();
        (guest, actions)
    }

    #[test]
    fn every_byte_but_the_escape_goes_to_the_guest() {
        let all: Vec<u8> = (0..=255).filter(|&b| b != ESCAPE).collect();
        assert_eq!(parse(&all), (all, vec![]));
    }

    #[test]
    fn the_escape_key_quits_and_helps() {
        assert_eq!(parse(b"ab\x01xcd"), (b"abcd".to_vec(), vec![Action::Quit]));
        assert_eq!(parse(b"\x01h\x01x"), (vec![], vec![Action::Help, Action::Quit]));
        assert_eq!(parse(b"xh"), (b"xh".to_vec(), vec![]), "only after the escape");
    }

    #[test]
    fn the_escape_key_can_be_sent() {
        assert_eq!(parse(b"\x01a"), (b"\x01".to_vec(), vec![]));
        assert_eq!(parse(b"\x01\x01"), (b"\x01".to_vec(), vec![]));
        assert_eq!(parse(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]), "the second one is no escape");
        assert_eq!(parse(b"\x01\x01\x01x"), (b"\x01".to_vec(), vec![Action::Quit]));
    }

    #[test]
    fn an_unknown_key_after_the_escape_goes_through_with_it() {
        assert_eq!(parse(b"\x01b"), (b"\x01b".to_vec(), vec![]));
        assert_eq!(parse(b"\x01\0"), (b"\x01\0".to_vec(), vec![]));
    }

    #[test]
    fn a_lone_escape_waits_across_reads() {
        let mut parser = EscapeParser::default();
        let mut guest = Vec::new();
        assert_eq!(parser.push(ESCAPE, &mut guest), None);
        assert!(guest.is_empty());
        assert_eq!(parser.push(b'x', &mut guest), Some(Action::Quit));
        assert_eq!(parser, EscapeParser::default());
    }

    fn pty() -> (OwnedFd, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
        (controller, terminal)
    }

    fn is_raw(terminal: &OwnedFd) -> bool {
        let mode = tcgetattr(terminal).unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(mode.output_modes.contains(OutputModes::OPOST), "output processing was lost");
        !mode.local_modes.intersects(cooked)
    }

    #[test]
    fn raw_until_dropped_then_exactly_as_found() {
        let (_controller, terminal) = pty();
        let found = tcgetattr(&terminal).unwrap();
        let raw = RawMode::enter(&terminal).unwrap().unwrap();
        assert!(is_raw(&terminal));
        drop(raw);
        assert!(same_modes(&found, &tcgetattr(&terminal).unwrap()));
        assert!(!is_raw(&terminal));
    }

    #[test]
    fn restored_by_a_panic() {
        let (_controller, terminal) = pty();
        let result = std::panic::catch_unwind(|| {
            let _raw = RawMode::enter(&terminal).unwrap().unwrap();
            assert!(is_raw(&terminal));
            std::panic::resume_unwind(Box::new("a panic"));
        });
        assert!(result.is_err());
        assert!(!is_raw(&terminal));
    }

    #[test]
    fn resuming_sets_raw_mode_again_and_still_restores() {
        let (_controller, terminal) = pty();
        let found = tcgetattr(&terminal).unwrap();
        let mut raw = RawMode::enter(&terminal).unwrap().unwrap();
        raw.resume().unwrap();
        assert!(is_raw(&terminal));
        // What a shell does when its job stops.
        tcsetattr(&terminal, OptionalActions::Now, &found).unwrap();
        raw.resume().unwrap();
        assert!(is_raw(&terminal));
        drop(raw);
        assert!(same_modes(&found, &tcgetattr(&terminal).unwrap()));
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(RawMode::enter(&null).unwrap().is_none());
    }

    #[test]
    fn a_terminal_that_hung_up_is_dropped_quietly() {
        let (controller, terminal) = pty();
        let raw = RawMode::enter(&terminal).unwrap();
        drop(controller);
        drop(raw);
    }

    /// Which process of the job-control tests below this one is.
    const ROLE: &str = "HV_TEST_TERMINAL_ROLE";

    /// This test again in another process, with `terminal` as its standard input.
    fn rerun(test: &str, role: &str, terminal: impl Into<Stdio>) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("terminal::tests::{test}")]);
        command.env(ROLE, role).stdin(terminal).stdout(Stdio::null());
        command
    }

    /// Whether the process was stopped; if so it is killed.
    fn was_stopped(mut child: Child) -> bool {
        let pid = Pid::from_child(&child);
        let (_, status): (Pid, WaitStatus) =
            waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        if status.stopped() {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        assert_eq!(status.exit_status(), Some(0), "the background process failed");
        false
    }

    /// Runs `background` in a background process group of a terminal's session, twice removed from
    /// here: a session leader, and its job. Returns whether the job was stopped.
    fn job_is_stopped(test: &str, background: impl FnOnce()) -> bool {
        let stopped = 40; // An exit status the test harness itself does not use.
        match std::env::var(ROLE).as_deref() {
            Ok("job") => {
                background();
                false
            }
            Ok("leader") => {
                setsid().unwrap();
                ioctl_tiocsctty(std::io::stdin()).unwrap();
                assert!(in_foreground(std::io::stdin()));
                let job = rerun(test, "job", Stdio::inherit()).process_group(0).spawn().unwrap();
                std::process::exit(if was_stopped(job) { stopped } else { 0 });
            }
            _ => {
                let (_controller, terminal) = pty();
                let leader = rerun(test, "leader", terminal).status().unwrap();
                assert!([Some(0), Some(stopped)].contains(&leader.code()), "{leader}");
                leader.code() == Some(stopped)
            }
        }
    }

    #[test]
    fn raw_mode_does_not_stop_a_background_process() {
        let stopped = job_is_stopped("raw_mode_does_not_stop_a_background_process", || {
            let stdin = std::io::stdin();
            assert!(!in_foreground(&stdin));
            let before = tcgetattr(&stdin).unwrap();
            let raw = RawMode::enter(&stdin).unwrap().unwrap();
            assert!(same_modes(&before, &tcgetattr(&stdin).unwrap()), "not ours to change");
            drop(raw);
            // Even if the terminal is lost between the check and the call.
            set(&stdin, &before).unwrap();
        });
        assert!(!stopped);
    }

    #[test]
    fn a_plain_tcsetattr_would_stop_it() {
        let stopped = job_is_stopped("a_plain_tcsetattr_would_stop_it", || {
            let stdin = std::io::stdin();
            let mode = tcgetattr(&stdin).unwrap();
            tcsetattr(&stdin, OptionalActions::Now, &mode).unwrap();
        });
        // The job itself never gets here; the leader exits above.
        assert!(stopped || std::env::var_os(ROLE).is_some());
    }
}
