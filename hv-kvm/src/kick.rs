//! How another thread gets a vCPU out of guest code: `immediate_exit`, and a signal if it is there
//! already.
//!
//! Neither is enough alone. A signal that arrives just before `KVM_RUN` is gone when it begins;
//! `immediate_exit` is only looked at when it begins. With both, a kick is never lost:
//!
//! - [`KvmKick`] first sets `immediate_exit`, then reads which thread runs the vCPU;
//! - a run first says which thread it is, then KVM reads `immediate_exit`.
//!
//! All four are sequentially consistent (KVM's read follows the locked instruction the mark is
//! stored with), so at least one side sees the other: KVM the request, or the kicker the thread.
//! If both do, a run may end once more than it was kicked; that does no harm.
//!
//! The run that reports the interruption takes the request back *before* it returns, by an
//! exchange that reads what the kicker stored. What the kicker wrote before its kick is therefore
//! visible to the caller of that run; a kick after the exchange leaves its request for the next run.

#![allow(unsafe_code, reason = "signals")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Weak};

use hv_core::{Call, Context, Errno, Error, VcpuKick};

use crate::raw::checked;
use crate::run_page::ImmediateExit;
use crate::vm::VmInner;

/// The signal that interrupts `KVM_RUN`: `SIGURG`.
///
/// A standard signal, because Linux delivers one always; a real-time signal is refused (`EAGAIN`) once
/// the user's processes together have as many queued as `RLIMIT_SIGPENDING` allows. Of those, `SIGURG`
/// is the one that programs expect at any time and that does nothing by default.
///
/// It is sent to threads that run a vCPU, and may reach one just after it left; a blocking system
/// call it makes then fails with `EINTR` once. The program must leave the handler alone that
/// [`hv_core::Hypervisor::install_kick`] installs, and must not block the signal in a thread that
/// runs a vCPU: the first run in a thread unblocks it.
pub const KICK_SIGNAL: i32 = libc::SIGURG;

/// Stops a vCPU from another thread.
///
/// It keeps neither the vCPU nor the VM: kicking a vCPU that is gone does nothing. In a child made by
/// `fork(2)` without `exec`, a vCPU must be run by a new thread.
#[derive(Debug, Clone)]
pub struct KvmKick(Weak<Kickable>);

impl VcpuKick for KvmKick {
    fn kick(&self) -> Result<(), Error> {
        let Some(vcpu) = self.0.upgrade() else { return Ok(()) };
        vcpu.exit.request();
        let thread = vcpu.running.load(Ordering::SeqCst);
        if thread == 0 {
            return Ok(());
        }
        // Without a handler the signal would interrupt nothing.
        install()?;
        match signal(thread) {
            // The thread has ended, so it has left the run before.
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(Error::new(Call::Kick, errno).about(Context::Vcpu(vcpu.id))),
        }
    }
}

/// What a vCPU shares with those who kick it.
#[derive(Debug)]
pub(crate) struct Kickable {
    id: u32,
    exit: ImmediateExit,
    /// The thread inside [`Kickable::running`], or 0.
    running: AtomicI32,
    /// The mapping behind `exit` keeps the VM alive in the kernel, so what the VM needs must not go
    /// before it: fields are dropped in this order.
    vm: Arc<VmInner>,
}

impl Kickable {
    pub(crate) fn new(id: u32, exit: ImmediateExit, vm: Arc<VmInner>) -> Arc<Self> {
        Arc::new(Self { id, exit, running: AtomicI32::new(0), vm })
    }

    /// The VM.
    pub(crate) fn vm(&self) -> &Arc<VmInner> {
        &self.vm
    }

    pub(crate) fn kicker(self: &Arc<Self>) -> KvmKick {
        KvmKick(Arc::downgrade(self))
    }

    /// Calls `run`, during which a kick signals this thread.
    pub(crate) fn running<R>(&self, run: impl FnOnce() -> R) -> R {
        self.running.store(THREAD.with(|thread| *thread), Ordering::SeqCst);
        let result = run();
        // A kick that does not see this yet sends a signal too many, which does no harm.
        self.running.store(0, Ordering::Release);
        result
    }

