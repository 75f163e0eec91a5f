//! The vCPU descriptor: [`Vcpu`] over `KVM_RUN` and the register ioctls.

use std::ops::Range;
use std::sync::Arc;

use hv_core::{
    Call, CoalescedWrite, Context, DirtyRing, Errno, Error, ExitReply, InterruptState, Ioctl, Vcpu,
    VcpuExit,
};
use kvm_bindings::{
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu,
    kvm_guest_debug, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_translation, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use crate::dirty_ring::KvmDirtyRing;
use crate::exit::{self, Owed};
use crate::kick::Kickable;
use crate::run_page::{ImmediateExit, RunPage};
use crate::vm::VmInner;
use crate::{KvmKick, raw};

/// A virtual processor.
///
/// It holds what the VM needs, so it works on when the [`crate::KvmVm`] is dropped first.
#[derive(Debug)]
pub struct KvmVcpu {
    // Dropped in this order: the descriptor, then the mapping, then the VM (inside `shared`).
    fd: VcpuFd,
    page: RunPage,
    /// Where in the page the data of the last exit is, empty unless it was port I/O.
    io_data: Range<usize>,
    /// What the last exit waits for.
    owed: Option<Owed>,
    id: u32,
    shared: Arc<Kickable>,
}

impl KvmVcpu {
    pub(crate) fn new(
        id: u32,
        fd: VcpuFd,
        page: RunPage,
        exit: ImmediateExit,
        vm: Arc<VmInner>,
    ) -> Self {
        let shared = Kickable::new(id, exit, vm);
        Self { fd, page, io_data: 0..0, owed: None, id, shared }
    }

    fn error(&self, ioctl: Ioctl, errno: Errno) -> Error {
        Error::new(ioctl, errno).about(Context::Vcpu(self.id))
    }

    /// Makes the error of an ioctl from kvm-ioctls' error.
    fn failed(&self, ioctl: Ioctl) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |error| self.error(ioctl, raw::errno(error))
    }

    /// The exit the page describes.
    fn exit(&mut self) -> Result<VcpuExit, Error> {
        let reason = self.page.exit_reason();
        self.owed = exit::owed(reason, self.page.payload());
        match reason {
            KVM_EXIT_IO => {
                let range = exit::io_data(self.page.payload());
                // KVM never points outside its own mapping; if it did, this exit has no data.
                self.io_data = range
                    .filter(|range| self.page.bytes(range.clone()).is_some())
                    .ok_or_else(|| self.error(Ioctl::Run, Errno::EIO))?;
            }
            KVM_EXIT_INTR => self.shared.consume(),
            _ => {}
        }
        Ok(exit::decode(reason, self.page.payload()))
    }
}

impl Vcpu for KvmVcpu {
    type Kick = KvmKick;

    fn id(&self) -> u32 {
        self.id
    }

    fn kicker(&self) -> KvmKick {
        self.shared.kicker()
    }

    /// As the trait says. `EAGAIN` is not an error here: KVM answers it when a vCPU that waited to
    /// be started (`KVM_MP_STATE_UNINITIALIZED`) wakes up, and wants to be called again. That is
    /// done at once; a kick ends it like any other run.
    fn run(&mut self) -> Result<VcpuExit, Error> {
        self.io_data = 0..0;
        self.owed = None;
        let Self { fd, page, shared, .. } = self;
        let result = shared.running(|| {
            loop {
                match raw::run(fd, page) {
                    Err(Errno::EAGAIN) => {}
                    result => return result,
                }
            }
        });
        match result {
            Ok(()) => self.exit(),
            // The exit reason is that of an earlier run if `immediate_exit` ended this one.
            Err(Errno::EINTR) => {
                self.shared.consume();
                Ok(VcpuExit::Interrupted)
            }
            // The one exit that comes with an error.
            Err(Errno::EFAULT | Errno::EHWPOISON)
                if self.page.exit_reason() == KVM_EXIT_MEMORY_FAULT =>
            {
                self.exit()
            }
            Err(errno) => Err(self.error(Ioctl::Run, errno)),
        }
    }

    fn io_data(&mut self) -> &mut [u8] {
        self.page.bytes(self.io_data.clone()).unwrap_or_default()
    }

    /// Answers the last exit. A reply of a kind it does not ask for is ignored.
    fn reply(&mut self, reply: ExitReply) {
        exit::answer(self.page.payload_mut(), self.owed, reply);
    }

    fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error> {
        let failed = |errno| Error::new(Call::MmapDirtyRing, errno).about(Context::Vcpu(self.id));
        let vm = self.shared.vm();
        let bytes = *vm.dirty_ring.get().ok_or(Errno::EINVAL).map_err(failed)?;
        Ok(Arc::new(KvmDirtyRing::map(&self.fd, bytes, vm).map_err(failed)?))
    }

