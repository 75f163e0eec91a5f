//! Exits, and what the VMM answers to them, as JSON.

use serde::{Deserialize, Serialize};

use super::{Blob, Form, Hex, Short, is_zero};
use crate::{ExitReply, InternalError, InterruptState, IoDirection, IoExit, MmioExit, VcpuExit};

/// Why a vCPU stopped: one name, with what belongs to it. The data of port I/O is beside it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(in crate::layer) enum ExitForm {
    IoIn(IoForm),
    IoOut(IoForm),
    MmioRead { address: Hex, len: u8 },
    MmioWrite { address: Hex, len: u8, data: Blob<8> },
    Hlt,
    Interrupted,
    IrqWindowOpen,
    Shutdown,
    FailEntry { reason: Hex, cpu: u32 },
    InternalError { suberror: u32, ndata: u32, data: Short<Hex, 16> },
    SystemEvent { kind: u32, ndata: u32, data: Short<Hex, 16> },
    IoapicEoi { vector: u8 },
    Debug { exception: u32, pc: Hex, dr6: Hex, dr7: Hex },
    Exception { exception: u32, error_code: Hex<u32> },
    Hypercall { nr: Hex, args: Short<Hex, 6>, flags: Hex },
    Rdmsr { index: Hex<u32>, reason: u32 },
    Wrmsr { index: Hex<u32>, reason: u32, data: Hex },
    TprAccess { rip: Hex, write: bool },
    SetTpr,
    Nmi,
    DirtyRingFull,
    BusLock,
    Notify { flags: Hex<u32> },
    ApResetHold,
    MemoryFault { flags: Hex, gpa: Hex, size: Hex },
    Unknown { hardware_reason: Hex },
    Other { reason: u32 },
}

/// A port access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct IoForm {
    port: Hex<u16>,
    size: u8,
    count: u32,
}

impl IoForm {
    fn exit(self, direction: IoDirection) -> VcpuExit {
        let Self { port: Hex(port), size, count } = self;
        VcpuExit::Io(IoExit { direction, port, size, count })
    }
}

impl Form<VcpuExit> for ExitForm {
    fn of(value: &VcpuExit) -> Self {
        match *value {
            VcpuExit::Io(IoExit { direction, port, size, count }) => {
                let io = IoForm { port: Hex(port), size, count };
                match direction {
                    IoDirection::In => Self::IoIn(io),
                    IoDirection::Out => Self::IoOut(io),
                }
            }
            VcpuExit::Mmio(MmioExit { address, len, written }) => match written {
                None => Self::MmioRead { address: Hex(address), len },
                Some(data) => Self::MmioWrite { address: Hex(address), len, data: Blob(data) },
            },
            VcpuExit::Hlt => Self::Hlt,
            VcpuExit::Interrupted => Self::Interrupted,
            VcpuExit::IrqWindowOpen => Self::IrqWindowOpen,
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::FailEntry { reason, cpu } => Self::FailEntry { reason: Hex(reason), cpu },
            VcpuExit::InternalError(InternalError { suberror, ndata, data }) => {
                Self::InternalError { suberror, ndata, data: Short::of(&data) }
            }
            VcpuExit::SystemEvent { kind, ndata, data } => {
                Self::SystemEvent { kind, ndata, data: Short::of(&data) }
            }
            VcpuExit::IoapicEoi { vector } => Self::IoapicEoi { vector },
            VcpuExit::Debug { exception, pc, dr6, dr7 } => {
                Self::Debug { exception, pc: Hex(pc), dr6: Hex(dr6), dr7: Hex(dr7) }
            }
            VcpuExit::Exception { exception, error_code } => {
                Self::Exception { exception, error_code: Hex(error_code) }
            }
            VcpuExit::Hypercall { nr, args, flags } => {
                Self::Hypercall { nr: Hex(nr), args: Short::of(&args), flags: Hex(flags) }
            }
            VcpuExit::Rdmsr { index, reason } => Self::Rdmsr { index: Hex(index), reason },
            VcpuExit::Wrmsr { index, reason, data } => {
                Self::Wrmsr { index: Hex(index), reason, data: Hex(data) }
            }
            VcpuExit::TprAccess { rip, write } => Self::TprAccess { rip: Hex(rip), write },
            VcpuExit::SetTpr => Self::SetTpr,
            VcpuExit::Nmi => Self::Nmi,
            VcpuExit::DirtyRingFull => Self::DirtyRingFull,
            VcpuExit::BusLock => Self::BusLock,
            VcpuExit::Notify { flags } => Self::Notify { flags: Hex(flags) },
            VcpuExit::ApResetHold => Self::ApResetHold,
            VcpuExit::MemoryFault { flags, gpa, size } => {
                Self::MemoryFault { flags: Hex(flags), gpa: Hex(gpa), size: Hex(size) }
            }
            VcpuExit::Unknown { hardware_reason } => {
                Self::Unknown { hardware_reason: Hex(hardware_reason) }
            }
            VcpuExit::Other { reason } => Self::Other { reason },
        }
    }

