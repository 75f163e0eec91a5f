//! A vCPU of a replay, and what kicks it.
//!
//! The one thing that is kept here is what a vCPU has between two runs: the data of the last exit,
//! and what the VMM answered to it, which are arguments of the next.

use std::sync::Arc;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};
use serde::de::Error as _;
use serde_json::Value;

use super::order::{Calling, Turned};
use super::vm::Life;
use super::{Replay, ask};
use crate::layer::answer::{RanBefore, Told, fill_msrs};
use crate::layer::transcript::{CallLine, MAX_LINE};
use crate::layer::{Object, Request, Turn};
use crate::{
    Call, Error, ExitReply, InterruptState, IoDirection, IoExit, Ioctl, Vcpu, VcpuExit, VcpuKick,
};

/// A vCPU of a [`Replay`].
#[derive(Debug)]
pub struct ReplayVcpu {
    replay: Replay,
    _vm: Arc<Life>,
    vm: u32,
    id: u32,
    /// The data of the last exit, if it was port I/O.
    data: Vec<u8>,
    /// Whether that is for the VMM to fill.
    input: bool,
    interrupts: InterruptState,
    reply: Option<ExitReply>,
    window: bool,
}

/// Whether a line is a run that was interrupted.
pub(super) fn is_interrupted(line: &CallLine) -> bool {
    let Ok(Some(ok)) = &line.result else { return false };
    // Most are not, and need not be looked at closely.
    if line.call != Ioctl::Run.name() || !ok.get().contains("interrupted") {
        return false;
    }
    let ran = serde_json::from_str(ok.get()).and_then(RanBefore::from_json);
    ran.is_ok_and(|ran| ran.exit == VcpuExit::Interrupted)
}

/// How a run ended, with as many bytes of data as it has.
fn ran(value: Value) -> Result<RanBefore, serde_json::Error> {
    let mut ran = RanBefore::from_json(value)?;
    let VcpuExit::Io(IoExit { direction, size, count, .. }) = ran.exit else {
        return match ran.data.is_empty() {
            true => Ok(ran),
            false => Err(serde_json::Error::custom("data of an exit that has none")),
        };
    };
    let bytes = u64::from(size) * u64::from(count);
    // What the VMM fills in has to fit into a line as well.
    let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes <= MAX_LINE / 4);
    match (direction, bytes) {
        (IoDirection::In, Some(bytes)) if ran.data.is_empty() => ran.data.resize(bytes, 0),
        (IoDirection::Out, Some(bytes)) if ran.data.len() == bytes => {}
        _ => {
            let n = ran.data.len();
            let wrong = format_args!("{n} bytes of data for {count} accesses of {size} bytes");
            return Err(serde_json::Error::custom(wrong));
        }
    }
    Ok(ran)
}

impl ReplayVcpu {
    pub(super) fn new(replay: Replay, life: Arc<Life>, vm: u32, id: u32) -> Self {
        Self {
            replay,
            _vm: life,
            vm,
            id,
            data: Vec::new(),
            input: false,
            interrupts: InterruptState::default(),
            reply: None,
            window: false,
        }
    }

    fn replay(&self) -> &Replay {
        &self.replay
    }

    fn object(&self) -> Object {
        Object::Vcpu { vm: self.vm, id: self.id }
    }
}

impl Drop for ReplayVcpu {
    fn drop(&mut self) {
        self.replay.order().dropped(self.vm, self.id);
    }
}

impl Vcpu for ReplayVcpu {
    type Kick = ReplayKick;

    fn id(&self) -> u32 {
        self.id
    }

    fn kicker(&self) -> ReplayKick {
        ReplayKick { replay: self.replay.clone(), vm: self.vm, id: self.id }
    }

    fn run(&mut self) -> Result<VcpuExit, Error> {
        let on = self.object();
        let data = if self.input { self.data.as_slice() } else { &[] };
        let request = Request::Run(Turn { reply: self.reply.take(), data, window: self.window });
        let turned = self.replay.order().call(Calling { on, request: &request }, |_, _| {});
        self.input = false;
        self.data.clear();
        let ran = match turned? {
            Turned::Unwritten => return Ok(VcpuExit::Interrupted),
            Turned::Line(number, line) => {
                self.replay.answer(Call::Ioctl(Ioctl::Run), number, &line, ran)?
            }
        };
        self.input = matches!(ran.exit, VcpuExit::Io(io) if io.direction == IoDirection::In);
        self.data = ran.data;
        self.interrupts = ran.interrupts;
        Ok(ran.exit)
    }

    fn io_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    fn reply(&mut self, reply: ExitReply) {
        self.reply = Some(reply);
    }

    fn interrupt_state(&self) -> InterruptState {
        self.interrupts
    }

    fn request_interrupt_window(&mut self, wanted: bool) {
        self.window = wanted;
    }

    ask! {
        interrupt(vector: u8) -> () = Request::Interrupt { vector };
        nmi() -> () = Request::Nmi;
        regs() -> kvm_regs = Request::Regs;
        set_regs(regs: &kvm_regs) -> () = Request::SetRegs(regs);
        sregs() -> kvm_sregs = Request::Sregs;
        set_sregs(sregs: &kvm_sregs) -> () = Request::SetSregs(sregs);
        fpu() -> kvm_fpu = Request::Fpu;
        set_fpu(fpu: &kvm_fpu) -> () = Request::SetFpu(fpu);
        xcrs() -> kvm_xcrs = Request::Xcrs;
        set_xcrs(xcrs: &kvm_xcrs) -> () = Request::SetXcrs(xcrs);
        debugregs() -> kvm_debugregs = Request::Debugregs;
        set_debugregs(debugregs: &kvm_debugregs) -> () = Request::SetDebugregs(debugregs);
        mp_state() -> kvm_mp_state = Request::MpState;
        set_mp_state(state: kvm_mp_state) -> () = Request::SetMpState(state);
        vcpu_events() -> kvm_vcpu_events = Request::VcpuEvents;
        set_vcpu_events(events: &kvm_vcpu_events) -> () = Request::SetVcpuEvents(events);
        lapic() -> kvm_lapic_state = Request::Lapic;
        set_lapic(lapic: &kvm_lapic_state) -> () = Request::SetLapic(lapic);
        set_msrs(entries: &[kvm_msr_entry]) -> usize = Request::SetMsrs(entries);
        cpuid() -> Vec<kvm_cpuid_entry2> = Request::Cpuid;
        set_cpuid(entries: &[kvm_cpuid_entry2]) -> () = Request::SetCpuid(entries);
        translate(linear_address: u64) -> kvm_translation = Request::Translate { linear_address };
        set_guest_debug(debug: &kvm_guest_debug) -> () = Request::SetGuestDebug(debug);
        tsc_khz() -> u32 = Request::TscKhz;
    }

    fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error> {
        let asked = entries.to_vec();
        let request = Request::Msrs(&asked);
        self.replay.ask_for(self.object(), &request, |value| fill_msrs(value, entries))
    }
}

/// What kicks a [`ReplayVcpu`].
#[derive(Debug)]
pub struct ReplayKick {
    replay: Replay,
    vm: u32,
    id: u32,
}

impl VcpuKick for ReplayKick {
    fn kick(&self) -> Result<(), Error> {
        let on = Object::Kick { vm: self.vm, id: self.id };
        match self.replay.order().call(Calling { on, request: &Request::Kick }, |_, _| {})? {
            Turned::Unwritten => Ok(()),
            Turned::Line(number, line) => {
                self.replay.answer(Call::Kick, number, &line, <()>::from_json)
            }
        }
    }
}
