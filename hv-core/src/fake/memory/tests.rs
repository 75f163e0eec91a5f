use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::GuestAddress;

use super::access::pieces;
use super::*;
use crate::{HostMemory, SlotFlags};

const SIZE: usize = PAGE as usize;
const PLAIN: SlotFlags = SlotFlags { log_dirty: false, readonly: false };
const LOG: SlotFlags = SlotFlags { log_dirty: true, readonly: false };
const READONLY: SlotFlags = SlotFlags { log_dirty: false, readonly: true };
const INVALID: Result<(), Errno> = Err(Errno::EINVAL);

#[derive(Debug)]
struct Bytes(Vec<AtomicU8>);

impl HostMemory for Bytes {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

/// Page-aligned pages.
fn pages(count: usize) -> HostRange {
    let memory = Bytes((0..(count + 1) * SIZE).map(|_| AtomicU8::new(0)).collect());
    let offset = memory.0.as_ptr().addr().next_multiple_of(SIZE) - memory.0.as_ptr().addr();
    HostRange::new(Arc::new(memory), offset, count * SIZE).unwrap()
}

const LIMITS: MemoryLimits = MemoryLimits {
    slots: 8,
    address_spaces: 2,
    gpa_bits: 52,
    readonly: true,
    manual_protect: 3,
    dirty_ring: 1 << 20,
};

fn memory() -> Memory {
    Memory::new(LIMITS)
}

fn slot(id: u32, guest: u64, host: &HostRange, flags: SlotFlags) -> MemorySlot {
    MemorySlot { id: SlotId(id), guest: GuestAddress(guest), host: host.clone(), flags }
}

fn part(host: &HostRange, offset: usize, len: usize) -> HostRange {
    #[derive(Debug)]
    struct Whole(HostRange);
    impl HostMemory for Whole {
        fn bytes(&self) -> &[AtomicU8] {
            self.0.bytes()
        }
    }
    HostRange::new(Arc::new(Whole(host.clone())), offset, len).unwrap()
}

fn log(memory: &mut Memory, id: u32) -> Result<[u64; 2], Errno> {
    let mut bitmap = [0x5555; 2];
    memory.dirty_log(SlotId(id), &mut bitmap).map(|()| bitmap)
}

#[test]
fn slots_are_judged_as_by_kvm() {
    let host = pages(8);
    let mut memory = memory();
    let two = part(&host, 0, 2 * SIZE);
    let mut set =
        |id, guest, host: &HostRange, flags| memory.set(&slot(id, guest, host, flags)).map(drop);
    let exists = Err(Errno::EEXIST);
    // The state before each row is what the rows above left.
    for (what, id, guest, host, flags, answer) in [
        ("two pages at 0x4000", 0, 0x4000, &two, PLAIN, Ok(())),
        ("the same again", 0, 0x4000, &two, PLAIN, Ok(())),
        ("overlap at the first page", 1, 0x3000, &two, PLAIN, exists),
        ("overlap at the last page", 1, 0x5000, &two, PLAIN, exists),
        ("overlap inside", 1, 0x5000, &part(&host, 0, SIZE), PLAIN, exists),
        ("overlap around", 1, 0x3000, &host, PLAIN, exists),
        ("adjacent below", 1, 0x2000, &two, PLAIN, Ok(())),
        ("adjacent above, on the same host memory", 2, 0x6000, &two, PLAIN, Ok(())),
        ("moved onto another", 0, 0x5000, &two, PLAIN, exists),
        ("moved by one page", 2, 0x7000, &two, PLAIN, Ok(())),
        ("moved back over itself", 2, 0x6000, &two, PLAIN, Ok(())),
        ("grown", 2, 0x6000, &part(&host, 0, 3 * SIZE), PLAIN, INVALID),
        ("shrunk", 2, 0x6000, &part(&host, 0, SIZE), PLAIN, INVALID),
        ("shrunk and moved onto another", 2, 0x4000, &part(&host, 0, SIZE), PLAIN, INVALID),
        ("other host memory", 2, 0x6000, &part(&host, SIZE, 2 * SIZE), PLAIN, INVALID),
        ("readonly switched on", 2, 0x6000, &two, READONLY, INVALID),
        ("logging switched on", 2, 0x6000, &two, LOG, Ok(())),
        ("logging switched off and moved", 2, 0x8000, &two, PLAIN, Ok(())),
        ("readonly at creation", 3, 0x10000, &two, READONLY, Ok(())),
        ("readonly switched off", 3, 0x10000, &two, PLAIN, INVALID),
        ("unaligned guest address", 4, 0x20800, &two, PLAIN, INVALID),
        ("unaligned size", 4, 0x20000, &part(&host, 0, SIZE + 1), PLAIN, INVALID),
        ("unaligned host address", 4, 0x20000, &part(&host, 8, SIZE), PLAIN, INVALID),
        ("no memory", 4, 0x20000, &part(&host, 0, 0), PLAIN, INVALID),
        ("no memory, for a live slot", 3, 0x10000, &part(&host, 0, 0), READONLY, INVALID),
        ("past the last address", 4, u64::MAX - 0xfff, &two, PLAIN, INVALID),
        ("up to the last address", 4, u64::MAX - 0x1fff, &two, PLAIN, INVALID),
        ("past the last page", 4, (1 << 52) - PAGE, &two, PLAIN, INVALID),
        ("up to the last page", 4, (1 << 52) - 2 * PAGE, &two, PLAIN, Ok(())),
        ("both faults: an overlap is found first", 5, (1 << 52) - PAGE, &two, PLAIN, exists),
        ("moved past the last page", 4, (1 << 52) - PAGE, &two, PLAIN, INVALID),
        ("the last slot", 7, 0x30000, &two, PLAIN, Ok(())),
        ("one more", 8, 0x40000, &two, PLAIN, INVALID),
        ("another address space", 0x1_0000, 0x4000, &two, PLAIN, Ok(())),
        ("an overlap in it", 0x1_0001, 0x5000, &two, PLAIN, exists),
        ("one more of its slots", 0x1_0008, 0x9000, &two, PLAIN, INVALID),
        ("one more address space", 0x2_0000, 0x4000, &two, PLAIN, INVALID),
    ] {
        assert_eq!(set(id, guest, host, flags), answer, "{what}");
    }
    let left: Vec<_> = memory.slots().map(|slot| (slot.id.0, slot.guest.0)).collect();
    let high = (1 << 52) - 2 * PAGE;
    assert_eq!(
        left,
        [
            (0, 0x4000),
            (1, 0x2000),
            (2, 0x8000),
            (3, 0x10000),
            (4, high),
            (7, 0x30000),
            (0x1_0000, 0x4000)
        ]
    );
}

#[test]
fn what_only_numbers_can_break() {
    let region = |guest, pages: u64| Region { guest, size: pages * PAGE, host: 0x7000_0000 };
    assert_eq!(region(0, (1 << 31) - 1).check(), Ok(()));
    assert_eq!(region(0, 1 << 31).check(), INVALID, "bitmaps are indexed by an int");
    assert_eq!(region(0u64.wrapping_sub(PAGE), 1).check(), INVALID, "ends at 2^64");
    // Nested paging has the host's width of addresses.
    let mut narrow = Memory::new(MemoryLimits { gpa_bits: 46, ..LIMITS });
    let host = pages(1);
    assert!(narrow.set(&slot(0, (1 << 46) - PAGE, &host, PLAIN)).is_ok());
    assert_eq!(narrow.set(&slot(1, 1 << 46, &host, PLAIN)), Err(Errno::EINVAL));
    for bits in [0, 64, u32::MAX] {
        // Whatever a test makes of its host, nothing breaks.
        let mut odd = Memory::new(MemoryLimits { gpa_bits: bits, slots: u32::MAX, ..LIMITS });
        assert_eq!(odd.set(&slot(0xffff, 0, &host, PLAIN)).is_ok(), bits != 0);
    }
}

#[test]
fn a_host_without_readonly_memory_refuses_it() {
    let mut memory = Memory::new(MemoryLimits { readonly: false, ..LIMITS });
    let host = pages(1);
    assert_eq!(memory.set(&slot(0, 0, &host, READONLY)), Err(Errno::EINVAL));
    assert!(memory.set(&slot(0, 0, &host, PLAIN)).is_ok());
}

#[test]
fn deleting_looks_at_the_number_alone() {
    let (mut memory, host) = (memory(), pages(1));
    memory.set(&slot(0, 0x1000, &host, LOG)).unwrap();
    for (what, id) in [("absent", 1), ("no slot", 8), ("no address space", 0x2_0000)] {
        assert_eq!(memory.delete(SlotId(id)), Err(Errno::EINVAL), "{what}");
    }
    assert_eq!(memory.delete(SlotId(0)).map(|slot| slot.guest.0), Ok(0x1000));
    assert_eq!(memory.delete(SlotId(0)), Err(Errno::EINVAL), "twice");
    assert_eq!(memory.write(0, 0x1000, &[1]), Wrote::Nothing);
    assert!(memory.set(&slot(5, 0x1000, &host, PLAIN)).is_ok(), "its place is free");
}

#[test]
fn what_a_slot_was_is_handed_back_and_a_refused_one_is_not_kept() {
    let (mut memory, host) = (memory(), pages(2));
    assert_eq!(memory.set(&slot(0, 0x1000, &host, PLAIN)), Ok(None));
    let was = memory.set(&slot(0, 0x8000, &host, LOG)).unwrap().unwrap();
    assert_eq!((was.guest.0, was.flags), (0x1000, PLAIN));

    // One that is refused changes nothing: not the place, not the bits.
    memory.write(0, 0x8000, &[1]);
    for bad in [slot(0, 0x8001, &host, LOG), slot(0, 1 << 52, &host, LOG)] {
        assert_eq!(memory.set(&bad), Err(Errno::EINVAL));
    }
    assert_eq!(memory.slots().next().unwrap().guest.0, 0x8000);
    assert_eq!(log(&mut memory, 0), Ok([1, 0x5555]));
}

#[test]
fn writes_land_in_memory_across_slots() {
    let (mut memory, low, high) = (memory(), pages(2), pages(1));
    memory.set(&slot(0, 0x1000, &low, PLAIN)).unwrap();
    memory.set(&slot(1, 0x3000, &high, PLAIN)).unwrap();
    memory.set(&slot(2, 0x4000, &pages(1), READONLY)).unwrap();

    assert_eq!(memory.write(0, 0x2ffe, &[1, 2, 3, 4]), Wrote::Memory);
    let byte = |host: &HostRange, at: usize| host.bytes()[at].load(Ordering::Relaxed);
    assert_eq!((byte(&low, 0x1ffe), byte(&low, 0x1fff)), (1, 2));
    assert_eq!((byte(&high, 0), byte(&high, 1), byte(&high, 2)), (3, 4, 0));
    let mut read = [0; 4];
    assert!(memory.read(0x2ffe, &mut read));
    assert_eq!(read, [1, 2, 3, 4]);

    // A part that is memory is stored although the rest ends the run.
    assert_eq!(memory.write(0, 0x3ffe, &[7; 4]), Wrote::ReadOnly);
    assert_eq!(byte(&high, 0xfff), 7);
    assert!(memory.read(0x3ffe, &mut read));
    assert_eq!(read, [7, 7, 0, 0], "a ROM is read and not written");
    assert_eq!(memory.write(0, 0x4ffe, &[7; 4]), Wrote::Nothing);
    assert_eq!(memory.write(0, 0xffe, &[8; 4]), Wrote::Nothing);
    assert!(!memory.read(0xffe, &mut read));
    assert_eq!(read, [7, 7, 8, 8], "what is there has been read");

    // A whole slot and its neighbours at once; nothing at all; the last addresses.
    assert_eq!(memory.write(0, 0x1000, &[9; 3 * SIZE]), Wrote::Memory);
    assert_eq!(memory.write(0, 0x1000, &[9; 3 * SIZE + 1]), Wrote::ReadOnly);
    assert_eq!(memory.write(0, 0x1000, &[]), Wrote::Memory);
    assert_eq!(memory.write(0, u64::MAX, &[1, 2]), Wrote::Nothing);
    assert!(!memory.read(u64::MAX - 1, &mut read));
}

#[test]
fn accesses_are_cut_where_pages_end() {
    let cut = |guest, len| pieces(guest, len).unwrap().collect::<Vec<_>>();
    assert_eq!(cut(0xfff, 0), []);
    assert_eq!(cut(0x1000, SIZE), [(0x1000, 0..SIZE)]);
    assert_eq!(cut(0xffe, 4), [(0xffe, 0..2), (0x1000, 2..4)]);
    assert_eq!(cut(0xfff, SIZE + 2), [(0xfff, 0..1), (0x1000, 1..4097), (0x2000, 4097..4098)]);
    assert!(pieces(u64::MAX, 1).is_none());
    assert!(pieces(1, usize::MAX).is_none());
}

#[test]
fn a_host_without_address_spaces_has_one() {
    for (spaces, second) in [(0, false), (1, false), (2, true)] {
        let mut memory = Memory::new(MemoryLimits { address_spaces: spaces, ..LIMITS });
        assert!(memory.set(&slot(0, 0, &pages(1), PLAIN)).is_ok());
        assert_eq!(memory.set(&slot(0x1_0000, 0, &pages(1), PLAIN)).is_ok(), second);
    }
}

#[test]
fn only_address_space_0_is_the_guests() {
    let (mut memory, host) = (memory(), pages(1));
    memory.set(&slot(0x1_0000, 0x1000, &host, PLAIN)).unwrap();
    assert_eq!(memory.write(0, 0x1000, &[1]), Wrote::Nothing);
    assert!(!memory.read(0x1000, &mut [0]));
}

#[test]
fn reading_the_log_takes_it() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10000, &host, LOG)).unwrap();
    memory.set(&slot(1, 0x1000, &pages(1), PLAIN)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([0, 0]));
    memory.write(0, 0x10000, &[1]);
    memory.write(0, 0x10000 + 64 * PAGE - 1, &[1, 2]);
    memory.write(0, 0x10000 + 99 * PAGE, &[1]);
    memory.read(0x11000, &mut [0]);
    assert_eq!(log(&mut memory, 0), Ok([1 << 63 | 1, 1 << 35 | 1]));
    assert_eq!(log(&mut memory, 0), Ok([0, 0]));

    for (id, errno) in
        [(1, Errno::ENOENT), (5, Errno::ENOENT), (8, Errno::EINVAL), (0x2_0000, Errno::EINVAL)]
    {
        assert_eq!(log(&mut memory, id), Err(errno), "slot {id:#x}");
    }
    memory.write(0, 0x10000, &[1]);
    assert_eq!(memory.dirty_log(SlotId(0), &mut [0]), INVALID, "100 pages have two words");
    let mut long = [7; 3];
    assert_eq!(memory.dirty_log(SlotId(0), &mut long), Ok(()));
    assert_eq!(long, [1, 0, 7], "and a refused call takes nothing");
}

