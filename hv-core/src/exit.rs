//! Why a vCPU stopped running guest code (`KVM_RUN`, the exit reasons of `struct kvm_run`).
//!
//! An exit borrows nothing, allocates nothing and drops nothing KVM said. The data of port I/O,
//! which may be a page long, stays where KVM put it: [`crate::Vcpu::io_data`].

/// Direction of port I/O, from the guest's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoDirection {
    /// The guest reads: the VMM fills the data before the next run.
    In,
    /// The guest writes.
    Out,
}

/// A port access. String instructions make `count` more than 1; the data is `size * count` bytes,
/// one access after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IoExit {
    /// Which way.
    pub direction: IoDirection,
    /// The port.
    pub port: u16,
    /// Bytes of one access: 1, 2 or 4.
    pub size: u8,
    /// Accesses.
    pub count: u32,
}

/// An access to guest-physical memory that no slot serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmioExit {
    /// First guest-physical address.
    pub address: u64,
    /// Bytes, 1 to 8.
    pub len: u8,
    /// The bytes written, zero beyond `len`, or `None` for a read (answered with [`ExitReply::Mmio`]).
    pub written: Option<[u8; 8]>,
}

/// An error inside KVM (`KVM_EXIT_INTERNAL_ERROR`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InternalError {
    /// What kind (`KVM_INTERNAL_ERROR_*`).
    pub suberror: u32,
    /// Words of `data` that are valid, at most 16.
    pub ndata: u32,
    /// What KVM adds; for an emulation failure with `ndata` of 4 or more also the instruction.
    pub data: [u64; 16],
}

/// `KVM_INTERNAL_ERROR_EMULATION`: KVM could not emulate an instruction.
pub const INTERNAL_ERROR_EMULATION: u32 = 1;

impl InternalError {
    /// What kind, by its name in `linux/kvm.h` where it has one.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self.suberror {
            INTERNAL_ERROR_EMULATION => "KVM_INTERNAL_ERROR_EMULATION",
            2 => "KVM_INTERNAL_ERROR_SIMUL_EX",
            3 => "KVM_INTERNAL_ERROR_DELIVERY_EV",
            4 => "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
            _ => "an unknown sub-error",
        }
    }

    /// The valid words of `data`.
    #[must_use]
    pub fn data(&self) -> &[u64] {
        let n = (self.ndata as usize).min(self.data.len());
        self.data.get(..n).unwrap_or_default()
    }

    /// For an emulation failure, the bytes of the instruction if KVM gave them: how many there are
    /// (0 to 15), and the bytes.
    #[must_use]
    pub fn instruction(&self) -> (usize, [u8; 15]) {
        const HAS_BYTES: u64 = 1; // KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        let mut bytes = [0; 15];
        let [flags, first, second, ..] = self.data;
        if self.suberror != INTERNAL_ERROR_EMULATION || self.ndata < 3 || flags & HAS_BYTES == 0 {
            return (0, bytes);
        }
        // struct kvm_run.emulation_failure: u8 insn_size, then u8 insn_bytes[15].
        let raw = first.to_le_bytes().into_iter().chain(second.to_le_bytes());
        let mut raw = raw.into_iter();
        let size = raw.next().unwrap_or(0);
        for (to, from) in bytes.iter_mut().zip(raw) {
            *to = from;
        }
        (usize::from(size).min(bytes.len()), bytes)
    }
}

