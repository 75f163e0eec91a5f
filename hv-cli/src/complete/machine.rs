//! One vCPU's registers while an instruction is completed on them.
//!
//! A working copy: nothing reaches the vCPU before the instruction has completed, so an
//! instruction that faults half-way leaves every register as it was. It must not call KVM.

use iced_x86::Register;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::stop::{Fault, Stop};

/// RFLAGS bits (Intel SDM volume 1, section 3.4.3).
pub(super) mod rflags {
    pub(in crate::complete) const CF: u64 = 1 << 0;
    pub(in crate::complete) const FIXED: u64 = 1 << 1;
    pub(in crate::complete) const PF: u64 = 1 << 2;
    pub(in crate::complete) const AF: u64 = 1 << 4;
    pub(in crate::complete) const ZF: u64 = 1 << 6;
    pub(in crate::complete) const SF: u64 = 1 << 7;
    pub(in crate::complete) const TF: u64 = 1 << 8;
    pub(in crate::complete) const IF: u64 = 1 << 9;
    pub(in crate::complete) const DF: u64 = 1 << 10;
    pub(in crate::complete) const OF: u64 = 1 << 11;
    pub(in crate::complete) const IOPL: u64 = 3 << 12;
    pub(in crate::complete) const NT: u64 = 1 << 14;
    pub(in crate::complete) const RF: u64 = 1 << 16;
    pub(in crate::complete) const VM: u64 = 1 << 17;
    pub(in crate::complete) const AC: u64 = 1 << 18;
    pub(in crate::complete) const VIF: u64 = 1 << 19;
    pub(in crate::complete) const VIP: u64 = 1 << 20;
    pub(in crate::complete) const ID: u64 = 1 << 21;
}

/// CR0 bits (Intel SDM volume 3, section 2.5).
pub(super) mod cr0 {
    pub(in crate::complete) const PE: u64 = 1 << 0;
    pub(in crate::complete) const MP: u64 = 1 << 1;
    pub(in crate::complete) const EM: u64 = 1 << 2;
    pub(in crate::complete) const TS: u64 = 1 << 3;
    pub(in crate::complete) const WP: u64 = 1 << 16;
    pub(in crate::complete) const AM: u64 = 1 << 18;
    pub(in crate::complete) const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM volume 3, section 2.5).
pub(super) mod cr4 {
    pub(in crate::complete) const TSD: u64 = 1 << 2;
    pub(in crate::complete) const PSE: u64 = 1 << 4;
    pub(in crate::complete) const PAE: u64 = 1 << 5;
    pub(in crate::complete) const PGE: u64 = 1 << 7;
    pub(in crate::complete) const LA57: u64 = 1 << 12;
    pub(in crate::complete) const PCIDE: u64 = 1 << 17;
    pub(in crate::complete) const OSXSAVE: u64 = 1 << 18;
    pub(in crate::complete) const SMEP: u64 = 1 << 20;
    pub(in crate::complete) const SMAP: u64 = 1 << 21;
    pub(in crate::complete) const PKE: u64 = 1 << 22;
    pub(in crate::complete) const CET: u64 = 1 << 23;
    pub(in crate::complete) const PKS: u64 = 1 << 24;
    pub(in crate::complete) const FRED: u64 = 1 << 32;
}

/// IA32_EFER bits.
pub(super) mod efer {
    pub(in crate::complete) const LMA: u64 = 1 << 10;
    pub(in crate::complete) const NXE: u64 = 1 << 11;
}

/// How the processor runs the code at CS:RIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// CR0.PE clear.
    Real,
    /// RFLAGS.VM set.
    Virtual8086,
    /// Protected or compatibility mode, 16-bit code segment.
    Protected16,
    /// Protected or compatibility mode, 32-bit code segment.
    Protected32,
    /// 64-bit mode.
    Long,
}

/// The registers and guest memory an instruction works on.
pub(super) struct Machine<'m, M> {
    /// General registers, RIP already after the instruction.
    pub(super) regs: kvm_regs,
    /// Segments, tables and control registers.
    pub(super) sregs: kvm_sregs,
    /// Guest-physical memory.
    pub(super) memory: &'m M,
    /// `sregs` differs from the vCPU's.
    pub(super) sregs_changed: bool,
    /// The instruction transferred control through the IDT, which cancels a single-step trap.
    pub(super) delivered: bool,
    /// The instruction ends the blocking of NMIs (IRET).
    pub(super) nmi_unblocked: bool,
    /// The instruction invalidates TLB entries.
    pub(super) flush_tlb: bool,
}

impl<'m, M> Machine<'m, M> {
    pub(super) fn new(regs: kvm_regs, sregs: kvm_sregs, memory: &'m M) -> Self {
        Self {
            regs,
            sregs,
            memory,
            sregs_changed: false,
            delivered: false,
            nmi_unblocked: false,
            flush_tlb: false,
        }
    }

    pub(super) fn mode(&self) -> Mode {
        if self.sregs.cr0 & cr0::PE == 0 {
            Mode::Real
        } else if self.regs.rflags & rflags::VM != 0 {
            Mode::Virtual8086
        } else if self.long_mode() && self.sregs.cs.l != 0 {
            Mode::Long
        } else if self.sregs.cs.db != 0 {
            Mode::Protected32
        } else {
            Mode::Protected16
        }
    }

    /// IA32_EFER.LMA: 64-bit or compatibility mode.
    pub(super) fn long_mode(&self) -> bool {
        self.sregs.efer & efer::LMA != 0
    }

    /// Protection with privilege levels and descriptors: not real and not virtual-8086 mode.
    pub(super) fn is_protected(&self) -> bool {
        !matches!(self.mode(), Mode::Real | Mode::Virtual8086)
    }

