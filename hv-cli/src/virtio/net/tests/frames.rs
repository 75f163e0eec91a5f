//! Frames through a socket of which each read is one.

use super::*;

#[test]
fn a_frame_goes_each_way_with_its_header_made_and_removed() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer_frame(BUFFERS, &frame(1, 60));
    rig.ring(TX);
    assert_eq!(received(&host), Some(frame(1, 60)));
    assert_eq!(rig.completed(TX), [(0, 0)]);

    // Into a buffer that is in two regions of memory, behind one that only has the header.
    rig.memory.write_slice(&[0xee; 64], GuestAddress(SECOND - 32)).unwrap();
    rig.offer(RX, &[(BUFFERS, HEADER as u32, WRITE), (SECOND - 32, 1600, WRITE)]);
    rig.ring(RX);
    host.send(&frame(2, 64)).unwrap();
    rig.poll();
    assert_eq!(rig.completed(RX), [(0, HEADER as u32 + 64)]);
    assert_eq!(rig.bytes(BUFFERS, HEADER), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(rig.bytes(SECOND - 32, 64), frame(2, 64));
    let values = rig.values();
    assert_eq!((values.requests, values.errors), (2, 0));
    assert_eq!((values.bytes_from_guest, values.bytes_to_guest), (72, 76));
}

#[test]
fn a_frame_without_a_whole_header_or_without_bytes_is_dropped() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    for len in [0, 1, 5, 11, 12] {
        rig.offer(TX, &[(BUFFERS, len, 0)]);
    }
    rig.ring(TX);
    assert_eq!(rig.completed(TX), [0, 1, 2, 3, 4].map(|head| (head, 0)));
    assert_eq!((received(&host), rig.values().errors), (None, 5));
}

#[test]
fn a_huge_frame_is_dropped_and_the_longest_is_not() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer(TX, &[(0, END as u32, 0)]);
    let all = [(0, SECOND as u32, 0), (0, 0, 0), (0, SECOND as u32, 0), (0, SECOND as u32, 0)];
    rig.offer(TX, &all);
    rig.offer(TX, &[(BUFFERS, (HEADER + MOST_FRAME + 1) as u32, 0)]);
    rig.ring(TX);
    assert_eq!((rig.completed(TX).len(), rig.values().errors), (3, 3));
    assert_eq!(received(&host), None);
    rig.offer_frame(BUFFERS, &frame(9, MOST_FRAME));
    rig.ring(TX);
    assert_eq!(received(&host), Some(frame(9, MOST_FRAME)));
    assert_eq!(rig.values().errors, 3);
}

#[test]
fn buffers_of_the_wrong_direction_are_of_no_use() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer(TX, &[(BUFFERS, 100, WRITE)]);
    rig.ring(TX);
    assert_eq!(rig.completed(TX), [(0, 0)]);
    // To be received into: one to read, one of nothing, one without room for a header; then a good one.
    rig.offer(RX, &[(BUFFERS, 2000, 0)]);
    rig.offer(RX, &[(BUFFERS, 0, WRITE)]);
    rig.offer(RX, &[(BUFFERS, 11, WRITE)]);
    rig.offer(RX, &[(BUFFERS, 2000, 0), (BUFFERS + 4096, 2000, WRITE)]);
    rig.ring(RX);
    host.send(&frame(1, 100)).unwrap();
    rig.poll();
    assert_eq!(rig.completed(RX), [(0, 0), (1, 0), (2, 0), (3, 112)]);
    assert_eq!(rig.values().errors, 4);
}

#[test]
fn a_header_that_wants_what_was_not_offered_drops_its_frame() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    for (n, header) in [[1, 0], [0, 1], [0, 0x83], [0xff, 0xff]].into_iter().enumerate() {
        let at = BUFFERS + 4096 * n as u64;
        rig.memory.write_slice(&header, GuestAddress(at)).unwrap();
        rig.offer(TX, &[(at, 100, 0)]);
    }
    rig.ring(TX);
    assert_eq!((received(&host), rig.values().errors), (None, 4));
    assert_eq!(rig.completed(TX).len(), 4);
}

#[test]
fn frames_wait_in_the_kernel_while_there_are_no_buffers() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    for n in 0..4 {
        host.send(&frame(n, 100)).unwrap();
    }
    assert!(rig.poll() <= 2, "it waits for buffers now");
    assert_eq!(rig.poll(), 0, "nothing wakes it");
    // A doorbell without a buffer.
    rig.ring(RX);
    assert_eq!(rig.poll(), 0);
    for n in 0..4 {
        rig.offer(RX, &[(BUFFERS + 4096 * n, 2000, WRITE)]);
        rig.ring(RX);
        rig.poll();
        assert_eq!(rig.completed(RX), [(n as u32, 112)]);
        assert_eq!(rig.bytes(BUFFERS + 4096 * n + 12, 100), frame(n as usize, 100));
    }
    assert_eq!(rig.values().errors, 0);
}

