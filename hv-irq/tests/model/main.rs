#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on fails"
)]
//! The invariants of interrupt routing, each as a property of sequences of operations: batches, vectors
//! of devices, lines, messages, a user-space I/O APIC, routers that are restored and moved, with calls
//! that fail, against a naive model and the KVM in memory.
//!
//! `PROPTEST_CASES=1000000 cargo test -p hv-irq --release --test model` runs a million of each.

mod kvm;
mod model;
mod plain;
mod plan;
mod world;

use std::collections::BTreeSet;

use hv_core::Gsi;
use hv_irq::{LegacyPins, RouterError};
use plan::{Failing, Op, Plan, Setup, plans, setups};
use proptest::prelude::*;
use world::{Ran, World};

type Checked = Result<(), TestCaseError>;

/// As many cases as `PROPTEST_CASES` says, or else what each change has to pass.
pub(crate) fn cases() -> ProptestConfig {
    let config = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig { cases: 4096, ..config },
    }
}

/// Carries a plan out; `check` looks at what came of each operation.
fn run(
    setup: Setup,
    plan: &Plan,
    mut check: impl FnMut(&mut World, &Op, &Ran) -> Checked,
) -> Result<World, TestCaseError> {
    let mut world = World::new(setup);
    for (op, fault) in plan {
        let ran = world.run(op, *fault);
        prop_assert_eq!(&ran.surprise, &None, "{:?}", op);
        check(&mut world, op, &ran)?;
        if ran.lost {
            world.restart();
        } else {
            // Whoever does not look at the ends takes them all the same.
            let _ = world.take_ends();
        }
    }
    Ok(world)
}

