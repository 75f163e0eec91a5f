//! What is safe when.

use super::*;

#[test]
fn a_flush_is_a_sync_and_after_one_that_failed_none_succeeds() {
    both(|io| {
        let mut rig = Rig::on(full(), io, FLUSH, |_| {});
        assert_eq!(rig.flush(), IOERR, "this file can't be synced");
        // Even if the next sync would succeed, and the driver starts over.
        rig.blk.engine = Engine::new(image(), io, 8).unwrap();
        rig.reset();
        assert_eq!(rig.write(0, &[1; 512]), OK);
        assert_eq!(rig.flush(), IOERR);
    });
}

#[test]
fn writes_are_durable_unless_the_driver_can_flush_and_wants_a_cache() {
    let writes = |features, change: &dyn Fn(&mut DiskConfig)| {
        let rig = Rig::on(image(), DiskIo::Sync, features, change);
        (rig.blk.writes, rig.blk.writes_are_durable())
    };
    assert_eq!(writes(0, &|_| {}), (Writes::Durable, true));
    assert_eq!(writes(WCE, &|_| {}), (Writes::Durable, true));
    assert_eq!(writes(FLUSH, &|_| {}), (Writes::Cached, false));
    assert_eq!(writes(FLUSH | WCE, &|_| {}), (Writes::AsConfigured, false));
    let writethrough = |config: &mut DiskConfig| config.cache = CacheMode::Writethrough;
    assert_eq!(writes(0, &writethrough), (Writes::Durable, true));
    let rig = Rig::on(image(), DiskIo::Sync, 0, writethrough);
    assert_eq!(rig.blk.features() & (FLUSH | WCE), 0);
    assert!(!rig.blk.config.write(WRITEBACK, &[1]), "there is no cache to switch on");
}

#[test]
fn the_driver_switches_the_cache_off_and_what_was_written_is_safe() {
    both(|io| {
        let mut rig = Rig::on(image(), io, FLUSH | WCE, |_| {});
        assert!(rig.blk.config.write(WRITEBACK, &[0]));
        assert!(rig.blk.writes_are_durable(), "from the next request on");
        rig.blk.config_written(&mut rig.session).unwrap();
        assert_eq!(rig.counted().errors, 0);
        assert_eq!(rig.write(0, &[1; 1024]), OK);
        assert_eq!(rig.segments(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0)]), OK);
        rig.blk.config.write(WRITEBACK, &[1]);
        assert!(!rig.blk.writes_are_durable());
        rig.blk.config.write(WRITEBACK, &[0]);
        rig.reset();
        assert!(rig.blk.has_writeback(), "the next driver starts anew");

        let mut rig = Rig::on(full(), io, FLUSH | WCE, |_| {});
        rig.blk.config.write(WRITEBACK, &[0]);
        rig.blk.config_written(&mut rig.session).unwrap();
        assert_eq!((rig.counted().errors, rig.flush()), (1, IOERR), "it can't be synced");
    });
}
