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
