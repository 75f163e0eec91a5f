//! How kicks, ends of vCPUs and waiting go.

use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::replay;
use crate::layer::{Difference, Record, Replay, Why};
use crate::{
    Errno, EventFd, Gsi, Hypervisor, IoAddress, IoEvent, IoEventBackend, IrqBackend, Vcpu,
    VcpuExit, VcpuKick, Vm,
};

/// A transcript of a VM with a vCPU, then `lines`.
fn transcript(lines: &[&str]) -> String {
    let mut text = String::from("{\"hv-transcript\":1}\n");
    text += "{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_CREATE_VM\",\"args\":{\"type\":0},\"ok\":0}\n";
    text += "{\"thread\":0,\"on\":\"vm0\",\"call\":\"KVM_CREATE_VCPU\",\"args\":{\"id\":1}}\n";
    for line in lines {
        text += line;
        text += "\n";
    }
    text + "{\"end\":true}\n"
}

const HLT: &str = r#"{"thread":1,"on":"vm0/vcpu1","call":"KVM_RUN","ok":{"exit":"hlt"}}"#;
const INTERRUPTED: &str =
    r#"{"thread":1,"on":"vm0/vcpu1","call":"KVM_RUN","ok":{"exit":"interrupted"}}"#;
const KICK: &str = r#"{"thread":0,"on":"vm0/kick1","call":"tgkill"}"#;
const LINE: &str = r#"{"thread":0,"on":"vm0","call":"KVM_IRQ_LINE","args":{"gsi":4,"level":true}}"#;

type VmVcpu = (super::super::ReplayVm, super::super::ReplayVcpu);

fn machine(kvm: &Replay) -> VmVcpu {
    let vm = kvm.create_vm(0).unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    (vm, vcpu)
}

#[test]
fn a_call_waits_for_those_before_it_on_other_threads() {
    let kvm = replay(&transcript(&[HLT, LINE, HLT]));
    let (vm, mut vcpu) = machine(&kvm);
    thread::scope(|threads| {
        let line = threads.spawn(|| vm.irq_line(Gsi(4), true));
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt), "after the line was set");
        assert_eq!(line.join().unwrap(), Ok(()));
    });
    kvm.finish().unwrap();
}

#[test]
fn an_interrupted_run_waits_for_its_kick() {
    let kvm = replay(&transcript(&[KICK, INTERRUPTED]));
    let (_vm, mut vcpu) = machine(&kvm);
    let kick = vcpu.kicker();
    thread::scope(|threads| {
        let run = threads.spawn(move || vcpu.run());
        kick.kick().unwrap();
        assert_eq!(run.join().unwrap(), Ok(VcpuExit::Interrupted));
    });
    kvm.finish().unwrap();
}

#[test]
fn kicks_that_make_no_difference_may_be_more() {
    let kvm = replay(&transcript(&[KICK, INTERRUPTED, LINE]));
    let (vm, mut vcpu) = machine(&kvm);
    let kick = vcpu.kicker();
    kick.kick().unwrap();
    kick.kick().unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupted));
    kick.kick().unwrap();
    vm.irq_line(Gsi(4), true).unwrap();
    kick.kick().unwrap();
    // Which a vCPU that has no more lines may see.
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupted));
    assert_eq!(vcpu.run().unwrap_err().errno, Errno::EPROTO, "not kicked again");
    assert!(matches!(*kvm.difference().unwrap(), Difference::Extra { .. }));
}

#[test]
fn kicks_at_the_end_may_be_missing() {
    let kvm = replay(&transcript(&[HLT, KICK, KICK]));
    let (_vm, mut vcpu) = machine(&kvm);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    drop(vcpu);
    kvm.finish().unwrap();
}

#[test]
fn interrupted_runs_of_a_vcpu_that_was_dropped_may_be_missing_and_nothing_else() {
    let kvm = replay(&transcript(&[KICK, INTERRUPTED, LINE]));
    let (vm, vcpu) = machine(&kvm);
    vcpu.kicker().kick().unwrap();
    drop(vcpu);
    vm.irq_line(Gsi(4), true).unwrap();
    kvm.finish().unwrap();

    let kvm = replay(&transcript(&[HLT, LINE]));
    let (vm, vcpu) = machine(&kvm);
    drop(vcpu);
    assert_eq!(vm.irq_line(Gsi(4), true).unwrap_err().errno, Errno::EPROTO);
    let difference = kvm.finish().unwrap_err();
    assert!(matches!(*difference, Difference::Missing { line: 4, why: Why::Dropped, .. }));
}

