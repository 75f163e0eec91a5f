//! The vCPU trait: run it, stop it, read and set its state by groups.
//!
//! Register groups are KVM's own structures; every group is one ioctl.

use std::sync::Arc;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};

use crate::{CoalescedWrite, DirtyRing, Error, ExitReply, VcpuExit};

/// Stops a vCPU from another thread.
pub trait VcpuKick: Send + Sync {
    /// Makes the vCPU leave guest code, or not enter it: its current or next
    /// [`Vcpu::run`] returns [`VcpuExit::Interrupted`]. A kick is never lost; several before that
    /// return count as one. What the vCPU is to do then must be visible to it before the kick.
    ///
    /// # Errors
    /// Those of `tgkill(2)`.
    fn kick(&self) -> Result<(), Error>;
}

/// What `kvm_run` says about interrupts when they are injected by the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct InterruptState {
    /// An interrupt can be injected now.
    pub ready_for_injection: bool,
    /// The guest's interrupt flag.
    pub if_flag: bool,
    /// CR8, the task priority.
    pub cr8: u64,
}

/// A virtual processor. It belongs to one thread at a time; its [`VcpuKick`] may be anywhere.
pub trait Vcpu: Send {
    /// What stops it from another thread.
    type Kick: VcpuKick;

    /// Its id, which is its APIC id.
    fn id(&self) -> u32;

    /// A handle that stops it from another thread.
    fn kicker(&self) -> Self::Kick;

    /// Runs guest code until something needs the VMM (`KVM_RUN`). An answer owed to the previous
    /// exit is taken first, even if a kick ends the run at once.
    ///
    /// # Errors
    /// Those of the ioctl, except `EINTR`, which is [`VcpuExit::Interrupted`], `EFAULT` with details,
    /// which is [`VcpuExit::MemoryFault`], and `EAGAIN` of a vCPU that is just being started, which the
    /// backend tries again.
    fn run(&mut self) -> Result<VcpuExit, Error>;

    /// The data of the last [`VcpuExit::Io`], `size * count` bytes: what the guest wrote, or the
    /// place for what it reads. Empty after any other exit.
    fn io_data(&mut self) -> &mut [u8];

    /// Answers the last exit, for those that ask.
    fn reply(&mut self, reply: ExitReply);

    /// Its dirty ring (`mmap(2)` of its descriptor at `KVM_DIRTY_LOG_PAGE_OFFSET`), as large as it
    /// was enabled: `KVM_CAP_DIRTY_LOG_RING` or `_ACQ_REL` by
    /// [`Vm::enable_cap`](crate::Vm::enable_cap) with its bytes in `args[0]`, before the first vCPU.
    /// Every call gives the same entries.
    ///
    /// KVM reports each page of a slot that logs when this vCPU first writes to it, and at least once
    /// until it is reset; a ring with little room left ends runs with [`VcpuExit::DirtyRingFull`].
    ///
    /// # Errors
    /// `EINVAL` without dirty rings, else those of `mmap(2)`.
    fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error>;

    /// Whether the VM's ring of collected writes is not empty. No system call and no lock: made to be
    /// asked after every run, before its exit is handled.
    ///
    /// What this vCPU wrote before an exit is in the ring when the run ends. That it is empty says
    /// only that all was taken, not that whoever took it has handled it.
    fn has_coalesced_write(&self) -> bool;

    /// Takes the next write that the coalesced zones of the VM have collected, of any vCPU, in the
    /// order in which they were made. Several vCPUs may do this at the same time, and each write is
    /// taken once; who handles them keeps the order.
    ///
    /// # Errors
    /// `EIO` if the ring holds what KVM never writes; nothing is taken then.
    fn take_coalesced_write(&self) -> Result<Option<CoalescedWrite>, Error>;

    /// What `kvm_run` says about interrupts.
    fn interrupt_state(&self) -> InterruptState;

    /// Asks for [`VcpuExit::IrqWindowOpen`] when an interrupt can be injected (without an in-kernel
    /// irqchip).
    fn request_interrupt_window(&mut self, wanted: bool);

    /// Injects an interrupt (`KVM_INTERRUPT`, without an in-kernel irqchip).
    ///
    /// # Errors
    /// `ENXIO` with an in-kernel irqchip, `EEXIST` if one is pending.
    fn interrupt(&self, vector: u8) -> Result<(), Error>;

