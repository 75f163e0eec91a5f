//! Segment descriptors in the GDT and LDT (Intel SDM volume 3, sections 3.4 and 3.5).
//!
//! Reads and loads them; which descriptor an instruction may load is the instruction's business.

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_segment;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, VolatileMemory};

use super::machine::Machine;
use super::paging::{Access, Kind, Privilege};
use super::stop::{NotCompleted, Stop};

pub(super) const SYSTEM_READ: Access = Access { kind: Kind::Read, privilege: Privilege::System };
const SYSTEM_WRITE: Access = Access { kind: Kind::Write, privilege: Privilege::System };

/// An 8-byte descriptor of a code, data or system segment and where it was found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    raw: u64,
    selector: u16,
    linear: u64,
}

impl Descriptor {
    /// Bits 43 to 40.
    pub(super) fn kind(&self) -> u8 {
        (self.raw >> 40) as u8 & 0xf
    }

    /// A code or data segment, not a system segment.
    fn is_segment(&self) -> bool {
        self.raw >> 44 & 1 != 0
    }

    pub(super) fn is_code(&self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }

    pub(super) fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    pub(super) fn is_writable_data(&self) -> bool {
        self.is_segment() && self.kind() & 0b1010 == 0b0010
    }

    pub(super) fn dpl(&self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }

    pub(super) fn is_present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }

    /// A 64-bit code segment.
    pub(super) fn is_long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }

    /// D/B: 32-bit operands or stack.
    pub(super) fn is_big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }

    /// The last valid offset.
    pub(super) fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff) as u32 | ((self.raw >> 32) as u32 & 0xf_0000);
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 32 & 0xff00_0000)
    }

    /// The segment register after loading this descriptor, with `rpl` as the selector's RPL.
    pub(super) fn segment(&self, rpl: u8) -> kvm_segment {
        kvm_segment {
            base: self.base(),
            limit: self.limit(),
            selector: self.selector & !3 | u16::from(rpl),
            // Loading sets the accessed bit.
            type_: self.kind() | 1,
            present: u8::from(self.is_present()),
            dpl: self.dpl(),
            db: u8::from(self.is_big()),
            s: u8::from(self.is_segment()),
            l: u8::from(self.is_long()),
            g: (self.raw >> 55) as u8 & 1,
            avl: (self.raw >> 52) as u8 & 1,
            ..Default::default()
        }
    }
}

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// The descriptor `selector` names; `None` if it is null or outside its table.
    pub(super) fn descriptor(&self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.sregs.gdt.base, u64::from(self.sregs.gdt.limit))
        } else if self.sregs.ldt.unusable != 0 {
            return Ok(None);
        } else {
            (self.sregs.ldt.base, u64::from(self.sregs.ldt.limit))
        };
        if selector & !3 == 0 || offset + 7 > limit {
            return Ok(None);
        }
        let linear = base.wrapping_add(offset);
        let raw = self.read_uint(linear, 8, SYSTEM_READ)?;
        Ok(Some(Descriptor { raw, selector, linear }))
    }

    /// Sets the accessed bit of a code or data descriptor that is being loaded.
    pub(super) fn mark_accessed(&self, descriptor: &Descriptor) -> Result<(), Stop> {
        if descriptor.kind() & 1 != 0 {
            return Ok(());
        }
        let address = self.translate(descriptor.linear.wrapping_add(5), SYSTEM_WRITE)?;
        let not_ram = NotCompleted::NotRam(address.0);
        let slice = self.memory.get_slice(address, 1).map_err(|_| not_ram)?;
        let byte = slice.get_atomic_ref::<AtomicU8>(0).map_err(|_| not_ram)?;
        byte.fetch_or(1, Ordering::SeqCst);
        slice.bitmap().mark_dirty(0, 1);
        Ok(())
    }
}

/// SS after a change of privilege in 64-bit mode: a null selector with the new privilege level.
pub(super) fn null_stack(cpl: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: u16::from(cpl),
        type_: 3,
        present: 1,
        dpl: cpl,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::stop::Fault;
    use super::super::testing::{GDT, Guest, descriptor, long_mode, protected_mode, selector};
    use super::*;

    #[test]
    fn fields_are_decoded() {
        // Base 0x12345678, limit 0xabcde in bytes, 16-bit, DPL 2, conforming code.
        let mut guest = Guest::with_tables(protected_mode());
        guest.set_descriptor(0x30, 0x121a_dc34_5678_bcde);
        let found = guest.machine().descriptor(0x32).unwrap().unwrap();
        let segment = found.segment(2);
        assert_eq!((segment.base, segment.limit, segment.selector), (0x1234_5678, 0xa_bcde, 0x32));
        assert_eq!((segment.type_, segment.dpl, segment.present), (0xd, 2, 1));
        assert_eq!((segment.g, segment.db, segment.l, segment.avl, segment.s), (0, 0, 0, 1, 1));
        assert!(found.is_code() && found.is_conforming() && !found.is_writable_data());
        guest.set_descriptor(0x30, descriptor::DATA);
        let data = guest.machine().descriptor(0x30).unwrap().unwrap();
        assert_eq!((data.limit(), data.is_big()), (0xffff_ffff, true));
        guest.cpu.sregs.gdt.base = GDT + 8;
        assert!(guest.machine().descriptor(0x28).unwrap().unwrap().is_writable_data());
    }

    #[test]
    fn a_descriptor_lies_inside_its_table() {
        let mut guest = Guest::with_tables(protected_mode());
        let found =
            |guest: &Guest, selector| guest.machine().descriptor(selector).unwrap().is_some();
        guest.cpu.sregs.gdt.limit = 0x17;
        assert!(found(&guest, 0x10));
        assert!(!found(&guest, 0x18));
        guest.cpu.sregs.gdt.limit = 0x16;
        assert!(!found(&guest, 0x10));
        assert!(!found(&guest, 3), "null, whatever the RPL");
        assert!(!found(&guest, 0x0c), "there is no LDT");
        guest.cpu.sregs.ldt = kvm_segment { base: GDT, limit: 0xf, ..Default::default() };
        assert!(found(&guest, 0x0c));
        assert!(found(&guest, 0x04), "the first entry of an LDT is not null");
        assert!(!found(&guest, 0x14));
    }

    #[test]
    fn the_accessed_bit_is_set_where_it_is_clear() {
        let guest = Guest::with_tables(long_mode());
        let clear = descriptor::DATA & !descriptor::ACCESSED;
        guest.set_descriptor(selector::DATA, clear);
        let mark = |guest: &Guest| {
            let found = guest.machine().descriptor(selector::DATA).unwrap().unwrap();
            guest.machine().mark_accessed(&found)
        };
        assert_eq!(mark(&guest), Ok(()));
        assert_eq!(guest.get_descriptor(selector::DATA), descriptor::DATA);
        // A table that can't be written does no harm as long as the bit is set.
        guest.set_pte(GDT, GDT | 1);
        assert_eq!(mark(&guest), Ok(()));
        guest.set_descriptor(selector::DATA, clear);
        assert_eq!(mark(&guest), Err(Fault::pf(GDT + 0x15, 0b011).into()));
    }
}