#[test]
fn bits_follow_a_slot_that_moves_and_end_with_logging() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10000, &host, LOG)).unwrap();
    memory.write(0, 0x11000, &[1]);
    memory.set(&slot(0, 0x20_0000, &host, LOG)).unwrap();
    assert_eq!(memory.write(0, 0x10000, &[1]), Wrote::Nothing);
    memory.write(0, 0x20_0000, &[1]);
    memory.set(&slot(0, 0x20_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([3, 0]));

    memory.write(0, 0x20_0000, &[1]);
    memory.set(&slot(0, 0x20_0000, &host, PLAIN)).unwrap();
    memory.write(0, 0x20_1000, &[1]);
    assert_eq!(log(&mut memory, 0), Err(Errno::ENOENT));
    memory.set(&slot(0, 0x20_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([0, 0]), "what was written before is not known");

    memory.write(0, 0x20_0000, &[1]);
    memory.delete(SlotId(0)).unwrap();
    memory.set(&slot(0, 0x20_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([0, 0]), "bits are gone with their slot");
}

#[test]
fn with_manual_protection_only_what_is_cleared_is_clean() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10000, &host, LOG)).unwrap();
    memory.enable_manual_protect(1).unwrap();
    for page in [0, 1, 64, 99] {
        memory.write(0, 0x10000 + page * PAGE, &[1]);
    }
    assert_eq!(log(&mut memory, 0), Ok([3, 1 << 35 | 1]));
    assert_eq!(log(&mut memory, 0), Ok([3, 1 << 35 | 1]));
    memory.clear_dirty_log(SlotId(0), 0, 64, &[2, u64::MAX]).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([1, 1 << 35 | 1]), "nothing outside the request");
    memory.clear_dirty_log(SlotId(0), 64, 36, &[u64::MAX]).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([1, 0]), "bits without pages are no matter");
    memory.write(0, 0x11000, &[1]);
    assert_eq!(log(&mut memory, 0), Ok([3, 0]), "and noticed again");
    memory.enable_manual_protect(0).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([3, 0]));
    assert_eq!(log(&mut memory, 0), Ok([0, 0]), "read and taken as before");
}

