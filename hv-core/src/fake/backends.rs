//! Interrupts, memory and doorbells of a VM: each call handed to the part that has its rules.

use super::{FakeVm, Finding};
use crate::{
    Capability, CoalescedZone, Context, Errno, Error, EventFd, Gsi, IoEvent, IoEventBackend, Ioctl,
    IrqBackend, Irqfd, LineStatus, MemoryBackend, MemorySlot, Msi, MsiStatus, Route, SlotId,
};

impl IrqBackend for FakeVm {
    fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error> {
        self.call(Ioctl::SetGsiRouting, Context::Routes(routes.len()), |state| {
            state.irq.set_routing(routes)
        })
    }

    fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error> {
        let resamples = self.has(Capability::IrqfdResample);
        let elsewhere = self.is_bound_elsewhere(&irqfd.event);
        self.call(Ioctl::Irqfd, Context::Gsi(irqfd.gsi), |state| {
            if irqfd.resample.is_some() && !resamples {
                return Err(Errno::EINVAL);
            }
            state.irq.irqfd_assign(irqfd, elsewhere)
        })
    }

    fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.call(Ioctl::Irqfd, Context::Gsi(gsi), |state| state.irq.irqfd_deassign(event, gsi))
    }

    fn irq_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.call(Ioctl::IrqLine, Context::Gsi(gsi), |state| state.irq.set_line(gsi, level))
    }

    fn irq_line_status(&self, gsi: Gsi, level: bool) -> Result<LineStatus, Error> {
        self.call(Ioctl::IrqLineStatus, Context::Gsi(gsi), |state| state.irq.line(gsi, level))
    }

    fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error> {
        self.call(Ioctl::SignalMsi, Context::Address(msi.address), |state| state.irq.msi(msi))
    }
}

impl MemoryBackend for FakeVm {
    fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        let about =
            Context::Slot { slot: slot.id, guest: slot.guest.0, size: slot.host.len() as u64 };
        // Whatever happens when the memory of an old slot goes must not happen under the lock.
        let old = self.call(Ioctl::SetUserMemoryRegion, about, |state| {
            let pages = state.memory.dirty_pages(slot.id);
            let old = state.memory.set(slot)?;
            if pages > 0 && !slot.flags.log_dirty {
                state.findings.push(Finding::LostDirtyPages { slot: slot.id, pages });
            }
            Ok(old)
        })?;
        drop(old);
        Ok(())
    }

    fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error> {
        let about = Context::Slot { slot: id, guest: 0, size: 0 };
        let old = self.call(Ioctl::SetUserMemoryRegion, about, |state| {
            let pages = state.memory.lost_pages(id);
            let old = state.memory.delete(id)?;
            if pages > 0 {
                state.findings.push(Finding::LostDirtyPages { slot: id, pages });
            }
            Ok(old)
        })?;
        drop(old);
        Ok(())
    }

    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error> {
        self.call(Ioctl::GetDirtyLog, Context::SlotId(id), |state| {
            state.memory.dirty_log(id, bitmap)
        })
    }

    fn clear_dirty_log(
        &self,
        id: SlotId,
        first: u64,
        pages: u32,
        bitmap: &[u64],
    ) -> Result<(), Error> {
        self.call(Ioctl::ClearDirtyLog, Context::SlotId(id), |state| {
            state.memory.clear_dirty_log(id, first, pages, bitmap)
        })
    }

    fn reset_dirty_rings(&self) -> Result<u32, Error> {
        self.call(Ioctl::ResetDirtyRings, Context::None, |state| state.memory.reset_dirty_rings())
    }

    fn register_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        let about = Context::Address(zone.address.value());
        self.call(Ioctl::RegisterCoalescedMmio, about, |state| {
            if state.io.zones().contains(&zone) {
                state.findings.push(Finding::DuplicateZone(zone));
            }
            state.io.register(zone)
        })
    }

    fn unregister_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        let about = Context::Address(zone.address.value());
        self.call(Ioctl::UnregisterCoalescedMmio, about, |state| {
            let before = state.io.zones().len();
            state.io.unregister(zone)?;
            if state.io.zones().len() == before {
                state.findings.push(Finding::VainUnregister(zone));
            }
            Ok(())
        })
    }
}

impl IoEventBackend for FakeVm {
    fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error> {
        self.call(Ioctl::Ioeventfd, Context::Address(event.address.value()), |state| {
            state.io.assign(event)
        })
    }

    fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error> {
        self.call(Ioctl::Ioeventfd, Context::Address(event.address.value()), |state| {
            state.io.deassign(event)
        })
    }
}