#[test]
fn a_hang_becomes_a_difference_that_tells_who_waits_for_what() {
    let text = transcript(&[HLT, LINE])
        .replace("\"thread\":0,\"on\":\"vm0\"", "\"thread\":2,\"on\":\"vm0\"");
    let limit = Duration::from_millis(20);
    let kvm = Replay::with_limit(std::io::Cursor::new(text), limit).unwrap();
    let (vm, mut vcpu) = machine(&kvm);
    let error = vm.irq_line(Gsi(4), true).unwrap_err();
    assert_eq!(error.errno, Errno::EPROTO);
    assert_eq!(
        kvm.difference().unwrap().to_string(),
        "line 4 of the transcript was not called within 20ms\n  \
         expected: KVM_RUN on vm0/vcpu1\n  \
         waiting:  KVM_IRQ_LINE on vm0 {\"gsi\":4,\"level\":true}"
    );
    assert_eq!(vcpu.run(), Err(error), "the same from now on");
}

#[test]
fn who_waits_hears_of_a_difference_elsewhere() {
    let kvm = replay(&transcript(&[HLT, INTERRUPTED, LINE]));
    let (vm, mut vcpu) = machine(&kvm);
    thread::scope(|threads| {
        let line = threads.spawn(|| vm.irq_line(Gsi(4), true));
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
        let error = vcpu.nmi().unwrap_err();
        assert_eq!(line.join().unwrap(), Err(error));
    });
    assert_eq!(kvm.difference().unwrap().line(), Some(5));
}

#[test]
fn who_was_busy_for_longer_than_the_limit_is_not_late() {
    let limit = Duration::from_secs(30);
    let text = transcript(&[HLT, LINE]);
    let kvm = Replay::with_limit(std::io::Cursor::new(text), limit).unwrap();
    let (vm, mut vcpu) = machine(&kvm);
    kvm.order().was_idle(limit * 2);
    thread::scope(|threads| {
        let line = threads.spawn(|| vm.irq_line(Gsi(4), true));
        // Long enough for it to be late, if it were.
        thread::sleep(Duration::from_millis(20));
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
        assert_eq!(line.join().unwrap(), Ok(()));
    });
    kvm.finish().unwrap();
}

#[test]
fn a_record_of_a_replay_that_calls_pass_by_is_told() {
    let limit = Duration::from_millis(20);
    let text = transcript(&[LINE, LINE]);
    let kvm = Replay::with_limit(std::io::Cursor::new(text), limit).unwrap();
    let _record = Record::of_replay(std::io::sink(), &kvm);
    let error = kvm.create_vm(0).unwrap().create_vcpu(1).err().unwrap();
    assert_eq!(error.errno, Errno::EPROTO);
    let text = kvm.difference().unwrap().to_string();
    assert!(text.contains("all calls must come through the layer that records"), "{text}");
}

const DOORBELL: &str = r#"{"thread":0,"on":"vm0","call":"KVM_IOEVENTFD","args":{"mmio":"0x1000","length":4,"eventfd":0}}"#;
const SIGNAL: &str = r#"{"signal":0,"count":3,"during":["vm0/vcpu1"]}"#;

/// A machine whose guest rings a doorbell during its second run, perhaps before a call of the VMM.
fn ringing(lines: &[&str]) -> (Replay, VmVcpu, EventFd) {
    let kvm = replay(&transcript(&[&[DOORBELL, HLT, SIGNAL], lines].concat()));
    let (vm, mut vcpu) = machine(&kvm);
    let event = EventFd::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let address = IoAddress::Mmio(0x1000);
    let doorbell = IoEvent { address, length: 4, datamatch: None, event: event.clone() };
    vm.ioeventfd_assign(&doorbell).unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    assert_eq!(event.take(), None, "not before the guest runs again");
    (kvm, (vm, vcpu), event)
}

#[test]
fn a_doorbell_rings_while_its_guest_runs_and_wakes_who_waits_for_it() {
    let (kvm, (vm, mut vcpu), event) = ringing(&[LINE, HLT]);
    thread::scope(|threads| {
        let device = threads.spawn(|| {
            poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
            vm.irq_line(Gsi(4), true).unwrap();
            event.take()
        });
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
        assert_eq!(device.join().unwrap(), Some(3));
    });
    kvm.finish().unwrap();
}

#[test]
fn a_call_after_a_signal_waits_for_the_run_that_rings() {
    let (kvm, (vm, mut vcpu), _event) = ringing(&[LINE, HLT]);
    thread::scope(|threads| {
        let line = threads.spawn(|| vm.irq_line(Gsi(4), true));
        assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
        line.join().unwrap().unwrap();
    });
    kvm.finish().unwrap();
}

#[test]
fn a_run_that_would_have_rung_is_missed() {
    let (kvm, _machine, _event) = ringing(&[HLT]);
    let difference = kvm.finish().unwrap_err();
    assert!(matches!(*difference, Difference::Missing { line: 6, why: Why::Finished, .. }));
    assert!(difference.to_string().ends_with("expected: KVM_RUN on vm0/vcpu1"), "{difference}");
}