#[test]
fn clearing_is_judged_as_by_kvm() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10_0000, &host, LOG)).unwrap();
    memory.set(&slot(1, 0x1000, &pages(1), PLAIN)).unwrap();
    let all = [u64::MAX; 2];
    for (what, id, first, count, bitmap, answer) in [
        ("all, without manual protection", 0, 0, 100, &all[..], Ok(())),
        ("whole words", 0, 0, 64, &all[..1], Ok(())),
        ("to the end", 0, 64, 36, &all[..1], Ok(())),
        ("nothing", 0, 0, 0, &[], Ok(())),
        ("nothing inside", 0, 64, 0, &[], Ok(())),
        ("nothing past the end", 0, 128, 0, &[], INVALID),
        ("first", 0, 1, 64, &all, INVALID),
        ("count", 0, 0, 63, &all, INVALID),
        ("count before the end", 0, 64, 35, &all, INVALID),
        ("past the end", 0, 0, 128, &all, INVALID),
        ("far past the end", 0, u64::MAX - 63, 64, &all, INVALID),
        ("a short bitmap", 0, 0, 100, &all[..1], INVALID),
        ("more than any bitmap", 0, 0, u32::MAX, &all, INVALID),
        ("does not log", 1, 0, 1, &all, Err(Errno::ENOENT)),
        ("absent", 2, 0, 64, &all, Err(Errno::ENOENT)),
        ("absent, and first", 2, 1, 64, &all, INVALID),
        ("no slot", 8, 0, 64, &all, INVALID),
    ] {
        assert_eq!(memory.clear_dirty_log(SlotId(id), first, count, bitmap), answer, "{what}");
    }
}

