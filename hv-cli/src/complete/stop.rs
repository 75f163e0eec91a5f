//! Why an instruction stops before it completes.
//!
//! Two ways that must not be mixed up: the guest gets an exception, as on a processor, or hv
//! can't do it and the VM is to be stopped with a report.

use iced_x86::Mnemonic;

/// An instruction that hv did not complete. The vCPU is as it was, apart from accessed and dirty
/// bits in page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotCompleted {
    /// A valid instruction hv has no code for.
    #[error("hv does not complete the instruction `{}`", super::counts::name(*.0))]
    Unknown(Mnemonic),
    /// The bytes are no instruction.
    #[error("the bytes at the instruction pointer are not an instruction hv can decode")]
    Undecodable,
    /// A known instruction in a form, mode or situation hv does not complete.
    #[error("hv does not complete this instruction {0}")]
    Unsupported(&'static str),
    /// The instruction works on something that is not guest RAM.
    #[error("guest-physical address {0:#x} is not RAM, and hv completes instructions on RAM only")]
    NotRam(u64),
    /// The vCPU is in the middle of delivering another event.
    #[error("vector {0} is being delivered at the same time")]
    EventInFlight(u8),
    /// A call to the hypervisor failed.
    #[error(transparent)]
    Hypervisor(#[from] hv_core::Error),
}

/// An exception for the guest (Intel SDM volume 3, "Exception and Interrupt Reference"). The error
/// code is left out when it is delivered in real mode, which has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    /// The vector.
    pub(super) vector: u8,
    /// The error code, for the vectors that have one.
    pub(super) error_code: Option<u32>,
    /// The linear address for CR2 (page faults).
    pub(super) cr2: Option<u64>,
}

/// Vectors (Intel SDM volume 3, "Exception and Interrupt Vectors").
pub(super) mod vector {
    pub(in crate::complete) const DB: u8 = 1;
    pub(in crate::complete) const BP: u8 = 3;
    pub(in crate::complete) const OF: u8 = 4;
    pub(in crate::complete) const UD: u8 = 6;
    pub(in crate::complete) const NM: u8 = 7;
    pub(in crate::complete) const TS: u8 = 10;
    pub(in crate::complete) const NP: u8 = 11;
    pub(in crate::complete) const SS: u8 = 12;
    pub(in crate::complete) const GP: u8 = 13;
    pub(in crate::complete) const PF: u8 = 14;
    pub(in crate::complete) const MF: u8 = 16;
    pub(in crate::complete) const AC: u8 = 17;
}

impl Fault {
    const fn new(vector: u8, error_code: Option<u32>) -> Self {
        Self { vector, error_code, cr2: None }
    }

    /// #UD, invalid opcode.
    pub(super) const UD: Self = Self::new(vector::UD, None);
    /// #NM, device not available.
    pub(super) const NM: Self = Self::new(vector::NM, None);
    /// #MF, x87 floating-point error.
    pub(super) const MF: Self = Self::new(vector::MF, None);
    /// #AC, alignment check.
    pub(super) const AC: Self = Self::new(vector::AC, Some(0));

    /// #TS, invalid TSS.
    pub(super) const fn ts(code: u32) -> Self {
        Self::new(vector::TS, Some(code))
    }

    /// #NP, segment not present.
    pub(super) const fn np(code: u32) -> Self {
        Self::new(vector::NP, Some(code))
    }

    /// #SS, stack-segment fault.
    pub(super) const fn ss(code: u32) -> Self {
        Self::new(vector::SS, Some(code))
    }

    /// #GP, general protection.
    pub(super) const fn gp(code: u32) -> Self {
        Self::new(vector::GP, Some(code))
    }

    /// #PF at the linear address `address`.
    pub(super) const fn pf(address: u64, code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(code), cr2: Some(address) }
    }
}

/// Why an instruction stops before it completes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The guest gets an exception.
    Fault(Fault),
    /// hv gives up.
    NotCompleted(NotCompleted),
}

impl Stop {
    /// hv gives up on this form of the instruction; `why` continues "does not complete this
    /// instruction".
    pub(super) const fn unsupported(why: &'static str) -> Self {
        Stop::NotCompleted(NotCompleted::Unsupported(why))
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

impl From<NotCompleted> for Stop {
    fn from(reason: NotCompleted) -> Self {
        Stop::NotCompleted(reason)
    }
}

impl From<hv_core::Error> for Stop {
    fn from(error: hv_core::Error) -> Self {
        Stop::NotCompleted(NotCompleted::Hypervisor(error))
    }
}
