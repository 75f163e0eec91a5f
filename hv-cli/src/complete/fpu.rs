//! x87 control: FWAIT, FNCLEX, FNINIT, EMMS.
//!
//! Control state only, no arithmetic (Intel SDM volume 1, chapter 8). While the host keeps a state
//! component in its initial configuration, `KVM_GET_FPU` may show older values of it and
//! `KVM_SET_FPU` does not change it. So nothing here touches SSE (MXCSR), and what is done to x87
//! leaves an initial state initial: a write that is lost is no loss. FWAIT and EMMS can be misled
//! by an old exception of a guest that has since executed FNINIT.

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

#[cfg(test)]
mod tests {
    use super::super::Completed;
    use super::super::testing::{Guest, long_mode, protected_mode, real_mode};
    use super::*;

    const FWAIT: &[u8] = &[0x9b];
    const FNCLEX: &[u8] = &[0xdb, 0xe2];
    const FNINIT: &[u8] = &[0xdb, 0xe3];
    const EMMS: &[u8] = &[0x0f, 0x77];

    /// Busy, stack pointer 5, C0, error summary, zero divide.
    const FSW: u16 = 0xa984;

    fn guest(cpu: super::super::testing::FakeCpu) -> Guest {
        let mut guest = Guest::new(cpu);
        guest.cpu.fpu =
            kvm_fpu { fcw: 0x1234, ftwx: 0xff, mxcsr: 0x1f80, last_ip: 7, ..Default::default() };
        guest.cpu.fpu.fpr[3][0] = 9;
        guest.cpu.fpu.xmm[4][0] = 8;
        guest
    }

    #[test]
    fn fwait_raises_what_is_pending() {
        for mode in [long_mode, protected_mode, real_mode] {
            let mut guest = guest(mode());
            let before = guest.cpu.fpu;
            guest.run(FWAIT);
            assert_eq!(guest.cpu.fpu, before);
            guest.cpu.fpu.fsw = FSW;
            assert_eq!(guest.complete(FWAIT), Ok(Completed::Exception(16)));
        }
    }

    #[test]
    fn fwait_needs_both_mp_and_ts_to_be_refused() {
        for (bits, refused) in [(cr0::TS, false), (cr0::MP, false), (cr0::MP | cr0::TS, true)] {
            let mut guest = guest(long_mode());
            guest.cpu.sregs.cr0 |= bits;
            let expected = if refused { Completed::Exception(7) } else { Completed::Normally };
            assert_eq!(guest.complete(FWAIT), Ok(expected), "{bits:#x}");
        }
    }

    #[test]
    fn fnclex_clears_the_exceptions_only() {
        let mut guest = guest(protected_mode());
        guest.cpu.fpu.fsw = FSW;
        let before = guest.cpu.fpu;
        guest.run(FNCLEX);
        assert_eq!(guest.cpu.fpu, kvm_fpu { fsw: 0x2900, ..before });
    }

    #[test]
    fn fninit_resets_x87_and_leaves_the_rest() {
        let mut guest = guest(long_mode());
        guest.cpu.fpu.fsw = FSW;
        let before = guest.cpu.fpu;
        guest.run(FNINIT);
        let expected = kvm_fpu { fcw: 0x37f, fsw: 0, ftwx: 0, last_ip: 0, ..before };
        assert_eq!(guest.cpu.fpu, expected);
    }

    #[test]
    fn emms_empties_the_registers() {
        let mut guest = guest(long_mode());
        let before = guest.cpu.fpu;
        guest.run(EMMS);
        assert_eq!(guest.cpu.fpu, kvm_fpu { ftwx: 0, ..before });
        guest.cpu.fpu.fsw = FSW;
        assert_eq!(guest.complete(EMMS), Ok(Completed::Exception(16)));
    }

    #[test]
    fn without_an_fpu_they_fault() {
        for (bit, vectors) in [(cr0::EM, [7, 7, 6]), (cr0::TS, [7, 7, 7])] {
            for (bytes, vector) in [FNCLEX, FNINIT, EMMS].into_iter().zip(vectors) {
                let mut guest = guest(long_mode());
                guest.cpu.sregs.cr0 |= bit;
                let before = guest.cpu.fpu;
                assert_eq!(guest.complete(bytes), Ok(Completed::Exception(vector)));
                assert_eq!(guest.cpu.fpu, before);
            }
        }
    }
}
