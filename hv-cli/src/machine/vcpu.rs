//! A vCPU thread: run, answer, run again, until the machine stops.
//!
//! Who stops the machine leaves the loop; everyone else is kicked, and a kick is never lost. So the
//! loop only looks for the stop when it was kicked: a vCPU does the same runs whenever its thread
//! comes to see the stop, and a recorded run can be replayed call by call.
//!
//! The loop allocates nothing and takes no lock of its own; what a device's answer costs is the
//! device's business. A debugger is asked only at exits that are rare: a kick, a debug exit, an
//! instruction KVM can't emulate, a crash.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use hv_core::{InternalError, Vcpu, VcpuExit, VcpuKick};
use hv_memory::GuestRam;

use super::crash::CrashReport;
use super::exits::{ExitCounts, LiveCounts, Next, Outside, answer};
use super::stop::Stopper;
use crate::complete::{Completed, Completer, Counts};
use crate::exit_code::StopReason;
use crate::gdb::{Action, Debugger, Why};
use crate::isolation::{Kind, Sandbox};

/// What a vCPU thread works with.
pub struct VcpuThread<V: Vcpu> {
    /// The vCPU.
    pub vcpu: V,
    /// What it reaches.
    pub outside: Arc<Outside>,
    /// Guest memory, for completing instructions and for crash reports.
    pub ram: Arc<GuestRam>,
    /// How the machine stops.
    pub stopper: Stopper,
    /// Completes what KVM can't emulate; `None` turns that off.
    pub completer: Option<Completer>,
    /// Who may stop it: a debugger, and the machine's control.
    pub debugger: Option<Debugger<V>>,
    /// What it does, for others to look at.
    pub counts: Arc<LiveCounts>,
}

/// What a vCPU did, told when its thread ends.
#[derive(Debug, Default)]
pub struct VcpuReport {
    /// Its exits.
    pub exits: ExitCounts,
    /// What was completed for it, unless that is turned off.
    pub completed: Option<Counts>,
    /// Why it could not go on, if it is the one that stopped the machine.
    pub crash: Option<Box<CrashReport>>,
}

impl<V: Vcpu + 'static> VcpuThread<V> {
    /// Starts the thread. The [`Stopper`] must know the vCPU before.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn spawn(self) -> io::Result<JoinHandle<VcpuReport>> {
        let name = format!("vcpu{}", self.vcpu.id());
        let sandbox = Sandbox::new(Kind::Vcpu, &[])?;
        let run = move || {
            sandbox.enter_or_end();
            self.run()
        };
        thread::Builder::new().name(name).spawn(run)
    }
}

/// Stops the machine if the thread unwinds, so that the others do not wait for ever.
struct Guard<'a>(&'a Stopper, u32);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.stop(StopReason::ThreadLost { vcpu: self.1 });
    }
}

/// What a vCPU thread does next.
enum Turn {
    /// Runs the vCPU.
    Run,
    /// Makes it execute one instruction.
    Step,
    /// Waits for the debugger, which is told why if the vCPU stopped by itself.
    Park(Option<Why>),
    /// Ends because the machine has stopped.
    Leave,
    /// Stops the machine.
    Stop(StopReason, Option<Box<CrashReport>>),
}

/// What one run of a vCPU came to.
enum Ran {
    /// A device was accessed. The instruction completes when the vCPU is run again.
    Accessed,
    /// An instruction was completed.
    Completed(Completed),
    /// It was kicked, and the machine has not stopped.
    Interrupted,
    /// Something that does not just go on.
    Ended(Turn),
}

impl<V: Vcpu> VcpuThread<V> {
    /// Runs the vCPU until it stops the machine, or is kicked because something else did.
    pub fn run(mut self) -> VcpuReport {
        let stopper = self.stopper.clone();
        let id = self.vcpu.id();
        let _guard = Guard(&stopper, id);
        let mut crash = None;
        // A debugger may want to see the first instruction.
        let mut turn = if self.is_stopping() { Turn::Park(None) } else { Turn::Run };
        loop {
            turn = match turn {
                Turn::Run => self.go_on(),
                Turn::Step => self.step(),
                Turn::Park(why) => {
                    let Some(debugger) = &self.debugger else { break };
                    let (vcpu, action) = debugger.park(self.vcpu, why);
                    self.vcpu = vcpu;
                    match action {
                        Action::Continue => Turn::Run,
                        Action::Step => Turn::Step,
                        Action::End => Turn::Leave,
                    }
                }
                Turn::Leave => break,
                Turn::Stop(reason, report) => {
                    if is_crash(&reason)
                        && let Some(debugger) = self.debugger.as_ref().filter(|d| d.is_attached())
                    {
                        self.vcpu = debugger.park(self.vcpu, Some(Why::Crashed)).0;
                    }
                    crash = report;
                    stopper.stop(reason);
                    break;
                }
            }
        }
        let exits = self.counts.exits();
        VcpuReport { exits, completed: self.completer.map(|c| c.counts().clone()), crash }
    }

