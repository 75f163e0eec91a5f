//! The check device: where the guest reports, and what it measures itself against.
//!
//! It is on both buses, and listens to COM1. It keeps what it sees as evidence for the check that
//! runs; whatever else the guest does is a problem that fails the run, never more than that.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv_core::{Msi, MsiStatus};
use hv_irq::RouterError;

use super::check::{Check, Facts};
use super::evidence::{Access, Evidence, Fault, Place, Sent};
use super::judge::{Verdict, judge, mask};
use super::protocol::{MMIO, MMIO_LEN, ROM, mmio, port, vector};
use super::report::{CheckResult, Report, Status};
use crate::exit_code::StopReason;
use crate::layout;
use crate::machine::bus::Device;
use crate::machine::stop::Stopper;

/// What the checks need the machine to do.
pub trait Host: Send {
    /// Sends a message (`KVM_SIGNAL_MSI`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn signal_msi(&mut self, msi: Msi) -> Result<MsiStatus, RouterError>;

    /// Writes to the eventfd of the irqfd whose route leads to [`irqfd_msi`].
    ///
    /// # Errors
    /// Those of `write(2)`.
    fn raise_irqfd(&mut self) -> io::Result<()>;

    /// Reads the eventfd of the ioeventfd at [`DOORBELL`](super::DOORBELL): how often it was
    /// signalled since the last time.
    fn doorbell_events(&mut self) -> u64;

    /// Reads the memory behind the read-only page from this offset; `None` if it can't be read.
    fn read_rom(&mut self, offset: u64) -> Option<u64>;
}

/// Where in the read-only page the guest looks.
const ROM_OFFSET: u64 = MMIO + mmio::ROM - ROM;

/// The message that the irqfd's GSI leads to.
#[must_use]
pub fn irqfd_msi() -> Msi {
    message(vector::IRQFD)
}

/// What the page at [`ROM`](super::ROM) is filled with.
#[must_use]
pub fn rom_contents() -> Vec<u8> {
    (0..512).flat_map(|n| chosen(!n).to_le_bytes()).collect()
}

/// Fixed delivery to the boot CPU. (Intel SDM volume 3, 12.11 "Message Signalled Interrupts".)
fn message(vector: u32) -> Msi {
    Msi { address: layout::LOCAL_APIC.into(), data: vector, device: None }
}

