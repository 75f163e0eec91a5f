//! The error of a hypervisor call.
//!
//! One small value, made where the call failed, so that the errno is the one the call left. It
//! must stay matchable and must not hold text: the sentence is written when it is shown.

use std::fmt;

use crate::{Call, Capability, Errno, Gsi, Ioctl, SlotId};

/// What a failed call was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Context {
    /// Nothing beyond the call itself.
    None,
    /// A capability that was asked for or enabled.
    Capability(Capability),
    /// A vCPU, by its id (APIC id).
    Vcpu(u32),
    /// A GSI.
    Gsi(Gsi),
    /// The number of entries of a routing table.
    Routes(usize),
    /// A memory slot and the guest-physical range it was to have.
    Slot {
        /// The slot.
        slot: SlotId,
        /// First guest-physical address.
        guest: u64,
        /// Bytes; 0 deletes the slot.
        size: u64,
    },
    /// A memory slot, by its number alone.
    SlotId(SlotId),
    /// A guest-physical address or I/O port.
    Address(u64),
    /// A model-specific register.
    Msr(u32),
    /// A line of the transcript that is replayed, from 1; 0 if it is past the last.
    Transcript {
        /// Its number.
        line: u64,
    },
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Context::None => Ok(()),
            Context::Capability(cap) => write!(f, " of {cap}"),
            Context::Vcpu(id) => write!(f, " on vCPU {id}"),
            Context::Gsi(gsi) => write!(f, " for GSI {gsi}"),
            Context::Routes(n) => write!(f, " with {n} routes"),
            Context::Slot { slot, size: 0, .. } => write!(f, " deleting slot {slot}"),
            Context::Slot { slot, guest, size } => {
                write!(f, " for slot {slot} at {guest:#x}, {size:#x} bytes")
            }
            Context::SlotId(slot) => write!(f, " of slot {slot}"),
            Context::Address(address) => write!(f, " at {address:#x}"),
            Context::Msr(index) => write!(f, " of MSR {index:#x}"),
            Context::Transcript { line: 0 } => f.write_str(" past the end of the transcript"),
            Context::Transcript { line } => write!(f, " at line {line} of the transcript"),
        }
    }
}

/// A hypervisor call that failed: which, with what errno, about what.
///
/// ```
/// use hv_core::{Context, Errno, Error, Ioctl};
/// let error = Error::new(Ioctl::CreateVcpu, Errno::EEXIST).about(Context::Vcpu(3));
/// assert_eq!(error.to_string(), "KVM_CREATE_VCPU on vCPU 3 failed: EEXIST (File exists); \
///     this vCPU id is already in use");
/// assert!(matches!(error, Error { errno: Errno::EEXIST, .. }));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub struct Error {
    /// The call that failed.
    pub call: Call,
    /// The errno it left.
    pub errno: Errno,
    /// What it was about.
    pub context: Context,
}

impl Error {
    /// `call` failed with `errno`.
    #[must_use]
    pub fn new(call: impl Into<Call>, errno: Errno) -> Self {
        Self { call: call.into(), errno, context: Context::None }
    }

    /// The same error, saying what the call was about.
    #[must_use]
    pub fn about(self, context: Context) -> Self {
        Self { context, ..self }
    }

