#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]
//! Ten thousand times a device of 257 vectors comes and goes, on the KVM in memory. The only test of
//! its process, since it counts descriptors.

mod common;

use std::fs;

use common::{Machine, msi};
use hv_core::Gsi;
use hv_core::fake::FakeKvm;
use hv_irq::{LegacyPins, MsiVectors};

const CYCLES: u64 = 10_000;
const VECTORS: usize = 257;

/// Where the descriptors of this process lead, which for eventfds says only that they are some.
fn descriptors() -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
    let paths = fs::read_dir("/proc/self/fd").unwrap().filter_map(name);
    let mut names: Vec<String> = paths.map(|path| path.display().to_string()).collect();
    names.sort_unstable();
    names
}

#[test]
fn plugs_and_unplugs_leave_nothing() {
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let (start, tables) = (router.save(), machine.tables());
    let (routes, held) = (machine.view.routes(), descriptors());
    let events = machine.events(VECTORS);
    for cycle in 0..CYCLES {
        // An irqfd costs the KVM in memory some time, so a debug build opens all vectors now and then.
        let all = !cfg!(debug_assertions) || cycle % 100 == 0;
        let mut device = MsiVectors::new(&router, events.iter().cloned());
        device
            .change(|change| {
                change.enable();
                for i in 0..VECTORS {
                    change.retarget(i, msi(0, 0x40))?;
                    if all || i % 64 == 0 {
                        change.unmask(i)?;
                    }
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(device.gsi(0), Ok(Some(Gsi(24))));
    }
    assert_eq!(machine.tables() - tables, 2 * CYCLES, "one to plug, one to unplug");
    assert_eq!(router.save(), start);
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    assert!(machine.view.irqfds().is_empty());
    assert_eq!((router.routes(), machine.view.routes()), (routes.clone(), routes));
    drop(events);
    assert_eq!(descriptors(), held);
    assert_eq!((kvm.live().irqfds, kvm.live().eventfds), (0, 0));
    assert_eq!(kvm.findings(), []);
}
