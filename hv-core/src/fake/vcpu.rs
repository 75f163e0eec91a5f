//! The vCPU: runs a script, and gives back the state it was given.

use std::sync::Arc;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};
use rustix::event::{PollFd, PollFlags, poll};

use super::FakeKick;
use super::guest::Seen;
use super::kick::Kickable;
use super::registers::Registers;
use super::run::Next;
use super::state::{self, State};
use super::vm::Handle;
use crate::{
    Call, Capability, CoalescedWrite, Context, DirtyGfn, DirtyRing, Errno, Error, ExitReply,
    InterruptState, IoAddress, IoDirection, IoExit, Ioctl, MmioExit, Vcpu, VcpuExit,
};

/// `X86_EFLAGS_IF`.
const INTERRUPT_FLAG: u64 = 1 << 9;
/// `KVM_GUESTDBG_INJECT_DB` and `_BP`.
const GUESTDBG_INJECT: u32 = 0x4_0000 | 0x8_0000;

/// A virtual processor in memory.
///
/// It runs the script it was given ([`super::FakeHost::guest`], [`super::VmView::program`]). A vCPU
/// that is dropped stays in its VM, as in KVM: its id can't be used again.
#[derive(Debug)]
pub struct FakeVcpu {
    id: u32,
    vm: Arc<Handle>,
    kick: Arc<Kickable>,
    /// The data of the last exit, empty unless it was port I/O.
    io_data: Vec<u8>,
    owed: Option<Owed>,
    window: bool,
    interrupts: InterruptState,
}

/// The dirty ring of a vCPU, which keeps the VM as the mapping of KVM's does.
#[derive(Debug)]
struct FakeDirtyRing {
    entries: Arc<[DirtyGfn]>,
    _vm: Arc<Handle>,
}

impl DirtyRing for FakeDirtyRing {
    fn entries(&self) -> &[DirtyGfn] {
        &self.entries
    }
}

/// What the last exit waits for.
#[derive(Debug)]
enum Owed {
    /// The value of a read from memory, cut to its length.
    Mmio { address: u64, len: u8, data: [u8; 8] },
    /// The data of a read from a port is in `io_data`.
    Port(u16),
    /// Another answer, if it came.
    Reply(VcpuExit, Option<ExitReply>),
}

impl Owed {
    fn new(exit: &VcpuExit) -> Option<Self> {
        Some(match *exit {
            VcpuExit::Mmio(MmioExit { address, len, written: None }) => {
                Owed::Mmio { address, len, data: [0; 8] }
            }
            VcpuExit::Io(IoExit { direction: IoDirection::In, port, .. }) => Owed::Port(port),
            VcpuExit::Hypercall { .. } | VcpuExit::Rdmsr { .. } | VcpuExit::Wrmsr { .. } => {
                Owed::Reply(*exit, None)
            }
            _ => return None,
        })
    }
}

impl FakeVcpu {
    /// Puts a vCPU into a VM.
    pub(super) fn create(id: u32, vm: &Arc<Handle>, state: &mut State) -> Result<Self, Errno> {
        if state.vcpus.contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        let host = &vm.shared.system.host;
        let kick = Kickable::new()?;
        let registers = Registers::new(id, state.has_irqchip(), &host.msrs);
        let script = host.guests.get(&id).cloned().unwrap_or_default();
        state.vcpus.insert(id, state::Vcpu::new(registers, script, kick.clone()));
        state.irq.add_vcpu(id);
        state.memory.add_ring(id);
        state.vcpu_handles += 1;
        Ok(Self {
            id,
            vm: vm.clone(),
            kick,
            io_data: Vec::new(),
            owed: None,
            window: false,
            interrupts: InterruptState::default(),
        })
    }

