//! The state of the boot CPU when the guest's first instruction runs.

use std::ops::Range;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryBackend;

use super::space::{Part, PlaceError, Space};

const PAGE: u64 = 4096;
/// Gibibytes mapped one to one in long mode; a page of 2 MiB entries each.
const MAPPED_GIB: u64 = 4;

/// Selectors that Linux's boot protocol prescribes (`__BOOT_CS`, `__BOOT_DS`); the others don't
/// care.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

// Intel SDM volume 3, 2.5 "Control Registers" and 2.2.1 "Extended Feature Enable Register".
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// By which rules the guest is entered, and so what it finds in its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol: RSI = boot parameters.
    Linux64,
    /// Linux's 32-bit boot protocol: ESI = boot parameters.
    Linux32,
    /// PVH: EBX = start info.
    Pvh,
    /// Multiboot 1: EAX = 0x2badb002, EBX = multiboot information.
    Multiboot,
    /// A flat binary in real mode: nothing.
    Flat,
}

/// The mode the CPU starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuMode {
    /// 16-bit real mode, CS based at the entry address, IP 0.
    Real,
    /// 32-bit protected mode, flat segments, no paging.
    Protected {
        /// Guest-physical address of the GDT.
        gdt: u64,
    },
    /// 64-bit mode with the first 4 GiB mapped one to one.
    Long {
        /// Guest-physical address of the GDT.
        gdt: u64,
        /// Guest-physical address of the PML4.
        page_tables: u64,
    },
}

/// A loaded guest: what is where, and how its boot CPU starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootState {
    /// The boot protocol.
    pub protocol: Protocol,
    /// The CPU mode, with the structures it needs.
    pub mode: CpuMode,
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// Guest-physical address of what the protocol passes on; 0 for [`Protocol::Flat`].
    pub info: u64,
    /// From the first to the last byte of the kernel and its uninitialised data. Between the segments of
    /// an ELF file there can be something else, even what is no RAM.
    pub kernel: Range<u64>,
    /// What the initrd occupies.
    pub initrd: Option<Range<u64>>,
}

impl BootState {
    /// Sets the registers of the boot CPU. Both are taken as KVM_GET_SREGS and KVM_GET_REGS gave
    /// them for a fresh vCPU; what the boot protocol leaves open stays as it is.
    ///
    /// Application processors need nothing of this: they wait for INIT and SIPI.
    pub fn apply(&self, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
        *regs = kvm_regs { rip: self.entry, rflags: RFLAGS, ..Default::default() };
        match self.protocol {
            Protocol::Linux64 | Protocol::Linux32 => regs.rsi = self.info,
            Protocol::Pvh => regs.rbx = self.info,
            Protocol::Multiboot => {
                regs.rax = super::multiboot::BOOT_MAGIC.into();
                regs.rbx = self.info;
            }
            Protocol::Flat => {}
        }
        match self.mode {
            CpuMode::Real => {
                // The entry is a multiple of 16 below 1 MiB.
                regs.rip = 0;
                sregs.cs.base = self.entry;
                sregs.cs.selector = u16::try_from(self.entry >> 4).unwrap_or_default();
            }
            CpuMode::Protected { gdt } => {
                segments(sregs, gdt, code_segment(false));
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
            CpuMode::Long { gdt, page_tables } => {
                segments(sregs, gdt, code_segment(true));
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = page_tables;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }
}

/// Places the GDT for 32-bit entry.
pub(super) fn protected_mode<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
) -> Result<CpuMode, PlaceError> {
    Ok(CpuMode::Protected { gdt: put_gdt(space, code_segment(false))? })
}

/// Places the GDT and the page tables for 64-bit entry.
pub(super) fn long_mode<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
) -> Result<CpuMode, PlaceError> {
    let gdt = put_gdt(space, code_segment(true))?;
    let pages = MAPPED_GIB + 2;
    let page_tables = space.place_low(Part::PageTables, PAGE, (pages * PAGE) as usize)?;
    space.write(Part::PageTables, page_tables, &identity_map(page_tables))?;
    Ok(CpuMode::Long { gdt, page_tables })
}

/// A PML4, a PDPT and page directories of 2 MiB pages, to be put at `base`: every x86-64 CPU has
/// those, unlike 1 GiB pages. (Intel SDM volume 3, 5.5 "4-Level Paging".)
fn identity_map(base: u64) -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let table = |entries: Vec<u64>| entries.into_iter().chain([0].into_iter().cycle()).take(512);
    let pdpt = base + PAGE;
    let directories = pdpt + PAGE;
    let pdpt_entries = (0..MAPPED_GIB).map(|gib| directories + gib * PAGE | PRESENT_WRITABLE);
    table(vec![pdpt | PRESENT_WRITABLE])
        .chain(table(pdpt_entries.collect()))
        .chain((0..MAPPED_GIB * 512).map(|page| page << 21 | LARGE | PRESENT_WRITABLE))
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// Puts a GDT with the two descriptors at their selectors.
fn put_gdt<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    code: kvm_segment,
) -> Result<u64, PlaceError> {
    let table = [0, 0, descriptor(&code), descriptor(&data_segment())];
    space.put_low(Part::Gdt, 8, table.map(u64::to_le_bytes).as_flattened())
}

