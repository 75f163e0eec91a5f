//! The conformance suite of hv-core on `/dev/kvm`: what the KVM in memory claims, KVM does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;
mod conformance;

use std::io::{self, Write};

/// `HV_CONFORMANCE` selects the cases whose names contain it.
#[test]
fn dev_kvm_follows_every_rule() {
    let filter = std::env::var("HV_CONFORMANCE").unwrap_or_default();
    let report = hv_core::conformance::run(&conformance::DevKvm::open(), &filter);
    // Past the capture of the test harness: which rules were checked is the result.
    writeln!(io::stdout(), "{report}").unwrap();
    assert!(report.conforms(), "this KVM does not follow the rules above, or none was checked");
}