#[test]
fn manual_protection_is_enabled_with_known_flags() {
    for (known, flags, answer) in [
        (3, 0, Ok(())),
        (3, 1, Ok(())),
        (3, 3, Ok(())),
        (3, 2, INVALID),
        (3, 5, INVALID),
        (3, u64::MAX, INVALID),
        (1, 1, Ok(())),
        (1, 3, INVALID),
        (0, 1, INVALID),
        (0, 0, INVALID),
    ] {
        let mut memory = Memory::new(MemoryLimits { manual_protect: known, ..LIMITS });
        assert_eq!(memory.enable_manual_protect(flags), answer, "{flags:#x} of {known}");
    }
    let mut old = Memory::new(MemoryLimits { manual_protect: 0, ..LIMITS });
    old.set(&slot(0, 0, &pages(1), LOG)).unwrap();
    assert_eq!(old.clear_dirty_log(SlotId(0), 0, 1, &[1]), Err(Errno::ENOTTY));
}

#[test]
fn logs_can_begin_with_all_pages_dirty() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10_0000, &host, LOG)).unwrap();
    memory.set(&slot(1, 0x80_0000, &pages(64), PLAIN)).unwrap();
    memory.enable_manual_protect(3).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([0, 0]), "it began before");
    memory.set(&slot(0, 0x10_0000, &host, PLAIN)).unwrap();
    memory.set(&slot(0, 0x20_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([u64::MAX, (1 << 36) - 1]));
    memory.clear_dirty_log(SlotId(0), 0, 100, &[0xf0, u64::MAX]).unwrap();
    memory.set(&slot(0, 0x30_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 0), Ok([!0xf0, 0]), "a move keeps what was cleared");
    let host = memory.slots().nth(1).unwrap().host.clone();
    memory.set(&slot(1, 0x80_0000, &host, LOG)).unwrap();
    assert_eq!(log(&mut memory, 1), Ok([u64::MAX, 0x5555]));
}