/// The descriptor of a flat segment: base 0, limit 4 GiB. (Intel SDM volume 3, 3.4.5.)
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = 0xffff | 0xf << 48;
    let flags = [
        (segment.type_, 40),
        (segment.s, 44),
        (segment.present, 47),
        (segment.l, 53),
        (segment.db, 54),
        (segment.g, 55),
    ];
    flags.iter().fold(limit, |descriptor, &(value, bit)| descriptor | u64::from(value) << bit)
}

fn code_segment(long: bool) -> kvm_segment {
    kvm_segment {
        selector: CODE_SELECTOR,
        type_: 0b1011, // code: execute, read, accessed
        db: u8::from(!long),
        l: u8::from(long),
        ..data_segment()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: 0b0011, // data: read, write, accessed
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Loads flat segments, the GDT and an empty IDT: until the guest has its own, any exception is
/// a triple fault.
fn segments(sregs: &mut kvm_sregs, gdt: u64, code: kvm_segment) {
    let data = data_segment();
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // VM entry demands a busy TSS, even if the guest never uses it.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0b1011, present: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: gdt, limit: 4 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable::default();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(protocol: Protocol, mode: CpuMode, entry: u64) -> (kvm_sregs, kvm_regs) {
        let state = BootState { protocol, mode, entry, info: 0x6000, kernel: 0..0, initrd: None };
        let mut sregs =
            kvm_sregs { apic_base: 0xfee0_0900, cr0: 0x6000_0010, ..Default::default() };
        let mut regs = kvm_regs { rdx: 0x663, rip: 0xfff0, ..Default::default() };
        state.apply(&mut sregs, &mut regs);
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        (sregs, regs)
    }

    #[test]
    fn long_mode_is_paged_flat_and_passes_boot_params() {
        let mode = CpuMode::Long { gdt: 0x5000, page_tables: 0x9000 };
        let (sregs, regs) = boot(Protocol::Linux64, mode, 0x100_0000);
        assert_eq!((regs.rip, regs.rsi, regs.rflags, regs.rdx), (0x100_0000, 0x6000, 2, 0));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4), (0x8000_0011, 0x9000, 0x20));
        assert_eq!((sregs.efer, sregs.gdt.base, sregs.gdt.limit), (0x500, 0x5000, 31));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!((sregs.ss.selector, sregs.ds.limit), (0x18, u32::MAX));
        assert_eq!(sregs.tr.type_, 0b1011);
    }

    #[test]
    fn protected_mode_is_flat_without_paging() {
        let mode = CpuMode::Protected { gdt: 0x5000 };
        let (sregs, regs) = boot(Protocol::Multiboot, mode, 0x10_0000);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.base), (0, 1, 0));
        assert_eq!((regs.rax, regs.rbx), (0x2bad_b002, 0x6000));
        let (_, regs) = boot(Protocol::Pvh, mode, 0x10_0000);
        assert_eq!((regs.rax, regs.rbx), (0, 0x6000));
        let (_, regs) = boot(Protocol::Linux32, mode, 0x10_0000);
        assert_eq!(regs.rsi, 0x6000);
    }

    #[test]
    fn real_mode_only_moves_cs() {
        let (sregs, regs) = boot(Protocol::Flat, CpuMode::Real, 0x1_0000);
        assert_eq!((sregs.cs.base, sregs.cs.selector, regs.rip), (0x1_0000, 0x1000, 0));
        assert_eq!(sregs.cr0, 0x6000_0010);
    }

    #[test]
    fn descriptors_are_those_of_the_sdm() {
        assert_eq!(descriptor(&code_segment(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_translate_every_address_below_4_gib_to_itself() {
        const BASE: u64 = 0x9000;
        let tables = identity_map(BASE);
        assert_eq!(tables.len(), 6 * 4096);
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - BASE + index * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let translate = |address: u64| {
            let mut table = BASE;
            for shift in [39, 30] {
                let found = entry(table, address >> shift & 511);
                if found & 3 != 3 {
                    return None;
                }
                table = found & !0xfff;
            }
            let found = entry(table, address >> 21 & 511);
            (found & 0x83 == 0x83).then_some((found & !0x1f_ffff) | (address & 0x1f_ffff))
        };
        for address in
            [0, 0x1f_ffff, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0020, u32::MAX as u64]
        {
            assert_eq!(translate(address), Some(address));
        }
        assert_eq!(translate(1 << 32), None);
        assert_eq!(translate(1 << 39), None);
    }
}
