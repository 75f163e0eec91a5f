//! What may happen: operations, and the calls that fail while they are carried out.

use hv_core::layer::Faults;
use hv_core::{Errno, Ioctl};
use proptest::prelude::*;

/// Pages of the guest that slots may be at.
pub(crate) const GUEST: u64 = 400;
/// Pages of the mapping that all slots are parts of.
pub(crate) const HOST: u64 = 300;

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Add {
        page: u64,
        pages: u64,
        host: u64,
        readonly: bool,
        log: bool,
    },
    Remove(usize),
    Drop(usize),
    Move(usize, u64),
    Unmap(usize),
    Map(usize),
    Log(usize, bool),
    /// The guest writes to pages of a slot, on a vCPU.
    Guest {
        vcpu: u32,
        slot: usize,
        pages: Vec<u64>,
    },
    /// The VMM writes some bytes from the middle of a page of the mapping.
    Vmm {
        page: u64,
        pages: u64,
    },
    /// A guest writes to all pages of a slot, which is more than a ring has room for.
    Flood(usize),
    Harvest,
    Read,
    /// Of what was read last; it begins and ends some bytes before or after a page does.
    Clear {
        page: u64,
        pages: u64,
        start: i64,
        end: i64,
    },
}

/// Calls that fail during an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The one after so many.
    Nth(u64),
    /// All of a kind.
    Of(Ioctl),
}

impl Fault {
    pub(crate) fn plan(self) -> Faults {
        match self {
            Self::Nth(n) => Faults::nth(n, Errno::EIO),
            Self::Of(ioctl) => Faults::of(ioctl, Errno::EIO),
        }
    }
}

pub(crate) type Plan = Vec<(Op, Option<Fault>)>;

pub(crate) fn plans() -> impl Strategy<Value = Plan> {
    let slot = || 0..8_usize;
    let op = prop_oneof![
        3 => (0..GUEST, 1..140_u64, 0..HOST, prop::bool::weighted(0.1), prop::bool::weighted(0.8))
            .prop_map(|(page, pages, host, readonly, log)| {
                Op::Add { page, pages: pages.min(HOST - host), host, readonly, log }
            }),
        1 => slot().prop_map(Op::Remove),
        1 => slot().prop_map(Op::Drop),
        2 => (slot(), 0..GUEST).prop_map(|(slot, page)| Op::Move(slot, page)),
        1 => slot().prop_map(Op::Unmap),
        2 => slot().prop_map(Op::Map),
        2 => (slot(), prop::bool::weighted(0.7)).prop_map(|(slot, on)| Op::Log(slot, on)),
        8 => (0..2_u32, slot(), prop::collection::vec(0..140_u64, 1..6))
            .prop_map(|(vcpu, slot, pages)| Op::Guest { vcpu, slot, pages }),
        1 => slot().prop_map(Op::Flood),
        4 => (0..HOST, 0..70_u64).prop_map(|(page, pages)| Op::Vmm { page, pages }),
        3 => Just(Op::Harvest),
        3 => Just(Op::Read),
        4 => (1..GUEST, 1..200_u64, -9..9_i64, -9..9_i64)
            .prop_map(|(page, pages, start, end)| Op::Clear { page, pages, start, end }),
    ];
    let ioctl = prop_oneof![
        Just(Ioctl::GetDirtyLog),
        Just(Ioctl::ClearDirtyLog),
        Just(Ioctl::ResetDirtyRings),
        Just(Ioctl::SetUserMemoryRegion),
    ];
    let fault = prop_oneof![(0..4_u64).prop_map(Fault::Nth), ioctl.prop_map(Fault::Of)];
    prop::collection::vec((op, prop::option::weighted(0.2, fault)), 1..30)
}
