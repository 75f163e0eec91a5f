//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2): the capability, the table and the pending bits.
//!
//! hv-irq's [`MsiVectors`] has the messages and masks and makes routes and irqfds of them; here is how
//! the guest sees them. Nothing is stored twice.

use std::io;

use hv_core::{EventFd, IrqBackend, Msi};
use hv_irq::{IrqRouter, MsiVectors, RouterError};

use super::{CapabilityError, ConfigSpace};
use crate::event::Event;

const CAPABILITY_ID: u8 = 0x11;
/// Bits of the message control register.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// Bytes of an entry of the table.
pub const MSIX_ENTRY: u64 = 16;

/// The most vectors of a function.
const MOST: usize = 2048;

/// The MSI-X vectors of a function.
///
/// While the function is not active ([`Self::set_active`]) it raises nothing, and what the guest writes
/// costs no ioctl; when it becomes active, all vectors get their routes in one. A write that can't be
/// had, for want of a free GSI say, has no effect and is counted.
pub struct Msix<V: IrqBackend> {
    vectors: MsiVectors<V>,
    events: Vec<EventFd>,
    /// Offset of the capability.
    capability: u16,
    pending: u32,
    enabled: bool,
    masked: bool,
    active: bool,
    failures: u64,
}

impl<V: IrqBackend> Msix<V> {
    /// Vectors for a function, with the table and the pending bits at these offsets of a BAR.
    ///
    /// # Errors
    /// The configuration space is full; or the process has no descriptor left.
    pub fn new(
        config: &mut ConfigSpace,
        router: &IrqRouter<V>,
        vectors: usize,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> io::Result<Self> {
        let vectors = vectors.clamp(1, MOST);
        let events = (0..vectors).map(|_| Ok(Event::new()?.shared())).collect::<io::Result<_>>()?;
        let capability = Self::describe(config, vectors, bar, table, pending)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let events: Vec<EventFd> = events;
        Ok(Self {
            vectors: MsiVectors::new(router, events.clone()),
            events,
            capability,
            pending,
            enabled: false,
            masked: false,
            active: false,
            failures: 0,
        })
    }

    fn describe(
        config: &mut ConfigSpace,
        vectors: usize,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<u16, CapabilityError> {
        let control = (vectors - 1) as u16;
        let mut body = control.to_le_bytes().to_vec();
        body.extend((table & !7 | u32::from(bar)).to_le_bytes());
        body.extend((pending & !7 | u32::from(bar)).to_le_bytes());
        config.add_capability(CAPABILITY_ID, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// What raises each vector.
    #[must_use]
    pub fn events(&self) -> &[EventFd] {
        &self.events
    }

    /// Offset of the pending bits.
    #[must_use]
    pub fn pending_offset(&self) -> u32 {
        self.pending
    }

    /// Whether the guest has MSI-X enabled.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Writes that could not be had.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// The guest may have written to the message control register. If what is there can't be, the old
    /// value is put back.
    pub fn control_written(&mut self, config: &mut ConfigSpace) {
        let at = usize::from(self.capability) + 2;
        let control = u16::from_le_bytes(config.get(at));
        let (enabled, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return;
        }
        let before = (self.enabled, self.masked);
        (self.enabled, self.masked) = (enabled, masked);
        if self.commit().is_err() {
            (self.enabled, self.masked) = before;
            let mut control = control & !(ENABLE | FUNCTION_MASK);
            control |= if self.enabled { ENABLE } else { 0 };
            control |= if self.masked { FUNCTION_MASK } else { 0 };
            config.put(at, &control.to_le_bytes());
        }
    }

    /// The function begins or stops to raise interrupts.
    ///
    /// # Errors
    /// The vectors can't have their routes, or can't give them back.
    pub fn set_active(&mut self, active: bool) -> Result<(), RouterError> {
        let before = std::mem::replace(&mut self.active, active);
        self.commit().inspect_err(|_| self.active = before && active)
    }

    fn commit(&mut self) -> Result<(), RouterError> {
        let (on, masked) = (self.enabled && self.active, self.masked);
        let changed = self.vectors.change(|change| {
            if on {
                change.enable()
            } else {
                change.disable()
            };
            if masked {
                change.mask_all()
            } else {
                change.unmask_all()
            };
            Ok(())
        });
        changed.inspect_err(|_| self.failures += 1)
    }

    /// The guest reads the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0..).zip(data) {
            let at = offset.saturating_add(i);
            let entry = self.entry(at / MSIX_ENTRY);
            *byte = entry.get((at % MSIX_ENTRY) as usize).copied().unwrap_or(0);
        }
    }

    /// The guest writes the table, as one change whatever its size. (PCI wants accesses of whole,
    /// aligned doublewords; others change the bytes they name.)
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let mut entries: Vec<(u64, [u8; MSIX_ENTRY as usize])> = Vec::new();
        for (i, new) in (0..).zip(data) {
            let at = offset.saturating_add(i);
            let index = at / MSIX_ENTRY;
            if entries.last().is_none_or(|(last, _)| *last != index) {
                entries.push((index, self.entry(index)));
            }
            let byte = entries.last_mut().and_then(|(_, e)| e.get_mut((at % MSIX_ENTRY) as usize));
            if let Some(byte) = byte {
                *byte = *new;
            }
        }
        let len = self.vectors.len();
        let changed = self.vectors.change(|change| {
            for (index, entry) in entries {
                let Some(index) = usize::try_from(index).ok().filter(|index| *index < len) else {
                    continue;
                };
                let [address @ .., d0, d1, d2, d3, control, _, _, _] = entry;
                let data = u32::from_le_bytes([d0, d1, d2, d3]);
                change.retarget(
                    index,
                    Msi { address: u64::from_le_bytes(address), data, device: None },
                )?;
                if control & 1 != 0 { change.mask(index)? } else { change.unmask(index)? }
            }
            Ok(())
        });
        if changed.is_err() {
            self.failures += 1;
        }
    }

    /// An entry of the table: address, data, vector control. All zeros where there is none.
    fn entry(&self, index: u64) -> [u8; MSIX_ENTRY as usize] {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let (Ok(message), Ok(masked)) =
            (self.vectors.message(index), self.vectors.is_masked(index))
        else {
            return [0; MSIX_ENTRY as usize];
        };
        let mut entry = [0; MSIX_ENTRY as usize];
        let words =
            [message.address as u32, (message.address >> 32) as u32, message.data, masked.into()];
        for (to, from) in entry.iter_mut().zip(words.into_iter().flat_map(u32::to_le_bytes)) {
            *to = from;
        }
        entry
    }

    /// The guest reads the pending bits: a bit for each vector whose interrupt waits behind a mask.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in (0..).zip(data) {
            let first = usize::try_from(offset.saturating_add(i).saturating_mul(8)).ok();
            let pending = |bit: &u32| {
                let index = first.and_then(|first| first.checked_add(*bit as usize));
                index.is_some_and(|index| self.vectors.is_pending(index) == Ok(true))
            };
            *byte = (0..8).filter(pending).fold(0, |byte, bit| byte | 1 << bit);
        }
    }
}
