//! The conformance suite on the KVM in memory: the same cases as on `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod scripted;

use std::collections::BTreeSet;
use std::io::{self, Write};

use hv_core::conformance::{Checked, Kernels, Outcome, Platform, RawRequest, cases, run};
use hv_core::fake::{FakeHost, FakeKvm, FakeVcpu, FakeVm};
use hv_core::{Capability, Errno};
use scripted::Scripted;

/// The fake as it is, or spoiled, to see that the suite notices.
#[derive(Default)]
struct Fake {
    kvm: FakeKvm,
    kernel: Option<(u32, u32)>,
    /// Its guests take no interrupts.
    deaf: bool,
    /// It panics at requests the traits can't express.
    panics: bool,
}

impl Platform for Fake {
    type Hypervisor = FakeKvm;
    type Guest = Scripted;

    fn name(&self) -> String {
        "the KVM in memory".into()
    }

    fn kernel(&self) -> Option<(u32, u32)> {
        self.kernel
    }

    fn hypervisor(&self) -> &FakeKvm {
        &self.kvm
    }

    fn guest(&self, vm: &FakeVm, vcpu: FakeVcpu) -> Checked<Scripted> {
        let mut guest = Scripted::new(vm, vcpu)?;
        guest.deaf = self.deaf;
        Ok(guest)
    }

    /// The fake only has what the traits can express.
    fn raw(&self, _vm: &FakeVm, _request: &RawRequest) -> Option<Result<(), Errno>> {
        assert!(!self.panics, "as it was told to");
        None
    }
}

/// `HV_CONFORMANCE` selects the cases whose names contain it.
#[test]
fn the_fake_follows_every_rule() {
    let filter = std::env::var("HV_CONFORMANCE").unwrap_or_default();
    let report = run(&Fake::default(), &filter);
    // Past the capture of the test harness: which rules were checked is the result.
    writeln!(io::stdout(), "{report}").unwrap();
    assert!(report.conforms(), "the fake does not follow the rules above, or none was checked");
}

#[test]
fn cases_have_names_of_their_own_and_rules_in_sentences() {
    let cases = cases::<Fake>();
    assert!(cases.len() >= 90, "{} cases", cases.len());
    let mut names = BTreeSet::new();
    for case in &cases {
        let kebab = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(case.name.chars().all(kebab), "{}", case.name);
        assert!(names.insert(case.name), "{} is there twice", case.name);
        assert!(case.rule.ends_with('.'), "{}: {}", case.name, case.rule);
    }
}

/// How the one case whose name contains `filter` goes.
fn outcome(fake: &Fake, filter: &str) -> Outcome {
    let report = run(fake, filter);
    assert_eq!(report.rows.len(), 1, "{report}");
    assert_eq!(report.conforms(), report.rows[0].outcome == Outcome::Pass);
    report.rows[0].outcome.clone()
}

#[test]
fn what_breaks_a_rule_fails() {
    let case = "nmi-taken-once";
    assert_eq!(outcome(&Fake::default(), case), Outcome::Pass);
    let deaf = Fake { deaf: true, ..Fake::default() };
    assert_eq!(outcome(&deaf, case), Outcome::Fail("interrupts: expected [2], got []".into()));
}

#[test]
fn a_panic_fails_its_case_only() {
    let case = "enable-cap-unknown";
    assert!(matches!(outcome(&Fake::default(), case), Outcome::NotApplicable(_)));
    let panics = Fake { panics: true, ..Fake::default() };
    assert!(matches!(outcome(&panics, case), Outcome::Fail(_)));
}

#[test]
fn what_a_host_or_its_kernel_does_not_have_is_not_applicable() {
    let case = "pin-in-split-mode";
    assert_eq!(outcome(&Fake::default(), case), Outcome::Pass);
    let host = FakeHost::default().without(Capability::SplitIrqchip);
    let without = Fake { kvm: FakeKvm::new(host), ..Fake::default() };
    let Outcome::NotApplicable(why) = outcome(&without, case) else { panic!("it was asked") };
    assert!(why.starts_with("no KVM_CAP_SPLIT_IRQCHIP: "), "{why}");

    let since = cases::<Fake>().into_iter().find_map(|case| match case.kernels {
        Kernels::Since(major, minor, _) => Some((case.name, (major, minor))),
        _ => None,
    });
    let (name, (major, minor)) = since.expect("some rules are younger than KVM");
    let older = Fake { kernel: Some((major.saturating_sub(1), minor)), ..Fake::default() };
    let row = run(&older, name).rows.into_iter().find(|row| row.name == name);
    let why = row.map(|row| row.outcome);
    assert!(matches!(&why, Some(Outcome::NotApplicable(why)) if why.contains("since Linux")));
}
