//! What is recorded of signals, and what becomes of a transcript that can't be written.

use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::Record;
use crate::layer::transcript::MAX_LINE;
use crate::layer::{Interceptor, Layered, LayeredVm, Meta, RecordError, Replay};
use crate::mock::{MockHypervisor, MockVm};
use crate::{
    Errno, Error, EventFd, Gsi, Hypervisor, IoAddress, IoEvent, IoEventBackend, Ioctl, IrqBackend,
    Irqfd,
};

#[derive(Clone, Default)]
struct File(Arc<Mutex<Vec<u8>>>);

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl File {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn event() -> EventFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap().into()
}

fn wait(event: &EventFd) -> u64 {
    poll(&mut [PollFd::new(event, PollFlags::IN)], None).unwrap();
    event.take().unwrap()
}

/// What KVM was given to signal, call by call.
#[derive(Clone, Default)]
struct Given(Arc<Mutex<Vec<EventFd>>>);

impl Given {
    fn last(&self) -> EventFd {
        self.0.lock().unwrap().last().unwrap().clone()
    }
}

fn host(given: &Given) -> MockHypervisor {
    let mut kvm = MockHypervisor::new();
    let given = given.clone();
    kvm.expect_create_vm().returning(move |_| {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        let to = given.clone();
        let full = Error::new(Ioctl::Ioeventfd, Errno::ENOSPC);
        vm.expect_ioeventfd_assign().returning(move |event| {
            to.0.lock().unwrap().push(event.event.clone());
            if event.length == 8 { Err(full) } else { Ok(()) }
        });
        let to = given.clone();
        vm.expect_ioeventfd_deassign().returning(move |event| {
            to.0.lock().unwrap().push(event.event.clone());
            Ok(())
        });
        let to = given.clone();
        vm.expect_irqfd_assign().returning(move |irqfd| {
            to.0.lock().unwrap().push(irqfd.resample.clone().unwrap());
            Ok(())
        });
        vm.expect_irqfd_deassign().returning(|_, _| Ok(()));
        vm.expect_irq_line().returning(|_, _| Ok(()));
        Ok(vm)
    });
    kvm
}

struct Machine {
    file: File,
    record: Record,
    given: Given,
    kvm: Layered<MockHypervisor, Record>,
}

impl Machine {
    fn new() -> Self {
        let (file, given) = (File::default(), Given::default());
        let record = Record::new(file.clone());
        let kvm = record.over(host(&given));
        Self { file, record, given, kvm }
    }

    fn vm(&self) -> LayeredVm<MockVm, Record> {
        self.kvm.create_vm(0).unwrap()
    }

    fn stand_ins(&self) -> usize {
        self.record.recorder.lock().stand_ins.count()
    }

    /// The transcript without its first two lines (the version and the VM) and the last.
    fn lines(&self) -> Vec<String> {
        let text = self.file.text();
        text.lines().skip(2).filter(|line| !line.contains("\"end\"")).map(str::to_owned).collect()
    }
}

fn doorbell(address: u64, length: u32, event: &EventFd) -> IoEvent {
    let address = IoAddress::Mmio(address);
    IoEvent { address, length, datamatch: None, event: event.clone() }
}

const DOORBELL: &str = r#"{"thread":0,"on":"vm0","call":"KVM_IOEVENTFD","args":{"mmio":"0x1000","length":4,"eventfd":0}}"#;
const LINE: &str = r#"{"thread":0,"on":"vm0","call":"KVM_IRQ_LINE","args":{"gsi":4,"level":true}}"#;

#[test]
fn a_signal_reaches_the_vmm_while_it_waits_and_stands_in_the_transcript() {
    let machine = Machine::new();
    let (vm, event) = (machine.vm(), event());
    vm.ioeventfd_assign(&doorbell(0x1000, 4, &event)).unwrap();
    let given = machine.given.last();
    assert_ne!(given.id(), event.id());
    for n in 1..=3 {
        given.signal();
        assert_eq!(wait(&event), 1, "signal {n}");
    }
    vm.irq_line(Gsi(4), true).unwrap();
    let signal = r#"{"signal":0,"count":1}"#;
    assert_eq!(machine.lines(), [DOORBELL, signal, signal, signal, LINE]);
}

