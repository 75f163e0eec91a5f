//! The breakpoints of a debugger: which there are, and what they need in guest memory and in the
//! debug registers.
//!
//! A software breakpoint is an INT3 in guest memory. It is kept by its guest-physical address,
//! because that is where the byte is: the page tables may change, and two linear addresses may be
//! one byte. The debugger never gets to see the INT3; the guest does, if it reads its code.

use std::collections::{BTreeMap, BTreeSet};

use hv_memory::RamMemory;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
};
use vm_memory::{Bytes, GuestAddress};

pub(super) type Memory = RamMemory;

const INT3: u8 = 0xcc;

/// More than anyone sets; a debugger that sets more is out of its mind.
const MAX_SOFTWARE: usize = 4096;

/// DR7: bit 10 is always set.
const DR7_FIXED: u64 = 1 << 10;

/// A byte of guest memory that is an INT3 for now.
#[derive(Debug)]
struct Patch {
    /// What belongs there.
    original: u8,
    /// The linear addresses the debugger set it for.
    linear: BTreeSet<u64>,
}

/// What a debug register watches for, by its encoding in DR7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trigger {
    Execute = 0b00,
    Write = 0b01,
    Access = 0b11,
}

/// The use of a debug register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hardware {
    pub(super) trigger: Trigger,
    /// What the debugger asked for: a piece of it is in `piece`.
    pub(super) address: u64,
    len: u64,
    /// Where this register watches, and how many bytes: 1, 2, 4 or 8, aligned.
    piece: (u64, u64),
}

impl Hardware {
    /// The LEN field of DR7.
    fn len_bits(&self) -> u64 {
        match self.piece.1 {
            8 => 0b10,
            len => len - 1,
        }
    }
}

/// All breakpoints of one debugger.
#[derive(Debug, Default)]
pub(super) struct Breakpoints {
    software: BTreeMap<u64, Patch>,
    hardware: [Option<Hardware>; 4],
}

impl Breakpoints {
    /// Sets a software breakpoint for `linear`, whose byte is at `physical`. False if that is not
    /// RAM, or there are too many.
    pub(super) fn insert(&mut self, memory: &Memory, linear: u64, physical: u64) -> bool {
        if !self.software.contains_key(&physical) {
            let address = GuestAddress(physical);
            let Ok(original) = memory.read_obj::<u8>(address) else { return false };
            if self.software.len() >= MAX_SOFTWARE || memory.write_obj(INT3, address).is_err() {
                return false;
            }
            self.software.insert(physical, Patch { original, linear: BTreeSet::new() });
        }
        if let Some(patch) = self.software.get_mut(&physical) {
            patch.linear.insert(linear);
        }
        true
    }

    /// Takes away the software breakpoint of `linear`. False if there is none.
    pub(super) fn remove(&mut self, memory: &Memory, linear: u64) -> bool {
        let mut found = false;
        self.software.retain(|&physical, patch| {
            found |= patch.linear.remove(&linear);
            let stays = !patch.linear.is_empty();
            if !stays {
                restore(memory, physical, patch);
            }
            stays
        });
        found
    }

    /// Takes all away, software and hardware.
    pub(super) fn clear(&mut self, memory: &Memory) {
        for (physical, patch) in std::mem::take(&mut self.software) {
            restore(memory, physical, &patch);
        }
        self.hardware = [None; 4];
    }

    /// Whether there is a software breakpoint at all.
    pub(super) fn has_software(&self) -> bool {
        !self.software.is_empty()
    }

    /// Whether the byte at `physical` is an INT3 because of a breakpoint.
    pub(super) fn is_patched(&self, memory: &Memory, physical: u64) -> bool {
        self.software.contains_key(&physical)
            && memory.read_obj::<u8>(GuestAddress(physical)).is_ok_and(|byte| byte == INT3)
    }

    /// Puts what belongs there into `data`, which was read from `physical`.
    pub(super) fn hide(&self, physical: u64, data: &mut [u8]) {
        for (offset, patch) in self.within(physical, data.len()) {
            // What the guest wrote over a breakpoint belongs there.
            if let Some(byte) = data.get_mut(offset)
                && *byte == INT3
            {
                *byte = patch.original;
            }
        }
    }

    /// Writes `data` to `physical` without losing a breakpoint. False if not all of it is RAM.
    pub(super) fn write(&mut self, memory: &Memory, physical: u64, data: &[u8]) -> bool {
        let mut patched = data.to_vec();
        let last = physical.saturating_add(data.len() as u64);
        for (at, patch) in self.software.range_mut(physical..last) {
            let offset = (at - physical) as usize;
            if let (Some(byte), Some(to)) = (data.get(offset), patched.get_mut(offset)) {
                patch.original = *byte;
                *to = INT3;
            }
        }
        memory.write_slice(&patched, GuestAddress(physical)).is_ok()
    }

    fn within(&self, physical: u64, len: usize) -> impl Iterator<Item = (usize, &Patch)> {
        let last = physical.saturating_add(len as u64);
        self.software
            .range(physical..last)
            .map(move |(at, patch)| ((at - physical) as usize, patch))
    }

