//! Guest memory by segment and offset, or by linear address.
//!
//! Segment checks as in Intel SDM volume 3, "Limit Checking" and "Type Checking"; pages are
//! `paging`'s business. An access that crosses a page is checked on both before either is touched.

use iced_x86::Register;
use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::machine::{Machine, Mode, cr4};
use super::paging::{Access, Kind, Privilege};
use super::stop::{Fault, NotCompleted, Stop};

const PAGE: u64 = 4096;

/// A range of linear addresses as at most two physically contiguous pieces.
struct Pieces {
    first: GuestAddress,
    /// Bytes in `first`; the rest is in `second`.
    split: usize,
    second: Option<GuestAddress>,
}

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// An access by the current instruction.
    pub(super) fn access(&self, kind: Kind) -> Access {
        let privilege = if self.cpl() == 3 { Privilege::User } else { Privilege::Supervisor };
        Access { kind, privilege }
    }

    /// The linear address of `len` bytes at `segment:offset`; #GP or #SS if the segment does
    /// not allow the access.
    pub(super) fn linear(
        &self,
        segment: Register,
        offset: u64,
        len: u64,
        kind: Kind,
    ) -> Result<u64, Stop> {
        let fault = if segment == Register::SS { Fault::ss(0) } else { Fault::gp(0) };
        let register = self.segment(segment);
        if self.mode() == Mode::Long {
            let base = match segment {
                Register::FS | Register::GS => register.base,
                _ => 0,
            };
            let linear = base.wrapping_add(offset);
            let end = linear.wrapping_add(len.saturating_sub(1));
            if !self.is_canonical(linear) || !self.is_canonical(end) {
                return Err(fault.into());
            }
            return Ok(linear);
        }
        self.segment_linear(register, offset, len, kind).ok_or(fault.into())
    }

    /// The same outside 64-bit mode, for any segment; `None` if it does not allow the access.
    pub(super) fn segment_linear(
        &self,
        segment: &kvm_segment,
        offset: u64,
        len: u64,
        kind: Kind,
    ) -> Option<u64> {
        let code = segment.type_ & 8 != 0;
        if self.is_protected() {
            let readable_or_writable = segment.type_ & 2 != 0;
            let allowed = match kind {
                Kind::Read => !code || readable_or_writable,
                Kind::Write => !code && readable_or_writable,
                Kind::Fetch => true,
            };
            if segment.unusable != 0 || segment.present == 0 || !allowed {
                return None;
            }
        }
        let end = offset.saturating_add(len.saturating_sub(1));
        let limit = u64::from(segment.limit);
        let inside = if !code && segment.type_ & 4 != 0 {
            let top = if segment.db != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && end <= top
        } else {
            end <= limit
        };
        inside.then(|| segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Bits 63 to 47 (56 with 5-level paging) are all equal.
    pub(super) fn is_canonical(&self, linear: u64) -> bool {
        let bits = if self.sregs.cr4 & cr4::LA57 != 0 { 57 } else { 48 };
        let top = (linear as i64) >> (bits - 1);
        top == 0 || top == -1
    }

    /// Checks that `len` bytes (at most a page) could be accessed.
    pub(super) fn probe(&self, linear: u64, len: usize, access: Access) -> Result<(), Stop> {
        self.pieces(linear, len, access).map(|_| ())
    }

    /// Reads `buf.len()` bytes (at most a page) at a linear address.
    pub(super) fn read(&self, linear: u64, buf: &mut [u8], access: Access) -> Result<(), Stop> {
        let pieces = self.pieces(linear, buf.len(), access)?;
        let (first, second) = buf.split_at_mut(pieces.split);
        self.read_physical(pieces.first, first)?;
        match pieces.second {
            Some(address) => self.read_physical(address, second),
            None => Ok(()),
        }
    }

    /// Writes `bytes` (at most a page) at a linear address.
    pub(super) fn write(&self, linear: u64, bytes: &[u8], access: Access) -> Result<(), Stop> {
        let pieces = self.pieces(linear, bytes.len(), access)?;
        let (first, second) = bytes.split_at(pieces.split);
        let ranges = [Some((pieces.first, first)), pieces.second.map(|address| (address, second))];
        // All or nothing: a range that ends in a hole is not written at all.
        for (address, bytes) in ranges.into_iter().flatten() {
            if !self.memory.check_range(address, bytes.len()) {
                return Err(NotCompleted::NotRam(address.0).into());
            }
        }
        for (address, bytes) in ranges.into_iter().flatten() {
            self.memory.write_slice(bytes, address).map_err(|_| NotCompleted::NotRam(address.0))?;
        }
        Ok(())
    }

    /// Reads a little-endian number of `size` bytes, 1 to 8.
    pub(super) fn read_uint(&self, linear: u64, size: usize, access: Access) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        if let Some(used) = bytes.get_mut(..size) {
            self.read(linear, used, access)?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes the low `size` bytes, 1 to 8, of `value`, little-endian.
    pub(super) fn write_uint(
        &self,
        linear: u64,
        size: usize,
        value: u64,
        access: Access,
    ) -> Result<(), Stop> {
        let bytes = value.to_le_bytes();
        self.write(linear, bytes.get(..size).unwrap_or(&bytes), access)
    }

    fn pieces(&self, linear: u64, len: usize, access: Access) -> Result<Pieces, Stop> {
        let first = self.translate(linear, access)?;
        let in_page = usize::try_from(PAGE - linear % PAGE).unwrap_or(len);
        if len <= in_page {
            return Ok(Pieces { first, split: len, second: None });
        }
        let mut next = (linear & !(PAGE - 1)).wrapping_add(PAGE);
        if !self.long_mode() {
            next &= 0xffff_ffff;
        }
        let second = self.translate(next, access)?;
        Ok(Pieces { first, split: in_page, second: Some(second) })
    }

    fn read_physical(&self, address: GuestAddress, buf: &mut [u8]) -> Result<(), Stop> {
        self.memory.read_slice(buf, address).map_err(|_| NotCompleted::NotRam(address.0).into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::stop::vector;
    use super::super::testing::{DATA, Guest, MEMORY, long_mode, protected_mode, real_mode};
    use super::*;

    fn vector_of(result: Result<u64, Stop>) -> Option<(u8, Option<u32>)> {
        match result {
            Err(Stop::Fault(fault)) => Some((fault.vector, fault.error_code)),
            _ => None,
        }
    }

    #[test]
    fn bases_in_64_bit_mode_are_those_of_fs_and_gs() {
        let mut guest = Guest::new(long_mode());
        for segment in [&mut guest.cpu.sregs.fs, &mut guest.cpu.sregs.ds] {
            segment.base = 0x1_0000_0000;
            segment.limit = 0;
        }
        let machine = guest.machine();
        assert_eq!(machine.linear(Register::FS, 8, 8, Kind::Read), Ok(0x1_0000_0008));
        assert_eq!(machine.linear(Register::DS, 8, 8, Kind::Write), Ok(8));
        assert_eq!(
            machine.linear(Register::FS, (-0x1_0000_0000i64) as u64, 1, Kind::Read),
            Ok(0),
            "the sum wraps"
        );
    }

    #[test]
    fn addresses_that_are_not_canonical_fault() {
        let gp = Some((vector::GP, Some(0)));
        let mut guest = Guest::new(long_mode());
        let top = 0x7fff_ffff_ffff;
        let linear = |guest: &Guest, segment, offset, len| {
            guest.machine().linear(segment, offset, len, Kind::Read)
        };
        assert_eq!(linear(&guest, Register::DS, top, 1), Ok(top));
        assert_eq!(vector_of(linear(&guest, Register::DS, top, 2)), gp);
        assert_eq!(vector_of(linear(&guest, Register::DS, 1 << 63, 1)), gp);
        assert_eq!(
            vector_of(linear(&guest, Register::SS, top + 1, 1)),
            Some((vector::SS, Some(0)))
        );
        assert_eq!(linear(&guest, Register::DS, !top, 1), Ok(!top));
        guest.cpu.sregs.cr4 |= cr4::LA57;
        assert_eq!(linear(&guest, Register::DS, top, 2), Ok(top));
        assert_eq!(vector_of(linear(&guest, Register::DS, 1 << 56, 1)), gp);
    }

    #[test]
    fn limits_and_types_in_protected_mode() {
        let gp = Some((vector::GP, Some(0)));
        let mut guest = Guest::new(protected_mode());
        guest.cpu.sregs.ds.base = 0x100;
        guest.cpu.sregs.ds.limit = 0xfff;
        let linear = |guest: &Guest, segment, offset, len, kind| {
            guest.machine().linear(segment, offset, len, kind)
        };
        assert_eq!(linear(&guest, Register::DS, 0xffc, 4, Kind::Write), Ok(0x10fc));
        assert_eq!(vector_of(linear(&guest, Register::DS, 0xffd, 4, Kind::Read)), gp);
        guest.cpu.sregs.ds.type_ = 1;
        assert_eq!(vector_of(linear(&guest, Register::DS, 0, 4, Kind::Write)), gp);
        assert_eq!(linear(&guest, Register::DS, 0, 4, Kind::Read), Ok(0x100));
        // Expand-down: the offsets above the limit.
        guest.cpu.sregs.ds.type_ = 7;
        assert_eq!(vector_of(linear(&guest, Register::DS, 0xfff, 1, Kind::Read)), gp);
        assert_eq!(linear(&guest, Register::DS, 0x1000, 4, Kind::Read), Ok(0x1100));
        guest.cpu.sregs.ds.db = 0;
        assert_eq!(vector_of(linear(&guest, Register::DS, 0xfffd, 4, Kind::Read)), gp);
        guest.cpu.sregs.ds.unusable = 1;
        assert_eq!(vector_of(linear(&guest, Register::DS, 0x2000, 1, Kind::Read)), gp);
        // Code: never written, read only if readable.
        assert_eq!(vector_of(linear(&guest, Register::CS, 0, 1, Kind::Write)), gp);
        assert_eq!(linear(&guest, Register::CS, 0, 1, Kind::Read), Ok(0));
        guest.cpu.sregs.cs.type_ = 9;
        assert_eq!(vector_of(linear(&guest, Register::CS, 0, 1, Kind::Read)), gp);
        assert_eq!(linear(&guest, Register::CS, 0, 1, Kind::Fetch), Ok(0));
        // 32-bit addresses wrap.
        guest.cpu.sregs.es.base = 0xffff_f000;
        assert_eq!(linear(&guest, Register::ES, 0x2000, 1, Kind::Read), Ok(0x1000));
    }

    #[test]
    fn real_mode_has_limits_but_no_types() {
        let mut guest = Guest::new(real_mode());
        guest.cpu.sregs.cs.base = 0xf_0000;
        let machine = guest.machine();
        assert_eq!(machine.linear(Register::CS, 0x10, 2, Kind::Write), Ok(0xf_0010));
        let beyond = machine.linear(Register::SS, 0xffff, 2, Kind::Read);
        assert_eq!(vector_of(beyond).map(|(vector, _)| vector), Some(vector::SS));
    }

    #[test]
    fn an_access_across_pages_uses_both_or_none() {
        let guest = Guest::new(long_mode());
        // The second page lies elsewhere.
        guest.set_pte(DATA + 0x1000, 0x2_0000 | 7);
        let machine = guest.machine();
        let write = machine.access(Kind::Write);
        machine.write_uint(DATA + 0xffd, 8, 0x8877_6655_4433_2211, write).unwrap();
        assert_eq!(guest.peek::<3>(DATA + 0xffd), [0x11, 0x22, 0x33]);
        assert_eq!(guest.peek::<5>(0x2_0000), [0x44, 0x55, 0x66, 0x77, 0x88]);
        let read = machine.access(Kind::Read);
        assert_eq!(machine.read_uint(DATA + 0xffd, 8, read), Ok(0x8877_6655_4433_2211));

        guest.unmap(DATA + 0x1000);
        let fault = Fault::pf(DATA + 0x1000, 0b010);
        assert_eq!(machine.write_uint(DATA + 0xffd, 8, 0, write), Err(fault.into()));
        assert_eq!(guest.peek::<3>(DATA + 0xffd), [0x11, 0x22, 0x33]);
    }

    #[test]
    fn the_end_of_ram_is_reported() {
        let guest = Guest::new(protected_mode());
        let machine = guest.machine();
        let access = machine.access(Kind::Write);
        let last = MEMORY as u64 - 2;
        let not_ram = || NotCompleted::NotRam(MEMORY as u64).into();
        assert_eq!(machine.write_uint(last, 2, 0xffff, access), Ok(()));
        assert_eq!(machine.write_uint(last, 4, 0, access), Err(not_ram()));
        assert_eq!(guest.peek::<2>(last), [0xff, 0xff], "nothing is written");
        assert_eq!(machine.read_uint(last, 8, access), Err(not_ram()));
    }
}