    /// The decoder's bitness: 16, 32 or 64.
    pub(super) fn bitness(&self) -> u32 {
        match self.mode() {
            Mode::Long => 64,
            Mode::Protected32 => 32,
            Mode::Real | Mode::Virtual8086 | Mode::Protected16 => 16,
        }
    }

    /// The current privilege level, 0 to 3.
    pub(super) fn cpl(&self) -> u8 {
        match self.mode() {
            Mode::Real => 0,
            Mode::Virtual8086 => 3,
            // KVM keeps the CPL in SS.DPL, as VMX and SVM do.
            _ => self.sregs.ss.dpl & 3,
        }
    }

    /// `rip` cut to the width of the instruction pointer.
    pub(super) fn wrap_ip(&self, rip: u64) -> u64 {
        match self.bitness() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }

    pub(super) fn flag(&self, mask: u64) -> bool {
        self.regs.rflags & mask != 0
    }

    /// Replaces the flags in `mask` by those of `value`.
    pub(super) fn set_flags(&mut self, mask: u64, value: u64) {
        self.regs.rflags = (self.regs.rflags & !mask) | (value & mask);
    }

    pub(super) fn require_cpl0(&self) -> Result<(), Stop> {
        if self.cpl() == 0 { Ok(()) } else { Err(Fault::gp(0).into()) }
    }

    /// The segment register `register` names; DS for anything that is not one.
    pub(super) fn segment(&self, register: Register) -> &kvm_segment {
        match register {
            Register::ES => &self.sregs.es,
            Register::CS => &self.sregs.cs,
            Register::SS => &self.sregs.ss,
            Register::FS => &self.sregs.fs,
            Register::GS => &self.sregs.gs,
            _ => &self.sregs.ds,
        }
    }

    /// The value of a general register, zero-extended; `None` if `register` is not one.
    pub(super) fn register(&self, register: Register) -> Option<u64> {
        let mut regs = self.regs;
        let full = *general(&mut regs, register.full_register())?;
        Some(match register {
            Register::AH | Register::CH | Register::DH | Register::BH => (full >> 8) & 0xff,
            _ => full & mask(register.size()),
        })
    }

    /// Writes a general register as the processor does: a 32-bit write clears the upper half, an
    /// 8- or 16-bit write keeps the rest. `None` if `register` is not a general register.
    pub(super) fn set_register(&mut self, register: Register, value: u64) -> Option<()> {
        let full = general(&mut self.regs, register.full_register())?;
        *full = match (register, register.size()) {
            (Register::AH | Register::CH | Register::DH | Register::BH, _) => {
                (*full & !0xff00) | ((value & 0xff) << 8)
            }
            (_, size @ (1 | 2)) => (*full & !mask(size)) | (value & mask(size)),
            (_, size) => value & mask(size),
        };
        Some(())
    }
}

/// All ones in the low `size` bytes.
pub(super) fn mask(size: usize) -> u64 {
    match size {
        0 => 0,
        1..=7 => (1 << (8 * size)) - 1,
        _ => u64::MAX,
    }
}

fn general(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register {
        Register::RAX => &mut regs.rax,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RBX => &mut regs.rbx,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, long_mode, protected_mode, real_mode};
    use super::*;

    #[test]
    fn register_writes_keep_or_clear_the_rest_like_the_processor() {
        let guest = Guest::new(long_mode());
        let mut machine = guest.machine();
        machine.regs.rax = 0x1122_3344_5566_7788;
        machine.set_register(Register::AL, 0xff).unwrap();
        assert_eq!(machine.regs.rax, 0x1122_3344_5566_77ff);
        machine.set_register(Register::AH, 0xee).unwrap();
        assert_eq!(machine.regs.rax, 0x1122_3344_5566_eeff);
        machine.set_register(Register::AX, 0xdddd).unwrap();
        assert_eq!(machine.regs.rax, 0x1122_3344_5566_dddd);
        assert_eq!(machine.register(Register::AH), Some(0xdd));
        machine.set_register(Register::EAX, 0xffff_ffff_0000_0001).unwrap();
        assert_eq!(machine.regs.rax, 1);
        machine.regs.rsp = 0x1234;
        assert_eq!(machine.register(Register::SPL), Some(0x34));
        assert_eq!(machine.register(Register::XMM0), None);
        assert_eq!(machine.set_register(Register::CS, 0), None);
    }

    #[test]
    fn modes_and_privilege() {
        assert_eq!(Guest::new(long_mode()).machine().mode(), Mode::Long);
        assert_eq!(Guest::new(protected_mode()).machine().mode(), Mode::Protected32);
        let real = Guest::new(real_mode());
        assert_eq!(real.machine().mode(), Mode::Real);
        assert_eq!(real.machine().cpl(), 0);
        assert_eq!(real.machine().wrap_ip(0x1_0001), 1);

        let mut compatibility = Guest::new(long_mode());
        compatibility.cpu.sregs.cs.l = 0;
        assert_eq!(compatibility.machine().mode(), Mode::Protected16);
        compatibility.cpu.sregs.cs.db = 1;
        compatibility.cpu.sregs.ss.dpl = 3;
        assert_eq!(compatibility.machine().mode(), Mode::Protected32);
        assert_eq!(compatibility.machine().cpl(), 3);

        let mut v86 = Guest::new(protected_mode());
        v86.cpu.regs.rflags |= rflags::VM;
        assert_eq!(v86.machine().mode(), Mode::Virtual8086);
        assert_eq!(v86.machine().cpl(), 3);
        assert!(!v86.machine().is_protected());
    }
}
