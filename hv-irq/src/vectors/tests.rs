//! Groups of vectors against a mock that logs what KVM is told.

use super::*;
use crate::testing::{Log, Told, event, is_closed, msi, router, taken, watched, willing};
use crate::{LegacyPins, RouteError, RouterConfig};
use hv_core::mock::MockVm;
use hv_core::{Errno, Error, Ioctl, Route};

fn group(router: &IrqRouter<MockVm>, n: usize) -> MsiVectors<MockVm> {
    MsiVectors::new(router, (0..n).map(|_| event()))
}

/// Enables a group with vector i unmasked at message i.
fn enable_all(group: &mut MsiVectors<MockVm>) -> Result<(), RouterError> {
    group.change(|change| {
        change.enable();
        for index in 0..change.vectors.len() {
            change.retarget(index, msi(index as u32))?;
            change.unmask(index)?;
        }
        Ok(())
    })
}

fn tables(log: &Log) -> Vec<usize> {
    let told = taken(log).into_iter();
    told.filter_map(|told| if let Told::Table(n) = told { Some(n) } else { None }).collect()
}

fn route(gsi: u32, msi: Msi) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Msi(msi) }
}

#[test]
fn any_number_of_vectors_is_one_table() {
    let (router, log) = willing();
    for n in [1, 8, 256, 2048] {
        let mut group = group(&router, n);
        assert_eq!(taken(&log), [], "a new group is nothing to KVM");
        enable_all(&mut group).unwrap();
        assert_eq!(tables(&log), [38 + n], "enabled");
        enable_all(&mut group).unwrap();
        assert_eq!(taken(&log), [], "the same again");
        let retarget = |group: &mut MsiVectors<MockVm>| {
            group.change(|change| (0..n).try_for_each(|i| change.retarget(i, msi(9999))))
        };
        retarget(&mut group).unwrap();
        assert_eq!(taken(&log), [Told::Table(38 + n)], "retargeted, and bound throughout");
        retarget(&mut group).unwrap();
        assert_eq!(taken(&log), []);
        group.disable().unwrap();
        assert_eq!(tables(&log), [38], "disabled");
        assert!(router.allocated().is_empty() && router.irqfds().is_empty());
        group.enable().unwrap();
        assert_eq!(tables(&log), [38 + n], "messages and masks stay");
        drop(group);
        assert_eq!(tables(&log), [38], "dropped");
        assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    }
}

#[test]
fn a_gsi_is_taken_at_the_first_unmask() {
    let (router, log) = willing();
    let mut group = group(&router, 4);
    group.enable().unwrap();
    group.retarget(2, msi(0x42)).unwrap();
    assert_eq!((taken(&log), group.gsi(2)), (vec![], Ok(None)), "masked vectors use none");
    group.unmask(2).unwrap();
    assert_eq!(taken(&log), [Told::Table(39), Told::Assign(Gsi(24))]);
    assert_eq!(group.gsi(2), Ok(Some(Gsi(24))));
    group.unmask(0).unwrap();
    assert_eq!(group.gsi(0), Ok(Some(Gsi(25))));
    assert_eq!(router.allocated().len(), 2);
}

#[test]
fn a_mask_is_no_table_and_an_unmask_writes_one_before_it_delivers() {
    let (router, log) = willing();
    let mut group = group(&router, 2);
    enable_all(&mut group).unwrap();
    taken(&log);
    group.mask(1).unwrap();
    assert_eq!(taken(&log), [Told::Deassign(Gsi(25))], "the route stays");
    group.mask(1).unwrap();
    group.retarget(1, msi(0x51)).unwrap();
    group.retarget(1, msi(0x52)).unwrap();
    assert_eq!(taken(&log), [], "nobody can tell yet");
    group.unmask(1).unwrap();
    assert_eq!(taken(&log), [Told::Table(40), Told::Assign(Gsi(25))], "in this order");
    assert_eq!(router.routes()[39], route(25, msi(0x52)));
    group
        .change(|change| {
            change.mask(0)?;
            change.unmask(0)
        })
        .unwrap();
    assert_eq!(taken(&log), [], "what cancels out is no change");
}

#[test]
fn the_function_mask_keeps_gsis_and_holds_back_all() {
    let (router, log) = willing();
    let mut group = group(&router, 3);
    enable_all(&mut group).unwrap();
    group.mask(1).unwrap();
    taken(&log);
    group
        .change(|change| {
            change.mask_all();
            Ok(())
        })
        .unwrap();
    assert_eq!(taken(&log), [24, 26].map(|gsi| Told::Deassign(Gsi(gsi))));
    group.event(0).unwrap().signal();
    assert!(group.is_pending(0).unwrap() && !group.is_pending(2).unwrap());
    assert_eq!(router.allocated().len(), 3);
    group.unmask(1).unwrap();
    assert_eq!(taken(&log), [], "still held back");
    group
        .change(|change| {
            change.unmask_all();
            Ok(())
        })
        .unwrap();
    assert_eq!(taken(&log), [24, 25, 26].map(|gsi| Told::Assign(Gsi(gsi))));
}

