use super::*;
use std::sync::atomic::Ordering::SeqCst;

use hv_memory::RamMemory;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::VolatileMemoryError;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE: u16 = 4;

/// Memory of 1 MiB, a hole, and 64 KiB.
const HOLE: u64 = 0x10_0000;
const AFTER: u64 = 0x20_0000;
const END: u64 = AFTER + 0x1_0000;
const BUFFER: u64 = 0x8000;

fn memory() -> Memory {
    let ranges = [(GuestAddress(0), HOLE as usize), (GuestAddress(AFTER), (END - AFTER) as usize)];
    Arc::new(RamMemory::from_ranges(&ranges).unwrap())
}

/// A ring of 16 at 0x1000, as far as its driver has come.
fn mock(memory: &Memory) -> MockSplitQueue<'_, RamMemory> {
    let available = memory.read_obj::<u16>(GuestAddress(0x1102)).unwrap();
    // Making a mock empties it.
    let mock = MockSplitQueue::create(&**memory, GuestAddress(0x1000), 16);
    assert_eq!(mock.avail_addr(), GuestAddress(0x1100));
    mock.avail().idx().store(available);
    mock
}

/// Where the used ring is: that of the mock begins within its available ring.
const USED: u64 = 0x2000;

struct Bench {
    queue: Virtqueue,
    counters: Arc<Counters>,
    event: hv_core::EventFd,
}

fn bench(memory: &Memory, event_idx: bool) -> Bench {
    let mock = mock(memory);
    let setup = QueueSetup {
        size: 16,
        enabled: true,
        descriptors: mock.desc_table_addr().0,
        available: mock.avail_addr().0,
        used: USED,
        ..QueueSetup::new(64)
    };
    let event = crate::event::Event::new().unwrap().shared();
    let counters = Arc::new(Counters::default());
    let interrupts = DeviceInterrupts::new(1, vec![event.clone()], None, counters.clone());
    interrupts.use_messages(true);
    interrupts.set_queue_vector(0, 0);
    let interrupts = Arc::new(interrupts);
    let queue = Virtqueue::new(0, &setup, event_idx, memory.clone(), interrupts, counters.clone());
    Bench { queue: queue.unwrap(), counters, event }
}

/// Writes descriptors from the first on and offers the first.
fn offer(memory: &Memory, descriptors: &[(u64, u32, u16, u16)]) {
    let mock = mock(memory);
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        let descriptor = Descriptor::new(address, len, flags, next);
        mock.desc_table().store(index, RawDescriptor::from(descriptor)).unwrap();
    }
    offer_head(memory, 0);
}

fn offer_head(memory: &Memory, head: u16) {
    let mock = mock(memory);
    let index = mock.avail().idx().load();
    mock.avail().ring().ref_at(usize::from(index % 16)).unwrap().store(head);
    mock.avail().idx().store(index.wrapping_add(1));
}

/// What becomes of a request.
fn taken(descriptors: &[(u64, u32, u16, u16)]) -> Result<Chain, ChainError> {
    let memory = memory();
    offer(&memory, descriptors);
    match bench(&memory, false).queue.pop() {
        Ok(chain) => Ok(chain.unwrap()),
        Err(QueueError::Chain { queue: 0, head: 0, error }) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

fn refused(descriptors: &[(u64, u32, u16, u16)]) -> ChainError {
    taken(descriptors).map(|chain| panic!("{chain:?}")).unwrap_err()
}

#[test]
fn a_request_is_what_the_driver_wrote() {
    let chain =
        taken(&[(BUFFER, 16, NEXT, 2), (0, 0, WRITE, 0), (0x9000, 8, NEXT | WRITE, 1)]).map(|_| ());
    assert_eq!(chain, Ok(()), "the second descriptor is the last, with nothing in it");
    let chain = taken(&[(BUFFER, 16, NEXT, 1), (0x9000, 8, WRITE, 0)]).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 8));
    assert_eq!(chain.readable(), [Buffer { address: GuestAddress(BUFFER), len: 16 }]);
    assert_eq!(chain.writable(), [Buffer { address: GuestAddress(0x9000), len: 8 }]);
}

