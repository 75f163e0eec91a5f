//! `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{refused, same};
use crate::conformance::memory::{PAGE, pages, poke, slot};
use crate::conformance::{Case, Checked, Kernels, Miss, Platform, RawRequest, Seen, VmOf};
use crate::{Capability, Errno, HostRange, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vm};

const BASE: u64 = 0x1_0000;

/// Bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
const ENABLE: u64 = 1;
const INITIALLY_SET: u64 = 2;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = get();
    cases.extend(clear());
    cases
}

fn get<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "dirty-log-has-what-was-written",
            "The log has exactly the pages the guest wrote, and reading it clears it.",
            has_what_was_written,
        ),
        Case::new(
            "dirty-log-without-logging",
            "The log of a slot that does not log is refused with ENOENT.",
            |p: &P| {
                let vm = p.vm()?;
                vm.set_memory_slot(&slot(0, BASE, &pages(1)?))?;
                refused(vm.dirty_log(SlotId(0), &mut [0]), Errno::ENOENT)
            },
        ),
        Case::new(
            "dirty-log-of-no-slot",
            "The log of a slot that is not there is refused with ENOENT.",
            |p: &P| refused(p.vm()?.dirty_log(SlotId(0), &mut [0]), Errno::ENOENT),
        ),
        Case::new(
            "dirty-log-bad-number",
            "The log of a slot number beyond the limit is refused with EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                let limit = Vm::check_extension(&vm, Capability::NrMemslots)?.unsigned_abs();
                refused(vm.dirty_log(SlotId(limit), &mut [0]), Errno::EINVAL)
            },
        ),
        Case::new(
            "dirty-log-of-the-guest-only",
            "What the VMM writes into the memory is not in the log; what the guest reads neither.",
            of_the_guest_only,
        ),
        Case::new(
            "dirty-log-ends-with-logging",
            "When a slot stops logging its bits are gone.",
            ends_with_logging,
        ),
        Case::new(
            "dirty-log-goes-with-its-slot",
            "A slot that is made again with the number and the memory of one that was deleted has an \
             empty log.",
            |p: &P| {
                let vm = p.vm()?;
                let mut guest = p.guest_on(&vm, 0)?;
                let logging = logging(0, &pages(4)?);
                vm.set_memory_slot(&logging)?;
                write_pages::<P>(&mut guest, &[1])?;
                vm.delete_memory_slot(SlotId(0))?;
                vm.set_memory_slot(&logging)?;
                same("the log", log::<P>(&vm, 0)?, 0)?;
                write_pages::<P>(&mut guest, &[2])?;
                same("the log of a page written since", log::<P>(&vm, 0)?, 1 << 2)
            },
        ),
        Case::new(
            "dirty-log-of-a-slot-set-again",
            "Setting a slot to what it is already leaves its bits.",
            |p: &P| {
                let vm = p.vm()?;
                let mut guest = p.guest_on(&vm, 0)?;
                let logging = logging(0, &pages(4)?);
                vm.set_memory_slot(&logging)?;
                write_pages::<P>(&mut guest, &[1])?;
                vm.set_memory_slot(&logging)?;
                same("the log", log::<P>(&vm, 0)?, 1 << 1)
            },
        ),
        Case::new(
            "dirty-log-moves-with-its-slot",
            "When a slot moves its bits stay.",
            moves_with_its_slot,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "dirty-log-of-its-slot-only",
            "A page that two slots share is in the log of the slot it was written through.",
            of_its_slot_only,
        ),
    ]
}

