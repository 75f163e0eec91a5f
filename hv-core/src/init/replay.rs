//! Step 15: what the caller already knows of the VM's memory and doorbells.
//!
//! On recent kernels a slot added after an irqchip, a timer or an ioeventfd waits for a grace period,
//! 5 to 8 ms; so slots come before those and the rest after.

use super::capabilities::Capabilities;
use super::{Config, InitErrorKind, Request};
use crate::{Capability, Context, Hypervisor, IoAddress, IoEventBackend, MemoryBackend};

/// The memory slots.
pub(super) fn slots<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    vm: &H::Vm,
    config: &Config,
) -> Result<(), InitErrorKind> {
    for slot in &config.slots {
        if slot.flags.readonly {
            caps.require(Request::ReadonlySlot(slot.id), Capability::ReadonlyMem)?;
        }
        let (guest, size) = (slot.guest.0, slot.host.len() as u64);
        vm.set_memory_slot(slot)
            .map_err(|e| e.about(Context::Slot { slot: slot.id, guest, size }))?;
    }
    Ok(())
}

/// ioeventfds and coalesced zones.
pub(super) fn io<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    vm: &H::Vm,
    config: &Config,
) -> Result<(), InitErrorKind> {
    for event in &config.ioeventfds {
        caps.require(Request::IoEvent(event.address), Capability::Ioeventfd)?;
        vm.ioeventfd_assign(event).map_err(|e| e.about(Context::Address(event.address.value())))?;
    }
    for &zone in &config.coalesced_zones {
        let capability = match zone.address {
            IoAddress::Mmio(_) => Capability::CoalescedMmio,
            IoAddress::Pio(_) => Capability::CoalescedPio,
        };
        caps.require(Request::CoalescedZone(zone.address), capability)?;
        vm.register_coalesced_zone(zone)
            .map_err(|e| e.about(Context::Address(zone.address.value())))?;
    }
    Ok(())
}
