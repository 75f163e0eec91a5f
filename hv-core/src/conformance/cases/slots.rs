//! `KVM_SET_USER_MEMORY_REGION`: which slots are legal, and what guests see of them.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::memory::{PAGE, pages, peek, poke, slot, span};
use crate::conformance::{Case, Checked, Kernels, Miss, Platform, RawRequest, Seen, VmOf};
use crate::{Capability, Errno, Error, HostRange, MemoryBackend, MemorySlot, SlotFlags, SlotId};

/// Where the slots of these cases are.
const BASE: u64 = 0x1_0000;

const READONLY: SlotFlags = SlotFlags { readonly: true, log_dirty: false };

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = illegal();
    cases.extend(changes());
    cases.extend(seen());
    cases
}

/// What can't be created.
///
/// That a slot has fewer than 2^31 pages is no case: one needs 8 TiB of host memory, which not every
/// platform can name.
fn illegal<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "slot-overlap",
            "A slot that overlaps another is refused with EEXIST.",
            |p: &P| {
                let (vm, memory) = (p.vm()?, pages(2)?);
                vm.set_memory_slot(&slot(0, BASE, &memory))?;
                refused(vm.set_memory_slot(&slot(1, BASE + PAGE as u64, &memory)), Errno::EEXIST)
            },
        ),
        Case::new(
            "slot-guest-address-unaligned",
            "A guest address that is not page-aligned is refused with EINVAL.",
            |p: &P| refused(p.vm()?.set_memory_slot(&slot(0, BASE + 8, &pages(1)?)), Errno::EINVAL),
        ),
        Case::new(
            "slot-size-unaligned",
            "A size that is not a multiple of the page is refused with EINVAL.",
            |p: &P| {
                refused(p.vm()?.set_memory_slot(&slot(0, BASE, &span(0, PAGE + 8)?)), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-host-address-unaligned",
            "A host address that is not page-aligned is refused with EINVAL.",
            |p: &P| {
                refused(p.vm()?.set_memory_slot(&slot(0, BASE, &span(8, PAGE)?)), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-host-address-not-canonical",
            "A host address that no process can have is refused with EINVAL.",
            |p: &P| {
                let request =
                    RawRequest::NonCanonicalMemory { slot: 0, guest: BASE, size: PAGE as u64 };
                p.raw_refused(&p.vm()?, &request, Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-wraps",
            "A range that passes the last guest address is refused with EINVAL.",
            |p: &P| {
                let last_page = u64::MAX - (PAGE as u64 - 1);
                refused(p.vm()?.set_memory_slot(&slot(0, last_page, &pages(2)?)), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-beyond-52-bits",
            "A guest address of 1 << 52 or above is refused with EINVAL.",
            |p: &P| refused(p.vm()?.set_memory_slot(&slot(0, 1 << 52, &pages(1)?)), Errno::EINVAL),
        )
        .kernels(Kernels::Since(5, 18, "it is taken")),
        Case::new("slot-unknown-flag", "An unknown flag is refused with EINVAL.", |p: &P| {
            let request =
                RawRequest::SetMemorySlot { slot: slot(0, BASE, &pages(1)?), flags: 1 << 30 };
            p.raw_refused(&p.vm()?, &request, Errno::EINVAL)
        }),
        Case::new(
            "slot-id-at-limit",
            "A slot number of KVM_CAP_NR_MEMSLOTS is refused with EINVAL; one less is taken.",
            id_at_limit,
        ),
        Case::new("slot-delete-absent", "Deleting a slot that is not there is EINVAL.", |p: &P| {
            refused(p.vm()?.delete_memory_slot(SlotId(5)), Errno::EINVAL)
        }),
    ]
}

/// A change to a live slot of four pages, which are the first of these.
type Change = fn(&mut MemorySlot, HostRange);

/// What may change on a live slot.
fn changes<P: Platform>() -> Vec<Case<P>> {
    let changed = |name, rule, change: Change, expected: Result<(), Errno>| {
        Case::new(name, rule, move |p: &P| changed(p, change, expected))
    };
    let mut cases = vec![
        changed(
            "slot-grown",
            "A live slot can't grow (EINVAL).",
            |slot, memory| slot.host = memory.slice(0, 5 * PAGE).unwrap_or(memory),
            Err(Errno::EINVAL),
        ),
        changed(
            "slot-shrunk",
            "A live slot can't shrink (EINVAL).",
            |slot, memory| slot.host = memory.slice(0, 3 * PAGE).unwrap_or(memory),
            Err(Errno::EINVAL),
        ),
        changed(
            "slot-other-memory",
            "A live slot can't be given other host memory (EINVAL).",
            |slot, memory| slot.host = memory.slice(PAGE, 4 * PAGE).unwrap_or(memory),
            Err(Errno::EINVAL),
        ),
        changed(
            "slot-made-readonly",
            "A live slot can't become read-only (EINVAL).",
            |slot, _| slot.flags.readonly = true,
            Err(Errno::EINVAL),
        ),
        changed(
            "slot-identical",
            "Setting a slot to what it is already is no error.",
            |_, _| {},
            Ok(()),
        ),
        changed(
            "slot-log-dirty-toggled",
            "A live slot may begin to log dirty pages.",
            |slot, _| slot.flags.log_dirty = true,
            Ok(()),
        ),
    ];
    cases.extend([
        Case::new(
            "slot-made-writable",
            "A read-only live slot can't become writable (EINVAL).",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::ReadonlyMem)?;
                let writable = slot(0, BASE, &pages(1)?);
                vm.set_memory_slot(&MemorySlot { flags: READONLY, ..writable.clone() })?;
                refused(vm.set_memory_slot(&writable), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-moved-onto-another",
            "Moving a slot onto another is refused with EEXIST, and it stays where it was.",
            moved_onto_another,
        ),
        Case::new(
            "slot-moved",
            "A live slot may move: the guest finds its memory there and nowhere else.",
            moved,
        ),
        Case::new(
            "slot-deleted-by-number",
            "A deletion looks at the slot's number only, not at the addresses it comes with.",
            |p: &P| {
                let vm = p.vm()?;
                vm.set_memory_slot(&slot(3, BASE, &pages(2)?))?;
                let request =
                    RawRequest::DeleteMemorySlot { slot: 3, flags: 0, guest: 0x7000_0000, host: 0 };
                same("its answer", p.ask(&vm, &request)?, Ok(()))?;
                refused(vm.delete_memory_slot(SlotId(3)), Errno::EINVAL)
            },
        ),
        Case::new(
            "slot-number-again",
            "The number of a deleted slot may be used again, for other memory.",
            |p: &P| {
                let vm = p.vm()?;
                vm.set_memory_slot(&slot(3, BASE, &pages(2)?))?;
                vm.delete_memory_slot(SlotId(3))?;
                Ok(vm.set_memory_slot(&slot(3, BASE, &pages(1)?))?)
            },
        ),
    ]);
    cases
}

/// What guests see.
fn seen<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "slot-deleted-exits",
            "A guest reads and writes a slot's memory without exits, until the slot is deleted.",
            deleted_exits,
        ),
        Case::new(
            "slots-adjacent",
            "Two adjacent slots may join; each address leads to the memory of its slot.",
            adjacent,
        ),
        Case::new(
            "slots-alias",
            "Two slots may have the same host memory: what is written to one is read from the other.",
            alias,
        ),
        Case::new(
            "slot-readonly",
            "In a read-only slot reads are served; a write exits and leaves the memory alone.",
            readonly,
        ),
        Case::new(
            "slot-swapped",
            "After delete and add at the same address the guest sees the new memory only.",
            swapped,
        ),
    ]
}

fn changed<P: Platform>(p: &P, change: Change, expected: Result<(), Errno>) -> Checked {
    let vm = p.vm()?;
    let memory = pages(8)?;
    let first = memory.slice(0, 4 * PAGE).ok_or_else(|| Miss::failed("no slice"))?;
    let mut changed = slot(0, BASE, &first);
    vm.set_memory_slot(&changed)?;
    change(&mut changed, memory);
    if changed.flags.readonly {
        p.needs(&vm, Capability::ReadonlyMem)?;
    }
    let errno = |error: Error| error.errno;
    same("its answer", vm.set_memory_slot(&changed).map_err(errno), expected)
}

fn id_at_limit<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let limit = p.needs(&vm, Capability::NrMemslots)?.unsigned_abs();
    let memory = pages(1)?;
    refused(vm.set_memory_slot(&slot(limit, BASE, &memory)), Errno::EINVAL)?;
    Ok(vm.set_memory_slot(&slot(limit - 1, BASE, &memory))?)
}

fn is_there<P: Platform>(guest: &mut P::Guest, address: u64, byte: u8) -> Checked {
    let (read, seen) = guest.load(address)?;
    same(&format!("what is at {address:#x}"), (read, seen), ([byte], Seen::ByKernel))
}

fn is_nowhere<P: Platform>(guest: &mut P::Guest, address: u64) -> Checked {
    let (_, seen) = guest.load::<1>(address)?;
    holds(&format!("{address:#x} exits"), matches!(seen, Seen::ByVmm(_)))
}

fn moved_onto_another<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let (first, second) = (pages(1)?, pages(1)?);
    poke(&first, 0, &[1]);
    poke(&second, 0, &[2]);
    vm.set_memory_slot(&slot(0, BASE, &first))?;
    vm.set_memory_slot(&slot(1, BASE + 0x4000, &second))?;
    refused(vm.set_memory_slot(&slot(1, BASE, &second)), Errno::EEXIST)?;
    is_there::<P>(&mut guest, BASE, 1)?;
    is_there::<P>(&mut guest, BASE + 0x4000, 2)
}

fn moved<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let memory = pages(1)?;
    poke(&memory, 0, &[7]);
    vm.set_memory_slot(&slot(0, BASE, &memory))?;
    is_there::<P>(&mut guest, BASE, 7)?;
    vm.set_memory_slot(&slot(0, BASE + 0x4000, &memory))?;
    is_nowhere::<P>(&mut guest, BASE)?;
    is_there::<P>(&mut guest, BASE + 0x4000, 7)
}