    fn is_stopping(&self) -> bool {
        self.debugger.as_ref().is_some_and(|debugger| debugger.is_stopping(self.vcpu.id()))
    }

    /// Runs the vCPU as long as nothing but its own accesses ends a run.
    fn go_on(&mut self) -> Turn {
        loop {
            match self.run_once() {
                Ran::Accessed | Ran::Completed(_) => {}
                Ran::Interrupted if self.is_stopping() => return Turn::Park(None),
                Ran::Interrupted => {}
                Ran::Ended(turn) => return turn,
            }
        }
    }

    /// Lets the vCPU execute one instruction. KVM reports the step, except of an instruction that
    /// needs the VMM: a kick ends the run in which it completes.
    fn step(&mut self) -> Turn {
        let mut accessed = false;
        loop {
            match self.run_once() {
                Ran::Accessed => {
                    accessed = true;
                    if let Err(error) = self.vcpu.kicker().kick() {
                        return self.failed(error);
                    }
                }
                Ran::Completed(Completed::Normally) => return Turn::Park(Some(Why::Stepped)),
                // The step is into the handler.
                Ran::Completed(Completed::Exception(_)) => {}
                Ran::Interrupted if accessed => return Turn::Park(Some(Why::Stepped)),
                Ran::Interrupted if self.is_stopping() => return Turn::Park(None),
                Ran::Interrupted => {}
                Ran::Ended(turn) => return turn,
            }
        }
    }

    fn run_once(&mut self) -> Ran {
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(error) => return Ran::Ended(self.failed(error)),
        };
        self.counts.add((&exit).into());
        if exit == VcpuExit::Interrupted {
            let stopped = self.stopper.is_stopped();
            return if stopped { Ran::Ended(Turn::Leave) } else { Ran::Interrupted };
        }
        match answer(&mut self.vcpu, exit, &self.outside) {
            Next::Run => Ran::Accessed,
            Next::Complete(error) => self.complete(error),
            Next::Stop(reason) => self.stop(reason),
        }
    }

    /// An exit without an answer, unless a debugger has one.
    fn stop(&self, reason: StopReason) -> Ran {
        if let StopReason::UnexpectedExit { exit: VcpuExit::Debug { exception, dr6, .. }, .. } =
            reason
            && let Some(debugger) = &self.debugger
        {
            return match debugger.debug_exit(&self.vcpu, exception, dr6) {
                Ok(Some(why)) => Ran::Ended(Turn::Park(Some(why))),
                Ok(None) => Ran::Completed(Completed::Exception(exception as u8)),
                Err(error) => Ran::Ended(self.failed(error)),
            };
        }
        let crash = if is_crash(&reason) { self.crash_unless_lost() } else { None };
        Ran::Ended(Turn::Stop(reason, crash))
    }

    /// A call failed without which the vCPU can't go on.
    fn failed(&self, error: hv_core::Error) -> Turn {
        let reason = StopReason::Failed { vcpu: self.vcpu.id(), error };
        Turn::Stop(reason, self.crash_unless_lost())
    }

    /// Looks at nothing if memory is lost: what its file no longer has can't be read.
    fn crash_unless_lost(&self) -> Option<Box<CrashReport>> {
        self.ram.check().is_ok().then(|| self.crash_report(&[]))
    }

    fn crash_report(&self, bytes: &[u8]) -> Box<CrashReport> {
        Box::new(CrashReport::collect(&self.vcpu, self.ram.memory(), bytes))
    }

    /// Completes the instruction KVM could not, or says where and why not.
    fn complete(&mut self, error: InternalError) -> Ran {
        let (len, bytes) = error.instruction();
        let bytes = bytes.get(..len).unwrap_or_default();
        if let Some(debugger) = &self.debugger {
            match debugger.is_breakpoint(&self.vcpu) {
                Ok(true) => return Ran::Ended(Turn::Park(Some(Why::Breakpoint))),
                Ok(false) => {}
                Err(error) => return Ran::Ended(self.failed(error)),
            }
        }
        let refused = match &mut self.completer {
            Some(completer) => match completer.complete(&self.vcpu, self.ram.memory(), bytes) {
                Ok(completed) => {
                    self.counts.add_completed();
                    return Ran::Completed(completed);
                }
                Err(refused) => Some(refused),
            },
            None => None,
        };
        let mut report = self.crash_report(bytes);
        report.not_completed = refused;
        let reason = StopReason::InternalError { vcpu: self.vcpu.id(), error };
        Ran::Ended(Turn::Stop(reason, Some(report)))
    }
}

