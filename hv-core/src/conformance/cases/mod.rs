//! The cases, by subject.

mod bounds;
mod capabilities;
mod corners;
mod dirty;
mod dirty_rings;
mod exits;
mod ioevents;
mod irqfds;
mod lines;
mod messages;
mod order;
mod pics;
mod pins;
mod routing;
mod slots;
mod tables;
mod zones;

use super::{Case, Platform};

/// Every case, in the order in which they are reported.
#[must_use]
pub fn cases<P: Platform>() -> Vec<Case<P>> {
    let groups = [
        capabilities::cases(),
        order::cases(),
        bounds::cases(),
        exits::cases(),
        tables::cases(),
        routing::cases(),
        irqfds::cases(),
        messages::cases(),
        lines::cases(),
        pins::cases(),
        pics::cases(),
        ioevents::cases(),
        slots::cases(),
        dirty::cases(),
        dirty_rings::cases(),
        zones::cases(),
        corners::cases(),
    ];
    groups.into_iter().flatten().collect()
}