#[test]
fn a_loop_of_descriptors_is_refused() {
    assert_eq!(refused(&[(BUFFER, 1, NEXT, 0)]), ChainError::NoEnd);
    assert_eq!(refused(&[(BUFFER, 1, NEXT, 1), (BUFFER, 1, NEXT, 0)]), ChainError::NoEnd);
    // With zero lengths nothing else would ever end it.
    assert_eq!(refused(&[(0, 0, NEXT, 0)]), ChainError::NoEnd);
}

#[test]
fn a_chain_past_the_queue_is_refused() {
    for next in [16, 17, 0xffff] {
        assert_eq!(refused(&[(BUFFER, 1, NEXT, next)]), ChainError::NoEnd);
    }
    for head in [16, 17, 0xffff] {
        let memory = memory();
        offer_head(&memory, head);
        let error = bench(&memory, false).queue.pop().unwrap_err();
        assert_eq!(error, QueueError::Chain { queue: 0, head, error: ChainError::NoEnd });
    }
}

#[test]
fn an_indirect_table_is_followed_once_and_not_beyond_the_queue() {
    let table = |entries: &[(u64, u32, u16, u16)], len| {
        let memory = memory();
        for (at, &(address, bytes, flags, next)) in (0x6000..).step_by(16).zip(entries) {
            let descriptor = RawDescriptor::from(Descriptor::new(address, bytes, flags, next));
            memory.write_obj(descriptor, GuestAddress(at)).unwrap();
        }
        offer(&memory, &[(0x6000, len, TABLE, 0)]);
        bench(&memory, false).queue.pop().map(Option::unwrap)
    };
    let error = |result: Result<Chain, QueueError>| match result {
        Err(QueueError::Chain { error, .. }) => error,
        other => panic!("{other:?}"),
    };
    let chain = table(&[(BUFFER, 4, NEXT, 1), (0x9000, 4, WRITE, 0)], 32).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (4, 4));
    // Of no or odd length; empty; another table inside; an index beyond the table; a loop.
    let one = [(BUFFER, 4, 0, 0)];
    assert_eq!(error(table(&one, 0)), ChainError::NoEnd);
    assert_eq!(error(table(&one, 17)), ChainError::NoEnd);
    assert_eq!(error(table(&[(0x6000, 16, TABLE, 0)], 16)), ChainError::NoEnd);
    assert_eq!(error(table(&[(BUFFER, 4, NEXT, 1)], 16)), ChainError::NoEnd);
    assert_eq!(error(table(&[(BUFFER, 4, NEXT, 0)], 16)), ChainError::NoEnd);
    // Longer than the queue, which the driver must not (virtio 1.2, 2.7.5.3.1).
    let long: Vec<_> = (1..=40).map(|next| (BUFFER, 1, NEXT, next)).collect();
    assert_eq!(error(table(&long, 16 * 40)), ChainError::TooLong);
    // A table that is not in memory.
    assert_eq!(refused(&[(HOLE, 16, TABLE, 0)]), ChainError::NoEnd);
    assert_eq!(refused(&[(u64::MAX - 8, 16, TABLE, 0)]), ChainError::NoEnd);
    assert_eq!(refused(&[(HOLE - 8, 16, TABLE, 0)]), ChainError::NoEnd);
}

#[test]
fn addresses_outside_memory_or_at_its_end_are_refused() {
    let outside = |address, len| {
        let expected = ChainError::Outside { address, len };
        assert_eq!(refused(&[(address, len, 0, 0)]), expected);
        assert_eq!(refused(&[(address, len, WRITE, 0)]), expected);
    };
    outside(HOLE, 1);
    outside(HOLE - 1, 2);
    outside(AFTER - 1, 2);
    outside(END, 1);
    outside(END - 4, 5);
    outside(u64::MAX, 1);
    outside(u64::MAX, u32::MAX);
    outside(u64::MAX - 3, 8);
    outside(0, u32::MAX);
    // Up to the last byte is inside.
    assert_eq!(taken(&[(HOLE - 1, 1, 0, 0)]).unwrap().readable_len(), 1);
    assert_eq!(taken(&[(END - 4, 4, WRITE, 0)]).unwrap().writable_len(), 4);
}