fn deleted_exits<P: Platform>(p: &P) -> Checked {
    // Below and above 4 GiB.
    for base in [BASE, 0x1_8000_0000] {
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

fn two<P: Platform>(p: &P) -> Checked<(VmOf<P>, P::Guest)> {
    let vm = p.vm()?;
    let guest = p.guest_on(&vm, 0)?;
    Ok((vm, guest))
}

fn adjacent<P: Platform>(p: &P) -> Checked {
    let (vm, mut guest) = two(p)?;
    let (low, high) = (pages(1)?, pages(1)?);
    vm.set_memory_slot(&slot(0, BASE, &low))?;
    vm.set_memory_slot(&slot(1, BASE + PAGE as u64, &high))?;
    let border = BASE + PAGE as u64;
    same("a write below the border", guest.store(border - 1, &[1])?, Seen::ByKernel)?;
    same("a write above the border", guest.store(border, &[2])?, Seen::ByKernel)?;
    same("the lower memory", peek(&low, PAGE - 1, 1), vec![1])?;
    same("the upper memory", peek(&high, 0, 1), vec![2])
}

fn alias<P: Platform>(p: &P) -> Checked {
    let (vm, mut guest) = two(p)?;
    let memory = pages(1)?;
    vm.set_memory_slot(&slot(0, BASE, &memory))?;
    vm.set_memory_slot(&slot(1, BASE + 0x4000, &memory))?;
    same("a write to one", guest.store(BASE + 0x10, &[9])?, Seen::ByKernel)?;
    is_there::<P>(&mut guest, BASE + 0x4010, 9)
}

fn readonly<P: Platform>(p: &P) -> Checked {
    let (vm, mut guest) = two(p)?;
    p.needs(&vm, Capability::ReadonlyMem)?;
    let memory = pages(1)?;
    poke(&memory, 0, &[3]);
    vm.set_memory_slot(&MemorySlot { flags: READONLY, ..slot(0, BASE, &memory) })?;
    is_there::<P>(&mut guest, BASE, 3)?;
    let written = guest.store(BASE, &[4])?;
    holds("a write exits", matches!(written, Seen::ByVmm(_)))?;
    same("the memory", peek(&memory, 0, 1), vec![3])?;
    is_there::<P>(&mut guest, BASE, 3)
}

fn swapped<P: Platform>(p: &P) -> Checked {
    let (vm, mut guest) = two(p)?;
    let (before, after) = (pages(1)?, pages(1)?);
    poke(&after, 0, &[8]);
    vm.set_memory_slot(&slot(0, BASE, &before))?;
    is_there::<P>(&mut guest, BASE, 0)?;
    vm.delete_memory_slot(SlotId(0))?;
    vm.set_memory_slot(&slot(0, BASE, &after))?;
    is_there::<P>(&mut guest, BASE, 8)?;
    same("a write", guest.store(BASE, &[1])?, Seen::ByKernel)?;
    same("the old memory", peek(&before, 0, 1), vec![0])
}
