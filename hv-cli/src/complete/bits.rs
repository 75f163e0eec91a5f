//! Bit, byte-swap, CRC and carry instructions: POPCNT, LZCNT, MOVBE, CRC32, BMI1, BMI2 and ADX.
//!
//! Every function takes operands and gives the result and the flags it defines (Intel SDM volume
//! 2). Flags the SDM leaves undefined keep their value.

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

#[cfg(test)]
mod tests {
    #![allow(unsafe_code, reason = "runs the instructions under test on the host's CPU")]

    use std::arch::asm;

    use proptest::prelude::*;

    use super::super::machine::rflags::{FIXED, IF};
    use super::super::testing::{CODE, DATA, Guest, long_mode, protected_mode, real_mode};
    use super::*;

    const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

    /// RAX, RDX, RSI, RDI and the flags: what the instructions below use.
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Registers {
        rax: u64,
        rdx: u64,
        rsi: u64,
        rdi: u64,
        flags: u64,
    }

    /// An instruction on those registers: its bytes, and the host's own execution of them.
    struct Case {
        name: &'static str,
        bytes: &'static [u8],
        native: fn(Registers) -> Option<Registers>,
        defined: u64,
    }

    macro_rules! case {
        ($feature:tt, $name:literal, $defined:expr, $first:literal $($byte:literal)*) => {
            Case {
                name: $name,
                bytes: &[$first $(, $byte)*],
                native: |mut r| {
                    if !std::arch::is_x86_feature_detected!($feature) {
                        return None;
                    }
                    // SAFETY: the bytes are an instruction the CPU has (checked) that works on the
                    // registers named here and the flags; the stack is used below its pointer by
                    // balanced pushes and pops.
                    unsafe {
                        asm!(
                            "push {flags}",
                            "popfq",
                            concat!(".byte ", stringify!($first) $(, ",", stringify!($byte))*),
                            "pushfq",
                            "pop {flags}",
                            flags = inout(reg) r.flags,
                            inout("rax") r.rax,
                            inout("rdx") r.rdx,
                            in("rsi") r.rsi,
                            in("rdi") r.rdi,
                        );
                    }
                    Some(r)
                },
                defined: $defined,
            }
        };
    }

    const LOGIC: u64 = SF | ZF | OF | CF;

