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
