//! What a vCPU is told by its interrupt controllers.

/// An interrupt that reached a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Interrupt {
    /// A vector from the local APIC (delivery modes fixed and lowest priority).
    Fixed(u8),
    /// A vector from the 8259 pair, by way of LINT0 in mode ExtINT.
    ExtInt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A system management interrupt.
    Smi,
    /// INIT.
    Init,
    /// A start-up IPI with its vector, the page at which the processor starts.
    StartUp(u8),
}

impl Interrupt {
    /// The vector of the guest's handler; `None` for what has none of its own.
    #[must_use]
    pub const fn vector(self) -> Option<u8> {
        match self {
            Interrupt::Fixed(vector) | Interrupt::ExtInt(vector) => Some(vector),
            Interrupt::Nmi | Interrupt::Smi | Interrupt::Init | Interrupt::StartUp(_) => None,
        }
    }
}
