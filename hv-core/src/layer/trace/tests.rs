//! What a trace tells, over mocks.

use std::io;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::*;
use crate::mock::{MockHypervisor, MockVcpu, MockVcpuKick, MockVm};
use crate::{
    Errno, ExitReply, Gsi, Hypervisor, IoDirection, IoExit, Ioctl, IrqBackend, Irqfd, MmioExit,
    Vcpu, VcpuExit, VcpuKick, Vm,
};
use rustix::event::{EventfdFlags, eventfd};

/// A file that can be read while a trace holds it, and that fails from some byte on.
#[derive(Clone)]
struct Shared(Arc<Mutex<Vec<u8>>>, usize);

impl Shared {
    fn new(limit: usize) -> Self {
        Self(Arc::default(), limit)
    }

    fn lines(&self) -> Vec<Value> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = std::str::from_utf8(&bytes).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if file.len() + bytes.len() > self.1 {
            return Err(io::Error::from_raw_os_error(28));
        }
        file.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One VM with one vCPU that reads a port, writes one, reads memory and halts.
fn hypervisor() -> MockHypervisor {
    let mut kvm = MockHypervisor::new();
    kvm.expect_eventfd().returning(|| {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Ok(fd.into())
    });
    kvm.expect_create_vm().returning(|_| {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_irqfd_assign().returning(|_| Err(Error::new(Ioctl::Irqfd, Errno::EBUSY)));
        vm.expect_create_vcpu().returning(|_| {
            let mut vcpu = MockVcpu::new();
            let io = |direction| VcpuExit::Io(IoExit { direction, port: 0x60, size: 1, count: 2 });
            let mut exits = vec![
                VcpuExit::Hlt,
                VcpuExit::Mmio(MmioExit { address: 0xd000_0000, len: 4, written: None }),
                io(IoDirection::Out),
                io(IoDirection::In),
            ];
            vcpu.expect_run().returning(move || Ok(exits.pop().unwrap()));
            vcpu.expect_io_data().return_var(vec![0xab, 0xcd]);
            vcpu.expect_reply().return_const(());
            vcpu.expect_interrupt_state().return_const(crate::InterruptState::default());
            vcpu.expect_kicker().returning(|| {
                let mut kick = MockVcpuKick::new();
                kick.expect_kick().return_const(Ok(()));
                kick
            });
            Ok(vcpu)
        });
        Ok(vm)
    });
    kvm
}

fn run_all(trace: &Trace) {
    let kvm = trace.over(hypervisor());
    let event = kvm.eventfd().unwrap();
    let vm = kvm.create_vm(0).unwrap();
    assert!(vm.irqfd_assign(&Irqfd { event, gsi: Gsi(24), resample: None }).is_err());
    let mut vcpu = vm.create_vcpu(1).unwrap();
    vcpu.kicker().kick().unwrap();
    for _ in 0..4 {
        if let VcpuExit::Mmio(_) = vcpu.run().unwrap() {
            vcpu.reply(ExitReply::Mmio([1, 2, 3, 4, 0, 0, 0, 0]));
        }
    }
}

#[test]
fn a_line_per_call_with_arguments_and_result() {
    let file = Shared::new(usize::MAX);
    let trace = Trace::to_json(file.clone());
    run_all(&trace);
    trace.finish().unwrap();
    let mut lines = file.lines();
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        assert!(line.remove("at").unwrap().is_u64() && line.remove("ns").unwrap().is_u64());
    }
    let run = |args: Value, ok: Value| json!({"on": "vm0/vcpu1", "call": "KVM_RUN", "args": args, "ok": ok});
    let port = json!({"port": "0x60", "size": 1, "count": 2});
    let expected = [
        json!({"on": "system", "call": "eventfd", "args": {}, "ok": 0}),
        json!({"on": "system", "call": "KVM_CREATE_VM", "args": {"type": 0}, "ok": 0}),
        json!({"on": "vm0", "call": "KVM_IRQFD", "args": {"gsi": 24, "eventfd": 0},
            "err": {"errno": "EBUSY", "call": "KVM_IRQFD"}}),
        json!({"on": "vm0", "call": "KVM_CREATE_VCPU", "args": {"id": 1}, "ok": null}),
        json!({"on": "vm0/kick1", "call": "tgkill", "args": {}, "ok": null}),
        run(json!({}), json!({"exit": {"io_in": port}})),
        run(json!({"data": "abcd"}), json!({"exit": {"io_out": port}, "data": "abcd"})),
        run(json!({}), json!({"exit": {"mmio_read": {"address": "0xd0000000", "len": 4}}})),
        run(json!({"reply": {"mmio": "0102030400000000"}}), json!({"exit": "hlt"})),
    ];
    assert_eq!(lines.len(), expected.len());
    for (line, expected) in lines.into_iter().zip(expected) {
        assert_eq!(line, expected);
    }
}

#[test]
fn counters_without_a_file_look_at_no_data() {
    let trace = Trace::new();
    run_all(&trace);
    let counts = trace.counts();
    assert_eq!(counts.get(Ioctl::Run).calls, 4);
    assert_eq!((counts.get(Ioctl::Irqfd).calls, counts.get(Ioctl::Irqfd).errors), (1, 1));
    assert_eq!((counts.total().calls, counts.total().errors), (9, 1));
    trace.finish().unwrap();
}

#[test]
fn a_full_disk_ends_the_file_not_the_calls() {
    let file = Shared::new(200);
    let trace = Trace::to_json(file.clone());
    run_all(&trace);
    let error = trace.finish().unwrap_err();
    assert_eq!((error.written as usize, error.written + error.lost), (file.lines().len(), 9));
    assert!(error.written > 0 && error.lost > 0);
    assert_eq!(error.source.raw_os_error(), Some(28));
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(trace.counts().total().calls, 9);
    assert_eq!(trace.finish().unwrap_err().lost, error.lost, "told again");
}

/// Collects the events of a subscriber that wants all up to a level.
struct Collector(LevelFilter, Arc<Mutex<Vec<(Level, String)>>>);

impl tracing::Subscriber for Collector {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "hv::call" && *metadata.level() <= self.0
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0)
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Fields(String);
        impl tracing::field::Visit for Fields {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
                if field.name() != "ns" {
                    self.0 += &format!("{}={value:?} ", field.name());
                }
            }
        }
        let mut fields = Fields(String::new());
        event.record(&mut fields);
        let mut events = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        events.push((*event.metadata().level(), fields.0));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn events_for_whoever_subscribes() {
    let events: Arc<Mutex<Vec<_>>> = Arc::default();
    let all = Collector(LevelFilter::TRACE, events.clone());
    tracing::subscriber::with_default(all, || run_all(&Trace::new()));
    let seen = std::mem::take(&mut *events.lock().unwrap());
    assert_eq!(seen.len(), 9, "{seen:?}");
    let irqfd = seen.iter().find(|(_, text)| text.contains("KVM_IRQFD")).unwrap();
    assert_eq!(irqfd.0, Level::DEBUG);
    for part in ["on=vm0 ", r#"args={"gsi":24,"eventfd":0}"#, "err=KVM_IRQFD failed: EBUSY"] {
        assert!(irqfd.1.contains(part), "{}", irqfd.1);
    }
    let runs: Vec<_> = seen.iter().filter(|(_, text)| text.contains("KVM_RUN")).collect();
    assert_eq!(runs.len(), 4);
    assert!(runs.iter().all(|(level, _)| *level == Level::TRACE));
    assert!(runs[1].1.contains(r#"args={"data":"abcd"}"#), "{}", runs[1].1);
}
