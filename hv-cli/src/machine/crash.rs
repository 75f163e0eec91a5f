//! What is known of a vCPU that can't go on: registers, instruction, and why it was not completed.
//!
//! Collected on the vCPU's own thread while it stands still, shown at the end of the run.

use std::fmt;

use hv_core::Vcpu;
use hv_memory::RamMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::complete::{NotCompleted, disassemble};

/// The state of a vCPU that can't go on.
#[derive(Debug, Clone, PartialEq)]
pub struct CrashReport {
    /// The vCPU.
    pub vcpu: u32,
    /// Its general registers, if they could be read.
    pub regs: Option<kvm_regs>,
    /// Its segments and control registers, if they could be read.
    pub sregs: Option<kvm_sregs>,
    /// The bytes at the instruction pointer, as far as they are known.
    pub instruction: Vec<u8>,
    /// Why the instruction was not completed, if that was tried.
    pub not_completed: Option<NotCompleted>,
}

/// The longest x86 instruction.
const MAX_INSTRUCTION: usize = 15;

impl CrashReport {
    /// Reads the state of `vcpu`. `bytes` are those of the instruction if KVM gave them; else they
    /// are read from guest memory.
    pub fn collect<V: Vcpu>(vcpu: &V, memory: &RamMemory, bytes: &[u8]) -> Self {
        let (regs, sregs) = (vcpu.regs().ok(), vcpu.sregs().ok());
        let instruction = match (&regs, &sregs) {
            (Some(regs), Some(sregs)) if bytes.is_empty() => {
                fetch(vcpu, memory, sregs.cs.base.wrapping_add(regs.rip))
            }
            _ => bytes.to_vec(),
        };
        Self { vcpu: vcpu.id(), regs, sregs, instruction, not_completed: None }
    }

    /// 16, 32 or 64, as the code segment says.
    fn bitness(&self) -> u32 {
        const LMA: u64 = 1 << 10;
        match &self.sregs {
            Some(sregs) if sregs.efer & LMA != 0 && sregs.cs.l != 0 => 64,
            Some(sregs) if sregs.cs.db != 0 => 32,
            _ => 16,
        }
    }
}

/// The bytes at a linear address, as far as the page reaches and RAM is behind it.
fn fetch<V: Vcpu>(vcpu: &V, memory: &RamMemory, linear: u64) -> Vec<u8> {
    let Ok(translation) = vcpu.translate(linear) else { return Vec::new() };
    if translation.valid == 0 {
        return Vec::new();
    }
    let left_in_page = 0x1000 - (linear & 0xfff);
    let mut bytes = vec![0; MAX_INSTRUCTION.min(left_in_page as usize)];
    let read = memory.read(&mut bytes, GuestAddress(translation.physical_address)).unwrap_or(0);
    bytes.truncate(read);
    bytes
}

fn segment(f: &mut fmt::Formatter<'_>, name: &str, s: &kvm_segment) -> fmt::Result {
    writeln!(
        f,
        "  {name:<3} {:04x} base {:016x} limit {:08x} type {:x} dpl {} present {} l {} db {}",
        s.selector, s.base, s.limit, s.type_, s.dpl, s.present, s.l, s.db
    )
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "vCPU {}:", self.vcpu)?;
        if let Some(r) = &self.regs {
            writeln!(f, "  RIP {:016x} RFLAGS {:016x}", r.rip, r.rflags)?;
            for row in [
                [("RAX", r.rax), ("RBX", r.rbx), ("RCX", r.rcx), ("RDX", r.rdx)],
                [("RSI", r.rsi), ("RDI", r.rdi), ("RBP", r.rbp), ("RSP", r.rsp)],
                [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
                [("R12", r.r12), ("R13", r.r13), ("R14", r.r14), ("R15", r.r15)],
            ] {
                for (name, value) in row {
                    write!(f, "  {name} {value:016x}")?;
                }
                writeln!(f)?;
            }
        } else {
            writeln!(f, "  its registers could not be read")?;
        }
        if let Some(s) = &self.sregs {
            writeln!(
                f,
                "  CR0 {:016x}  CR2 {:016x}  CR3 {:016x}  CR4 {:016x}  EFER {:x}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.efer
            )?;
            for (name, s) in [
                ("CS", &s.cs),
                ("DS", &s.ds),
                ("ES", &s.es),
                ("FS", &s.fs),
                ("GS", &s.gs),
                ("SS", &s.ss),
                ("TR", &s.tr),
                ("LDT", &s.ldt),
            ] {
                segment(f, name, s)?;
            }
            writeln!(f, "  GDT {:016x} limit {:04x}", s.gdt.base, s.gdt.limit)?;
            writeln!(f, "  IDT {:016x} limit {:04x}", s.idt.base, s.idt.limit)?;
        }
        f.write_str("  instruction:")?;
        if self.instruction.is_empty() {
            f.write_str(" its bytes could not be read")?;
        }
        for byte in &self.instruction {
            write!(f, " {byte:02x}")?;
        }
        writeln!(f)?;
        if !self.instruction.is_empty() {
            let rip = self.regs.map_or(0, |r| r.rip);
            writeln!(f, "  {}", disassemble(&self.instruction, rip, self.bitness()))?;
        }
        if let Some(why) = &self.not_completed {
            writeln!(f, "  not completed: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVcpu;
    use hv_core::{Errno, Error, Ioctl};
    use kvm_bindings::kvm_translation;

    fn memory() -> RamMemory {
        let memory = RamMemory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        memory.write_slice(&[0x0f, 0x0b, 0x90], GuestAddress(0x1ffd)).unwrap();
        memory
    }

    #[test]
    fn the_instruction_is_read_up_to_the_end_of_ram() {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_id().return_const(0u32);
        vcpu.expect_regs().returning(|| Ok(kvm_regs { rip: 0xffd, ..kvm_regs::default() }));
        vcpu.expect_sregs().returning(|| {
            let mut sregs = kvm_sregs { efer: 1 << 10, ..kvm_sregs::default() };
            sregs.cs.l = 1;
            Ok(sregs)
        });
        vcpu.expect_translate().returning(|_| {
            Ok(kvm_translation { physical_address: 0x1ffd, valid: 1, ..Default::default() })
        });
        let report = CrashReport::collect(&vcpu, &memory(), &[]);
        assert_eq!(report.instruction, [0x0f, 0x0b, 0x90]);
        let text = report.to_string();
        assert!(text.contains("RIP 0000000000000ffd"), "{text}");
        assert!(text.contains("ud2; nop"), "{text}");
    }

    #[test]
    fn a_vcpu_that_tells_nothing_still_makes_a_report() {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_id().return_const(7u32);
        vcpu.expect_regs().returning(|| Err(Error::new(Ioctl::GetRegs, Errno::EIO)));
        vcpu.expect_sregs().returning(|| Err(Error::new(Ioctl::GetSregs, Errno::EIO)));
        let text = CrashReport::collect(&vcpu, &memory(), &[]).to_string();
        assert!(text.contains("vCPU 7") && text.contains("could not be read"), "{text}");
    }
}
