//! The conformance suite on the KVM in memory: the same cases as on `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeSet;
use std::io::{self, Write};

use hv_core::conformance::{
    Checked, Guest, Kernels, Miss, Outcome, Platform, RawRequest, Seen, cases, run,
};
use hv_core::fake::{self, FakeHost, FakeKvm, FakeVcpu, FakeVm, GuestStep, Interrupt, VmView};
use hv_core::{Capability, Errno, ExitReply, IoAddress, IoDirection, Vcpu, VcpuExit};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};

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
        let view = vm.view();
        if vcpu.lapic().is_ok() {
            view.enable_apic(vcpu.id());
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        }
        Ok(Scripted { vcpu, view, deaf: self.deaf })
    }

    /// The fake only has what the traits can express.
    fn raw(&self, _vm: &FakeVm, _request: &RawRequest) -> Option<Result<(), Errno>> {
        assert!(!self.panics, "as it was told to");
        None
    }
}

/// A guest whose code is a script of one step at a time.
struct Scripted {
    vcpu: FakeVcpu,
    view: VmView,
    deaf: bool,
}

/// How long a step may take before the guest counts as stuck, in exits.
const MANY: usize = 16;

impl Scripted {
    /// Does one step: the exits it made, and what the guest saw.
    fn step(&mut self, step: GuestStep) -> Checked<(Vec<VcpuExit>, Vec<fake::Seen>)> {
        self.view.program(self.vcpu.id(), [step.clone()]);
        let mut exits = Vec::new();
        while exits.len() < MANY {
            let exit = self.vcpu.run()?;
            match exit {
                VcpuExit::Hlt => return Ok((exits, self.view.take_seen(self.vcpu.id()))),
                VcpuExit::Interrupted => continue,
                VcpuExit::Io(io) if io.direction == IoDirection::In => {
                    self.vcpu.io_data().fill(0xff);
                }
                VcpuExit::Mmio(mmio) if mmio.written.is_none() => {
                    self.vcpu.reply(ExitReply::Mmio([0xff; 8]));
                }
                _ => {}
            }
            exits.push(exit);
        }
        Err(Miss::failed(format!("exits keep coming of {step:?}: {exits:?}")))
    }
}

/// One access makes at most one exit.
fn seen(what: &str, exits: &[VcpuExit]) -> Checked<Seen> {
    match exits {
        [] => Ok(Seen::ByKernel),
        [exit] => Ok(Seen::ByVmm(*exit)),
        _ => Err(Miss::failed(format!("{what} exits more than once: {exits:x?}"))),
    }
}

impl Guest for Scripted {
    type Vcpu = FakeVcpu;

    fn vcpu(&mut self) -> &mut FakeVcpu {
        &mut self.vcpu
    }

    fn write(&mut self, address: IoAddress, data: &[u8]) -> Checked<Seen> {
        let (exits, _) = self.step(GuestStep::write(address, data))?;
        seen("a write", &exits)
    }

    fn read(&mut self, address: IoAddress, data: &mut [u8]) -> Checked<Seen> {
        let len = u16::try_from(data.len()).map_err(Miss::failed)?;
        let (exits, saw) = self.step(GuestStep::read(address, len))?;
        let pieces = saw.into_iter().map(|saw| match saw {
            fake::Seen::Read { data, .. } => Ok(data),
            other => Err(Miss::failed(format!("a read came to {other:?}"))),
        });
        let read: Vec<u8> = pieces.collect::<Result<Vec<_>, _>>()?.concat();
        if read.len() != data.len() {
            return Err(Miss::failed(format!("{len} bytes were to be read, got {read:x?}")));
        }
        data.copy_from_slice(&read);
        seen("a read", &exits)
    }

    fn take_interrupts(&mut self) -> Checked<Vec<u8>> {
        if self.deaf {
            return Ok(Vec::new());
        }
        let (exits, saw) = self.step(GuestStep::TakeInterrupts)?;
        if let Some(exit) = exits.first() {
            return Err(Miss::failed(format!("taking interrupts exits: {exit:?}")));
        }
        let interrupts = saw.into_iter().flat_map(|saw| match saw {
            fake::Seen::Interrupts(interrupts) => interrupts,
            _ => Vec::new(),
        });
        Ok(interrupts
            .filter_map(|interrupt| match interrupt {
                Interrupt::Nmi => Some(2),
                other => other.vector(),
            })
            .collect())
    }

    /// As a guest does, by a write to the register; the local APIC knows which vector it is.
    fn end_of_interrupt(&mut self, _vector: u8) -> Checked<Seen> {
        let eoi = GuestStep::write(IoAddress::Mmio(0xfee0_00b0), 0u32.to_le_bytes());
        let (exits, _) = self.step(eoi)?;
        seen("the end of an interrupt", &exits)
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
