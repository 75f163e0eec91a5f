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
