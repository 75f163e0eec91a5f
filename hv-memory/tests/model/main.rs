#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on fails"
)]
//! The invariants of the address map and its slots, as properties of sequences of edits, with calls
//! that fail, against a naive model and the KVM in memory.
//!
//! `PROPTEST_CASES=1000000 cargo test -p hv-memory --release --test model` runs a million of each.

mod kvm;
mod model;
mod plan;
mod world;

use plan::{Edit, Fate, Setup, edits, setups};
use proptest::prelude::*;
use world::World;

type Checked = Result<(), TestCaseError>;

/// As many cases as `PROPTEST_CASES` says, or else few enough for each change.
fn cases(cases: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig { cases, ..config },
    }
}

/// Carries edits out. After each, map, KVM and model agree.
fn run(setup: Setup, edits: &[Edit]) -> Result<World, TestCaseError> {
    let mut world = World::new(setup);
    world.agree()?;
    for edit in edits {
        world.run(edit)?;
        world.agree()?;
    }
    Ok(world)
}

proptest! {
    #![proptest_config(cases(4096))]

    /// Slots are those of the model, in as few operations as can be, and no vCPU that runs misses
    /// memory.
    #[test]
    fn map_kvm_and_model_agree(setup in setups(), edits in edits(false)) {
        run(setup, &edits)?.end()?;
    }

    /// The same with calls that fail: nothing has changed, or what is unsettled is repaired by the
    /// next commit.
    #[test]
    fn they_agree_whatever_fails(setup in setups(), edits in edits(true)) {
        let mut world = run(setup, &edits)?;
        let repair = Edit { ops: Vec::new(), goes_on: false, fate: Fate::Commit };
        if world.run(&repair)? {
            prop_assert_eq!(world.live.unsettled(), []);
        }
        world.agree()?;
        world.end()?;
    }
}
