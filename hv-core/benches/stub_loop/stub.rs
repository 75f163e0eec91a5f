//! A vCPU that goes round a list of exits. What a run loop uses are functions of its own, and the
//! trait calls them; the rest is refused.

use std::hint::black_box;

use hv_core::{
    Errno, Error, ExitReply, InterruptState, IoDirection, IoExit, Ioctl, MmioExit, Vcpu, VcpuExit,
    VcpuKick,
};
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};

/// Goes round a list of exits.
pub(crate) struct StubVcpu {
    exits: Vec<VcpuExit>,
    next: usize,
    data: Vec<u8>,
    reply: Option<ExitReply>,
    state: InterruptState,
}

impl StubVcpu {
    pub(crate) fn new() -> Self {
        let io = |direction| VcpuExit::Io(IoExit { direction, port: 0x3f8, size: 1, count: 4 });
        let mmio = |written| VcpuExit::Mmio(MmioExit { address: 0xfee0_00b0, len: 4, written });
        let exits = vec![
            io(IoDirection::Out),
            mmio(Some([1; 8])),
            VcpuExit::Interrupted,
            io(IoDirection::In),
            mmio(None),
            VcpuExit::Hlt,
            VcpuExit::Rdmsr { index: 0x10, reason: 1 },
        ];
        // Values the optimizer can't know.
        Self {
            exits: black_box(exits),
            next: 0,
            data: black_box(b"data".to_vec()),
            reply: None,
            state: black_box(InterruptState::default()),
        }
    }

    pub(crate) fn replied(&self) -> Option<ExitReply> {
        self.reply
    }

    pub(crate) fn run(&mut self) -> Result<VcpuExit, Error> {
        let exit = self.exits.get(self.next).copied();
        self.next += 1;
        if self.next == self.exits.len() {
            self.next = 0;
        }
        exit.ok_or_else(|| Error::new(Ioctl::Run, Errno::EIO))
    }

    pub(crate) fn io_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    pub(crate) fn reply(&mut self, reply: ExitReply) {
        self.reply = Some(reply);
    }

    pub(crate) fn interrupt_state(&self) -> InterruptState {
        self.state
    }
}

/// A kick of a vCPU that never runs for long.
pub(crate) struct StubKick;

impl VcpuKick for StubKick {
    fn kick(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Methods that the stub refuses.
macro_rules! refused {
    ($($ioctl:ident: fn $name:ident(&self $(, $argument:ident: $type:ty)*) -> $answer:ty;)*) => {
        $(fn $name(&self $(, $argument: $type)*) -> Result<$answer, Error> {
            $(let _ = $argument;)*
            Err(Error::new(Ioctl::$ioctl, Errno::ENOTTY))
        })*
    };
}

impl Vcpu for StubVcpu {
    type Kick = StubKick;

    fn id(&self) -> u32 {
        0
    }

    fn kicker(&self) -> StubKick {
        StubKick
    }

    fn run(&mut self) -> Result<VcpuExit, Error> {
        StubVcpu::run(self)
    }

    fn io_data(&mut self) -> &mut [u8] {
        StubVcpu::io_data(self)
    }

    fn reply(&mut self, reply: ExitReply) {
        StubVcpu::reply(self, reply);
    }

    fn interrupt_state(&self) -> InterruptState {
        StubVcpu::interrupt_state(self)
    }

    fn request_interrupt_window(&mut self, _wanted: bool) {}

    refused! {
        Interrupt: fn interrupt(&self, vector: u8) -> ();
        Nmi: fn nmi(&self) -> ();
        GetRegs: fn regs(&self) -> kvm_regs;
        SetRegs: fn set_regs(&self, regs: &kvm_regs) -> ();
        GetSregs: fn sregs(&self) -> kvm_sregs;
        SetSregs: fn set_sregs(&self, sregs: &kvm_sregs) -> ();
        GetFpu: fn fpu(&self) -> kvm_fpu;
        SetFpu: fn set_fpu(&self, fpu: &kvm_fpu) -> ();
        GetXcrs: fn xcrs(&self) -> kvm_xcrs;
        SetXcrs: fn set_xcrs(&self, xcrs: &kvm_xcrs) -> ();
        GetDebugregs: fn debugregs(&self) -> kvm_debugregs;
        SetDebugregs: fn set_debugregs(&self, debugregs: &kvm_debugregs) -> ();
        GetMpState: fn mp_state(&self) -> kvm_mp_state;
        SetMpState: fn set_mp_state(&self, state: kvm_mp_state) -> ();
        GetVcpuEvents: fn vcpu_events(&self) -> kvm_vcpu_events;
        SetVcpuEvents: fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> ();
        GetLapic: fn lapic(&self) -> kvm_lapic_state;
        SetLapic: fn set_lapic(&self, lapic: &kvm_lapic_state) -> ();
        GetMsrs: fn msrs(&self, entries: &mut [kvm_msr_entry]) -> usize;
        SetMsrs: fn set_msrs(&self, entries: &[kvm_msr_entry]) -> usize;
        GetCpuid2: fn cpuid(&self) -> Vec<kvm_cpuid_entry2>;
        SetCpuid2: fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> ();
        Translate: fn translate(&self, linear_address: u64) -> kvm_translation;
        SetGuestDebug: fn set_guest_debug(&self, debug: &kvm_guest_debug) -> ();
        GetTscKhz: fn tsc_khz(&self) -> u32;
    }
}
