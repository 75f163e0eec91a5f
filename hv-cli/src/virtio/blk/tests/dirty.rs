//! What a disk is read into is among the dirty pages: the kernel writes there past vm-memory.

use std::collections::BTreeSet;

use hv_core::fake::FakeKvm;
use hv_core::{HostRange, Hypervisor, SlotFlags};
use hv_memory::{DirtyPages, DirtyTracking, NewSlot, Slot, SlotLimits, SlotManager};

use super::*;

const PAGE: u64 = 4096;

/// The memory of a device in slots that log.
struct Logged<V: hv_core::MemoryBackend> {
    manager: SlotManager<V>,
    _slots: Vec<Slot<V>>,
}

impl<V: hv_core::MemoryBackend> Logged<V> {
    /// The pages written since the last time.
    fn dirty(&self) -> BTreeSet<u64> {
        let mut pages = DirtyPages::new();
        self.manager.harvest_dirty(&mut pages).unwrap();
        let numbers = |range: hv_memory::GuestRange| range.start().0 / PAGE..=range.last().0 / PAGE;
        pages.ranges().flat_map(numbers).collect()
    }
}

fn log(rig: &Rig) -> Logged<impl hv_core::MemoryBackend + use<>> {
    let vm = Arc::new(FakeKvm::default().create_vm(0).unwrap());
    let limits = SlotLimits { slots: 8, address_bits: 36 };
    let (manager, _) = SlotManager::adopt::<&str>(vm, [], limits).unwrap();
    manager.track_dirty(DirtyTracking::Log).unwrap();
    let starts = [0, SECOND_REGION].map(GuestAddress);
    let slots = starts.into_iter().zip(&rig.mappings).map(|(guest, mapping)| {
        let len = mapping.region().size();
        let host = HostRange::new(mapping.clone(), 0, len).unwrap();
        let flags = SlotFlags { log_dirty: true, readonly: false };
        manager.add(NewSlot { name: "RAM".into(), guest, host, flags }).unwrap()
    });
    let slots = slots.collect();
    let logged = Logged { manager, _slots: slots };
    logged.dirty();
    logged
}

/// The pages a completed request always writes: the status and the used ring.
fn always(rig: &Rig) -> BTreeSet<u64> {
    [STATUS_AT / PAGE, rig.rings[0].used / PAGE].into()
}

#[test]
fn what_a_read_fills_is_dirty_in_all_its_buffers() {
    both(|io| {
        let mut rig = Rig::new(io);
        let logged = log(&rig);
        rig.header(VIRTIO_BLK_T_IN, 0);
        rig.offer(&[
            (HEADER_AT, 16, false),
            (DATA_AT + 100, 2 * PAGE as u32, true),
            // Over the end of a region.
            (SECOND_REGION - 512, 1024, true),
            (MEMORY_END - 1024, 1024, true),
            (STATUS_AT, 1, true),
        ]);
        let driver = logged.dirty();
        assert!(!driver.contains(&(DATA_AT / PAGE)));
        rig.run().unwrap();
        assert_eq!(rig.status(), OK);
        let first = DATA_AT / PAGE;
        let data = [first, first + 1, first + 2, SECOND_REGION / PAGE - 1, SECOND_REGION / PAGE];
        let last = MEMORY_END / PAGE - 1;
        let mut expected = always(&rig);
        expected.extend(data.into_iter().chain([last]));
        let found: BTreeSet<u64> = logged.dirty();
        assert!(found.is_superset(&expected), "{found:?} has not all of {expected:?}");
        let rings = rig.rings[0].descriptors / PAGE..=rig.rings[0].used / PAGE;
        assert!(found.difference(&expected).all(|page| rings.contains(page)), "{found:?}");
    });
}

#[test]
fn what_a_write_takes_is_not_dirty() {
    both(|io| {
        let mut rig = Rig::new(io);
        let logged = log(&rig);
        rig.header(VIRTIO_BLK_T_OUT, 0);
        rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 8192, false), (STATUS_AT, 1, true)]);
        logged.dirty();
        rig.run().unwrap();
        let found = logged.dirty();
        assert!(found.is_superset(&always(&rig)), "{found:?}");
        assert!(!found.contains(&(DATA_AT / PAGE)) && !found.contains(&(DATA_AT / PAGE + 1)));
    });
}

#[test]
fn what_a_read_that_failed_may_have_filled_is_dirty() {
    both(|io| {
        let mut rig = Rig::new(io);
        rig.file.set_len(512).unwrap();
        let logged = log(&rig);
        assert_eq!(rig.read(0, 8192), IOERR);
        let found = logged.dirty();
        assert!(found.contains(&(DATA_AT / PAGE)), "{found:?}");
    });
}

#[test]
fn what_a_read_fills_while_its_device_is_reset_is_dirty() {
    both(|io| {
        let mut rig = Rig::new(io);
        let logged = log(&rig);
        rig.header(VIRTIO_BLK_T_IN, 3);
        rig.offer(&[(HEADER_AT, 16, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
        let chain = rig.session.queue(0).unwrap().pop().unwrap().unwrap();
        let job = Job::read(chain, 0, 3 * 512).unwrap();
        logged.dirty();
        rig.blk.engine.start(job);
        rig.blk.engine.submit().unwrap();
        rig.blk.reset();
        assert_eq!(rig.data(512), [4; 512], "it was waited for");
        assert!(logged.dirty().contains(&(DATA_AT / PAGE)));
    });
}
