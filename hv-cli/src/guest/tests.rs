//! The device under a guest written here, which does what the assembly does, and under guests
//! that do not.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use hv_core::{Errno, Error, Ioctl, Msi, MsiStatus};
use hv_irq::RouterError;
use proptest::prelude::*;

use super::check::{Check, EVERYTHING};
use super::protocol::{BANNER, DOORBELL_OTHER, LOOPBACK, mmio, port, vector};
use super::{Checks, Facts, Host, Status, irqfd_msi, rom_contents};
use crate::event::Event;
use crate::exit_code::StopReason;
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

/// A host that does what it is asked.
#[derive(Clone)]
struct GoodHost {
    sent: Arc<Mutex<Vec<Msi>>>,
    msi: Result<MsiStatus, RouterError>,
    rings: u64,
    rom_was_written: bool,
}

impl Default for GoodHost {
    fn default() -> Self {
        let sent = Arc::default();
        Self { sent, msi: Ok(MsiStatus::Delivered), rings: 3, rom_was_written: false }
    }
}

impl Host for GoodHost {
    fn signal_msi(&mut self, msi: Msi) -> Result<MsiStatus, RouterError> {
        self.sent.lock().unwrap().push(msi);
        self.msi
    }

    fn raise_irqfd(&mut self) -> io::Result<()> {
        self.sent.lock().unwrap().push(irqfd_msi());
        Ok(())
    }

    fn doorbell_events(&mut self) -> u64 {
        self.rings
    }

    fn read_rom(&mut self, offset: u64) -> Option<u64> {
        let at = offset as usize;
        let value = u64::from_le_bytes(rom_contents()[at..at + 8].try_into().unwrap());
        Some(if self.rom_was_written { !value } else { value })
    }
}

struct Guest {
    checks: Checks,
    ports: Arc<Mutex<dyn Device>>,
    mmio: Arc<Mutex<dyn Device>>,
    stopper: Stopper,
}

impl Guest {
    fn new(facts: Facts, host: GoodHost) -> Self {
        let stopper = Stopper::new(Event::new().unwrap());
        let checks = Checks::new(facts, Box::new(host), stopper.clone());
        Self { ports: checks.ports(), mmio: checks.mmio(), checks, stopper }
    }

    fn out(&self, offset: u16, value: u32) {
        self.ports.lock().unwrap().write(offset.into(), &value.to_le_bytes());
    }

    fn value(&self, value: u32) {
        self.out(port::VALUE, value);
    }

    fn values(&self, values: &[u32]) {
        values.iter().for_each(|&value| self.value(value));
    }

    fn round_trip(&self, device: &Arc<Mutex<dyn Device>>, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        let mut device = device.lock().unwrap();
        device.read(offset, &mut data[..len]);
        let value = u64::from_le_bytes(data);
        device.write(offset, &(!value).to_le_bytes()[..len]);
        value
    }

    fn string(&self, device: &Arc<Mutex<dyn Device>>, lens: &[usize], step: u64, start: u64) {
        let mut device = device.lock().unwrap();
        let mut buffer = Vec::new();
        let mut offset = start;
        for len in lens.iter().flat_map(|&len| [len; 8]) {
            let mut data = [0; 8];
            device.read(offset, &mut data[..len]);
            buffer.push((offset, data, len));
            offset += len as u64 * step;
        }
        for (offset, data, len) in buffer {
            device.write(offset, &data.map(|byte| !byte)[..len]);
        }
    }

    fn act(&self, check: Check) {
        match check {
            Check::LongMode => self.values(&[0x8000_0011, 0x20, 0x500, 0x10, 0x1122_3344]),
            Check::Com1 => {
                self.values(&[0xa55a, 0x60]);
                self.checks.com1(io::sink()).write_all(BANNER.as_bytes()).unwrap();
            }
            Check::Port1 | Check::Port2 | Check::Port4 => {
                let len = 1 << (check.number() - Check::Port1.number());
                self.value(self.round_trip(&self.ports, port::DATA.into(), len) as u32);
            }
            Check::PortString => self.string(&self.ports, &[1, 2, 4], 0, port::STRING.into()),
            Check::Mmio1 | Check::Mmio2 | Check::Mmio4 | Check::Mmio8 => {
                let len = 1 << (check.number() - Check::Mmio1.number());
                let value = self.round_trip(&self.mmio, mmio::DATA, len);
                self.value(value as u32);
                if len == 8 {
                    self.value((value >> 32) as u32);
                }
            }
            Check::MmioString => self.string(&self.mmio, &[1, 2, 4, 8], 1, mmio::STRING),
            Check::Readonly => {
                let value: [u8; 8] = rom_contents()[0x10..0x18].try_into().unwrap();
                self.mmio.lock().unwrap().write(mmio::ROM, &value.map(|byte| !byte));
                let value = u64::from_le_bytes(value);
                let halves = [value as u32, (value >> 32) as u32];
                self.values(&[halves, halves].concat());
            }
            Check::LapicTimer => self.value(1),
            Check::Com1Ioapic => self.values(&[1, 0xc4, LOOPBACK.into()]),
            Check::PitIoapic => self.values(&[1, 0]),
            Check::Msi | Check::Irqfd => {
                let vector = if check == Check::Msi { vector::MSI } else { vector::IRQFD };
                self.out(port::SEND, vector);
                self.value(1);
            }
            Check::Ioeventfd => {
                let mut mmio = self.mmio.lock().unwrap();
                mmio.write(mmio::DOORBELL, &DOORBELL_OTHER.to_le_bytes());
            }
            Check::SecondVcpu => self.values(&[1, 1, 0x8000_0011, 0x500]),
            Check::Ipi => self.values(&[1, 1]),
        }
    }

