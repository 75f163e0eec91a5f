//! The ioctls that kvm-ioctls lacks, or has in a form that hides something: a limit below KVM's,
//! an errno that is lost, a descriptor type instead of a number.
//!
//! Every function is one system call whose errno is taken right behind it. The descriptors are
//! kvm-ioctls' types, so that a VM ioctl can't be sent to a vCPU. No policy, no retries.

#![allow(unsafe_code, reason = "system calls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use hv_core::{Errno, Gsi, IoAddress, IoEvent, MsrIndexList, Route, SlotId};
use kvm_bindings::{
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_cpuid_entry2, kvm_cpuid2, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_interrupt, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio, kvm_irq_level,
    kvm_irq_level__bindgen_ty_1, kvm_irq_routing, kvm_irqfd, kvm_msr_entry, kvm_msr_list, kvm_msrs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::layout;
use crate::run_page::RunPage;

ioctl_iowr_nr!(KVM_GET_MSR_INDEX_LIST, KVMIO, 0x02, kvm_msr_list);
ioctl_iowr_nr!(KVM_GET_SUPPORTED_CPUID, KVMIO, 0x05, kvm_cpuid2);
ioctl_io_nr!(KVM_CREATE_VCPU, KVMIO, 0x41);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_io_nr!(KVM_SET_NR_MMU_PAGES, KVMIO, 0x44);
ioctl_iowr_nr!(KVM_IRQ_LINE_STATUS, KVMIO, 0x67, kvm_irq_level);
ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, kvm_irq_routing);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, kvm_msrs);
ioctl_iow_nr!(KVM_SET_MSRS, KVMIO, 0x89, kvm_msrs);
ioctl_iow_nr!(KVM_SET_CPUID2, KVMIO, 0x90, kvm_cpuid2);
ioctl_iowr_nr!(KVM_GET_CPUID2, KVMIO, 0x91, kvm_cpuid2);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// The errno of the system call that just failed on this thread.
pub(crate) fn last_errno() -> Errno {
    Errno::from(&io::Error::last_os_error())
}

/// The errno inside an error of kvm-ioctls.
pub(crate) fn errno(error: kvm_ioctls::Error) -> Errno {
    Errno(error.errno())
}

/// What a system call returned, or the errno it left if that is negative.
pub(crate) fn checked(returned: i32) -> Result<i32, Errno> {
    if returned < 0 { Err(last_errno()) } else { Ok(returned) }
}

// ---- Descriptors -------------------------------------------------------------------------------

/// Takes over `fd`, which must be a descriptor that was opened by the caller or the kernel for it.
fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers below pass a descriptor that a system call has just returned to them, so
    // it is open and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The descriptor of `vm`.
pub(crate) fn borrowed(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `vm`, which is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// A new close-on-exec descriptor for what the number `fd` refers to (`F_DUPFD_CLOEXEC`).
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // Never one of the numbers of standard input, output and error, should they be closed.
    let lowest = libc::STDERR_FILENO + 1;
    // SAFETY: F_DUPFD_CLOEXEC takes numbers and changes nothing about the descriptor `fd`.
    checked(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) }).map(owned)
}

/// An eventfd, close-on-exec and non-blocking.
pub(crate) fn eventfd() -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two numbers.
    checked(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(owned)
}

/// `fd` as kvm-ioctls' system descriptor.
pub(crate) fn system(fd: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is open and its ownership moves. Should it not be KVM's, the caller
    // learns that from its first ioctl, KVM_GET_API_VERSION, which takes no pointer.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// `fd`, which [`create_vcpu`] returned for `vm`, as kvm-ioctls' vCPU descriptor. What can fail is
/// the mapping kvm-ioctls makes for itself.
pub(crate) fn vcpu(vm: &VmFd, fd: OwnedFd) -> Result<VcpuFd, Errno> {
    // SAFETY: the descriptor is an open vCPU descriptor of this VM and its ownership moves.
    unsafe { vm.create_vcpu_from_rawfd(fd.into_raw_fd()) }.map_err(errno)
}

// ---- System ------------------------------------------------------------------------------------

/// `KVM_GET_MSR_INDEX_LIST` with room for `room` indices.
pub(crate) fn msr_index_list(kvm: &Kvm, room: usize) -> Result<MsrIndexList, Errno> {
    let nmsrs = u32::try_from(room).map_err(|_| Errno::EINVAL)?;
    // struct kvm_msr_list: nmsrs, then the indices.
    let mut words = vec![0u32; room.saturating_add(1)];
    if let Some(first) = words.first_mut() {
        *first = nmsrs;
    }
    // SAFETY: KVM writes nmsrs, and the indices only if `room` words behind it suffice for them.
    let result =
        checked(unsafe { ioctl_with_mut_ptr(kvm, KVM_GET_MSR_INDEX_LIST(), words.as_mut_ptr()) });
    let available = words.first().map_or(0, |n| *n as usize);
    match result {
        Ok(_) => {
            words.truncate(available.saturating_add(1));
            Ok(MsrIndexList { available, indices: words.split_off(1) })
        }
        Err(Errno::E2BIG) => Ok(MsrIndexList { available, indices: Vec::new() }),
        Err(errno) => Err(errno),
    }
}

/// Entries a `struct kvm_cpuid2` can have at most (`KVM_MAX_CPUID_ENTRIES` of the kernel since
/// 5.12; 80 before).
const MAX_CPUID_ENTRIES: u16 = 256;

/// `KVM_GET_SUPPORTED_CPUID`.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
    let mut words = layout::cpuid_room(MAX_CPUID_ENTRIES);
    // SAFETY: KVM writes no more entries than the header says there is room for.
    checked(unsafe { ioctl_with_mut_ptr(kvm, KVM_GET_SUPPORTED_CPUID(), words.as_mut_ptr()) })?;
    Ok(layout::cpuid_entries(&words))
}