#[test]
fn an_event_waits_in_its_eventfd() {
    let (router, _) = willing();
    let mut group = group(&router, 1);
    enable_all(&mut group).unwrap();
    group.mask(0).unwrap();
    assert!(!group.is_pending(0).unwrap());
    group.event(0).unwrap().signal();
    assert!(group.is_pending(0).unwrap() && group.is_pending(0).unwrap(), "looking takes nothing");
    group.unmask(0).unwrap();
    assert!(!group.is_pending(0).unwrap(), "KVM's now");
    assert!(group.event(0).unwrap().take().is_some(), "it is there for KVM to take");
}

#[test]
fn what_fails_changes_nothing() {
    let (router, log) = router(64, |_| None);
    let mut other = group(&router, 20);
    enable_all(&mut other).unwrap();
    let before = (router.routes(), router.allocated(), router.irqfds());
    taken(&log);
    let mut group = group(&router, 7);
    let full = RouterError::Route(RouteError::TableFull { limit: 64 });
    assert_eq!(enable_all(&mut group), Err(full), "6 entries are left");
    assert_eq!(taken(&log), []);
    assert_eq!((router.routes(), router.allocated(), router.irqfds()), before);
    assert!(!group.is_enabled() && group.is_masked(0).unwrap());
    assert_eq!(group.message(3), Ok(Msi::default()));
    let none = RouterError::NoSuchVector { index: 7, count: 7 };
    let out_of_range = group.change(|change| {
        change.enable();
        change.unmask(7)
    });
    assert_eq!(out_of_range, Err(none));
    assert_eq!(group.event(7).unwrap_err(), none);
    assert!(!group.is_enabled());
    other.disable().unwrap();
    enable_all(&mut group).unwrap();
}

#[test]
fn a_refusal_of_kvm_changes_nothing() {
    let refused = Told::Assign(Gsi(26));
    let (router, log) = router(4096, move |told| (told == refused).then_some(Errno::EBUSY));
    let mut group = group(&router, 4);
    let error = enable_all(&mut group).unwrap_err();
    assert_eq!(error, RouterError::Kvm(Error::new(Ioctl::Irqfd, Errno::EBUSY)));
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    assert_eq!(router.routes().len(), 38);
    assert!(!group.is_enabled() && group.gsi(0) == Ok(None));
    taken(&log);
    group.enable().unwrap();
    group.unmask(0).unwrap();
    assert_eq!(taken(&log), [Told::Table(39), Told::Assign(Gsi(24))], "the next good one works");
}

#[test]
fn a_guest_that_writes_garbage_gets_no_interrupt_and_no_error() {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_set_gsi_routing().returning(|routes| {
        let legal = |route: &Route| match route.target {
            RouteTarget::Msi(msi) => (msi.address >> 32) & 0xff == 0,
            _ => true,
        };
        assert!(routes.iter().all(legal));
        Ok(())
    });
    vm.expect_irqfd_assign().returning(|_| Ok(()));
    vm.expect_irqfd_deassign().returning(|_, _| Ok(()));
    let mut config = RouterConfig::new(4096, LegacyPins::Kernel);
    config.x2apic_format = true;
    let router = IrqRouter::new(Arc::new(vm), config).unwrap();
    let mut group = group(&router, 1);
    enable_all(&mut group).unwrap();
    let garbage = Msi { address: u64::MAX, data: u32::MAX, device: None };
    group.retarget(0, garbage).unwrap();
    assert_eq!(group.message(0), Ok(garbage), "what the guest reads back");
    assert!(router.irqfds().is_empty(), "held back as by a mask");
    group.event(0).unwrap().signal();
    assert!(group.is_pending(0).unwrap());
    group.retarget(0, msi(0x41)).unwrap();
    assert_eq!(router.irqfds().len(), 1);
    assert_eq!(router.routes()[38], route(24, msi(0x41)));
}

#[test]
fn toggling_a_mask_costs_one_irqfd_however_large_the_group() {
    let (router, log) = willing();
    let mut group = group(&router, 2048);
    enable_all(&mut group).unwrap();
    taken(&log);
    for _ in 0..100 {
        group.mask(7).unwrap();
        group.unmask(7).unwrap();
    }
    let told = taken(&log);
    assert_eq!(told.len(), 200);
    assert!(!told.iter().any(|told| matches!(told, Told::Table(_))));
}

#[test]
fn groups_that_kvm_keeps_go_with_the_next_commit() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let refusing = Arc::new(AtomicBool::new(false));
    let refuse = refusing.clone();
    let (router, log) =
        router(4096, move |_| refuse.load(Ordering::Relaxed).then_some(Errno::ENOMEM));
    let (event, watch) = watched();
    let mut gone = MsiVectors::new(&router, [event]);
    enable_all(&mut gone).unwrap();
    refusing.store(true, Ordering::Relaxed);
    drop(gone);
    assert_eq!(router.allocated(), [Gsi(24)], "not given to anybody meanwhile");
    assert!(!is_closed(&watch));
    refusing.store(false, Ordering::Relaxed);
    taken(&log);
    router.batch(|_| Ok(())).unwrap();
    assert_eq!(taken(&log), [Told::Deassign(Gsi(24)), Told::Table(38)]);
    assert!(router.allocated().is_empty() && is_closed(&watch));
}

#[test]
fn nothing_can_be_changed_once_the_router_is_gone() {
    let (router, log) = willing();
    let mut group = group(&router, 8);
    enable_all(&mut group).unwrap();
    taken(&log);
    drop(router);
    assert_eq!(group.mask(0), Err(RouterError::RouterGone));
    drop(group);
    assert_eq!(taken(&log), [], "the VM goes anyway");
}
