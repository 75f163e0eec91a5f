//! The end of a session, at any time.

use super::*;
use crate::virtio::blk::job::Op;

#[test]
fn a_reset_waits_for_what_is_under_way() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.memory.write_slice(&[9; 4096], GuestAddress(DATA_AT)).unwrap();
        for round in 0..50 {
            rig.header(VIRTIO_BLK_T_OUT, 8);
            rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 4096, false), (STATUS_AT, 1, true)]);
            rig.header(VIRTIO_BLK_T_OUT, 8);
            rig.ring().unwrap();
            rig.blk.reset();
            // From here on the guest may use its memory for something else, and the file is still.
            let before = rig.contents();
            assert_eq!(before[8 * 512..16 * 512], [9; 4096], "round {round}");
            rig.reset();
        }
    });
}

/// A driver can ask for gigabytes at once; it is done in pieces, so that the end of a machine never waits for
/// much.
#[test]
fn a_long_request_is_done_in_pieces() {
    let mut rig = Rig::new(DiskIo::Sync);
    rig.header(VIRTIO_BLK_T_IN, 0);
    let parts = vec![(DATA_AT, 0x5_0000, true); 32];
    let chain = [&[(HEADER_AT, 16, false)], &parts[..], &[(STATUS_AT, 1, true)]].concat();
    rig.offer(&chain);
    let chain = rig.session.queue(0).unwrap().pop().unwrap().unwrap();
    let mut job = Job::read(chain, 0, 0).unwrap();
    let (mut total, mut pieces) = (0, 0);
    loop {
        let Some(Op::Read { offset, parts }) = job.op() else { panic!("something is left") };
        let bytes: usize = parts.iter().map(|part| part.iov_len).sum();
        assert_eq!(offset as usize, total);
        assert!((1..=1 << 20).contains(&bytes), "{bytes} at once");
        (total, pieces) = (total + bytes, pieces + 1);
        match job.advance(Ok(bytes)) {
            ControlFlow::Continue(next) => job = next,
            ControlFlow::Break(ended) => {
                assert_eq!((ended.written as usize, total), (32 * 0x5_0000, 32 * 0x5_0000));
                break;
            }
        }
    }
    assert!(pieces >= 10, "{pieces}");
}

/// What a driver asked for is not begun any more when the machine ends.
#[test]
fn nothing_is_begun_when_the_machine_ends() {
    both(|io| {
        let mut rig = Rig::new(io);
        // 32 times the same 320 KiB, from a file that is long enough.
        rig.file.set_len(16 << 20).unwrap();
        rig.blk.geometry.sectors = (16 << 20) / 512;
        let parts = vec![(DATA_AT, 0x5_0000, true); 32];
        rig.header(VIRTIO_BLK_T_IN, 0);
        let chain = [&[(HEADER_AT, 16, false)], &parts[..], &[(STATUS_AT, 1, true)]].concat();
        rig.offer(&chain);
        rig.session.stopping.store(true, std::sync::atomic::Ordering::Relaxed);
        rig.ring().unwrap();
        assert_eq!(rig.blk.under_way.iter().sum::<u16>(), 0, "nothing was begun");
    });
}

#[test]
fn a_device_that_goes_waits_for_what_is_under_way() {
    both(|io| {
        let mut rig = Rig::new(io);
        for sector in 0..16 {
            rig.header(VIRTIO_BLK_T_IN, 8);
            let data = DATA_AT + 512 * sector;
            rig.offer(&[(HEADER_AT, 16, false), (data, 512, true), (STATUS_AT, 1, true)]);
        }
        rig.ring().unwrap();
        let (memory, blk) = (Arc::downgrade(&rig.memory), rig.blk);
        drop((rig.session, rig.memory));
        drop(blk);
        assert!(memory.upgrade().is_none(), "no request keeps it");
    });
}