    /// What to do or what it means, where that is known: a clause without a full stop.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        match self.context {
            Context::Transcript { .. } => Some("what was expected there is told by the replay"),
            _ => remedy(self.call, self.errno),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} failed: {}", self.call, self.context, self.errno)?;
        match self.remedy() {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

const NO_RING: &str =
    "the VM has no dirty rings: enable KVM_CAP_DIRTY_LOG_RING before the first vCPU";

/// What an errno of a call means, from the KVM API documentation and measured behaviour.
fn remedy(call: Call, errno: Errno) -> Option<&'static str> {
    use Ioctl as I;
    let ioctl = match call {
        Call::Ioctl(ioctl) => ioctl,
        Call::Eventfd | Call::Open if errno == Errno::EMFILE => {
            return Some("raise the limit of open files (ulimit -n)");
        }
        Call::Sigaction if errno == Errno::EBUSY => {
            return Some("the program already handles this signal: choose another for it");
        }
        Call::MmapDirtyRing if errno == Errno::EINVAL => {
            return Some(NO_RING);
        }
        Call::CoalescedRing if errno == Errno::EIO => {
            return Some("the ring holds what KVM never writes: memory of this process is damaged");
        }
        _ => return None,
    };
    Some(match (ioctl, errno) {
        (_, Errno::EMFILE) => "raise the limit of open files (ulimit -n)",
        (_, Errno::ENOTTY) => {
            "this descriptor is not the KVM object the ioctl is for, or the kernel is older than the ioctl"
        }
        (I::CreateVm, Errno::ENOMEM) => "the host has too little memory for another VM",
        (I::CreateVm, Errno::EBUSY) => {
            "another hypervisor may hold the virtualization extensions: stop it"
        }
        (I::CreateVm, Errno::EINVAL) => "this KVM does not know the VM type asked for",
        (I::CreateIrqchip, Errno::EEXIST) => "the VM already has an irqchip",
        (I::CreateIrqchip, Errno::EINVAL) => "the irqchip must be created before the first vCPU",
        (I::CreatePit2, Errno::ENOENT) => "the PIT needs a full in-kernel irqchip, created first",
        (I::CreatePit2, Errno::EEXIST) => "the VM already has a PIT",
        (I::SetIdentityMapAddr, Errno::EINVAL) => {
            "the identity map must be set before the first vCPU"
        }
        (I::SetTssAddr, Errno::EINVAL) => "the three TSS pages must lie below 4 GiB",
        (I::SetNrMmuPages, Errno::EINVAL) => "KVM needs at least 64 MMU pages",
        (I::CreateVcpu, Errno::EEXIST) => "this vCPU id is already in use",
        (I::CreateVcpu, Errno::EINVAL) => {
            "the vCPU id is not below KVM_CAP_MAX_VCPU_ID, or the VM has its maximum of vCPUs"
        }
        (I::SetGsiRouting, Errno::EINVAL) => {
            "the table breaks a rule of KVM_SET_GSI_ROUTING, or the VM has no irqchip yet; the previous table is still in force"
        }
        (I::Irqfd, Errno::EBUSY) => "this eventfd is already an irqfd",
        (I::Irqfd, Errno::EINVAL) => "not an eventfd, or the VM has no irqchip that takes irqfds",
        (I::Irqfd | I::Ioeventfd, Errno::EBADF) => "the descriptor is closed",
        (I::IrqLine | I::IrqLineStatus, Errno::ENXIO) => "the VM has no in-kernel irqchip",
        (I::Ioeventfd, Errno::EEXIST) => {
            "another ioeventfd already covers this address, length and value"
        }
        (I::Ioeventfd, Errno::ENOENT) => "no ioeventfd has this address, length, value and eventfd",
        (I::Ioeventfd, Errno::ENOSPC) => "the VM has its maximum of in-kernel I/O devices",
        (I::Ioeventfd, Errno::EINVAL) => {
            "not an eventfd, a length other than 1, 2, 4, 8 or 0 without a value, or a range that reaches the last address"
        }
        (I::SetUserMemoryRegion, Errno::EEXIST) => "the range overlaps another slot",
        (I::SetUserMemoryRegion, Errno::EINVAL) => {
            "address, size and host memory must be page-aligned and the slot id below KVM_CAP_NR_MEMSLOTS; size, host memory and READONLY of a live slot can't change"
        }
        (I::GetDirtyLog | I::ClearDirtyLog, Errno::ENOENT) => {
            "the slot does not exist or does not log dirty pages"
        }
        (I::GetDirtyLog | I::ClearDirtyLog, Errno::ENXIO) => "this VM uses a dirty ring",
        (I::ResetDirtyRings, Errno::EINVAL) => NO_RING,
        (I::RegisterCoalescedMmio, Errno::ENOSPC) => "the VM has its maximum of coalesced zones",
        (I::Run, Errno::EFAULT) => {
            "guest memory could not be reached by the kernel, or its backing file shrank"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_call_context_and_errno() {
        let error = Error::new(Ioctl::SetUserMemoryRegion, Errno::EEXIST).about(Context::Slot {
            slot: SlotId(2),
            guest: 0x1000,
            size: 0x2000,
        });
        assert_eq!(
            error.to_string(),
            "KVM_SET_USER_MEMORY_REGION for slot 2 at 0x1000, 0x2000 bytes failed: \
             EEXIST (File exists); the range overlaps another slot"
        );
    }

    #[test]
    fn without_a_known_remedy_the_sentence_just_ends() {
        let error = Error::new(Ioctl::GetRegs, Errno::EIO).about(Context::Vcpu(0));
        assert_eq!(error.remedy(), None);
        assert_eq!(error.to_string(), "KVM_GET_REGS on vCPU 0 failed: EIO (Input/output error)");
    }

    #[test]
    fn too_many_open_files_says_so_everywhere() {
        for call in [Call::Eventfd, Call::Ioctl(Ioctl::CreateVm), Call::Open] {
            let text = Error::new(call, Errno::EMFILE).to_string();
            assert!(text.contains("ulimit -n"), "{text}");
        }
    }
}
