//! The cases, by subject.

mod ioevents;
mod order;
mod routing;
mod slots;

use super::{Case, Platform};

/// Every case, in the order in which they are reported.
#[must_use]
pub fn cases<P: Platform>() -> Vec<Case<P>> {
    let groups = [order::cases(), routing::cases(), ioevents::cases(), slots::cases()];
    groups.into_iter().flatten().collect()
}
