//! A running virtual machine: its buses, its vCPU threads and how it stops.

pub mod build;
mod built_in;
pub mod bus;
mod connected;
mod control;
pub mod cpu;
pub mod crash;
pub mod devices;
pub mod exits;
pub mod host;
mod interrupts;
pub mod ram;
pub mod stop;
pub mod vcpu;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hv_core::init::Record;
use hv_core::{Errno, Hypervisor, Vcpu, Vm};
use hv_memory::{FileError, GuestRam};

use crate::api::Control;
use crate::complete::Counts;
use crate::console::Console;
use crate::devices::Button;
use crate::exit_code::StopReason;
use crate::gdb::Debugger;
use crate::guest::{self, Checks};
use crate::stats::DeviceStats;
use crate::terminal::TerminalError;
use crate::virtio::BalloonTarget;
use control::{Counting, MachineControl};
use crash::CrashReport;
use devices::Devices;
use exits::ExitCounts;
use interrupts::Interrupts;
use stop::Stopper;
use vcpu::VcpuThread;

/// A machine that is ready to run. Its parts go in the order of its fields: vCPUs before what they
/// use, the hypervisor last.
pub struct Machine<H: Hypervisor> {
    vcpus: Vec<VcpuThread<<H::Vm as Vm>::Vcpu>>,
    /// Before the interrupts they raise.
    devices: Devices<H::Vm>,
    console: Console,
    checks: Option<Checks>,
    debugger: Option<Debugger<<H::Vm as Vm>::Vcpu>>,
    button: Button,
    made: Instant,
    balloon: Option<BalloonTarget>,
    stopper: Stopper,
    interrupts: Interrupts<H::Vm>,
    ram: Arc<GuestRam>,
    record: Record,
    /// Last: a VM goes before its hypervisor.
    _hypervisor: H,
}

/// Why a machine that was ready could not be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// No thread for a vCPU.
    #[error("can't start a thread for vCPU {vcpu}: {errno}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// Why.
        errno: Errno,
    },
    /// The terminal can't be used.
    #[error(transparent)]
    Terminal(#[from] TerminalError),
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why.
    pub reason: StopReason,
    /// The exits of all vCPUs.
    pub exits: ExitCounts,
    /// Accesses to ports and addresses where there is nothing.
    pub unclaimed: u64,
    /// The instructions completed for all vCPUs.
    pub completed: Counts,
    /// What the vCPUs left that could not go on.
    pub crashes: Vec<CrashReport>,
    /// Bytes the guest sent to the serial port that could not be written.
    pub lost_output: u64,
    /// The file of the guest's memory, if it became shorter.
    pub lost_memory: Option<FileError>,
    /// How often the guest put a PCI BAR where none can be.
    pub refused_bars: u64,
    /// What the virtio devices did.
    pub devices: Vec<DeviceStats>,
}

