//! Frames in a stream.

use super::*;

/// The other side of a stream: what it has read, cut into frames.
fn frames_of(bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut all) = (bytes, Vec::new());
    while let Some((len, later)) = rest.split_first_chunk::<4>() {
        let (frame, later) = later.split_at(u32::from_be_bytes(*len) as usize);
        all.push(frame.to_vec());
        rest = later;
    }
    all
}

#[test]
fn a_stream_has_the_length_of_each_frame_before_it() {
    let (port, mut host) = stream();
    let mut rig = Rig::new(vec![port], MRG);
    rig.offer_frame(BUFFERS, &frame(1, 70));
    rig.offer_frame(BUFFERS + 4096, &frame(2, 1));
    rig.ring(TX);
    let mut sent = [0; 4 + 70 + 4 + 1];
    host.read_exact(&mut sent).unwrap();
    assert_eq!(frames_of(&sent), [frame(1, 70), frame(2, 1)]);

    for n in 0..8 {
        rig.offer(RX, &[(BUFFERS + 4096 * n, 1000, WRITE)]);
    }
    rig.ring(RX);
    // Byte by byte, then all at once.
    let bytes = [in_stream(&frame(3, 30)), in_stream(&frame(4, 2000))].concat();
    for byte in &bytes {
        host.write_all(&[*byte]).unwrap();
        rig.poll();
    }
    assert_eq!(rig.completed(RX), [(0, 42), (1, 1000), (2, 1000), (3, 12)]);
    assert_eq!(rig.bytes(BUFFERS + 12, 30), frame(3, 30));
    host.write_all(&bytes).unwrap();
    rig.poll();
    assert_eq!(rig.completed(RX), [(4, 42), (5, 1000), (6, 1000), (7, 12)]);
    assert_eq!(rig.bytes(BUFFERS + 5 * 4096 + 12, 988), frame(4, 2000)[..988]);
    assert_eq!(rig.values().errors, 0);
}

#[test]
fn a_frame_that_is_written_in_parts_arrives_whole() {
    let (port, mut host) = stream();
    let mut rig = Rig::new(vec![port], 0);
    let mut sent = 0;
    while !rig.net.pairs[0].blocked {
        rig.offer_frame(BUFFERS + 0x1_0000 * (sent % 4), &frame(sent as usize, 50_001));
        sent += 1;
        rig.ring(TX);
    }
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 10_007];
    while let Ok(len) = host.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..len]);
        rig.poll();
    }
    let all = frames_of(&bytes);
    assert_eq!(all.len() as u64, sent);
    for (n, got) in all.iter().enumerate() {
        assert!(*got == frame(n, 50_001), "{n}");
    }
    assert_eq!((rig.completed(TX).len() as u64, rig.values().errors), (sent, 0));
}

#[test]
fn a_stream_goes_on_with_the_next_frame_after_a_reset() {
    let (port, mut host) = stream();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer(RX, &[(BUFFERS, 2000, WRITE)]);
    rig.ring(RX);
    let bytes = [in_stream(&frame(1, 100)), in_stream(&frame(2, 60))].concat();
    for cut in [2, 4, 50, 104, 105] {
        host.write_all(&bytes[..cut]).unwrap();
        rig.poll();
        rig.reset(0);
        // One more than is needed, for the next round.
        for n in 0..3 {
            rig.offer(RX, &[(BUFFERS + 4096 * n, 2000, WRITE)]);
        }
        rig.ring(RX);
        host.write_all(&bytes[cut..]).unwrap();
        rig.poll();
        let completed = rig.completed(RX);
        let (last, _) = *completed.last().unwrap();
        assert_eq!(rig.bytes(BUFFERS + 4096 * u64::from(last) + 12, 60), frame(2, 60), "{cut}");
        // The first only if the driver that is there now has all of it.
        assert_eq!(completed.len(), if cut <= 4 { 2 } else { 1 }, "{cut}");
    }
    assert!(rig.link_is_up());
}

#[test]
fn a_frame_of_a_stream_without_room_for_it_is_dropped() {
    let (port, mut host) = stream();
    let mut rig = Rig::new(vec![port], 0);
    rig.offer(RX, &[(BUFFERS, 12 + 100, WRITE)]);
    rig.ring(RX);
    for len in [101, 0, MOST_FRAME, 100] {
        host.write_all(&in_stream(&frame(len, len))).unwrap();
        rig.poll();
    }
    assert_eq!((rig.completed(RX), rig.values().errors), (vec![(0, 112)], 3));
    assert_eq!(rig.bytes(BUFFERS + 12, 100), frame(100, 100));
}

#[test]
fn the_link_is_down_when_the_other_side_of_a_stream_has_gone() {
    for (last, errors) in
        [(vec![], 0), (in_stream(&frame(1, 60))[..30].to_vec(), 0), (vec![0, 2, 0, 0], 1)]
    {
        let (port, mut host) = stream();
        let mut rig = Rig::new(vec![port], STATUS_FEATURE);
        rig.offer(RX, &[(BUFFERS, 2000, WRITE)]);
        rig.ring(RX);
        assert!(rig.link_is_up());
        host.write_all(&last).unwrap();
        let bogus = errors == 1;
        if !bogus {
            drop(host);
        }
        rig.poll();
        assert!(!rig.link_is_up());
        assert_eq!(rig.config_changed.take(), Some(1));
        assert_eq!((rig.poll(), rig.completed(RX)), (0, vec![]));
        // What the driver sends then is dropped, before and after a reset.
        for n in 1..3 {
            rig.offer_frame(BUFFERS, &frame(1, 60));
            rig.ring(TX);
            assert_eq!(rig.completed(TX).len(), 1);
            assert_eq!(rig.values().errors, errors + n);
            rig.reset(STATUS_FEATURE);
            assert!(!rig.link_is_up());
        }
        assert_eq!(rig.values().needs_reset, 0);
    }
}

#[test]
fn a_side_that_goes_while_there_are_no_buffers_is_noticed() {
    let (port, mut host) = stream();
    let mut rig = Rig::new(vec![port], STATUS_FEATURE);
    host.write_all(&in_stream(&frame(1, 60))).unwrap();
    rig.poll();
    drop(host);
    rig.poll();
    assert!(!rig.link_is_up());
}