#[test]
fn zero_and_huge_lengths_are_bounded() {
    let chain = taken(&[(u64::MAX, 0, NEXT, 1), (BUFFER, 4, NEXT, 2), (HOLE, 0, WRITE, 0)]);
    let chain = chain.unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (1, 0), "nothing is nowhere");
    assert_eq!(taken(&[(0, 0, 0, 0)]).unwrap().readable_len(), 0);
    // The same MiB over and over: fine until it would be 4 GiB.
    let all = |n: u16, last| {
        let descriptor = |i| (0, HOLE as u32, if i == n { last } else { NEXT }, i);
        (1..=n).map(descriptor).collect::<Vec<_>>()
    };
    assert_eq!(taken(&all(15, 0)).unwrap().readable_len(), 15 << 20);
    let huge = [(0, u32::MAX, NEXT, 1), (0, u32::MAX, 0, 0)];
    assert_eq!(refused(&huge), ChainError::Outside { address: 0, len: u32::MAX });
}

#[test]
fn a_buffer_to_read_after_one_to_write_is_refused() {
    let order = [(BUFFER, 4, NEXT | WRITE, 1), (BUFFER, 4, 0, 0)];
    assert_eq!(refused(&order), ChainError::Order);
}

#[test]
fn a_ring_that_is_rewritten_during_processing_does_not_change_the_request() {
    let memory = memory();
    offer(&memory, &[(BUFFER, 16, NEXT, 1), (0x9000, 16, WRITE, 0)]);
    memory.write_slice(&[7; 16], GuestAddress(BUFFER)).unwrap();
    let mut bench = bench(&memory, false);
    let chain = bench.queue.pop().unwrap().unwrap();
    // Now the descriptors lead elsewhere, the heads are others and there is no end of requests.
    let mock = mock(&memory);
    for index in 0..16 {
        let bad = Descriptor::new(u64::MAX, u32::MAX, NEXT | WRITE, index);
        mock.desc_table().store(index, RawDescriptor::from(bad)).unwrap();
        mock.avail().ring().ref_at(usize::from(index)).unwrap().store(0xffff);
    }
    let mut data = [0; 16];
    chain.read_at(0, &mut data).unwrap();
    assert_eq!(data, [7; 16]);
    chain.write_at(0, &[9; 16]).unwrap();
    assert_eq!(memory.read_obj::<[u8; 16]>(GuestAddress(0x9000)).unwrap(), [9; 16]);
    bench.queue.push(chain, 16).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
    mock.avail().idx().store(0x8000);
    assert_eq!(bench.queue.pop().unwrap_err(), QueueError::Available(0));
}

#[test]
fn more_requests_than_descriptors_are_refused() {
    for index in [17, 0x8000, 0xffff] {
        let memory = memory();
        mock(&memory).avail().idx().store(index);
        let mut bench = bench(&memory, false);
        assert_eq!(bench.queue.pop().unwrap_err(), QueueError::Available(0), "{index}");
    }
}

#[test]
fn rings_that_can_not_be_are_refused() {
    let memory = memory();
    let good = QueueSetup {
        enabled: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        ..QueueSetup::new(16)
    };
    let make = |setup: QueueSetup| {
        let counters = Arc::new(Counters::default());
        let interrupts = DeviceInterrupts::new(1, Vec::new(), None, counters.clone());
        Virtqueue::new(3, &setup, false, memory.clone(), Arc::new(interrupts), counters).map(|_| ())
    };
    assert_eq!(make(good), Ok(()));
    for bad in [
        QueueSetup { descriptors: 0x1008, ..good },
        QueueSetup { available: 0x2001, ..good },
        QueueSetup { used: 0x3002, ..good },
        QueueSetup { descriptors: HOLE - 16, ..good },
        QueueSetup { available: HOLE - 2, ..good },
        QueueSetup { used: END - 4, ..good },
        QueueSetup { used: u64::MAX - 3, ..good },
        QueueSetup { available: 0, ..good },
        QueueSetup { size: 0, ..good },
        QueueSetup { size: 32, ..good },
    ] {
        assert_eq!(make(bad), Err(QueueError::Rings(3)), "{bad:?}");
    }
    // One that is not enabled is nobody's business, and has no requests.
    let off = QueueSetup { enabled: false, descriptors: HOLE, ..good };
    assert_eq!(make(off), Ok(()));
}

