//! seccomp filters from lists of calls.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use hv_core::Errno;
use rustix::thread::secure_computing_mode;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use super::calls::Only;
use super::{IsolationError, Kind, SeccompMode, SystemCall};

/// A filter, ready for a thread.
#[derive(Debug)]
pub(super) struct Filter(BpfProgram);

/// Whether the kernel has filters.
pub(super) fn check_kernel() -> Result<(), IsolationError> {
    let mode = secure_computing_mode();
    mode.map(drop).map_err(|error| IsolationError::NoSeccomp(Errno(error.raw_os_error())))
}

impl Filter {
    pub(super) fn new(
        kind: Kind,
        calls: &[SystemCall],
        mode: SeccompMode,
    ) -> Result<Self, IsolationError> {
        let error = |what| IsolationError::Filter { thread: kind.name(), what };
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut any = Vec::new();
        for call in calls {
            let rules = rules.entry(call.number).or_default();
            match condition(call.only) {
                Some(condition) => {
                    let condition = condition.map_err(|_| error("a condition"))?;
                    rules.push(SeccompRule::new(vec![condition]).map_err(|_| error("a rule"))?);
                }
                None => any.push(call.number),
            }
        }
        // A call without rules is allowed with any arguments.
        for number in any {
            rules.insert(number, Vec::new());
        }
        let otherwise = match mode {
            SeccompMode::Log => SeccompAction::Log,
            SeccompMode::On | SeccompMode::Off => SeccompAction::Trap,
        };
        let architecture = ARCH.try_into().map_err(|_| error("the architecture"))?;
        let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, architecture);
        let program = filter.and_then(BpfProgram::try_from).map_err(|_| error("its program"))?;
        Ok(Self(program))
    }

    /// Gives it to the calling thread.
    pub(super) fn apply(self, kind: Kind) -> Result<(), IsolationError> {
        let refused = |_| IsolationError::Filter { thread: kind.name(), what: "seccomp(2) failed" };
        apply_filter(&self.0).map_err(refused)
    }
}

fn condition(only: Only) -> Option<Result<SeccompCondition, seccompiler::BackendError>> {
    // Requests of ioctls and protections are 32 bits to the kernel, whatever is above.
    let (argument, operation, value) = match only {
        Only::Any => return None,
        Only::Is { argument, value } => (argument, SeccompCmpOp::Eq, value),
        Only::Bits { argument, mask, value } => (argument, SeccompCmpOp::MaskedEq(mask), value),
    };
    Some(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operation, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 5] = [Kind::Main, Kind::Vcpu, Kind::Device, Kind::Debugger, Kind::Control];

    #[test]
    fn every_kind_has_a_program() {
        for kind in KINDS {
            let calls = kind.calls();
            let filter = Filter::new(kind, &calls, SeccompMode::On).unwrap();
            assert!(filter.0.len() > calls.len(), "{kind:?}");
        }
    }

    /// No thread of a running machine starts programs, and only the main one opens files.
    #[test]
    fn what_an_attacker_wants_is_in_no_list() {
        let never = [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_socket];
        let main_only = [libc::SYS_open, libc::SYS_openat, libc::SYS_kill, libc::SYS_creat];
        for kind in KINDS {
            let calls = kind.calls();
            let has = |number: &i64| calls.iter().any(|call| call.number == *number);
            assert!(!never.iter().any(has), "{kind:?}");
            assert!(kind == Kind::Main || !main_only.iter().any(has), "{kind:?}");
            let unbounded = |number| calls.contains(&SystemCall::new(number));
            for number in [libc::SYS_ioctl, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_prctl] {
                assert!(!unbounded(number), "{kind:?}: {number} with any arguments");
            }
        }
    }

    #[test]
    fn a_call_with_any_arguments_beats_one_with_some() {
        let calls = [SystemCall::ioctl(1), SystemCall::new(libc::SYS_ioctl), SystemCall::ioctl(2)];
        let any = Filter::new(Kind::Vcpu, &calls, SeccompMode::On).unwrap();
        let some = Filter::new(Kind::Vcpu, &calls[..1], SeccompMode::On).unwrap();
        assert!(any.0.len() < some.0.len());
    }
}
