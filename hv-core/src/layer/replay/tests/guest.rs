//! A host with a guest of two vCPUs, made of mocks, and a VMM that runs it. What they do is the same
//! in every run; when their threads do it is not.

use std::sync::atomic::AtomicU8;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::GuestAddress;

use super::{File, replay};
use crate::layer::{Interceptor, Meta, Record};
use crate::mock::{MockHypervisor, MockVcpu, MockVcpuKick, MockVm};
use crate::{
    Call, Capability, Context, Errno, Error, EventFd, ExitReply, Gsi, HostMemory, HostRange,
    Hypervisor, InternalError, InterruptState, IoAddress, IoDirection, IoEvent, IoEventBackend,
    IoExit, Ioctl, IrqBackend, IrqchipId, Irqfd, LineStatus, MemoryBackend, MemorySlot, MmioExit,
    Msi, MsiStatus, MsrIndexList, Route, RouteTarget, SlotFlags, SlotId, Vcpu, VcpuExit, VcpuKick,
    Vm,
};

const DOORBELL: IoAddress = IoAddress::Mmio(0xd000_0000);

/// What the guest's vCPUs share with the host.
#[derive(Default)]
struct Host {
    /// What KVM signals for the doorbell.
    doorbell: OnceLock<EventFd>,
    /// Says that the device has answered a doorbell.
    answered: Mutex<Option<Sender<()>>>,
}

fn out(data: &'static [u8], size: u8) -> Step {
    let count = u32::try_from(data.len()).unwrap() / u32::from(size);
    let exit = IoExit { direction: IoDirection::Out, port: 0x3f8, size, count };
    Step { exit: VcpuExit::Io(exit), data: data.to_vec(), ring: false }
}

fn input(count: u32) -> Step {
    let exit = IoExit { direction: IoDirection::In, port: 0x60, size: 2, count };
    Step { exit: VcpuExit::Io(exit), data: vec![0; 2 * count as usize], ring: false }
}

fn plain(exit: VcpuExit) -> Step {
    Step { exit, data: Vec::new(), ring: false }
}

fn mmio(address: u64, written: Option<[u8; 8]>) -> Step {
    plain(VcpuExit::Mmio(MmioExit { address, len: 4, written }))
}

/// What a run of a vCPU does: rings the doorbell and waits for the answer, perhaps; then exits.
struct Step {
    exit: VcpuExit,
    data: Vec<u8>,
    ring: bool,
}

impl Step {
    fn is_input(&self) -> bool {
        matches!(self.exit, VcpuExit::Io(IoExit { direction: IoDirection::In, .. }))
    }

    fn ring(self) -> Self {
        Self { ring: true, ..self }
    }
}

/// Steps of the first vCPU, which ends the machine.
fn first() -> Vec<Step> {
    vec![
        out(b"one", 1),
        out(b"string of words!", 2).ring(),
        input(3),
        mmio(0xfee0_0000, None),
        mmio(0xfee0_0010, Some([1, 2, 3, 4, 0, 0, 0, 0])).ring(),
        plain(VcpuExit::InternalError(InternalError { suberror: 1, ndata: 4, data: [7; 16] })),
        plain(VcpuExit::SystemEvent { kind: 2, ndata: 0, data: [0; 16] }).ring(),
        plain(VcpuExit::Rdmsr { index: 0x1b, reason: 1 }),
        plain(VcpuExit::Shutdown),
    ]
}

/// Steps of the second, which then runs until it is kicked.
fn second() -> Vec<Step> {
    (0..12).map(|n| mmio(0xe000_0000 + 4 * n, (n % 2 == 0).then_some([9; 8]))).collect()
}

