//! The guest's page tables, walked as the processor does (Intel SDM volume 3, "Paging").
//!
//! Checks permissions, gives the page fault with its error code, and sets accessed and dirty bits
//! atomically, because other vCPUs use the same tables meanwhile. It knows nothing of
//! segments. Reserved are the bits that are so on every processor; bits above the guest's
//! physical-address width are taken as part of the address, which then is not RAM.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};

use super::machine::{Machine, cr0, cr4, efer, rflags};
use super::stop::{Fault, NotCompleted, Stop};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const PROTECTION_KEY: u64 = 0xf << 59;
/// Bits 51 to 12: the frame of an 8-byte entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Bits of a PDPTE of PAE paging that must be 0: 63 to 52, 8 to 5, 2 and 1.
const PDPTE_RESERVED: u64 = 0xfff0_0000_0000_01e6;

/// How often a walk starts again because another vCPU changed an entry under it.
const RESTARTS: usize = 1000;

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Fetch,
}

/// On whose behalf (Intel SDM volume 3, "Access Rights").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Privilege {
    /// CPL 3.
    User,
    /// An instruction at CPL 0 to 2.
    Supervisor,
    /// The processor itself, on descriptor tables and task-state segments.
    System,
}

/// An access to a linear address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) kind: Kind,
    pub(super) privilege: Privilege,
}

/// One level of tables: the lowest bit of its index and what an entry may be.
struct Level {
    shift: u32,
    index_bits: u32,
    /// An entry with PS set maps a page.
    large: bool,
    /// A PDPTE of PAE paging: no permissions, no accessed bit.
    bare: bool,
}

const fn level(shift: u32, large: bool) -> Level {
    Level { shift, index_bits: 9, large, bare: false }
}

static FIVE_LEVEL: [Level; 5] =
    [level(48, false), level(39, false), level(30, true), level(21, true), level(12, false)];
static PAE: [Level; 3] = [
    Level { shift: 30, index_bits: 2, large: false, bare: true },
    level(21, true),
    level(12, false),
];
static LEGACY_PSE: [Level; 2] = [
    Level { shift: 22, index_bits: 10, large: true, bare: false },
    Level { shift: 12, index_bits: 10, large: false, bare: false },
];
static LEGACY: [Level; 2] = [
    Level { shift: 22, index_bits: 10, large: false, bare: false },
    Level { shift: 12, index_bits: 10, large: false, bare: false },
];

/// The tables in force.
struct Tables {
    root: u64,
    levels: &'static [Level],
    /// Bytes per entry: 4 or 8.
    entry_size: u64,
}

/// An entry used by a walk.
#[derive(Clone, Copy)]
struct Entry {
    address: GuestAddress,
    value: u64,
    /// Accessed and dirty bits the access sets in it.
    sets: u64,
}

/// The end of a walk.
struct Mapping {
    address: GuestAddress,
    user: bool,
    writable: bool,
    no_execute: bool,
    protection_key: u64,
    entries: [Option<Entry>; 5],
}

/// What a linear address is mapped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// The guest-physical address, which need not be RAM.
    pub address: GuestAddress,
    /// Whether user code may access it.
    pub user: bool,
}

