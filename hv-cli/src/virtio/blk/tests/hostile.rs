//! What a driver does wrong, or with intent.

use super::*;

#[test]
fn a_header_that_is_too_short_fails() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.header(VIRTIO_BLK_T_IN, 0);
        rig.offer(&[(HEADER_AT, 15, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
        rig.run().unwrap();
        assert_eq!((rig.take_used(), rig.status()), (0, IOERR));
        rig.header(VIRTIO_BLK_T_IN, 0);
        rig.offer(&[(STATUS_AT, 1, true)]);
        rig.run().unwrap();
        assert_eq!((rig.take_used(), rig.status()), (1, IOERR));
        assert_eq!(rig.counted().errors, 2);
        assert_eq!(rig.read(0, 512), OK, "the next one is none the worse");
    });
}

#[test]
fn a_request_without_a_status_byte_needs_a_reset() {
    both(|io| {
        for kind in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, 77] {
            let mut rig = Rig::new(io);
            rig.header(kind, 0);
            rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 512, false)]);
            let error = rig.run().unwrap_err();
            let too_short = ChainError::TooShort;
            let expected = QueueError::Chain { queue: 0, head: 0, error: too_short };
            assert_eq!(error, DeviceError::Queue(expected));
            assert_eq!(rig.contents(), pattern(), "nothing was done");
            rig.reset();
            assert_eq!(rig.read(0, 512), OK);
        }
    });
}

#[test]
fn lengths_that_are_no_sectors_fail_and_do_nothing() {
    both(|io| {
        let mut rig = Rig::new(io);
        for len in [1, 511, 513, 1000] {
            assert_eq!(rig.read(0, len), IOERR);
            assert_eq!(rig.write(0, &vec![0xee; len as usize]), IOERR);
        }
        assert_eq!(rig.contents(), pattern());
        assert_eq!(rig.counted().errors, 8);
        assert_eq!(rig.ask_parts(VIRTIO_BLK_T_IN, 0, &[]), (OK, 1), "nothing is no sectors");
        assert_eq!(rig.ask_parts(VIRTIO_BLK_T_OUT, SECTORS, &[]), (OK, 1));
    });
}

#[test]
fn ranges_past_the_end_or_that_overflow_fail_and_do_nothing() {
    both(|io| {
        let mut rig = Rig::new(io);
        let sectors =
            [SECTORS, SECTORS - 1, 1 << 54, 1 << 55, u64::MAX / 512, u64::MAX - 1, u64::MAX];
        for sector in sectors {
            assert_eq!(rig.read(sector, 1024), IOERR, "{sector}");
            assert_eq!(rig.write(sector, &[0xee; 1024]), IOERR, "{sector}");
            for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
                assert_eq!(rig.segments(kind, &[(sector, 2, 0)]), IOERR, "{sector}");
            }
        }
        assert_eq!(rig.contents(), pattern());
    });
}

#[test]
fn a_read_only_disk_is_not_changed_whatever_is_asked() {
    both(|io| {
        let mut rig = Rig::read_only(io);
        assert_eq!(rig.write(0, &[0xee; 512]), IOERR);
        assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IOERR);
        assert_eq!(rig.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
        assert_eq!((rig.flush(), rig.read(0, 512)), (OK, OK));
        assert_eq!(rig.contents(), pattern());
        let writing = FLUSH | WCE | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(rig.blk.features() & (writing | 1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
    });
}

#[test]
fn segments_with_flags_that_do_not_exist_are_unsupported_and_nothing_is_done() {
    both(|io| {
        let mut rig = Rig::new(io);
        for flags in [1, 2, 1 << 31, u32::MAX] {
            let segments = [(0, 8, 0), (8, 8, flags)];
            assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, &segments), UNSUPP);
        }
        for flags in [2, 3, u32::MAX] {
            assert_eq!(rig.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, flags)]), UNSUPP);
        }
        assert_eq!(rig.contents(), pattern());
    });
}

#[test]
fn segments_that_are_too_many_too_long_or_none_fail_and_nothing_is_done() {
    both(|io| {
        let mut rig = Rig::new(io);
        let too_many = vec![(0, 1, 0); MOST_SEGMENTS as usize + 1];
        for segments in [&too_many[..], &[], &[(0, MOST_SECTORS + 1, 0)], &[(0, u32::MAX, 0)]] {
            assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, segments), IOERR);
            assert_eq!(rig.segments(VIRTIO_BLK_T_WRITE_ZEROES, segments), IOERR);
        }
        for len in [1, 15, 17, 31] {
            let part = [(DATA_AT, len, false)];
            assert_eq!(rig.ask_parts(VIRTIO_BLK_T_DISCARD, 0, &part).0, IOERR);
        }
        assert_eq!(rig.contents(), pattern());
        let most = vec![(0, 1, 0); MOST_SEGMENTS as usize];
        assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, &most), OK);
    });
}

#[test]
fn requests_that_do_not_exist_are_unsupported() {
    both(|io| {
        let mut rig = Rig::new(io);
        for kind in [2, 3, VIRTIO_BLK_T_SECURE_ERASE, 15, 1 << 31, u32::MAX] {
            assert_eq!(rig.ask_parts(kind, 0, &[(DATA_AT, 512, true)]), (UNSUPP, 0));
        }
        assert_eq!(rig.contents(), pattern());
    });
}

#[test]
fn a_request_offered_again_while_it_is_under_way_is_bounded() {
    // Nothing ever comes out of a pipe that is empty, so each of these stays under way.
    let Ok(engine) = Engine::new(image(), DiskIo::Uring, QUEUE_SIZE.into()) else {
        eprintln!("SKIPPED: this host refuses io_uring");
        return;
    };
    drop(engine);
    let (reader, writer) = std::io::pipe().unwrap();
    let file = File::from(std::os::fd::OwnedFd::from(reader));
    let mut rig = Rig::on(file, DiskIo::Uring, FLUSH, |_| {});
    rig.header(VIRTIO_BLK_T_IN, 0);
    rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
    let mut result = rig.ring();
    for _ in 0..QUEUE_SIZE {
        // Every place of the ring has the same descriptor.
        rig.offer_head(0);
        result = rig.ring();
        if result.is_err() {
            break;
        }
    }
    assert!(matches!(result, Err(DeviceError::Driver(_))), "{result:?}");
    assert_eq!(rig.blk.under_way, [QUEUE_SIZE]);
    // All of them end now, with nothing read.
    drop(writer);
    rig.blk.reset();
}
