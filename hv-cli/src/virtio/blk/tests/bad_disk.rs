//! Files that fail.

use hv_core::Errno;

use super::*;

#[test]
fn a_file_that_gets_shorter_fails_its_reads_and_lives() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.file.set_len(10 * 512 + 100).unwrap();
        assert_eq!(rig.read(9, 512), OK);
        // What there was of it was read, and that much is told.
        let answer = rig.ask_parts(VIRTIO_BLK_T_IN, 9, &[(DATA_AT, 2048, true)]);
        assert_eq!(answer, (IOERR, 612));
        assert_eq!(rig.read(40, 512), IOERR);
        assert_eq!(rig.write(40, &[7; 512]), OK, "it gets longer again");
        assert_eq!(rig.read(40, 512), OK);
        assert_eq!(rig.data(512), [7; 512]);
    });
}

#[test]
fn a_full_disk_fails_writes_and_lives() {
    both(|io| {
        let mut rig = Rig::on(full(), io, FLUSH, |_| {});
        assert_eq!(rig.write(0, &[1; 512]), IOERR);
        assert_eq!(rig.write(8, &[1; 4096]), IOERR);
        assert_eq!(rig.read(0, 512), OK, "of zeroes");
        assert_eq!(rig.counted().errors, 2);
    });
}

#[test]
fn an_input_output_error_fails_the_read_and_the_device_lives() {
    both(|io| {
        // Nothing is mapped at address 0, and reading that of a process is EIO.
        let file = File::open("/proc/self/mem").unwrap();
        assert_eq!(file.read_at(&mut [0; 8], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
        let mut rig = Rig::on(file, io, FLUSH, |_| {});
        assert_eq!(rig.read(0, 4096), IOERR);
        assert_eq!(rig.read(1, 512), IOERR);
        assert_eq!(rig.counted().errors, 2);
    });
}

#[test]
fn an_error_of_a_write_that_was_to_be_safe_may_have_lost_others() {
    let mut rig = Rig::new(DiskIo::Sync);
    let mut lost = |durable, errno| {
        rig.header(VIRTIO_BLK_T_OUT, 0);
        rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 512, false), (STATUS_AT, 1, true)]);
        let chain = rig.session.queue(0).unwrap().pop().unwrap().unwrap();
        let job = Job::write(chain, 0, 0, Durable(durable)).unwrap();
        match job.advance(Err(errno)) {
            ControlFlow::Break(ended) => (ended.result, ended.lost),
            ControlFlow::Continue(_) => panic!("it goes on"),
        }
    };
    assert_eq!(lost(true, Errno::EIO), (Err(Failure::Io), true));
    // It had no room, or there is a cache that a flush has yet to write.
    assert_eq!(lost(true, Errno::ENOSPC), (Err(Failure::Io), false));
    assert_eq!(lost(false, Errno::EIO), (Err(Failure::Io), false));
}

#[test]
fn a_file_that_gets_longer_is_no_longer_disk() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.file.set_len(2 * SECTORS * 512).unwrap();
        assert_eq!(rig.read(SECTORS - 1, 512), OK);
        assert_eq!(rig.read(SECTORS, 512), IOERR);
        assert_eq!(rig.write(SECTORS - 1, &[1; 1024]), IOERR);
        assert_eq!(rig.contents()[SECTORS as usize * 512..], [0; SECTORS as usize * 512]);
    });
}

#[test]
fn what_can_not_make_holes_says_so() {
    both(|io| {
        let mut rig = Rig::on(full(), io, FLUSH, |_| {});
        let status = rig.segments(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]);
        assert!(status == UNSUPP || status == IOERR, "{status}");
    });
}