fn vcpu(id: u32, steps: Vec<Step>, host: Arc<Host>, answers: Receiver<()>) -> MockVcpu {
    let (kick, kicked) = channel();
    let mut vcpu = MockVcpu::new();
    vcpu.expect_id().return_const(id);
    let kick = Mutex::new(kick);
    vcpu.expect_kicker().returning(move || {
        let kick = kick.lock().unwrap().clone();
        let mut kicker = MockVcpuKick::new();
        let kick = Mutex::new(kick);
        kicker.expect_kick().returning(move || {
            let _ = kick.lock().unwrap().send(());
            Ok(())
        });
        kicker
    });
    for step in steps.iter().filter(|step| !step.data.is_empty()) {
        // Output is looked at by the layer and the VMM; input by the VMM twice, then the layer.
        let times = if step.is_input() { 3 } else { 2 };
        vcpu.expect_io_data().times(times).return_var(step.data.clone());
    }
    let mut steps = steps.into_iter();
    let (answers, kicked) = (Mutex::new(answers), Mutex::new(kicked));
    vcpu.expect_run().returning(move || {
        let Some(step) = steps.next() else {
            kicked.lock().unwrap().recv().unwrap();
            return Ok(VcpuExit::Interrupted);
        };
        if step.ring {
            host.doorbell.get().unwrap().signal();
            answers.lock().unwrap().recv().unwrap();
        }
        Ok(step.exit)
    });
    vcpu.expect_reply().return_const(());
    vcpu.expect_request_interrupt_window().return_const(());
    vcpu.expect_interrupt_state()
        .returning(|| InterruptState { if_flag: true, ..Default::default() });
    vcpu.expect_set_regs().returning(|_| Ok(()));
    vcpu.expect_regs()
        .returning(|| Ok(kvm_regs { rip: 0xfff0, rax: u64::MAX, ..Default::default() }));
    vcpu.expect_set_sregs().returning(|_| Ok(()));
    vcpu.expect_sregs().returning(|| Ok(kvm_sregs { cr0: 0x6000_0010, ..Default::default() }));
    vcpu.expect_lapic().returning(|| Ok(kvm_lapic_state { regs: [-7; 1024] }));
    vcpu.expect_set_cpuid().returning(|_| Ok(()));
    vcpu.expect_msrs().returning(|entries| {
        entries[0].data = 0xfee0_0900;
        Ok(1)
    });
    let error = Error::new(Ioctl::GetTscKhz, Errno::EIO).about(Context::Vcpu(id));
    vcpu.expect_tsc_khz().return_const(Err(error));
    vcpu
}

fn vm() -> MockVm {
    let host = Arc::new(Host::default());
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_create_irqchip().return_const(Ok(()));
    vm.expect_set_tss_addr().return_const(Ok(()));
    let exists = Error::new(Ioctl::CreatePit2, Errno::EEXIST);
    vm.expect_create_pit2().return_const(Err(exists));
    vm.expect_set_memory_slot().returning(|_| Ok(()));
    vm.expect_set_gsi_routing().returning(|_| Ok(()));
    vm.expect_irqfd_assign().returning(|_| Ok(()));
    let its = host.clone();
    vm.expect_ioeventfd_assign().returning(move |event| {
        its.doorbell.set(event.event.clone()).unwrap();
        Ok(())
    });
    vm.expect_ioeventfd_deassign().returning(|_| Ok(()));
    vm.expect_irq_line_status().returning(|_, _| Ok(LineStatus::Delivered(1)));
    vm.expect_signal_msi().return_const(Ok(MsiStatus::NoTarget));
    let its = host.clone();
    vm.expect_irq_line().returning(move |gsi, _| {
        if gsi == Gsi(5) {
            let _ = its.answered.lock().unwrap().as_ref().unwrap().send(());
        }
        Ok(())
    });
    vm.expect_dirty_log().returning(|_, bitmap| {
        bitmap.fill(0);
        bitmap[1] = 0xf0;
        Ok(())
    });
    vm.expect_create_vcpu().returning(move |id| {
        let (answer, answers) = channel();
        if id == 0 {
            *host.answered.lock().unwrap() = Some(answer);
        }
        let steps = if id == 0 { first() } else { second() };
        Ok(vcpu(id, steps, host.clone(), answers))
    });
    vm
}