    /// Sets a hardware breakpoint or watchpoint of `len` bytes. False if the debug registers do not
    /// suffice.
    pub(super) fn insert_hardware(&mut self, trigger: Trigger, address: u64, len: u64) -> bool {
        if self.has_hardware(trigger, address, len) {
            return true;
        }
        let Some(pieces) = pieces(address, len) else { return false };
        let free = self.hardware.iter().filter(|slot| slot.is_none()).count();
        if pieces.len() > free {
            return false;
        }
        let slots = self.hardware.iter_mut().filter(|slot| slot.is_none());
        for (slot, piece) in slots.zip(pieces) {
            *slot = Some(Hardware { trigger, address, len, piece });
        }
        true
    }

    /// Takes it away. False if there is none.
    pub(super) fn remove_hardware(&mut self, trigger: Trigger, address: u64, len: u64) -> bool {
        let found = self.has_hardware(trigger, address, len);
        for slot in &mut self.hardware {
            if slot.is_some_and(|it| (it.trigger, it.address, it.len) == (trigger, address, len)) {
                *slot = None;
            }
        }
        found
    }

    fn has_hardware(&self, trigger: Trigger, address: u64, len: u64) -> bool {
        let mut all = self.hardware.iter().flatten();
        all.any(|it| (it.trigger, it.address, it.len) == (trigger, address, len))
    }

    /// The hardware breakpoint that DR6 tells of.
    pub(super) fn triggered(&self, dr6: u64) -> Option<Hardware> {
        let mut slots = self.hardware.iter().enumerate();
        slots.find_map(|(n, slot)| slot.filter(|_| dr6 & 1 << n != 0))
    }

    /// What KVM is told, for a vCPU that makes a single step or goes on.
    pub(super) fn guest_debug(&self, step: bool) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug::default();
        if step {
            // No interrupt in between: what is stepped is the code that is looked at. Older
            // kernels do not know the flag and ignore it.
            debug.control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        }
        if self.has_software() {
            debug.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        let mut dr7 = 0;
        for (n, slot) in self.hardware.iter().enumerate() {
            if let (Some(it), Some(register)) = (slot, debug.arch.debugreg.get_mut(n)) {
                *register = it.piece.0;
                // Globally enabled, R/W, LEN.
                dr7 |= 0b10 << (2 * n)
                    | (it.trigger as u64) << (16 + 4 * n)
                    | it.len_bits() << (18 + 4 * n);
            }
        }
        if dr7 != 0 {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            if let Some(register) = debug.arch.debugreg.get_mut(7) {
                *register = dr7 | DR7_FIXED;
            }
        }
        if debug.control != 0 {
            debug.control |= KVM_GUESTDBG_ENABLE;
        }
        debug
    }
}

/// Puts the original byte back, unless the guest has put something there meanwhile.
fn restore(memory: &Memory, physical: u64, patch: &Patch) {
    let address = GuestAddress(physical);
    if memory.read_obj::<u8>(address).is_ok_and(|byte| byte == INT3) {
        // It could be written to when the breakpoint was set.
        let _ = memory.write_obj(patch.original, address);
    }
}