    fn run(&self, check: Check) {
        self.out(port::BEGIN, check.number());
        self.act(check);
        self.out(port::DONE, check.number());
    }

    fn run_all(&self) {
        let mut to_run = [0; 4];
        self.ports.lock().unwrap().read(port::CHECKS.into(), &mut to_run);
        let to_run = u32::from_le_bytes(to_run);
        for &check in Check::ALL.iter().filter(|check| to_run >> check.number() & 1 != 0) {
            self.run(check);
        }
        self.out(port::END, 0);
    }

    fn failed(&self) -> Vec<(&'static str, String)> {
        let failed = |c: &super::CheckResult| c.status == Status::Failed;
        let checks = self.checks.report().checks;
        checks.into_iter().filter(failed).map(|c| (c.name, c.observed)).collect()
    }

    fn observed(&self, check: Check) -> String {
        self.checks.report().checks[check.number() as usize].observed.clone()
    }

    fn problem(&self) -> String {
        self.checks.report().problem.unwrap_or_default()
    }
}

fn guest() -> Guest {
    Guest::new(EVERYTHING, GoodHost::default())
}

#[test]
fn a_guest_that_sees_what_the_host_sees_passes_and_powers_off() {
    let host = GoodHost::default();
    let guest = Guest::new(EVERYTHING, host.clone());
    guest.run_all();
    let report = guest.checks.report();
    assert_eq!(guest.failed(), []);
    assert_eq!(report.count(Status::Passed), Check::ALL.len());
    assert!(report.passed());
    assert_eq!(guest.stopper.reason(), Some(&StopReason::PowerOff));
    let vectors: Vec<_> = host.sent.lock().unwrap().iter().map(|msi| msi.data).collect();
    assert_eq!(vectors, [vector::MSI, vector::IRQFD]);
}

#[test]
fn what_the_machine_lacks_is_named_and_does_not_fail() {
    let guest = Guest::new(Facts { vcpus: 1, ..EVERYTHING }, GoodHost::default());
    guest.run_all();
    let report = guest.checks.report();
    assert!(report.passed());
    let lacking: Vec<_> =
        report.checks.iter().filter(|c| c.status == Status::NotApplicable).collect();
    assert_eq!(lacking.iter().map(|c| c.name).collect::<Vec<_>>(), ["second-vcpu", "ipi"]);
    assert!(lacking.iter().all(|c| c.observed == "the machine has one vCPU"));
}

#[test]
fn checks_that_did_not_run_or_finish_have_failed() {
    let guest = guest();
    guest.run(Check::LongMode);
    guest.out(port::BEGIN, Check::Com1.number());
    let failed = guest.failed();
    assert_eq!(failed.len(), Check::ALL.len() - 1);
    assert_eq!(failed[0], ("com1", "did not finish".to_owned()));
    assert!(failed[1..].iter().all(|(_, observed)| observed == "did not run"));
    assert!(!guest.stopper.is_stopped(), "only its end or the deadline stops it");
    guest.out(port::END, 0);
    assert_eq!(guest.stopper.reason(), Some(&StopReason::ChecksFailed));
}

#[test]
fn a_check_done_twice_keeps_its_result_and_fails_the_run() {
    let guest = guest();
    guest.out(port::BEGIN, Check::LongMode.number());
    guest.out(port::DONE, Check::LongMode.number());
    assert_eq!(guest.failed()[0], ("long-mode", "the guest reported 0 values, not 5".to_owned()));
    guest.run(Check::LongMode);
    assert_eq!(guest.failed()[0].0, "long-mode", "the second try does not count");
    assert_eq!(guest.problem(), "the guest began check 0, which was not its turn");
}

