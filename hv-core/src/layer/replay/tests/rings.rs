//! Dirty rings and collected writes, recorded on the KVM in memory.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::super::Difference;
use super::{File, replay};
use crate::fake::{FakeHost, FakeKvm, GuestStep};
use crate::layer::{Interceptor, Record, Replay, ReplayVcpu, ReplayVm};
use crate::{
    Capability, CoalescedWrite, CoalescedZone, DirtyGfn, Errno, Gsi, HostMemory, HostRange,
    Hypervisor, IoAddress, IrqBackend, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu,
    VcpuExit, Vm,
};

const RAM: u64 = 0x10_0000;
const ZONE: IoAddress = IoAddress::Mmio(0xc000_0000);

#[derive(Debug)]
#[repr(align(4096))]
struct Page([std::sync::atomic::AtomicU8; 4096]);

impl HostMemory for Page {
    fn bytes(&self) -> &[std::sync::atomic::AtomicU8] {
        &self.0
    }
}

/// Takes what was collected, and resets what is dirty, after each exit; what it took.
fn vmm(kvm: &impl Hypervisor<Vm: Vm<Vcpu: Vcpu>>) -> Vec<CoalescedWrite> {
    let vm = kvm.create_vm(0).unwrap();
    vm.enable_cap(Capability::DirtyLogRing, [4096, 0, 0, 0]).unwrap();
    vm.register_coalesced_zone(CoalescedZone { address: ZONE, size: 8 }).unwrap();
    let page = Arc::new(Page(std::array::from_fn(|_| Default::default())));
    let (id, guest) = (SlotId(0), vm_memory::GuestAddress(RAM));
    let host = HostRange::new(page, 0, 4096).unwrap();
    let flags = SlotFlags { log_dirty: true, readonly: false };
    vm.set_memory_slot(&MemorySlot { id, guest, host, flags }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let ring = vcpu.dirty_ring().unwrap();
    assert_eq!(ring.entries().len(), 256);
    let mut taken = Vec::new();
    loop {
        let exit = vcpu.run().unwrap();
        while vcpu.has_coalesced_write() {
            taken.extend(vcpu.take_coalesced_write().unwrap());
        }
        ring.entries().iter().filter(|entry| entry.dirty().is_some()).for_each(DirtyGfn::collect);
        vm.reset_dirty_rings().unwrap();
        if exit == VcpuExit::Hlt {
            return taken;
        }
    }
}

#[test]
fn what_was_collected_is_taken_again_and_a_reset_answers_as_before() {
    let write = |address, data: &[u8]| GuestStep::write(address, data);
    let steps = [
        write(ZONE, &[1, 2]),
        write(IoAddress::Mmio(RAM), &[1]),
        write(ZONE, &[3]),
        write(IoAddress::Pio(0x80), &[0]),
        write(IoAddress::Pio(0x80), &[0]),
        write(ZONE, &[4; 8]),
    ];
    let file = File::default();
    let record = Record::new(file.clone());
    let kvm = FakeKvm::new(FakeHost::default().guest(0, steps));
    let taken = vmm(&record.over(kvm));
    record.finish().unwrap();
    assert_eq!(
        taken.iter().map(CoalescedWrite::bytes).collect::<Vec<_>>(),
        [&[1, 2][..], &[3], &[4; 8]]
    );
    let transcript = file.text();
    assert_eq!(transcript.matches("coalesced_mmio_ring").count(), 3, "only what was taken");
    assert_eq!(transcript.matches(r#""call":"KVM_RESET_DIRTY_RINGS","ok":1"#).count(), 1);

    // Whose ring stays empty.
    let kvm = replay(&transcript);
    assert_eq!(vmm(&kvm), taken);
    kvm.finish().unwrap();

    let (kvm, again) = (replay(&transcript), File::default());
    let record = Record::of_replay(again.clone(), &kvm);
    assert_eq!(vmm(&record.over(kvm.clone())), taken);
    record.finish().unwrap();
    kvm.finish().unwrap();
    assert_eq!(again.text(), transcript);
}

/// A transcript of a VM with vCPUs 0 and 1, then `lines`.
fn transcript(lines: &[&str]) -> String {
    let mut text = String::from(
        r#"{"hv-transcript":1}
{"thread":0,"on":"system","call":"KVM_CREATE_VM","args":{"type":0},"ok":0}
{"thread":0,"on":"vm0","call":"KVM_CREATE_VCPU","args":{"id":0}}
{"thread":0,"on":"vm0","call":"KVM_CREATE_VCPU","args":{"id":1}}
"#,
    );
    for line in lines {
        text += line;
        text += "\n";
    }
    text + "{\"end\":true}\n"
}

fn machine(kvm: &Replay) -> (ReplayVm, [ReplayVcpu; 2]) {
    let vm = kvm.create_vm(0).unwrap();
    let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    (vm, vcpus)
}

const FIRST: &str =
    r#"{"thread":1,"on":"vm0/vcpu0","call":"coalesced_mmio_ring","ok":{"pio":"0x70","data":"01"}}"#;
const HANDLED: &str =
    r#"{"thread":1,"on":"vm0","call":"KVM_IRQ_LINE","args":{"gsi":4,"level":true}}"#;
const SECOND: &str =
    r#"{"thread":2,"on":"vm0/vcpu1","call":"coalesced_mmio_ring","ok":{"pio":"0x70","data":"02"}}"#;

/// Two vCPUs drain under one lock, which the one that comes later must not hold while it waits.
#[test]
fn who_looks_into_the_ring_waits_for_those_before_it() {
    let kvm = replay(&transcript(&[FIRST, HANDLED, SECOND]));
    let (vm, [first, second]) = machine(&kvm);
    let handled = Mutex::new(Vec::new());
    let drain = |vcpu: &ReplayVcpu, handle: &dyn Fn()| {
        if !vcpu.has_coalesced_write() {
            return;
        }
        let mut handled = handled.lock().unwrap();
        while vcpu.has_coalesced_write() {
            let write = vcpu.take_coalesced_write().unwrap().unwrap();
            handle();
            handled.push(write.bytes()[0]);
        }
    };
    thread::scope(|threads| {
        threads.spawn(|| drain(&second, &|| {}));
        drain(&first, &|| vm.irq_line(Gsi(4), true).unwrap());
    });
    assert_eq!(*handled.lock().unwrap(), [1, 2]);
    assert!(!first.has_coalesced_write(), "at the end there is nothing");
    kvm.finish().unwrap();
}

#[test]
fn who_looks_into_the_ring_does_not_wait_for_ever() {
    let text = transcript(&[HANDLED, SECOND]);
    let kvm = Replay::with_limit(std::io::Cursor::new(text), Duration::from_millis(20)).unwrap();
    let (_vm, vcpus) = machine(&kvm);
    assert!(!vcpus[0].has_coalesced_write(), "which has no lines");
    assert!(!vcpus[1].has_coalesced_write(), "whose turn never comes");
    assert!(matches!(*kvm.difference().unwrap(), Difference::Stuck { line: 5, .. }));
    assert_eq!(vcpus[1].take_coalesced_write().unwrap_err().errno, Errno::EPROTO);
}

#[test]
fn rings_and_writes_that_nobody_recorded() {
    for entries in ["0", "3", "2097152", "-1", "\"256\"", "null"] {
        let line =
            format!(r#"{{"thread":0,"on":"vm0/vcpu0","call":"mmap_dirty_ring","ok":{entries}}}"#);
        let kvm = replay(&transcript(&[&line]));
        let (_vm, [vcpu, _]) = machine(&kvm);
        assert_eq!(vcpu.dirty_ring().unwrap_err().errno, Errno::EPROTO, "{entries}");
        assert!(matches!(*kvm.difference().unwrap(), Difference::Result { line: 5, .. }));
    }
    let kvm = replay(&transcript(&[&FIRST.replace("01", "")]));
    let (_vm, [vcpu, _]) = machine(&kvm);
    assert!(vcpu.has_coalesced_write());
    assert_eq!(vcpu.take_coalesced_write().unwrap_err().errno, Errno::EPROTO);
    assert!(matches!(*kvm.difference().unwrap(), Difference::Result { line: 5, .. }));
}

#[test]
fn errors_and_what_another_took_are_told_again() {
    let lines = [
        r#"{"thread":0,"on":"vm0/vcpu0","call":"mmap_dirty_ring","err":{"errno":"ENOMEM","call":"mmap_dirty_ring","about":{"vcpu":0}}}"#,
        r#"{"thread":0,"on":"vm0/vcpu0","call":"mmap_dirty_ring","ok":256}"#,
        r#"{"thread":0,"on":"vm0/vcpu0","call":"mmap_dirty_ring","ok":256}"#,
        r#"{"thread":0,"on":"vm0/vcpu0","call":"coalesced_mmio_ring"}"#,
    ];
    let kvm = replay(&transcript(&lines));
    let (_vm, [vcpu, _]) = machine(&kvm);
    assert_eq!(vcpu.dirty_ring().unwrap_err().errno, Errno::ENOMEM);
    let (ring, again) = (vcpu.dirty_ring().unwrap(), vcpu.dirty_ring().unwrap());
    assert!(ring.entries()[255].publish(crate::DirtyPage { slot: SlotId(0), page: 1 }));
    assert!(again.entries()[255].dirty().is_some(), "the same entries");
    assert!(vcpu.has_coalesced_write());
    assert_eq!(vcpu.take_coalesced_write(), Ok(None));
    drop(vcpu);
    kvm.finish().unwrap();
}
