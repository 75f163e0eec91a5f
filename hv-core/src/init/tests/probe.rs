//! Rows 15 to 17: the replay, the ioeventfd probe and the kick.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use super::host::Host;
use crate::init::{Config, Consequence, InitErrorKind, ManyIoeventfds, Request, Step};
use crate::{
    Call, Capability, CoalescedZone, Context, Errno, Error, HostMemory, HostRange, IoAddress,
    IoEvent, Ioctl, MemorySlot, SlotFlags, SlotId,
};

#[derive(Debug)]
struct Bytes(Vec<AtomicU8>);

impl HostMemory for Bytes {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

fn slot(id: u32, guest: u64, readonly: bool) -> MemorySlot {
    let memory = Arc::new(Bytes((0..4096).map(|_| AtomicU8::new(0)).collect()));
    MemorySlot {
        id: SlotId(id),
        guest: vm_memory::GuestAddress(guest),
        host: HostRange::new(memory, 0, 4096).unwrap(),
        flags: SlotFlags { readonly, ..SlotFlags::default() },
    }
}

/// Two slots, a doorbell and two zones.
fn replay() -> Config {
    let mut config = Config::new(4096, 1);
    config.slots = vec![slot(0, 0, false), slot(1, 0xf_0000, true)];
    let address = IoAddress::Mmio(0xd000_0000);
    let event = OwnedFd::from(File::open("/dev/null").unwrap()).into();
    config.ioeventfds = vec![IoEvent { address, length: 4, datamatch: None, event }];
    config.coalesced_zones = vec![
        CoalescedZone { address: IoAddress::Mmio(0xa_0000), size: 0x2_0000 },
        CoalescedZone { address: IoAddress::Pio(0xcf8), size: 4 },
    ];
    config
}

fn probing() -> Config {
    Config { probe_many_ioeventfds: true, ..Config::new(4096, 1) }
}

#[test]
fn slots_come_before_the_irqchip_and_doorbells_after() {
    let host = Host::new();
    host.init(&replay()).unwrap();
    let lines: Vec<_> = host
        .lines()
        .into_iter()
        .filter(|l| l.starts_with("KVM_") && !l.contains("MSR") && !l.contains("VERSION"))
        .collect();
    assert_eq!(
        lines,
        [
            "KVM_CREATE_VM 0",
            "KVM_SET_IDENTITY_MAP_ADDR 0xfeffc000",
            "KVM_SET_TSS_ADDR 0xfeffd000",
            "KVM_SET_USER_MEMORY_REGION slot 0 0x0 0x1000",
            "KVM_SET_USER_MEMORY_REGION slot 1 0xf0000 0x1000",
            "KVM_CREATE_IRQCHIP",
            "KVM_CREATE_PIT2 flags 1",
            "KVM_IOEVENTFD assign Mmio(3489660928) len 4 None",
            "KVM_REGISTER_COALESCED_MMIO Mmio(655360) 0x20000",
            "KVM_REGISTER_COALESCED_MMIO Pio(3320) 0x4",
        ]
    );
}

#[test]
fn a_replay_that_fails_names_the_slot_or_address() {
    let slot = |slot, guest| Context::Slot { slot: SlotId(slot), guest, size: 0x1000 };
    for (start, ioctl, context) in [
        ("KVM_SET_USER_MEMORY_REGION slot 0", Ioctl::SetUserMemoryRegion, slot(0, 0)),
        ("KVM_SET_USER_MEMORY_REGION slot 1", Ioctl::SetUserMemoryRegion, slot(1, 0xf_0000)),
        ("KVM_IOEVENTFD", Ioctl::Ioeventfd, Context::Address(0xd000_0000)),
        (
            "KVM_REGISTER_COALESCED_MMIO Mmio",
            Ioctl::RegisterCoalescedMmio,
            Context::Address(0xa_0000),
        ),
        ("KVM_REGISTER_COALESCED_MMIO Pio", Ioctl::RegisterCoalescedMmio, Context::Address(0xcf8)),
    ] {
        let host = Host::new().failing(start, Errno::ENOSPC);
        let error = host.refuses(&replay());
        let inner = Error::new(ioctl, Errno::ENOSPC).about(context);
        assert_eq!((error.step, &error.kind), (Step::Replay, &InitErrorKind::Call(inner)));
        assert!(error.to_string().contains(&inner.to_string()), "{error}");
        let lines = host.lines();
        assert_eq!(lines[lines.len() - 2..], ["VM closed", "hypervisor closed"]);
    }
}

#[test]
fn a_replay_that_needs_a_missing_capability_says_which() {
    let (zone, port) = (IoAddress::Mmio(0xa_0000), IoAddress::Pio(0xcf8));
    for (capability, request, text) in [
        (
            Capability::ReadonlyMem,
            Request::ReadonlySlot(SlotId(1)),
            "memory slot 1 is to be readonly",
        ),
        (
            Capability::Ioeventfd,
            Request::IoEvent(IoAddress::Mmio(0xd000_0000)),
            "address 0xd0000000 is to be an ioeventfd",
        ),
        (
            Capability::CoalescedMmio,
            Request::CoalescedZone(zone),
            "address 0xa0000 is to start a coalesced zone",
        ),
        (
            Capability::CoalescedPio,
            Request::CoalescedZone(port),
            "port 0xcf8 is to start a coalesced zone",
        ),
    ] {
        let error = Host::new().with(capability, 0).refuses(&replay());
        let kind = InitErrorKind::Unsupported { request, capability };
        assert_eq!((error.step, &error.kind), (Step::Replay, &kind));
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.to_string().contains(capability.name()), "{error}");
    }
}

