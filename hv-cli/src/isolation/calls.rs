//! The system calls that each kind of thread may make.
//!
//! The lists come from traces of all guest scenarios (`strace -f`, and `--seccomp log`), and from reading: what an
//! error path makes is here too. A call that is missing ends a VM; one too many is there for who takes a
//! thread over. What can start a program, open a file or reach another process is in no list but that
//! of the main thread, and executable memory in none.

use libc::c_long;

use super::Kind;

/// A system call that a thread may make, or an ioctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemCall {
    pub(super) number: c_long,
    pub(super) only: Only,
}

/// With which arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Only {
    /// Any.
    Any,
    /// One argument is this.
    Is { argument: u8, value: u64 },
    /// Some bits of an argument are these.
    Bits { argument: u8, mask: u64, value: u64 },
}

impl SystemCall {
    /// The call with this number (`SYS_*` of libc), whatever its arguments.
    #[must_use]
    pub const fn new(number: c_long) -> Self {
        Self { number, only: Only::Any }
    }

    /// The ioctl with this request.
    #[must_use]
    pub const fn ioctl(request: u64) -> Self {
        Self::with(libc::SYS_ioctl, 1, request)
    }

    /// The call if this argument, counted from 0, has this value.
    #[must_use]
    pub const fn with(number: c_long, argument: u8, value: u64) -> Self {
        Self { number, only: Only::Is { argument, value } }
    }

    /// The ioctls of a type (`_IOC_TYPE`).
    const fn ioctls_of(kind: u8) -> Self {
        let value = (kind as u64) << 8;
        Self { number: libc::SYS_ioctl, only: Only::Bits { argument: 1, mask: 0xff00, value } }
    }

    /// A call about memory, whose protection is its third argument, unless that is executable.
    const fn not_executable(number: c_long) -> Self {
        let mask = libc::PROT_EXEC as u64;
        Self { number, only: Only::Bits { argument: 2, mask, value: 0 } }
    }
}

const fn call(number: c_long) -> SystemCall {
    SystemCall::new(number)
}

/// `KVMIO`.
const KVM: SystemCall = SystemCall::ioctls_of(0xae);

/// `PR_SET_VMA`: newer C libraries name their memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What every thread needs: memory, locks, time, events, its end, and the message at it.
const EVERY: &[SystemCall] = &[
    call(libc::SYS_read),
    call(libc::SYS_write),
    call(libc::SYS_writev),
    call(libc::SYS_close),
    call(libc::SYS_dup),
    call(libc::SYS_fcntl),
    call(libc::SYS_eventfd2),
    call(libc::SYS_poll),
    call(libc::SYS_ppoll),
    call(libc::SYS_epoll_create1),
    call(libc::SYS_epoll_ctl),
    call(libc::SYS_epoll_wait),
    call(libc::SYS_epoll_pwait),
    call(libc::SYS_epoll_pwait2),
    SystemCall::not_executable(libc::SYS_mmap),
    SystemCall::not_executable(libc::SYS_mprotect),
    call(libc::SYS_munmap),
    call(libc::SYS_mremap),
    call(libc::SYS_madvise),
    call(libc::SYS_brk),
    call(libc::SYS_futex),
    call(libc::SYS_getrandom),
    call(libc::SYS_clock_gettime),
    call(libc::SYS_clock_nanosleep),
    call(libc::SYS_nanosleep),
    call(libc::SYS_gettimeofday),
    call(libc::SYS_sched_yield),
    call(libc::SYS_sched_getaffinity),
    call(libc::SYS_getpid),
    call(libc::SYS_gettid),
    call(libc::SYS_tgkill),
    call(libc::SYS_rt_sigprocmask),
    call(libc::SYS_rt_sigreturn),
    call(libc::SYS_sigaltstack),
    call(libc::SYS_restart_syscall),
    call(libc::SYS_set_robust_list),
    call(libc::SYS_rseq),
    SystemCall::with(libc::SYS_prctl, 0, libc::PR_GET_NAME as u64),
    SystemCall::with(libc::SYS_prctl, 0, libc::PR_SET_NAME as u64),
    SystemCall::with(libc::SYS_prctl, 0, PR_SET_VMA),
    // The mode of the terminal is restored by whichever thread ends the process.
    SystemCall::ioctl(libc::TCGETS),
    SystemCall::ioctl(libc::TCSETS),
    SystemCall::ioctl(libc::TCGETS2),
    SystemCall::ioctl(libc::TCSETS2),
    SystemCall::ioctl(libc::TIOCGPGRP),
    call(libc::SYS_getpgrp),
    call(libc::SYS_getpgid),
    call(libc::SYS_exit),
    call(libc::SYS_exit_group),
];

/// A thread of a connection.
const THREADS: &[SystemCall] = &[call(libc::SYS_clone), call(libc::SYS_clone3)];

/// A socket that others connect to.
const SERVER: &[SystemCall] = &[
    call(libc::SYS_accept4),
    call(libc::SYS_recvfrom),
    call(libc::SYS_sendto),
    call(libc::SYS_recvmsg),
    call(libc::SYS_sendmsg),
    call(libc::SYS_shutdown),
    call(libc::SYS_getsockopt),
    call(libc::SYS_setsockopt),
    call(libc::SYS_getsockname),
    call(libc::SYS_getpeername),
    call(libc::SYS_geteuid),
    SystemCall::ioctl(libc::FIONBIO),
    SystemCall::ioctl(libc::FIONREAD),
];

/// The removal of a socket that is still the one that was made.
const REMOVE: &[SystemCall] = &[
    call(libc::SYS_statx),
    call(libc::SYS_newfstatat),
    call(libc::SYS_unlink),
    call(libc::SYS_unlinkat),
];

/// The main thread: what is left of the end of a run. Files are opened before, but for what panics and the C
/// library look at.
const MAIN: &[SystemCall] = &[
    call(libc::SYS_openat),
    call(libc::SYS_fstat),
    call(libc::SYS_lseek),
    call(libc::SYS_readlink),
    call(libc::SYS_getcwd),
    call(libc::SYS_pread64),
    call(libc::SYS_pwrite64),
    call(libc::SYS_ftruncate),
    call(libc::SYS_fdatasync),
    call(libc::SYS_fsync),
    call(libc::SYS_flock),
    call(libc::SYS_wait4),
    call(libc::SYS_waitid),
    call(libc::SYS_kill),
    call(libc::SYS_pidfd_send_signal),
    call(libc::SYS_rt_sigaction),
    call(libc::SYS_uname),
    call(libc::SYS_getuid),
    SystemCall::ioctl(libc::TIOCGWINSZ),
];

/// Reading a file of /proc.
pub(super) const READ_FILE: &[SystemCall] =
    &[call(libc::SYS_openat), call(libc::SYS_statx), call(libc::SYS_fstat), call(libc::SYS_lseek)];

impl Kind {
    /// What threads of this kind may call.
    pub(super) fn calls(self) -> Vec<SystemCall> {
        let lists: &[&[SystemCall]] = match self {
            Self::Main => &[MAIN, REMOVE, SERVER, THREADS, &[KVM]],
            Self::Vcpu => &[&[KVM]],
            Self::Device => &[],
            Self::Debugger => &[SERVER, REMOVE, &[KVM]],
            Self::Control => &[SERVER, REMOVE, THREADS, &[KVM]],
        };
        [EVERY].iter().chain(lists).copied().flatten().copied().collect()
    }
}
