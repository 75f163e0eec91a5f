//! A handler the program has installed for the kick's signal is not replaced.
//!
//! Alone in its process, because handlers belong to the process.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
#![allow(unsafe_code, reason = "sigaction")]

mod common;

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use hv_core::{Call, Errno, Hypervisor, Vcpu, VcpuExit, VcpuKick};
use hv_kvm::KICK_SIGNAL;

static CALLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn foreign(_signal: libc::c_int) {
    CALLED.fetch_add(1, Ordering::SeqCst);
}

fn set_handler(handler: libc::sighandler_t) {
    // SAFETY: an all-zero sigaction is a value.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    // SAFETY: the handler adds to an atomic, which a signal handler may.
    assert_eq!(unsafe { libc::sigaction(KICK_SIGNAL, &action, ptr::null_mut()) }, 0);
}

#[test]
fn a_foreign_handler_stays_and_is_an_error_until_it_is_gone() {
    let kvm = common::kvm();
    let (_vm, mut vcpu, _) = common::real_mode(&[0xf4]);
    set_handler(foreign as *const () as libc::sighandler_t);

    let error = kvm.install_kick().unwrap_err();
    assert_eq!((error.call, error.errno), (Call::Sigaction, Errno::EBUSY));
    // SAFETY: the signal has a handler.
    assert_eq!(unsafe { libc::raise(KICK_SIGNAL) }, 0);
    assert_eq!(CALLED.load(Ordering::SeqCst), 1, "the handler is still the program's");

    // What needs no signal works without.
    vcpu.kicker().kick().unwrap();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);

    set_handler(libc::SIG_DFL);
    kvm.install_kick().unwrap();
    // SAFETY: the signal has a handler.
    assert_eq!(unsafe { libc::raise(KICK_SIGNAL) }, 0);
    assert_eq!(CALLED.load(Ordering::SeqCst), 1);
}
