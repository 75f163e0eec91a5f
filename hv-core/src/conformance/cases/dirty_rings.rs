//! The dirty ring: how it is enabled, which pages are in it, and when it is full.
//!
//! How often a page is reported is KVM's: at least once from its first write, or the first after a
//! reset. So pages are compared as sets.

use std::collections::BTreeSet;
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::conformance::bench::{Bench, Drive, vcpu};
use crate::conformance::expect::{holds, refused, same};
use crate::conformance::memory::{PAGE, pages, poke, slot};
use crate::conformance::{Case, Checked, Guest, Kernels, Miss, Platform, Seen, VmOf};
use crate::{
    Capability, DirtyPage, DirtyRing, Errno, Error, HostRange, MemoryBackend, MemorySlot,
    SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};

const BASE: u64 = 0x1_0000;

/// Bytes of a ring that every KVM takes, and does not fill too soon.
const BYTES: u64 = 65536;

const SINCE: Kernels = Kernels::Since(5, 11, "no dirty ring");

/// Manual protection with logs that begin full.
const BEGIN_FULL: u64 = 3;

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = enabling();
    cases.extend(reports());
    cases.extend(resets());
    cases.extend(slots());
    cases
}

fn enable<P: Platform>(vm: &VmOf<P>, bytes: u64) -> Result<(), Error> {
    vm.enable_cap(Capability::DirtyLogRing, [bytes, 0, 0, 0])
}

/// A VM with dirty rings of [`BYTES`].
fn with_ring<P: Platform>(p: &P) -> Checked<VmOf<P>> {
    let vm = p.vm()?;
    p.needs(&vm, Capability::DirtyLogRing)?;
    enable::<P>(&vm, BYTES)?;
    Ok(vm)
}

/// A ring as a VMM reads it: from one entry to the next, and round.
struct Reader {
    ring: Arc<dyn DirtyRing>,
    next: usize,
}

impl Reader {
    fn of<P: Platform>(guest: &mut P::Guest) -> Checked<Self> {
        Ok(Self { ring: guest.vcpu().dirty_ring()?, next: 0 })
    }

    /// Collects what is reported.
    fn collect(&mut self) -> Vec<DirtyPage> {
        let entries = self.ring.entries();
        let mut all = Vec::new();
        // Once round at most, should KVM never stop.
        for _ in 0..entries.len() {
            let Some(entry) = entries.get(self.next) else { break };
            let Some(page) = entry.dirty() else { break };
            entry.collect();
            all.push(page);
            self.next = (self.next + 1) % entries.len();
        }
        all
    }

    /// Collects what is reported, as slots and pages.
    fn pages(&mut self) -> BTreeSet<(u32, u64)> {
        self.collect().into_iter().map(|page| (page.slot.0, page.page)).collect()
    }
}

fn set<const N: usize>(pages: [(u32, u64); N]) -> BTreeSet<(u32, u64)> {
    pages.into()
}

/// Slot `id` at `guest` that logs.
fn logging(id: u32, guest: u64, memory: &HostRange) -> MemorySlot {
    let flags = SlotFlags { log_dirty: true, readonly: false };
    MemorySlot { flags, ..slot(id, guest, memory) }
}

/// The address of a page from [`BASE`].
fn page(n: u64) -> u64 {
    BASE + n * PAGE as u64
}

/// Lets the guest write to pages from [`BASE`].
fn write<P: Platform>(guest: &mut P::Guest, pages: &[u64]) -> Checked {
    for &n in pages {
        same("the guest's write", guest.store(page(n) + 8, &[1])?, Seen::ByKernel)?;
    }
    Ok(())
}