#[test]
fn a_signal_comes_before_the_call_that_returns_after_it() {
    let machine = Machine::new();
    let (vm, event) = (machine.vm(), event());
    vm.ioeventfd_assign(&doorbell(0x1000, 4, &event)).unwrap();
    // Whoever waits can't be faster than who holds the lock.
    let state = machine.record.recorder.lock();
    machine.given.last().signal();
    machine.given.last().signal();
    drop(state);
    vm.irq_line(Gsi(4), true).unwrap();
    assert_eq!(machine.lines(), [DOORBELL, r#"{"signal":0,"count":2}"#, LINE]);
    assert_eq!(event.take(), Some(2), "passed on before the call returned");
}

#[test]
fn one_eventfd_for_two_doorbells_is_the_same_stand_in_until_both_are_gone() {
    let machine = Machine::new();
    let (vm, event) = (machine.vm(), event());
    let [one, two] = [0x1000, 0x2000].map(|at| doorbell(at, 4, &event));
    vm.ioeventfd_assign(&one).unwrap();
    let given = machine.given.last();
    vm.ioeventfd_assign(&two).unwrap();
    assert_eq!(machine.given.last(), given);
    assert_eq!(machine.stand_ins(), 1);
    vm.ioeventfd_deassign(&one).unwrap();
    assert_eq!((machine.given.last(), machine.stand_ins()), (given.clone(), 1));
    vm.ioeventfd_deassign(&two).unwrap();
    assert_eq!((machine.given.last(), machine.stand_ins()), (given, 0));
}

#[test]
fn stand_ins_go_with_a_refused_call_and_with_the_vm() {
    let machine = Machine::new();
    let (vm, other, event) = (machine.vm(), machine.vm(), event());
    assert_eq!(vm.ioeventfd_assign(&doorbell(0x1000, 8, &event)).unwrap_err().errno, Errno::ENOSPC);
    assert_eq!(machine.stand_ins(), 0);
    vm.ioeventfd_assign(&doorbell(0x1000, 4, &event)).unwrap();
    other.ioeventfd_assign(&doorbell(0x1000, 4, &event)).unwrap();
    assert_eq!(machine.stand_ins(), 2, "two VMs");
    machine.given.last().signal();
    drop(other);
    assert_eq!(machine.stand_ins(), 1);
    assert_eq!(wait(&event), 1, "nothing is lost");
    drop(vm);
    assert_eq!(machine.stand_ins(), 0);
}

#[test]
fn the_end_of_an_interrupt_is_a_signal_too() {
    let machine = Machine::new();
    let (vm, irq, resample) = (machine.vm(), event(), event());
    let irqfd = Irqfd { event: irq.clone(), gsi: Gsi(5), resample: Some(resample.clone()) };
    vm.irqfd_assign(&irqfd).unwrap();
    machine.given.last().signal();
    assert_eq!(wait(&resample), 1);
    vm.irqfd_deassign(&irq, Gsi(6)).unwrap();
    assert_eq!(machine.stand_ins(), 1, "another GSI");
    vm.irqfd_deassign(&irq, Gsi(5)).unwrap();
    assert_eq!(machine.stand_ins(), 0);
    machine.record.finish().unwrap();
    let lines = machine.lines();
    assert_eq!(
        &lines[..2],
        [
            r#"{"thread":0,"on":"vm0","call":"KVM_IRQFD","args":{"gsi":5,"eventfd":0,"resample":1}}"#,
            r#"{"signal":1,"count":1}"#
        ]
    );

    let kvm = Replay::new(Cursor::new(machine.file.text())).unwrap();
    let vm = kvm.create_vm(0).unwrap();
    assert_eq!(resample.take(), None);
    vm.irqfd_assign(&irqfd).unwrap();
    assert_eq!(resample.take(), Some(1), "replayed");
    assert_eq!(irq.take(), None);
    vm.irqfd_deassign(&irq, Gsi(6)).unwrap();
    vm.irqfd_deassign(&irq, Gsi(5)).unwrap();
    kvm.finish().unwrap();
}

#[test]
fn nothing_stays_when_the_last_handle_goes() {
    let machine = Machine::new();
    let vm = machine.vm();
    vm.ioeventfd_assign(&doorbell(0x1000, 4, &event())).unwrap();
    let recorder = Arc::downgrade(&machine.record.recorder);
    drop((machine, vm));
    // Its drop has waited for the thread, unless the thread itself is the last.
    assert!(recorder.upgrade().is_none());
}

#[test]
fn a_transcript_that_cant_be_written_is_told_at_the_end_and_harms_no_call() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let record = Record::new(Full(200));
    let kvm = record.over(host(&Given::default()));
    for _ in 0..10 {
        kvm.create_vm(0).unwrap();
    }
    let error = record.finish().unwrap_err();
    assert!(matches!(error, RecordError::Write { line: 4, .. }), "{error}");
    assert!(matches!(record.finish(), Err(RecordError::Finished)));
}

#[test]
fn what_is_recorded_after_the_end_is_not() {
    let machine = Machine::new();
    let vm = machine.vm();
    machine.record.finish().unwrap();
    let text = machine.file.text();
    vm.irq_line(Gsi(4), true).unwrap();
    assert_eq!(machine.file.text(), text);
    assert!(text.ends_with("{\"end\":true}\n"));
}

#[test]
fn no_line_is_longer_than_a_reader_takes() {
    let meta = Meta::from([("text".to_owned(), "x".repeat(MAX_LINE))]);
    let file = File::default();
    let record = Record::with_meta(file.clone(), &meta);
    assert!(matches!(record.finish(), Err(RecordError::TooLong { line: 1, .. })));
    assert_eq!(file.text(), "");
}
