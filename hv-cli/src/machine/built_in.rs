//! The built-in guest's side of the machine: what it needs beyond any guest, and its hands on the
//! host.

use std::io;
use std::sync::Arc;

use hv_core::init::{Irqchip, Record};
use hv_core::{
    Errno, HostRange, IoAddress, IoEvent, IrqBackend, MemorySlot, Msi, MsiStatus, SlotFlags, SlotId,
};
use hv_irq::{GsiRoute, IrqRouter, RouterError};
use hv_memory::{MapError, Mapping, page_size};
use vm_memory::{Bytes, GuestAddress};

use crate::event::Event;
use crate::guest::{self, Checks, Facts, Host};
use crate::machine::stop::Stopper;

/// What the built-in guest needs from before the VM exists.
pub(super) struct Parts {
    rom: Arc<Mapping>,
    doorbell: Event,
    irqfd: Event,
}

impl Parts {
    pub(super) fn new() -> Result<Self, PartsError> {
        let rom = Mapping::anonymous(page_size())?;
        // The page is at least as long as its contents.
        let _ = rom.as_volatile_slice().write(&guest::rom_contents(), 0);
        Ok(Self { rom: Arc::new(rom), doorbell: Event::new()?, irqfd: Event::new()? })
    }

    /// The read-only slot.
    pub(super) fn slot(&self, id: SlotId) -> Option<MemorySlot> {
        let host = HostRange::new(self.rom.clone(), 0, self.rom.region().size())?;
        let flags = SlotFlags { readonly: true, ..SlotFlags::default() };
        Some(MemorySlot { id, guest: GuestAddress(guest::ROM), host, flags })
    }

    /// The doorbell.
    pub(super) fn ioeventfd(&self) -> IoEvent {
        IoEvent {
            address: IoAddress::Mmio(guest::DOORBELL),
            length: 4,
            datamatch: Some(guest::DOORBELL_VALUE.into()),
            event: self.doorbell.shared(),
        }
    }

    /// The checks, on the machine that init made.
    pub(super) fn checks<V: IrqBackend + Send + Sync + 'static>(
        self,
        router: &IrqRouter<V>,
        record: &Record,
        vcpus: u32,
        stopper: &Stopper,
    ) -> Result<Checks, RouterError> {
        let facts = Facts {
            vcpus,
            pit_on_ioapic: record.irqchip == Irqchip::Kernel { pit: true },
            readonly_slots: record.readonly_memory,
            signal_msi: record.msi == hv_core::init::MsiMode::Direct,
            irqfd: record.irqfds.msi,
            ioeventfd: record.ioeventfds,
        };
        let route = router.batch(|batch| {
            let route = batch.add_msi(guest::irqfd_msi())?;
            batch.bind(&route, self.irqfd.shared())?;
            Ok(route)
        })?;
        let host = Hands { parts: self, router: router.clone(), _route: route };
        Ok(Checks::new(facts, Box::new(host), stopper.clone()))
    }
}

/// Why the parts can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// No memory for the read-only page.
    #[error("the read-only page: {0}")]
    Map(#[from] MapError),
    /// No eventfd left.
    #[error("eventfd failed: {0}; raise the limit of open files (ulimit -n)")]
    Eventfd(Errno),
}

impl From<io::Error> for PartsError {
    fn from(error: io::Error) -> Self {
        Self::Eventfd(Errno::from(&error))
    }
}

struct Hands<V: IrqBackend> {
    parts: Parts,
    router: IrqRouter<V>,
    _route: GsiRoute<V>,
}

impl<V: IrqBackend + Send + Sync> Host for Hands<V> {
    fn signal_msi(&mut self, msi: Msi) -> Result<MsiStatus, RouterError> {
        self.router.signal_msi(msi)
    }

    fn raise_irqfd(&mut self) -> io::Result<()> {
        self.parts.irqfd.signal();
        Ok(())
    }

    fn doorbell_events(&mut self) -> u64 {
        self.parts.doorbell.take().unwrap_or(0)
    }

    fn read_rom(&mut self, offset: u64) -> Option<u64> {
        self.parts.rom.as_volatile_slice().read_obj(usize::try_from(offset).ok()?).ok()
    }
}