    /// Counts a call, asks whether this host's KVM has it at all, and makes it.
    fn call<R>(
        &self,
        call: impl Into<Call>,
        f: impl FnOnce(&mut State, u32) -> Result<R, Errno>,
    ) -> Result<R, Error> {
        let call = call.into();
        let system = &self.vm.shared.system;
        system.count(call);
        let result = match needs(call).is_none_or(|cap| system.host.has(cap)) {
            true => self.vm.shared.with(|state| f(state, self.id)),
            false => Err(Errno::ENOTTY),
        };
        result.map_err(|errno| Error::new(call, errno).about(Context::Vcpu(self.id)))
    }

    /// The same for a call about registers.
    fn registers<R>(
        &self,
        ioctl: Ioctl,
        f: impl FnOnce(&mut Registers) -> Result<R, Errno>,
    ) -> Result<R, Error> {
        self.call(ioctl, |state, id| f(&mut vcpu(state, id)?.registers))
    }

    /// Gives the guest what the last exit waited for.
    fn complete(&mut self) {
        let seen = match self.owed.take() {
            Some(Owed::Mmio { address, len, data }) => {
                let data = data.into_iter().take(len.into()).collect();
                Seen::Read { address: IoAddress::Mmio(address), data }
            }
            Some(Owed::Port(port)) => {
                let data = std::mem::take(&mut self.io_data);
                Seen::Read { address: IoAddress::Pio(port), data }
            }
            Some(Owed::Reply(_, Some(reply))) => Seen::Reply(reply),
            Some(Owed::Reply(_, None)) | None => return,
        };
        self.vm.shared.with(|state| state.saw(self.id, seen));
    }

    /// Waits for an irqfd or for someone to wake this vCPU.
    fn wait(&self) -> Result<(), Errno> {
        let event = self.kick.event();
        let mut fds =
            [PollFd::new(&self.vm.shared.epoll, PollFlags::IN), PollFd::new(event, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Errno(errno.raw_os_error())),
        }
        // Before the next look at what there is, so that nothing is missed.
        let _ = event.take();
        Ok(())
    }
}

/// The vCPU of a handle, which a VM has as long as the handle.
fn vcpu(state: &mut State, id: u32) -> Result<&mut state::Vcpu, Errno> {
    state.vcpus.get_mut(&id).ok_or(Errno::EBADF)
}

/// The capability that says whether KVM has an ioctl of a vCPU.
fn needs(call: Call) -> Option<Capability> {
    use {Capability as C, Ioctl as I};
    let Call::Ioctl(ioctl) = call else { return None };
    Some(match ioctl {
        I::GetXcrs | I::SetXcrs => C::Xcrs,
        I::GetDebugregs | I::SetDebugregs => C::DebugRegs,
        I::GetMpState | I::SetMpState => C::MpState,
        I::GetVcpuEvents | I::SetVcpuEvents => C::VcpuEvents,
        I::GetLapic | I::SetLapic => C::Irqchip,
        I::GetCpuid2 | I::SetCpuid2 => C::ExtCpuid,
        I::GetTscKhz => C::GetTscKhz,
        _ => return None,
    })
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        self.vm.shared.with(|state| state.vcpu_handles = state.vcpu_handles.saturating_sub(1));
    }
}

impl Vcpu for FakeVcpu {
    type Kick = FakeKick;

    fn id(&self) -> u32 {
        self.id
    }

    fn kicker(&self) -> FakeKick {
        self.kick.kicker(&self.vm.shared.system)
    }

    /// Runs the script up to an exit; at its end there is [`VcpuExit::Hlt`], every time. With an
    /// in-kernel irqchip, any vCPU but the first waits for its INIT and start-up messages first.
    fn run(&mut self) -> Result<VcpuExit, Error> {
        self.vm.shared.system.count(Ioctl::Run);
        self.complete();
        self.io_data.clear();
        loop {
            let (next, interrupts) = self.vm.shared.with(|state| {
                let next = state.step(self.id, self.window);
                (next, state.interrupt_state(self.id))
            });
            self.interrupts = interrupts;
            match next {
                Next::Go => {}
                Next::Wait => self
                    .wait()
                    .map_err(|errno| Error::new(Ioctl::Run, errno).about(Context::Vcpu(self.id)))?,
                Next::Exit(exit, data) => {
                    self.io_data = data;
                    self.owed = Owed::new(&exit);
                    return Ok(exit);
                }
            }
        }
    }

