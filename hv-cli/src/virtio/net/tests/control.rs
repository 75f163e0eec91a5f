//! The control queue, and several pairs of queues.

use super::*;

/// What comes of a command.
fn command(rig: &mut Rig, bytes: &[u8], ack: &[(u64, u32, u16)]) -> (u32, u8) {
    let at = BUFFERS + 0x1000;
    rig.memory.write_slice(&[0xee; 4], GuestAddress(BUFFERS)).unwrap();
    rig.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    let control = rig.rings.len() - 1;
    rig.offer(control, &[&[(at, bytes.len() as u32, 0)], ack].concat());
    rig.ring(control);
    let [(_, len)] = rig.completed(control)[..] else { panic!("not completed") };
    (len, rig.bytes(BUFFERS, 1)[0])
}

const ACK: [(u64, u32, u16); 1] = [(BUFFERS, 1, WRITE)];

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let ((first, first_host), (second, second_host)) = (frames(), frames());
    let mut rig = Rig::new(vec![first, second], MQ | MRG);
    assert_eq!(rig.net.features() & (MQ | MRG), MQ | MRG);
    let mut pairs = [0; 2];
    rig.net.config().get(MOST_PAIRS, &mut pairs);
    assert_eq!((pairs, rig.rings.len()), ([2, 0], 5));
    for queue in [0, 2] {
        for n in 0..4 {
            rig.offer(queue, &[(BUFFERS + 4096 * n, 2000, WRITE)]);
        }
        rig.ring(queue);
    }
    second_host.send(&frame(2, 60)).unwrap();
    rig.poll();
    assert_eq!(rig.completed(2), [], "it is not used yet");
    assert_eq!(command(&mut rig, &[4, 0, 2, 0], &ACK), (1, 0));
    rig.poll();
    assert_eq!(rig.completed(2).len(), 1);
    assert_eq!(command(&mut rig, &[4, 0, 1, 0], &ACK), (1, 0));
    first_host.send(&frame(1, 60)).unwrap();
    second_host.send(&frame(2, 60)).unwrap();
    rig.poll();
    assert_eq!((rig.completed(0).len(), rig.completed(2).len()), (1, 0));
    // What is sent on a pair that is not used goes nowhere.
    rig.offer(3, &[(BUFFERS, 100, 0)]);
    rig.ring(3);
    assert_eq!((rig.completed(3).len(), received(&second_host)), (1, None));
    assert_eq!(rig.values().errors, 1);
    // After a reset it is one pair again.
    command(&mut rig, &[4, 0, 2, 0], &ACK);
    rig.reset(MQ);
    assert!(rig.net.pairs[0].used && !rig.net.pairs[1].used);
}

#[test]
fn bad_commands_are_refused() {
    let ((first, _first), (second, _second)) = (frames(), frames());
    let mut rig = Rig::new(vec![first, second], MQ);
    let refused: [&[u8]; 9] = [
        &[4, 0, 0, 0],
        &[4, 0, 3, 0],
        &[4, 0, 0xff, 0xff],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[0xff, 0xff, 0xff, 0xff],
        &[4, 0, 1],
        &[4],
        &[],
    ];
    for (n, bytes) in (1..).zip(refused) {
        assert_eq!(command(&mut rig, bytes, &ACK), (1, 1), "{bytes:?}");
        assert_eq!(rig.values().errors, n);
    }
    // Nowhere to say so; nothing is done.
    assert_eq!(command(&mut rig, &[4, 0, 2, 0], &[]), (0, 0xee));
    assert_eq!((rig.values().errors, rig.net.pairs[1].used), (10, false));
    assert_eq!(command(&mut rig, &[4, 0, 2, 0], &ACK), (1, 0));
    // Without MQ there is one pair, and the control queue is the third.
    rig.reset(1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(rig.net.control, Some(2));
    rig.reset(0);
    assert_eq!(rig.net.control, None);
}
