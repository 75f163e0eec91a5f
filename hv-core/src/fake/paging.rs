//! Address translation as the guest's page tables say (`KVM_TRANSLATE`; Intel SDM volume 3,
//! "Paging"). Reads the tables, and sets no accessed bits in them.

use kvm_bindings::{kvm_sregs, kvm_translation};

use super::memory::Memory;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Address bits of an entry of 8 bytes.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How tables are walked in a paging mode.
struct Walk {
    levels: u32,
    /// Bytes of an entry.
    entry: u64,
    /// Bits of an address that choose an entry.
    bits: u32,
    /// The highest level, from 1, at which an entry may map a large page.
    largest: u32,
    /// Where the table of the highest level is.
    root: u64,
}

impl Walk {
    fn new(sregs: &kvm_sregs) -> Self {
        if sregs.efer & EFER_LMA != 0 {
            let levels = if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
            Self { levels, entry: 8, bits: 9, largest: 3, root: sregs.cr3 & ADDRESS }
        } else if sregs.cr4 & CR4_PAE != 0 {
            // The table of the highest level has 4 entries and is aligned to its size.
            Self { levels: 3, entry: 8, bits: 9, largest: 2, root: sregs.cr3 & 0xffff_ffe0 }
        } else {
            let largest = if sregs.cr4 & CR4_PSE != 0 { 2 } else { 1 };
            Self { levels: 2, entry: 4, bits: 10, largest, root: sregs.cr3 & 0xffff_f000 }
        }
    }

    fn physical(&self, memory: &Memory, linear: u64) -> Option<u64> {
        let mut table = self.root;
        for level in (1..=self.levels).rev() {
            let shift = 12 + (level - 1) * self.bits;
            let index = linear >> shift & ((1 << self.bits) - 1);
            let mut bytes = [0; 8];
            let size = usize::try_from(self.entry).ok()?;
            if !memory.read(table.checked_add(index * self.entry)?, bytes.get_mut(..size)?) {
                return None;
            }
            let entry = u64::from_le_bytes(bytes);
            if entry & PRESENT == 0 {
                return None;
            }
            let large = level > 1 && level <= self.largest && entry & LARGE != 0;
            if level == 1 || large {
                let page = (1u64 << shift) - 1;
                return Some(entry & ADDRESS & !page | linear & page);
            }
            table = entry & ADDRESS;
        }
        None
    }
}

/// What `KVM_TRANSLATE` says. KVM says of every page that it may be written, and not by user code.
pub(super) fn translate(memory: &Memory, sregs: &kvm_sregs, linear: u64) -> kvm_translation {
    let physical = match sregs.cr0 & CR0_PG {
        0 => Some(linear),
        _ if !canonical(sregs, linear) => None,
        _ => Walk::new(sregs).physical(memory, linear),
    };
    kvm_translation {
        linear_address: linear,
        physical_address: physical.unwrap_or(u64::MAX),
        valid: physical.is_some().into(),
        writeable: 1,
        usermode: 0,
        ..Default::default()
    }
}

/// Whether the address is one: in 64-bit mode, all upper bits are the same; else 32 bits.
fn canonical(sregs: &kvm_sregs, linear: u64) -> bool {
    if sregs.efer & EFER_LMA == 0 {
        return linear >> 32 == 0;
    }
    let unused = if sregs.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
    let signed = (linear << unused).cast_signed() >> unused;
    signed.cast_unsigned() == linear
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU8;

    use vm_memory::GuestAddress;

    use super::super::memory::MemoryLimits;
    use super::*;
    use crate::{HostMemory, HostRange, MemorySlot, SlotFlags, SlotId};

    #[derive(Debug)]
    #[repr(align(4096))]
    struct Aligned([AtomicU8; 0x8000]);

    impl HostMemory for Aligned {
        fn bytes(&self) -> &[AtomicU8] {
            &self.0
        }
    }

    /// 8 pages from 0, with these entries.
    fn tables<const N: usize>(entries: &[(u64, [u8; N])]) -> Memory {
        let mut memory = Memory::new(MemoryLimits {
            slots: 1,
            address_spaces: 1,
            gpa_bits: 52,
            readonly: true,
            manual_protect: 0,
            dirty_ring: 0,
        });
        let pages = Arc::new(Aligned(std::array::from_fn(|_| AtomicU8::new(0))));
        let host = HostRange::new(pages, 0, 0x8000).unwrap();
        let (id, guest, flags) = (SlotId(0), GuestAddress(0), SlotFlags::default());
        memory.set(&MemorySlot { id, guest, host, flags }).unwrap();
        for (address, entry) in entries {
            memory.write(0, *address, entry);
        }
        memory
    }

    fn address(memory: &Memory, sregs: &kvm_sregs, linear: u64) -> Option<u64> {
        let answer = translate(memory, sregs, linear);
        (answer.valid != 0).then_some(answer.physical_address)
    }

    #[test]
    fn without_paging_an_address_is_itself() {
        let memory = tables::<8>(&[]);
        assert_eq!(address(&memory, &kvm_sregs::default(), 0x1234_5678), Some(0x1234_5678));
    }

    #[test]
    fn four_and_five_levels_with_large_pages() {
        let entry = u64::to_le_bytes;
        let memory = tables(&[
            (0x5000, entry(0x1003)),                // fifth level -> fourth
            (0x1000, entry(0x2003)),                // fourth -> third
            (0x2000, entry(0x3003)),                // third -> second
            (0x2008, entry(0x4000_0083)),           // 1 GiB at 1 GiB
            (0x3000, entry(0x4003)),                // second -> first
            (0x3008, entry(0x0060_0083)),           // 2 MiB at 6 MiB
            (0x4008, entry(0x8000_0000_0abc_d003)), // 4 KiB, not executable
        ]);
        let mut sregs = kvm_sregs {
            cr0: CR0_PG | 1,
            cr3: 0x1018,
            cr4: CR4_PAE,
            efer: EFER_LMA | 1 << 8,
            ..Default::default()
        };
        for root in [0x1018, 0x5000] {
            sregs.cr3 = root;
            sregs.cr4 = CR4_PAE | if root == 0x5000 { CR4_LA57 } else { 0 };
            assert_eq!(address(&memory, &sregs, 0x1042), Some(0x0abc_d042));
            assert_eq!(address(&memory, &sregs, 0x0020_0042), Some(0x0060_0042));
            assert_eq!(address(&memory, &sregs, 0x4012_3456), Some(0x4012_3456));
            assert_eq!(address(&memory, &sregs, 0x2000), None, "not present");
        }
        sregs.cr4 = CR4_PAE;
        assert_eq!(address(&memory, &sregs, 1 << 60 | 0x1042), None, "not canonical");
        sregs.cr3 = 0x10_0000;
        assert_eq!(address(&memory, &sregs, 0x1042), None, "no memory there");
    }

    #[test]
    fn two_levels_and_large_pages() {
        let entry = u32::to_le_bytes;
        let memory = tables(&[
            (0x1000, entry(0x2003)),
            (0x1004, entry(0x0080_0083)),
            (0x2004, entry(0x0abc_d003)),
        ]);
        let mut sregs =
            kvm_sregs { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PSE, ..Default::default() };
        assert_eq!(address(&memory, &sregs, 0x1042), Some(0x0abc_d042));
        assert_eq!(address(&memory, &sregs, 0x0040_0042), Some(0x0080_0042));
        assert_eq!(address(&memory, &sregs, 1 << 32), None);
        sregs.cr4 = 0;
        assert_eq!(address(&memory, &sregs, 0x0040_0042), None, "0x800000 holds no table");
    }
}