    #[inline]
    fn has_coalesced_write(&self) -> bool {
        let ring = self.shared.vm().coalesced.ring(&self.page);
        ring.is_some_and(|ring| !ring.is_empty())
    }

    fn take_coalesced_write(&self) -> Result<Option<CoalescedWrite>, Error> {
        let taken = self.shared.vm().coalesced.take(&self.page);
        taken.map_err(|errno| Error::new(Call::CoalescedRing, errno).about(Context::Vcpu(self.id)))
    }

    fn interrupt_state(&self) -> InterruptState {
        self.page.interrupt_state()
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.page.set_request_interrupt_window(wanted);
    }

    fn interrupt(&self, vector: u8) -> Result<(), Error> {
        raw::interrupt(&self.fd, vector).map_err(|errno| self.error(Ioctl::Interrupt, errno))
    }

    fn nmi(&self) -> Result<(), Error> {
        self.fd.nmi().map_err(self.failed(Ioctl::Nmi))
    }

    fn regs(&self) -> Result<kvm_regs, Error> {
        self.fd.get_regs().map_err(self.failed(Ioctl::GetRegs))
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.fd.set_regs(regs).map_err(self.failed(Ioctl::SetRegs))
    }

    fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.fd.get_sregs().map_err(self.failed(Ioctl::GetSregs))
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.fd.set_sregs(sregs).map_err(self.failed(Ioctl::SetSregs))
    }

    fn fpu(&self) -> Result<kvm_fpu, Error> {
        self.fd.get_fpu().map_err(self.failed(Ioctl::GetFpu))
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        self.fd.set_fpu(fpu).map_err(self.failed(Ioctl::SetFpu))
    }

    fn xcrs(&self) -> Result<kvm_xcrs, Error> {
        self.fd.get_xcrs().map_err(self.failed(Ioctl::GetXcrs))
    }

    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error> {
        self.fd.set_xcrs(xcrs).map_err(self.failed(Ioctl::SetXcrs))
    }

    fn debugregs(&self) -> Result<kvm_debugregs, Error> {
        self.fd.get_debug_regs().map_err(self.failed(Ioctl::GetDebugregs))
    }

    fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<(), Error> {
        self.fd.set_debug_regs(debugregs).map_err(self.failed(Ioctl::SetDebugregs))
    }

    fn mp_state(&self) -> Result<kvm_mp_state, Error> {
        self.fd.get_mp_state().map_err(self.failed(Ioctl::GetMpState))
    }

    fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), Error> {
        self.fd.set_mp_state(state).map_err(self.failed(Ioctl::SetMpState))
    }

    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Error> {
        self.fd.get_vcpu_events().map_err(self.failed(Ioctl::GetVcpuEvents))
    }

    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.fd.set_vcpu_events(events).map_err(self.failed(Ioctl::SetVcpuEvents))
    }

    fn lapic(&self) -> Result<kvm_lapic_state, Error> {
        self.fd.get_lapic().map_err(self.failed(Ioctl::GetLapic))
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        self.fd.set_lapic(lapic).map_err(self.failed(Ioctl::SetLapic))
    }

    fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error> {
        raw::msrs(&self.fd, entries).map_err(|errno| self.error(Ioctl::GetMsrs, errno))
    }

    fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize, Error> {
        raw::set_msrs(&self.fd, entries).map_err(|errno| self.error(Ioctl::SetMsrs, errno))
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        raw::cpuid(&self.fd).map_err(|errno| self.error(Ioctl::GetCpuid2, errno))
    }

    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        raw::set_cpuid(&self.fd, entries).map_err(|errno| self.error(Ioctl::SetCpuid2, errno))
    }

    fn translate(&self, linear_address: u64) -> Result<kvm_translation, Error> {
        self.fd.translate_gva(linear_address).map_err(self.failed(Ioctl::Translate))
    }

    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Error> {
        self.fd.set_guest_debug(debug).map_err(self.failed(Ioctl::SetGuestDebug))
    }

    fn tsc_khz(&self) -> Result<u32, Error> {
        raw::tsc_khz(&self.fd).map_err(|errno| self.error(Ioctl::GetTscKhz, errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kvm, KvmVm};

    #[test]
    fn what_may_be_shared_and_sent() {
        fn send<T: Send>() {}
        fn share<T: Send + Sync>() {}
        send::<KvmVcpu>();
        share::<Kvm>();
        share::<KvmVm>();
        share::<KvmKick>();
    }
}
