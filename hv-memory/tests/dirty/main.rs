#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on fails"
)]
//! Dirty pages as a property of sequences of operations: the guest and the VMM write, pages are
//! harvested, read and cleared, slots come, go, move and toggle their log, calls fail; against a set
//! of page numbers and the strict KVM in memory.
//!
//! `PROPTEST_CASES=1000000 cargo test -p hv-memory --release --test dirty` runs a million.

mod discarded;
mod failing;
mod kvm;
mod meanwhile;
mod model;
mod plan;
mod world;

use hv_memory::DirtyTracking;
use plan::{Plan, plans};
use proptest::prelude::*;
use world::World;

const PAGE: u64 = 4096;

/// As many cases as `PROPTEST_CASES` says, or else enough for each change.
fn cases(cases: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig { cases, ..config },
    }
}

/// Carries a plan out with pages tracked in one way.
fn run(how: DirtyTracking, plan: &Plan) -> Result<(), TestCaseError> {
    let mut world = World::new(how);
    for (op, fault) in plan {
        if let Err(wrong) = world.run(op, *fault) {
            prop_assert!(false, "{:?}: {}", op, wrong);
        }
    }
    let end = world.finish();
    prop_assert!(end.is_ok(), "in the end: {:?}", end);
    Ok(())
}

// What is told is what was written, each page once, and nothing is lost with its slot or with a call
// that fails. Clearing touches no page that was not asked for.
proptest! {
    #![proptest_config(cases(4096))]

    #[test]
    fn what_logs_tell_is_what_was_written(plan in plans()) {
        run(DirtyTracking::Log, &plan)?;
    }

    #[test]
    fn with_manual_protection_what_is_told_is_what_was_written(plan in plans()) {
        run(DirtyTracking::ManualProtect { initially_set: false }, &plan)?;
    }

    #[test]
    fn pages_that_count_as_written_at_first_are_told_as_well(plan in plans()) {
        run(DirtyTracking::ManualProtect { initially_set: true }, &plan)?;
    }

    #[test]
    fn what_rings_tell_is_what_was_written(plan in plans()) {
        run(DirtyTracking::Ring { bytes: 4096 }, &plan)?;
    }
}
