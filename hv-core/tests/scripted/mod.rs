//! Guests on the KVM in memory that do what a test tells them, one step at a time.

use hv_core::conformance::{Checked, Guest, Miss, Seen};
use hv_core::fake::{self, FakeVcpu, FakeVm, GuestStep, Interrupt, VmView};
use hv_core::{ExitReply, IoAddress, IoDirection, Vcpu, VcpuExit};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};

/// A guest whose code is a script of one step at a time.
pub(crate) struct Scripted {
    vcpu: FakeVcpu,
    view: VmView,
    /// It takes no interrupts.
    pub(crate) deaf: bool,
    /// A step that was not done because the dirty ring is full. It comes first when there is room.
    waits: Option<GuestStep>,
}

/// How long a step may take before the guest counts as stuck, in exits.
const MANY: usize = 16;

impl Scripted {
    /// A guest on a vCPU of `vm` that has not run.
    pub(crate) fn new(vm: &FakeVm, vcpu: FakeVcpu) -> Checked<Self> {
        let view = vm.view();
        if vcpu.lapic().is_ok() {
            view.enable_apic(vcpu.id());
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        }
        Ok(Self { vcpu, view, deaf: false, waits: None })
    }

    /// Does one step: the exits it made, and what the guest saw.
    fn step(&mut self, step: GuestStep) -> Checked<(Vec<VcpuExit>, Vec<fake::Seen>)> {
        if self.waits.take().as_ref() != Some(&step) {
            self.view.program(self.vcpu.id(), [step.clone()]);
        }
        let mut exits = Vec::new();
        while exits.len() < MANY {
            let exit = self.vcpu.run()?;
            match exit {
                VcpuExit::Hlt => return Ok((exits, self.view.take_seen(self.vcpu.id()))),
                VcpuExit::Interrupted => continue,
                VcpuExit::DirtyRingFull => {
                    self.waits = Some(step);
                    return Ok((vec![exit], Vec::new()));
                }
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
