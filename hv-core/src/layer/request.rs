//! What a layer sees of a call: which object it is made on, which call it is, its arguments.
//!
//! A request borrows what the caller passed and costs nothing to make. How its arguments look in
//! JSON is here too, so that whoever writes them down, compares or shows them agrees.

use std::fmt;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::Names;
use super::json::{
    Bytes, ClockForm, CpuidForm, DebugregsForm, DirtyForm, EventsForm, Form, FpuForm,
    GuestDebugForm, Hex, IrqchipForm, LapicForm, MpStateForm, MsiForm, MsrForm, PitConfigForm,
    PitForm, RegsForm, ReplyForm, RouteForm, SregsForm, XcrsForm,
};
use crate::{
    Call, Capability, CoalescedZone, Context, EventFd, ExitReply, Gsi, IoAddress, IoEvent, Ioctl,
    Irqfd, MemorySlot, Msi, Route, SlotId,
};

/// What a call is made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// The hypervisor itself.
    System,
    /// A VM, numbered from 0 in order of creation.
    Vm(u32),
    /// A vCPU.
    Vcpu {
        /// The VM.
        vm: u32,
        /// Its id (APIC id).
        id: u32,
    },
    /// What kicks a vCPU, from any thread.
    Kick {
        /// The VM.
        vm: u32,
        /// The id of the vCPU.
        id: u32,
    },
}

impl fmt::Display for Object {
    /// `system`, `vm0`, `vm0/vcpu1` or `vm0/kick1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::System => f.write_str("system"),
            Object::Vm(vm) => write!(f, "vm{vm}"),
            Object::Vcpu { vm, id } => write!(f, "vm{vm}/vcpu{id}"),
            Object::Kick { vm, id } => write!(f, "vm{vm}/kick{id}"),
        }
    }
}

/// What the VMM told a vCPU since its last run; nothing unless the interceptor
/// [wants data](super::Interceptor::wants_data).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Turn<'a> {
    /// The answer to the previous exit; the last one, if there were several.
    pub reply: Option<ExitReply>,
    /// The bytes the guest reads, if the previous exit was port input.
    pub data: &'a [u8],
    /// Whether the VMM wants to know when an interrupt can be injected.
    pub window: bool,
}

