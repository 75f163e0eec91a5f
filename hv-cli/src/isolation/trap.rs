//! The end of a process whose thread makes a call that its filter does not allow.
//!
//! The kernel sends SIGSYS instead of making the call. The handler names the call and ends the process: it
//! runs in the middle of anything, so it takes no lock and allocates nothing.

#![allow(unsafe_code, reason = "the number of the call is in a union of the C library")]

use std::cell::Cell;
use std::fmt::{Arguments, Write};

use hv_core::Errno;
use libc::{c_int, c_void, siginfo_t};
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

use super::IsolationError;
use crate::exit_code::ExitCode;
use crate::terminal;

thread_local! {
    /// The kind of this thread. Without a destructor, so that a signal handler can look at any time.
    static THREAD: Cell<&'static str> = const { Cell::new("?") };
}

/// What the message calls the calling thread.
pub(super) fn name_thread(name: &'static str) {
    THREAD.set(name);
}

/// Installs the handler.
pub(super) fn install() -> Result<(), IsolationError> {
    register_signal_handler(libc::SIGSYS, on_sigsys)
        .map_err(|error| IsolationError::Handler(Errno(error.errno())))
}

extern "C" fn on_sigsys(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the handler is installed with SA_SIGINFO, so the kernel passes a siginfo_t that lives until the
    // handler returns; nothing else refers to it.
    let info = unsafe { info.as_ref() };
    // SAFETY: of SIGSYS, the union has the fields of a system call. Another process with our user id could
    // send SIGSYS without them: then this is some number, and the message is wrong.
    let number = info.map_or(-1, |info| unsafe { info.si_syscall() });
    let name =
        usize::try_from(number).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    end(format_args!(
        "a {} thread made the system call {name} ({number}), which its seccomp filter does not \
         allow. The guest may have attacked hv, or hv has a bug: please report it. --seccomp log lets such calls \
         pass and has the kernel log them",
        THREAD.get()
    ));
}

/// Restores the terminal, says why, and ends the process, from any thread and any place.
pub(super) fn end(why: Arguments<'_>) -> ! {
    terminal::restore();
    let mut line = Line { bytes: [0; 512], len: 0 };
    // What does not fit is left out.
    let _ = write!(line, "hv: error: {why}");
    let text = line.bytes.get(..line.len).unwrap_or_default();
    let _ = rustix::io::write(rustix::stdio::stderr(), text);
    let _ = rustix::io::write(rustix::stdio::stderr(), b"\n");
    // SAFETY: it takes no pointer and does not return.
    unsafe { libc::_exit(ExitCode::Isolation as c_int) }
}

/// A line that is written without allocating.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(text.bytes()) {
            *to = from;
            self.len += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_what_fits() {
        let mut line = Line { bytes: [0; 512], len: 0 };
        write!(line, "a {} b", 1).unwrap();
        assert_eq!(line.bytes.get(..line.len), Some(&b"a 1 b"[..]));
        write!(line, "{}", "x".repeat(600)).unwrap();
        assert_eq!(line.len, 512);
    }
}
