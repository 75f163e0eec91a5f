//! A vCPU of a replay, and what kicks it.
//!
//! The one thing that is kept here is what a vCPU has between two runs: the data of the last exit,
//! and what the VMM answered to it, which are arguments of the next.

use std::sync::{Arc, OnceLock};

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
    Call, CoalescedWrite, DirtyGfn, DirtyRing, Error, ExitReply, InterruptState, IoDirection,
    IoExit, Ioctl, Vcpu, VcpuExit, VcpuKick,
};

/// A vCPU of a [`Replay`].
#[derive(Debug)]
pub struct ReplayVcpu {
    replay: Replay,
    life: Arc<Life>,
    vm: u32,
    id: u32,
    /// The data of the last exit, if it was port I/O.
    data: Vec<u8>,
    /// Whether that is for the VMM to fill.
    input: bool,
    interrupts: InterruptState,
    reply: Option<ExitReply>,
    window: bool,
    ring: OnceLock<Arc<Ring>>,
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

/// Entries of a dirty ring at most, which is sixteen times as many as KVM gives
/// (`KVM_DIRTY_RING_MAX_ENTRIES`).
const MAX_ENTRIES: usize = 1 << 20;

/// How many entries a dirty ring has.
fn ring_entries(value: Value) -> Result<usize, serde_json::Error> {
    let entries = usize::from_json(value)?;
    if entries.is_power_of_two() && entries <= MAX_ENTRIES {
        return Ok(entries);
    }
    Err(serde_json::Error::custom(format_args!("no dirty ring has {entries} entries")))
}

/// A dirty ring in which nothing happens.
#[derive(Debug)]
struct Ring {
    entries: Vec<DirtyGfn>,
    _vm: Arc<Life>,
}

impl Ring {
    fn new(entries: usize, vm: &Arc<Life>) -> Self {
        let entries = std::iter::repeat_with(DirtyGfn::default).take(entries).collect();
        Self { entries, _vm: vm.clone() }
    }
}

impl DirtyRing for Ring {
    fn entries(&self) -> &[DirtyGfn] {
        &self.entries
    }
}

impl ReplayVcpu {
    pub(super) fn new(replay: Replay, life: Arc<Life>, vm: u32, id: u32) -> Self {
        Self {
            replay,
            life,
            vm,
            id,
            data: Vec::new(),
            input: false,
            interrupts: InterruptState::default(),
            reply: None,
            window: false,
            ring: OnceLock::new(),
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

    /// Empty and stays so: what was in it is not in a transcript.
    fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error> {
        let entries = self.replay.ask_for(self.object(), &Request::DirtyRing, ring_entries)?;
        Ok(self.ring.get_or_init(|| Arc::new(Ring::new(entries, &self.life))).clone())
    }

    /// Whether one is taken next on this vCPU in the transcript; then it is also its turn, so that
    /// whoever locks something to take it does not keep back who comes first.
    fn has_coalesced_write(&self) -> bool {
        let request = Request::TakeCoalescedWrite;
        self.replay.order().is_next(Calling { on: self.object(), request: &request })
    }

    ask! {
        take_coalesced_write() -> Option<CoalescedWrite> = Request::TakeCoalescedWrite;
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