fn clear<P: Platform>() -> Vec<Case<P>> {
    let since = Kernels::Since(5, 2, "no KVM_CLEAR_DIRTY_LOG with this capability number");
    let refusal = |name, rule, first, pages, errno| {
        Case::new(name, rule, move |p: &P| {
            let (vm, _memory) = manual(p, 70, ENABLE)?;
            refused(vm.clear_dirty_log(SlotId(0), first, pages, &[0, 0]), errno)
        })
        .kernels(since)
    };
    let mut cases = vec![
        refusal(
            "dirty-clear-first-page",
            "Clearing from a page that is no multiple of 64 is refused with EINVAL.",
            1,
            64,
            Errno::EINVAL,
        ),
        refusal(
            "dirty-clear-count",
            "Clearing a number of pages that is no multiple of 64 and does not reach the end is EINVAL.",
            0,
            10,
            Errno::EINVAL,
        ),
        refusal(
            "dirty-clear-past-the-end",
            "Clearing pages past the end of the slot is refused with EINVAL.",
            64,
            64,
            Errno::EINVAL,
        ),
        refusal(
            "dirty-clear-behind-the-end",
            "Clearing from a page behind the slot is refused with EINVAL.",
            128,
            64,
            Errno::EINVAL,
        ),
    ];
    cases.extend(
        [
            Case::new(
                "dirty-clear-to-the-end",
                "The last pages of a slot may be cleared though they are no multiple of 64.",
                |p: &P| {
                    let (vm, _memory) = manual(p, 70, ENABLE)?;
                    Ok(vm.clear_dirty_log(SlotId(0), 64, 6, &[0])?)
                },
            ),
            Case::new(
                "dirty-manual-get-keeps",
                "With manual protection reading the log does not clear it; clearing does, the named \
                 pages only.",
                manual_get_keeps,
            ),
            Case::new(
                "dirty-clear-takes-what-came-since",
                "Clearing a page that was written again since the log was read clears it; what is \
                 written after that is in the log.",
                |p: &P| {
                    let (vm, _memory) = manual(p, 64, ENABLE)?;
                    let mut guest = p.guest_on(&vm, 0)?;
                    write_pages::<P>(&mut guest, &[3, 4])?;
                    same("the log", log::<P>(&vm, 0)?, 1 << 3 | 1 << 4)?;
                    write_pages::<P>(&mut guest, &[3])?;
                    vm.clear_dirty_log(SlotId(0), 0, 64, &[1 << 3])?;
                    same("the log without page 3", log::<P>(&vm, 0)?, 1 << 4)?;
                    write_pages::<P>(&mut guest, &[3])?;
                    same("the log of a page written again", log::<P>(&vm, 0)?, 1 << 3 | 1 << 4)
                },
            ),
            Case::new(
                "dirty-manual-while-logging",
                "Manual protection may be enabled while a slot logs: its bits stay, and reading \
                 clears them no more.",
                |p: &P| {
                    let vm = p.vm()?;
                    p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
                    let mut guest = p.guest_on(&vm, 0)?;
                    let memory = pages(64)?;
                    vm.set_memory_slot(&logging(0, &memory))?;
                    write_pages::<P>(&mut guest, &[3])?;
                    vm.enable_cap(Capability::ManualDirtyLogProtect2, [ENABLE, 0, 0, 0])?;
                    write_pages::<P>(&mut guest, &[4])?;
                    for _ in 0..2 {
                        same("the log", log::<P>(&vm, 0)?, 1 << 3 | 1 << 4)?;
                    }
                    Ok(())
                },
            ),
            Case::new(
                "dirty-manual-switched-off",
                "Manual protection may be switched off: then reading clears the log.",
                |p: &P| {
                    let (vm, _memory) = manual(p, 64, ENABLE)?;
                    let mut guest = p.guest_on(&vm, 0)?;
                    vm.enable_cap(Capability::ManualDirtyLogProtect2, [0; 4])?;
                    write_pages::<P>(&mut guest, &[3])?;
                    same("the log", log::<P>(&vm, 0)?, 1 << 3)?;
                    same("the log read again", log::<P>(&vm, 0)?, 0)
                },
            ),
            Case::new(
                "dirty-manual-initially-set",
                "With KVM_DIRTY_LOG_INITIALLY_SET a slot that begins to log has all its pages in it.",
                initially_set,
            ),
            Case::new(
                "dirty-manual-needs-its-first-bit",
                "KVM_DIRTY_LOG_INITIALLY_SET without KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE is EINVAL.",
                |p: &P| {
                    let vm = p.vm()?;
                    p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
                    let cap = Capability::ManualDirtyLogProtect2;
                    refused(vm.enable_cap(cap, [INITIALLY_SET, 0, 0, 0]), Errno::EINVAL)
                },
            ),
            Case::new(
                "dirty-clear-of-no-slot",
                "Clearing the log of a slot that is not there is refused with ENOENT.",
                |p: &P| {
                    let vm = p.vm()?;
                    p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
                    refused(vm.clear_dirty_log(SlotId(0), 0, 64, &[0]), Errno::ENOENT)
                },
            ),
            Case::new(
                "dirty-clear-bad-number",
                "Clearing the log of a slot number beyond the limit is refused with EINVAL.",
                |p: &P| {
                    let vm = p.vm()?;
                    p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
                    let limit = Vm::check_extension(&vm, Capability::NrMemslots)?.unsigned_abs();
                    refused(vm.clear_dirty_log(SlotId(limit), 0, 64, &[0]), Errno::EINVAL)
                },
            ),
            Case::new(
                "dirty-clear-past-the-end-raw",
                "Clearing past the end is refused with EINVAL before the bitmap is looked at.",
                |p: &P| {
                    let (vm, _memory) = manual(p, 64, ENABLE)?;
                    let request = RawRequest::ClearDirtyLog { slot: 0, first: 64, pages: 64 };
                    p.raw_refused(&vm, &request, Errno::EINVAL)
                },
            ),
        ]
        .map(|case| case.kernels(since)),
    );
    cases
}

/// Slot `id` at [`BASE`] that logs.
fn logging(id: u32, memory: &HostRange) -> MemorySlot {
    let flags = SlotFlags { log_dirty: true, readonly: false };
    MemorySlot { flags, ..slot(id, BASE, memory) }
}