    fn value(self) -> VcpuExit {
        match self {
            Self::IoIn(io) => io.exit(IoDirection::In),
            Self::IoOut(io) => io.exit(IoDirection::Out),
            Self::MmioRead { address: Hex(address), len } => {
                VcpuExit::Mmio(MmioExit { address, len, written: None })
            }
            Self::MmioWrite { address: Hex(address), len, data: Blob(data) } => {
                VcpuExit::Mmio(MmioExit { address, len, written: Some(data) })
            }
            Self::Hlt => VcpuExit::Hlt,
            Self::Interrupted => VcpuExit::Interrupted,
            Self::IrqWindowOpen => VcpuExit::IrqWindowOpen,
            Self::Shutdown => VcpuExit::Shutdown,
            Self::FailEntry { reason: Hex(reason), cpu } => VcpuExit::FailEntry { reason, cpu },
            Self::InternalError { suberror, ndata, data } => {
                VcpuExit::InternalError(InternalError { suberror, ndata, data: data.value() })
            }
            Self::SystemEvent { kind, ndata, data } => {
                VcpuExit::SystemEvent { kind, ndata, data: data.value() }
            }
            Self::IoapicEoi { vector } => VcpuExit::IoapicEoi { vector },
            Self::Debug { exception, pc: Hex(pc), dr6: Hex(dr6), dr7: Hex(dr7) } => {
                VcpuExit::Debug { exception, pc, dr6, dr7 }
            }
            Self::Exception { exception, error_code: Hex(error_code) } => {
                VcpuExit::Exception { exception, error_code }
            }
            Self::Hypercall { nr: Hex(nr), args, flags: Hex(flags) } => {
                VcpuExit::Hypercall { nr, args: args.value(), flags }
            }
            Self::Rdmsr { index: Hex(index), reason } => VcpuExit::Rdmsr { index, reason },
            Self::Wrmsr { index: Hex(index), reason, data: Hex(data) } => {
                VcpuExit::Wrmsr { index, reason, data }
            }
            Self::TprAccess { rip: Hex(rip), write } => VcpuExit::TprAccess { rip, write },
            Self::SetTpr => VcpuExit::SetTpr,
            Self::Nmi => VcpuExit::Nmi,
            Self::DirtyRingFull => VcpuExit::DirtyRingFull,
            Self::BusLock => VcpuExit::BusLock,
            Self::Notify { flags: Hex(flags) } => VcpuExit::Notify { flags },
            Self::ApResetHold => VcpuExit::ApResetHold,
            Self::MemoryFault { flags: Hex(flags), gpa: Hex(gpa), size: Hex(size) } => {
                VcpuExit::MemoryFault { flags, gpa, size }
            }
            Self::Unknown { hardware_reason: Hex(hardware_reason) } => {
                VcpuExit::Unknown { hardware_reason }
            }
            Self::Other { reason } => VcpuExit::Other { reason },
        }
    }
}

/// What `kvm_run` says about interrupts after a run, as far as it is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct InterruptsForm {
    #[serde(default, skip_serializing_if = "is_zero")]
    ready: bool,
    #[serde(default, rename = "if", skip_serializing_if = "is_zero")]
    flag: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    cr8: u64,
}

impl Form<InterruptState> for InterruptsForm {
    fn of(value: &InterruptState) -> Self {
        let InterruptState { ready_for_injection: ready, if_flag: flag, cr8 } = *value;
        Self { ready, flag, cr8 }
    }
    fn value(self) -> InterruptState {
        let Self { ready: ready_for_injection, flag: if_flag, cr8 } = self;
        InterruptState { ready_for_injection, if_flag, cr8 }
    }
}

/// What the VMM answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(in crate::layer) enum ReplyForm {
    Mmio(Blob<8>),
    Hypercall(Hex),
    Rdmsr(Hex),
    RdmsrRefused,
    Wrmsr,
    WrmsrRefused,
}

impl ReplyForm {
    pub(in crate::layer) fn of(reply: ExitReply) -> Self {
        match reply {
            ExitReply::Mmio(bytes) => Self::Mmio(Blob(bytes)),
            ExitReply::Hypercall(result) => Self::Hypercall(Hex(result)),
            ExitReply::Rdmsr(Some(value)) => Self::Rdmsr(Hex(value)),
            ExitReply::Rdmsr(None) => Self::RdmsrRefused,
            ExitReply::Wrmsr(true) => Self::Wrmsr,
            ExitReply::Wrmsr(false) => Self::WrmsrRefused,
        }
    }
}