pub(super) fn host() -> MockHypervisor {
    let mut kvm = MockHypervisor::new();
    kvm.expect_api_version().return_const(Ok(12));
    kvm.expect_check_extension().returning(|cap| Ok(cap.number().cast_signed()));
    let list = MsrIndexList { available: 2, indices: vec![0x10, 0xc000_0080] };
    kvm.expect_msr_index_list().return_const(Ok(list));
    let leaf = kvm_cpuid_entry2 { function: 1, eax: 0x806f8, ..Default::default() };
    kvm.expect_supported_cpuid().return_const(Ok(vec![leaf; 2]));
    kvm.expect_create_vm().returning(|_| Ok(vm()));
    kvm.expect_eventfd().returning(|| {
        let made = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        made.map(EventFd::from).map_err(|_| Error::new(Call::Eventfd, Errno::EMFILE))
    });
    kvm.expect_install_kick().return_const(Ok(()));
    kvm
}

#[derive(Debug)]
struct Page(Vec<AtomicU8>);

impl HostMemory for Page {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

/// Runs a vCPU until it is interrupted or shuts down; returns its exits.
fn run<V: Vcpu>(mut vcpu: V) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let exit = vcpu.run().unwrap();
        seen.push(format!("{exit:?} {:?}", vcpu.interrupt_state()));
        if let VcpuExit::Io(_) = exit {
            seen.push(format!("{:?}", vcpu.io_data()));
        }
        match exit {
            VcpuExit::Io(IoExit { direction: IoDirection::In, .. }) => {
                vcpu.io_data().iter_mut().zip(1..).for_each(|(byte, n)| *byte = n);
            }
            VcpuExit::Mmio(MmioExit { address, written: None, .. }) => {
                vcpu.reply(ExitReply::Mmio(address.to_le_bytes()));
            }
            VcpuExit::Rdmsr { .. } => {
                vcpu.reply(ExitReply::Rdmsr(None));
                vcpu.request_interrupt_window(true);
            }
            VcpuExit::Interrupted | VcpuExit::Shutdown => return seen,
            _ => {}
        }
    }
}

/// A VMM: sets up a VM, runs two vCPUs and a device in threads of their own, and takes it down.
/// Returns all it was told.
pub(super) fn vmm<H>(kvm: &H) -> Vec<String>
where
    H: Hypervisor,
    H::Vm: Sync,
    <H::Vm as Vm>::Vcpu: Sync,
{
    let mut seen = vec![format!("{:?}", kvm.api_version())];
    seen.push(format!("{:?}", kvm.check_extension(Capability::IrqRouting)));
    seen.push(format!("{:?} {:?}", kvm.msr_index_list(64), kvm.supported_cpuid()));
    let vm = kvm.create_vm(0).unwrap();
    vm.create_irqchip().unwrap();
    vm.set_tss_addr(0xfeff_d000).unwrap();
    seen.push(format!("{:?}", vm.create_pit2(kvm_pit_config::default())));
    let page = Arc::new(Page((0..4096).map(|_| AtomicU8::new(0)).collect()));
    let slot = MemorySlot {
        id: SlotId(0),
        guest: GuestAddress(0x1000),
        host: HostRange::new(page, 0, 4096).unwrap(),
        flags: SlotFlags { log_dirty: true, readonly: false },
    };
    vm.set_memory_slot(&slot).unwrap();
    let msi = Msi { address: 0xfee0_0000, data: 0x4041, device: None };
    let pin = RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin: 2 };
    let routes =
        [Route { gsi: Gsi(0), target: pin }, Route { gsi: Gsi(24), target: RouteTarget::Msi(msi) }];
    vm.set_gsi_routing(&routes).unwrap();
    seen.push(format!("{:?}", vm.signal_msi(msi)));
    let [irq, event] = [(); 2].map(|()| kvm.eventfd().unwrap());
    vm.irqfd_assign(&Irqfd { event: irq, gsi: Gsi(24), resample: None }).unwrap();
    let doorbell = IoEvent { address: DOORBELL, length: 4, datamatch: Some(1), event };
    vm.ioeventfd_assign(&doorbell).unwrap();

    let vcpus = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    let kick = vcpus[1].kicker();
    for vcpu in &vcpus {
        vcpu.set_sregs(&kvm_sregs { cr3: 0x9000, ..vcpu.sregs().unwrap() }).unwrap();
        vcpu.set_regs(&kvm_regs { rip: 0x10_0000, ..vcpu.regs().unwrap() }).unwrap();
        seen.push(format!("{:?} {:?}", vcpu.lapic(), vcpu.tsc_khz()));
        let mut msrs = [kvm_msr_entry { index: 0x1b, ..Default::default() }; 2];
        seen.push(format!("{:?} {msrs:?}", vcpu.msrs(&mut msrs)));
    }
    let mut bitmap = [0; 3];
    seen.push(format!("{:?} {bitmap:?}", vm.dirty_log(SlotId(0), &mut bitmap)));
    kvm.install_kick().unwrap();

    let [first, second] = vcpus;
    let vm = &vm;
    let event = &doorbell.event;
    seen.extend(thread::scope(|threads| {
        let device = threads.spawn(move || {
            for _ in 0..3 {
                poll(&mut [PollFd::new(event, PollFlags::IN)], None).unwrap();
                assert_eq!(event.take(), Some(1));
                vm.irq_line_status(Gsi(4), true).unwrap();
                vm.irq_line(Gsi(5), true).unwrap();
            }
        });
        let first = threads.spawn(move || {
            let seen = run(first);
            vm.irq_line(Gsi(7), false).unwrap();
            kick.kick().unwrap();
            seen
        });
        let second = threads.spawn(move || run(second));
        device.join().unwrap();
        [first.join().unwrap(), second.join().unwrap()].concat()
    }));
    vm.ioeventfd_deassign(&doorbell).unwrap();
    seen
}

