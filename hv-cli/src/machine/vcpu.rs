//! A vCPU thread: run, answer, run again, until the machine stops.
//!
//! Who stops the machine leaves the loop; everyone else is kicked, and a kick is never lost. So the
//! loop only looks for the stop when it was kicked: a vCPU does the same runs whenever its thread
//! comes to see the stop, and a recorded run can be replayed call by call.
//!
//! The loop allocates nothing and takes no lock of its own; what a device's answer costs is the
//! device's business.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use hv_core::{InternalError, Vcpu, VcpuExit};
use hv_memory::GuestRam;

use super::crash::CrashReport;
use super::exits::{ExitCounts, Next, Outside, answer};
use super::stop::Stopper;
use crate::complete::{Completer, Counts};
use crate::exit_code::StopReason;

/// What a vCPU thread works with.
pub struct VcpuThread<V> {
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
        thread::Builder::new().name(name).spawn(move || self.run())
    }
}

/// Stops the machine if the thread unwinds, so that the others do not wait for ever.
struct Guard<'a>(&'a Stopper, u32);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.stop(StopReason::ThreadLost { vcpu: self.1 });
    }
}

impl<V: Vcpu> VcpuThread<V> {
    /// Runs the vCPU until it stops the machine, or is kicked because something else did.
    pub fn run(mut self) -> VcpuReport {
        let stopper = self.stopper.clone();
        let id = self.vcpu.id();
        let _guard = Guard(&stopper, id);
        let mut exits = ExitCounts::default();
        let mut crash = None;
        loop {
            let exit = match self.vcpu.run() {
                Ok(exit) => exit,
                Err(error) => {
                    crash = self.crash_unless_lost();
                    stopper.stop(StopReason::Failed { vcpu: id, error });
                    break;
                }
            };
            exits.add((&exit).into());
            if exit == VcpuExit::Interrupted && stopper.is_stopped() {
                break;
            }
            let reason = match answer(&mut self.vcpu, exit, &self.outside) {
                Next::Run => continue,
                Next::Complete(error) => match self.complete(error) {
                    Ok(()) => continue,
                    Err(report) => {
                        crash = Some(report);
                        StopReason::InternalError { vcpu: id, error }
                    }
                },
                Next::Stop(reason) => {
                    if is_crash(&reason) {
                        crash = self.crash_unless_lost();
                    }
                    reason
                }
            };
            stopper.stop(reason);
            break;
        }
        VcpuReport { exits, completed: self.completer.map(|c| c.counts().clone()), crash }
    }

    /// Looks at nothing if memory is lost: what its file no longer has can't be read.
    fn crash_unless_lost(&self) -> Option<Box<CrashReport>> {
        self.ram.check().is_ok().then(|| self.crash(&[]))
    }

    fn crash(&self, bytes: &[u8]) -> Box<CrashReport> {
        Box::new(CrashReport::collect(&self.vcpu, self.ram.memory(), bytes))
    }

    /// Completes the instruction KVM could not, or says where and why not.
    fn complete(&mut self, error: InternalError) -> Result<(), Box<CrashReport>> {
        let (len, bytes) = error.instruction();
        let bytes = bytes.get(..len).unwrap_or_default();
        let refused = match &mut self.completer {
            Some(completer) => match completer.complete(&self.vcpu, self.ram.memory(), bytes) {
                Ok(_) => return Ok(()),
                Err(refused) => Some(refused),
            },
            None => None,
        };
        let mut report = self.crash(bytes);
        report.not_completed = refused;
        Err(report)
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
        VcpuThread { vcpu, outside: Arc::default(), ram, stopper, completer: None }
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
