//! What a driver asks that is right.

use super::*;

#[test]
fn what_is_read_is_what_the_file_has() {
    both(|io| {
        let mut rig = Rig::new(io);
        let answer = rig.ask_parts(VIRTIO_BLK_T_IN, 2, &[(DATA_AT, 1024, true)]);
        assert_eq!(answer, (OK, 1025));
        assert_eq!(rig.data(1024), pattern()[1024..2048]);
        assert_eq!(rig.read(SECTORS - 1, 512), OK);
        assert_eq!(rig.data(512), [SECTORS as u8; 512]);
        let counted = rig.counted();
        assert_eq!((counted.requests, counted.errors, counted.bytes_to_guest), (2, 0, 1538));
    });
}

#[test]
fn what_is_written_is_in_the_file_and_nowhere_else() {
    both(|io| {
        let mut rig = Rig::new(io);
        assert_eq!(rig.write(3, &[0xcd; 1536]), OK);
        assert_eq!(rig.flush(), OK);
        let mut expected = pattern();
        expected[1536..3072].fill(0xcd);
        assert_eq!(rig.contents(), expected);
    });
}

#[test]
fn buffers_of_odd_lengths_over_two_regions_of_memory_are_one_transfer() {
    both(|io| {
        let mut rig = Rig::new(io);
        let parts = [
            (DATA_AT, 3, true),
            (SECOND_REGION - 100, 200, true),
            (DATA_AT + 0x1000, 1, true),
            (MEMORY_END - 820, 820, true),
        ];
        assert_eq!(rig.ask_parts(VIRTIO_BLK_T_IN, 5, &parts), (OK, 1025));
        let mut read = Vec::new();
        for (address, len, _) in parts {
            let mut part = vec![0; len as usize];
            rig.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            read.extend(part);
        }
        assert_eq!(read, pattern()[5 * 512..7 * 512]);

        let parts = parts.map(|(address, len, _)| (address, len, false));
        assert_eq!(rig.ask_parts(VIRTIO_BLK_T_OUT, 0, &parts), (OK, 1));
        assert_eq!(rig.contents()[..1024], pattern()[5 * 512..7 * 512]);
    });
}

#[test]
fn many_requests_at_once_are_each_completed_once() {
    both(|io| {
        let mut rig = Rig::new(io);
        for sector in 0..32u64 {
            let header = HEADER_AT + 16 * sector;
            rig.header_at(header, VIRTIO_BLK_T_IN, sector);
            let (data, status) = (DATA_AT + 512 * sector, STATUS_AT + sector);
            rig.offer(&[(header, 16, false), (data, 512, true), (status, 1, true)]);
        }
        rig.run().unwrap();
        assert_eq!(rig.used_index(), 32);
        assert_eq!(rig.data(32 * 512), pattern()[..32 * 512]);
        assert_eq!(rig.counted().errors, 0);
    });
}

#[test]
fn the_header_and_the_status_may_be_in_pieces() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.header(VIRTIO_BLK_T_IN, 1);
        // The status is the last byte of the same buffer as the end of the data.
        rig.offer(&[
            (HEADER_AT, 1, false),
            (HEADER_AT + 1, 10, false),
            (HEADER_AT + 11, 5, false),
            (DATA_AT, 500, true),
            (DATA_AT + 500, 13, true),
        ]);
        rig.run().unwrap();
        assert_eq!(rig.take_used(), 513);
        assert_eq!(rig.data(513), [&[2; 512][..], &[OK]].concat());
    });
}

#[test]
fn a_discard_and_a_write_of_zeroes_leave_zeroes_there_and_only_there() {
    both(|io| {
        let mut rig = Rig::new(io);
        assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (32, 1, 0), (9, 0, 0)]), OK);
        assert_eq!(rig.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(48, 3, 1)]), OK);
        let mut expected = pattern();
        for sectors in [8..16, 32..33, 48..51] {
            expected[sectors.start * 512..sectors.end * 512].fill(0);
        }
        assert_eq!(rig.contents(), expected);
        // A file system without FALLOC_FL_ZERO_RANGE says so.
        match rig.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(60, 4, 0)]) {
            OK => expected[60 * 512..].fill(0),
            status => assert_eq!(status, UNSUPP),
        }
        assert_eq!(rig.contents(), expected);
    });
}

#[test]
fn the_serial_number_is_told_as_far_as_there_is_room() {
    both(|io| {
        let mut rig = Rig::on(image(), io, FLUSH, |config| config.serial = "S3R1AL".to_owned());
        let answer = rig.ask_parts(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_AT, 20, true)]);
        assert_eq!(
            (answer, &rig.data(20)[..]),
            ((OK, 21), &b"S3R1AL\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
        );
        let answer = rig.ask_parts(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_AT, 4, true)]);
        assert_eq!((answer, &rig.data(4)[..]), ((OK, 5), &b"S3R1"[..]));
        let answer = rig.ask_parts(VIRTIO_BLK_T_GET_ID, 0, &[(DATA_AT, 64, true)]);
        assert_eq!(answer, (OK, 20), "what is behind is not written");
    });
}

#[test]
fn the_configuration_says_what_the_device_does() {
    let number = |config: &DeviceConfig, offset, len: usize| {
        let mut bytes = [0; 8];
        config.get(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    let rig = Rig::on(image(), DiskIo::Sync, 0, |config| config.queues = 4);
    let config = &rig.blk.config;
    let values =
        [(0, 8), (12, 4), (20, 4), (32, 1), (34, 2), (36, 4), (40, 4), (48, 4), (52, 4), (56, 1)]
            .map(|(offset, len)| number(config, offset, len));
    let (sectors, segments) = (MOST_SECTORS.into(), MOST_SEGMENTS.into());
    assert_eq!(values, [SECTORS, 254, 512, 1, 4, sectors, segments, sectors, segments, 1]);
    assert_eq!(rig.blk.queue_sizes(), [256; 4]);
    assert_ne!(rig.blk.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    for offset in [0, 8, 31, 33, 34] {
        assert!(!config.write(offset, &[1]), "{offset} is not the driver's");
    }
}