/// Why a vCPU stopped.
///
/// `#[non_exhaustive]`: a run loop must have an answer for the exits it does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VcpuExit {
    /// Port I/O; the data is in [`crate::Vcpu::io_data`].
    Io(IoExit),
    /// Memory-mapped I/O.
    Mmio(MmioExit),
    /// The guest halted with interrupts handled outside the kernel.
    Hlt,
    /// A signal, a kick or `immediate_exit` ended the run (`EINTR`, `KVM_EXIT_INTR`). The kick that
    /// caused it is consumed.
    Interrupted,
    /// Interrupts can be injected now (only after asking, without an in-kernel irqchip).
    IrqWindowOpen,
    /// A triple fault, or a shutdown by other means.
    Shutdown,
    /// The hardware refused to enter the guest.
    FailEntry {
        /// The hardware's reason (VMX instruction error or SVM exit code).
        reason: u64,
        /// The host CPU it happened on.
        cpu: u32,
    },
    /// An error inside KVM.
    InternalError(InternalError),
    /// A system-wide event: shutdown, reset, crash and others.
    SystemEvent {
        /// Which (`KVM_SYSTEM_EVENT_*`).
        kind: u32,
        /// Words of `data` that are valid.
        ndata: u32,
        /// What belongs to it.
        data: [u64; 16],
    },
    /// The guest ended an interrupt of a userspace I/O APIC (split irqchip).
    IoapicEoi {
        /// The vector.
        vector: u8,
    },
    /// A debug event (`KVM_SET_GUEST_DEBUG`).
    Debug {
        /// The exception: 1 or 3.
        exception: u32,
        /// The instruction's linear address.
        pc: u64,
        /// DR6.
        dr6: u64,
        /// DR7.
        dr7: u64,
    },
    /// An exception KVM hands out.
    Exception {
        /// The vector.
        exception: u32,
        /// Its error code.
        error_code: u32,
    },
    /// A hypercall (answered with [`ExitReply::Hypercall`]).
    Hypercall {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
        /// `KVM_EXIT_HYPERCALL` flags; bit 0 is long mode.
        flags: u64,
    },
    /// A read of a model-specific register that the VMM asked to see (answered with
    /// [`ExitReply::Rdmsr`]).
    Rdmsr {
        /// The register.
        index: u32,
        /// Why it exits (`KVM_MSR_EXIT_REASON_*`).
        reason: u32,
    },
    /// A write of a model-specific register that the VMM asked to see (answered with
    /// [`ExitReply::Wrmsr`]).
    Wrmsr {
        /// The register.
        index: u32,
        /// Why it exits (`KVM_MSR_EXIT_REASON_*`).
        reason: u32,
        /// The value written.
        data: u64,
    },
    /// The guest touched its task priority register.
    TprAccess {
        /// The instruction's address.
        rip: u64,
        /// Whether it was a write.
        write: bool,
    },
    /// The guest changed CR8 (without an in-kernel irqchip).
    SetTpr,
    /// A non-maskable interrupt of the host.
    Nmi,
    /// The dirty ring of this vCPU is full.
    DirtyRingFull,
    /// The guest locked the bus.
    BusLock,
    /// The guest used up its notify window.
    Notify {
        /// `KVM_NOTIFY_*`.
        flags: u32,
    },
    /// An SEV-ES vCPU waits for its start.
    ApResetHold,
    /// A memory access that KVM could not resolve (`EFAULT` or `EHWPOISON` with details).
    MemoryFault {
        /// `KVM_MEMORY_EXIT_FLAG_*`.
        flags: u64,
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// `KVM_EXIT_UNKNOWN`: KVM does not know the hardware's exit reason.
    Unknown {
        /// The hardware's reason.
        hardware_reason: u64,
    },
    /// A reason this project has no name for.
    Other {
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
}

/// What the VMM answers to an exit that asks for something, before the vCPU runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExitReply {
    /// The bytes a [`MmioExit`] read returns; those past its length are ignored.
    Mmio([u8; 8]),
    /// The result of a hypercall.
    Hypercall(u64),
    /// The value of the register, or `None` to raise #GP.
    Rdmsr(Option<u64>),
    /// Whether the write was taken; `false` raises #GP.
    Wrmsr(bool),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emulation(ndata: u32, flags: u64, bytes: &[u8]) -> InternalError {
        let mut raw = [0u8; 16];
        raw[..bytes.len()].copy_from_slice(bytes);
        let mut data = [0; 16];
        data[0] = flags;
        data[1] = u64::from_le_bytes(raw[..8].try_into().unwrap());
        data[2] = u64::from_le_bytes(raw[8..].try_into().unwrap());
        InternalError { suberror: INTERNAL_ERROR_EMULATION, ndata, data }
    }

    #[test]
    fn instruction_bytes_are_read_as_kvm_lays_them_out() {
        let error = emulation(4, 1, &[3, 0x0f, 0x01, 0xd0]);
        let (n, bytes) = error.instruction();
        assert_eq!(&bytes[..n], &[0x0f, 0x01, 0xd0]);
    }

    #[test]
    fn no_instruction_without_the_flag_or_the_words() {
        assert_eq!(emulation(4, 0, &[3, 1, 2, 3]).instruction().0, 0);
        assert_eq!(emulation(2, 1, &[3, 1, 2, 3]).instruction().0, 0);
        let other = InternalError { suberror: 3, ..emulation(4, 1, &[3, 1, 2, 3]) };
        assert_eq!(other.instruction().0, 0);
    }

    #[test]
    fn lying_sizes_are_bounded() {
        assert_eq!(emulation(4, 1, &[200]).instruction().0, 15);
        let error = InternalError { ndata: 99, ..emulation(4, 1, &[1]) };
        assert_eq!(error.data().len(), 16);
    }

    #[test]
    fn an_exit_stays_small_enough_to_return_by_value() {
        assert!(size_of::<VcpuExit>() <= 144, "{}", size_of::<VcpuExit>());
    }
}