#[test]
fn a_driver_that_never_stops_gets_one_ring_of_requests_a_call() {
    let memory = memory();
    offer(&memory, &[(BUFFER, 4, WRITE, 0)]);
    let mut bench = bench(&memory, false);
    let mut done = 0;
    while let Some(chain) = bench.queue.pop().unwrap() {
        bench.queue.push(chain, 4).unwrap();
        offer_head(&memory, 0);
        done += 1;
    }
    assert_eq!((done, bench.queue.has_more()), (16, true));
    bench.queue.nothing_more();
    bench.queue.begin();
    assert!(bench.queue.pop().unwrap().is_some());
    assert_eq!(bench.counters.values().requests, 16);
}

#[test]
fn a_request_that_is_put_back_is_taken_again() {
    let memory = memory();
    offer(&memory, &[(BUFFER, 4, WRITE, 0), (BUFFER, 8, WRITE, 0)]);
    offer_head(&memory, 1);
    let mut bench = bench(&memory, false);
    let first = bench.queue.pop().unwrap().unwrap();
    let second = bench.queue.pop().unwrap().unwrap();
    assert!(bench.queue.pop().unwrap().is_none());
    bench.queue.unpop(second);
    bench.queue.unpop(first);
    let lens = [(); 2].map(|()| bench.queue.pop().unwrap().unwrap().writable_len());
    assert_eq!(lens, [4, 8]);
}

#[test]
fn the_driver_rings_only_when_nothing_is_left() {
    for event_idx in [false, true] {
        let memory = memory();
        let mut bench = bench(&memory, event_idx);
        let flags = || memory.read_obj::<u16>(GuestAddress(USED)).unwrap();
        let avail_event = || {
            let at = USED + 4 + 8 * 16;
            memory.read_obj::<u16>(GuestAddress(at)).unwrap()
        };
        offer(&memory, &[(BUFFER, 4, WRITE, 0)]);
        let chain = bench.queue.pop().unwrap().unwrap();
        assert_eq!(flags(), u16::from(!event_idx), "busy: don't ring");
        bench.queue.push(chain, 0).unwrap();
        assert!(bench.queue.pop().unwrap().is_none());
        assert_eq!((flags(), avail_event()), (0, u16::from(event_idx)));
        bench.queue.silence().unwrap();
        assert_eq!(flags(), u16::from(!event_idx));
    }
}

#[test]
fn a_signal_is_sent_once_for_what_was_used_if_it_is_wanted() {
    let memory = memory();
    let mut bench = bench(&memory, false);
    bench.queue.signal().unwrap();
    assert_eq!(bench.event.take(), None, "nothing was used");
    for flags in [0u16, 1] {
        for _ in 0..2 {
            offer(&memory, &[(BUFFER, 4, WRITE, 0)]);
            let chain = bench.queue.pop().unwrap().unwrap();
            bench.queue.push(chain, 99).unwrap();
        }
        // Last, because making a mock clears them.
        memory.store(flags, GuestAddress(0x1100), SeqCst).unwrap();
        bench.queue.signal().unwrap();
        bench.queue.signal().unwrap();
        assert_eq!(bench.event.take(), (flags == 0).then_some(1));
    }
    let values = bench.counters.values();
    assert_eq!((values.interrupts, values.suppressed), (1, 1));
    assert_eq!(values.bytes_to_guest, 4 * 4, "no more than there was room for");
}

