//! A device with 257 vectors that is plugged and unplugged thousands of times.

use hv_irq::{LegacyPins, MsiVectors};

use super::{Host, Machine, Taken, msi};

const VECTORS: usize = 257;

/// Vectors a driver uses, as most do of the many a device has.
const USED: usize = 4;

/// In every such cycle the driver uses all, and the eventfds are new.
const ALL_EVERY: u32 = 50;

/// Open descriptors of this process, by what they are.
fn descriptors() -> Vec<String> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let mut names: Vec<String> = open
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|path| path.to_string_lossy().into_owned())
        // The directory that is being read.
        .filter(|name| !name.ends_with("/fd"))
        .collect();
    names.sort();
    names
}

/// Where a vector leads. Two of them share a number: a local APIC has fewer.
fn target(i: usize) -> Taken {
    ((i % 2) as u32, 0x30 + (i / 2) as u8)
}

/// Plugs and unplugs a device `cycles` times. All that the router, KVM and the process have is at the
/// end as it was at the start, and each device interrupts.
pub(crate) fn plug_and_unplug<H: Host>(host: &H, cycles: u32) {
    let mut machine = Machine::new(host, LegacyPins::Kernel);
    let router = machine.router();
    let mut events = machine.events(VECTORS);
    let (state, routes, open) = (router.save(), router.routes(), descriptors());
    let (tables, irqfds) = (machine.tables(), machine.irqfds());
    let mut bound = 0;
    for cycle in 0..cycles {
        let used = if cycle % ALL_EVERY == 0 {
            events = machine.events(VECTORS);
            VECTORS
        } else {
            USED
        };
        let mut device = MsiVectors::new(&router, events.iter().cloned());
        device
            .change(|change| {
                change.enable();
                for i in 0..VECTORS {
                    change.retarget(i, msi(target(i).0, target(i).1))?;
                    if i < used {
                        change.unmask(i)?;
                    }
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(router.allocated().len(), used, "masked vectors have no GSI");
        bound += used as u64;
        // The last of those in use.
        events[used - 1].signal();
        machine.expect([target(used - 1)], "a device that was just plugged");
        drop(device);
        assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    }
    machine.expect([], "without a device");
    let cycles = u64::from(cycles);
    assert_eq!(machine.tables() - tables, 2 * cycles, "one to plug, one to unplug");
    assert_eq!(machine.irqfds() - irqfds, 2 * bound, "what is bound is unbound");
    assert_eq!((router.save(), router.routes()), (state, routes));
    assert_eq!(descriptors(), open);
    host.assert_unbound(machine.vm.inner(), &events);
}
