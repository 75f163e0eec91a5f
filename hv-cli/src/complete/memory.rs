//! Guest memory by segment and offset, or by linear address.
//!
//! Segment checks as in Intel SDM volume 3, sections 6.3 to 6.5 and 4.3; pages are `paging`'s
//! business. An access that crosses a page is checked on both before either is touched.

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
        self.write_physical(pieces.first, first)?;
        match pieces.second {
            Some(address) => self.write_physical(address, second),
            None => Ok(()),
        }
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

    fn write_physical(&self, address: GuestAddress, bytes: &[u8]) -> Result<(), Stop> {
        // All or nothing: a range that ends in a hole is not written at all.
        if !self.memory.check_range(address, bytes.len()) {
            return Err(NotCompleted::NotRam(address.0).into());
        }
        self.memory.write_slice(bytes, address).map_err(|_| NotCompleted::NotRam(address.0).into())
    }
}
