//! CMPXCHG16B: a compare and exchange that other vCPUs see as one access.
//!
//! The only `unsafe` of instruction completion: no safe atomic type is 16 bytes wide, and the
//! intrinsic does not link in an unoptimized build.
#![allow(unsafe_code, reason = "a 128-bit compare and exchange on guest memory needs asm!")]

use std::arch::asm;

use iced_x86::Instruction;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice, bitmap::BitmapSlice};

use super::machine::{Machine, rflags};
use super::paging::Kind;
use super::stop::{Fault, NotCompleted, Stop};

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// CMPXCHG16B m128: RDX:RAX is compared, RCX:RBX stored, ZF tells which.
    pub(super) fn cmpxchg16b(&mut self, i: &Instruction) -> Result<(), Stop> {
        let linear = self.operand_address(i, 0, 16, Kind::Write)?;
        if linear % 16 != 0 {
            return Err(Fault::gp(0).into());
        }
        let address = self.translate(linear, self.access(Kind::Write))?;
        let expected = u128::from(self.regs.rdx) << 64 | u128::from(self.regs.rax);
        let new = u128::from(self.regs.rcx) << 64 | u128::from(self.regs.rbx);
        let old = self.compare_exchange_128(address, expected, new)?;
        if old == expected {
            self.set_flags(rflags::ZF, rflags::ZF);
        } else {
            self.set_flags(rflags::ZF, 0);
            self.regs.rdx = (old >> 64) as u64;
            self.regs.rax = old as u64;
        }
        Ok(())
    }

    /// Returns the value found.
    fn compare_exchange_128(
        &self,
        address: GuestAddress,
        expected: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        let not_ram = NotCompleted::NotRam(address.0);
        let slice = self.memory.get_slice(address, 16).map_err(|_| not_ram)?;
        let old = compare_exchange(&slice, expected, new)
            .ok_or(Stop::unsupported("because the host's CPU does not have it"))?;
        slice.bitmap().mark_dirty(0, 16);
        Ok(old)
    }
}

/// Compare and exchange on the first 16 bytes of `slice`; the value found, or `None` if the host
/// can't or the slice is too short or not aligned.
fn compare_exchange<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    expected: u128,
    new: u128,
) -> Option<u128> {
    if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let guard = slice.ptr_guard_mut();
    let pointer = guard.as_ptr().cast::<u128>();
    if slice.len() < 16 || !pointer.is_aligned() {
        return None;
    }
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: `pointer` is aligned to 16 (checked), and valid for reads and writes of 16 bytes by
    // VolatileSlice's contract (length checked), kept mapped by `guard`. The access is atomic, so
    // vCPUs and other threads that access the memory meanwhile make no data race; no reference to
    // guest memory is made. The CPU has the instruction (checked). RBX, which asm! can't name,
    // is put back.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") pointer,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    Some(u128::from(high) << 64 | u128::from(low))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{CODE, DATA, Guest, long_mode};
    use super::*;

    const CMPXCHG16B: &[u8] = &[0x48, 0x0f, 0xc7, 0x0b]; // cmpxchg16b [rbx]
    const LOCKED: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0b];

    fn guest() -> Guest {
        let mut guest = Guest::new(long_mode());
        guest.poke_u64(DATA, 0x1111);
        guest.poke_u64(DATA + 8, 0x2222);
        let regs = &mut guest.cpu.regs;
        (regs.rax, regs.rdx) = (0x1111, 0x2222);
        (regs.rbx, regs.rcx) = (DATA, 0x4444);
        guest
    }

    #[test]
    fn equal_values_are_exchanged() {
        for bytes in [CMPXCHG16B, LOCKED] {
            let mut guest = guest();
            guest.run(bytes);
            assert_eq!((guest.peek_u64(DATA), guest.peek_u64(DATA + 8)), (DATA, 0x4444));
            assert_ne!(guest.cpu.regs.rflags & rflags::ZF, 0);
            assert_eq!((guest.cpu.regs.rax, guest.cpu.regs.rdx), (0x1111, 0x2222));
            assert_eq!(guest.cpu.regs.rip, CODE + bytes.len() as u64);
        }
    }

    #[test]
    fn a_difference_in_either_half_loads_the_value() {
        for different in [DATA, DATA + 8] {
            let mut guest = guest();
            guest.cpu.regs.rflags |= rflags::ZF | rflags::CF;
            guest.poke_u64(different, 0x9999);
            guest.run(CMPXCHG16B);
            let memory = (guest.peek_u64(DATA), guest.peek_u64(DATA + 8));
            assert_eq!((guest.cpu.regs.rax, guest.cpu.regs.rdx), memory);
            assert_eq!(guest.peek_u64(different), 0x9999);
            assert_eq!(guest.cpu.regs.rflags, rflags::FIXED | rflags::CF);
        }
    }

    #[test]
    fn alignment_and_write_permission_are_checked() {
        let mut guest = guest();
        guest.cpu.regs.rbx = DATA + 8;
        assert_eq!(guest.fault(CMPXCHG16B, 13), 0);
        guest.cpu.events = Default::default();
        guest.cpu.regs.rbx = DATA;
        guest.set_pte(DATA, DATA | 1);
        assert_eq!(guest.fault(CMPXCHG16B, 14), 0b011, "it writes even if the values differ");
    }

    #[test]
    fn two_threads_lose_no_update() {
        const ROUNDS: u128 = 20_000;
        let guest = Guest::new(long_mode());
        let count = |machine: &Machine<'_, _>| {
            for _ in 0..ROUNDS {
                let mut seen = 0;
                loop {
                    // Both halves change with every step.
                    let next = seen + (1 << 64 | 1);
                    let found =
                        machine.compare_exchange_128(GuestAddress(DATA), seen, next).unwrap();
                    if found == seen {
                        break;
                    }
                    seen = found;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| count(&guest.machine()));
            }
        });
        assert_eq!(guest.peek_u64(DATA), 2 * ROUNDS as u64);
        assert_eq!(guest.peek_u64(DATA + 8), 2 * ROUNDS as u64);
    }
}