fn enabling<P: Platform>() -> Vec<Case<P>> {
    let size = |name, rule, bytes: fn(u64) -> u64, errno| {
        Case::new(name, rule, move |p: &P| {
            let vm = p.vm()?;
            let most = p.needs(&vm, Capability::DirtyLogRing)?;
            refused(enable::<P>(&vm, bytes(u64::from(most.unsigned_abs()))), errno)
        })
        .kernels(SINCE)
    };
    vec![
        size(
            "dirty-ring-too-small",
            "A dirty ring smaller than the entries KVM reserves is refused with EINVAL.",
            |_| 16,
            Errno::EINVAL,
        ),
        size(
            "dirty-ring-of-half-a-page",
            "A dirty ring smaller than a page is refused with EINVAL.",
            |_| 2048,
            Errno::EINVAL,
        ),
        size(
            "dirty-ring-too-large",
            "A dirty ring larger than the capability's value is refused with E2BIG.",
            |most| most * 2,
            Errno::E2BIG,
        ),
        size(
            "dirty-ring-no-power-of-two",
            "A dirty ring whose size is no power of two is refused with EINVAL.",
            |most| most - 4096,
            Errno::EINVAL,
        ),
        size(
            "dirty-ring-empty",
            "A dirty ring of no bytes is refused with EINVAL.",
            |_| 0,
            Errno::EINVAL,
        ),
        Case::new(
            "dirty-ring-size-has-32-bits",
            "Of the 64 bits for the size of a dirty ring KVM looks at 32.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::DirtyLogRing)?;
                enable::<P>(&vm, 1 << 32 | BYTES)?;
                let ring = vcpu::<P>(&vm, 0)?.dirty_ring()?;
                same("entries", ring.entries().len() as u64, BYTES / 16)
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "dirty-ring-after-vcpu",
            "The dirty ring can't be enabled once a vCPU exists (EINVAL).",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::DirtyLogRing)?;
                let _vcpu = vcpu::<P>(&vm, 0)?;
                refused(enable::<P>(&vm, BYTES), Errno::EINVAL)
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-twice",
            "The dirty ring can't be enabled a second time (EINVAL).",
            |p: &P| refused(enable::<P>(&with_ring(p)?, BYTES), Errno::EINVAL),
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-by-either-number",
            "KVM_CAP_DIRTY_LOG_RING and _ACQ_REL enable the same ring: the second of them is EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::DirtyLogRingAcqRel)?;
                vm.enable_cap(Capability::DirtyLogRingAcqRel, [BYTES, 0, 0, 0])?;
                refused(enable::<P>(&vm, BYTES), Errno::EINVAL)
            },
        )
        .kernels(Kernels::Since(6, 1, "no KVM_CAP_DIRTY_LOG_RING_ACQ_REL")),
        Case::new(
            "dirty-ring-of-a-vm-without",
            "Without dirty rings a vCPU has none to map, and KVM_RESET_DIRTY_RINGS is EINVAL.",
            |p: &P| {
                let vm = p.vm()?;
                p.needs(&vm, Capability::DirtyLogRing)?;
                refused(vm.reset_dirty_rings(), Errno::EINVAL)?;
                refused(vcpu::<P>(&vm, 0)?.dirty_ring(), Errno::EINVAL)
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-excludes-the-log",
            "With a dirty ring KVM_GET_DIRTY_LOG is refused with ENXIO.",
            |p: &P| {
                let vm = with_ring(p)?;
                vm.set_memory_slot(&logging(0, BASE, &pages(1)?))?;
                refused(vm.dirty_log(SlotId(0), &mut [0]), Errno::ENXIO)
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-excludes-clearing",
            "With a dirty ring KVM_CLEAR_DIRTY_LOG is refused with ENXIO.",
            |p: &P| {
                let vm = with_ring(p)?;
                vm.set_memory_slot(&logging(0, BASE, &pages(64)?))?;
                refused(vm.clear_dirty_log(SlotId(0), 0, 64, &[0]), Errno::ENXIO)
            },
        )
        .kernels(SINCE),
    ]
}