#[test]
fn a_dirty_ring_ends_the_use_of_bitmaps() {
    let (mut memory, host) = (memory(), pages(100));
    memory.set(&slot(0, 0x10000, &host, LOG)).unwrap();
    // In this order: the 12th is the first that is right.
    for (size, vcpus, errno) in [
        (0, false, Errno::EINVAL),
        (1024, false, Errno::EINVAL),
        (2048, false, Errno::EINVAL),
        (4095, false, Errno::EINVAL),
        (8191, false, Errno::EINVAL),
        (2 << 20, false, Errno::E2BIG),
        (2 << 20, true, Errno::E2BIG),
        ((2 << 20) - 1, false, Errno::EINVAL),
        (1 << 31, false, Errno::E2BIG),
        (1 << 32, false, Errno::EINVAL),
        (4096, true, Errno::EINVAL),
    ] {
        assert_eq!(memory.enable_dirty_ring(size, vcpus), Err(errno), "{size:#x}");
    }
    assert_eq!(log(&mut memory, 0), Ok([0, 0]));
    assert_eq!(memory.enable_dirty_ring(1 << 32 | 4096, false), Ok(()), "32 bits count");
    assert_eq!(memory.enable_dirty_ring(4096, false), INVALID, "twice");
    assert_eq!(memory.enable_dirty_ring(2 << 20, false), Err(Errno::E2BIG));

    assert_eq!(memory.write(0, 0x10000, &[1]), Wrote::Memory);
    for id in [0, 5, 0xffff] {
        assert_eq!(log(&mut memory, id), Err(Errno::ENXIO));
        assert_eq!(memory.clear_dirty_log(SlotId(id), 1, 1, &[0]), Err(Errno::ENXIO));
    }
    let mut without = Memory::new(MemoryLimits { dirty_ring: 0, ..LIMITS });
    assert_eq!(without.enable_dirty_ring(4096, false), INVALID);
}

#[test]
fn thousands_of_slots_keep_their_places() {
    let limit = 32764;
    let mut memory = Memory::new(MemoryLimits { slots: limit, ..LIMITS });
    let host = pages(1);
    // Every second page, from the last to the first, then what is between.
    for id in (0..limit / 2).rev() {
        assert!(memory.set(&slot(id, u64::from(id) * 2 * PAGE, &host, PLAIN)).is_ok());
    }
    for id in limit / 2..limit {
        let guest = (u64::from(id - limit / 2) * 2 + 1) * PAGE;
        assert_eq!(memory.set(&slot(id, guest - PAGE, &host, PLAIN)), Err(Errno::EEXIST));
        assert!(memory.set(&slot(id, guest, &host, PLAIN)).is_ok());
    }
    assert_eq!(memory.set(&slot(limit, 1 << 40, &host, PLAIN)), Err(Errno::EINVAL));
    assert_eq!(memory.slots().count(), limit as usize);
    assert_eq!(memory.write(0, u64::from(limit) * PAGE, &[1]), Wrote::Nothing);
    assert_eq!(memory.write(0, u64::from(limit) * PAGE - 1, &[1]), Wrote::Memory);
}
