//! From bytes to an instruction, and from an instruction to text.

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, Formatter, Instruction, NasmFormatter, Register,
};
use vm_memory::GuestMemoryBackend;

use super::machine::Machine;
use super::paging::Kind;
use super::stop::{Fault, NotCompleted, Stop};

/// The longest instruction.
const MAX_LEN: usize = 15;

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Decodes the instruction at CS:RIP. `bytes` are the first of it, as far as KVM gave them; the
    /// rest is fetched.
    pub(super) fn decode(&self, bytes: &[u8]) -> Result<Instruction, Stop> {
        let mut buffer = [0; MAX_LEN];
        let mut len = 0;
        for (to, from) in buffer.iter_mut().zip(bytes) {
            *to = *from;
            len += 1;
        }
        loop {
            let known = buffer.get(..len).unwrap_or(&buffer);
            match self.try_decode(known, DecoderOptions::NONE) {
                Ok(instruction) => return Ok(instruction),
                Err(DecoderError::NoMoreBytes) => {}
                Err(_) => break,
            }
            let Some(next) = buffer.get_mut(len) else { break };
            let offset = self.wrap_ip(self.regs.rip.wrapping_add(len as u64));
            let linear = self.linear(Register::CS, offset, 1, Kind::Fetch)?;
            self.read(linear, std::slice::from_mut(next), self.access(Kind::Fetch))?;
            len += 1;
        }
        let known = buffer.get(..len).unwrap_or(&buffer);
        match self.try_decode(known, DecoderOptions::NO_INVALID_CHECK) {
            // Valid but for its LOCK prefix.
            Ok(instruction) if instruction.has_lock_prefix() => Err(Fault::UD.into()),
            _ => Err(NotCompleted::Undecodable.into()),
        }
    }

    fn try_decode(&self, bytes: &[u8], options: u32) -> Result<Instruction, DecoderError> {
        let mut decoder = Decoder::with_ip(self.bitness(), bytes, self.regs.rip, options);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => Ok(instruction),
            error => Err(error),
        }
    }
}

/// The instructions in `bytes`, which lie at `rip`, as an assembler writes them, separated by
/// `; `. An incomplete instruction at the end is left out; `(bad)` marks bytes that are none, and
/// ends the text. `bitness` is 16, 32 or 64; anything else counts as 64.
#[must_use]
pub fn disassemble(bytes: &[u8], rip: u64, bitness: u32) -> String {
    let bitness = if matches!(bitness, 16 | 32) { bitness } else { 64 };
    let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    let mut text = String::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::NoMoreBytes if !text.is_empty() => break,
            _ if !text.is_empty() => text.push_str("; "),
            _ => {}
        }
        if instruction.is_invalid() {
            text.push_str("(bad)");
            break;
        }
        formatter.format(&instruction, &mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::testing::{CODE, Guest, long_mode, protected_mode};
    use super::super::{Completed, NotCompleted};
    use super::*;

    #[test]
    fn disassembles_by_bitness_up_to_the_last_whole_instruction() {
        assert_eq!(disassemble(&[0xcc], 0x1000, 64), "int3");
        assert_eq!(
            disassemble(&[0xf3, 0x0f, 0xb8, 0xc3, 0x90, 0x0f], 0, 64),
            "popcnt eax,ebx; nop"
        );
        assert_eq!(disassemble(&[0x89, 0xd8], 0, 16), "mov ax,bx");
        assert_eq!(disassemble(&[0xeb, 0xfe], 0x7c00, 16), "jmp short 7C00h");
        assert_eq!(disassemble(&[0x90, 0x06, 0x90], 0, 64), "nop; (bad)");
        assert_eq!(disassemble(&[0x0f], 0, 64), "(bad)");
        assert_eq!(disassemble(&[], 0, 64), "");
    }

    #[test]
    fn bytes_that_are_missing_are_fetched() {
        // popcnt eax, ebx
        let bytes = [0xf3, 0x0f, 0xb8, 0xc3];
        for known in 0..=bytes.len() {
            let mut guest = Guest::new(long_mode());
            guest.cpu.regs.rbx = 0xff;
            guest.poke(CODE, &bytes);
            assert_eq!(guest.complete(&bytes[..known]), Ok(Completed::Normally));
            assert_eq!(guest.cpu.regs.rax, 8, "{known} bytes known");
            assert_eq!(guest.cpu.regs.rip, CODE + 4);
        }
    }

    #[test]
    fn a_fetch_beyond_the_code_segment_or_a_present_page_faults() {
        let mut guest = Guest::new(protected_mode());
        guest.cpu.sregs.cs.limit = (CODE + 2) as u32;
        assert_eq!(guest.complete(&[0xf3, 0x0f, 0xb8]), Ok(Completed::Exception(13)));

        let mut guest = Guest::new(long_mode());
        // The last two bytes of an instruction lie on a page that is not present.
        guest.cpu.regs.rip = CODE + 0xffe;
        guest.unmap(CODE + 0x1000);
        assert_eq!(guest.complete(&[0xf3, 0x0f]), Ok(Completed::Exception(14)));
        assert_eq!(guest.cpu.sregs.cr2, CODE + 0x1000);
        assert_eq!(guest.cpu.regs.rip, CODE + 0xffe);
    }

    #[test]
    fn a_lock_prefix_that_is_not_allowed_is_invalid_opcode() {
        let mut guest = Guest::new(long_mode());
        assert_eq!(
            guest.complete(&[0xf0, 0xf3, 0x0f, 0xb8, 0xc3]),
            Ok(Completed::Exception(6)),
            "lock popcnt eax, ebx"
        );
        assert_eq!(
            guest.complete(&[0xf0, 0x0f, 0x01, 0xcb]),
            Ok(Completed::Exception(6)),
            "lock stac"
        );
    }

    #[test]
    fn what_is_no_instruction_or_not_ours_is_reported() {
        let mut guest = Guest::new(long_mode());
        assert_eq!(guest.complete(&[0x06; 15]), Err(NotCompleted::Undecodable));
        let error = guest.complete(&[0x0f, 0x58, 0xc1]).unwrap_err();
        assert_eq!(error.to_string(), "hv does not complete the instruction `addps`");
        assert_eq!(guest.cpu, Guest::new(long_mode()).cpu, "the vCPU is untouched");
    }
}