    /// Takes back the request that interrupted a run.
    pub(crate) fn consume(&self) {
        self.exit.take();
    }
}

thread_local! {
    /// The id of this thread, which from then on can be signalled.
    static THREAD: i32 = {
        unblock();
        // SAFETY: the call takes no argument.
        unsafe { libc::gettid() }
    };
}

/// Lets the signal reach this thread: a mask inherited from the thread that started it, in which
/// the signal is blocked, would keep kicks from it.
fn unblock() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: the set has just been initialized.
    unsafe { libc::sigaddset(set.as_mut_ptr(), KICK_SIGNAL) };
    // SAFETY: the call reads the set and writes no old one. It fails only for a bad first argument.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut()) };
}

/// Sends the signal to a thread of this process.
fn signal(thread: i32) -> Result<(), Errno> {
    let process = std::process::id().cast_signed();
    // SAFETY: the call takes numbers, and the signal has a handler that does nothing.
    let returned = unsafe { libc::tgkill(process, thread, KICK_SIGNAL) };
    checked(returned).map(|_| ())
}

/// Does nothing: that the signal arrives is what interrupts `KVM_RUN`.
extern "C" fn on_kick(_signal: libc::c_int) {}

/// Installs the handler, once for the process. A handler of someone else stays and is an error;
/// this must come after the program has installed its own, if any.
pub(crate) fn install() -> Result<(), Error> {
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    let error = |errno| Error::new(Call::Sigaction, errno);
    let ours = on_kick as *const () as libc::sighandler_t;

    // Two threads that get here together find no handler or ours, and install the same one.
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the call writes the current action and installs none.
    checked(unsafe { libc::sigaction(KICK_SIGNAL, ptr::null(), current.as_mut_ptr()) })
        .map_err(error)?;
    // SAFETY: an all-zero sigaction is a value, and the call has succeeded in writing another.
    let current = unsafe { current.assume_init() };
    if ![libc::SIG_DFL, libc::SIG_IGN, ours].contains(&current.sa_sigaction) {
        return Err(error(Errno::EBUSY));
    }

    // SAFETY: an all-zero sigaction is a value: no flags, an empty mask, no restorer.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = ours;
    // Not SA_RESTART: the interrupted call is to fail with EINTR.
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the handler does nothing, which is safe at any point of any thread.
    checked(unsafe { libc::sigaction(KICK_SIGNAL, &action, ptr::null_mut()) }).map_err(error)?;
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signal_is_a_standard_one_which_is_never_refused() {
        assert!((1..32).contains(&KICK_SIGNAL));
    }

    #[test]
    fn installing_twice_is_no_error_and_the_signal_does_no_harm() {
        install().unwrap();
        install().unwrap();
        let this = THREAD.with(|thread| *thread);
        signal(this).unwrap();
    }

    #[test]
    fn a_thread_that_is_not_there_is_told_apart() {
        install().unwrap();
        // Linux has no thread ids this large (PID_MAX_LIMIT is 1 << 22).
        assert_eq!(signal(i32::MAX), Err(Errno::ESRCH));
    }

    #[test]
    fn a_thread_that_runs_a_vcpu_can_be_signalled_whatever_it_inherited() {
        let blocked = || {
            let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
            // SAFETY: the call writes the mask of this thread.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), set.as_mut_ptr()) };
            // SAFETY: the set has just been written.
            unsafe { libc::sigismember(set.as_ptr(), KICK_SIGNAL) == 1 }
        };
        std::thread::spawn(move || {
            let mut set = MaybeUninit::<libc::sigset_t>::uninit();
            // SAFETY: sigfillset initializes the set it is given.
            unsafe { libc::sigfillset(set.as_mut_ptr()) };
            // SAFETY: the set has just been initialized.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut()) };
            assert!(blocked());
            std::thread::spawn(move || {
                assert!(blocked(), "inherited");
                THREAD.with(|_| ());
                assert!(!blocked());
            })
            .join()
            .unwrap();
        })
        .join()
        .unwrap();
    }
}
