//! Bit, byte-swap, CRC and carry instructions: POPCNT, LZCNT, MOVBE, CRC32, BMI1, BMI2 and ADX.
//!
//! Every function takes operands and gives the result and the flags it defines (Intel SDM volume 2). Flags
//! the SDM leaves undefined keep their value.

use iced_x86::{EncodingKind, Instruction, Mnemonic};
use vm_memory::GuestMemoryBackend;

use super::machine::{Machine, Mode, mask, rflags};
use super::stop::{Fault, Stop};

use rflags::{AF, CF, OF, PF, SF, ZF};

/// A result and the flags it sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Output {
    value: u64,
    /// The flags the instruction defines.
    defined: u64,
    /// Those of them that are 1.
    flags: u64,
}

impl Output {
    fn plain(value: u64) -> Self {
        Self { value, defined: 0, flags: 0 }
    }
}

fn flag(bit: u64, is_set: bool) -> u64 {
    if is_set { bit } else { 0 }
}

fn sign(value: u64, bits: u32) -> bool {
    value.checked_shr(bits.wrapping_sub(1)).unwrap_or(0) & 1 != 0
}

fn popcnt(value: u64) -> Output {
    Output {
        value: u64::from(value.count_ones()),
        defined: OF | SF | ZF | AF | CF | PF,
        flags: flag(ZF, value == 0),
    }
}

/// LZCNT and TZCNT: `count` zeros were found in `source`.
fn zeros(count: u32, source: u64) -> Output {
    Output {
        value: u64::from(count),
        defined: CF | ZF,
        flags: flag(CF, source == 0) | flag(ZF, count == 0),
    }
}

fn lzcnt(value: u64, bits: u32) -> Output {
    zeros(value.leading_zeros().saturating_sub(64 - bits), value)
}

fn tzcnt(value: u64, bits: u32) -> Output {
    zeros(value.trailing_zeros().min(bits), value)
}

/// SF and ZF by the result, OF clear, CF as given.
fn logic(value: u64, bits: u32, carry: bool) -> Output {
    Output {
        value,
        defined: SF | ZF | OF | CF,
        flags: flag(ZF, value == 0) | flag(SF, sign(value, bits)) | flag(CF, carry),
    }
}

fn andn(first: u64, second: u64, bits: u32) -> Output {
    logic(!first & second & mask(bits as usize / 8), bits, false)
}

fn bextr(source: u64, control: u64) -> Output {
    let (start, len) = ((control & 0xff) as u32, ((control >> 8) & 0xff) as u32);
    let value = source.checked_shr(start).unwrap_or(0) & low_bits(len);
    Output { value, defined: ZF | CF | OF, flags: flag(ZF, value == 0) }
}

fn blsi(source: u64, bits: u32) -> Output {
    logic(source & source.wrapping_neg() & mask(bits as usize / 8), bits, source != 0)
}

fn blsr(source: u64, bits: u32) -> Output {
    logic(source & source.wrapping_sub(1), bits, source == 0)
}

fn blsmsk(source: u64, bits: u32) -> Output {
    let value = (source ^ source.wrapping_sub(1)) & mask(bits as usize / 8);
    // ZF is defined as 0; the result never is 0.
    logic(value, bits, source == 0)
}

fn bzhi(source: u64, index: u64, bits: u32) -> Output {
    let n = (index & 0xff) as u32;
    logic(source & low_bits(n), bits, n >= bits)
}

/// All ones in the low `n` bits.
fn low_bits(n: u32) -> u64 {
    1u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1)
}

fn pdep(source: u64, mut selector: u64) -> u64 {
    let mut value = 0;
    let mut next = 0;
    while selector != 0 {
        let lowest = selector & selector.wrapping_neg();
        if source >> next & 1 != 0 {
            value |= lowest;
        }
        selector ^= lowest;
        next += 1;
    }
    value
}

fn pext(source: u64, mut selector: u64) -> u64 {
    let mut value = 0;
    let mut next = 0;
    while selector != 0 {
        let lowest = selector & selector.wrapping_neg();
        if source & lowest != 0 {
            value |= 1 << next;
        }
        selector ^= lowest;
        next += 1;
    }
    value
}

fn rorx(source: u64, count: u64, bits: u32) -> u64 {
    if bits == 64 {
        source.rotate_right((count & 63) as u32)
    } else {
        u64::from((source as u32).rotate_right((count & 31) as u32))
    }
}

fn sarx(source: u64, count: u64, bits: u32) -> u64 {
    if bits == 64 {
        ((source as i64) >> (count & 63)) as u64
    } else {
        u64::from(((source as i32) >> (count & 31)) as u32)
    }
}

fn shlx(source: u64, count: u64, bits: u32) -> u64 {
    (source << (count & u64::from(bits - 1))) & mask(bits as usize / 8)
}

