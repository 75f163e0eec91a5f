//! Sequences that random ones seldom have.

use hv_core::Ioctl;
use hv_memory::DirtyTracking;

use crate::plan::{Fault, Op};
use crate::world::World;

fn run(how: DirtyTracking, plan: &[(Op, Option<Fault>)]) {
    let mut world = World::new(how);
    for (op, fault) in plan {
        world.run(op, *fault).unwrap_or_else(|wrong| panic!("{op:?}: {wrong}"));
    }
    world.finish().unwrap();
}

fn add(page: u64, host: u64) -> (Op, Option<Fault>) {
    (Op::Add { page, pages: 70, host, readonly: false, log: true }, None)
}

fn write(slot: usize, pages: &[u64]) -> (Op, Option<Fault>) {
    (Op::Guest { vcpu: 0, slot, pages: pages.to_vec() }, None)
}

const CLEAR: Op = Op::Clear { page: 10, pages: 300, start: 0, end: 0 };

/// The second slot's log can't be cleared when the first one's has been.
#[test]
fn what_was_cleared_before_a_failure_is_still_told() {
    let how = DirtyTracking::ManualProtect { initially_set: false };
    let clear = (CLEAR, Some(Fault::Nth(1)));
    run(
        how,
        &[add(5, 0), add(100, 100), write(0, &[3, 66]), write(1, &[4]), (Op::Read, None), clear],
    );
}

/// A page that is collected because a slot goes, and cleared, is watched before it is clean.
#[test]
fn what_was_collected_and_cleared_is_told_when_it_is_written_again() {
    let how = DirtyTracking::Ring { bytes: 4096 };
    let read = (Op::Read, None);
    let gone = (Op::Remove(1), None);
    let (again, clear) = (write(0, &[20]), (CLEAR, None));
    let sequence =
        [add(5, 0), add(100, 100), write(0, &[20]), read, again.clone(), gone, clear, again];
    run(how, &sequence);
    // Neither if that fails, too.
    let [add_one, add_two, write, read, again, gone, clear, last] = sequence;
    let failed = (CLEAR, Some(Fault::Of(Ioctl::ResetDirtyRings)));
    run(how, &[add_one, add_two, write, read, again.clone(), gone, failed, again, clear, last]);
}