/// A VM with manual protection, and slot 0 that logs.
fn manual<P: Platform>(p: &P, count: usize, bits: u64) -> Checked<(VmOf<P>, HostRange)> {
    let vm = p.vm()?;
    let offered = p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
    if u64::from(offered.unsigned_abs()) & bits != bits {
        return Err(Miss::not_applicable(format!("this host offers {offered:#x} only")));
    }
    vm.enable_cap(Capability::ManualDirtyLogProtect2, [bits, 0, 0, 0])?;
    let memory = pages(count)?;
    vm.set_memory_slot(&logging(0, &memory))?;
    Ok((vm, memory))
}

/// Lets the guest write to pages of the slot at [`BASE`].
fn write_pages<P: Platform>(guest: &mut P::Guest, pages: &[u64]) -> Checked {
    for page in pages {
        let address = BASE + page * PAGE as u64 + 8;
        same("the guest's write", guest.store(address, &[1])?, Seen::ByKernel)?;
    }
    Ok(())
}

/// The log of slot `id`, of at most 128 pages.
fn log<P: Platform>(vm: &VmOf<P>, id: u32) -> Checked<u128> {
    let mut words = [0; 2];
    vm.dirty_log(SlotId(id), &mut words)?;
    Ok(u128::from(words[0]) | u128::from(words[1]) << 64)
}

fn has_what_was_written<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    vm.set_memory_slot(&logging(0, &pages(70)?))?;
    same("the log at first", log::<P>(&vm, 0)?, 0)?;
    write_pages::<P>(&mut guest, &[1, 3, 3, 69])?;
    same("the log", log::<P>(&vm, 0)?, 1 << 1 | 1 << 3 | 1 << 69)?;
    same("the log read again", log::<P>(&vm, 0)?, 0)?;
    write_pages::<P>(&mut guest, &[3])?;
    same("the log of a page written again", log::<P>(&vm, 0)?, 1 << 3)
}

fn of_the_guest_only<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let memory = pages(4)?;
    vm.set_memory_slot(&logging(0, &memory))?;
    poke(&memory, 0, &[1]);
    let (_, seen) = guest.load::<4>(BASE + PAGE as u64)?;
    same("the guest's read", seen, Seen::ByKernel)?;
    same("the log", log::<P>(&vm, 0)?, 0)
}

fn ends_with_logging<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let memory = pages(4)?;
    vm.set_memory_slot(&logging(0, &memory))?;
    write_pages::<P>(&mut guest, &[1])?;
    vm.set_memory_slot(&slot(0, BASE, &memory))?;
    refused(vm.dirty_log(SlotId(0), &mut [0]), Errno::ENOENT)?;
    vm.set_memory_slot(&logging(0, &memory))?;
    same("the log of the slot that logs again", log::<P>(&vm, 0)?, 0)?;
    write_pages::<P>(&mut guest, &[2])?;
    same("the log", log::<P>(&vm, 0)?, 1 << 2)
}

fn moves_with_its_slot<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let logging = logging(0, &pages(4)?);
    vm.set_memory_slot(&logging)?;
    write_pages::<P>(&mut guest, &[1])?;
    vm.set_memory_slot(&MemorySlot { guest: vm_memory::GuestAddress(BASE + 0x8000), ..logging })?;
    same("the log", log::<P>(&vm, 0)?, 1 << 1)
}

fn of_its_slot_only<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let memory = pages(4)?;
    vm.set_memory_slot(&logging(0, &memory))?;
    let guest_address = vm_memory::GuestAddress(BASE + 0x8000);
    vm.set_memory_slot(&MemorySlot { guest: guest_address, ..logging(1, &memory) })?;
    write_pages::<P>(&mut guest, &[2])?;
    same("the log of the slot", log::<P>(&vm, 0)?, 1 << 2)?;
    same("the log of the other slot", log::<P>(&vm, 1)?, 0)
}

fn manual_get_keeps<P: Platform>(p: &P) -> Checked {
    let (vm, _memory) = manual(p, 128, ENABLE)?;
    let mut guest = p.guest_on(&vm, 0)?;
    write_pages::<P>(&mut guest, &[0, 5, 64, 127])?;
    let written = 1 | 1 << 5 | 1 << 64 | 1 << 127;
    same("the log", log::<P>(&vm, 0)?, written)?;
    same("the log read again", log::<P>(&vm, 0)?, written)?;
    vm.clear_dirty_log(SlotId(0), 0, 64, &[1 << 5])?;
    same("the log without page 5", log::<P>(&vm, 0)?, written & !(1 << 5))?;
    vm.clear_dirty_log(SlotId(0), 64, 64, &[u64::MAX])?;
    same("the log without the second half", log::<P>(&vm, 0)?, 1)?;
    write_pages::<P>(&mut guest, &[5])?;
    same("the log of a page written again", log::<P>(&vm, 0)?, 1 | 1 << 5)
}

fn initially_set<P: Platform>(p: &P) -> Checked {
    let (vm, _memory) = manual(p, 70, ENABLE | INITIALLY_SET)?;
    same("the log", log::<P>(&vm, 0)?, (1 << 70) - 1)
}