fn reports<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "dirty-ring-has-what-was-written",
            "The ring has exactly the pages the guest wrote in slots that log, by slot and page.",
            has_what_was_written,
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-of-the-guest-only",
            "What the VMM writes into the memory is not in the ring; what the guest reads neither.",
            |p: &P| {
                let vm = with_ring(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let mut ring = Reader::of::<P>(&mut guest)?;
                let memory = pages(4)?;
                vm.set_memory_slot(&logging(0, BASE, &memory))?;
                poke(&memory, 0, &[1]);
                let (_, seen) = guest.load::<4>(page(1))?;
                same("the guest's read", seen, Seen::ByKernel)?;
                same("the ring", ring.pages(), set([]))
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-of-its-vcpu",
            "A page is in the ring of the vCPU that wrote it.",
            |p: &P| {
                let vm = with_ring(p)?;
                let (mut first, mut second) = (p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?);
                let mut rings = (Reader::of::<P>(&mut first)?, Reader::of::<P>(&mut second)?);
                vm.set_memory_slot(&logging(0, BASE, &pages(8)?))?;
                write::<P>(&mut first, &[1, 2])?;
                write::<P>(&mut second, &[5])?;
                same("the ring of the first", rings.0.pages(), set([(0, 1), (0, 2)]))?;
                same("the ring of the second", rings.1.pages(), set([(0, 5)]))
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-once-until-reset",
            "A page that was reported is not reported again before its entry is reset, unless KVM makes \
             the guest's writes itself.",
            once_until_reset,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
        Case::new(
            "dirty-ring-misses-logs-that-begin-full",
            "With KVM_DIRTY_LOG_INITIALLY_SET a page that the guest could write when its slot began to \
             log is in no ring, unless KVM makes the guest's writes itself.",
            misses_logs_that_begin_full,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
    ]
}

fn resets<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "dirty-ring-reset-counts",
            "KVM_RESET_DIRTY_RINGS takes back, and counts, the entries that were collected in the rings \
             of all vCPUs; after it a page that is written is reported again.",
            reset_counts,
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-reset-in-order",
            "KVM_RESET_DIRTY_RINGS stops at the first entry that was not collected.",
            |p: &P| {
                let vm = with_ring(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let ring = guest.vcpu().dirty_ring()?;
                vm.set_memory_slot(&logging(0, BASE, &pages(4)?))?;
                write::<P>(&mut guest, &[1, 2, 3])?;
                let [first, second, third, ..] = ring.entries() else {
                    return Err(Miss::failed("a ring of three entries"));
                };
                for (entry, reset) in [(third, 0), (first, 1), (second, 2)] {
                    entry.collect();
                    same("entries reset", vm.reset_dirty_rings()?, reset)?;
                }
                Ok(())
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-full",
            "A vCPU whose ring has 64 entries left (576 with page modification logging) does not run, and \
             others do; collecting is not enough, a reset is. Then the ring goes on, and round.",
            full,
        )
        .kernels(Kernels::Measured("Linux 6.18")),
    ]
}

fn slots<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "dirty-ring-of-a-slot-that-went",
            "When a slot is deleted, or ceases to log, its entries stay in the ring, and can be reset.",
            |p: &P| {
                let vm = with_ring(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let mut ring = Reader::of::<P>(&mut guest)?;
                let memory = pages(4)?;
                vm.set_memory_slot(&logging(0, BASE, &memory))?;
                write::<P>(&mut guest, &[1])?;
                vm.set_memory_slot(&slot(0, BASE, &memory))?;
                write::<P>(&mut guest, &[2])?;
                same("the ring of the slot that ceased to log", ring.pages(), set([(0, 1)]))?;
                vm.set_memory_slot(&logging(0, BASE, &memory))?;
                write::<P>(&mut guest, &[3])?;
                vm.delete_memory_slot(SlotId(0))?;
                same("the ring of the slot that went", ring.pages(), set([(0, 3)]))?;
                same("entries reset", vm.reset_dirty_rings()?, 2)
            },
        )
        .kernels(SINCE),
        Case::new(
            "dirty-ring-of-a-slot-that-moved",
            "When a slot moves its entries stay, and its pages are reported again when they are written.",
            |p: &P| {
                let vm = with_ring(p)?;
                let mut guest = p.guest_on(&vm, 0)?;
                let mut ring = Reader::of::<P>(&mut guest)?;
                let logging = logging(0, page(8), &pages(4)?);
                vm.set_memory_slot(&logging)?;
                write::<P>(&mut guest, &[9])?;
                vm.set_memory_slot(&MemorySlot { guest: GuestAddress(BASE), ..logging })?;
                same("the ring", ring.pages(), set([(0, 1)]))?;
                write::<P>(&mut guest, &[1])?;
                same("the ring of the page written again", ring.pages(), set([(0, 1)]))
            },
        )
        .kernels(Kernels::Measured("Linux 6.18")),
    ]
}