proptest! {
    #![proptest_config(cases())]

    /// 1. A GSI is taken exactly when a handle owns it, or a route nobody owns has it.
    #[test]
    fn gsis_are_taken_exactly_by_owners_and_routes(
        setup in setups(), plan in plans(Failing::One)
    ) {
        run(setup, &plan, |world, op, _| {
            let taken: BTreeSet<u32> = world.router.allocated().iter().map(|gsi| gsi.0).collect();
            prop_assert_eq!(&taken, &world.model.allocated(), "{:?}", op);
            let routed = world.table().into_iter().map(|route| route.gsi.0);
            prop_assert!(routed.filter(|&gsi| gsi >= 24).all(|gsi| taken.contains(&gsi)));
            Ok(())
        })?;
    }

    /// 3. Owners get the lowest GSIs that are free, outside of the reserved ones, and what is dropped
    /// leaves no trace.
    #[test]
    fn owners_get_the_lowest_free_gsis(setup in setups(), plan in plans(Failing::One)) {
        run(setup, &plan, |world, op, _| {
            prop_assert_eq!(world.disagreement(), None, "{:?}", op);
            if world.model.cached.is_empty() {
                let before = (world.router.save(), world.router.routes());
                let unused = world.router.batch(|batch| {
                    batch.add_msi(model::message(plan::To { vcpu: 0, garbage: false }, 0x50))
                });
                let lowest = (24..).find(|gsi| !world.model.owned().contains(gsi));
                match unused {
                    Ok(unused) => prop_assert_eq!(Some(unused.gsi().0), lowest),
                    Err(RouterError::Route(_)) => {}
                    Err(error) => prop_assert!(false, "{}", error),
                }
                prop_assert_eq!((world.router.save(), world.router.routes()), before);
            }
            Ok(())
        })?;
    }

    /// 4. A commit is one table, and none if no route differs.
    #[test]
    fn a_batch_is_one_table_and_none_if_nothing_differs(
        setup in setups(), plan in plans(Failing::None)
    ) {
        run(setup, &plan, |world, op, ran| {
            prop_assert!(ran.tables <= ran.batches, "{:?}: {} tables", op, ran.tables);
            prop_assert!(ran.tables > 0 || !ran.changed);
            if matches!(op, Op::Restore | Op::Rebuild) {
                prop_assert_eq!(ran.tables > 0, !world.table().is_empty(), "{:?}", op);
            } else if ran.batches == 1 {
                prop_assert_eq!(ran.tables > 0, ran.changed, "{:?}", op);
            }
            prop_assert_eq!(world.witness.complaints(), [""; 0]);
            Ok(())
        })?;
    }

    /// 5. A failed commit says so, KVM has the last good table, and the next good batch works.
    #[test]
    fn a_failed_commit_changes_nothing(setup in setups(), plan in plans(Failing::One)) {
        run(setup, &plan, |world, op, ran| {
            prop_assert!(ran.tables_agree, "{:?}", op);
            prop_assert!(!ran.lost, "one failure can be undone");
            prop_assert_eq!(world.table(), world.model.table(), "{:?}", op);
            prop_assert_eq!(world.disagreement(), None, "{:?}", op);
            Ok(())
        })?;
    }

    /// 5. Even if undoing fails, too, router and KVM agree, and owners can go.
    #[test]
    fn router_and_kvm_agree_even_if_undoing_fails(
        setup in setups(), plan in plans(Failing::Several)
    ) {
        let mut world = run(setup, &plan, |world, op, ran| {
            prop_assert!(ran.tables_agree, "{:?}", op);
            let irqfds = world.router.irqfds().into_iter().map(|i| (i.event, i.gsi));
            let of_kvm = world.view.irqfds().into_iter().map(|i| (i.event, i.gsi));
            let irqfds: BTreeSet<_> = irqfds.collect();
            prop_assert_eq!(&irqfds, &of_kvm.collect(), "{:?}", op);
            prop_assert_eq!(world.witness.complaints(), [""; 0], "{:?}", op);
            if ran.lost {
                world.clear();
                prop_assert!(world.router.irqfds().iter().all(|i| i.gsi.0 < 24));
                prop_assert!(world.router.routes().iter().all(|r| r.gsi.0 < 24
                    || world.router.allocated().contains(&r.gsi)));
            } else {
                prop_assert_eq!(irqfds, world.irqfds(), "{:?}", op);
                prop_assert_eq!(world.table(), world.model.table(), "{:?}", op);
            }
            Ok(())
        })?;
        world.clear();
        prop_assert_eq!(world.fake.findings(), []);
    }

    /// 7. KVM is never asked for what it refuses, nor for what costs events.
    #[test]
    fn kvm_never_has_to_refuse(setup in setups(), plan in plans(Failing::One)) {
        let world = run(setup, &plan, |world, op, _| {
            prop_assert_eq!(world.witness.complaints(), [""; 0], "{:?}", op);
            prop_assert_eq!(world.fake.findings(), [], "{:?}", op);
            Ok(())
        })?;
        let fake = world.fake.clone();
        drop(world);
        prop_assert_eq!(fake.live().irqfds, 0);
    }

    /// 8. Exhaustion is a typed error without side effects; of the cache all goes at once, and nothing
    /// else ever.
    #[test]
    fn exhaustion_is_an_error_and_evicts_only_the_cache(
        setup in setups(), plan in plans(Failing::One)
    ) {
        let setup = Setup { limit: 44, ..setup };
        run(setup, &plan, |world, op, ran| {
            if let Some(RouterError::Route(_)) = ran.error {
                prop_assert!(ran.tables <= ran.batches.saturating_sub(1) || ran.injected > 0);
            }
            prop_assert_eq!(world.table(), world.model.table(), "{:?}", op);
            let allocated: Vec<Gsi> = world.model.allocated().into_iter().map(Gsi).collect();
            prop_assert_eq!(world.router.allocated(), allocated, "{:?}", op);
            prop_assert!(world.router.routes().len() <= 44);
            Ok(())
        })?;
    }

    /// 9. The ledger is what KVM has; each event is delivered once, to where its route leads then,
    /// and waits while it is held back.
    #[test]
    fn every_event_is_delivered_once(setup in setups(), plan in plans(Failing::One)) {
        run(setup, &plan, |world, op, ran| {
            prop_assert_eq!(&ran.taken, &ran.expected, "{:?}", op);
            let irqfds = world.irqfds();
            let of_router = world.router.irqfds().into_iter().map(|i| (i.event, i.gsi));
            let of_kvm = world.view.irqfds().into_iter().map(|i| (i.event, i.gsi));
            prop_assert_eq!(&of_kvm.collect::<BTreeSet<_>>(), &irqfds, "{:?}", op);
            prop_assert_eq!(&of_router.collect::<BTreeSet<_>>(), &irqfds, "{:?}", op);
            prop_assert_eq!(world.disagreement(), None, "{:?}", op);
            prop_assert_eq!(world.take_ends(), None, "{:?}", op);
            prop_assert_eq!(world.fake.findings(), [], "{:?}", op);
            Ok(())
        })?;
    }

    /// 9, with lines: the I/O APIC in user space sends, keeps and ends as the 82093AA does.
    #[test]
    fn pins_in_user_space_deliver_as_the_model_does(
        setup in setups(), plan in plans(Failing::One)
    ) {
        let lines = |op: &Op| !matches!(op, Op::Batch(_) | Op::SignalRoute(_) | Op::DropRoute(_));
        let plan: Plan = plan.into_iter().filter(|(op, _)| lines(op)).collect();
        let setup = Setup { pins: LegacyPins::Userspace, msi: hv_core::init::MsiMode::Direct, ..setup };
        run(setup, &plan, |world, op, ran| {
            prop_assert_eq!(&ran.taken, &ran.expected, "{:?}", op);
            prop_assert_eq!(world.disagreement(), None, "{:?}", op);
            prop_assert_eq!(world.take_ends(), None, "{:?}", op);
            Ok(())
        })?;
    }

    /// 10. When all owners are gone, the table is what it began with, and nothing else is left.
    #[test]
    fn nothing_is_left_when_all_owners_are_gone(setup in setups(), plan in plans(Failing::One)) {
        let mut world = run(setup, &plan, |_, _, _| Ok(()))?;
        world.clear();
        prop_assert_eq!(world.router.allocated().len(), world.model.cached.len());
        prop_assert!(world.router.irqfds().is_empty() && world.view.irqfds().is_empty());
        prop_assert_eq!(world.table(), world.model.table());
        let (live, vm) = (world.fake.live(), world.view.clone());
        prop_assert_eq!((live.irqfds, live.vms), (0, 1), "{:?}", vm);
        let fake = world.fake.clone();
        drop(world);
        let live = fake.live();
        prop_assert_eq!((live.eventfds, live.vms, live.irqfds), (0, 0, 0));
        prop_assert_eq!(fake.findings(), []);
    }
}