/// The n-th of a sequence in which every bit changes often (SplitMix64).
fn chosen(n: u64) -> u64 {
    let z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the read-only page holds where the guest looks.
fn rom_value() -> u64 {
    chosen(!(ROM_OFFSET / 8))
}

/// A run of the checks. Clones are the same run.
#[derive(Clone)]
pub struct Checks(Arc<Mutex<Run>>);

struct Run {
    facts: Facts,
    host: Box<dyn Host>,
    stopper: Stopper,
    results: [Option<Verdict>; Check::ALL.len()],
    current: Option<(Check, Evidence)>,
    /// Values given to the guest so far.
    given: u64,
    /// The first thing the guest did that is no part of a check.
    problem: Option<String>,
    ended: bool,
}

impl Checks {
    /// A run on a machine with these facts; it stops the machine when the guest is done.
    #[must_use]
    pub fn new(facts: Facts, host: Box<dyn Host>, stopper: Stopper) -> Self {
        Self(Arc::new(Mutex::new(Run {
            facts,
            host,
            stopper,
            results: [const { None }; Check::ALL.len()],
            current: None,
            given: 0,
            problem: None,
            ended: false,
        })))
    }

    /// The device for the ports from [`PORTS`](super::PORTS) on.
    #[must_use]
    pub fn ports(&self) -> Arc<Mutex<dyn Device>> {
        Arc::new(Mutex::new(Ports(self.clone())))
    }

    /// The device for the addresses from [`MMIO`](super::MMIO) on. The read-only page lies inside.
    #[must_use]
    pub fn mmio(&self) -> Arc<Mutex<dyn Device>> {
        Arc::new(Mutex::new(Mmio(self.clone())))
    }

    /// A writer for COM1 that passes on to `out` and lets the checks see what was sent.
    pub fn com1<W: Write>(&self, out: W) -> Com1Tap<W> {
        Com1Tap { checks: self.clone(), out }
    }

    /// The results so far. What has not finished has failed.
    #[must_use]
    pub fn report(&self) -> Report {
        self.lock().report()
    }

    fn lock(&self) -> MutexGuard<'_, Run> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Run {
    fn command(&mut self, offset: u16, value: u32) {
        match offset {
            port::BEGIN => self.begin(value),
            port::VALUE => match &mut self.current {
                Some((_, evidence)) => evidence.add_value(value),
                None => self.problem(|| format!("the guest reported {value:#x} outside a check")),
            },
            port::DONE => self.done(value),
            port::END => self.end(),
            port::SEND => self.send(value),
            port::FAULT => self.fault(value),
            _ => self.problem(|| format!("the guest wrote {value:#x} to port offset {offset:#x}")),
        }
    }

    fn begin(&mut self, number: u32) {
        let check = Check::from_number(number).filter(|&check| {
            self.facts.not_applicable(check).is_none() && matches!(self.result(check), Some(None))
        });
        match check {
            Some(check) if self.current.is_none() => {
                self.current = Some((check, Evidence::default()));
            }
            _ => self.problem(|| format!("the guest began check {number}, which was not its turn")),
        }
    }

    fn done(&mut self, number: u32) {
        match self.current.take() {
            Some((check, evidence)) if check.number() == number => self.conclude(check, evidence),
            current => {
                self.current = current;
                self.problem(|| format!("the guest ended check {number}, which was not running"));
            }
        }
    }

    fn conclude(&mut self, check: Check, mut evidence: Evidence) {
        match check {
            Check::Ioeventfd => evidence.doorbell = self.host.doorbell_events(),
            Check::Readonly => evidence.rom = self.host.read_rom(ROM_OFFSET),
            _ => {}
        }
        let verdict = judge(check, &evidence, rom_value());
        if let Some(result) = self.result(check) {
            *result = Some(verdict);
        }
    }

    fn end(&mut self) {
        self.ended = true;
        let passed = self.report().passed();
        self.stopper.stop(if passed { StopReason::PowerOff } else { StopReason::ChecksFailed });
    }

    fn send(&mut self, vector: u32) {
        let Some((check, evidence)) = &mut self.current else {
            self.problem(|| format!("the guest asked for interrupt {vector:#x} outside a check"));
            return;
        };
        evidence.sent = match (check, vector) {
            (Check::Msi, vector::MSI) => Some(Sent::Message(self.host.signal_msi(message(vector)))),
            (Check::Irqfd, vector::IRQFD) => {
                Some(Sent::Event(self.host.raise_irqfd().map_err(|error| error.kind())))
            }
            _ => None,
        };
    }

    fn fault(&mut self, vector: u32) {
        let Some((check, mut evidence)) = self.current.take() else {
            self.problem(|| format!("exception {vector} in the guest outside a check"));
            return;
        };
        let [error_code, rip, cr2] = evidence.values.last_chunk().copied().unwrap_or_default();
        evidence.fault = Some(Fault { vector, error_code, rip, cr2 });
        self.conclude(check, evidence);
    }

    /// A value for the guest, kept as evidence.
    fn give(&mut self, place: Place, data: &mut [u8]) {
        let value = chosen(self.given) & mask(data.len());
        self.given = self.given.wrapping_add(1);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        self.saw(Access::read(place, data.len(), value));
    }

    fn saw(&mut self, access: Access) {
        match &mut self.current {
            Some((_, evidence)) => evidence.add_access(access),
            None => self.problem(|| format!("the guest did {access:?} outside a check")),
        }
    }

    fn problem(&mut self, what: impl FnOnce() -> String) {
        // What halted CPUs do after the end is no matter.
        if !self.ended && self.problem.is_none() {
            self.problem = Some(what());
        }
    }

    fn result(&mut self, check: Check) -> Option<&mut Option<Verdict>> {
        self.results.get_mut(check as usize)
    }

    /// Bit n says whether check n is to run.
    fn to_run(&self) -> u32 {
        let applicable = |check: &&Check| self.facts.not_applicable(**check).is_none();
        Check::ALL.iter().filter(applicable).fold(0, |bits, check| bits | 1 << check.number())
    }

    fn report(&self) -> Report {
        let result = |(&check, verdict): (&Check, &Option<Verdict>)| {
            let running = self.current.as_ref().is_some_and(|(current, _)| *current == check);
            let (status, observed) = match (self.facts.not_applicable(check), verdict) {
                (Some(reason), _) => (Status::NotApplicable, reason.to_owned()),
                (None, Some(Ok(observed))) => (Status::Passed, observed.clone()),
                (None, Some(Err(observed))) => (Status::Failed, observed.clone()),
                (None, None) if running => (Status::Failed, "did not finish".to_owned()),
                (None, None) => (Status::Failed, "did not run".to_owned()),
            };
            CheckResult { name: check.name(), status, observed }
        };
        let checks = Check::ALL.iter().zip(&self.results).map(result).collect();
        Report { checks, problem: self.problem.clone() }
    }
}

fn value_of(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

/// The port side.
struct Ports(Checks);

impl Device for Ports {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut run = self.0.lock();
        match u16::try_from(offset) {
            Ok(offset @ (port::DATA | port::STRING)) => run.give(Place::Port(offset), data),
            Ok(port::CHECKS) if data.len() == 4 => {
                data.copy_from_slice(&run.to_run().to_le_bytes());
            }
            _ => {
                data.fill(0xff);
                let len = data.len();
                run.problem(|| format!("the guest read {len} bytes of port offset {offset:#x}"));
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut run = self.0.lock();
        match (u16::try_from(offset), <[u8; 4]>::try_from(data)) {
            (Ok(offset @ (port::DATA | port::STRING)), _) => {
                run.saw(Access::write(Place::Port(offset), data.len(), value_of(data)));
            }
            (Ok(offset), Ok(value)) => run.command(offset, u32::from_le_bytes(value)),
            _ => {
                let len = data.len();
                run.problem(|| format!("the guest wrote {len} bytes to port offset {offset:#x}"));
            }
        }
    }
}

/// The MMIO side.
struct Mmio(Checks);

impl Device for Mmio {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.lock().give(Place::Mmio(offset.min(MMIO_LEN)), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let place = Place::Mmio(offset.min(MMIO_LEN));
        self.0.lock().saw(Access::write(place, data.len(), value_of(data)));
    }
}

/// The writer [`Checks::com1`] makes.
pub struct Com1Tap<W> {
    checks: Checks,
    out: W,
}

impl<W: Write> Write for Com1Tap<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        if let Some((_, evidence)) = &mut self.checks.lock().current {
            evidence.add_com1(bytes.get(..written).unwrap_or_default());
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