/// Whether the registers say more about `reason` than its sentence does.
fn is_crash(reason: &StopReason) -> bool {
    matches!(
        reason,
        StopReason::TripleFault { .. }
            | StopReason::InternalError { .. }
            | StopReason::FailEntry { .. }
            | StopReason::UnexpectedExit { .. }
            | StopReason::SystemEvent { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use hv_core::mock::MockVcpu;
    use hv_core::{Errno, Error, IoDirection, IoExit, Ioctl};
    use hv_memory::{Backing, BackingFile, KeptSize, RamLayout, Sharing};
    use kvm_bindings::{kvm_regs, kvm_sregs, kvm_translation};

    fn stopper() -> Stopper {
        Stopper::new(Event::new().unwrap())
    }

    fn thread(vcpu: MockVcpu, stopper: Stopper) -> VcpuThread<MockVcpu> {
        let ram = Arc::new(GuestRam::new(&RamLayout::new(0x1000, &[], 46).unwrap()).unwrap());
        VcpuThread {
            vcpu,
            outside: Arc::default(),
            ram,
            stopper,
            completer: None,
            debugger: None,
            counts: Arc::default(),
        }
    }

    fn vcpu() -> MockVcpu {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_id().return_const(3u32);
        vcpu.expect_regs().returning(|| Ok(kvm_regs { rip: 0x100, ..kvm_regs::default() }));
        vcpu.expect_sregs().returning(|| Ok(kvm_sregs::default()));
        vcpu.expect_translate().returning(|address| {
            Ok(kvm_translation { physical_address: address, valid: 1, ..Default::default() })
        });
        vcpu
    }

    #[test]
    fn a_stopped_machine_is_left_at_the_kick_and_not_before() {
        let mut vcpu = vcpu();
        let mut runs = 0;
        vcpu.expect_io_data().return_var(vec![0]);
        vcpu.expect_run().times(2).returning(move || {
            runs += 1;
            let out = IoExit { direction: IoDirection::Out, port: 0x80, size: 1, count: 1 };
            Ok(if runs == 1 { VcpuExit::Io(out) } else { VcpuExit::Interrupted })
        });
        let stopper = stopper();
        stopper.stop(StopReason::UserQuit);
        let report = thread(vcpu, stopper.clone()).run();
        assert_eq!(report.exits.total(), 2);
        assert_eq!(stopper.reason(), Some(&StopReason::UserQuit));
    }

    #[test]
    fn a_failed_run_stops_the_machine_and_says_which_call() {
        let mut vcpu = vcpu();
        let error = Error::new(Ioctl::Run, Errno::EFAULT);
        vcpu.expect_run().once().returning(move || Err(error));
        let stopper = stopper();
        let report = thread(vcpu, stopper.clone()).run();
        assert_eq!(stopper.reason(), Some(&StopReason::Failed { vcpu: 3, error }));
        assert!(report.crash.is_some());
    }

    #[test]
    fn memory_that_its_file_has_lost_is_not_looked_at() {
        let mut vcpu = vcpu();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(0x1000).unwrap();
        let backing = BackingFile::open(file.path(), Sharing::Shared, KeptSize::Promised).unwrap();
        let layout = RamLayout::new(0x1000, &[], 46).unwrap();
        let ram = GuestRam::backed(&layout, &Backing::file(backing)).unwrap();
        vcpu.expect_run().once().returning(move || {
            file.as_file().set_len(0).unwrap();
            Err(Error::new(Ioctl::Run, Errno::EFAULT))
        });
        let mut thread = thread(vcpu, stopper());
        thread.ram = Arc::new(ram);
        // Where the vCPU is, there is nothing: reading it would kill this process.
        assert!(thread.run().crash.is_none());
    }

    #[test]
    fn a_kick_without_a_stop_goes_on() {
        let mut vcpu = vcpu();
        let mut runs = 0;
        vcpu.expect_run().times(2).returning(move || {
            runs += 1;
            Ok(if runs == 1 { VcpuExit::Interrupted } else { VcpuExit::Shutdown })
        });
        let stopper = stopper();
        let report = thread(vcpu, stopper.clone()).run();
        assert_eq!(stopper.reason(), Some(&StopReason::TripleFault { vcpu: 3 }));
        assert_eq!(report.exits.total(), 2);
    }

    #[test]
    fn without_completion_an_emulation_failure_is_reported_with_its_bytes() {
        let mut vcpu = vcpu();
        let mut data = [0; 16];
        data[0] = 1;
        data[1] = 0xcc_01; // one byte: int3
        let error = InternalError { suberror: 1, ndata: 4, data };
        vcpu.expect_run().once().returning(move || Ok(VcpuExit::InternalError(error)));
        let stopper = stopper();
        let report = thread(vcpu, stopper.clone()).run();
        assert_eq!(stopper.reason(), Some(&StopReason::InternalError { vcpu: 3, error }));
        let text = report.crash.unwrap().to_string();
        assert!(text.contains("int3") && text.contains("cc"), "{text}");
    }

    #[test]
    fn a_thread_that_unwinds_stops_the_machine() {
        let mut vcpu = vcpu();
        vcpu.expect_run().once().returning(|| panic!("a bug"));
        let stopper = stopper();
        let thread = thread(vcpu, stopper.clone());
        assert!(std::thread::spawn(move || thread.run()).join().is_err());
        assert_eq!(stopper.reason(), Some(&StopReason::ThreadLost { vcpu: 3 }));
    }
}
