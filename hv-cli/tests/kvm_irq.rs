//! What guests receive of the interrupts hv-irq routes, on `/dev/kvm`.

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

irq::scenarios!(kvm::DevKvm);