// ---- VM ----------------------------------------------------------------------------------------

/// `KVM_CREATE_VCPU`.
pub(crate) fn create_vcpu(vm: &VmFd, id: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: the argument is a number.
    checked(unsafe { ioctl_with_val(vm, KVM_CREATE_VCPU(), id.into()) }).map(owned)
}

/// `KVM_SET_NR_MMU_PAGES`.
pub(crate) fn set_nr_mmu_pages(vm: &VmFd, pages: u64) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    checked(unsafe { ioctl_with_val(vm, KVM_SET_NR_MMU_PAGES(), pages) })?;
    Ok(())
}

/// `KVM_SET_GSI_ROUTING`.
pub(crate) fn set_gsi_routing(vm: &VmFd, routes: &[Route]) -> Result<(), Errno> {
    let table = layout::irq_routing(routes).ok_or(Errno::EINVAL)?;
    // SAFETY: KVM reads as many entries as the header says, which are in the table behind it.
    checked(unsafe { ioctl_with_ptr(vm, KVM_SET_GSI_ROUTING(), table.as_ptr()) })?;
    Ok(())
}

/// `KVM_IRQFD`, assigning `fd` to `gsi`.
pub(crate) fn irqfd_assign(
    vm: &VmFd,
    fd: RawFd,
    gsi: Gsi,
    resample: Option<RawFd>,
) -> Result<(), Errno> {
    irqfd(
        vm,
        &kvm_irqfd {
            fd: fd.cast_unsigned(),
            gsi: gsi.0,
            flags: resample.map_or(0, |_| KVM_IRQFD_FLAG_RESAMPLE),
            resamplefd: resample.map_or(0, RawFd::cast_unsigned),
            ..Default::default()
        },
    )
}

/// `KVM_IRQFD`, taking `fd` from `gsi`.
pub(crate) fn irqfd_deassign(vm: &VmFd, fd: RawFd, gsi: Gsi) -> Result<(), Errno> {
    irqfd(
        vm,
        &kvm_irqfd {
            fd: fd.cast_unsigned(),
            gsi: gsi.0,
            flags: KVM_IRQFD_FLAG_DEASSIGN,
            ..Default::default()
        },
    )
}

fn irqfd(vm: &VmFd, argument: &kvm_irqfd) -> Result<(), Errno> {
    // SAFETY: KVM reads the structure, which holds numbers only.
    checked(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), argument) })?;
    Ok(())
}

/// `KVM_IRQ_LINE_STATUS`: the status KVM wrote, which is negative for a line nobody listens to.
pub(crate) fn irq_line_status(vm: &VmFd, gsi: Gsi, level: bool) -> Result<i32, Errno> {
    let mut argument = kvm_irq_level {
        __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: gsi.0 },
        level: level.into(),
    };
    // SAFETY: KVM reads and writes the structure, which holds numbers only.
    checked(unsafe { ioctl_with_mut_ref(vm, KVM_IRQ_LINE_STATUS(), &mut argument) })?;
    // SAFETY: both members of the union are 32-bit integers.
    Ok(unsafe { argument.__bindgen_anon_1.status })
}

/// `KVM_IOEVENTFD`.
pub(crate) fn ioeventfd(vm: &VmFd, event: &IoEvent, deassign: bool) -> Result<(), Errno> {
    let mut flags = 0;
    if event.datamatch.is_some() {
        flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
    }
    if matches!(event.address, IoAddress::Pio(_)) {
        flags |= 1 << kvm_ioeventfd_flag_nr_pio;
    }
    if deassign {
        flags |= 1 << kvm_ioeventfd_flag_nr_deassign;
    }
    let argument = kvm_ioeventfd {
        datamatch: event.datamatch.unwrap_or(0),
        addr: event.address.value(),
        len: event.length,
        fd: event.event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: KVM reads the structure, which holds numbers only.
    checked(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &argument) })?;
    Ok(())
}

