//! IRET outside 64-bit mode: back to the same or to an outer privilege level.
//!
//! Intel SDM volume 2, IRET. Not done here: task returns (NT), returns to virtual-8086 mode,
//! from IA-32e mode and with shadow stacks.

use iced_x86::{Instruction, Mnemonic, Register};
use vm_memory::GuestMemoryBackend;

use super::descriptors::Descriptor;
use super::machine::{Machine, Mode, cr4, rflags};
use super::paging::Kind;
use super::stop::{Fault, Stop};

/// Flags any IRET restores.
const ALWAYS: u64 = rflags::CF
    | rflags::PF
    | rflags::AF
    | rflags::ZF
    | rflags::SF
    | rflags::TF
    | rflags::DF
    | rflags::OF
    | rflags::NT
    | rflags::RF
    | rflags::AC
    | rflags::ID;

impl<M: GuestMemoryBackend> Machine<'_, M> {
    pub(super) fn iret(&mut self, i: &Instruction) -> Result<(), Stop> {
        let size = match i.mnemonic() {
            Mnemonic::Iret => 2,
            Mnemonic::Iretd => 4,
            _ => return Err(Stop::unsupported("with a 64-bit operand")),
        };
        match self.mode() {
            Mode::Real => self.iret_real(size)?,
            Mode::Virtual8086 => return Err(Stop::unsupported("in virtual-8086 mode")),
            _ if self.long_mode() => return Err(Stop::unsupported("in IA-32e mode")),
            _ if self.sregs.cr4 & cr4::CET != 0 => {
                return Err(Stop::unsupported("with shadow stacks on"));
            }
            _ if self.flag(rflags::NT) => return Err(Stop::unsupported("as a task return (NT)")),
            _ => self.iret_protected(size)?,
        }
        self.sregs_changed = true;
        self.nmi_unblocked = true;
        Ok(())
    }

    fn iret_real(&mut self, size: u64) -> Result<(), Stop> {
        let ip = self.stacked(0, size)?;
        let selector = self.stacked(1, size)? as u16;
        let flags = self.stacked(2, size)?;
        if ip > 0xffff {
            return Err(Fault::gp(0).into());
        }
        self.pop(3 * size);
        self.regs.rip = ip;
        self.sregs.cs.selector = selector;
        self.sregs.cs.base = u64::from(selector) << 4;
        self.restore_flags(flags, size, 0);
        Ok(())
    }

    fn iret_protected(&mut self, size: u64) -> Result<(), Stop> {
        let eip = self.stacked(0, size)?;
        let selector = self.stacked(1, size)? as u16;
        let flags = self.stacked(2, size)?;
        let cpl = self.cpl();
        if size == 4 && flags & rflags::VM != 0 && cpl == 0 {
            return Err(Stop::unsupported("to virtual-8086 mode"));
        }
        let rpl = (selector & 3) as u8;
        let target = self.return_target(selector, cpl)?;
        if eip > u64::from(target.limit()) {
            return Err(Fault::gp(0).into());
        }
        if rpl == cpl {
            self.mark_accessed(&target)?;
            self.pop(3 * size);
        } else {
            let esp = self.stacked(3, size)?;
            let stack = self.outer_stack(self.stacked(4, size)? as u16, rpl)?;
            self.mark_accessed(&target)?;
            self.mark_accessed(&stack)?;
            self.sregs.ss = stack.segment(rpl);
            let mask = if self.sregs.ss.db != 0 { 0xffff_ffff } else { 0xffff };
            self.regs.rsp = (self.regs.rsp & !mask) | (esp & mask);
            self.drop_inner_segments(rpl);
        }
        self.sregs.cs = target.segment(rpl);
        self.regs.rip = eip;
        self.restore_flags(flags, size, cpl);
        Ok(())
    }

    /// The code segment returned to.
    fn return_target(&self, selector: u16, cpl: u8) -> Result<Descriptor, Stop> {
        if selector & !3 == 0 {
            return Err(Fault::gp(0).into());
        }
        let code = u32::from(selector & !3);
        let rpl = (selector & 3) as u8;
        let target = self.descriptor(selector)?.ok_or(Fault::gp(code))?;
        let privilege =
            if target.is_conforming() { target.dpl() <= rpl } else { target.dpl() == rpl };
        if !target.is_code() || rpl < cpl || !privilege {
            return Err(Fault::gp(code).into());
        }
        if !target.is_present() {
            return Err(Fault::np(code).into());
        }
        Ok(target)
    }

    /// The stack segment of an outer privilege level.
    fn outer_stack(&self, selector: u16, rpl: u8) -> Result<Descriptor, Stop> {
        if selector & !3 == 0 {
            return Err(Fault::gp(0).into());
        }
        let code = u32::from(selector & !3);
        let stack = self.descriptor(selector)?.ok_or(Fault::gp(code))?;
        if selector & 3 != u16::from(rpl) || !stack.is_writable_data() || stack.dpl() != rpl {
            return Err(Fault::gp(code).into());
        }
        if !stack.is_present() {
            return Err(Fault::ss(code).into());
        }
        Ok(stack)
    }

    /// Data segments the outer level may not use become null.
    fn drop_inner_segments(&mut self, cpl: u8) {
        let sregs = &mut self.sregs;
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
            let conforming_code = segment.type_ & 0b1100 == 0b1100;
            if segment.dpl < cpl && !conforming_code {
                segment.selector = 0;
                segment.unusable = 1;
            }
        }
    }

    /// The value `index` places up the stack.
    fn stacked(&self, index: u64, size: u64) -> Result<u64, Stop> {
        let mask = if self.sregs.ss.db != 0 { 0xffff_ffff } else { 0xffff };
        let offset = self.regs.rsp.wrapping_add(index * size) & mask;
        let linear = self.linear(Register::SS, offset, size, Kind::Read)?;
        self.read_uint(linear, size as usize, self.access(Kind::Read))
    }

    fn pop(&mut self, bytes: u64) {
        let mask = if self.sregs.ss.db != 0 { 0xffff_ffff } else { 0xffff };
        self.regs.rsp = (self.regs.rsp & !mask) | (self.regs.rsp.wrapping_add(bytes) & mask);
    }

    /// `cpl` is the one before the return.
    fn restore_flags(&mut self, flags: u64, size: u64, cpl: u8) {
        let iopl = ((self.regs.rflags & rflags::IOPL) >> 12) as u8;
        let mut restored = ALWAYS;
        if cpl <= iopl {
            restored |= rflags::IF;
        }
        if cpl == 0 {
            restored |= rflags::IOPL | rflags::VIF | rflags::VIP;
        }
        if size == 2 {
            restored &= 0xffff;
        }
        self.set_flags(restored, flags);
        self.set_flags(rflags::FIXED, rflags::FIXED);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        CODE, FakeCpu, GATE, Guest, HANDLER, STACK, TSS, descriptor, long_mode, protected_mode,
        real_mode, selector,
    };
    use super::super::{Completed, NotCompleted};
    use super::*;

    const IRET: &[u8] = &[0xcf];

    fn guest(cpu: FakeCpu) -> Guest {
        Guest::with_tables(cpu)
    }

    /// A 32-bit guest with these values on its stack.
    fn returning(frame: &[u32]) -> Guest {
        let mut guest = guest(protected_mode());
        guest.cpu.regs.rsp = STACK - 4 * frame.len() as u64;
        for (value, at) in frame.iter().zip((guest.cpu.regs.rsp..).step_by(4)) {
            guest.poke(at, &value.to_le_bytes());
        }
        guest
    }

    #[test]
    fn to_the_same_level() {
        let mut guest = returning(&[0x1234, 8, 0x0024_0ad7]);
        guest.cpu.events.nmi.masked = 1;
        guest.run(IRET);
        assert_eq!((guest.cpu.regs.rip, guest.cpu.regs.rsp), (0x1234, STACK));
        assert_eq!(guest.cpu.regs.rflags, 0x0024_0ad7);
        assert_eq!(guest.cpu.events.nmi.masked, 0, "NMIs are no longer blocked");
    }

    #[test]
    fn to_an_outer_level() {
        let mut guest = returning(&[0x1234, 0x1b, 0x3202, 0xa000, 0x23]);
        guest.cpu.sregs.fs.type_ = 0b1110;
        for selector in [selector::USER_CODE, selector::USER_DATA] {
            let descriptor = guest.get_descriptor(selector);
            guest.set_descriptor(selector, descriptor & !descriptor::ACCESSED);
        }
        guest.run(IRET);
        let cpu = &guest.cpu;
        assert_eq!((cpu.regs.rip, cpu.regs.rsp, cpu.regs.rflags), (0x1234, 0xa000, 0x3202));
        assert_eq!((cpu.sregs.cs.selector, cpu.sregs.ss.selector), (0x1b, 0x23));
        assert_eq!(guest.machine().cpl(), 3);
        assert_eq!((cpu.sregs.ds.selector, cpu.sregs.ds.unusable), (0, 1), "an inner data segment");
        assert_eq!(cpu.sregs.fs.unusable, 0, "conforming code may stay");
        assert_eq!(guest.get_descriptor(selector::USER_CODE), descriptor::USER_CODE32, "accessed");
        assert_eq!(guest.get_descriptor(selector::USER_DATA), descriptor::USER_DATA, "accessed");
    }

    #[test]
    fn it_undoes_what_an_interrupt_did() {
        for user in [false, true] {
            let mut guest = guest(protected_mode());
            guest.set_gate(0x80, GATE);
            guest.poke(TSS + 4, &0xa000u32.to_le_bytes());
            guest.poke(TSS + 8, &[0x10, 0]);
            guest.cpu.regs.rflags |= rflags::IF | rflags::CF;
            if user {
                guest.enter_user();
            }
            let before = guest.cpu.clone();
            guest.run(&[0xcd, 0x80]);
            assert_eq!(guest.cpu.regs.rip, HANDLER);
            guest.run(IRET);
            assert_eq!(guest.cpu.regs, kvm_bindings::kvm_regs { rip: CODE + 2, ..before.regs });
            assert_eq!(guest.cpu.sregs.cs, before.sregs.cs);
            assert_eq!(guest.cpu.sregs.ss, before.sregs.ss);
        }
    }

    #[test]
    fn user_code_can_change_neither_iopl_nor_if() {
        let mut guest = returning(&[0x1234, 0x1b, 0x0018_3202]);
        guest.enter_user();
        guest.run(IRET);
        assert_eq!(guest.cpu.regs.rflags, 0x2);
        let mut guest = returning(&[0x1234, 0x1b, 0x202]);
        guest.enter_user();
        guest.cpu.regs.rflags |= rflags::IOPL;
        guest.run(IRET);
        assert_eq!(guest.cpu.regs.rflags, 0x3202, "IOPL 3 allows IF");
    }

    #[test]
    fn with_16_bit_operands_the_upper_flags_stay() {
        let mut guest = guest(protected_mode());
        guest.cpu.regs.rflags |= rflags::AC;
        guest.poke(STACK - 6, &[0x34, 0x12, 8, 0, 0xd7, 0x0a]);
        guest.cpu.regs.rsp = STACK - 6;
        guest.run(&[0x66, 0xcf]);
        assert_eq!((guest.cpu.regs.rip, guest.cpu.regs.rsp), (0x1234, STACK));
        assert_eq!(guest.cpu.regs.rflags, 0xad7 | rflags::AC);
    }

    #[test]
    fn in_real_mode() {
        let mut guest = Guest::new(real_mode());
        guest.cpu.regs.rsp = 0xabcd_fffc;
        guest.poke(0xfffc, &[0x34, 0x12, 0x00, 0xf0]);
        guest.poke(0, &[0xd7, 0x3a]);
        guest.run(IRET);
        assert_eq!((guest.cpu.regs.rip, guest.cpu.regs.rsp), (0x1234, 0xabcd_0002));
        assert_eq!((guest.cpu.sregs.cs.selector, guest.cpu.sregs.cs.base), (0xf000, 0xf_0000));
        assert_eq!(guest.cpu.regs.rflags, 0x3ad7);

        guest.cpu.regs.rsp = 0x100;
        guest.poke(0x100, &0x1_0000u32.to_le_bytes());
        assert_eq!(guest.fault(&[0x66, 0xcf], 13), 0, "EIP beyond 64 KiB");
    }

    #[test]
    fn frames_are_checked() {
        let small = descriptor::CODE32 & !(0xf << 48 | 1 << 55 | 0xffff) | 0xfff;
        // EIP, CS, SS, the spare descriptor, vector, error code.
        let rows = [
            (0, 0, 0, 0, 13, 0),
            (0, 0x1008, 0, 0, 13, 0x1008),
            (0, 0x10, 0, 0, 13, 0x10),
            (0, 0x30, 0, descriptor::CODE32 & !descriptor::PRESENT, 11, 0x30),
            (0, 0x33, 0, descriptor::CODE32, 13, 0x30),
            (0x1000, 0x30, 0, small, 13, 0),
            (0, 0x1b, 0, 0, 13, 0),
            (0, 0x1b, 0x20, 0, 13, 0x20),
            (0, 0x1b, 0x13, 0, 13, 0x10),
            (0, 0x1b, 0x1b, 0, 13, 0x18),
            (0, 0x1b, 0x33, descriptor::USER_DATA & !descriptor::PRESENT, 12, 0x30),
        ];
        for (n, (eip, cs, ss, spare, vector, code)) in rows.into_iter().enumerate() {
            let mut guest = returning(&[eip, cs, 2, 0xa000, ss]);
            guest.set_descriptor(selector::SPARE, spare);
            let before = guest.cpu.sregs;
            assert_eq!(guest.fault(IRET, vector), code, "row {n}");
            assert_eq!(guest.cpu.regs.rip, CODE, "row {n}");
            assert_eq!(guest.cpu.sregs, before, "row {n}");
        }
        let mut guest = returning(&[0x1234, 8, 2]);
        guest.enter_user();
        assert_eq!(guest.fault(IRET, 13), 8, "an inner level");
        let mut guest = returning(&[0, 8, 2]);
        guest.cpu.sregs.ss.limit = STACK as u32 - 2;
        assert_eq!(guest.fault(IRET, 12), 0);
    }

    #[test]
    fn what_is_not_done_is_said() {
        let unsupported = |mut guest: Guest, bytes: &[u8]| {
            let result: Result<Completed, _> = guest.complete(bytes);
            assert!(matches!(result, Err(NotCompleted::Unsupported(_))), "{result:?}");
        };
        unsupported(guest(long_mode()), &[0x48, 0xcf]);
        unsupported(guest(long_mode()), IRET);
        unsupported(returning(&[0, 8, 0x2_0002]), IRET);
        let mut task = returning(&[0, 8, 2]);
        task.cpu.regs.rflags |= rflags::NT;
        unsupported(task, IRET);
    }
}