/// Looks up a linear address as a debugger does: whoever may access the page, and without a trace in
/// the page tables. `None` if it is not mapped.
#[must_use]
pub fn look_up<M: GuestMemoryBackend>(
    sregs: &kvm_sregs,
    memory: &M,
    linear: u64,
) -> Option<Mapped> {
    let machine = Machine::new(kvm_regs::default(), *sregs, memory);
    let exists = if machine.long_mode() { machine.is_canonical(linear) } else { linear >> 32 == 0 };
    if !exists {
        return None;
    }
    let Some(tables) = machine.tables() else {
        return Some(Mapped { address: GuestAddress(linear), user: false });
    };
    let access = Access { kind: Kind::Read, privilege: Privilege::System };
    let Mapping { address, user, .. } = machine.walk(&tables, linear, access).ok()?;
    Some(Mapped { address, user })
}

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// The guest-physical address of `linear`, or the page fault.
    pub(super) fn translate(&self, linear: u64, access: Access) -> Result<GuestAddress, Stop> {
        let Some(tables) = self.tables() else { return Ok(GuestAddress(linear)) };
        for _ in 0..RESTARTS {
            let mapping = self.walk(&tables, linear, access)?;
            self.check(&mapping, linear, access)?;
            if self.set_bits(&mapping, tables.entry_size)? {
                return Ok(mapping.address);
            }
        }
        Err(Stop::unsupported("while its page tables keep changing"))
    }

    fn tables(&self) -> Option<Tables> {
        let sregs = &self.sregs;
        if sregs.cr0 & cr0::PG == 0 {
            return None;
        }
        Some(if self.long_mode() {
            let five = sregs.cr4 & cr4::LA57 != 0;
            let levels = if five { &FIVE_LEVEL[..] } else { FIVE_LEVEL.get(1..).unwrap_or(&[]) };
            Tables { root: sregs.cr3 & FRAME, levels, entry_size: 8 }
        } else if sregs.cr4 & cr4::PAE != 0 {
            Tables { root: sregs.cr3 & 0xffff_ffe0, levels: &PAE, entry_size: 8 }
        } else {
            let levels = if sregs.cr4 & cr4::PSE != 0 { &LEGACY_PSE } else { &LEGACY };
            Tables { root: sregs.cr3 & 0xffff_f000, levels, entry_size: 4 }
        })
    }

    fn walk(&self, tables: &Tables, linear: u64, access: Access) -> Result<Mapping, Stop> {
        let mut mapping = Mapping {
            address: GuestAddress(tables.root),
            user: true,
            writable: true,
            no_execute: false,
            protection_key: 0,
            entries: [None; 5],
        };
        for (slot, level) in mapping.entries.iter_mut().zip(tables.levels) {
            let index = (linear >> level.shift) & ((1 << level.index_bits) - 1);
            let address = GuestAddress(mapping.address.0 | (index * tables.entry_size));
            let value = self.load_entry(address, tables.entry_size)?;
            if value & PRESENT == 0 {
                return Err(self.page_fault(linear, access, 0).into());
            }
            if self.has_reserved_bits(level, tables.entry_size, value) {
                return Err(self.page_fault(linear, access, 1 | 1 << 3).into());
            }
            let is_page = level.shift == 12 || (level.large && value & PAGE_SIZE_BIT != 0);
            let mut sets = 0;
            if !level.bare {
                mapping.user &= value & USER != 0;
                mapping.writable &= value & WRITABLE != 0;
                mapping.no_execute |= tables.entry_size == 8 && value & NO_EXECUTE != 0;
                sets |= ACCESSED;
                if is_page && access.kind == Kind::Write {
                    sets |= DIRTY;
                }
            }
            *slot = Some(Entry { address, value, sets });
            if is_page {
                let offset_mask = (1 << level.shift) - 1;
                mapping.protection_key = value & PROTECTION_KEY;
                mapping.address = GuestAddress(
                    match tables.entry_size {
                        8 => value & FRAME & !offset_mask,
                        // PSE-36: bits 20 to 13 of a 4 MiB page are address bits 39 to 32.
                        _ if level.shift == 22 => {
                            (value & 0xffc0_0000) | ((value >> 13) & 0xff) << 32
                        }
                        _ => value & 0xffff_f000,
                    } | (linear & offset_mask),
                );
                break;
            }
            mapping.address =
                GuestAddress(value & if tables.entry_size == 8 { FRAME } else { 0xffff_f000 });
        }
        Ok(mapping)
    }

    fn has_reserved_bits(&self, level: &Level, entry_size: u64, value: u64) -> bool {
        if level.bare {
            return value & PDPTE_RESERVED != 0;
        }
        let large_page = level.large && value & PAGE_SIZE_BIT != 0;
        if entry_size == 4 {
            return large_page && value & (1 << 21) != 0;
        }
        let mut reserved = 0;
        if self.sregs.efer & efer::NXE == 0 {
            reserved |= NO_EXECUTE;
        }
        if !self.long_mode() {
            reserved |= 0x7ff << 52;
        }
        if large_page {
            // Between the PAT bit and the frame.
            reserved |= ((1 << level.shift) - 1) & !0x1fff;
        } else if level.shift >= 39 {
            reserved |= PAGE_SIZE_BIT;
        }
        value & reserved != 0
    }

    fn check(&self, mapping: &Mapping, linear: u64, access: Access) -> Result<(), Stop> {
        let sregs = &self.sregs;
        if mapping.protection_key != 0 && self.long_mode() {
            let feature = if mapping.user { cr4::PKE } else { cr4::PKS };
            if sregs.cr4 & feature != 0 && access.kind != Kind::Fetch {
                return Err(Stop::unsupported("on a page with a protection key"));
            }
        }
        let allowed = match (access.privilege, access.kind) {
            (Privilege::User, Kind::Read) => mapping.user,
            (Privilege::User, Kind::Write) => mapping.user && mapping.writable,
            (Privilege::User, Kind::Fetch) => mapping.user && !mapping.no_execute,
            (_, Kind::Fetch) => {
                !mapping.no_execute && (!mapping.user || sregs.cr4 & cr4::SMEP == 0)
            }
            (privilege, kind) => {
                let smap = sregs.cr4 & cr4::SMAP != 0
                    && (privilege == Privilege::System || !self.flag(rflags::AC));
                let write_protected =
                    kind == Kind::Write && !mapping.writable && sregs.cr0 & cr0::WP != 0;
                !write_protected && (!mapping.user || !smap)
            }
        };
        if allowed { Ok(()) } else { Err(self.page_fault(linear, access, 1).into()) }
    }

    /// #PF; `code` holds its P and RSVD bits (Intel SDM volume 3,
    /// "Page-Fault Exceptions").
    fn page_fault(&self, linear: u64, access: Access, mut code: u32) -> Fault {
        if access.kind == Kind::Write {
            code |= 1 << 1;
        }
        if access.privilege == Privilege::User {
            code |= 1 << 2;
        }
        let nx_paging = self.sregs.cr4 & cr4::PAE != 0 && self.sregs.efer & efer::NXE != 0;
        if access.kind == Kind::Fetch && (nx_paging || self.sregs.cr4 & cr4::SMEP != 0) {
            code |= 1 << 4;
        }
        Fault::pf(linear, code)
    }

    fn load_entry(&self, address: GuestAddress, size: u64) -> Result<u64, Stop> {
        let value = if size == 8 {
            self.memory.load::<u64>(address, Ordering::Relaxed)
        } else {
            self.memory.load::<u32>(address, Ordering::Relaxed).map(u64::from)
        };
        value.map_err(|_| NotCompleted::NotRam(address.0).into())
    }

    /// Sets accessed and dirty bits; false if an entry is no longer what the walk saw.
    fn set_bits(&self, mapping: &Mapping, size: u64) -> Result<bool, Stop> {
        for entry in mapping.entries.iter().flatten() {
            if entry.value & entry.sets != entry.sets && !self.update_entry(entry, size)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn update_entry(&self, entry: &Entry, size: u64) -> Result<bool, Stop> {
        const ORDER: Ordering = Ordering::SeqCst;
        let not_ram = || Stop::from(NotCompleted::NotRam(entry.address.0));
        let bytes = if size == 8 { 8 } else { 4 };
        let slice = self.memory.get_slice(entry.address, bytes).map_err(|_| not_ram())?;
        let (old, new) = (entry.value, entry.value | entry.sets);
        let done = if size == 8 {
            let cell = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| not_ram())?;
            cell.compare_exchange(old, new, ORDER, ORDER).is_ok()
        } else {
            let cell = slice.get_atomic_ref::<AtomicU32>(0).map_err(|_| not_ram())?;
            // Entries of 4 bytes were loaded as such.
            cell.compare_exchange(old as u32, new as u32, ORDER, ORDER).is_ok()
        };
        slice.bitmap().mark_dirty(0, bytes);
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        DATA, FakeCpu, Guest, PD, PDPT, PML4, PT, long_mode, protected_mode,
    };
    use super::*;

    const READ: Access = Access { kind: Kind::Read, privilege: Privilege::Supervisor };
    const WRITE: Access = Access { kind: Kind::Write, privilege: Privilege::Supervisor };
    const FETCH: Access = Access { kind: Kind::Fetch, privilege: Privilege::Supervisor };
    const USER_READ: Access = Access { kind: Kind::Read, privilege: Privilege::User };
    const USER_WRITE: Access = Access { kind: Kind::Write, privilege: Privilege::User };
    const USER_FETCH: Access = Access { kind: Kind::Fetch, privilege: Privilege::User };
    const SYSTEM: Access = Access { kind: Kind::Read, privilege: Privilege::System };

    fn translate(guest: &Guest, linear: u64, access: Access) -> Result<u64, Stop> {
        guest.machine().translate(linear, access).map(|address| address.0)
    }

    fn fault(linear: u64, code: u32) -> Result<u64, Stop> {
        Err(Fault::pf(linear, code).into())
    }

    /// A long mode guest whose page at `DATA` has this entry.
    fn with_entry(entry: u64, change: impl FnOnce(&mut FakeCpu)) -> Guest {
        let mut guest = Guest::new(long_mode());
        guest.set_pte(DATA, entry);
        change(&mut guest.cpu);
        guest
    }

    #[test]
    fn permissions_and_error_codes() {
        let (p, w, u, nx) = (PRESENT, WRITABLE, USER, NO_EXECUTE);
        // Entry, access, error code of the fault or none.
        let rows = [
            (0, READ, Some(0b00000)),
            (0, WRITE, Some(0b00010)),
            (0, FETCH, Some(0b10000)),
            (0, USER_WRITE, Some(0b00110)),
            (p, READ, None),
            (p, WRITE, Some(0b00011)),
            (p | w, WRITE, None),
            (p | w, FETCH, None),
            (p | w | nx, FETCH, Some(0b10001)),
            (p | w | nx, READ, None),
            (p | w, USER_READ, Some(0b00101)),
            (p | w, USER_WRITE, Some(0b00111)),
            (p | w, USER_FETCH, Some(0b10101)),
            (p | u, USER_READ, None),
            (p | u, USER_WRITE, Some(0b00111)),
            (p | u | nx, USER_FETCH, Some(0b10101)),
            (p | u, USER_FETCH, None),
            (p | w | u, USER_WRITE, None),
            (p | u, READ, None),
        ];
        for (entry, access, code) in rows {
            let guest = with_entry(DATA | entry, |_| {});
            let expected = code.map_or(Ok(DATA + 4), |code| fault(DATA + 4, code));
            assert_eq!(translate(&guest, DATA + 4, access), expected, "{entry:#x} {access:?}");
        }
    }

    #[test]
    fn wp_smap_and_smep() {
        let user_page = DATA | PRESENT | USER;
        let without_wp = with_entry(user_page, |cpu| cpu.sregs.cr0 &= !cr0::WP);
        assert_eq!(translate(&without_wp, DATA, WRITE), Ok(DATA));
        assert_eq!(translate(&without_wp, DATA, USER_WRITE), fault(DATA, 0b111));

        let mut smap = with_entry(user_page | WRITABLE, |cpu| cpu.sregs.cr4 |= cr4::SMAP);
        assert_eq!(translate(&smap, DATA, READ), fault(DATA, 0b001));
        assert_eq!(translate(&smap, DATA, WRITE), fault(DATA, 0b011));
        assert_eq!(translate(&smap, DATA, USER_READ), Ok(DATA));
        smap.cpu.regs.rflags |= rflags::AC;
        assert_eq!(translate(&smap, DATA, READ), Ok(DATA));
        assert_eq!(translate(&smap, DATA, SYSTEM), fault(DATA, 0b001), "AC does not help");

        let smep = with_entry(user_page, |cpu| cpu.sregs.cr4 |= cr4::SMEP);
        assert_eq!(translate(&smep, DATA, FETCH), fault(DATA, 0b10001));
        assert_eq!(translate(&smep, DATA, USER_FETCH), Ok(DATA));
        assert_eq!(translate(&smep, DATA, READ), Ok(DATA));
    }

    #[test]
    fn permissions_of_every_level_count() {
        for (table, name) in [(PML4, "PML4E"), (PDPT, "PDPTE"), (PD, "PDE")] {
            let guest = Guest::new(long_mode());
            let next = guest.peek_u64(table) & FRAME;
            guest.poke_u64(table, next | PRESENT);
            assert_eq!(translate(&guest, DATA, WRITE), fault(DATA, 0b011), "{name}");
            assert_eq!(translate(&guest, DATA, USER_READ), fault(DATA, 0b101), "{name}");
            guest.poke_u64(table, next | PRESENT | NO_EXECUTE);
            assert_eq!(translate(&guest, DATA, FETCH), fault(DATA, 0b10001), "{name}");
            guest.poke_u64(table, 0);
            assert_eq!(translate(&guest, DATA, READ), fault(DATA, 0), "{name}");
        }
    }

    #[test]
    fn accessed_and_dirty_bits_are_set_by_accesses_that_succeed() {
        let guest = Guest::new(long_mode());
        assert_eq!(translate(&guest, DATA, READ), Ok(DATA));
        for table in [PML4, PDPT, PD] {
            assert_eq!(guest.peek_u64(table) & (ACCESSED | DIRTY), ACCESSED);
        }
        assert_eq!(guest.pte(DATA), DATA | 7 | ACCESSED);
        assert_eq!(translate(&guest, DATA, WRITE), Ok(DATA));
        assert_eq!(guest.pte(DATA), DATA | 7 | ACCESSED | DIRTY);
        assert_eq!(guest.peek_u64(PD) & DIRTY, 0, "tables are not dirty");

        let guest = with_entry(DATA | PRESENT, |_| {});
        assert_eq!(translate(&guest, DATA, WRITE), fault(DATA, 0b011));
        assert_eq!(guest.pte(DATA), DATA | PRESENT);
    }

    #[test]
    fn an_entry_that_changed_under_the_walk_is_not_overwritten() {
        let guest = Guest::new(long_mode());
        let address = GuestAddress(PT + 8 * (DATA >> 12));
        let seen = Entry { address, value: DATA | 7, sets: ACCESSED | DIRTY };
        guest.set_pte(DATA, 0);
        assert_eq!(guest.machine().update_entry(&seen, 8), Ok(false));
        assert_eq!(guest.pte(DATA), 0);
        guest.set_pte(DATA, DATA | 7);
        assert_eq!(guest.machine().update_entry(&seen, 8), Ok(true));
        assert_eq!(guest.pte(DATA), DATA | 7 | ACCESSED | DIRTY);
    }

    #[test]
    fn reserved_bits() {
        let reserved = 0b1001;
        let guest = Guest::new(long_mode());
        guest.poke_u64(PML4, guest.peek_u64(PML4) | PAGE_SIZE_BIT);
        assert_eq!(translate(&guest, DATA, READ), fault(DATA, reserved));
        let guest = Guest::new(long_mode());
        guest.poke_u64(PD, PAGE_SIZE_BIT | 1 << 13 | PRESENT);
        assert_eq!(translate(&guest, DATA, READ), fault(DATA, reserved));
        let no_nx = with_entry(DATA | PRESENT | NO_EXECUTE, |cpu| cpu.sregs.efer &= !efer::NXE);
        assert_eq!(translate(&no_nx, DATA, READ), fault(DATA, reserved));
        assert_eq!(translate(&no_nx, DATA, FETCH), fault(DATA, reserved), "no I bit without NX");
    }

    #[test]
    fn large_pages() {
        let guest = Guest::new(long_mode());
        // 2 MiB at linear 0x60_0000, 1 GiB at linear 0xc000_0000.
        guest.poke_u64(PD + 8 * 3, 0x4000_0000 | PAGE_SIZE_BIT | 1 << 12 | PRESENT | WRITABLE);
        guest.poke_u64(PDPT + 8 * 3, 0x1_4000_0000 | PAGE_SIZE_BIT | PRESENT);
        assert_eq!(translate(&guest, 0x6a_bcde, WRITE), Ok(0x400a_bcde));
        assert_ne!(guest.peek_u64(PD + 8 * 3) & DIRTY, 0);
        assert_eq!(translate(&guest, 0xdabc_def0, READ), Ok(0x1_5abc_def0));
    }

    #[test]
    fn five_levels() {
        const PML5: u64 = 0x10_4000;
        let mut guest = Guest::new(long_mode());
        guest.cpu.sregs.cr4 |= cr4::LA57;
        guest.cpu.sregs.cr3 = PML5;
        guest.poke_u64(PML5 + 8 * 2, PML4 | 7);
        assert_eq!(translate(&guest, (2 << 48) | DATA, READ), Ok(DATA));
        assert_eq!(guest.peek_u64(PML5 + 16), PML4 | 7 | ACCESSED);
        assert_eq!(translate(&guest, DATA, READ), fault(DATA, 0));
    }

    #[test]
    fn pae() {
        let mut guest = Guest::new(protected_mode());
        guest.cpu.sregs.cr0 |= cr0::PG;
        guest.cpu.sregs.cr4 |= cr4::PAE;
        // The table of four PDPTEs is aligned to 32 bytes only.
        guest.cpu.sregs.cr3 = PDPT + 0x20;
        guest.poke_u64(PDPT + 0x20 + 8 * 3, PD | PRESENT);
        guest.poke_u64(PD, PT | 7);
        guest.poke_u64(PD + 8, 0x20_0000 | PAGE_SIZE_BIT | 7);
        guest.poke_u64(PT + 8 * 5, DATA | 7);
        assert_eq!(translate(&guest, 0xc000_5123, WRITE), Ok(DATA + 0x123));
        assert_eq!(translate(&guest, 0xc030_0000, READ), Ok(0x30_0000));
        assert_eq!(guest.peek_u64(PDPT + 0x38), PD | PRESENT, "a PDPTE has no accessed bit");
        assert_eq!(guest.peek_u64(PT + 40), DATA | 7 | ACCESSED | DIRTY);
        assert_eq!(translate(&guest, 0x5000, READ), fault(0x5000, 0));
        guest.poke_u64(PDPT + 0x38, PD | PRESENT | WRITABLE);
        assert_eq!(translate(&guest, 0xc000_5123, READ), fault(0xc000_5123, 0b1001));
    }

    #[test]
    fn two_levels_of_4_bytes() {
        let mut guest = Guest::new(protected_mode());
        guest.cpu.sregs.cr0 |= cr0::PG;
        guest.cpu.sregs.cr3 = PD;
        guest.poke(PD + 4, &(PT as u32 | 7).to_le_bytes());
        guest.poke(PT + 8, &(DATA as u32 | 5).to_le_bytes());
        assert_eq!(translate(&guest, 0x40_2345, READ), Ok(DATA + 0x345));
        assert_eq!(guest.peek_u32(PT + 8), DATA as u32 | 5 | 1 << 5);
        assert_eq!(translate(&guest, 0x40_2345, USER_WRITE), fault(0x40_2345, 0b111));
        assert_eq!(translate(&guest, 0x40_3000, FETCH), fault(0x40_3000, 0), "no I bit");

        // A 4 MiB page with address bits 39 to 32 (PSE-36), once CR4.PSE is set.
        let large = 0x0080_0000 | 0x12 << 13 | PAGE_SIZE_BIT as u32 | 3;
        guest.poke(PD + 8, &large.to_le_bytes());
        guest.cpu.sregs.cr4 |= cr4::PSE;
        assert_eq!(translate(&guest, 0x0091_2345, READ), Ok(0x12_0091_2345));
        guest.poke(PD + 8, &(large | 1 << 21).to_le_bytes());
        assert_eq!(translate(&guest, 0x0091_2345, READ), fault(0x0091_2345, 0b1001));
    }

    #[test]
    fn tables_outside_ram_are_reported() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.sregs.cr3 = 0xfee0_0000;
        let not_ram = Err(NotCompleted::NotRam(0xfee0_0000).into());
        assert_eq!(
            translate(&guest, DATA, READ),
            Err(Stop::from(NotCompleted::NotRam(0xfee0_0000)))
        );
        assert_eq!(translate(&guest, 0, USER_FETCH), not_ram);
    }

    #[test]
    fn protection_keys_are_left_alone() {
        let keyed = DATA | 7 | 3 << 59;
        let plain = with_entry(keyed, |_| {});
        assert_eq!(translate(&plain, DATA, READ), Ok(DATA));
        let pku = with_entry(keyed, |cpu| cpu.sregs.cr4 |= cr4::PKE);
        assert!(matches!(translate(&pku, DATA, READ), Err(Stop::NotCompleted(_))));
        assert_eq!(translate(&pku, DATA, FETCH), Ok(DATA), "keys don't apply to fetches");
    }

    #[test]
    fn a_debugger_sees_what_is_mapped_whoever_may_access_it_and_leaves_no_trace() {
        let found = |guest: &Guest, linear| {
            look_up(&guest.cpu.sregs, &guest.memory, linear).map(|it| (it.address.0, it.user))
        };
        let supervisor = with_entry(DATA | PRESENT | NO_EXECUTE, |_| {});
        assert_eq!(found(&supervisor, DATA + 7), Some((DATA + 7, false)));
        assert_eq!(supervisor.peek_u64(PT + 8 * (DATA >> 12)), DATA | PRESENT | NO_EXECUTE);
        let user = with_entry(DATA | PRESENT | USER, |cpu| cpu.sregs.cr4 |= cr4::SMAP | cr4::SMEP);
        assert_eq!(found(&user, DATA), Some((DATA, true)));
        let keyed = with_entry(DATA | 7 | 3 << 59, |cpu| cpu.sregs.cr4 |= cr4::PKE);
        assert_eq!(found(&keyed, DATA), Some((DATA, true)));
        assert_eq!(found(&with_entry(0, |_| {}), DATA), None);
        for linear in [1 << 47, 0x7fff_ffff_ffff_ffff, 0xffff_0000_0000_0000 | DATA] {
            assert_eq!(found(&user, linear), None, "{linear:#x} is not canonical");
        }
        let outside = with_entry(7, |cpu| cpu.sregs.cr3 = 0xfee0_0000);
        assert_eq!(found(&outside, DATA), None, "no tables there");
        let plain = Guest::new(protected_mode());
        assert_eq!(found(&plain, 0xfee0_0010), Some((0xfee0_0010, false)));
        assert_eq!(found(&plain, 1 << 32 | DATA), None, "addresses have 32 bits");
    }
}
