#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that can't go on fails"
)]
//! Devices, guests and vCPUs on many threads, on the KVM in memory: no event is lost or doubled.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, msi};
use hv_core::fake::FakeKvm;
use hv_irq::{Ioapic, LegacyPins, MsiVectors};

/// Waits for what has to happen. If it does not within two minutes, nobody has to go on.
fn wait_until(over: &AtomicBool, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        if start.elapsed() > Duration::from_secs(120) {
            over.store(true, Ordering::Release);
            panic!("an event is lost");
        }
        thread::yield_now();
    }
}

/// Devices signal, guests mask and retarget, others plug and unplug: a device signals again when its
/// last interrupt has arrived, so that each one counts.
#[test]
fn no_event_is_lost_or_doubled_whatever_happens_meanwhile() {
    const DEVICES: usize = 4;
    const ROUNDS: u32 = 300;
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let arrived: Vec<AtomicU32> = (0..DEVICES).map(|_| AtomicU32::new(0)).collect();
    let over = AtomicBool::new(false);
    let devices: Vec<Mutex<MsiVectors<_>>> = (0..DEVICES)
        .map(|i| {
            let mut vectors = MsiVectors::new(&router, machine.events(1));
            vectors
                .change(|change| {
                    change.enable();
                    change.retarget(0, msi(0, 0x40 + i as u8))
                })
                .unwrap();
            Mutex::new(vectors)
        })
        .collect();
    let lock = |i: usize| devices[i].lock().unwrap_or_else(PoisonError::into_inner);

    thread::scope(|scope| {
        // The vCPUs.
        for vcpu in 0..2 {
            let (machine, arrived, over) = (&machine, &arrived, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    for vector in machine.taken(vcpu) {
                        arrived[usize::from(vector - 0x40)].fetch_add(1, Ordering::AcqRel);
                    }
                    thread::yield_now();
                }
            });
        }
        // The guest's driver, and devices that come and go.
        for i in 0..DEVICES {
            let (lock, over) = (&lock, &over);
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::Acquire) {
                    lock(i).unmask(0).unwrap();
                    thread::yield_now();
                    round += 1;
                    let message = msi((round % 2) as u8, 0x40 + i as u8);
                    let mut vectors = lock(i);
                    match round % 3 {
                        0 => vectors.mask(0).unwrap(),
                        1 => vectors.retarget(0, message).unwrap(),
                        _ => vectors.disable().and_then(|()| vectors.enable()).unwrap(),
                    }
                }
                lock(i).unmask(0).unwrap();
            });
        }
        {
            let (router, machine, over) = (&router, &machine, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let mut other = MsiVectors::new(router, machine.events(8));
                    other
                        .change(|change| {
                            change.enable();
                            (0..8).try_for_each(|i| change.unmask(i))
                        })
                        .unwrap();
                }
            });
        }
        // The devices.
        let signalling: Vec<_> = (0..DEVICES)
            .map(|i| {
                let event = lock(i).event(0).unwrap().clone();
                let (arrived, over) = (&arrived, &over);
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        event.signal();
                        wait_until(over, || arrived[i].load(Ordering::Acquire) >= round);
                    }
                })
            })
            .collect();
        for device in signalling {
            device.join().unwrap();
        }
        over.store(true, Ordering::Release);
    });
    for vcpu in 0..2 {
        assert!(machine.taken(vcpu).is_empty(), "none too many");
    }
    for count in &arrived {
        assert_eq!(count.load(Ordering::Acquire), ROUNDS);
    }
    drop(devices);
    assert!(router.allocated().is_empty());
    assert_eq!(machine.view.routes().len(), 38);
    assert_eq!(kvm.findings(), []);
}

/// The same for level-triggered pins of a split irqchip: the I/O APIC, its guest and the devices all
/// on their own threads. A device is satisfied by one interrupt each time it raises its pin.
#[test]
fn no_level_hangs_whatever_the_guest_does_to_its_pin() {
    const ROUNDS: u32 = 300;
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Userspace);
    let ioapic = Ioapic::new(machine.router()).unwrap();
    let set = |low: u32| {
        ioapic.write(0, &[0x10 + 2 * 10]).unwrap();
        ioapic.write(0x10, &low.to_le_bytes()).unwrap();
    };
    let pin = ioapic.bind_level(10, machine.event(), machine.event()).unwrap();
    let (served, over) = (AtomicU32::new(0), AtomicBool::new(false));
    set(0x8041);
    thread::scope(|scope| {
        let (ioapic, machine, served, over, pin) = (&ioapic, &machine, &served, &over, &pin);
        scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                for vector in machine.taken(0) {
                    served.fetch_add(1, Ordering::AcqRel);
                    machine.view.end_of_interrupt(0, vector);
                    // The exit it makes.
                    ioapic.eoi(vector).unwrap();
                }
                thread::yield_now();
            }
        });
        scope.spawn(move || {
            let mut vector = 0x41;
            while !over.load(Ordering::Acquire) {
                set(0x1_8000 | vector);
                thread::yield_now();
                vector = if vector == 0x41 { 0x52 } else { 0x41 };
                set(0x8000 | vector);
                thread::yield_now();
            }
        });
        let device = scope.spawn(move || {
            for _ in 0..ROUNDS {
                let before = served.load(Ordering::Acquire);
                pin.raise();
                // Asked again at each end, as the level would be: raised until it was served.
                wait_until(over, || {
                    let is_served = || served.load(Ordering::Acquire) != before;
                    if pin.take_end() && !is_served() {
                        pin.raise();
                    }
                    is_served()
                });
            }
        });
        device.join().unwrap();
        over.store(true, Ordering::Release);
    });
    assert!(served.load(Ordering::Acquire) >= ROUNDS);
    assert_eq!(kvm.findings(), []);
}