fn has_what_was_written<P: Platform>(p: &P) -> Checked {
    let vm = with_ring(p)?;
    let mut guest = p.guest_on(&vm, 0)?;
    let mut ring = Reader::of::<P>(&mut guest)?;
    same("entries", ring.ring.entries().len() as u64, BYTES / 16)?;
    // Two that log, and between them one that does not.
    let (low, quiet, high) = (pages(70)?, pages(2)?, pages(4)?);
    vm.set_memory_slot(&logging(7, BASE, &low))?;
    vm.set_memory_slot(&slot(1, page(70), &quiet))?;
    vm.set_memory_slot(&logging(2, page(72), &high))?;
    same("the ring at first", ring.pages(), set([]))?;
    write::<P>(&mut guest, &[69, 3, 3, 71, 75])?;
    let across = guest.store(page(11) - 4, &[1; 8])?;
    same("a write across two pages", across, Seen::ByKernel)?;
    let written = set([(7, 3), (7, 10), (7, 11), (7, 69), (2, 3)]);
    same("the ring", ring.pages(), written)?;
    same("the ring read again", ring.pages(), set([]))
}

/// A guest that has written page 0 of a slot that logs; not applicable if KVM reports every write.
fn written_once<P: Platform>(p: &P, vm: &VmOf<P>) -> Checked<(P::Guest, Reader)> {
    let mut guest = p.guest_on(vm, 0)?;
    let mut ring = Reader::of::<P>(&mut guest)?;
    vm.set_memory_slot(&logging(9, page(64), &pages(1)?))?;
    write::<P>(&mut guest, &[64, 64])?;
    match ring.collect().len() {
        1 => Ok((guest, ring)),
        2 => {
            Err(Miss::not_applicable("this KVM makes the guest's writes itself, and reports each"))
        }
        n => Err(Miss::failed(format!("two writes to a page are {n} entries"))),
    }
}

fn once_until_reset<P: Platform>(p: &P) -> Checked {
    let vm = with_ring(p)?;
    let (mut guest, mut ring) = written_once(p, &vm)?;
    write::<P>(&mut guest, &[64])?;
    same("the ring before the reset", ring.pages(), set([]))?;
    vm.reset_dirty_rings()?;
    write::<P>(&mut guest, &[64])?;
    same("the ring after the reset", ring.pages(), set([(9, 0)]))
}

fn misses_logs_that_begin_full<P: Platform>(p: &P) -> Checked {
    // Whether it makes the guest's writes itself is seen without.
    written_once(p, &with_ring(p)?)?;
    let vm = with_ring(p)?;
    let offered = p.needs(&vm, Capability::ManualDirtyLogProtect2)?;
    if u64::from(offered.unsigned_abs()) & BEGIN_FULL != BEGIN_FULL {
        return Err(Miss::not_applicable(format!("this host offers {offered:#x} only")));
    }
    vm.enable_cap(Capability::ManualDirtyLogProtect2, [BEGIN_FULL, 0, 0, 0])?;
    let mut guest = p.guest_on(&vm, 0)?;
    let mut ring = Reader::of::<P>(&mut guest)?;
    let memory = pages(4)?;
    vm.set_memory_slot(&slot(0, BASE, &memory))?;
    write::<P>(&mut guest, &[1])?;
    vm.set_memory_slot(&logging(0, BASE, &memory))?;
    write::<P>(&mut guest, &[1])?;
    same("the ring", ring.pages(), set([]))
}