impl<H> Machine<H>
where
    H: Hypervisor,
    H::Vm: Send + Sync + 'static,
    <H::Vm as Vm>::Vcpu: 'static,
{
    /// What the machine can do.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The checks of the built-in guest, if that is what runs.
    pub fn checks(&self) -> Option<&Checks> {
        self.checks.as_ref()
    }

    /// What the GDB server works with, if there is to be one, and what the machine is paused with.
    pub fn debugger(&self) -> Option<&Debugger<<H::Vm as Vm>::Vcpu>> {
        self.debugger.as_ref()
    }

    /// What the API works with, if there is to be one.
    pub fn control(&self) -> Option<Arc<dyn Control>> {
        let debugger = self.debugger.clone()?;
        let outside = self.vcpus.first()?.outside.clone();
        let com1 = self.console.com1.lock().unwrap_or_else(PoisonError::into_inner);
        let counting = Counting {
            vcpus: self.vcpus.iter().map(|vcpu| vcpu.counts.clone()).collect(),
            outside,
            lost_output: com1.lost(),
            devices: self.devices.counting(),
        };
        Some(Arc::new(MachineControl {
            debugger,
            stopper: self.stopper.clone(),
            button: self.button.clone(),
            counting,
            memory: self.ram.slots().iter().map(|slot| slot.host.len() as u64).sum(),
            balloon: self.balloon.clone(),
            made: self.made,
        }))
    }

    /// How the machine is stopped.
    pub fn stopper(&self) -> &Stopper {
        &self.stopper
    }

    /// The handle on the memory balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonTarget> {
        self.balloon.as_ref()
    }

    /// How long the guest may take, if there is a limit. A debugger takes its time, and a pause.
    pub fn deadline(&self) -> Option<Duration> {
        self.checks.as_ref().filter(|_| self.debugger.is_none()).map(|_| guest::DEADLINE)
    }

    /// Runs the machine until it stops. `serve` is the main thread's work meanwhile; if it
    /// returns before the machine has stopped, the machine is stopped.
    ///
    /// # Errors
    /// A thread can't be started, or what `serve` returns. The machine is then stopped.
    pub fn run(
        self,
        serve: impl FnOnce(&Console) -> Result<(), TerminalError>,
    ) -> Result<Outcome, RunError> {
        let Self { vcpus, devices, console, debugger, stopper, interrupts, ram, .. } = self;
        let outside = vcpus.first().map(|vcpu| vcpu.outside.clone());
        // All before the first runs, so that a stop kicks each of them once, however soon it comes.
        for vcpu in &vcpus {
            stopper.add_vcpu(vcpu.vcpu.kicker());
        }
        if let Some(debugger) = &debugger {
            stopper.add_vcpu(debugger.waker());
        }
        let mut threads = Vec::new();
        let mut result = Ok(());
        for (id, vcpu) in (0..).zip(vcpus) {
            match vcpu.spawn() {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    result = Err(RunError::Thread { vcpu: id, errno: Errno::from(&error) });
                    break;
                }
            }
        }
        if result.is_ok() {
            result = serve(&console).map_err(RunError::Terminal);
        }
        // Only counts if nobody stopped it for a reason.
        stopper.stop(StopReason::UserQuit);
        let mut outcome = Outcome {
            reason: stopper.reason().cloned().unwrap_or(StopReason::UserQuit),
            exits: ExitCounts::default(),
            unclaimed: 0,
            completed: Counts::default(),
            crashes: Vec::new(),
            lost_output: 0,
            lost_memory: None,
            refused_bars: 0,
            devices: Vec::new(),
        };
        for thread in threads {
            // One that unwound has said so by the reason.
            if let Ok(report) = thread.join() {
                outcome.exits.merge(&report.exits);
                outcome.completed.merge(&report.completed.unwrap_or_default());
                outcome.crashes.extend(report.crash.map(|crash| *crash));
            }
        }
        outcome.unclaimed = outside.map_or(0, |o| o.ports.unclaimed() + o.memory.unclaimed());
        let com1 = console.com1.lock().unwrap_or_else(PoisonError::into_inner);
        outcome.lost_output = com1.lost().load(Ordering::Relaxed);
        drop(com1);
        outcome.lost_memory = ram.check().err();
        outcome.refused_bars = devices.bus().map_or(0, |bus| bus.refusals());
        outcome.devices = devices.stop();
        drop(interrupts);
        result.map(|()| outcome)
    }
}

impl Outcome {
    /// What happened on the way, in one clause.
    pub fn summary(&self) -> impl fmt::Display {
        std::fmt::from_fn(|f| {
            write!(f, "{} exits", self.exits.total())?;
            list(f, self.exits.iter().map(|(name, n)| (n, name.to_owned())))?;
            if self.unclaimed > 0 {
                write!(f, ", {} of them where there is no device", self.unclaimed)?;
            }
            match self.completed.total() {
                0 => {}
                1 => write!(f, "; 1 instruction completed")?,
                n => write!(f, "; {n} instructions completed")?,
            }
            list(f, self.completed.iter().map(|(name, n)| (n, name)))?;
            match self.lost_output {
                0 => {}
                n => write!(f, "; {n} bytes of serial output could not be written")?,
            }
            match self.refused_bars {
                0 => Ok(()),
                n => write!(f, "; {n} PCI BARs put where none can be"),
            }
        })
    }
}

/// ` (2 of these, 1 of those)`, or nothing.
fn list(f: &mut fmt::Formatter<'_>, items: impl Iterator<Item = (u64, String)>) -> fmt::Result {
    let mut open = " (";
    for (n, name) in items {
        write!(f, "{open}{n} {name}")?;
        open = ", ";
    }
    if open == ", " { f.write_str(")") } else { Ok(()) }
}
