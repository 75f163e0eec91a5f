//! Memory slots: [`MemoryBackend`], and the one place that hands host memory to the kernel.
//!
//! The kernel goes on using the memory of a slot until the slot is replaced or deleted, or the VM
//! is gone. [`Slots`] holds it for exactly that long. It is no slot manager: which slots there
//! should be is decided above.

#![allow(unsafe_code, reason = "the kernel is given host memory, and bitmaps to write")]

use std::collections::BTreeMap;
use std::ptr;
use std::sync::{MutexGuard, PoisonError};

use hv_core::{
    Capability, CoalescedZone, Context, Errno, Error, HostRange, IoAddress, Ioctl, MemoryBackend,
    MemorySlot, SlotFlags, SlotId,
};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::IoEventAddress;

use crate::{KvmVm, raw};

/// The host memory of the slots KVM has, by slot. Changed only together with KVM's own list, under
/// one lock.
pub(crate) type Slots = BTreeMap<SlotId, HostRange>;

/// Bytes a bit of a dirty bitmap stands for.
const PAGE: usize = 4096;

impl KvmVm {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        // No code that can panic runs between KVM's change and the map's.
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryBackend for KvmVm {
    fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error> {
        let refused = |errno| {
            Error::new(Ioctl::SetUserMemoryRegion, errno).about(Context::Slot {
                slot: slot.id,
                guest: slot.guest.0,
                size: slot.host.len() as u64,
            })
        };
        // Asked for once: another call might name other memory, and only what is registered
        // matters.
        let bytes = slot.host.bytes();
        // For KVM a size of 0 deletes the slot, which is not what was asked for.
        if bytes.is_empty() {
            return Err(Error::new(Ioctl::SetUserMemoryRegion, Errno::EINVAL)
                .about(Context::SlotId(slot.id)));
        }
        let region = kvm_userspace_memory_region {
            slot: slot.id.0,
            flags: flags(slot.flags),
            guest_phys_addr: slot.guest.0,
            memory_size: bytes.len() as u64,
            userspace_addr: bytes.as_ptr().addr() as u64,
        };
        let mut slots = self.slots();
        // SAFETY: from here the guest, hence the kernel, may read and write `bytes`.
        // - They are memory that may be written through a shared reference by anyone at any time:
        //   a slice of atomics. (A slot over memory that may not is the caller's `unsafe`.)
        // - They live as long as the object behind `slot.host` is held by someone: `bytes` borrows
        //   from it, it is in an `Arc`, which neither moves it nor gives out `&mut` while another
        //   `Arc` to it exists, and `slot` is borrowed during this call. If the call succeeds a
        //   clone goes into the map. It leaves the map only when KVM has replaced or deleted the
        //   slot, or together with the map, which `VmInner` drops after the VM descriptor; every
        //   vCPU descriptor and mapping holds that `VmInner`, and only a vCPU descriptor runs guest
        //   code. (Descriptors a forked process inherits don't: KVM binds a VM to its process.)
        // - If the call fails, KVM uses what it used before, which the map still holds.
        unsafe { self.fd().set_user_memory_region(region) }
            .map_err(|error| refused(raw::errno(error)))?;
        let replaced = slots.insert(slot.id, slot.host.clone());
        // Whatever happens when this memory goes must not happen under the lock.
        drop(slots);
        drop(replaced);
        Ok(())
    }

    fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error> {
        let region = kvm_userspace_memory_region { slot: id.0, ..Default::default() };
        let mut slots = self.slots();
        // SAFETY: a size of 0 deletes the slot and hands out no memory.
        unsafe { self.fd().set_user_memory_region(region) }.map_err(|error| {
            Error::new(Ioctl::SetUserMemoryRegion, raw::errno(error)).about(Context::Slot {
                slot: id,
                guest: 0,
                size: 0,
            })
        })?;
        let deleted = slots.remove(&id);
        drop(slots);
        drop(deleted);
        Ok(())
    }

    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error> {
        // Held until KVM has answered, so that the slot can't become another meanwhile.
        let slots = self.slots();
        let bitmap = match slots.get(&id).map(|host| bitmap_words(host.len())) {
            Some(words) if bitmap.len() < words => return Err(dirty_log_error(id, Errno::EINVAL)),
            Some(_) => bitmap.as_mut_ptr(),
            // KVM has no such slot and will say so.
            None => ptr::null_mut(),
        };
        // SAFETY: the bitmap has a bit for every page the slot has, or is null.
        unsafe { raw::dirty_log(self.fd(), id, bitmap) }.map_err(|errno| dirty_log_error(id, errno))
    }

    fn clear_dirty_log(
        &self,
        id: SlotId,
        first: u64,
        pages: u32,
        bitmap: &[u64],
    ) -> Result<(), Error> {
        raw::clear_dirty_log(self.fd(), id, first, pages, bitmap)
            .map_err(|errno| Error::new(Ioctl::ClearDirtyLog, errno).about(Context::SlotId(id)))
    }

    fn reset_dirty_rings(&self) -> Result<u32, Error> {
        raw::reset_dirty_rings(self.fd()).map_err(|errno| Error::new(Ioctl::ResetDirtyRings, errno))
    }

    fn register_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        // From now on there may be writes to take.
        let cap = Capability::CoalescedMmio.number().into();
        self.inner.coalesced.find(|| self.fd().check_extension_raw(cap));
        self.fd()
            .register_coalesced_mmio(io_address(zone.address), zone.size)
            .map_err(|error| zone_error(Ioctl::RegisterCoalescedMmio, zone, error))
    }

    fn unregister_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error> {
        self.fd()
            .unregister_coalesced_mmio(io_address(zone.address), zone.size)
            .map_err(|error| zone_error(Ioctl::UnregisterCoalescedMmio, zone, error))
    }
}

fn dirty_log_error(id: SlotId, errno: Errno) -> Error {
    Error::new(Ioctl::GetDirtyLog, errno).about(Context::SlotId(id))
}

fn flags(flags: SlotFlags) -> u32 {
    let log_dirty = if flags.log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    let readonly = if flags.readonly { KVM_MEM_READONLY } else { 0 };
    log_dirty | readonly
}

/// Words of the bitmap KVM writes for a slot of `size` bytes.
fn bitmap_words(size: usize) -> usize {
    size.div_ceil(PAGE).div_ceil(u64::BITS as usize)
}

fn io_address(address: IoAddress) -> IoEventAddress {
    match address {
        IoAddress::Mmio(address) => IoEventAddress::Mmio(address),
        IoAddress::Pio(port) => IoEventAddress::Pio(port.into()),
    }
}

fn zone_error(ioctl: Ioctl, zone: CoalescedZone, error: kvm_ioctls::Error) -> Error {
    Error::new(ioctl, raw::errno(error)).about(Context::Address(zone.address.value()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_has_a_bit_for_every_page_in_whole_words() {
        assert_eq!(bitmap_words(PAGE), 1);
        assert_eq!(bitmap_words(64 * PAGE), 1);
        assert_eq!(bitmap_words(64 * PAGE + 1), 2);
        assert_eq!(bitmap_words(usize::MAX), 1 << (64 - 12 - 6));
    }

    #[test]
    fn flags_are_those_of_the_api() {
        let both = SlotFlags { log_dirty: true, readonly: true };
        assert_eq!(flags(both), KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY);
        assert_eq!(flags(SlotFlags::default()), 0);
    }
}
