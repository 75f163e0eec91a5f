//! A kick is never lost, whatever the vCPU is doing when it comes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use common::{CODE, begin, real_mode, vm_with, wait_for};
use hv_core::{Hypervisor, Vcpu, VcpuExit, VcpuKick, Vm};
use hv_kvm::KvmVcpu;
use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};

const KICKS: u32 = 10_000;

/// The result of a thread, which a lost kick must not make this one wait for.
fn finished<T>(thread: JoinHandle<T>) -> T {
    wait_for("the end of a kicked run", || thread.is_finished());
    thread.join().unwrap()
}

/// Kicks `vcpu` `KICKS` times from another thread, each time after the last one was noticed.
fn storm(mut vcpu: KvmVcpu, other_exit: fn(VcpuExit)) {
    // Two threads that wait for each other at a time: more only take the CPUs from one another.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Relaxed: that the kick makes the request visible is part of what is tested.
    let requested = Arc::new(AtomicU32::new(0));
    let noticed = Arc::new(AtomicU32::new(0));
    let kick = vcpu.kicker();
    let runner = thread::spawn({
        let (requested, noticed) = (requested.clone(), noticed.clone());
        move || {
            while noticed.load(Ordering::Relaxed) < KICKS {
                match vcpu.run().unwrap() {
                    VcpuExit::Interrupted => {
                        noticed.store(requested.load(Ordering::Relaxed), Ordering::Relaxed);
                    }
                    exit => other_exit(exit),
                }
            }
        }
    });
    for n in 1..=KICKS {
        requested.store(n, Ordering::Relaxed);
        kick.kick().unwrap();
        wait_for("the end of a kicked run", || {
            noticed.load(Ordering::Relaxed) >= n || runner.is_finished()
        });
    }
    finished(runner);
}

#[test]
fn out_of_a_loop_without_exits() {
    let (_vm, vcpu, _) = real_mode(&[0xeb, 0xfe]); // jmp $
    storm(vcpu, |exit| panic!("unexpected {exit:?}"));
}

#[test]
fn between_exits() {
    let (_vm, vcpu, _) = real_mode(&[0xe6, 0x80, 0xeb, 0xfc]); // out 0x80, al; jmp back
    storm(vcpu, |exit| assert!(matches!(exit, VcpuExit::Io(_)), "{exit:?}"));
}

#[test]
fn out_of_a_halt_in_the_kernel() {
    let (vm, _memory) = vm_with(&[0xf4, 0xeb, 0xfd], 1); // hlt; jmp back
    vm.create_irqchip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    storm(vcpu, |exit| panic!("unexpected {exit:?}"));
}

#[test]
fn out_of_waiting_to_be_started() {
    let (vm, _memory) = vm_with(&[0xf4], 1);
    vm.create_irqchip().unwrap();
    let _boot = vm.create_vcpu(0).unwrap();
    let waiting = vm.create_vcpu(1).unwrap();
    waiting.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED }).unwrap();
    storm(waiting, |exit| panic!("unexpected {exit:?}"));
}

#[test]
fn before_the_run_and_once_for_several() {
    let (_vm, mut vcpu, _) = real_mode(&[0xf4]);
    let kick = vcpu.kicker();
    for _ in 0..3 {
        kick.kick().unwrap();
    }
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);
    assert_eq!(vcpu.regs().unwrap().rip, CODE, "no instruction ran");
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
}

#[test]
fn from_many_threads_at_once() {
    let (_vm, mut vcpu, _) = real_mode(&[0xeb, 0xfe]); // jmp $
    let done = Arc::new(AtomicU32::new(0));
    let kickers: Vec<_> = (0..4)
        .map(|_| {
            let (kick, done) = (vcpu.kicker(), done.clone());
            thread::spawn(move || {
                for _ in 0..1000 {
                    kick.kick().unwrap();
                }
                done.fetch_add(1, Ordering::Relaxed);
                kick.kick().unwrap();
            })
        })
        .collect();
    let runner = thread::spawn(move || {
        while done.load(Ordering::Relaxed) < 4 {
            assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);
        }
    });
    kickers.into_iter().for_each(finished);
    finished(runner);
}

#[test]
fn a_vcpu_may_move_between_threads() {
    let (_vm, mut vcpu, _) = real_mode(&[0xeb, 0xfe]); // jmp $
    let kick = vcpu.kicker();
    for _ in 0..20 {
        let runner = thread::spawn(move || (vcpu.run().unwrap(), vcpu));
        kick.kick().unwrap();
        let (exit, returned) = finished(runner);
        assert_eq!(exit, VcpuExit::Interrupted);
        vcpu = returned;
    }
}

#[test]
fn a_vcpu_that_is_gone_is_no_error() {
    let (vm, vcpu, _) = real_mode(&[0xf4]);
    let kick = vcpu.kicker();
    drop(vcpu);
    kick.kick().unwrap();
    drop(vm);
    kick.kick().unwrap();
}

#[test]
fn kicking_can_be_prepared_more_than_once() {
    let kvm = common::kvm();
    kvm.install_kick().unwrap();
    kvm.install_kick().unwrap();
}
