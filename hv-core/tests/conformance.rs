//! The conformance suite on the KVM in memory: the same cases as on `/dev/kvm`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{self, Write};

use hv_core::conformance::{Checked, Guest, Miss, Platform, RawRequest, Seen, cases, run};
use hv_core::fake::{self, FakeKvm, FakeVcpu, FakeVm, GuestStep, Interrupt, VmView};
use hv_core::{Errno, ExitReply, IoAddress, IoDirection, Vcpu, VcpuExit};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};

struct Fake(FakeKvm);

impl Platform for Fake {
    type Hypervisor = FakeKvm;
    type Guest = Scripted;

    fn name(&self) -> String {
        "the KVM in memory".into()
    }

    fn kernel(&self) -> Option<(u32, u32)> {
        None
    }

    fn hypervisor(&self) -> &FakeKvm {
        &self.0
    }

    fn guest(&self, vm: &FakeVm, vcpu: FakeVcpu) -> Checked<Scripted> {
        let view = vm.view();
        if vcpu.lapic().is_ok() {
            view.enable_apic(vcpu.id());
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        }
        Ok(Scripted { vcpu, view })
    }

    /// The fake only has what the traits can express.
    fn raw(&self, _vm: &FakeVm, _request: &RawRequest) -> Option<Result<(), Errno>> {
        None
    }
}

/// A guest whose code is a script of one step at a time.
struct Scripted {
    vcpu: FakeVcpu,
    view: VmView,
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
    let report = run(&Fake(FakeKvm::default()), &filter);
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
