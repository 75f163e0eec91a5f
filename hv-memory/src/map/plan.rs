//! From the slots there are to those there are to be: the operations, and in which order.
//!
//! Pure: it knows neither map nor VM.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use hv_core::{HostRange, SlotFlags};
use vm_memory::GuestAddress;

use super::slots::Wanted;
use crate::{GuestRange, NewSlot};

/// A call of `KVM_SET_USER_MEMORY_REGION` that a commit will make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotOperation {
    /// The slot of a range is deleted.
    Delete {
        /// The range.
        range: GuestRange,
    },
    /// The slot of a range is moved.
    Move {
        /// The range.
        range: GuestRange,
        /// Where it begins afterwards.
        to: GuestAddress,
    },
    /// The slot of a range begins to record which pages are written, or ends that.
    LogDirty {
        /// The range.
        range: GuestRange,
        /// Whether it begins.
        log_dirty: bool,
    },
    /// A slot is made.
    Add(NewSlot),
}

impl fmt::Display for SlotOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete { range } => write!(f, "delete the slot at {range}"),
            Self::Move { range, to } => write!(f, "move the slot at {range} to {:#x}", to.0),
            Self::LogDirty { range, log_dirty } => {
                let verb = if *log_dirty { "begin" } else { "cease" };
                write!(f, "{verb} to log the slot at {range}")
            }
            Self::Add(NewSlot { name, guest, host, flags }) => {
                let readonly = if flags.readonly { ", readonly" } else { "" };
                let log = if flags.log_dirty { ", logging" } else { "" };
                let (at, len) = (guest.0, host.len());
                write!(f, "add {name:?} at {at:#x}, {len:#x} bytes{readonly}{log}")
            }
        }
    }
}

/// A slot there is.
#[derive(Debug, Clone)]
pub(super) struct Have {
    pub(super) range: Range<u64>,
    pub(super) host: HostRange,
    pub(super) flags: SlotFlags,
}

#[derive(Debug)]
pub(super) struct Steps {
    /// What is deleted, what is moved, what logs, what is made, in this order.
    pub(super) operations: Vec<SlotOperation>,
    /// Memory before and afterwards that is away in between.
    pub(super) holes: Vec<GuestRange>,
    /// How many slots more there are afterwards; less than none if there are fewer.
    pub(super) more: isize,
}

/// A slot that is moved.
struct Moving {
    from: Range<u64>,
    to: Wanted,
}

/// The steps from what is there to what is wanted: each all that is there in some windows, by address.
pub(super) fn steps(
    have: BTreeMap<u64, Have>,
    mut wanted: BTreeMap<u64, Wanted>,
    name_at: impl Fn(u64) -> Arc<str>,
) -> Steps {
    let mut logs = Vec::new();
    let mut old = Vec::new();
    for (start, have) in have {
        match wanted.get(&start) {
            Some(same) if is_same(&have, same) => {
                let log_dirty = same.flags.log_dirty;
                if have.flags.log_dirty != log_dirty {
                    let range = GuestRange::of(&have.range);
                    logs.push(SlotOperation::LogDirty { range, log_dirty });
                }
                wanted.remove(&start);
            }
            _ => old.push(have),
        }
    }
    let (mut deletes, moving) = split(old, &mut wanted);
    let holes = holes(&deletes, &moving, &wanted);
    let (moves, stuck) = ordered(moving);
    for Moving { from, to } in stuck {
        deletes.push(from);
        wanted.insert(to.range.start, to);
    }
    let more = wanted.len().cast_signed().saturating_sub(deletes.len().cast_signed());
    let delete = |range: &Range<u64>| SlotOperation::Delete { range: GuestRange::of(range) };
    let moved = |moving: Moving| SlotOperation::Move {
        range: GuestRange::of(&moving.from),
        to: GuestAddress(moving.to.range.start),
    };
    let add = |Wanted { range, host, flags }| {
        let guest = GuestAddress(range.start);
        SlotOperation::Add(NewSlot { name: name_at(range.start), guest, host, flags })
    };
    let operations = deletes.iter().map(delete);
    let operations = operations.chain(moves.into_iter().map(moved)).chain(logs);
    let operations = operations.chain(wanted.into_values().map(add)).collect();
    Steps { operations, holes, more }
}

/// Whether a slot needs no operation but perhaps a change of its logging.
fn is_same(have: &Have, wanted: &Wanted) -> bool {
    have.range == wanted.range
        && have.host == wanted.host
        && have.flags.readonly == wanted.flags.readonly
}