/// `KVM_GET_DIRTY_LOG`.
///
/// # Safety
/// `bitmap` is null, which KVM refuses with `EFAULT`, or points to one bit for every page the slot
/// has, rounded up to whole words, which the caller may write.
pub(crate) unsafe fn dirty_log(vm: &VmFd, slot: SlotId, bitmap: *mut u64) -> Result<(), Errno> {
    let argument = kvm_dirty_log {
        slot: slot.0,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.cast() },
    };
    // SAFETY: KVM reads the structure and writes the bitmap, which the caller vouches for.
    checked(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &argument) })?;
    Ok(())
}

/// `KVM_CLEAR_DIRTY_LOG`; `EINVAL` for a bitmap of fewer bits than `pages`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: SlotId,
    first: u64,
    pages: u32,
    bitmap: &[u64],
) -> Result<(), Errno> {
    if bitmap.len() < pages.div_ceil(u64::BITS) as usize {
        return Err(Errno::EINVAL);
    }
    let mut argument = kvm_clear_dirty_log {
        slot: slot.0,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            // KVM only reads the bitmap; the field is shared with a structure it writes.
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads the structure and one bit of the bitmap for each of `pages`, rounded up to
    // whole words, which the bitmap has.
    checked(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut argument) })?;
    Ok(())
}

/// `KVM_RESET_DIRTY_RINGS`: how many entries.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> Result<u32, Errno> {
    // SAFETY: the call takes no argument.
    checked(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) }).map(i32::unsigned_abs)
}

// ---- vCPU --------------------------------------------------------------------------------------

/// `KVM_RUN`. The exclusive borrow of the page is what lets KVM write it.
pub(crate) fn run(vcpu: &VcpuFd, _page: &mut RunPage) -> Result<(), Errno> {
    // SAFETY: KVM writes the kvm_run page, to which no reference exists during the call, and the
    // memory of the VM's slots, which the VM keeps alive and which is only ever seen as atomics.
    checked(unsafe { ioctl(vcpu, KVM_RUN()) })?;
    Ok(())
}

/// `KVM_INTERRUPT`.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), Errno> {
    let argument = kvm_interrupt { irq: vector.into() };
    // SAFETY: KVM reads the structure, which holds a number.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &argument) })?;
    Ok(())
}

/// `KVM_GET_MSRS`: how many were read.
pub(crate) fn msrs(vcpu: &VcpuFd, entries: &mut [kvm_msr_entry]) -> Result<usize, Errno> {
    let mut words = layout::msrs(entries).ok_or(Errno::E2BIG)?;
    // SAFETY: KVM reads and writes as many entries as the header says, which are behind it.
    let read = checked(unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_MSRS(), words.as_mut_ptr()) })?;
    let read = read.unsigned_abs() as usize;
    layout::read_msrs(&words, read, entries);
    Ok(read)
}

/// `KVM_SET_MSRS`: how many were written.
pub(crate) fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, Errno> {
    let words = layout::msrs(entries).ok_or(Errno::E2BIG)?;
    // SAFETY: KVM reads as many entries as the header says, which are behind it.
    let written = checked(unsafe { ioctl_with_ptr(vcpu, KVM_SET_MSRS(), words.as_ptr()) })?;
    Ok(written.unsigned_abs() as usize)
}

/// `KVM_GET_CPUID2`.
pub(crate) fn cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
    let mut words = layout::cpuid_room(MAX_CPUID_ENTRIES);
    // SAFETY: KVM writes no more entries than the header says there is room for.
    checked(unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_CPUID2(), words.as_mut_ptr()) })?;
    Ok(layout::cpuid_entries(&words))
}

/// `KVM_SET_CPUID2`.
pub(crate) fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
    let words = layout::cpuid(entries).ok_or(Errno::E2BIG)?;
    // SAFETY: KVM reads as many entries as the header says, which are behind it.
    checked(unsafe { ioctl_with_ptr(vcpu, KVM_SET_CPUID2(), words.as_ptr()) })?;
    Ok(())
}

/// `KVM_GET_TSC_KHZ`.
pub(crate) fn tsc_khz(vcpu: &VcpuFd) -> Result<u32, Errno> {
    // SAFETY: the call takes no argument.
    checked(unsafe { ioctl(vcpu, KVM_GET_TSC_KHZ()) }).map(i32::unsigned_abs)
}
