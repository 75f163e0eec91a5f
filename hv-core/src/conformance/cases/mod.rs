//! The cases, by subject.

mod capabilities;
mod dirty;
mod ioevents;
mod order;
mod routing;
mod slots;
mod zones;

use super::{Case, Platform};

/// Every case, in the order in which they are reported.
#[must_use]
pub fn cases<P: Platform>() -> Vec<Case<P>> {
    let groups = [
        capabilities::cases(),
        order::cases(),
        routing::cases(),
        ioevents::cases(),
        slots::cases(),
        dirty::cases(),
        zones::cases(),
    ];
    groups.into_iter().flatten().collect()
}
