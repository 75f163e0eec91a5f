//! What the rings can do besides: several of them, chains in tables of their own, notifications only
//! where they are wanted.

use super::*;

#[test]
fn each_queue_completes_its_own_requests() {
    both(|io| {
        let mut rig = Rig::on(image(), io, FLUSH, |config| config.queues = 4);
        let at = |queue: usize| DATA_AT + 512 * queue as u64;
        let header = |queue: usize| (HEADER_AT + 16 * queue as u64, 16, false);
        let status = |queue: usize| (STATUS_AT + queue as u64, 1, true);
        for queue in 0..4 {
            rig.queue = queue;
            rig.header_at(header(queue).0, VIRTIO_BLK_T_IN, 8 * queue as u64);
            rig.offer(&[header(queue), (at(queue), 512, true), status(queue)]);
        }
        // All of them are under way before one is waited for.
        for queue in [3, 0, 2, 1] {
            rig.queue = queue;
            rig.ring().unwrap();
        }
        rig.wait().unwrap();
        for queue in 0..4 {
            rig.queue = queue;
            assert_eq!((rig.used_index(), rig.take_used()), (1, 513), "queue {queue}");
        }
        let data = rig.data(4 * 512);
        let sectors = data.chunks_exact(512).map(|sector| sector[0]);
        assert_eq!(sectors.collect::<Vec<_>>(), [1, 9, 17, 25]);
    });
}

#[test]
fn a_flush_in_one_queue_is_of_what_another_completed() {
    both(|io| {
        let mut rig = Rig::on(image(), io, FLUSH, |config| config.queues = 2);
        assert_eq!(rig.write(5, &[0x77; 512]), OK);
        rig.queue = 1;
        assert_eq!(rig.flush(), OK);
        assert_eq!(rig.contents()[5 * 512..6 * 512], [0x77; 512]);
        // One that failed in one queue is known in all.
        let mut rig = Rig::on(full(), io, FLUSH, |config| config.queues = 2);
        assert_eq!(rig.flush(), IOERR);
        rig.blk.engine = Engine::new(image(), io, 8).unwrap();
        rig.reset();
        rig.queue = 1;
        assert_eq!(rig.flush(), IOERR);
    });
}

#[test]
fn a_request_in_a_table_of_its_own_is_one_like_others() {
    both(|io| {
        let mut rig = Rig::new(io);
        // More parts than a queue this size could have in many requests.
        let mut parts = vec![(HEADER_AT, 16, false)];
        parts.extend((0..64).map(|part| (DATA_AT + 64 * part, 64, true)));
        parts.push((STATUS_AT, 1, true));
        rig.header(VIRTIO_BLK_T_IN, 4);
        rig.offer_indirect(&parts);
        rig.run().unwrap();
        assert_eq!((rig.take_used(), rig.status()), (4097, OK));
        assert_eq!(rig.data(4096), pattern()[4 * 512..12 * 512]);

        rig.header(VIRTIO_BLK_T_OUT, 20);
        rig.offer_indirect(&[(HEADER_AT, 16, false), (DATA_AT, 512, false), (STATUS_AT, 1, true)]);
        rig.run().unwrap();
        assert_eq!((rig.take_used(), rig.status()), (1, OK));
        assert_eq!(rig.contents()[20 * 512..21 * 512], [5; 512]);
    });
}

#[test]
fn with_the_event_index_the_driver_hears_only_what_it_wants() {
    both(|io| {
        let mut rig = Rig::on(image(), io, FLUSH | EVENT_IDX, |_| {});
        let ring = &rig.rings[0];
        let used_event = GuestAddress(ring.available + 4 + 2 * u64::from(QUEUE_SIZE));
        let avail_event = GuestAddress(ring.used + 4 + 8 * u64::from(QUEUE_SIZE));
        // It wants to hear of the fourth.
        rig.memory.write_obj(3u16, used_event).unwrap();
        let mut told = Vec::new();
        for sector in 0..6 {
            let before = rig.counted();
            assert_eq!(rig.read(sector, 512), OK);
            rig.session.queue(0).unwrap().signal().unwrap();
            let after = rig.counted();
            told.push(after.interrupts - before.interrupts);
            // And is asked to ring for the next one, always.
            assert_eq!(rig.memory.read_obj::<u16>(avail_event).unwrap(), sector as u16 + 1);
        }
        assert_eq!(told, [0, 0, 0, 1, 0, 0]);
    });
}
