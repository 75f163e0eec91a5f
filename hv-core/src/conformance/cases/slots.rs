//! `KVM_SET_USER_MEMORY_REGION`: which slots are legal, and what guests see of them.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::memory::{PAGE, pages, peek, poke, slot};
use crate::conformance::{Case, Checked, Platform, Seen};
use crate::{Errno, MemoryBackend, SlotId};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("slot-overlap", "A slot that overlaps another is refused with EEXIST.", overlap),
        Case::new(
            "slot-deleted-exits",
            "A guest reads and writes a slot's memory without exits, until the slot is deleted.",
            deleted_exits,
        ),
    ]
}

fn overlap<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let memory = pages(2)?;
    vm.set_memory_slot(&slot(0, 0x1_0000, &memory))?;
    refused(vm.set_memory_slot(&slot(1, 0x1_1000, &memory)), Errno::EEXIST)
}

fn deleted_exits<P: Platform>(p: &P) -> Checked {
    // Below and above 4 GiB.
    for base in [0x1_0000, 0x1_8000_0000] {
        let vm = p.vm()?;
        let mut guest = p.guest_on(&vm, 0)?;
        let memory = pages(1)?;
        vm.set_memory_slot(&slot(0, base, &memory))?;
        poke(&memory, PAGE - 4, &[1, 2, 3, 4]);
        let read = guest.load(base + PAGE as u64 - 4)?;
        same("what the guest reads", read, ([1, 2, 3, 4], Seen::ByKernel))?;
        same("its write", guest.store(base, &[5; 8])?, Seen::ByKernel)?;
        same("what it wrote", peek(&memory, 0, 8), vec![5; 8])?;
        vm.delete_memory_slot(SlotId(0))?;
        let gone = guest.store(base, &[6])?;
        holds("a write to deleted memory exits", matches!(gone, Seen::ByVmm(_)))?;
        same("what is in the memory then", peek(&memory, 0, 1), vec![5])?;
    }
    Ok(())
}
