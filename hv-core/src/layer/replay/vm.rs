//! A VM of a replay.

use std::sync::Arc;

use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2};

use super::{Replay, ReplayVcpu, ask};
use crate::layer::answer::fill_dirty_log;
use crate::layer::{Object, Request};
use crate::{
    Capability, CoalescedZone, Error, EventFd, Gsi, IoEvent, IoEventBackend, IrqBackend, Irqfd,
    LineStatus, MemoryBackend, MemorySlot, Msi, MsiStatus, Route, SlotId, Vm,
};

/// A VM of a [`Replay`].
#[derive(Debug)]
pub struct ReplayVm(Arc<Life>);

/// A VM as long as it or one of its vCPUs is there.
#[derive(Debug)]
pub(super) struct Life {
    replay: Replay,
    /// Its number in the transcript.
    number: u32,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.replay.order().dropped_vm(self.number);
    }
}

impl ReplayVm {
    pub(super) fn new(replay: Replay, number: u32) -> Self {
        Self(Arc::new(Life { replay, number }))
    }

    fn replay(&self) -> &Replay {
        &self.0.replay
    }

    fn object(&self) -> Object {
        Object::Vm(self.0.number)
    }
}

impl IrqBackend for ReplayVm {
    ask! {
        set_gsi_routing(routes: &[Route]) -> () = Request::SetGsiRouting(routes);
        irqfd_assign(irqfd: &Irqfd) -> () = Request::IrqfdAssign(irqfd);
        irqfd_deassign(event: &EventFd, gsi: Gsi) -> () = Request::IrqfdDeassign { event, gsi };
        irq_line(gsi: Gsi, level: bool) -> () = Request::IrqLine { gsi, level };
        irq_line_status(gsi: Gsi, level: bool) -> LineStatus = Request::IrqLineStatus { gsi, level };
        signal_msi(msi: Msi) -> MsiStatus = Request::SignalMsi(msi);
    }
}

impl MemoryBackend for ReplayVm {
    ask! {
        set_memory_slot(slot: &MemorySlot) -> () = Request::SetMemorySlot(slot);
        delete_memory_slot(id: SlotId) -> () = Request::DeleteMemorySlot(id);
        clear_dirty_log(id: SlotId, first: u64, pages: u32, bitmap: &[u64]) -> () =
            Request::ClearDirtyLog { id, first, pages, bitmap };
        reset_dirty_rings() -> u32 = Request::ResetDirtyRings;
        register_coalesced_zone(zone: CoalescedZone) -> () = Request::RegisterCoalescedZone(zone);
        unregister_coalesced_zone(zone: CoalescedZone) -> () =
            Request::UnregisterCoalescedZone(zone);
    }

    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error> {
        let request = Request::DirtyLog { id, words: bitmap.len() };
        self.replay().ask_for(self.object(), &request, |value| fill_dirty_log(value, bitmap))
    }
}

impl IoEventBackend for ReplayVm {
    ask! {
        ioeventfd_assign(event: &IoEvent) -> () = Request::IoeventfdAssign(event);
        ioeventfd_deassign(event: &IoEvent) -> () = Request::IoeventfdDeassign(event);
    }
}

impl Vm for ReplayVm {
    type Vcpu = ReplayVcpu;

    ask! {
        check_extension(cap: Capability) -> i32 = Request::CheckExtension(cap);
        enable_cap(cap: Capability, args: [u64; 4]) -> () = Request::EnableCap { cap, args };
        set_identity_map_addr(address: u64) -> () = Request::SetIdentityMapAddr(address);
        set_tss_addr(address: u64) -> () = Request::SetTssAddr(address);
        set_nr_mmu_pages(pages: u64) -> () = Request::SetNrMmuPages(pages);
        create_irqchip() -> () = Request::CreateIrqchip;
        irqchip(chip_id: u32) -> kvm_irqchip = Request::Irqchip { chip_id };
        set_irqchip(chip: &kvm_irqchip) -> () = Request::SetIrqchip(chip);
        create_pit2(config: kvm_pit_config) -> () = Request::CreatePit2(&config);
        pit2() -> kvm_pit_state2 = Request::Pit2;
        set_pit2(state: &kvm_pit_state2) -> () = Request::SetPit2(state);
        clock() -> kvm_clock_data = Request::Clock;
        set_clock(clock: &kvm_clock_data) -> () = Request::SetClock(clock);
    }

    fn create_vcpu(&self, id: u32) -> Result<ReplayVcpu, Error> {
        self.replay().ask::<()>(self.object(), &Request::CreateVcpu { id })?;
        Ok(ReplayVcpu::new(self.replay().clone(), self.0.clone(), self.0.number, id))
    }
}
