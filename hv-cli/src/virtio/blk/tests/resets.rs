//! The end of a session, at any time.

use super::*;

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
