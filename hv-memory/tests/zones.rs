//! Coalesced zones on the KVM in memory: sequences of operations with failures injected, against a
//! naive model; and the order in which what was collected is handed out.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that can't go on fails")]

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use hv_core::fake::{FakeHost, FakeKvm, FakeVm, Finding, GuestStep, VmView, Wrote};
use hv_core::layer::{Faults, Interceptor, Layered, LayeredVm};
use hv_core::{
    Capability, CoalescedWrite, CoalescedZone, Errno, Hypervisor, IoAddress, Ioctl, Vcpu, VcpuExit,
    Vm,
};
use hv_memory::{CoalescedZones, ZoneError, ZoneHandle, ZoneSupport};
use proptest::prelude::*;

const ALL: ZoneSupport = ZoneSupport { memory: true, ports: true };

type FaultyVm = LayeredVm<FakeVm, Faults>;

fn zone(address: IoAddress, size: u32) -> CoalescedZone {
    CoalescedZone { address, size }
}

fn mmio(address: u64, size: u32) -> CoalescedZone {
    zone(IoAddress::Mmio(address), size)
}

/// A VM whose calls may fail, what is seen of it, and what KVM lets pass.
struct World {
    kvm: Layered<FakeKvm, Faults>,
    vm: Arc<FaultyVm>,
    view: VmView,
}

impl World {
    fn new(faults: &Faults) -> Self {
        let kvm = faults.over(FakeKvm::default());
        let vm = loop {
            // Not what is tested.
            if let Ok(vm) = kvm.create_vm(0) {
                break vm;
            }
        };
        let view = vm.inner().view();
        Self { kvm, vm: Arc::new(vm), view }
    }

    fn zones(&self) -> CoalescedZones<FaultyVm> {
        CoalescedZones::new(self.vm.clone(), ALL)
    }

    /// What KVM has, sorted.
    fn kvm_has(&self) -> Vec<(IoAddress, u32)> {
        let mut all: Vec<_> =
            self.view.coalesced_zones().iter().map(|zone| (zone.address, zone.size)).collect();
        all.sort_unstable();
        all
    }

    fn findings(&self) -> Vec<Finding> {
        self.kvm.inner().findings()
    }
}

/// What the registry says KVM has.
fn told(zones: &CoalescedZones<FaultyVm>) -> Vec<(IoAddress, u32)> {
    zones.registered().iter().map(|(_, zone)| (zone.address, zone.size)).collect()
}

#[derive(Debug, Clone)]
enum Op {
    Register(CoalescedZone),
    Drop(usize),
    Unregister(usize),
    /// A guest writes so many bytes.
    Write(IoAddress, usize),
    Drain,
}

fn address() -> impl Strategy<Value = IoAddress> {
    prop_oneof![
        3 => (0..0x60_u64).prop_map(|n| IoAddress::Mmio(0x1000 + n)),
        2 => (0..0x20_u16).prop_map(|n| IoAddress::Pio(0x70 + n)),
        1 => prop::sample::select(vec![
            IoAddress::Mmio(u64::MAX - 8),
            IoAddress::Mmio(u64::MAX),
            IoAddress::Pio(u16::MAX),
            IoAddress::Pio(u16::MAX - 3),
        ]),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let size = prop_oneof![
        8 => 1..0x18_u32,
        1 => prop::sample::select(vec![0, 1 << 31, u32::MAX, 0x100]),
    ];
    let op = prop_oneof![
        5 => (address(), size).prop_map(|(address, size)| Op::Register(zone(address, size))),
        2 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::Unregister),
        5 => (address(), prop::sample::select(vec![1, 2, 4, 8])).prop_map(|(a, n)| Op::Write(a, n)),
        2 => Just(Op::Drain),
    ];
    prop::collection::vec(op, 0..80)
}

