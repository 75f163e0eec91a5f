//! Operands: registers, immediates and memory, as the decoder names them.

use iced_x86::{Instruction, OpKind, Register};
use vm_memory::GuestMemoryBackend;

use super::machine::{Machine, cr0, rflags};
use super::paging::Kind;
use super::stop::{Fault, Stop};

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Size of an operand in bytes.
    pub(super) fn operand_size(&self, i: &Instruction, operand: u32) -> usize {
        match i.op_kind(operand) {
            OpKind::Register => i.op_register(operand).size(),
            _ => i.memory_size().size(),
        }
    }

    /// The offset of the memory operand in its segment.
    pub(super) fn offset(&self, i: &Instruction, operand: u32) -> Result<u64, Stop> {
        // The decoder adds the segment base it is told; the real one belongs to `linear`.
        let value = |register: Register, _, _| {
            if register.is_segment_register() { Some(0) } else { self.register(register) }
        };
        i.virtual_address(operand, 0, value)
            .ok_or(Stop::unsupported("with this kind of memory operand"))
    }

    /// The linear address of the memory operand, checked against its segment for `len` bytes and,
    /// up to 8 bytes, for its alignment where the guest asks for that.
    pub(super) fn operand_address(
        &self,
        i: &Instruction,
        operand: u32,
        len: u64,
        kind: Kind,
    ) -> Result<u64, Stop> {
        let linear = self.linear(i.memory_segment(), self.offset(i, operand)?, len, kind)?;
        let checked = self.cpl() == 3 && self.flag(rflags::AC) && self.sregs.cr0 & cr0::AM != 0;
        if checked && matches!(len, 2 | 4 | 8) && linear % len != 0 {
            return Err(Fault::AC.into());
        }
        Ok(linear)
    }

    /// The value of an operand of 1 to 8 bytes, zero-extended.
    pub(super) fn load(&self, i: &Instruction, operand: u32) -> Result<u64, Stop> {
        match i.op_kind(operand) {
            OpKind::Register => self
                .register(i.op_register(operand))
                .ok_or(Stop::unsupported("with this kind of register")),
            OpKind::Memory => {
                let size = self.operand_size(i, operand);
                let linear = self.operand_address(i, operand, size as u64, Kind::Read)?;
                self.read_uint(linear, size, self.access(Kind::Read))
            }
            _ => {
                i.try_immediate(operand).map_err(|_| Stop::unsupported("with this kind of operand"))
            }
        }
    }

    /// Writes an operand of 1 to 8 bytes.
    pub(super) fn store(&mut self, i: &Instruction, operand: u32, value: u64) -> Result<(), Stop> {
        match i.op_kind(operand) {
            OpKind::Register => self
                .set_register(i.op_register(operand), value)
                .ok_or(Stop::unsupported("with this kind of register")),
            OpKind::Memory => {
                let size = self.operand_size(i, operand);
                let linear = self.operand_address(i, operand, size as u64, Kind::Write)?;
                self.write_uint(linear, size, value, self.access(Kind::Write))
            }
            _ => Err(Stop::unsupported("with this kind of operand")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{CODE, DATA, Guest, long_mode, protected_mode};
    use super::*;

    fn popcnt(guest: &mut Guest, bytes: &[u8]) -> u64 {
        guest.run(bytes);
        guest.cpu.regs.rax
    }

    #[test]
    fn addresses_in_64_bit_mode() {
        let mut guest = Guest::new(long_mode());
        guest.poke_u64(DATA, 0b111);
        // popcnt eax, [rip+disp]: relative to the next instruction.
        let disp = (DATA - CODE - 8) as u32;
        let mut bytes = vec![0xf3, 0x0f, 0xb8, 0x05];
        bytes.extend(disp.to_le_bytes());
        assert_eq!(popcnt(&mut guest, &bytes), 3);
        // popcnt rax, [rsp]
        guest.cpu.regs.rsp = DATA;
        assert_eq!(popcnt(&mut guest, &[0xf3, 0x48, 0x0f, 0xb8, 0x04, 0x24]), 3);
        // popcnt eax, [ebx]: 32-bit addresses drop the upper half.
        guest.cpu.regs.rbx = 0xffff_ffff_0000_0000 | DATA;
        assert_eq!(popcnt(&mut guest, &[0x67, 0xf3, 0x0f, 0xb8, 0x03]), 3);
        // popcnt eax, gs:[0x10]
        guest.cpu.sregs.gs.base = DATA - 0x10;
        assert_eq!(popcnt(&mut guest, &[0x65, 0xf3, 0x0f, 0xb8, 0x04, 0x25, 0x10, 0, 0, 0]), 3);
    }

    #[test]
    fn addresses_in_32_bit_mode() {
        let mut guest = Guest::new(protected_mode());
        guest.poke_u64(DATA, 0b111);
        // popcnt eax, [bx+si] wraps at 64 KiB.
        guest.cpu.regs.rbx = 0xffff;
        guest.cpu.regs.rsi = DATA + 1;
        assert_eq!(popcnt(&mut guest, &[0x67, 0xf3, 0x0f, 0xb8, 0x00]), 3);
        // popcnt eax, fs:[ebx+4]
        guest.cpu.sregs.fs.base = 0x1000;
        guest.cpu.regs.rbx = DATA - 0x1004;
        assert_eq!(popcnt(&mut guest, &[0x64, 0xf3, 0x0f, 0xb8, 0x43, 0x04]), 3);
        // popcnt eax, [ebp] uses SS.
        guest.cpu.sregs.ss.limit = 0xfff;
        guest.cpu.regs.rbp = DATA;
        assert_eq!(guest.fault(&[0xf3, 0x0f, 0xb8, 0x45, 0x00], 12), 0);
    }

    #[test]
    fn alignment_is_checked_for_user_code_that_asks() {
        let bytes = [0x0f, 0x38, 0xf0, 0x03]; // movbe eax, [rbx]
        let mut guest = Guest::new(long_mode());
        guest.cpu.regs.rbx = DATA + 2;
        guest.cpu.sregs.cr0 |= cr0::AM;
        guest.cpu.regs.rflags |= rflags::AC;
        guest.run(&bytes);
        guest.cpu.sregs.ss.dpl = 3;
        assert_eq!(guest.fault(&bytes, 17), 0);
        guest.cpu.events = Default::default();
        guest.cpu.regs.rbx = DATA + 4;
        guest.run(&bytes);
    }
}