/// What goes, by address, and what of it can be moved to where it is wanted. A slot that logs is not
/// moved: what was written is known by its old addresses, and is to be asked for while it has them.
fn split(old: Vec<Have>, wanted: &mut BTreeMap<u64, Wanted>) -> (Vec<Range<u64>>, Vec<Moving>) {
    let key = |host: &HostRange, flags: SlotFlags| (host.address(), host.len(), flags.readonly);
    // Two wanted slots on one memory: each is the target of one move at most.
    let mut targets: HashMap<_, Vec<u64>> = HashMap::new();
    for (&start, wanted) in wanted.iter().rev().filter(|(_, wanted)| !wanted.flags.log_dirty) {
        targets.entry(key(&wanted.host, wanted.flags)).or_default().push(start);
    }
    let (mut deletes, mut moving) = (Vec::new(), Vec::new());
    for have in old {
        let target = match have.flags.log_dirty {
            true => None,
            false => targets.get_mut(&key(&have.host, have.flags)).and_then(Vec::pop),
        };
        match target.and_then(|start| wanted.remove(&start)) {
            Some(to) => moving.push(Moving { from: have.range, to }),
            None => deletes.push(have.range),
        }
    }
    (deletes, moving)
}

/// What is both taken away and given back.
fn holes(
    deletes: &[Range<u64>],
    moving: &[Moving],
    wanted: &BTreeMap<u64, Wanted>,
) -> Vec<GuestRange> {
    let mut gone: Vec<_> = deletes.iter().chain(moving.iter().map(|m| &m.from)).collect();
    let mut given: Vec<_> =
        wanted.values().map(|w| &w.range).chain(moving.iter().map(|m| &m.to.range)).collect();
    gone.sort_unstable_by_key(|range| range.start);
    given.sort_unstable_by_key(|range| range.start);
    let (mut gone, mut given) = (gone.into_iter().peekable(), given.into_iter().peekable());
    let mut holes: Vec<Range<u64>> = Vec::new();
    while let (Some(away), Some(back)) = (gone.peek(), given.peek()) {
        let both = away.start.max(back.start)..away.end.min(back.end);
        if !both.is_empty() {
            match holes.last_mut() {
                Some(last) if last.end == both.start => last.end = both.end,
                _ => holes.push(both),
            }
        }
        // Each list is without overlaps: what ends first meets nothing more.
        let _ = if away.end <= back.end { gone.next() } else { given.next() };
    }
    holes.iter().map(GuestRange::of).collect()
}

/// Moves in an order in which each goes to where nothing is any more, and those for which there is no
/// such order: they are in each other's way in a circle.
fn ordered(moving: Vec<Moving>) -> (Vec<Moving>, Vec<Moving>) {
    let mut froms: BTreeMap<u64, (u64, usize)> =
        moving.iter().enumerate().map(|(i, m)| (m.from.start, (m.from.end, i))).collect();
    let mut moving: BTreeMap<usize, Moving> = moving.into_iter().enumerate().collect();
    // What waits for what. There is more to wait for as often as ranges overlap, which is no more often
    // than there are ranges.
    let mut waits_for: HashMap<usize, usize> = HashMap::new();
    let mut waiting: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut ready: Vec<usize> = moving.keys().rev().copied().collect();
    let (mut moves, mut stuck) = (Vec::new(), Vec::new());
    loop {
        while let Some(i) = ready.pop() {
            let Some(Moving { from, to }) = moving.get(&i) else { continue };
            // It may itself be the nearest that begins before.
            let before = froms.range(..to.range.start).rev().take(2);
            let mut near = before.chain(froms.range(to.range.clone()));
            let in_the_way = near.find(|&(_, &(end, other))| other != i && end > to.range.start);
            if let Some((_, &(_, other))) = in_the_way {
                waits_for.insert(i, other);
                waiting.entry(other).or_default().push(i);
                continue;
            }
            froms.remove(&from.start);
            moves.extend(moving.remove(&i));
            ready.extend(waiting.remove(&i).into_iter().flatten());
        }
        // Whatever is left waits for a circle or is in one. One of those less, and the others go on.
        let Some(i) = moving.keys().next().map(|&first| in_circle(first, &waits_for)) else {
            return (moves, stuck);
        };
        if let Some(one) = moving.remove(&i) {
            froms.remove(&one.from.start);
            stuck.push(one);
        }
        ready.extend(waiting.remove(&i).into_iter().flatten());
    }
}

/// Who is in the circle that `first` waits for.
fn in_circle(first: usize, waits_for: &HashMap<usize, usize>) -> usize {
    let (mut seen, mut at) = (HashSet::new(), first);
    while seen.insert(at) {
        at = waits_for.get(&at).copied().unwrap_or(at);
    }
    at
}
