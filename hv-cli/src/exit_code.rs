//! Why a run ended, and the exit code that says so.
//!
//! The codes are even, because a guest with `--device isa-debug-exit` chooses an odd one.

use hv_core::{Error, InternalError};
use signal_hook::low_level::signal_name;

/// Why a virtual machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042, port 0xcf9, the ACPI reset register).
    Reset,
    /// The guest wrote `value` to the isa-debug-exit device.
    DebugExit {
        /// The value written.
        value: u32,
    },
    /// The guest reported a crash to KVM (`KVM_SYSTEM_EVENT_CRASH`), or another system event.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// A check of the built-in guest failed.
    ChecksFailed,
    /// A triple fault on this vCPU.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
    },
    /// KVM could not go on with this vCPU.
    InternalError {
        /// The vCPU.
        vcpu: u32,
        /// What KVM said.
        error: InternalError,
    },
    /// The hardware refused to enter the guest.
    FailEntry {
        /// The vCPU.
        vcpu: u32,
        /// The hardware's reason.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// An exit that `hv` has no answer for.
    UnexpectedExit {
        /// The vCPU.
        vcpu: u32,
        /// The exit, as it came.
        exit: hv_core::VcpuExit,
    },
    /// A call failed while the guest ran.
    Failed {
        /// The vCPU.
        vcpu: u32,
        /// The call.
        error: Error,
    },
    /// KVM could not reach RAM and asked for a device instead, which it does where it emulates an
    /// instruction.
    LostMemory {
        /// The guest-physical address.
        address: u64,
    },
    /// A thread of `hv` ended without saying why, which is a bug in `hv`.
    ThreadLost {
        /// The vCPU.
        vcpu: u32,
    },
    /// The user ended it with Ctrl-A x.
    UserQuit,
    /// A debugger killed it.
    Killed,
    /// A client of the API ended it.
    Requested,
    /// This signal ended it.
    Signal(i32),
}

/// The process exit codes of `hv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off, or every check of the built-in guest passed.
    Success = 0,
    /// The command line, an image or another input can't be used; nothing was started.
    Usage = 2,
    /// The VM could not be made or kept running: KVM or the host refused something.
    Vmm = 4,
    /// The guest asked for a reset.
    Reset = 6,
    /// The guest failed: a check of the built-in guest, or a crash it reported.
    GuestFailure = 8,
    /// A triple fault.
    TripleFault = 10,
    /// KVM could not go on: an internal error, a failed entry, an unknown exit.
    Internal = 12,
    /// Ended from outside: Ctrl-A x, a debugger's kill, a client of the API, or a signal.
    Stopped = 14,
    /// A thread of `hv` made a system call that its seccomp filter does not allow.
    Isolation = 16,
}

impl StopReason {
    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let code = match self {
            StopReason::PowerOff => ExitCode::Success,
            StopReason::Reset => ExitCode::Reset,
            // The device's definition: an odd code, of which the process keeps 8 bits.
            StopReason::DebugExit { value } => return (value << 1) as u8 | 1,
            StopReason::SystemEvent { .. } | StopReason::ChecksFailed => ExitCode::GuestFailure,
            StopReason::TripleFault { .. } => ExitCode::TripleFault,
            StopReason::InternalError { .. }
            | StopReason::FailEntry { .. }
            | StopReason::UnexpectedExit { .. } => ExitCode::Internal,
            StopReason::Failed { .. }
            | StopReason::LostMemory { .. }
            | StopReason::ThreadLost { .. } => ExitCode::Vmm,
            StopReason::UserQuit
            | StopReason::Killed
            | StopReason::Requested
            | StopReason::Signal(_) => ExitCode::Stopped,
        };
        code as u8
    }
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StopReason::PowerOff => f.write_str("the guest powered off"),
            StopReason::Reset => f.write_str("the guest asked for a reset"),
            StopReason::DebugExit { value } => write!(f, "the guest ended with {value:#x}"),
            StopReason::SystemEvent { kind } => match kind {
                3 => f.write_str("the guest reported a crash"),
                _ => write!(f, "the guest caused KVM system event {kind}"),
            },
            StopReason::ChecksFailed => f.write_str("a check of the built-in guest failed"),
            StopReason::TripleFault { vcpu } => write!(f, "triple fault on vCPU {vcpu}"),
            StopReason::InternalError { vcpu, error } => {
                let (suberror, name) = (error.suberror, error.name());
                write!(f, "KVM could not go on with vCPU {vcpu}: sub-error {suberror} ({name})")?;
                for (i, word) in error.data().iter().enumerate() {
                    write!(f, "{}{word:#x}", if i == 0 { ", data " } else { " " })?;
                }
                Ok(())
            }
            StopReason::FailEntry { vcpu, reason, cpu } => write!(
                f,
                "the hardware refused to enter vCPU {vcpu} on host CPU {cpu}: reason {reason:#x}"
            ),
            StopReason::UnexpectedExit { vcpu, exit } => {
                write!(f, "vCPU {vcpu} stopped with an exit hv has no answer for: {exit:?}")
            }
            StopReason::Failed { vcpu, error } => write!(f, "vCPU {vcpu}: {error}"),
            StopReason::LostMemory { address } => {
                write!(f, "KVM could not reach the guest's memory at {address:#x}")
            }
            StopReason::ThreadLost { vcpu } => {
                write!(f, "the thread of vCPU {vcpu} ended unexpectedly; please report this")
            }
            StopReason::UserQuit => f.write_str("ended with Ctrl-A x"),
            StopReason::Killed => f.write_str("killed by the debugger"),
            StopReason::Requested => f.write_str("ended by a client of the API socket"),
            StopReason::Signal(number) => match signal_name(*number) {
                Some(name) => write!(f, "ended by {name}"),
                None => write!(f, "ended by signal {number}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn kinds_of_end_are_told_apart_and_never_odd() {
        let error = InternalError { suberror: 1, ndata: 0, data: [0; 16] };
        let reasons = [
            StopReason::PowerOff,
            StopReason::Reset,
            StopReason::ChecksFailed,
            StopReason::TripleFault { vcpu: 0 },
            StopReason::InternalError { vcpu: 0, error },
            StopReason::ThreadLost { vcpu: 0 },
            StopReason::UserQuit,
        ];
        let codes: HashSet<u8> = reasons.iter().map(StopReason::exit_code).collect();
        assert_eq!(codes.len(), reasons.len());
        assert!(codes.iter().all(|c| c % 2 == 0));
        assert!(!codes.contains(&(ExitCode::Usage as u8)));
    }

    #[test]
    fn an_internal_error_says_all_kvm_said() {
        let text = |suberror, ndata| {
            let mut data = [0; 16];
            data[..2].copy_from_slice(&[0x80000b0e, 0x31]);
            let error = InternalError { suberror, ndata, data };
            StopReason::InternalError { vcpu: 1, error }.to_string()
        };
        let known = text(3, 2);
        assert!(known.contains("sub-error 3 (KVM_INTERNAL_ERROR_DELIVERY_EV)"), "{known}");
        assert!(known.ends_with(", data 0x80000b0e 0x31"), "{known}");
        let unknown = text(99, 0);
        assert!(unknown.ends_with("sub-error 99 (an unknown sub-error)"), "{unknown}");
    }

    #[test]
    fn debug_exit_is_the_value_shifted_and_odd() {
        for (value, code) in [(0, 1), (1, 3), (0x10, 0x21), (0x7f, 0xff), (0x80, 1)] {
            assert_eq!(StopReason::DebugExit { value }.exit_code(), code);
        }
    }
}