/// The transcript of a run, and what the VMM saw.
pub(super) fn recorded() -> (String, Vec<String>) {
    let file = File::default();
    let meta = Meta::from([("guest".to_owned(), "mocks".to_owned())]);
    let record = Record::with_meta(file.clone(), &meta);
    let seen = vmm(&record.over(host()));
    record.finish().unwrap();
    (file.text(), seen)
}

#[test]
fn a_run_with_threads_replays_and_its_record_is_the_same_byte_for_byte() {
    for _ in 0..10 {
        let (transcript, seen) = recorded();
        let kvm = replay(&transcript);
        assert_eq!(vmm(&kvm), seen);
        kvm.finish().unwrap();

        let kvm = replay(&transcript);
        let again = File::default();
        let record = Record::of_replay(again.clone(), &kvm);
        assert_eq!(vmm(&record.over(kvm.clone())), seen);
        record.finish().unwrap();
        kvm.finish().unwrap();
        assert_eq!(again.text(), transcript);
    }
}

#[test]
fn a_transcript_says_what_a_person_looks_for() {
    let (transcript, _) = recorded();
    let lines: Vec<&str> = transcript.lines().collect();
    let has = |text: &str| {
        assert!(lines.iter().any(|line| line.contains(text)), "no {text} in\n{transcript}");
    };
    assert_eq!(lines[0], r#"{"hv-transcript":1,"meta":{"guest":"mocks"}}"#);
    assert_eq!(lines[1], r#"{"thread":0,"on":"system","call":"KVM_GET_API_VERSION","ok":12}"#);
    assert_eq!(*lines.last().unwrap(), r#"{"end":true}"#);
    has(r#""on":"vm0","call":"KVM_SET_TSS_ADDR","args":{"address":"0xfeffd000"}}"#);
    has(r#""call":"KVM_CREATE_PIT2","args":{"config":{"flags":0}},"err":{"errno":"EEXIST""#);
    has(r#""cr0":"0x60000010""#);
    has(r#""args":{"data":"010203040506"}"#);
    has(r#"{"io_out":{"port":"0x3f8","size":2,"count":8}}"#);
    has(r#""data":"737472696e67206f6620776f72647321""#);
    has(r#"{"signal":1,"count":1,"during":["vm0/vcpu0""#);
    has(r#""on":"vm0/kick1","call":"tgkill"}"#);
    // Nothing differs from run to run but what threads of their own do.
    let main = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.contains("\"thread\":0")).map(str::to_owned).collect()
    };
    assert_eq!(main(&recorded().0), main(&transcript));
}