fn ioeventfd_lines(host: &Host) -> Vec<String> {
    host.lines().into_iter().filter(|l| l.starts_with("KVM_IOEVENTFD")).collect()
}

fn assigned(value: u64) -> String {
    format!("KVM_IOEVENTFD assign Pio(0) len 2 Some({value})")
}

fn removed(value: u64) -> String {
    format!("KVM_IOEVENTFD deassign Pio(0) len 2 Some({value})")
}

#[test]
fn seven_ioeventfds_are_assigned_and_removed_in_reverse() {
    let host = Host::new();
    let vm = host.init(&probing()).unwrap();
    assert_eq!(vm.record().many_ioeventfds, ManyIoeventfds::Yes);
    let expected: Vec<_> = (0..7).map(assigned).chain((0..7).rev().map(removed)).collect();
    assert_eq!(ioeventfd_lines(&host), expected);
    assert_eq!(host.eventfds(), (7, true));
}

#[test]
fn no_room_for_seven_is_no() {
    let host = Host::new().failing(&assigned(6), Errno::ENOSPC);
    let vm = host.init(&probing()).unwrap();
    assert_eq!(vm.record().many_ioeventfds, ManyIoeventfds::No);
    let expected: Vec<_> = (0..7).map(assigned).chain((0..6).rev().map(removed)).collect();
    assert_eq!(ioeventfd_lines(&host), expected);
    assert_eq!(host.eventfds(), (7, true));
}

#[test]
fn any_other_failure_of_the_probe_is_no_answer_and_no_error() {
    for (start, times) in [(assigned(0), 1), (assigned(3), 1), ("eventfd".into(), 1)] {
        let host = Host::new().failing_times(&start, times, Errno::EMFILE);
        let vm = host.init(&probing()).unwrap();
        assert_eq!(vm.record().many_ioeventfds, ManyIoeventfds::NotProbed, "{start}");
        let lines = ioeventfd_lines(&host);
        let count = |word: &str| lines.iter().filter(|l| l.contains(word)).count();
        let refused = usize::from(start.starts_with("KVM_IOEVENTFD"));
        assert_eq!(count(" assign") - refused, count(" deassign"), "{start}: {lines:?}");
        assert!(host.eventfds().1, "{start}");
    }
}

#[test]
fn the_probe_is_made_only_when_asked_for() {
    let host = Host::new();
    let vm = host.init(&Config::new(4096, 1)).unwrap();
    assert_eq!(vm.record().many_ioeventfds, ManyIoeventfds::NotProbed);
    assert!(vm.record().ioeventfds);
    assert_eq!((ioeventfd_lines(&host), host.eventfds()), (vec![], (0, true)));

    let host = Host::new().with(Capability::Ioeventfd, 0);
    let vm = host.init(&probing()).unwrap();
    assert_eq!(vm.record().many_ioeventfds, ManyIoeventfds::No, "there are none at all");
    assert_eq!((ioeventfd_lines(&host), host.eventfds()), (vec![], (0, true)));
    assert!(vm.record().consequences.contains(&Consequence::Lacks(Capability::Ioeventfd)));
}

#[test]
fn ioeventfds_the_probe_leaves_are_a_consequence() {
    let host = Host::new().failing_times("KVM_IOEVENTFD deassign", 2, Errno::ENOMEM);
    let vm = host.init(&probing()).unwrap();
    let leftovers = Consequence::ProbeLeftovers { count: 2 };
    assert!(vm.record().consequences.contains(&leftovers));
    assert!(leftovers.to_string().contains("2-byte writes to port 0"));
    assert_eq!(ioeventfd_lines(&host).len(), 14, "all seven are tried");
}

#[test]
fn the_kick_is_installed_last() {
    let host = Host::new();
    let mut config = replay();
    config.probe_many_ioeventfds = true;
    let vm = host.init(&config).unwrap();
    let lines = host.lines();
    assert_eq!(lines.last().unwrap(), "install kick");
    assert_eq!(lines.iter().filter(|l| *l == "install kick").count(), 1);
    drop(vm);
}

#[test]
fn a_kick_that_cant_be_installed_undoes_everything() {
    let host = Host::new().failing("install kick", Errno::EBUSY);
    let error = host.refuses(&probing());
    let kind = InitErrorKind::Call(Error::new(Call::Sigaction, Errno::EBUSY));
    assert_eq!((error.step, &error.kind), (Step::Kick, &kind));
    assert!(
        error.to_string().contains("EBUSY (Device or resource busy); the program already handles")
    );
    let lines = host.lines();
    assert_eq!(lines[lines.len() - 3..], ["install kick", "VM closed", "hypervisor closed"]);
    assert!(host.eventfds().1);
}
