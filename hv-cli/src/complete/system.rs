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
        // ECX = 1 asks for XCR0 & XINUSE; a processor may take every component for in use (Intel
        // SDM volume 1, section 13.6).
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

    /// CLWB and CLFLUSHOPT: guest memory is coherent, so all that is left is the check of the
    /// address, which may also be executable-only.
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

#[cfg(test)]
mod tests {
    use super::super::testing::{DATA, Guest, long_mode, protected_mode, real_mode};
    use super::super::{Completed, NotCompleted};
    use super::*;

    const CLAC: &[u8] = &[0x0f, 0x01, 0xca];
    const STAC: &[u8] = &[0x0f, 0x01, 0xcb];
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
    const RDPID: &[u8] = &[0xf3, 0x0f, 0xc7, 0xf8]; // rdpid rax
    const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x03]; // invpcid rax, [rbx]
    const CLWB: &[u8] = &[0x66, 0x0f, 0xae, 0x33]; // clwb [rbx]
    const CLFLUSHOPT: &[u8] = &[0x66, 0x0f, 0xae, 0x3b]; // clflushopt [rbx]

    fn user(mut guest: Guest) -> Guest {
        guest.cpu.sregs.ss.dpl = 3;
        guest.cpu.sregs.cs.dpl = 3;
        guest
    }

    #[test]
    fn stac_and_clac_change_ac_and_are_privileged() {
        for mode in [long_mode, protected_mode, real_mode] {
            let mut guest = Guest::new(mode());
            guest.cpu.regs.rflags |= rflags::CF;
            guest.run(STAC);
            assert_eq!(guest.cpu.regs.rflags, rflags::FIXED | rflags::CF | rflags::AC);
            guest.run(CLAC);
            assert_eq!(guest.cpu.regs.rflags, rflags::FIXED | rflags::CF);
        }
        assert_eq!(user(Guest::new(long_mode())).complete(STAC), Ok(Completed::Exception(6)));
    }

    #[test]
    fn xgetbv_reads_xcr0() {
        for mode in [long_mode, protected_mode] {
            let mut guest = Guest::new(mode());
            guest.cpu.xcr0 = 0x2_0000_00e7;
            guest.cpu.regs.rcx = 0xffff_ffff_0000_0000;
            (guest.cpu.regs.rax, guest.cpu.regs.rdx) = (u64::MAX, u64::MAX);
            guest.run(XGETBV);
            assert_eq!((guest.cpu.regs.rax, guest.cpu.regs.rdx), (0xe7, 2));
            guest.cpu.regs.rcx = 1;
            guest.run(XGETBV);
            guest.cpu.regs.rcx = 2;
            assert_eq!(guest.fault(XGETBV, 13), 0);
        }
        let mut guest = Guest::new(long_mode());
        guest.cpu.sregs.cr4 &= !cr4::OSXSAVE;
        assert_eq!(guest.complete(XGETBV), Ok(Completed::Exception(6)));
    }

    #[test]
    fn rdtscp_and_rdpid_read_their_msrs() {
        for mode in [long_mode, protected_mode] {
            let mut guest = Guest::new(mode());
            guest.cpu.msrs = [(MSR_TSC, 0x1234_5678_9abc_def0), (MSR_TSC_AUX, 0x11)].into();
            guest.run(RDTSCP);
            let regs = &guest.cpu.regs;
            assert_eq!((regs.rdx, regs.rax, regs.rcx), (0x1234_5678, 0x9abc_def0, 0x11));
            guest.run(RDPID);
            assert_eq!(guest.cpu.regs.rax, 0x11);

            guest.cpu.sregs.cr4 |= cr4::TSD;
            guest.run(RDTSCP);
            assert_eq!(user(guest).fault(RDTSCP, 13), 0);
        }
    }

    #[test]
    fn an_msr_kvm_does_not_give_is_reported() {
        let error = Guest::new(long_mode()).complete(RDPID).unwrap_err();
        assert!(matches!(error, NotCompleted::Unsupported(why) if why.contains("MSR")), "{error}");
    }

    #[test]
    fn every_type_of_invpcid_flushes_the_tlb() {
        for mode in [long_mode, protected_mode] {
            for kind in 0..4 {
                let mut guest = Guest::new(mode());
                guest.cpu.sregs.cr4 |= cr4::PCIDE;
                let cr4 = guest.cpu.sregs.cr4;
                guest.poke_u64(DATA, 5);
                guest.poke_u64(DATA + 8, 0x7fff_ffff_f000);
                guest.cpu.regs.rbx = DATA;
                guest.cpu.regs.rax = kind;
                guest.run(INVPCID);
                assert_eq!(guest.cpu.cr4_writes, [cr4 ^ cr4::PGE, cr4]);
                assert_eq!(guest.cpu.sregs.cr4, cr4);
            }
        }
    }

    #[test]
    fn invpcid_checks_its_type_descriptor_and_privilege() {
        // type, PCID, address, CR4.PCIDE
        let bad = [
            (4, 0, 0, true),
            (1 << 32, 0, 0, true),
            (2, 0x1000, 0, true),
            (0, 1, 0x8000_0000_0000_0000, true),
            (0, 1, 0, false),
            (1, 1, 0, false),
        ];
        for (kind, pcid, address, pcide) in bad {
            let mut guest = Guest::new(long_mode());
            if pcide {
                guest.cpu.sregs.cr4 |= cr4::PCIDE;
            }
            guest.poke_u64(DATA, pcid);
            guest.poke_u64(DATA + 8, address);
            guest.cpu.regs.rbx = DATA;
            guest.cpu.regs.rax = kind;
            assert_eq!(guest.fault(INVPCID, 13), 0, "type {kind} PCID {pcid} at {address:#x}");
            assert!(guest.cpu.cr4_writes.is_empty());
        }
        let mut guest = user(Guest::new(long_mode()));
        guest.cpu.regs.rbx = DATA;
        assert_eq!(guest.fault(INVPCID, 13), 0);
    }

    #[test]
    fn cache_line_writes_only_check_the_address() {
        for bytes in [CLWB, CLFLUSHOPT] {
            let mut guest = Guest::new(long_mode());
            guest.poke_u64(DATA, 0x55);
            guest.cpu.regs.rbx = DATA;
            let before = guest.cpu.regs;
            guest.run(bytes);
            assert_eq!(guest.peek_u64(DATA), 0x55);
            assert_eq!(guest.cpu.regs, kvm_bindings::kvm_regs { rip: before.rip + 4, ..before });
            guest.unmap(DATA);
            assert_eq!(guest.fault(bytes, 14), 0);
            assert_eq!(guest.cpu.sregs.cr2, DATA);
        }
        // Code that may only be executed is fine too.
        let mut guest = Guest::new(protected_mode());
        guest.cpu.sregs.cs.type_ = 9;
        guest.cpu.regs.rbx = DATA;
        guest.run(&[0x2e, 0x66, 0x0f, 0xae, 0x33]); // clwb cs:[ebx]
    }

    #[test]
    fn undefined_instructions_raise_ud() {
        for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0]] {
            let mut guest = Guest::new(long_mode());
            let rip = guest.cpu.regs.rip;
            assert_eq!(guest.complete(bytes), Ok(Completed::Exception(6)));
            assert_eq!(guest.cpu.regs.rip, rip);
            assert_eq!(guest.cpu.events.exception.has_error_code, 0);
        }
    }
}