    /// One per instruction and operand size; `defined` is what the SDM defines, all else must
    /// stay as it is here, whatever the host does.
    static CASES: &[Case] = &[
        case!("popcnt", "popcnt rax,rsi", ARITHMETIC, 0xf3 0x48 0x0f 0xb8 0xc6),
        case!("popcnt", "popcnt eax,esi", ARITHMETIC, 0xf3 0x0f 0xb8 0xc6),
        case!("popcnt", "popcnt ax,si", ARITHMETIC, 0x66 0xf3 0x0f 0xb8 0xc6),
        case!("lzcnt", "lzcnt rax,rsi", CF | ZF, 0xf3 0x48 0x0f 0xbd 0xc6),
        case!("lzcnt", "lzcnt eax,esi", CF | ZF, 0xf3 0x0f 0xbd 0xc6),
        case!("lzcnt", "lzcnt ax,si", CF | ZF, 0x66 0xf3 0x0f 0xbd 0xc6),
        case!("bmi1", "tzcnt rax,rsi", CF | ZF, 0xf3 0x48 0x0f 0xbc 0xc6),
        case!("bmi1", "tzcnt eax,esi", CF | ZF, 0xf3 0x0f 0xbc 0xc6),
        case!("bmi1", "tzcnt ax,si", CF | ZF, 0x66 0xf3 0x0f 0xbc 0xc6),
        case!("bmi1", "andn rax,rsi,rdi", LOGIC, 0xc4 0xe2 0xc8 0xf2 0xc7),
        case!("bmi1", "andn eax,esi,edi", LOGIC, 0xc4 0xe2 0x48 0xf2 0xc7),
        case!("bmi1", "bextr rax,rsi,rdi", ZF | CF | OF, 0xc4 0xe2 0xc0 0xf7 0xc6),
        case!("bmi1", "bextr eax,esi,edi", ZF | CF | OF, 0xc4 0xe2 0x40 0xf7 0xc6),
        case!("bmi1", "blsi rax,rsi", LOGIC, 0xc4 0xe2 0xf8 0xf3 0xde),
        case!("bmi1", "blsi eax,esi", LOGIC, 0xc4 0xe2 0x78 0xf3 0xde),
        case!("bmi1", "blsr rax,rsi", LOGIC, 0xc4 0xe2 0xf8 0xf3 0xce),
        case!("bmi1", "blsr eax,esi", LOGIC, 0xc4 0xe2 0x78 0xf3 0xce),
        case!("bmi1", "blsmsk rax,rsi", LOGIC, 0xc4 0xe2 0xf8 0xf3 0xd6),
        case!("bmi1", "blsmsk eax,esi", LOGIC, 0xc4 0xe2 0x78 0xf3 0xd6),
        case!("bmi2", "bzhi rax,rsi,rdi", LOGIC, 0xc4 0xe2 0xc0 0xf5 0xc6),
        case!("bmi2", "bzhi eax,esi,edi", LOGIC, 0xc4 0xe2 0x40 0xf5 0xc6),
        case!("bmi2", "pdep rax,rsi,rdi", 0, 0xc4 0xe2 0xcb 0xf5 0xc7),
        case!("bmi2", "pdep eax,esi,edi", 0, 0xc4 0xe2 0x4b 0xf5 0xc7),
        case!("bmi2", "pext rax,rsi,rdi", 0, 0xc4 0xe2 0xca 0xf5 0xc7),
        case!("bmi2", "pext eax,esi,edi", 0, 0xc4 0xe2 0x4a 0xf5 0xc7),
        case!("bmi2", "rorx rax,rsi,13", 0, 0xc4 0xe3 0xfb 0xf0 0xc6 0x0d),
        case!("bmi2", "rorx eax,esi,45", 0, 0xc4 0xe3 0x7b 0xf0 0xc6 0x2d),
        case!("bmi2", "sarx rax,rsi,rdi", 0, 0xc4 0xe2 0xc2 0xf7 0xc6),
        case!("bmi2", "sarx eax,esi,edi", 0, 0xc4 0xe2 0x42 0xf7 0xc6),
        case!("bmi2", "shlx rax,rsi,rdi", 0, 0xc4 0xe2 0xc1 0xf7 0xc6),
        case!("bmi2", "shlx eax,esi,edi", 0, 0xc4 0xe2 0x41 0xf7 0xc6),
        case!("bmi2", "shrx rax,rsi,rdi", 0, 0xc4 0xe2 0xc3 0xf7 0xc6),
        case!("bmi2", "shrx eax,esi,edi", 0, 0xc4 0xe2 0x43 0xf7 0xc6),
        case!("bmi2", "mulx rax,rdx,rsi", 0, 0xc4 0xe2 0xeb 0xf6 0xc6),
        case!("bmi2", "mulx eax,edx,esi", 0, 0xc4 0xe2 0x6b 0xf6 0xc6),
        case!("bmi2", "mulx rax,rax,rsi", 0, 0xc4 0xe2 0xfb 0xf6 0xc6),
        case!("adx", "adcx rax,rsi", CF, 0x66 0x48 0x0f 0x38 0xf6 0xc6),
        case!("adx", "adcx eax,esi", CF, 0x66 0x0f 0x38 0xf6 0xc6),
        case!("adx", "adox rax,rsi", OF, 0xf3 0x48 0x0f 0x38 0xf6 0xc6),
        case!("adx", "adox eax,esi", OF, 0xf3 0x0f 0x38 0xf6 0xc6),
        case!("sse4.2", "crc32 rax,rsi", 0, 0xf2 0x48 0x0f 0x38 0xf1 0xc6),
        case!("sse4.2", "crc32 eax,esi", 0, 0xf2 0x0f 0x38 0xf1 0xc6),
        case!("sse4.2", "crc32 eax,si", 0, 0x66 0xf2 0x0f 0x38 0xf1 0xc6),
        case!("sse4.2", "crc32 eax,sil", 0, 0xf2 0x40 0x0f 0x38 0xf0 0xc6),
        case!("sse4.2", "crc32 rax,sil", 0, 0xf2 0x48 0x0f 0x38 0xf0 0xc6),
    ];

    fn complete(guest: &mut Guest, bytes: &[u8], r: Registers) -> Registers {
        let regs = &mut guest.cpu.regs;
        regs.rip = CODE;
        (regs.rax, regs.rdx, regs.rsi, regs.rdi, regs.rflags) =
            (r.rax, r.rdx, r.rsi, r.rdi, r.flags);
        guest.run(bytes);
        let regs = &guest.cpu.regs;
        assert_eq!(regs.rip, CODE + bytes.len() as u64);
        Registers { rax: regs.rax, rdx: regs.rdx, rsi: regs.rsi, rdi: regs.rdi, flags: regs.rflags }
    }

