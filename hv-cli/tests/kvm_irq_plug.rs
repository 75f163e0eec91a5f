//! A device that is plugged and unplugged 10,000 times leaves nothing, on `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../../hv-kvm/tests/common/mod.rs"]
mod common;
mod irq;
mod kvm;

use irq::Host as _;

// The only test of this binary: it counts what the process has.
#[test]
fn ten_thousand_devices_leave_nothing() {
    irq::plug::plug_and_unplug(&kvm::DevKvm::open(), 10_000);
}