/// A call of the traits with its arguments.
#[derive(Clone, Copy)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each is the method of the traits that has its name and arguments")]
pub enum Request<'a> {
    // System
    ApiVersion,
    /// Of the hypervisor or of a VM.
    CheckExtension(Capability),
    VcpuMmapSize,
    MsrIndexList {
        room: usize,
    },
    SupportedCpuid,
    CreateVm {
        vm_type: u64,
    },
    Eventfd,
    InstallKick,
    // VM
    EnableCap {
        cap: Capability,
        args: [u64; 4],
    },
    SetIdentityMapAddr(u64),
    SetTssAddr(u64),
    SetNrMmuPages(u64),
    CreateIrqchip,
    Irqchip {
        chip_id: u32,
    },
    SetIrqchip(&'a kvm_irqchip),
    CreatePit2(&'a kvm_pit_config),
    Pit2,
    SetPit2(&'a kvm_pit_state2),
    Clock,
    SetClock(&'a kvm_clock_data),
    CreateVcpu {
        id: u32,
    },
    // Interrupts
    SetGsiRouting(&'a [Route]),
    IrqfdAssign(&'a Irqfd),
    IrqfdDeassign {
        event: &'a EventFd,
        gsi: Gsi,
    },
    IrqLine {
        gsi: Gsi,
        level: bool,
    },
    IrqLineStatus {
        gsi: Gsi,
        level: bool,
    },
    SignalMsi(Msi),
    // Memory
    SetMemorySlot(&'a MemorySlot),
    DeleteMemorySlot(SlotId),
    /// `words` is the length of the bitmap.
    DirtyLog {
        id: SlotId,
        words: usize,
    },
    ClearDirtyLog {
        id: SlotId,
        first: u64,
        pages: u32,
        bitmap: &'a [u64],
    },
    ResetDirtyRings,
    RegisterCoalescedZone(CoalescedZone),
    UnregisterCoalescedZone(CoalescedZone),
    // I/O events
    IoeventfdAssign(&'a IoEvent),
    IoeventfdDeassign(&'a IoEvent),
    // vCPU
    Run(Turn<'a>),
    DirtyRing,
    TakeCoalescedWrite,
    Interrupt {
        vector: u8,
    },
    Nmi,
    Regs,
    SetRegs(&'a kvm_regs),
    Sregs,
    SetSregs(&'a kvm_sregs),
    Fpu,
    SetFpu(&'a kvm_fpu),
    Xcrs,
    SetXcrs(&'a kvm_xcrs),
    Debugregs,
    SetDebugregs(&'a kvm_debugregs),
    MpState,
    SetMpState(kvm_mp_state),
    VcpuEvents,
    SetVcpuEvents(&'a kvm_vcpu_events),
    Lapic,
    SetLapic(&'a kvm_lapic_state),
    /// What the caller put into the entries that are to be filled; empty unless the interceptor
    /// [wants them](super::Interceptor::wants_data).
    Msrs(&'a [kvm_msr_entry]),
    SetMsrs(&'a [kvm_msr_entry]),
    Cpuid,
    SetCpuid(&'a [kvm_cpuid_entry2]),
    Translate {
        linear_address: u64,
    },
    SetGuestDebug(&'a kvm_guest_debug),
    TscKhz,
    /// Of [`crate::VcpuKick`].
    Kick,
}

impl Request<'_> {
    /// The ioctl or system call it makes.
    #[must_use]
    pub const fn call(&self) -> Call {
        use Ioctl as I;
        Call::Ioctl(match self {
            Request::Eventfd => return Call::Eventfd,
            Request::InstallKick => return Call::Sigaction,
            Request::Kick => return Call::Kick,
            Request::DirtyRing => return Call::MmapDirtyRing,
            Request::TakeCoalescedWrite => return Call::CoalescedRing,
            Request::ApiVersion => I::GetApiVersion,
            Request::CheckExtension(_) => I::CheckExtension,
            Request::VcpuMmapSize => I::GetVcpuMmapSize,
            Request::MsrIndexList { .. } => I::GetMsrIndexList,
            Request::SupportedCpuid => I::GetSupportedCpuid,
            Request::CreateVm { .. } => I::CreateVm,
            Request::EnableCap { .. } => I::EnableCap,
            Request::SetIdentityMapAddr(_) => I::SetIdentityMapAddr,
            Request::SetTssAddr(_) => I::SetTssAddr,
            Request::SetNrMmuPages(_) => I::SetNrMmuPages,
            Request::CreateIrqchip => I::CreateIrqchip,
            Request::Irqchip { .. } => I::GetIrqchip,
            Request::SetIrqchip(_) => I::SetIrqchip,
            Request::CreatePit2(_) => I::CreatePit2,
            Request::Pit2 => I::GetPit2,
            Request::SetPit2(_) => I::SetPit2,
            Request::Clock => I::GetClock,
            Request::SetClock(_) => I::SetClock,
            Request::CreateVcpu { .. } => I::CreateVcpu,
            Request::SetGsiRouting(_) => I::SetGsiRouting,
            Request::IrqfdAssign(_) | Request::IrqfdDeassign { .. } => I::Irqfd,
            Request::IrqLine { .. } => I::IrqLine,
            Request::IrqLineStatus { .. } => I::IrqLineStatus,
            Request::SignalMsi(_) => I::SignalMsi,
            Request::SetMemorySlot(_) | Request::DeleteMemorySlot(_) => I::SetUserMemoryRegion,
            Request::DirtyLog { .. } => I::GetDirtyLog,
            Request::ClearDirtyLog { .. } => I::ClearDirtyLog,
            Request::ResetDirtyRings => I::ResetDirtyRings,
            Request::RegisterCoalescedZone(_) => I::RegisterCoalescedMmio,
            Request::UnregisterCoalescedZone(_) => I::UnregisterCoalescedMmio,
            Request::IoeventfdAssign(_) | Request::IoeventfdDeassign(_) => I::Ioeventfd,
            Request::Run(_) => I::Run,
            Request::Interrupt { .. } => I::Interrupt,
            Request::Nmi => I::Nmi,
            Request::Regs => I::GetRegs,
            Request::SetRegs(_) => I::SetRegs,
            Request::Sregs => I::GetSregs,
            Request::SetSregs(_) => I::SetSregs,
            Request::Fpu => I::GetFpu,
            Request::SetFpu(_) => I::SetFpu,
            Request::Xcrs => I::GetXcrs,
            Request::SetXcrs(_) => I::SetXcrs,
            Request::Debugregs => I::GetDebugregs,
            Request::SetDebugregs(_) => I::SetDebugregs,
            Request::MpState => I::GetMpState,
            Request::SetMpState(_) => I::SetMpState,
            Request::VcpuEvents => I::GetVcpuEvents,
            Request::SetVcpuEvents(_) => I::SetVcpuEvents,
            Request::Lapic => I::GetLapic,
            Request::SetLapic(_) => I::SetLapic,
            Request::Msrs(_) => I::GetMsrs,
            Request::SetMsrs(_) => I::SetMsrs,
            Request::Cpuid => I::GetCpuid2,
            Request::SetCpuid(_) => I::SetCpuid2,
            Request::Translate { .. } => I::Translate,
            Request::SetGuestDebug(_) => I::SetGuestDebug,
            Request::TscKhz => I::GetTscKhz,
        })
    }

    /// What an error of it would be about.
    pub(super) fn context(&self, object: Object) -> Context {
        match *self {
            Request::CheckExtension(cap) | Request::EnableCap { cap, .. } => {
                Context::Capability(cap)
            }
            Request::SetIdentityMapAddr(address) | Request::SetTssAddr(address) => {
                Context::Address(address)
            }
            Request::CreateVcpu { id } => Context::Vcpu(id),
            Request::SetGsiRouting(routes) => Context::Routes(routes.len()),
            Request::IrqfdAssign(irqfd) => Context::Gsi(irqfd.gsi),
            Request::IrqfdDeassign { gsi, .. }
            | Request::IrqLine { gsi, .. }
            | Request::IrqLineStatus { gsi, .. } => Context::Gsi(gsi),
            Request::SignalMsi(msi) => Context::Address(msi.address),
            Request::SetMemorySlot(slot) => {
                let (guest, size) = (slot.guest.0, slot.host.len() as u64);
                Context::Slot { slot: slot.id, guest, size }
            }
            Request::DeleteMemorySlot(slot) => Context::Slot { slot, guest: 0, size: 0 },
            Request::DirtyLog { id, .. } | Request::ClearDirtyLog { id, .. } => Context::SlotId(id),
            Request::RegisterCoalescedZone(zone) | Request::UnregisterCoalescedZone(zone) => {
                Context::Address(zone.address.value())
            }
            Request::IoeventfdAssign(event) | Request::IoeventfdDeassign(event) => {
                Context::Address(event.address.value())
            }
            _ => match object {
                Object::Vcpu { id, .. } | Object::Kick { id, .. } => Context::Vcpu(id),
                Object::System | Object::Vm(_) => Context::None,
            },
        }
    }

    /// Its arguments as a JSON object, without anything that differs between two runs of the same
    /// program: eventfds go by `names`, host memory by its length.
    pub fn arguments<'a>(&'a self, names: &'a Names) -> impl Serialize + 'a {
        Arguments { request: self, names }
    }
}

impl fmt::Debug for Request<'_> {
    /// The name of the call: arguments need [`Names`], or are thousands of bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.call().name())
    }
}

struct Arguments<'a> {
    request: &'a Request<'a>,
    names: &'a Names,
}

/// A list whose items get a form while they are written.
struct List<'a, T, F: Fn(&T) -> S, S>(&'a [T], F);

impl<T, F: Fn(&T) -> S, S: Serialize> Serialize for List<'_, T, F, S> {
    fn serialize<Z: Serializer>(&self, to: Z) -> Result<Z::Ok, Z::Error> {
        to.collect_seq(self.0.iter().map(&self.1))
    }
}

impl Serialize for Arguments<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        macro_rules! write {
            ($($key:literal: $value:expr),*) => {{ $(map.serialize_entry($key, &$value)?;)* }};
        }
        match *self.request {
            Request::ApiVersion
            | Request::VcpuMmapSize
            | Request::SupportedCpuid
            | Request::Eventfd
            | Request::InstallKick
            | Request::CreateIrqchip
            | Request::Pit2
            | Request::Clock
            | Request::ResetDirtyRings
            | Request::DirtyRing
            | Request::TakeCoalescedWrite
            | Request::Nmi
            | Request::Regs
            | Request::Sregs
            | Request::Fpu
            | Request::Xcrs
            | Request::Debugregs
            | Request::MpState
            | Request::VcpuEvents
            | Request::Lapic
            | Request::Cpuid
            | Request::TscKhz
            | Request::Kick => {}
            Request::CheckExtension(cap) => write!("cap": cap.name()),
            Request::MsrIndexList { room } => write!("room": room),
            Request::CreateVm { vm_type } => write!("type": vm_type),
            Request::EnableCap { cap, args } => {
                write!("cap": cap.name(), "args": args.map(Hex));
            }
            Request::SetIdentityMapAddr(address) | Request::SetTssAddr(address) => {
                write!("address": Hex(address));
            }
            Request::SetNrMmuPages(pages) => write!("pages": pages),
            Request::Irqchip { chip_id } => write!("chip_id": chip_id),
            Request::SetIrqchip(chip) => write!("chip": IrqchipForm::of(chip)),
            Request::CreatePit2(config) => write!("config": PitConfigForm::of(config)),
            Request::SetPit2(state) => write!("state": PitForm::of(state)),
            Request::SetClock(clock) => write!("clock": ClockForm::of(clock)),
            Request::CreateVcpu { id } => write!("id": id),
            Request::SetGsiRouting(routes) => write!("routes": List(routes, RouteForm::of)),
            Request::IrqfdAssign(Irqfd { event, gsi, resample }) => {
                write!("gsi": gsi.0, "eventfd": self.names.event(event));
                if let Some(resample) = resample {
                    write!("resample": self.names.event(resample));
                }
            }
            Request::IrqfdDeassign { event, gsi } => {
                write!("gsi": gsi.0, "eventfd": self.names.event(event), "deassign": true);
            }
            Request::IrqLine { gsi, level } | Request::IrqLineStatus { gsi, level } => {
                write!("gsi": gsi.0, "level": level);
            }
            Request::SignalMsi(msi) => write!("msi": MsiForm::of(&msi)),
            Request::SetMemorySlot(slot) => {
                write!("slot": slot.id.0, "guest": Hex(slot.guest.0));
                write!("size": Hex(slot.host.len() as u64));
                if slot.flags.log_dirty {
                    write!("log_dirty": true);
                }
                if slot.flags.readonly {
                    write!("readonly": true);
                }
            }
            Request::DeleteMemorySlot(id) => write!("slot": id.0, "size": Hex(0u64)),
            Request::DirtyLog { id, words } => write!("slot": id.0, "words": words),
            Request::ClearDirtyLog { id, first, pages, bitmap } => {
                write!("slot": id.0, "first": first, "pages": pages);
                write!("bitmap": DirtyForm::of(bitmap));
            }
            Request::RegisterCoalescedZone(zone) | Request::UnregisterCoalescedZone(zone) => {
                match zone.address {
                    IoAddress::Mmio(address) => write!("mmio": Hex(address)),
                    IoAddress::Pio(port) => write!("pio": Hex(port)),
                }
                write!("size": zone.size);
            }
            Request::IoeventfdAssign(event) | Request::IoeventfdDeassign(event) => {
                match event.address {
                    IoAddress::Mmio(address) => write!("mmio": Hex(address)),
                    IoAddress::Pio(port) => write!("pio": Hex(port)),
                }
                write!("length": event.length);
                if let Some(value) = event.datamatch {
                    write!("datamatch": Hex(value));
                }
                write!("eventfd": self.names.event(&event.event));
                if matches!(self.request, Request::IoeventfdDeassign(_)) {
                    write!("deassign": true);
                }
            }
            Request::Run(Turn { reply, data, window }) => {
                if let Some(reply) = reply {
                    write!("reply": ReplyForm::of(reply));
                }
                if !data.is_empty() {
                    write!("data": Bytes(data));
                }
                if window {
                    write!("request_interrupt_window": true);
                }
            }
            Request::Interrupt { vector } => write!("vector": vector),
            Request::SetRegs(regs) => write!("regs": RegsForm::of(regs)),
            Request::SetSregs(sregs) => write!("sregs": SregsForm::of(sregs)),
            Request::SetFpu(fpu) => write!("fpu": FpuForm::of(fpu)),
            Request::SetXcrs(xcrs) => write!("xcrs": XcrsForm::of(xcrs)),
            Request::SetDebugregs(debugregs) => write!("debugregs": DebugregsForm::of(debugregs)),
            Request::SetMpState(state) => write!("mp_state": MpStateForm::of(&state)),
            Request::SetVcpuEvents(events) => write!("events": EventsForm::of(events)),
            Request::SetLapic(lapic) => write!("lapic": LapicForm::of(lapic)),
            Request::Msrs(entries) => {
                write!("indices": List(entries, |entry: &kvm_msr_entry| Hex(entry.index)));
            }
            Request::SetMsrs(entries) => write!("entries": List(entries, MsrForm::of)),
            Request::SetCpuid(entries) => write!("entries": List(entries, CpuidForm::of)),
            Request::Translate { linear_address } => write!("address": Hex(linear_address)),
            Request::SetGuestDebug(debug) => write!("debug": GuestDebugForm::of(debug)),
        }
        map.end()
    }
}