#[test]
fn a_frame_longer_than_its_buffer_is_dropped_and_the_buffer_is_for_the_next() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer(RX, &[(BUFFERS, 12 + 100, WRITE)]);
    rig.offer(RX, &[(BUFFERS + 4096, 12 + 100, WRITE)]);
    rig.ring(RX);
    for len in [101, 1500, MOST_FRAME, MOST_FRAME + 1, 0, 100, 99] {
        host.send(&frame(len, len)).unwrap();
    }
    rig.poll();
    assert_eq!(rig.completed(RX), [(0, 112), (1, 111)]);
    assert_eq!(rig.bytes(BUFFERS + 12, 100), frame(100, 100));
    assert_eq!(rig.values().errors, 5);
}

#[test]
fn a_frame_is_in_several_buffers_that_are_completed_together() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], MRG);
    for n in 0..4 {
        rig.offer(RX, &[(BUFFERS + 4096 * n, 1000, WRITE)]);
    }
    rig.ring(RX);
    host.send(&frame(5, 2500)).unwrap();
    host.send(&frame(6, 10)).unwrap();
    rig.poll();
    assert_eq!(rig.completed(RX), [(0, 1000), (1, 1000), (2, 512), (3, 22)]);
    let header = |at| rig.bytes(at, HEADER)[10..].to_vec();
    assert_eq!((header(BUFFERS), header(BUFFERS + 3 * 4096)), (vec![3, 0], vec![1, 0]));
    let parts = [
        rig.bytes(BUFFERS + 12, 988),
        rig.bytes(BUFFERS + 4096, 1000),
        rig.bytes(BUFFERS + 8192, 512),
    ];
    assert_eq!(parts.concat(), frame(5, 2500));
    assert_eq!(rig.values().errors, 0);
}

#[test]
fn a_frame_that_needs_more_buffers_than_there_are_waits_for_them() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], MRG);
    rig.offer(RX, &[(BUFFERS, 1000, WRITE)]);
    rig.ring(RX);
    host.send(&frame(1, 3000)).unwrap();
    host.send(&frame(2, 50)).unwrap();
    rig.poll();
    assert_eq!((rig.completed(RX), rig.poll()), (vec![], 0));
    rig.offer(RX, &[(BUFFERS + 4096, 1000, WRITE)]);
    rig.ring(RX);
    assert_eq!((rig.completed(RX), rig.poll()), (vec![], 0));
    rig.offer(RX, &[(BUFFERS + 8192, 1000, WRITE)]);
    rig.offer(RX, &[(BUFFERS + 12288, 1000, WRITE)]);
    rig.ring(RX);
    rig.poll();
    assert_eq!(rig.completed(RX), [(0, 1000), (1, 1000), (2, 1000), (3, 12)]);
    let rest = [988, 1000, 1000, 12];
    let parts = (0..4)
        .map(|n| rig.bytes(BUFFERS + 4096 * n + if n == 0 { 12 } else { 0 }, rest[n as usize]));
    assert_eq!(parts.collect::<Vec<_>>().concat(), frame(1, 3000));
    assert_eq!(rig.values().errors, 0);
    // One byte longer than all the ring holds.
    for _ in 0..SIZE {
        rig.offer(RX, &[(BUFFERS, 20, WRITE)]);
    }
    rig.ring(RX);
    rig.poll();
    let completed = rig.completed(RX);
    assert_eq!(completed.iter().map(|(_, len)| len).sum::<u32>(), 12 + 50);
    host.send(&frame(3, 20 * usize::from(SIZE) - 11)).unwrap();
    host.send(&frame(4, 8)).unwrap();
    for _ in 0..completed.len() {
        rig.offer(RX, &[(BUFFERS, 20, WRITE)]);
    }
    rig.ring(RX);
    rig.poll();
    assert_eq!(rig.completed(RX).iter().map(|(_, len)| len).sum::<u32>(), 12 + 8);
    assert_eq!(rig.values().errors, 1);
}

#[test]
fn what_the_other_side_has_no_room_for_is_sent_later_and_in_order() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], 0);
    let mut sent = 0;
    // Until the socket is full.
    let mut completed = 0;
    while !rig.net.pairs[0].blocked {
        rig.offer_frame(BUFFERS + 4096 * (sent % 32), &frame(sent as usize, 1000));
        sent += 1;
        rig.ring(TX);
        completed += rig.completed(TX).len() as u64;
    }
    assert_eq!((completed, rig.poll()), (sent - 1, 0));
    for n in 0..sent {
        assert_eq!(received(&host), Some(frame(n as usize, 1000)), "{n}");
        rig.poll();
    }
    assert_eq!(rig.completed(TX).len(), 1);
    assert_eq!((received(&host), rig.values().errors), (None, 0));
    assert!(!rig.net.pairs[0].blocked);
}

#[test]
fn nobody_at_the_other_end_of_a_datagram_socket_is_no_end() {
    let (port, host) = frames();
    let mut rig = Rig::new(vec![port], STATUS_FEATURE);
    drop(host);
    for n in 1..4 {
        rig.offer_frame(BUFFERS, &frame(1, 60));
        rig.ring(TX);
        rig.poll();
        assert_eq!((rig.completed(TX).len(), rig.values().errors), (1, n));
    }
    assert!(rig.link_is_up());
}
