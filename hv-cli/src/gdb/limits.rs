//! What the host's KVM can't debug, so that a debugger is told instead of waiting in vain.
//!
//! A KVM on hardware virtualization can do all there is. Software KVM interprets guest kernels, where
//! it steps and compares instruction addresses with the debug registers; user code it runs as it
//! is, and gives every debug exception to the guest. It looks at no data breakpoints, and gives the
//! INT3 of real mode to the guest.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::complete::Mapped;

const CR0_PE: u64 = 1;
const RFLAGS_VM: u64 = 1 << 17;

/// What can be debugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// The host's KVM interprets guest kernels.
    pub(super) software_kvm: bool,
}

impl Limits {
    /// Whether an INT3 at an address of a vCPU is seen.
    pub(super) fn can_patch(self, sregs: &kvm_sregs, mapped: Mapped) -> bool {
        !self.software_kvm || (sregs.cr0 & CR0_PE != 0 && !mapped.user)
    }

    /// Whether a debug register sees an instruction there.
    pub(super) fn can_break(self, mapped: Option<Mapped>) -> bool {
        !self.software_kvm || !mapped.is_some_and(|it| it.user)
    }

    /// Whether debug registers see data.
    pub(super) fn can_watch(self) -> bool {
        !self.software_kvm
    }

    /// Whether a vCPU can make a step in every state.
    pub(super) fn can_step_anywhere(self) -> bool {
        !self.software_kvm
    }

    /// Whether a vCPU in this state can make a step.
    pub(super) fn can_step(self, regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
        // KVM keeps the CPL in SS.DPL, as VMX and SVM do.
        let user = regs.rflags & RFLAGS_VM != 0 || sregs.ss.dpl == 3;
        self.can_step_anywhere() || sregs.cr0 & CR0_PE == 0 || !user
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn software_kvm_debugs_kernels_only_and_patches_protected_mode_only() {
        let mapped = |user| Mapped { address: GuestAddress(0), user };
        let mut kernel = kvm_sregs { cr0: CR0_PE, ..Default::default() };
        let real = kvm_sregs::default();
        let regs = kvm_regs::default();
        let virtual_8086 = kvm_regs { rflags: RFLAGS_VM, ..regs };

        let soft = Limits { software_kvm: true };
        assert!(soft.can_patch(&kernel, mapped(false)) && !soft.can_patch(&kernel, mapped(true)));
        assert!(!soft.can_patch(&real, mapped(false)));
        assert!(soft.can_break(None) && soft.can_break(Some(mapped(false))));
        assert!(!soft.can_break(Some(mapped(true))) && !soft.can_watch());
        assert!(soft.can_step(&regs, &kernel) && soft.can_step(&regs, &real));
        assert!(!soft.can_step(&virtual_8086, &kernel));
        kernel.ss.dpl = 3;
        assert!(!soft.can_step(&regs, &kernel));

        let hard = Limits { software_kvm: false };
        assert!(hard.can_patch(&real, mapped(true)) && hard.can_break(Some(mapped(true))));
        assert!(hard.can_watch() && hard.can_step(&virtual_8086, &kernel));
    }
}
