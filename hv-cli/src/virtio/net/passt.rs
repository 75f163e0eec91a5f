//! passt (<https://passt.top>), which connects a guest to the host's network without privileges: started
//! for one device, ended with it. What the two say to each other is in `receive.rs` and `port.rs`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use hv_core::Errno;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// Why passt does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PasstError {
    /// There is none.
    #[error("passt is not installed; on Debian and Fedora it is in the package passt")]
    NotInstalled,
    /// It can't be started.
    #[error("starting passt: {0}")]
    Start(Errno),
}

/// A running passt. It is ended when this is dropped.
#[derive(Debug)]
pub struct Passt(Child);

impl Passt {
    /// Starts it, and returns the socket to it.
    pub(super) fn start() -> Result<(Self, OwnedFd), PasstError> {
        Self::start_program("passt")
    }

    fn start_program(program: &str) -> Result<(Self, OwnedFd), PasstError> {
        let start = |errno: rustix::io::Errno| PasstError::Start(Errno(errno.raw_os_error()));
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let (ours, theirs) = socketpair(family, SocketType::STREAM, flags, None).map_err(start)?;
        // Devices are made one after the other, before there are threads that start anything: nobody else
        // inherits it.
        fcntl_setfd(&theirs, FdFlags::empty()).map_err(start)?;
        let mut command = Command::new(program);
        // What goes wrong it says on the standard error, as hv does.
        command.args(["--foreground", "--quiet", "--fd", &theirs.as_raw_fd().to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        match child {
            Ok(child) => Ok((Self(child), ours)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PasstError::NotInstalled),
            Err(error) => Err(PasstError::Start(Errno::from(&error))),
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // One that has ended already is only waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_passt_the_package_is_named() {
        let error = Passt::start_program("/nonexistent/passt").map(drop).unwrap_err();
        assert_eq!(error, PasstError::NotInstalled);
        assert!(error.to_string().contains("package passt"));
    }

    #[test]
    fn it_is_ended_and_waited_for() {
        // Ends at once, for it does not know the options.
        let (passt, socket) = Passt::start_program("/bin/false").unwrap();
        let pid = rustix::process::Pid::from_child(&passt.0);
        drop(passt);
        assert_eq!(
            rustix::process::test_kill_process(pid),
            Err(rustix::io::Errno::SRCH),
            "nothing is left of it"
        );
        let mut byte = [0];
        assert_eq!(rustix::io::read(&socket, &mut byte[..]), Ok(0));
    }
}