/// Up to four aligned pieces of 1, 2, 4 or 8 bytes that make up a range.
fn pieces(address: u64, len: u64) -> Option<Vec<(u64, u64)>> {
    let end = address.checked_add(len)?;
    let mut pieces = Vec::new();
    let mut at = address;
    while at < end {
        let fits = |size: &u64| at.is_multiple_of(*size) && at + (size - 1) < end;
        let size = [8, 4, 2, 1].into_iter().find(fits)?;
        pieces.push((at, size));
        if pieces.len() > 4 {
            return None;
        }
        at += size;
    }
    (!pieces.is_empty()).then_some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        memory.write_slice(&[1, 2, 3, 4, 5, 6, 7, 8], GuestAddress(0x100)).unwrap();
        memory
    }

    fn bytes(memory: &Memory) -> [u8; 8] {
        memory.read_obj(GuestAddress(0x100)).unwrap()
    }

    #[test]
    fn a_breakpoint_is_an_int3_that_the_debugger_does_not_see() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        assert!(it.insert(&memory, 0xffff_8000_0000_0102, 0x102));
        assert!(it.insert(&memory, 0x105, 0x105));
        assert_eq!(bytes(&memory), [1, 2, 0xcc, 4, 5, 0xcc, 7, 8]);
        assert!(it.is_patched(&memory, 0x102) && !it.is_patched(&memory, 0x103));
        for start in 0..8 {
            for end in start..8 {
                let mut seen = bytes(&memory)[start..end].to_vec();
                it.hide(0x100 + start as u64, &mut seen);
                assert_eq!(seen, [1, 2, 3, 4, 5, 6, 7, 8][start..end]);
            }
        }
        assert!(it.remove(&memory, 0xffff_8000_0000_0102));
        assert!(!it.remove(&memory, 0xffff_8000_0000_0102));
        it.clear(&memory);
        assert_eq!(bytes(&memory), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(!it.has_software());
    }

    #[test]
    fn two_linear_addresses_of_one_byte_are_one_patch() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        for linear in [0x102, 0xffff_8000_0000_0102, 0x102] {
            assert!(it.insert(&memory, linear, 0x102));
        }
        assert!(it.remove(&memory, 0x102));
        assert_eq!(bytes(&memory)[2], INT3, "the other one is still there");
        assert!(it.remove(&memory, 0xffff_8000_0000_0102));
        assert_eq!(bytes(&memory)[2], 3);
    }

    #[test]
    fn what_the_debugger_writes_is_there_when_the_breakpoint_goes() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        assert!(it.insert(&memory, 0x102, 0x102));
        assert!(it.write(&memory, 0x101, &[22, 33, 44]));
        assert_eq!(bytes(&memory), [1, 22, INT3, 44, 5, 6, 7, 8]);
        it.clear(&memory);
        assert_eq!(bytes(&memory), [1, 22, 33, 44, 5, 6, 7, 8]);
        assert!(!it.write(&memory, 0x1fff, &[1, 2]), "beyond the end of RAM");
    }

    #[test]
    fn what_the_guest_writes_over_a_breakpoint_stays() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        assert!(it.insert(&memory, 0x102, 0x102));
        memory.write_obj(0x90u8, GuestAddress(0x102)).unwrap();
        assert!(!it.is_patched(&memory, 0x102));
        let mut seen = [0x90];
        it.hide(0x102, &mut seen);
        assert_eq!(seen, [0x90]);
        it.clear(&memory);
        assert_eq!(bytes(&memory)[2], 0x90);
    }

    #[test]
    fn there_are_limits() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        assert!(!it.insert(&memory, 0, 0x2000), "no RAM");
        assert!(!it.insert(&memory, 0, u64::MAX), "no RAM");
        for n in 0..MAX_SOFTWARE as u64 {
            assert!(it.insert(&memory, n, n));
        }
        assert!(!it.insert(&memory, 0x1800, 0x1800));
        assert!(it.insert(&memory, 0x1800, 5), "one that is there already");
    }

    #[test]
    fn debug_registers_are_given_out_by_aligned_pieces() {
        let mut it = Breakpoints::default();
        assert!(it.insert_hardware(Trigger::Execute, 0x1001, 1));
        assert!(it.insert_hardware(Trigger::Execute, 0x1001, 1), "again");
        assert!(it.insert_hardware(Trigger::Write, 0x2002, 6), "2 and 4 bytes");
        assert!(!it.insert_hardware(Trigger::Access, 0x3001, 4), "1, 2 and 1 bytes");
        assert!(it.insert_hardware(Trigger::Access, 0x3000, 8));
        assert!(!it.insert_hardware(Trigger::Access, 0x4000, 1), "none left");
        let debug = it.guest_debug(false);
        assert_eq!(debug.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(debug.arch.debugreg[..4], [0x1001, 0x2002, 0x2004, 0x3000]);
        assert_eq!(debug.arch.debugreg[7], 0xbd50_04aa);
    }

    #[test]
    fn what_was_hit_is_told_by_dr6_as_it_was_asked_for() {
        let mut it = Breakpoints::default();
        assert!(it.insert_hardware(Trigger::Execute, 0x1001, 1));
        assert!(it.insert_hardware(Trigger::Write, 0x2002, 6));
        let hit = |dr6| it.triggered(dr6).map(|it| (it.trigger, it.address));
        assert_eq!(hit(0xffff_0ff1), Some((Trigger::Execute, 0x1001)));
        assert_eq!(hit(0xffff_0ff2), Some((Trigger::Write, 0x2002)));
        assert_eq!(hit(0xffff_0ff4), Some((Trigger::Write, 0x2002)), "its second piece");
        assert_eq!(hit(0xffff_0ff8), None, "an unused register");
        assert_eq!(hit(0xffff_4ff0), None);
        assert!(it.remove_hardware(Trigger::Write, 0x2002, 6));
        assert!(!it.remove_hardware(Trigger::Write, 0x2002, 6));
        assert_eq!(it.triggered(6), None);
    }

    #[test]
    fn ranges_that_can_not_be_watched() {
        for (address, len) in [(0, 0), (0, 33), (0, u64::MAX), (u64::MAX, 2), (u64::MAX - 1, 2)] {
            assert_eq!(pieces(address, len), None, "{address:#x} {len}");
        }
        assert_eq!(pieces(0, 32).unwrap().len(), 4);
        assert_eq!(pieces(7, 2), Some(vec![(7, 1), (8, 1)]));
    }

    #[test]
    fn nothing_is_asked_of_kvm_without_a_reason() {
        let (memory, mut it) = (memory(), Breakpoints::default());
        assert_eq!(it.guest_debug(false), kvm_guest_debug::default());
        let step = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        assert_eq!(it.guest_debug(true).control, step);
        assert!(it.insert(&memory, 0, 0));
        let software = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
        assert_eq!(it.guest_debug(false).control, software);
    }
}
