//! Requests as KVM has them, for what the traits can't say.

#![allow(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::AsFd;

use hv_core::conformance::{RawRequest, RawRoute};
use hv_core::{Errno, MemorySlot};
use hv_kvm::KvmVm;
use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_coalesced_mmio_zone, kvm_enable_cap, kvm_ioeventfd,
    kvm_irq_routing, kvm_irqfd, kvm_msi, kvm_userspace_memory_region,
};
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
ioctl_iow_nr!(KVM_REGISTER_COALESCED_MMIO, KVMIO, 0x67, kvm_coalesced_mmio_zone);
ioctl_iow_nr!(KVM_UNREGISTER_COALESCED_MMIO, KVMIO, 0x68, kvm_coalesced_mmio_zone);
ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, kvm_irq_routing);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
ioctl_iow_nr!(KVM_SIGNAL_MSI, KVMIO, 0xa5, kvm_msi);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// What `request` comes to; `None` for one this platform does not know.
pub(crate) fn request(vm: &KvmVm, request: &RawRequest) -> Option<Result<(), Errno>> {
    Some(match *request {
        RawRequest::SetGsiRouting { flags, ref entries } => set_gsi_routing(vm, flags, entries),
        RawRequest::Irqfd { fd, gsi, flags, resample } => {
            let argument = kvm_irqfd {
                fd: fd.cast_unsigned(),
                gsi,
                flags,
                resamplefd: resample.cast_unsigned(),
                ..Default::default()
            };
            numbers(vm, KVM_IRQFD(), &argument)
        }
        RawRequest::SignalMsi { address, data, flags, device } => {
            let argument =
                kvm_msi { address_lo: address, data, flags, devid: device, ..Default::default() };
            numbers(vm, KVM_SIGNAL_MSI(), &argument)
        }
        RawRequest::Ioeventfd { address, length, fd, flags, datamatch } => {
            let argument = kvm_ioeventfd {
                datamatch,
                addr: address,
                len: length,
                fd,
                flags,
                ..Default::default()
            };
            numbers(vm, KVM_IOEVENTFD(), &argument)
        }
        RawRequest::SetMemorySlot { ref slot, flags } => set_memory_slot(vm, slot, flags),
        RawRequest::NonCanonicalMemory { slot, guest, size } => {
            let argument = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: guest,
                memory_size: size,
                userspace_addr: 1 << 63, // not canonical, with four or five levels of tables
            };
            numbers(vm, KVM_SET_USER_MEMORY_REGION(), &argument)
        }
        RawRequest::DeleteMemorySlot { slot, flags, guest, host } => {
            let argument = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: guest,
                memory_size: 0,
                userspace_addr: host,
            };
            numbers(vm, KVM_SET_USER_MEMORY_REGION(), &argument)
        }
        RawRequest::CoalescedZone { register, address, size, pio } => {
            let mut argument =
                kvm_coalesced_mmio_zone { addr: address, size, ..Default::default() };
            argument.__bindgen_anon_1.pio = pio;
            let ioctl = if register {
                KVM_REGISTER_COALESCED_MMIO()
            } else {
                KVM_UNREGISTER_COALESCED_MMIO()
            };
            numbers(vm, ioctl, &argument)
        }
        RawRequest::ClearDirtyLog { slot, first, pages } => {
            let argument = kvm_clear_dirty_log {
                slot,
                num_pages: pages,
                first_page: first,
                ..Default::default()
            };
            // The bitmap is null: KVM answers EFAULT should it come to read it.
            numbers(vm, KVM_CLEAR_DIRTY_LOG(), &argument)
        }
        RawRequest::EnableCap { cap, flags, args } => {
            let argument = kvm_enable_cap { cap, flags, args, ..Default::default() };
            numbers(vm, KVM_ENABLE_CAP(), &argument)
        }
        _ => return None,
    })
}

/// A request whose structure holds numbers, and addresses only that KVM never follows.
fn numbers<T>(vm: &KvmVm, ioctl: libc::c_ulong, argument: &T) -> Result<(), Errno> {
    // SAFETY: each caller passes the structure of its ioctl, which KVM only reads. No address in it
    // is the process's memory: null, of a slot that is deleted, or beyond what a process can have.
    checked(unsafe { ioctl_with_ref(&vm.as_fd(), ioctl, argument) })
}

fn set_gsi_routing(vm: &KvmVm, flags: u32, entries: &[RawRoute]) -> Result<(), Errno> {
    let count = u32::try_from(entries.len()).map_err(|_| Errno::E2BIG)?;
    // struct kvm_irq_routing: nr, flags, then struct kvm_irq_routing_entry as 12 words each.
    let entries = entries.iter().flat_map(|entry| {
        let [a, b, c, d] = entry.words;
        [entry.gsi, entry.kind, entry.flags, 0, a, b, c, d, 0, 0, 0, 0]
    });
    let table: Vec<u32> = [count, flags].into_iter().chain(entries).collect();
    // SAFETY: KVM reads as many entries as the header says, which are behind it.
    checked(unsafe { ioctl_with_ptr(&vm.as_fd(), KVM_SET_GSI_ROUTING(), table.as_ptr()) })
}

fn set_memory_slot(vm: &KvmVm, slot: &MemorySlot, flags: u32) -> Result<(), Errno> {
    // Never let go: should KVM take the slot, nobody else knows of it.
    std::mem::forget(slot.host.clone());
    let bytes = slot.host.bytes();
    let argument = kvm_userspace_memory_region {
        slot: slot.id.0,
        flags,
        guest_phys_addr: slot.guest.0,
        memory_size: bytes.len() as u64,
        userspace_addr: bytes.as_ptr().addr() as u64,
    };
    // SAFETY: the memory is atomics, which anyone may write at any time, and is never freed.
    checked(unsafe { ioctl_with_ref(&vm.as_fd(), KVM_SET_USER_MEMORY_REGION(), &argument) })
}

fn checked(returned: i32) -> Result<(), Errno> {
    if returned < 0 { Err(Errno::from(&io::Error::last_os_error())) } else { Ok(()) }
}
