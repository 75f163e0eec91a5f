//! Files that fail.

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
fn what_can_not_make_holes_says_so() {
    both(|io| {
        let mut rig = Rig::on(full(), io, FLUSH, |_| {});
        let status = rig.segments(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]);
        assert!(status == UNSUPP || status == IOERR, "{status}");
    });
}
