//! The KVM in memory, with guests that do one access at a time.

use hv_core::conformance::{Checked, Guest, Miss, Platform, RawRequest, Seen};
use hv_core::fake::{self, FakeKvm, FakeVcpu, FakeVm, GuestStep, Interrupt, VmView};
use hv_core::{Errno, ExitReply, Hypervisor, IoAddress, IoDirection, Vcpu, VcpuExit};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};

#[derive(Debug, Default)]
pub(crate) struct InMemory(FakeKvm);

impl Platform for InMemory {
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
        vcpu.set_cpuid(&self.0.supported_cpuid()?)?;
        if vcpu.lapic().is_ok() {
            view.enable_apic(vcpu.id());
            vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        }
        Ok(Scripted { vcpu, view })
    }

    fn raw(&self, _vm: &FakeVm, _request: &RawRequest) -> Option<Result<(), Errno>> {
        None
    }
}

#[derive(Debug)]
pub(crate) struct Scripted {
    vcpu: FakeVcpu,
    view: VmView,
}

impl Scripted {
    /// Does one step: the exit it made, if any, and what the guest saw.
    fn step(&mut self, step: GuestStep) -> Checked<(Seen, Vec<fake::Seen>)> {
        self.view.program(self.vcpu.id(), [step.clone()]);
        let mut exits = Vec::new();
        while exits.len() < 4 {
            let exit = self.vcpu.run()?;
            match exit {
                VcpuExit::Hlt => {
                    let seen = match exits[..] {
                        [] => Seen::ByKernel,
                        [exit] => Seen::ByVmm(exit),
                        _ => break,
                    };
                    return Ok((seen, self.view.take_seen(self.vcpu.id())));
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
        Err(Miss::failed(format!("{step:?} exits more than once: {exits:?}")))
    }
}

impl Guest for Scripted {
    type Vcpu = FakeVcpu;

    fn vcpu(&mut self) -> &mut FakeVcpu {
        &mut self.vcpu
    }

    fn write(&mut self, address: IoAddress, data: &[u8]) -> Checked<Seen> {
        Ok(self.step(GuestStep::write(address, data))?.0)
    }

    fn read(&mut self, address: IoAddress, data: &mut [u8]) -> Checked<Seen> {
        let (seen, saw) = self.step(GuestStep::read(address, data.len() as u16))?;
        let read = saw.into_iter().filter_map(|saw| match saw {
            fake::Seen::Read { data, .. } => Some(data),
            _ => None,
        });
        let read = read.collect::<Vec<_>>().concat();
        if read.len() != data.len() {
            return Err(Miss::failed(format!("{} bytes were to be read: {read:x?}", data.len())));
        }
        data.copy_from_slice(&read);
        Ok(seen)
    }

    fn take_interrupts(&mut self) -> Checked<Vec<u8>> {
        let (seen, saw) = self.step(GuestStep::TakeInterrupts)?;
        if seen != Seen::ByKernel {
            return Err(Miss::failed(format!("taking interrupts exits: {seen:?}")));
        }
        let interrupts = saw.into_iter().flat_map(|saw| match saw {
            fake::Seen::Interrupts(interrupts) => interrupts,
            _ => Vec::new(),
        });
        let vector = |interrupt| match interrupt {
            Interrupt::Nmi => Some(2),
            other => other.vector(),
        };
        Ok(interrupts.filter_map(vector).collect())
    }

    fn end_of_interrupt(&mut self, _vector: u8) -> Checked<Seen> {
        self.write(IoAddress::Mmio(0xfee0_00b0), &[0; 4])
    }
}