fn reset_counts<P: Platform>(p: &P) -> Checked {
    let vm = with_ring(p)?;
    let (mut first, mut second) = (p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?);
    let (mut one, mut two) = (Reader::of::<P>(&mut first)?, Reader::of::<P>(&mut second)?);
    vm.set_memory_slot(&logging(0, BASE, &pages(8)?))?;
    write::<P>(&mut first, &[1, 2, 3])?;
    write::<P>(&mut second, &[4])?;
    same("entries reset that nobody has collected", vm.reset_dirty_rings()?, 0)?;
    let collected = one.collect().len();
    holds("the ring of the first has its pages", collected >= 3)?;
    same("entries reset of the first", vm.reset_dirty_rings()? as usize, collected)?;
    write::<P>(&mut first, &[2])?;
    let both = [one.collect(), two.collect()];
    let numbers = both.each_ref().map(|all| all.iter().map(|page| page.page).collect());
    let pages = [2, 4].map(|page| BTreeSet::from([page]));
    same("pages after the reset, and of the second", numbers, pages)?;
    let collected = both.concat().len();
    same("entries reset of both", vm.reset_dirty_rings()? as usize, collected)?;
    same("entries left to reset", vm.reset_dirty_rings()?, 0)
}

/// A VM with the smallest rings this KVM takes.
fn with_small_ring<P: Platform>(p: &P) -> Checked<VmOf<P>> {
    for bytes in [4096, 16384] {
        let vm = p.vm()?;
        p.needs(&vm, Capability::DirtyLogRing)?;
        match enable::<P>(&vm, bytes) {
            Ok(()) => return Ok(vm),
            // The processor's log is larger than that.
            Err(error) if error.errno == Errno::EINVAL => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Miss::failed("a dirty ring of 16384 bytes is taken"))
}

fn full<P: Platform>(p: &P) -> Checked {
    const FULL: Seen = Seen::ByVmm(VcpuExit::DirtyRingFull);
    let vm = with_small_ring(p)?;
    let (mut guest, mut other) = (p.guest_on(&vm, 0)?, p.guest_on(&vm, 1)?);
    let mut ring = Reader::of::<P>(&mut guest)?;
    let entries = ring.ring.entries().len();
    let count = entries + entries / 2;
    // The last page is the other's.
    vm.set_memory_slot(&logging(0, BASE, &pages(count + 1)?))?;
    let (mut seen, mut fillings) = (BTreeSet::new(), 0);
    for n in 0..count as u64 {
        // Whether the access was made before the vCPU stopped is not said: it is made again.
        while guest.store(page(n), &[1])? == FULL {
            same("the vCPU that is told again", guest.store(page(n), &[1])?, FULL)?;
            write::<P>(&mut other, &[count as u64])?;
            let pages = ring.collect();
            let left = entries - pages.len();
            holds(&format!("{left} entries are left: 64 or 576"), matches!(left, 64 | 576))?;
            same("the vCPU before the reset", guest.store(page(n), &[1])?, FULL)?;
            same("entries reset", vm.reset_dirty_rings()? as usize, pages.len())?;
            seen.extend(pages);
            fillings += 1;
            holds("a ring that was reset has room", fillings < 100)?;
        }
    }
    holds("the ring was full", fillings > 0)?;
    seen.extend(ring.collect());
    let slot = SlotId(0);
    let all = (0..count as u64).map(|page| DirtyPage { slot, page });
    let missing: Vec<_> = all.filter(|page| !seen.contains(page)).collect();
    same("pages that are missing", missing, vec![])?;
    same("pages", seen.len(), count)
}