#[test]
fn parts_of_a_request_are_found_across_its_buffers() {
    let memory = memory();
    offer(
        &memory,
        &[
            (BUFFER, 3, NEXT, 1),
            (0x9000, 5, NEXT, 2),
            (0xa000, 2, NEXT | WRITE, 3),
            (0xb000, 4, WRITE, 0),
        ],
    );
    memory.write_slice(&[1, 2, 3], GuestAddress(BUFFER)).unwrap();
    memory.write_slice(&[4, 5, 6, 7, 8], GuestAddress(0x9000)).unwrap();
    let chain = bench(&memory, false).queue.pop().unwrap().unwrap();
    let mut data = [0; 4];
    chain.read_at(2, &mut data).unwrap();
    assert_eq!(data, [3, 4, 5, 6]);
    assert_eq!(chain.read_obj::<u32>(4).unwrap(), 0x0807_0605);
    let short = Err(chain.error(ChainError::TooShort));
    assert_eq!(chain.read_at(5, &mut data), short);
    assert_eq!(chain.read_at(u32::MAX, &mut data), short);
    chain.read_at(8, &mut []).unwrap();

    chain.write_at(1, &[0xa, 0xb, 0xc]).unwrap();
    let written: [[u8; 2]; 2] =
        [0xa000, 0xb000].map(|at| memory.read_obj(GuestAddress(at)).unwrap());
    assert_eq!(written, [[0, 0xa], [0xb, 0xc]]);
    assert_eq!(chain.write_at(3, &[1; 4]), short);
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0xb000)).unwrap(), [0xb, 0xc, 0, 0]);

    let lens = |offset, len| {
        let slices = chain.writable_slices(offset, len).unwrap();
        slices.iter().map(|slice| slice.len()).collect::<Vec<_>>()
    };
    assert_eq!((lens(0, 6), lens(1, 2), lens(2, 4)), (vec![2, 4], vec![1, 1], vec![4]));
    let slice = chain.readable_slices(0, 1).unwrap()[0];
    assert!(matches!(slice.offset(2), Err(VolatileMemoryError::OutOfBounds { .. })));
}

#[test]
fn requests_completed_together_are_seen_together() {
    let memory = memory();
    let mut bench = bench(&memory, true);
    let used_index = || memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    let element =
        |slot: u64| memory.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + 8 * slot)).unwrap();
    let all: Vec<_> = (0..16).map(|_| (BUFFER, 4, WRITE, 0)).collect();
    offer(&memory, &all);
    (1..15).for_each(|head| offer_head(&memory, head));
    let taken: Vec<Chain> = (0..15).map(|_| bench.queue.pop().unwrap().unwrap()).collect();
    // Beyond the end of the ring: 14 first, then three with numbers 14, 15 and 16.
    let mut taken = taken.into_iter();
    bench.queue.push_together(taken.by_ref().take(14).map(|chain| (chain, 4))).unwrap();
    assert_eq!(used_index(), 14);
    offer_head(&memory, 3);
    offer_head(&memory, 5);
    // The driver, which has seen 14, waits for the one with number 15, which is not the last.
    bench.queue.signal().unwrap();
    let _ = bench.event.take();
    let used_event = 0x1100 + 4 + 2 * 16;
    memory.write_obj(15u16, GuestAddress(used_event)).unwrap();
    let last = taken.next().unwrap();
    bench.queue.begin();
    let more: Vec<Chain> = (0..2).map(|_| bench.queue.pop().unwrap().unwrap()).collect();
    let chains = std::iter::once(last).chain(more);
    bench.queue.push_together(chains.zip([4, 99, 1])).unwrap();
    assert_eq!(used_index(), 17);
    assert_eq!((element(14), element(15), element(0)), ([14, 4], [3, 4], [5, 1]));
    bench.queue.signal().unwrap();
    assert_eq!(bench.event.take(), Some(1));
    bench.queue.push_together(std::iter::empty()).unwrap();
    bench.queue.signal().unwrap();
    assert_eq!((used_index(), bench.event.take()), (17, None));
    assert_eq!(bench.counters.values().requests, 17);
    assert_eq!(bench.counters.values().bytes_to_guest, 14 * 4 + 4 + 4 + 1);
}
