//! System instructions: CLAC, STAC, XGETBV, RDTSCP, RDPID, INVPCID and the cache-line write-backs.

use iced_x86::{Instruction, Mnemonic};
use vm_memory::GuestMemoryBackend;

use super::cpu::Cpu;
use super::machine::{Machine, Mode, cr4, rflags};
use super::paging::Kind;
use super::stop::{Fault, Stop};

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_AUX.
const MSR_TSC_AUX: u32 = 0xc000_0103;

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Completes the instruction if it belongs here; `None` if it does not.
    pub(super) fn system_instruction<C: Cpu>(
        &mut self,
        i: &Instruction,
        cpu: &C,
    ) -> Option<Result<(), Stop>> {
        use Mnemonic as X;
        Some(match i.mnemonic() {
            X::Clac => self.set_ac(false),
            X::Stac => self.set_ac(true),
            X::Xgetbv => self.xgetbv(cpu),
            X::Rdtscp => self.rdtscp(cpu),
            X::Rdpid => self.rdpid(i, cpu),
            X::Invpcid => self.invpcid(i),
            X::Clwb | X::Clflushopt => self.touch_line(i),
            // They exist to raise #UD.
            X::Ud0 | X::Ud1 | X::Ud2 => Err(Fault::UD.into()),
            _ => return None,
        })
    }

    fn set_ac(&mut self, ac: bool) -> Result<(), Stop> {
        if self.cpl() != 0 {
            return Err(Fault::UD.into());
        }
        self.set_flags(rflags::AC, if ac { rflags::AC } else { 0 });
        Ok(())
    }

    fn xgetbv<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        if self.sregs.cr4 & cr4::OSXSAVE == 0 {
            return Err(Fault::UD.into());
        }
        // ECX = 1 asks for XCR0 & XINUSE; a processor may take every component for in use (Intel SDM
        // volume 1, section 13.6).
        if self.regs.rcx as u32 > 1 {
            return Err(Fault::gp(0).into());
        }
        self.set_edx_eax(cpu.xcr0()?);
        Ok(())
    }

    fn rdtscp<C: Cpu>(&mut self, cpu: &C) -> Result<(), Stop> {
        if self.sregs.cr4 & cr4::TSD != 0 && self.cpl() != 0 {
            return Err(Fault::gp(0).into());
        }
        let tsc = read_msr(cpu, MSR_TSC)?;
        self.regs.rcx = read_msr(cpu, MSR_TSC_AUX)? & 0xffff_ffff;
        self.set_edx_eax(tsc);
        Ok(())
    }

    fn rdpid<C: Cpu>(&mut self, i: &Instruction, cpu: &C) -> Result<(), Stop> {
        let aux = read_msr(cpu, MSR_TSC_AUX)?;
        self.store(i, 0, aux & 0xffff_ffff)
    }

    fn set_edx_eax(&mut self, value: u64) {
        self.regs.rax = value & 0xffff_ffff;
        self.regs.rdx = value >> 32;
    }

    /// INVPCID: any type flushes everything, which each allows.
    fn invpcid(&mut self, i: &Instruction) -> Result<(), Stop> {
        self.require_cpl0()?;
        let kind = self.load(i, 0)?;
        let linear = self.operand_address(i, 1, 16, Kind::Read)?;
        let access = self.access(Kind::Read);
        let pcid = self.read_uint(linear, 8, access)?;
        let address = self.read_uint(linear.wrapping_add(8), 8, access)?;
        let pcid_without_pcids = self.sregs.cr4 & cr4::PCIDE == 0 && pcid != 0;
        let valid = pcid >> 12 == 0
            && match kind {
                0 => !pcid_without_pcids && self.is_canonical(address),
                1 => !pcid_without_pcids,
                2 | 3 => true,
                _ => false,
            };
        if !valid {
            return Err(Fault::gp(0).into());
        }
        self.flush_tlb = true;
        Ok(())
    }

    /// CLWB and CLFLUSHOPT: guest memory is coherent, so all that is left is the check of the address,
    /// which may also be executable-only.
    fn touch_line(&mut self, i: &Instruction) -> Result<(), Stop> {
        let offset = self.offset(i, 0)?;
        let linear = match self.mode() {
            Mode::Long => self.linear(i.memory_segment(), offset, 1, Kind::Read)?,
            _ => self.linear(i.memory_segment(), offset, 1, Kind::Fetch)?,
        };
        self.probe(linear, 1, self.access(Kind::Read))
    }
}

fn read_msr<C: Cpu>(cpu: &C, index: u32) -> Result<u64, Stop> {
    cpu.msr(index)?.ok_or(Stop::unsupported("because KVM does not give the MSR it reads"))
}
