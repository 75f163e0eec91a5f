//! What instruction completion asks of a vCPU: six groups of state and two registers.
//!
//! Narrower than [`hv_core::Vcpu`], so that tests need no more than this.

use hv_core::{Error, Vcpu};
use kvm_bindings::{kvm_debugregs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events};

/// The state of a stopped vCPU.
pub(super) trait Cpu {
    fn regs(&self) -> Result<kvm_regs, Error>;
    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error>;
    fn sregs(&self) -> Result<kvm_sregs, Error>;
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error>;
    fn events(&self) -> Result<kvm_vcpu_events, Error>;
    fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), Error>;
    fn fpu(&self) -> Result<kvm_fpu, Error>;
    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error>;
    fn debug_regs(&self) -> Result<kvm_debugregs, Error>;
    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), Error>;
    /// XCR0; 1 (x87 only, its value at reset) if KVM does not list it.
    fn xcr0(&self) -> Result<u64, Error>;
    /// An MSR; `None` if KVM does not know it.
    fn msr(&self, index: u32) -> Result<Option<u64>, Error>;
}

impl<V: Vcpu> Cpu for V {
    fn regs(&self) -> Result<kvm_regs, Error> {
        Vcpu::regs(self)
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        Vcpu::set_regs(self, regs)
    }

    fn sregs(&self) -> Result<kvm_sregs, Error> {
        Vcpu::sregs(self)
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        Vcpu::set_sregs(self, sregs)
    }

    fn events(&self) -> Result<kvm_vcpu_events, Error> {
        self.vcpu_events()
    }

    fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.set_vcpu_events(events)
    }

    fn fpu(&self) -> Result<kvm_fpu, Error> {
        Vcpu::fpu(self)
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        Vcpu::set_fpu(self, fpu)
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, Error> {
        self.debugregs()
    }

    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), Error> {
        self.set_debugregs(regs)
    }

    fn xcr0(&self) -> Result<u64, Error> {
        let xcrs = self.xcrs()?;
        let used = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        let xcr0 = xcrs.xcrs.iter().take(used).find(|xcr| xcr.xcr == 0);
        Ok(xcr0.map_or(1, |xcr| xcr.value))
    }

    fn msr(&self, index: u32) -> Result<Option<u64>, Error> {
        let mut entries = [kvm_msr_entry { index, ..Default::default() }];
        let read = self.msrs(&mut entries)?;
        Ok(entries.first().filter(|_| read == 1).map(|entry| entry.data))
    }
}

#[cfg(test)]
mod tests {
    use hv_core::mock::MockVcpu;
    use kvm_bindings::{kvm_xcr, kvm_xcrs};

    use super::*;

    #[test]
    fn xcr0_is_found_among_the_valid_xcrs() {
        let mut xcrs = kvm_xcrs { nr_xcrs: 2, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 1, value: 9, ..Default::default() };
        xcrs.xcrs[1] = kvm_xcr { xcr: 0, value: 7, ..Default::default() };
        let mut vcpu = MockVcpu::new();
        vcpu.expect_xcrs().times(1).return_const(Ok(xcrs));
        assert_eq!(vcpu.xcr0(), Ok(7));
        vcpu.expect_xcrs().return_const(Ok(kvm_xcrs { nr_xcrs: 1, ..xcrs }));
        assert_eq!(vcpu.xcr0(), Ok(1));
    }

    #[test]
    fn an_msr_that_was_not_read_is_none() {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_msrs().times(2).returning(|entries| {
            if entries[0].index != 0x10 {
                return Ok(0);
            }
            entries[0].data = 77;
            Ok(1)
        });
        assert_eq!(vcpu.msr(0x10), Ok(Some(77)));
        assert_eq!(vcpu.msr(0x11), Ok(None));
    }
}
