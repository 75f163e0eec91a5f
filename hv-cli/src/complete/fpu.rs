//! x87 control: FWAIT, FNCLEX, FNINIT, EMMS.
//!
//! Control state only, no arithmetic (Intel SDM volume 1, chapter 8), and nothing of SSE: MXCSR is not
//! reliable in `KVM_GET_FPU`, nor written by `KVM_SET_FPU`, while the host keeps SSE state
//! in its initial configuration. The x87 fields are set right either way.

use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::kvm_fpu;
use vm_memory::GuestMemoryBackend;

use super::cpu::Cpu;
use super::machine::{Machine, cr0};
use super::stop::{Fault, Stop};

/// x87 status word: exception flags, stack fault and error summary (bits 7 to 0) and busy (15).
const FSW_EXCEPTIONS: u16 = 0x80ff;
/// Error summary: an unmasked exception is pending.
const FSW_ERROR_SUMMARY: u16 = 1 << 7;
/// The control word after FNINIT: all exceptions masked, extended precision.
const FCW_INITIAL: u16 = 0x037f;

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Completes the instruction if it belongs here; `None` if it does not.
    pub(super) fn fpu_instruction<C: Cpu>(
        &mut self,
        i: &Instruction,
        cpu: &C,
    ) -> Option<Result<(), Stop>> {
        Some(match i.mnemonic() {
            Mnemonic::Wait => self.fwait(cpu),
            Mnemonic::Fnclex => self.fnclex(cpu),
            Mnemonic::Fninit => self.fninit(cpu),
            Mnemonic::Emms => self.emms(cpu),
            _ => return None,
        })
    }

    fn fwait<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        if self.sregs.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
            return Err(Fault::NM.into());
        }
        no_pending_exception(&cpu.fpu()?)
    }

    fn fnclex<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        self.require_x87()?;
        let mut fpu = cpu.fpu()?;
        fpu.fsw &= !FSW_EXCEPTIONS;
        Ok(cpu.set_fpu(&fpu)?)
    }

    fn fninit<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        self.require_x87()?;
        // ftwx is FXSAVE's short tag word: 0 is empty.
        let fpu = kvm_fpu {
            fcw: FCW_INITIAL,
            fsw: 0,
            ftwx: 0,
            last_opcode: 0,
            last_ip: 0,
            last_dp: 0,
            ..cpu.fpu()?
        };
        Ok(cpu.set_fpu(&fpu)?)
    }

    fn emms<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        if self.sregs.cr0 & cr0::EM != 0 {
            return Err(Fault::UD.into());
        }
        if self.sregs.cr0 & cr0::TS != 0 {
            return Err(Fault::NM.into());
        }
        let mut fpu = cpu.fpu()?;
        no_pending_exception(&fpu)?;
        fpu.ftwx = 0;
        Ok(cpu.set_fpu(&fpu)?)
    }

    fn require_x87(&self) -> Result<(), Stop> {
        if self.sregs.cr0 & (cr0::EM | cr0::TS) == 0 { Ok(()) } else { Err(Fault::NM.into()) }
    }
}

fn no_pending_exception(fpu: &kvm_fpu) -> Result<(), Stop> {
    if fpu.fsw & FSW_ERROR_SUMMARY == 0 { Ok(()) } else { Err(Fault::MF.into()) }
}
