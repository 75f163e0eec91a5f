//! What must be created before what.

use crate::conformance::bench::{Bench, vcpu};
use crate::conformance::expect::refused;
use crate::conformance::{Case, Checked, Platform};
use crate::{Errno, Vm};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new("irqchip-twice", "A second irqchip is refused with EEXIST.", irqchip_twice),
        Case::new(
            "irqchip-after-vcpu",
            "An irqchip is refused with EINVAL once a vCPU exists.",
            irqchip_after_vcpu,
        ),
    ]
}

fn irqchip_twice<P: Platform>(p: &P) -> Checked {
    refused(p.vm_with_irqchip()?.create_irqchip(), Errno::EEXIST)
}

fn irqchip_after_vcpu<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let _vcpu = vcpu::<P>(&vm, 0)?;
    refused(vm.create_irqchip(), Errno::EINVAL)
}