/// Every address a zone has; none if it passes the last.
fn bytes(zone: CoalescedZone) -> Option<Vec<IoAddress>> {
    let CoalescedZone { address, size } = zone;
    // Too many to list, and more than KVM counts.
    if size >= 1 << 31 {
        return None;
    }
    (0..size)
        .map(|n| match address {
            // The last address has no end behind it that KVM could compare with.
            IoAddress::Mmio(first) => {
                first.checked_add(n.into()).filter(|at| *at != u64::MAX).map(IoAddress::Mmio)
            }
            IoAddress::Pio(first) => u16::try_from(u32::from(first) + n).ok().map(IoAddress::Pio),
        })
        .collect()
}

struct Model {
    /// The name of the zone that has an address.
    owners: BTreeMap<IoAddress, String>,
    /// What was collected and not handed out.
    ring: VecDeque<(IoAddress, Vec<u8>)>,
}

impl Model {
    /// Lets a zone go.
    fn remove(&mut self, name: &str) {
        self.owners.retain(|_, owner| owner != name);
    }
}

fn run(ops: &[Op], seed: u64) -> Result<(), TestCaseError> {
    let faults = Faults::seeded(seed, NonZeroU32::new(6).unwrap());
    let world = World::new(&faults);
    let zones = world.zones();
    let vcpu = world.vm.inner().create_vcpu(0).unwrap();
    let mut owned: Vec<(String, ZoneHandle<FaultyVm>)> = Vec::new();
    // Those that KVM kept of owners that are gone.
    let mut kept: Vec<String> = Vec::new();
    let mut model = Model { owners: BTreeMap::new(), ring: VecDeque::new() };
    for (n, op) in ops.iter().enumerate() {
        let (failures, calls) = (faults.failures(), faults.made());
        match op {
            Op::Register(new) => {
                let before = told(&zones);
                let name = format!("zone {n}");
                let result = zones.register(&*name, *new);
                // What was kept is tried again first, whatever else is wrong; the registry says what
                // of it is left, and KVM must agree.
                let names: Vec<_> =
                    zones.registered().iter().map(|(name, _)| name.to_string()).collect();
                for gone in kept.extract_if(.., |name| !names.contains(name)) {
                    model.remove(&gone);
                }
                let wanted = bytes(*new).filter(|bytes| !bytes.is_empty());
                let taken =
                    wanted.iter().flatten().find_map(|address| model.owners.get(address).cloned());
                match (result, wanted, taken) {
                    (Ok(handle), Some(bytes), None) => {
                        prop_assert_eq!(handle.zone(), *new);
                        model.owners.extend(bytes.into_iter().map(|at| (at, name.clone())));
                        owned.push((name, handle));
                    }
                    (Err(ZoneError::Empty { .. }), Some(_) | None, _) => {
                        prop_assert_eq!(new.size, 0);
                    }
                    (Err(ZoneError::Wraps { zone, .. }), None, _) => prop_assert_eq!(zone, *new),
                    (Err(ZoneError::Overlap { other, other_zone, .. }), Some(bytes), Some(_)) => {
                        // It may overlap several; the one that is named is one of them.
                        let clash = bytes.iter().filter_map(|at| model.owners.get(at));
                        prop_assert!(clash.clone().any(|owner| **owner == *other));
                        prop_assert!(before.contains(&(other_zone.address, other_zone.size)));
                    }
                    (Err(ZoneError::Kvm { .. } | ZoneError::NoSpace { .. }), Some(_), None) => {
                        prop_assert!(faults.failures() > failures, "only when it was told to")
                    }
                    (result, wanted, taken) => {
                        return Err(TestCaseError::fail(format!(
                            "{new:?}: {result:?}, has bytes {}, there {taken:?}",
                            wanted.is_some()
                        )));
                    }
                }
            }
            Op::Drop(which) | Op::Unregister(which) => {
                let Some(index) = which.checked_rem(owned.len()) else { continue };
                let (name, handle) = owned.swap_remove(index);
                let failed = match op {
                    Op::Unregister(_) => {
                        let result = handle.unregister();
                        if let Err(error) = &result {
                            let named = error.to_string().contains(&name);
                            prop_assert!(named, "{error}");
                        }
                        result.is_err()
                    }
                    _ => {
                        drop(handle);
                        faults.failures() > failures
                    }
                };
                prop_assert_eq!(failed, faults.failures() > failures);
                prop_assert_eq!(faults.made(), calls + 1, "one ioctl");
                if failed {
                    kept.push(name);
                } else {
                    model.remove(&name);
                }
            }
            Op::Write(address, len) => {
                let data: Vec<u8> = (0..*len).map(|byte| byte as u8 ^ n as u8).collect();
                // All of it must be of one zone. As strings are what other lengths are to a port.
                let reach = bytes(zone(*address, *len as u32));
                let one = matches!(address, IoAddress::Mmio(_)) || *len != 8;
                let names: Option<Vec<_>> = reach
                    .filter(|_| one)
                    .and_then(|all| all.iter().map(|at| model.owners.get(at)).collect());
                let collected =
                    names.is_some_and(|names| names.windows(2).all(|pair| pair[0] == pair[1]));
                if one {
                    let wrote = world.view.guest_write(*address, &data);
                    let expected = if collected { Wrote::Collected } else { Wrote::Exit };
                    prop_assert_eq!(wrote, expected);
                    if collected {
                        model.ring.push_back((*address, data));
                    }
                }
            }
            Op::Drain => {
                let mut got = Vec::new();
                zones
                    .drain(&vcpu, |write| got.push((write.address, write.bytes().to_vec())))
                    .unwrap();
                prop_assert_eq!(got, model.ring.drain(..).collect::<Vec<_>>());
            }
        }
        prop_assert_eq!(told(&zones), world.kvm_has());
        let mut names: Vec<_> = model.owners.values().cloned().collect();
        names.sort_unstable();
        names.dedup();
        let mut known: Vec<_> = kept.iter().chain(owned.iter().map(|(name, _)| name)).collect();
        known.sort_unstable();
        prop_assert!(names.iter().eq(known), "the model's own");
        prop_assert_eq!(&world.findings(), &[], "what KVM lets pass");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn ledger_kvm_and_a_model_agree_whatever_fails(ops in ops(), seed in any::<u64>()) {
        run(&ops, seed)?;
    }
}

#[test]
fn what_kvm_would_take_is_refused_with_names_and_both_ranges() {
    let world = World::new(&Faults::none());
    let zones = world.zones();
    let _vga = zones.register("vga", mmio(0xa_0000, 0x2_0000)).unwrap();
    let _rtc = zones.register("rtc", zone(IoAddress::Pio(0x70), 2)).unwrap();
    let refused = |new| zones.register("other", new).unwrap_err().to_string();
    for (new, text) in [
        (
            mmio(0xa_0000, 0x2_0000),
            "\"other\" at 0xa0000-0xbffff overlaps \"vga\" at 0xa0000-0xbffff",
        ),
        (mmio(0xb_ffff, 1), "\"other\" at 0xbffff-0xbffff overlaps \"vga\" at 0xa0000-0xbffff"),
        (mmio(0x9_fff0, 0x11), "\"other\" at 0x9fff0-0xa0000 overlaps \"vga\""),
        (zone(IoAddress::Pio(0x6f), 2), "at ports 0x6f-0x70 overlaps \"rtc\" at ports 0x70-0x71"),
        (mmio(0x1000, 0), "\"other\" has no bytes"),
        (mmio(u64::MAX - 1, 2), "of 0x2 bytes at 0xfffffffffffffffe passes the last address"),
        (mmio(0, 1 << 31), "passes the last address"),
        (zone(IoAddress::Pio(0xffff), 2), "of 0x2 bytes at 0xffff passes the last address"),
    ] {
        let shown = refused(new);
        assert!(shown.contains(text), "{shown}\n{text}");
    }
    // Right beside each other, and the same number in the other space.
    for new in [
        mmio(0xc_0000, 1),
        mmio(0x9_ffff, 1),
        mmio(0x70, 2),
        zone(IoAddress::Pio(0xffff), 1),
        mmio(u64::MAX - 1, 1),
    ] {
        drop(zones.register("beside", new).unwrap());
    }
    assert_eq!(world.findings(), []);
}

#[test]
fn what_this_kvm_does_not_collect_is_refused() {
    let world = World::new(&Faults::none());
    for (support, refused, taken) in [
        (ZoneSupport { ports: false, ..ALL }, zone(IoAddress::Pio(0x70), 2), mmio(0x70, 2)),
        (ZoneSupport { memory: false, ..ALL }, mmio(0x70, 2), zone(IoAddress::Pio(0x70), 2)),
    ] {
        let zones = CoalescedZones::new(world.vm.clone(), support);
        let error = zones.register("rtc", refused).unwrap_err();
        assert!(matches!(error, ZoneError::Unsupported { .. }));
        assert!(error.to_string().contains("handle each as an exit"), "{error}");
        drop(zones.register("rtc", taken).unwrap());
    }
    assert_eq!(world.findings(), []);
}

#[test]
fn a_full_bus_says_its_limit() {
    let world = World::new(&Faults::none());
    let zones = world.zones();
    let mut owned: Vec<_> = (0..1000)
        .map(|n| zones.register("one of many", mmio(0x1000 + n * 8, 8)).unwrap())
        .collect();
    let last = mmio(0x1000 + 1000 * 8, 8);
    let error = zones.register("one more", last).unwrap_err();
    let (zones_there, limit) = (1000, 1000);
    let expected =
        ZoneError::NoSpace { name: "one more".into(), zone: last, zones: zones_there, limit };
    assert_eq!(error, expected);
    assert!(error.to_string().contains("KVM takes 1000 devices on a bus"), "{error}");
    assert_eq!(zones.registered().len(), 1000);
    let _port = zones.register("a port", zone(IoAddress::Pio(0x70), 1)).unwrap();
    owned.pop();
    owned.push(zones.register("one more", last).unwrap());
    assert_eq!(world.kvm_has().len(), 1001);
    // As a VM ends: what is left goes with it.
    drop(zones);
    drop(owned);
    assert_eq!(world.kvm_has().len(), 1001);
}

#[test]
fn what_kvm_would_not_let_go_is_tried_again() {
    let faults = Faults::nth_of(Ioctl::UnregisterCoalescedMmio, 0, Errno::EIO);
    let world = World::new(&faults);
    let zones = world.zones();
    drop(zones.register("first", mmio(0x1000, 8)).unwrap());
    assert_eq!(zones.registered().len(), 1, "KVM has kept it");
    let second = zones.register("second", mmio(0x1000, 8)).unwrap();
    assert_eq!(zones.registered(), [(Arc::from("second"), mmio(0x1000, 8))]);
    second.unregister().unwrap();
    assert_eq!((told(&zones), world.kvm_has()), (vec![], vec![]));
    assert_eq!(world.findings(), []);
}

#[test]
fn what_kvm_keeps_for_good_stays_in_the_way() {
    let world = World::new(&Faults::of(Ioctl::UnregisterCoalescedMmio, Errno::EIO));
    let zones = world.zones();
    let error = zones.register("first", mmio(0x1000, 8)).unwrap().unregister().unwrap_err();
    assert!(
        error.to_string().starts_with("zone \"first\": KVM_UNREGISTER_COALESCED_MMIO at 0x1000")
    );
    let error = zones.register("second", mmio(0x1004, 8)).unwrap_err();
    assert!(matches!(error, ZoneError::Overlap { other, .. } if &*other == "first"));
    let _third = zones.register("third", mmio(0x2000, 8)).unwrap();
    assert_eq!(told(&zones), world.kvm_has());
}

#[test]
fn zones_that_init_registered_are_adopted() {
    use hv_core::MemoryBackend;
    let world = World::new(&Faults::none());
    let all = [("vga", mmio(0xa_0000, 0x2_0000)), ("rtc", zone(IoAddress::Pio(0x70), 2))];
    for (_, zone) in all {
        world.vm.register_coalesced_zone(zone).unwrap();
    }
    let clash = all.into_iter().chain([("twice", mmio(0xb_0000, 1))]);
    let error = CoalescedZones::adopt(world.vm.clone(), clash, ALL).map(|_| ()).unwrap_err();
    assert!(matches!(error, ZoneError::Overlap { .. }));
    assert_eq!(world.kvm_has().len(), 2, "the VM is left alone");
    let (zones, owned) = CoalescedZones::adopt(world.vm.clone(), all, ALL).unwrap();
    assert_eq!(told(&zones), world.kvm_has());
    drop(owned);
    assert_eq!(world.kvm_has(), []);
    assert_eq!(world.findings(), []);
}

/// A VM with `vcpus` vCPUs, each of which runs its steps.
fn vm_with(steps: impl Fn(u32) -> Vec<GuestStep>, vcpus: u32) -> (FakeKvm, Arc<FakeVm>) {
    let host = (0..vcpus).fold(FakeHost::default(), |host, id| host.guest(id, steps(id)));
    let kvm = FakeKvm::new(host);
    let vm = Arc::new(kvm.create_vm(0).unwrap());
    (kvm, vm)
}

const ZONE: IoAddress = IoAddress::Mmio(0xc000_0000);

#[test]
fn a_handler_may_drain_register_and_unregister() {
    let (kvm, vm) = vm_with(|_| (0..5).map(|n| GuestStep::write(ZONE, [n])).collect(), 1);
    let zones = CoalescedZones::new(vm.clone(), ALL);
    let mut own = Some(zones.register("own", zone(ZONE, 8)).unwrap());
    let mut vcpu = vm.create_vcpu(0).unwrap();
    zones.drain(&vcpu, |_| unreachable!("nothing yet")).unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    let mut seen = Vec::new();
    zones
        .drain(&vcpu, |write| {
            seen.push(write.bytes()[0]);
            drop(own.take());
            drop(zones.register("other", mmio(0xd000_0000, 1)).unwrap());
            zones.drain(&vcpu, |_| unreachable!("it is this thread's turn")).unwrap();
        })
        .unwrap();
    assert_eq!(seen, [0, 1, 2, 3, 4], "of a zone that is gone by now");
    assert_eq!(kvm.findings(), []);
}

/// A ring whose owner of the turn is slow must not let another vCPU go on with its exit.
#[test]
fn who_finds_the_ring_empty_waits_for_what_is_being_handled() {
    let (_kvm, vm) = vm_with(|_| vec![GuestStep::write(ZONE, [1])], 1);
    let zones = CoalescedZones::new(vm.clone(), ALL);
    let _own = zones.register("own", zone(ZONE, 8)).unwrap();
    let (mut first, second) = (vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap());
    assert_eq!(first.run(), Ok(VcpuExit::Hlt));
    let handled = AtomicU64::new(0);
    thread::scope(|threads| {
        let (zones, handled, second) = (&zones, &handled, &second);
        zones
            .drain(&first, |_| {
                assert!(!second.has_coalesced_write(), "it is taken");
                let waits = threads.spawn(move || {
                    zones.drain(second, |_| unreachable!("there is nothing")).unwrap();
                    assert_eq!(handled.load(Ordering::SeqCst), 1);
                });
                // It can't return before this does, however long it is let run.
                for _ in 0..1000 {
                    thread::yield_now();
                    assert!(!waits.is_finished());
                }
                handled.store(1, Ordering::SeqCst);
            })
            .unwrap();
    });
}

#[test]
fn many_threads_drain_in_order() {
    const VCPUS: u32 = 4;
    const WRITES: u32 = 100;
    let steps = |id: u32| {
        let write = move |n: u32| {
            // Now and then something else, as a run must end for its writes to be handed out.
            let port = n.is_multiple_of(7).then(|| GuestStep::write(IoAddress::Pio(0x80), [0]));
            [GuestStep::write(ZONE, (id << 16 | n).to_le_bytes())].into_iter().chain(port)
        };
        (0..WRITES).flat_map(write).collect()
    };
    let (_kvm, vm) = vm_with(steps, VCPUS);
    let zones = CoalescedZones::new(vm.clone(), ALL);
    let _own = zones.register("own", zone(ZONE, 8)).unwrap();
    let handled: Mutex<Vec<u32>> = Mutex::default();
    let handle = |write: CoalescedWrite| {
        let value = u32::from_le_bytes(write.bytes().try_into().unwrap());
        // Were two here at once, one would fail.
        handled.try_lock().unwrap().push(value);
    };
    let vcpus: Vec<_> = (0..VCPUS).map(|id| vm.create_vcpu(id).unwrap()).collect();
    thread::scope(|threads| {
        for mut vcpu in vcpus {
            let (zones, handle) = (&zones, &handle);
            threads.spawn(move || {
                loop {
                    let exit = vcpu.run().unwrap();
                    zones.drain(&vcpu, handle).unwrap();
                    match exit {
                        VcpuExit::Hlt => break,
                        VcpuExit::Io(_) => {}
                        other => unreachable!("the ring is never full: {other:?}"),
                    }
                }
            });
        }
    });
    let handled = handled.into_inner().unwrap();
    for id in 0..VCPUS {
        let of_one = handled.iter().filter(|value| *value >> 16 == id).map(|value| value & 0xffff);
        assert!(of_one.eq(0..WRITES), "vCPU {id}");
    }
}

#[test]
fn a_ring_that_is_damaged_is_an_error_and_ends_the_turn() {
    use hv_core::mock::{MockVcpu, MockVm};
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    let zones = CoalescedZones::new(Arc::new(vm), ALL);
    let error = hv_core::Error::new(hv_core::Call::CoalescedRing, Errno::EIO);
    let mut vcpu = MockVcpu::new();
    vcpu.expect_has_coalesced_write().return_const(true);
    vcpu.expect_take_coalesced_write().returning(move || Err(error));
    for _ in 0..2 {
        assert_eq!(zones.drain(&vcpu, |_| unreachable!()), Err(error));
    }
}

/// A guest that never stops writing does not keep a thread that is not its own.
#[test]
fn a_drain_ends_though_the_ring_is_never_empty() {
    use hv_core::mock::{MockVcpu, MockVm};
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    let zones = CoalescedZones::new(Arc::new(vm), ALL);
    let mut vcpu = MockVcpu::new();
    vcpu.expect_has_coalesced_write().return_const(true);
    vcpu.expect_take_coalesced_write().returning(|| Ok(CoalescedWrite::new(ZONE, &[1])));
    let mut count = 0;
    zones.drain(&vcpu, |_| count += 1).unwrap();
    assert!((169..1000).contains(&count), "{count}: all the ring can hold, and not for ever");
}

#[test]
fn nothing_collected_is_one_look() {
    use hv_core::mock::{MockVcpu, MockVm};
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    let zones = CoalescedZones::new(Arc::new(vm), ALL);
    let mut vcpu = MockVcpu::new();
    // Anything else would be unexpected.
    vcpu.expect_has_coalesced_write().times(1).return_const(false);
    zones.drain(&vcpu, |_| unreachable!()).unwrap();
}

#[test]
fn the_fake_without_ports_is_like_a_kernel_without() {
    // What the registry protects from: a zone of ports that is one of addresses.
    use hv_core::MemoryBackend;
    let kvm = FakeKvm::new(FakeHost::default().without(Capability::CoalescedPio));
    let vm = kvm.create_vm(0).unwrap();
    vm.register_coalesced_zone(zone(IoAddress::Pio(0x70), 2)).unwrap();
    assert_eq!(vm.view().coalesced_zones(), [mmio(0x70, 2)]);
}