    fn io_data(&mut self) -> &mut [u8] {
        &mut self.io_data
    }

    /// A reply of a kind the exit does not ask for is ignored. A read that is not answered reads 0.
    fn reply(&mut self, reply: ExitReply) {
        match (&mut self.owed, reply) {
            (Some(Owed::Mmio { data, .. }), ExitReply::Mmio(bytes)) => *data = bytes,
            (Some(Owed::Reply(exit, answer)), reply) => {
                let asked = matches!(
                    (exit, reply),
                    (VcpuExit::Hypercall { .. }, ExitReply::Hypercall(_))
                        | (VcpuExit::Rdmsr { .. }, ExitReply::Rdmsr(_))
                        | (VcpuExit::Wrmsr { .. }, ExitReply::Wrmsr(_))
                );
                if asked {
                    *answer = Some(reply);
                }
            }
            _ => {}
        }
    }

    fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error> {
        self.call(Call::MmapDirtyRing, |state, id| {
            let entries = state.memory.ring(id).ok_or(Errno::EINVAL)?;
            let ring: Arc<dyn DirtyRing> =
                Arc::new(FakeDirtyRing { entries, _vm: self.vm.clone() });
            Ok(ring)
        })
    }

    fn has_coalesced_write(&self) -> bool {
        self.vm.shared.with(|state| state.io.has_collected())
    }

    fn take_coalesced_write(&self) -> Result<Option<CoalescedWrite>, Error> {
        Ok(self.vm.shared.with(|state| state.io.take_collected()))
    }

    fn interrupt_state(&self) -> InterruptState {
        self.interrupts
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.window = wanted;
    }

    fn interrupt(&self, vector: u8) -> Result<(), Error> {
        self.call(Ioctl::Interrupt, |state, id| {
            if state.has_full_irqchip() {
                return Err(Errno::ENXIO);
            }
            let split = state.is_split();
            let vcpu = vcpu(state, id)?;
            // Only beside local APICs is a second one refused.
            if split && vcpu.injected.is_some() {
                return Err(Errno::EEXIST);
            }
            vcpu.injected = Some(vector);
            Ok(())
        })
    }

    fn nmi(&self) -> Result<(), Error> {
        self.call(Ioctl::Nmi, |state, id| {
            state.irq.nmi(id);
            Ok(())
        })
    }

    fn regs(&self) -> Result<kvm_regs, Error> {
        self.registers(Ioctl::GetRegs, |r| Ok(r.regs))
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.registers(Ioctl::SetRegs, |r| {
            r.set_regs(regs);
            Ok(())
        })
    }

    fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.call(Ioctl::GetSregs, |state, id| {
            let cr8 = state.cr8(id);
            Ok(kvm_sregs { cr8, ..vcpu(state, id)?.registers.sregs })
        })
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.call(Ioctl::SetSregs, |state, id| {
            vcpu(state, id)?.registers.set_sregs(sregs)?;
            state.set_cr8(id, sregs.cr8);
            Ok(())
        })
    }

    fn fpu(&self) -> Result<kvm_fpu, Error> {
        self.registers(Ioctl::GetFpu, |r| Ok(r.fpu()))
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        self.registers(Ioctl::SetFpu, |r| {
            r.set_fpu(fpu);
            Ok(())
        })
    }

    fn xcrs(&self) -> Result<kvm_xcrs, Error> {
        self.registers(Ioctl::GetXcrs, |r| Ok(r.xcrs()))
    }

    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error> {
        self.registers(Ioctl::SetXcrs, |r| r.set_xcrs(xcrs))
    }

    fn debugregs(&self) -> Result<kvm_debugregs, Error> {
        self.registers(Ioctl::GetDebugregs, |r| Ok(r.debugregs()))
    }

    fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<(), Error> {
        self.registers(Ioctl::SetDebugregs, |r| r.set_debugregs(debugregs))
    }

    fn mp_state(&self) -> Result<kvm_mp_state, Error> {
        self.call(Ioctl::GetMpState, |state, id| {
            state.start(id);
            Ok(vcpu(state, id)?.registers.mp_state())
        })
    }

    fn set_mp_state(&self, new: kvm_mp_state) -> Result<(), Error> {
        self.call(Ioctl::SetMpState, |state, id| {
            let irqchip = state.has_irqchip();
            vcpu(state, id)?.registers.set_mp_state(new.mp_state, irqchip)
        })
    }

    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Error> {
        self.call(Ioctl::GetVcpuEvents, |state, id| {
            let payload = state.payload;
            Ok(vcpu(state, id)?.registers.events(payload))
        })
    }

    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.call(Ioctl::SetVcpuEvents, |state, id| {
            let payload = state.payload;
            vcpu(state, id)?.registers.set_events(events, payload)
        })
    }

    fn lapic(&self) -> Result<kvm_lapic_state, Error> {
        self.call(Ioctl::GetLapic, |state, id| match state.has_irqchip() {
            true => state.irq.lapic_page(id),
            false => Err(Errno::EINVAL),
        })
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        self.call(Ioctl::SetLapic, |state, id| match state.has_irqchip() {
            true => state.irq.set_lapic_page(id, lapic),
            false => Err(Errno::EINVAL),
        })
    }

    fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error> {
        self.registers(Ioctl::GetMsrs, |r| r.msrs(entries))
    }

    fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize, Error> {
        self.registers(Ioctl::SetMsrs, |r| r.set_msrs(entries))
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        self.registers(Ioctl::GetCpuid2, |r| Ok(r.cpuid()))
    }

    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        self.call(Ioctl::SetCpuid2, |state, id| {
            let vcpu = vcpu(state, id)?;
            vcpu.registers.set_cpuid(entries, vcpu.has_run)?;
            let x2apic = |leaf: &kvm_cpuid_entry2| leaf.function == 1 && leaf.ecx & 1 << 21 != 0;
            state.irq.set_x2apic(id, entries.iter().any(x2apic));
            Ok(())
        })
    }

    fn translate(&self, linear_address: u64) -> Result<kvm_translation, Error> {
        self.call(Ioctl::Translate, |state, id| {
            let sregs = vcpu(state, id)?.registers.sregs;
            Ok(super::paging::translate(&state.memory, &sregs, linear_address))
        })
    }

    /// No flags are refused: Linux looks at none but those that inject.
    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Error> {
        self.registers(Ioctl::SetGuestDebug, |r| {
            match debug.control & GUESTDBG_INJECT != 0 && r.exception_pending() {
                true => Err(Errno::EBUSY),
                false => Ok(()),
            }
        })
    }

    fn tsc_khz(&self) -> Result<u32, Error> {
        let khz = self.vm.shared.system.host.tsc_khz;
        self.call(Ioctl::GetTscKhz, |_, _| Ok(khz))
    }
}

impl State {
    /// What `kvm_run` says after a run.
    fn interrupt_state(&mut self, id: u32) -> InterruptState {
        let pic = self.has_full_irqchip();
        let cr8 = self.cr8(id);
        let Some(vcpu) = self.vcpus.get(&id) else { return InterruptState::default() };
        let if_flag = vcpu.registers.regs.rflags & INTERRUPT_FLAG != 0;
        let ready_for_injection = pic || (if_flag && vcpu.injected.is_none());
        InterruptState { ready_for_injection, if_flag, cr8 }
    }
}