#[test]
fn what_is_no_part_of_a_check_is_a_problem() {
    type Misbehave = fn(&Guest);
    let cases: [(&str, Misbehave); 11] = [
        ("began check 77", |g| g.out(port::BEGIN, 77)),
        ("ended check 0, which was not running", |g| g.out(port::DONE, 0)),
        ("ended check 5, which was not running", |g| {
            g.out(port::BEGIN, 0);
            g.out(port::DONE, 5);
        }),
        ("began check 1, which was not its turn", |g| {
            g.out(port::BEGIN, 0);
            g.out(port::BEGIN, 1);
        }),
        ("reported 0x7 outside a check", |g| g.value(7)),
        ("asked for interrupt 0x33 outside a check", |g| g.out(port::SEND, vector::MSI)),
        ("exception 14 in the guest outside a check", |g| g.out(port::FAULT, 14)),
        ("wrote 0x1 to port offset 0x3c", |g| g.out(0x3c, 1)),
        ("wrote 2 bytes to port offset 0x0", |g| g.ports.lock().unwrap().write(0, &[0, 0])),
        ("read 1 bytes of port offset 0x10", |g| g.ports.lock().unwrap().read(0x10, &mut [0])),
        ("outside a check", |g| g.mmio.lock().unwrap().write(0x2000, &[0; 8])),
    ];
    for (expected, misbehave) in cases {
        let guest = guest();
        misbehave(&guest);
        assert!(guest.problem().contains(expected), "{expected}: {}", guest.problem());
        assert!(!guest.checks.report().passed());
    }
}

#[test]
fn a_problem_fails_a_run_whose_checks_pass() {
    let guest = guest();
    guest.value(7);
    guest.run_all();
    assert_eq!(guest.failed(), []);
    assert_eq!(guest.stopper.reason(), Some(&StopReason::ChecksFailed));
}

#[test]
fn nothing_after_the_end_changes_the_report() {
    let guest = guest();
    guest.run_all();
    let report = guest.checks.report();
    guest.out(port::FAULT, 14);
    guest.out(port::END, 0);
    guest.mmio.lock().unwrap().read(0, &mut [0; 4]);
    assert_eq!(guest.checks.report(), report);
}

#[test]
fn an_exception_fails_the_check_it_happened_in() {
    let guest = guest();
    guest.out(port::BEGIN, Check::Mmio8.number());
    guest.values(&[2, 0x1_0234, 0xdead_b000]);
    guest.out(port::FAULT, 14);
    guest.out(port::END, 0);
    let expected = "exception 14 at 0x10234, error code 0x2, CR2 0xdeadb000";
    assert_eq!(guest.observed(Check::Mmio8), expected);
    assert!(!guest.checks.report().passed());
    assert_eq!(guest.problem(), "");
}

#[test]
fn a_host_that_saw_otherwise_fails_the_check() {
    let refused = Error::new(Ioctl::SignalMsi, Errno::EINVAL);
    let cases = [
        (
            "msi",
            "KVM says NoTarget",
            GoodHost { msi: Ok(MsiStatus::NoTarget), ..Default::default() },
        ),
        (
            "msi",
            "KVM_SIGNAL_MSI failed: EINVAL",
            GoodHost { msi: Err(refused.into()), ..Default::default() },
        ),
        ("ioeventfd", "gave 0 events", GoodHost { rings: 0, ..Default::default() }),
        ("ioeventfd", "gave 4 events", GoodHost { rings: 4, ..Default::default() }),
        ("readonly-slot", "finds", GoodHost { rom_was_written: true, ..Default::default() }),
    ];
    for (name, expected, host) in cases {
        let guest = Guest::new(EVERYTHING, host);
        guest.run_all();
        let failed = guest.failed();
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(failed[0].0, name);
        assert!(failed[0].1.contains(expected), "{}", failed[0].1);
    }
}

#[test]
fn the_wrong_interrupt_is_not_sent() {
    let host = GoodHost::default();
    let guest = Guest::new(EVERYTHING, host.clone());
    guest.out(port::BEGIN, Check::Msi.number());
    guest.out(port::SEND, vector::IRQFD);
    guest.value(1);
    guest.out(port::DONE, Check::Msi.number());
    assert!(host.sent.lock().unwrap().is_empty());
    assert!(guest.observed(Check::Msi).ends_with("; the guest did not ask for it"));
}

/// One access a guest makes: on the ports or not, a write or not, where, and with what.
type Any = (bool, bool, u64, Vec<u8>);

fn any_access() -> impl Strategy<Value = Any> {
    let offset = prop_oneof![4 => (0u64..16).prop_map(|n| n * 4), 1 => any::<u64>()];
    let data = prop_oneof![
        (0u32..24).prop_map(|value| value.to_le_bytes().to_vec()),
        prop::collection::vec(any::<u8>(), 1..=8),
    ];
    (prop::bool::weighted(0.8), any::<bool>(), offset, data)
}

proptest! {
    #[test]
    fn no_guest_breaks_the_device_or_passes_by_chance(
        accesses in prop::collection::vec(any_access(), 0..200),
    ) {
        let guest = guest();
        for (is_port, is_write, offset, mut data) in accesses {
            let device = if is_port { &guest.ports } else { &guest.mmio };
            let mut device = device.lock().unwrap();
            if is_write {
                device.write(offset, &data);
            } else {
                device.read(offset, &mut data);
            }
        }
        let report = guest.checks.report();
        prop_assert!(!report.passed());
        prop_assert_eq!(report.checks.len(), Check::ALL.len());
    }
}
