//! Steps 12 to 14: interrupt controllers and what routing can do with them.

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};

use super::capabilities::Capabilities;
use super::{InitErrorKind, Irqchip, Irqfds, Request, Routing};
use crate::{Capability, Context, Error, Hypervisor, Vm};

/// Bits of a word of a GSI bitmap.
const WORD_BITS: u32 = u64::BITS;

/// Step 12. What was asked for, or an error.
pub(super) fn create<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    vm: &H::Vm,
    asked: Irqchip,
) -> Result<Irqchip, InitErrorKind> {
    match asked {
        Irqchip::Off => {}
        Irqchip::Kernel { pit } => {
            caps.require(Request::KernelIrqchip, Capability::Irqchip)?;
            vm.create_irqchip()?;
            if pit {
                caps.require(Request::Pit, Capability::Pit2)?;
                let flags = KVM_PIT_SPEAKER_DUMMY;
                vm.create_pit2(kvm_pit_config { flags, ..kvm_pit_config::default() })?;
            }
        }
        Irqchip::Split { pins } => {
            caps.require(Request::SplitIrqchip, Capability::SplitIrqchip)?;
            let cap = Capability::SplitIrqchip;
            vm.enable_cap(cap, [u64::from(pins), 0, 0, 0])
                .map_err(|e| e.about(Context::Capability(cap)))?;
        }
    }
    Ok(asked)
}

/// Step 13. KVM routes nothing without an irqchip.
pub(super) fn routing<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    irqchip: Irqchip,
) -> Result<Option<Routing>, Error> {
    if irqchip == Irqchip::Off {
        return Ok(None);
    }
    Ok(caps.count(Capability::IrqRouting)?.map(|gsi_count| Routing {
        gsi_count,
        // The value was an i32: rounding up stays within u32.
        bitmap_bits: gsi_count.next_multiple_of(WORD_BITS),
    }))
}

/// Step 14.
pub(super) fn irqfds<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    irqchip: Irqchip,
    routing: Option<Routing>,
) -> Result<Irqfds, Error> {
    let allowed = irqchip != Irqchip::Off && caps.has(Capability::Irqfd)?;
    Ok(Irqfds {
        allowed,
        // In split mode the kernel has no I/O APIC that would see the end of an interrupt.
        resample: allowed
            && matches!(irqchip, Irqchip::Kernel { .. })
            && caps.has(Capability::IrqfdResample)?,
        msi: allowed && routing.is_some(),
    })
}
