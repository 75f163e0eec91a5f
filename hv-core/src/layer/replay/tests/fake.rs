//! The start of a VM and a short guest, recorded on the KVM in memory.

use rustix::event::{PollFd, PollFlags, poll};

use super::{File, replay};
use crate::fake::{FakeHost, FakeKvm, GuestStep};
use crate::init::{Config, InitError, Irqchip, init};
use crate::layer::{Interceptor, Layered, Record, Replay};
use crate::{
    ExitReply, Hypervisor, IoAddress, IoEvent, IoEventBackend, IoExit, MmioExit, Vcpu, VcpuExit,
    VcpuKick, Vm,
};

const DOORBELL: IoAddress = IoAddress::Mmio(0xd000_0000);

fn host() -> FakeKvm {
    let device = IoAddress::Mmio(0xe000_0000);
    FakeKvm::new(FakeHost::default().guest(
        0,
        [
            GuestStep::write(DOORBELL, [1, 0, 0, 0]),
            GuestStep::write(IoAddress::Pio(0x3f8), *b"A"),
            GuestStep::write(DOORBELL, [1, 0, 0, 0]),
            GuestStep::read(IoAddress::Pio(0x60), 2),
            GuestStep::read(device, 4),
            GuestStep::write(device, [1, 2, 3, 4]),
            GuestStep::WaitForInterrupt,
        ],
    ))
}

fn config(irqchip: Irqchip) -> Config {
    let mut config = Config::new(4096, 1);
    config.irqchip = irqchip;
    config
}

/// Runs the guest until it is interrupted; returns its exits.
fn vmm<H: Hypervisor>(kvm: H) -> Result<Vec<VcpuExit>, InitError>
where
    <H::Vm as Vm>::Vcpu: Vcpu,
{
    let started = init(move |_| Ok(kvm), &config(Irqchip::Kernel { pit: true }))?;
    let vm = started.vm();
    let event = started.hypervisor().eventfd().unwrap();
    let doorbell = IoEvent { address: DOORBELL, length: 4, datamatch: None, event: event.clone() };
    vm.ioeventfd_assign(&doorbell).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let kick = vcpu.kicker();
    let mut exits = Vec::new();
    loop {
        let exit = vcpu.run().unwrap();
        exits.push(exit);
        match exit {
            VcpuExit::Io(IoExit { port: 0x60, .. }) => vcpu.io_data().copy_from_slice(&[7, 8]),
            VcpuExit::Io(_) => {
                assert_eq!(vcpu.io_data(), b"A");
                poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
                assert_eq!(event.take(), Some(1), "the doorbell");
            }
            VcpuExit::Mmio(MmioExit { written: None, .. }) => {
                vcpu.reply(ExitReply::Mmio([9; 8]));
            }
            VcpuExit::Mmio(_) => kick.kick().unwrap(),
            VcpuExit::Interrupted => break,
            _ => panic!("{exit:?}"),
        }
    }
    vm.ioeventfd_deassign(&doorbell).unwrap();
    Ok(exits)
}

fn recorded() -> (String, Vec<VcpuExit>) {
    let file = File::default();
    let record = Record::new(file.clone());
    let kvm = host();
    let exits = vmm(record.over(kvm.clone())).unwrap();
    record.finish().unwrap();
    assert_eq!(kvm.live().vms, 0);
    (file.text(), exits)
}

#[test]
fn a_vm_that_starts_and_runs_replays_and_records_the_same() {
    let (transcript, exits) = recorded();
    assert_eq!(exits.len(), 5);
    assert_eq!(transcript.matches("{\"signal\":").count(), 2, "{transcript}");
    let kvm = replay(&transcript);
    assert_eq!(vmm(kvm.clone()).unwrap(), exits);
    kvm.finish().unwrap();

    let (kvm, again) = (replay(&transcript), File::default());
    let record = Record::of_replay(again.clone(), &kvm);
    let layered: Layered<Replay, Record> = record.over(kvm.clone());
    assert_eq!(vmm(layered).unwrap(), exits);
    record.finish().unwrap();
    kvm.finish().unwrap();
    assert_eq!(again.text(), transcript);
}

#[test]
fn a_start_in_another_order_names_step_line_and_both_calls() {
    let (transcript, _) = recorded();
    let mut lines: Vec<&str> = transcript.lines().collect();
    let at = |call: &str| lines.iter().position(|line| line.contains(call)).unwrap();
    let (tss, map) = (at("KVM_SET_TSS_ADDR"), at("KVM_SET_IDENTITY_MAP_ADDR"));
    lines.swap(tss, map);
    let first = tss.min(map);
    let kvm = replay(&(lines.join("\n") + "\n"));
    let error = vmm(kvm.clone()).unwrap_err().to_string();
    assert!(error.contains(&format!("at line {} of the transcript", first + 1)), "{error}");
    let text = kvm.finish().unwrap_err().to_string();
    let [expected, actual] =
        if tss < map { ["IDENTITY_MAP", "TSS"] } else { ["TSS", "IDENTITY_MAP"] };
    assert!(text.contains(&format!("expected: KVM_SET_{expected}_ADDR on vm0 {{")), "{text}");
    assert!(text.contains(&format!("actual:   KVM_SET_{actual}_ADDR on vm0 {{")), "{text}");
    assert!(text.contains(&format!("is line {}", tss.max(map) + 1)), "{text}");
}