    /// Numbers with the interesting ones often among them.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => any::<u64>(),
            1 => Just(0),
            1 => Just(u64::MAX),
            2 => (0u32..64).prop_map(|bit| 1 << bit),
            1 => 0u64..0x100,
            1 => (0u64..0x100, 0u64..0x100).prop_map(|(start, len)| start | len << 8),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn results_and_flags_are_those_of_the_host(
            rax in number(), rdx in number(), rsi in number(), rdi in number(),
            flags in any::<u64>(),
        ) {
            let flags = flags & ARITHMETIC | FIXED | IF;
            let before = Registers { rax, rdx, rsi, rdi, flags };
            let mut guest = Guest::new(long_mode());
            for case in CASES {
                let ours = complete(&mut guest, case.bytes, before);
                prop_assert_eq!(ours.flags & !case.defined, flags & !case.defined, "{}", case.name);
                let Some(host) = (case.native)(before) else { continue };
                let same = |r: Registers| Registers { flags: r.flags & case.defined, ..r };
                prop_assert_eq!(same(ours), same(host), "{}", case.name);
            }
        }

        #[test]
        fn the_32_bit_forms_are_the_same_in_32_bit_mode(
            rax in any::<u32>(), rdx in any::<u32>(), rsi in number(), rdi in number()
        ) {
            let (rsi, rdi) = (rsi & 0xffff_ffff, rdi & 0xffff_ffff);
            let (rax, rdx) = (rax.into(), rdx.into());
            let before = Registers { rax, rdx, rsi, rdi, flags: FIXED };
            let mut long_guest = Guest::new(long_mode());
            let mut guest = Guest::new(protected_mode());
            // The forms without REX and VEX.W mean the same there.
            let same = |case: &&Case| case.name.contains("eax") && !case.name.ends_with("sil");
            for case in CASES.iter().filter(same) {
                let ours = complete(&mut guest, case.bytes, before);
                let long = complete(&mut long_guest, case.bytes, before);
                prop_assert_eq!(ours, long, "{}", case.name);
            }
        }
    }

    #[test]
    fn the_host_cross_check_is_not_empty() {
        let before = Registers { rax: 0, rdx: 0, rsi: 1, rdi: 1, flags: FIXED };
        let checked = CASES.iter().filter(|case| (case.native)(before).is_some()).count();
        println!("{checked} of {} forms compared with the host's CPU", CASES.len());
        assert!(
            checked > 0,
            "this host has none of the instructions: only fixed values are tested"
        );
    }

    #[test]
    fn known_values() {
        // The check value of CRC-32C over "123456789", final inversion left out.
        let crc = b"123456789".iter().fold(0xffff_ffff, |crc, &b| crc32(crc, b.into(), 8));
        assert_eq!(crc ^ 0xffff_ffff, 0xe306_9283);
        assert_eq!(popcnt(0), Output { value: 0, defined: ARITHMETIC, flags: ZF });
        assert_eq!(lzcnt(0, 16).value, 16);
        assert_eq!(lzcnt(1, 16).value, 15);
        assert_eq!(tzcnt(0, 32), Output { value: 32, defined: CF | ZF, flags: CF });
        assert_eq!(bextr(0xabcd, 8 << 8 | 4).value, 0xbc);
        assert_eq!(bzhi(0xffff, 8, 32).flags, 0);
        assert_eq!(bzhi(0xffff_ffff, 32, 32).flags, CF | SF);
        assert_eq!(pdep(0b1011, 0xf0f0), 0b1011 << 4);
        assert_eq!(pext(0xabcd, 0xf0f0), 0xac);
        assert_eq!(adx(0xffff_ffff, 0, true, 32, CF), Output { value: 0, defined: CF, flags: CF });
    }

    #[test]
    fn memory_operands_in_64_bit_mode() {
        let mut guest = Guest::new(long_mode());
        guest.poke_u64(DATA + 0x10, 0x8877_6655_4433_2211);
        guest.cpu.regs.rbx = DATA - 0x10;
        guest.cpu.regs.rcx = 4;
        guest.run(&[0xf3, 0x0f, 0xb8, 0x44, 0x8b, 0x10]); // popcnt eax, [rbx+rcx*4+0x10]
        assert_eq!(guest.cpu.regs.rax, u64::from(0x4433_2211u32.count_ones()));

        guest.cpu.regs.rbx = DATA + 0x10;
        guest.cpu.regs.rax = u64::MAX;
        guest.run(&[0x66, 0x0f, 0x38, 0xf0, 0x03]); // movbe ax, [rbx]
        assert_eq!(guest.cpu.regs.rax, 0xffff_ffff_ffff_1122);
        guest.run(&[0x0f, 0x38, 0xf0, 0x03]); // movbe eax, [rbx]
        assert_eq!(guest.cpu.regs.rax, 0x1122_3344);
        guest.run(&[0x48, 0x0f, 0x38, 0xf0, 0x03]); // movbe rax, [rbx]
        assert_eq!(guest.cpu.regs.rax, 0x1122_3344_5566_7788);

        guest.cpu.regs.rbx = DATA + 0x20;
        guest.run(&[0x66, 0x0f, 0x38, 0xf1, 0x03]); // movbe [rbx], ax
        assert_eq!(guest.peek_u64(DATA + 0x20), 0x8877);
        guest.run(&[0x0f, 0x38, 0xf1, 0x03]); // movbe [rbx], eax
        assert_eq!(guest.peek_u64(DATA + 0x20), 0x8877_6655);
        guest.run(&[0x48, 0x0f, 0x38, 0xf1, 0x03]); // movbe [rbx], rax
        assert_eq!(guest.peek_u64(DATA + 0x20), 0x8877_6655_4433_2211);
        assert_eq!(guest.cpu.regs.rflags, FIXED, "movbe changes no flag");

        guest.cpu.regs.rdx = 1 << 63;
        guest.run(&[0xc4, 0xe2, 0xf3, 0xf6, 0x03]); // mulx rax, rcx, [rbx]
        assert_eq!(guest.cpu.regs.rax, 0x8877_6655_4433_2211 >> 1);
        assert_eq!(guest.cpu.regs.rcx, 1 << 63);
        guest.run(&[0xf2, 0x0f, 0x38, 0xf0, 0xc4]); // crc32 eax, ah
        assert_eq!(guest.cpu.regs.rax, crc32(0xa219_9108, 0x91, 8));
    }

    #[test]
    fn memory_operands_in_32_and_16_bit_modes() {
        let mut guest = Guest::new(protected_mode());
        guest.poke_u64(DATA, 0x4433_2211);
        guest.cpu.regs.rbx = DATA;
        guest.run(&[0xf3, 0x0f, 0xb8, 0x03]); // popcnt eax, [ebx]
        assert_eq!(guest.cpu.regs.rax, 10);
        guest.run(&[0x0f, 0x38, 0xf0, 0x03]); // movbe eax, [ebx]
        assert_eq!(guest.cpu.regs.rax, 0x1122_3344);
        guest.cpu.regs.rsi = 0x10;
        guest.run(&[0x67, 0x0f, 0x38, 0xf1, 0x00]); // movbe [bx+si], eax
        assert_eq!(guest.peek_u32(DATA + 0x10), 0x4433_2211);
        guest.cpu.regs.rax = 0xffff_ffff;
        guest.run(&[0xf2, 0x0f, 0x38, 0xf1, 0x03]); // crc32 eax, dword [ebx]
        assert_eq!(guest.cpu.regs.rax, crc32(0xffff_ffff, 0x4433_2211, 32));

        let mut guest = Guest::new(real_mode());
        guest.poke_u64(DATA, 0x4433_2211);
        guest.cpu.regs.rbx = DATA;
        guest.run(&[0xf3, 0x0f, 0xb8, 0x07]); // popcnt ax, [bx]
        assert_eq!(guest.cpu.regs.rax, u64::from(0x2211u16.count_ones()));
        guest.cpu.regs.rax = 0x1122_3344;
        guest.run(&[0x66, 0x0f, 0x38, 0xf1, 0x07]); // movbe [bx], eax
        assert_eq!(guest.peek_u32(DATA), 0x4433_2211);
        assert_eq!(guest.fault(&[0xc4, 0xe2, 0x48, 0xf2, 0xc7], 6), 0, "no VEX in real mode");
    }

    #[test]
    fn a_faulting_store_changes_nothing() {
        let mut guest = Guest::new(long_mode());
        guest.set_pte(DATA, DATA | 1);
        guest.cpu.regs.rbx = DATA;
        guest.cpu.regs.rax = 7;
        let before = guest.cpu.regs;
        assert_eq!(guest.fault(&[0x48, 0x0f, 0x38, 0xf1, 0x03], 14), 0b011);
        assert_eq!(guest.cpu.sregs.cr2, DATA);
        assert_eq!(
            guest.cpu.regs,
            kvm_bindings::kvm_regs { rflags: before.rflags | 1 << 16, ..before }
        );
        assert_eq!(guest.peek_u64(DATA), 0);
    }
}