/// Devices that wait for nobody: each leaves word of what it did and signals, and a handler reads all
/// there is. So events may meet, but when all is quiet, what a handler has not read is still waiting,
/// and no handler ran without a signal.
#[test]
fn what_was_signalled_is_delivered_or_waits() {
    const DEVICES: usize = 6;
    const SIGNALS: u32 = 2_000;
    let kvm = FakeKvm::default();
    let machine = Machine::new(&kvm, LegacyPins::Kernel);
    let router = machine.router();
    let counters = || -> Vec<AtomicU32> { (0..DEVICES).map(|_| AtomicU32::new(0)).collect() };
    let (done, read, handled) = (counters(), counters(), counters());
    let devices: Vec<Mutex<MsiVectors<_>>> = (0..DEVICES)
        .map(|i| {
            let mut vectors = MsiVectors::new(&router, machine.events(1));
            vectors
                .change(|change| {
                    change.enable();
                    change.unmask(0)?;
                    change.retarget(0, msi(0, 0x40 + i as u8))
                })
                .unwrap();
            Mutex::new(vectors)
        })
        .collect();
    let lock = |i: usize| devices[i].lock().unwrap_or_else(PoisonError::into_inner);
    // The line has a level, whose ends the vCPUs tell.
    machine.program_pin(20, 0x8039);
    let line = router.bind_level(hv_core::Gsi(20), machine.event(), machine.event()).unwrap();
    let handle = |vcpu: u32| {
        for vector in machine.taken(vcpu) {
            if vector == 0x39 {
                machine.view.end_of_interrupt(vcpu, vector);
                continue;
            }
            let i = usize::from(vector - 0x40);
            handled[i].fetch_add(1, Ordering::AcqRel);
            read[i].fetch_max(done[i].load(Ordering::Acquire), Ordering::AcqRel);
        }
    };
    let left = AtomicU32::new(DEVICES as u32);
    thread::scope(|scope| {
        let (lock, handle, left, line, router) = (&lock, &handle, &left, &line, &router);
        for vcpu in 0..2 {
            scope.spawn(move || {
                while left.load(Ordering::Acquire) > 0 {
                    handle(vcpu);
                    if line.take_end() {
                        line.raise();
                    }
                }
            });
        }
        line.raise();
        // The guest's drivers.
        for i in 0..DEVICES {
            scope.spawn(move || {
                for round in 0_u32.. {
                    if left.load(Ordering::Acquire) == 0 {
                        break;
                    }
                    let vector = 0x40 + i as u8;
                    let changed = match round % 4 {
                        0 => lock(i).mask(0),
                        1 => lock(i).retarget(0, msi((round / 4 % 2) as u8, vector)),
                        2 => lock(i).unmask(0),
                        _ => lock(i).change(|change| {
                            change.retarget(0, msi((round / 4 % 2) as u8, vector))
                        }),
                    };
                    changed.unwrap();
                }
            });
        }
        // Somebody else's routes.
        scope.spawn(move || {
            while left.load(Ordering::Acquire) > 0 {
                let routes: Result<Vec<_>, _> =
                    router.batch(|batch| (0..8).map(|_| batch.add_msi(msi(1, 0x41))).collect());
                let change = |route| router.batch(|batch| batch.set_msi(route, msi(0, 0x41)));
                routes.unwrap().iter().try_for_each(change).unwrap();
            }
        });
        for i in 0..DEVICES {
            let event = lock(i).event(0).unwrap().clone();
            let done = &done;
            scope.spawn(move || {
                for n in 1..=SIGNALS {
                    done[i].store(n, Ordering::Release);
                    event.signal();
                }
                left.fetch_sub(1, Ordering::AcqRel);
            });
        }
    });
    (0..2).for_each(handle);
    let mut waiting = 0;
    for i in 0..DEVICES {
        let is_pending = lock(i).is_pending(0).unwrap();
        let up_to_date = read[i].load(Ordering::Acquire) == SIGNALS;
        assert!(up_to_date || is_pending, "device {i}");
        waiting += u32::from(is_pending);
        let before = handled[i].load(Ordering::Acquire);
        lock(i).unmask(0).unwrap();
        (0..2).for_each(handle);
        let now = handled[i].load(Ordering::Acquire);
        assert_eq!(now - before, u32::from(is_pending), "once, if it waited");
        assert_eq!(read[i].load(Ordering::Acquire), SIGNALS);
        assert!(now <= SIGNALS, "device {i} was handled {now} times");
    }
    assert!(waiting <= DEVICES as u32);
    drop((devices, line));
    assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    assert_eq!(kvm.findings(), []);
}