fn shrx(source: u64, count: u64, bits: u32) -> u64 {
    source >> (count & u64::from(bits - 1))
}

/// ADCX and ADOX: an addition whose carry comes from and goes to the flag `carry` only.
fn adx(first: u64, second: u64, carry_in: bool, bits: u32, carry: u64) -> Output {
    let sum = u128::from(first) + u128::from(second) + u128::from(carry_in);
    Output {
        value: (sum as u64) & mask(bits as usize / 8),
        defined: carry,
        flags: flag(carry, sum >> bits != 0),
    }
}

/// CRC32: the Castagnoli polynomial, reflected, over the `bits` low bits of `data`.
fn crc32(crc: u64, data: u64, bits: u32) -> u64 {
    let mut crc = crc as u32;
    for byte in data.to_le_bytes().into_iter().take(bits as usize / 8) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    u64::from(crc)
}

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Completes the instruction if it belongs here; `None` if it does not.
    pub(super) fn bit_instruction(&mut self, i: &Instruction) -> Option<Result<(), Stop>> {
        use Mnemonic as X;
        Some(match i.mnemonic() {
            X::Movbe => self.movbe(i),
            X::Mulx => self.mulx(i),
            X::Popcnt
            | X::Lzcnt
            | X::Tzcnt
            | X::Andn
            | X::Bextr
            | X::Blsi
            | X::Blsr
            | X::Blsmsk
            | X::Bzhi
            | X::Pdep
            | X::Pext
            | X::Rorx
            | X::Sarx
            | X::Shlx
            | X::Shrx
            | X::Adcx
            | X::Adox
            | X::Crc32 => self.compute(i),
            _ => return None,
        })
    }

    /// VEX encodings do not exist in real and virtual-8086 mode.
    fn require_vex_mode(&self, i: &Instruction) -> Result<(), Stop> {
        let vex = i.encoding() == EncodingKind::VEX;
        if vex && matches!(self.mode(), Mode::Real | Mode::Virtual8086) {
            return Err(Fault::UD.into());
        }
        Ok(())
    }

    fn compute(&mut self, i: &Instruction) -> Result<(), Stop> {
        self.require_vex_mode(i)?;
        let bits = (self.operand_size(i, 0) * 8) as u32;
        let first = self.load(i, 1)?;
        let second = if i.op_count() > 2 { self.load(i, 2)? } else { 0 };
        let output = match i.mnemonic() {
            Mnemonic::Popcnt => popcnt(first),
            Mnemonic::Lzcnt => lzcnt(first, bits),
            Mnemonic::Tzcnt => tzcnt(first, bits),
            Mnemonic::Andn => andn(first, second, bits),
            Mnemonic::Bextr => bextr(first, second),
            Mnemonic::Blsi => blsi(first, bits),
            Mnemonic::Blsr => blsr(first, bits),
            Mnemonic::Blsmsk => blsmsk(first, bits),
            Mnemonic::Bzhi => bzhi(first, second, bits),
            Mnemonic::Pdep => Output::plain(pdep(first, second)),
            Mnemonic::Pext => Output::plain(pext(first, second)),
            Mnemonic::Rorx => Output::plain(rorx(first, second, bits)),
            Mnemonic::Sarx => Output::plain(sarx(first, second, bits)),
            Mnemonic::Shlx => Output::plain(shlx(first, second, bits)),
            Mnemonic::Shrx => Output::plain(shrx(first, second, bits)),
            Mnemonic::Adcx => adx(self.load(i, 0)?, first, self.flag(CF), bits, CF),
            Mnemonic::Adox => adx(self.load(i, 0)?, first, self.flag(OF), bits, OF),
            Mnemonic::Crc32 => {
                let data_bits = (self.operand_size(i, 1) * 8) as u32;
                Output::plain(crc32(self.load(i, 0)?, first, data_bits))
            }
            other => return Err(super::NotCompleted::Unknown(other).into()),
        };
        self.store(i, 0, output.value)?;
        self.set_flags(output.defined, output.flags);
        Ok(())
    }

    fn movbe(&mut self, i: &Instruction) -> Result<(), Stop> {
        let unused_bits = 64 - 8 * self.operand_size(i, 0).clamp(1, 8);
        let value = self.load(i, 1)?.swap_bytes() >> unused_bits;
        self.store(i, 0, value)
    }

    /// MULX: the high half to the first operand, the low half to the second; the high half wins
    /// if they are the same register.
    fn mulx(&mut self, i: &Instruction) -> Result<(), Stop> {
        self.require_vex_mode(i)?;
        let size = self.operand_size(i, 0);
        let source = self.load(i, 2)?;
        let product = u128::from(self.regs.rdx & mask(size)) * u128::from(source);
        self.store(i, 1, product as u64 & mask(size))?;
        self.store(i, 0, (product >> (8 * size)) as u64)
    }
}