    /// Injects a non-maskable interrupt (`KVM_NMI`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn nmi(&self) -> Result<(), Error>;

    /// The general registers (`KVM_GET_REGS`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn regs(&self) -> Result<kvm_regs, Error>;

    /// Sets them (`KVM_SET_REGS`). Clears a pending exception.
    ///
    /// # Errors
    /// Those of the ioctl.
    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error>;

    /// Segments, descriptor tables and control registers (`KVM_GET_SREGS`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn sregs(&self) -> Result<kvm_sregs, Error>;

    /// Sets them (`KVM_SET_SREGS`).
    ///
    /// # Errors
    /// `EINVAL` for a state the architecture does not have.
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error>;

    /// The x87 and SSE state (`KVM_GET_FPU`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn fpu(&self) -> Result<kvm_fpu, Error>;

    /// Sets it (`KVM_SET_FPU`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error>;

    /// The extended control registers (`KVM_GET_XCRS`, needs `KVM_CAP_XCRS`).
    ///
    /// # Errors
    /// `EINVAL` on a host without XSAVE.
    fn xcrs(&self) -> Result<kvm_xcrs, Error>;

    /// Sets them (`KVM_SET_XCRS`).
    ///
    /// # Errors
    /// `EINVAL` on a host without XSAVE or for an illegal value.
    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error>;

    /// The debug registers (`KVM_GET_DEBUGREGS`, needs `KVM_CAP_DEBUGREGS`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn debugregs(&self) -> Result<kvm_debugregs, Error>;

    /// Sets them (`KVM_SET_DEBUGREGS`).
    ///
    /// # Errors
    /// `EINVAL` for illegal values.
    fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<(), Error>;

    /// Whether it runs, halts or waits to be started (`KVM_GET_MP_STATE`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn mp_state(&self) -> Result<kvm_mp_state, Error>;

    /// Sets that (`KVM_SET_MP_STATE`).
    ///
    /// # Errors
    /// `EINVAL` for a state the irqchip does not allow.
    fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), Error>;

    /// Pending exceptions, interrupts and shadows (`KVM_GET_VCPU_EVENTS`, needs
    /// `KVM_CAP_VCPU_EVENTS`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Error>;

    /// Sets them (`KVM_SET_VCPU_EVENTS`).
    ///
    /// # Errors
    /// `EINVAL` for an illegal combination.
    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Error>;

    /// The registers of the local APIC (`KVM_GET_LAPIC`).
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel irqchip.
    fn lapic(&self) -> Result<kvm_lapic_state, Error>;

    /// Sets them (`KVM_SET_LAPIC`).
    ///
    /// # Errors
    /// `EINVAL` without an in-kernel irqchip.
    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error>;

    /// Reads model-specific registers into the entries that name them (`KVM_GET_MSRS`); returns how
    /// many were read before the first that could not be.
    ///
    /// # Errors
    /// Those of the ioctl.
    fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error>;

    /// Writes model-specific registers (`KVM_SET_MSRS`); returns how many were written before the
    /// first that could not be.
    ///
    /// # Errors
    /// Those of the ioctl.
    fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize, Error>;

    /// The CPUID leaves the guest sees (`KVM_GET_CPUID2`).
    ///
    /// # Errors
    /// Those of the ioctl.
    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error>;

    /// Sets them (`KVM_SET_CPUID2`), before the vCPU first runs.
    ///
    /// # Errors
    /// `E2BIG` for too many, `EINVAL` for a change after the first run.
    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error>;

    /// Translates a linear address as the guest would (`KVM_TRANSLATE`).
    ///
    /// # Errors
    /// Those of the ioctl; an address that is not mapped is told by `valid`.
    fn translate(&self, linear_address: u64) -> Result<kvm_translation, Error>;

    /// Breakpoints and single step (`KVM_SET_GUEST_DEBUG`).
    ///
    /// # Errors
    /// `EINVAL` for unknown flags, `EBUSY` if an exception is pending.
    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Error>;

    /// The frequency of its TSC in kHz (`KVM_GET_TSC_KHZ`, needs `KVM_CAP_GET_TSC_KHZ`).
    ///
    /// # Errors
    /// `EIO` on a host with an unstable TSC.
    fn tsc_khz(&self) -> Result<u32, Error>;
}
