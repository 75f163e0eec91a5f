//! What may happen to a map: edits, and the calls that fail while they are committed.

use proptest::prelude::*;

use crate::model::{CELLS, PER_PAGE};

/// Memories there are, and their pages.
pub(crate) const MEMORIES: usize = 2;
pub(crate) const MEMORY_PAGES: u64 = 24;

/// A host and a map to begin with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    /// Slots there are.
    pub(crate) slots: u32,
    pub(crate) joins: bool,
    pub(crate) readonly: bool,
    /// Pages of a slot.
    pub(crate) max: u64,
}

pub(crate) fn setups() -> impl Strategy<Value = Setup> {
    let slots = prop_oneof![2 => Just(64), 1 => Just(5)];
    let max = prop_oneof![3 => Just(1 << 20), 1 => Just(4), 1 => Just(3)];
    (slots, prop::bool::weighted(0.7), prop::bool::weighted(0.9), max)
        .prop_map(|(slots, joins, readonly, max)| Setup { slots, joins, readonly, max })
}

/// What a region is, in cells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) cell: u64,
    pub(crate) priority: i32,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum What {
    Memory { memory: usize, offset: u64 },
    Mmio,
    Alias { target: usize, offset: u64 },
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Add {
        what: What,
        len: u64,
        place: Option<Place>,
        readonly: bool,
        log_dirty: bool,
    },
    Remove(usize),
    Place(usize, Place),
    /// To where another one is, which goes to where this is.
    Swap(usize, usize),
    Unplace(usize),
    Readonly(usize, bool),
    LogDirty(usize, bool),
    /// All regions.
    LogAll(bool),
    Retarget(usize, usize, u64),
}

/// What becomes of an edit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    Commit,
    /// The plan is dropped.
    Drop,
    /// The call before which there were so many fails.
    Fail(usize),
    /// So does each after it, for so many.
    FailAll(usize, usize),
}

#[derive(Debug, Clone)]
pub(crate) struct Edit {
    pub(crate) ops: Vec<Op>,
    /// Whether it goes on after an operation that was refused.
    pub(crate) goes_on: bool,
    pub(crate) fate: Fate,
}

fn cell() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..CELLS / PER_PAGE).prop_map(|page| page * PER_PAGE),
        1 => 0..CELLS + 8,
    ]
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (1..9_u64).prop_map(|pages| pages * PER_PAGE),
        2 => 0..30_u64,
        1 => Just(CELLS),
    ]
}

fn place() -> impl Strategy<Value = Place> {
    (cell(), 0..3_i32).prop_map(|(cell, priority)| Place { cell, priority })
}

/// Memory beside other memory as often as not: where its cells are in the guest follows from where
/// they are in memory.
fn memory() -> impl Strategy<Value = Op> {
    let begins = prop_oneof![
        6 => (0..MEMORY_PAGES).prop_map(|page| page * PER_PAGE),
        1 => 0..MEMORY_PAGES * PER_PAGE,
    ];
    let away = prop_oneof![6 => Just(0_u64), 2 => Just(8 * PER_PAGE), 1 => 0..CELLS];
    let flags = (prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    (0..MEMORIES, begins, len(), away, 0..3_i32, prop::bool::weighted(0.9), flags).prop_map(
        |(memory, offset, len, away, priority, placed, (readonly, log_dirty))| {
            let len = len.min(MEMORY_PAGES * PER_PAGE - offset);
            let place = placed.then_some(Place { cell: offset + away, priority });
            Op::Add { what: What::Memory { memory, offset }, len, place, readonly, log_dirty }
        },
    )
}

fn alias() -> impl Strategy<Value = Op> {
    let offset = prop_oneof![4 => Just(0_u64), 4 => (0..4_u64).prop_map(|n| n * 4), 1 => 0..20_u64];
    (any::<usize>(), offset, len(), prop::option::weighted(0.8, place()), prop::bool::weighted(0.2))
        .prop_map(|(target, offset, len, place, readonly)| {
            let what = What::Alias { target, offset };
            Op::Add { what, len, place, readonly, log_dirty: false }
        })
}

fn op() -> impl Strategy<Value = Op> {
    let i = any::<usize>();
    prop_oneof![
        7 => memory(),
        2 => (len(), place()).prop_map(|(len, place)| Op::Add {
            what: What::Mmio, len, place: Some(place), readonly: false, log_dirty: false,
        }),
        3 => alias(),
        3 => i.prop_map(Op::Remove),
        3 => (i, place()).prop_map(|(i, place)| Op::Place(i, place)),
        1 => (i, i).prop_map(|(i, other)| Op::Swap(i, other)),
        1 => i.prop_map(Op::Unplace),
        2 => (i, any::<bool>()).prop_map(|(i, on)| Op::Readonly(i, on)),
        2 => (i, any::<bool>()).prop_map(|(i, on)| Op::LogDirty(i, on)),
        1 => any::<bool>().prop_map(Op::LogAll),
        2 => (i, i, 0..8_u64).prop_map(|(i, target, offset)| Op::Retarget(i, target, offset)),
    ]
}

fn fate(failing: bool) -> impl Strategy<Value = Fate> {
    let weight = if failing { 1 } else { 0 };
    prop_oneof![
        12 => Just(Fate::Commit),
        1 => Just(Fate::Drop),
        4 * weight => (0..6_usize).prop_map(Fate::Fail),
        2 * weight => (0..6_usize, 2..4_usize).prop_map(|(n, all)| Fate::FailAll(n, all)),
    ]
}

pub(crate) fn edits(failing: bool) -> impl Strategy<Value = Vec<Edit>> {
    let ops = prop::collection::vec(op(), 0..4);
    let edit = (ops, any::<bool>(), fate(failing)).prop_map(|(ops, goes_on, fate)| Edit {
        ops,
        goes_on,
        fate,
    });
    prop::collection::vec(edit, 0..16)
}
