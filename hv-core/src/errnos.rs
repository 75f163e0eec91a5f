//! What can go wrong, as data: the errnos each call can leave.
//!
//! For whoever makes calls fail to see what happens ([`crate::layer`] has a layer for it). What an
//! errno means is said where it is shown; nothing is decided here.

use crate::{Call, Errno, Ioctl};

impl Call {
    /// Every errno the call can give a caller of the traits, as far as the KVM API
    /// documentation, the manual pages and the kernel say (x86, a VM of type 0).
    ///
    /// - Left out is what the traits make impossible or take care of: `EFAULT` for a bad pointer,
    ///   `EBADF`, `EINTR` and `EAGAIN` of `KVM_RUN`, `E2BIG` of `KVM_GET_MSR_INDEX_LIST`, `EPERM` of
    ///   `KVM_SIGNAL_MSI`.
    /// - `EIO` is in all lists of VM and vCPU ioctls: the VM belongs to another process (after a
    ///   `fork(2)`), or KVM found it broken and declared it dead.
    /// - `ENOTTY` is listed only where callers have to expect it: the version of what may be another
    ///   device, and capabilities asked of the VM before Linux 3.17.
    /// - A security module may refuse any ioctl with `EACCES`. That is listed only for those that
    ///   do not fail otherwise, so that no list is empty.
    ///
    /// ```
    /// use hv_core::{Call, Errno, Ioctl};
    /// assert!(Call::from(Ioctl::CreateIrqchip).errnos().contains(&Errno::EEXIST));
    /// assert!(Call::all().all(|call| !call.errnos().is_empty()));
    /// ```
    #[must_use]
    pub const fn errnos(self) -> &'static [Errno] {
        type E = Errno;
        match self {
            Call::Ioctl(ioctl) => of_ioctl(ioctl),
            Call::Open => &[
                E::ENOENT,
                E::EACCES,
                E::EPERM,
                E::ENODEV,
                E::ENXIO,
                E::EBUSY,
                E::EMFILE,
                E::ENFILE,
                E::ENOMEM,
            ],
            Call::Mmap => &[E::ENOMEM, E::EAGAIN, E::EINVAL, E::ENODEV, E::EACCES],
            // EINVAL is the backend's: no ring was enabled.
            Call::MmapDirtyRing => &[E::ENOMEM, E::EAGAIN, E::EINVAL, E::ENODEV, E::EACCES],
            Call::CoalescedRing => &[E::EIO],
            Call::Eventfd => &[E::EMFILE, E::ENFILE, E::ENODEV, E::ENOMEM],
            // EBUSY is the backend's: the signal has another handler.
            Call::Sigaction => &[E::EBUSY, E::EINVAL],
            Call::Kick => &[E::ESRCH, E::EPERM],
        }
    }
}

const fn of_ioctl(ioctl: Ioctl) -> &'static [Errno] {
    use Ioctl as I;
    type E = Errno;
    match ioctl {
        I::GetApiVersion => &[E::ENOTTY],
        I::CheckExtension => &[E::ENOTTY, E::EIO],
        I::GetVcpuMmapSize | I::GetMsrIndexList => &[E::EACCES],
        I::GetSupportedCpuid => &[E::E2BIG, E::ENOMEM],
        // EBUSY and EIO: the virtualization extensions could not be switched on. EINTR: a signal
        // while the memory notifier was registered.
        I::CreateVm => &[E::EINTR, E::ENOMEM, E::EBUSY, E::EINVAL, E::EMFILE, E::ENFILE, E::EIO],
        // Those of the capabilities the project enables: split irqchip, manual protection, dirty ring.
        I::EnableCap => &[E::EINVAL, E::EEXIST, E::E2BIG, E::ENOMEM, E::EIO],
        I::SetIdentityMapAddr | I::SetNrMmuPages | I::SetClock => &[E::EINVAL, E::EIO],
        // Beyond EINVAL: on Intel hosts KVM makes a memory slot of its own and writes to it.
        I::SetTssAddr => &[E::EINVAL, E::EEXIST, E::ENOMEM, E::EFAULT, E::EIO],
        I::CreateIrqchip => &[E::EEXIST, E::EINVAL, E::ENOSPC, E::ENOMEM, E::EIO],
        I::GetIrqchip | I::SetIrqchip => &[E::ENXIO, E::EINVAL, E::ENOMEM, E::EIO],
        I::CreatePit2 => &[E::ENOENT, E::EEXIST, E::ENOMEM, E::EIO],
        I::GetPit2 | I::SetPit2 | I::IrqLine | I::IrqLineStatus => &[E::ENXIO, E::EIO],
        I::CreateVcpu => &[E::EEXIST, E::EINVAL, E::ENOMEM, E::EMFILE, E::ENFILE, E::EIO],
        I::SetGsiRouting => &[E::EINVAL, E::ENOMEM, E::EIO],
        I::Irqfd => &[E::EBUSY, E::EINVAL, E::ENOMEM, E::EIO],
        I::SignalMsi => &[E::EINVAL, E::EIO],
        I::SetUserMemoryRegion => &[E::EEXIST, E::EINVAL, E::ENOMEM, E::EIO],
        I::GetDirtyLog | I::ClearDirtyLog => &[E::ENOENT, E::EINVAL, E::ENXIO, E::EIO],
        I::ResetDirtyRings => &[E::EINVAL, E::EIO],
        I::RegisterCoalescedMmio => &[E::ENOSPC, E::EINVAL, E::ENOMEM, E::EIO],
        I::UnregisterCoalescedMmio => &[E::EINVAL, E::ENOMEM, E::EIO],
        I::Ioeventfd => &[E::EEXIST, E::ENOENT, E::EINVAL, E::ENOSPC, E::ENOMEM, E::EIO],
        I::Run => &[E::EFAULT, E::EHWPOISON, E::EINVAL, E::ENOMEM, E::EIO],
        // The larger structures are copied through memory that KVM allocates.
        I::GetRegs | I::SetRegs | I::GetSregs | I::GetFpu | I::SetFpu => &[E::ENOMEM, E::EIO],
        I::SetSregs | I::GetXcrs | I::SetXcrs | I::GetLapic | I::SetLapic => {
            &[E::EINVAL, E::ENOMEM, E::EIO]
        }
        I::SetDebugregs | I::SetMpState | I::SetVcpuEvents => &[E::EINVAL, E::EIO],
        I::GetDebugregs | I::GetMpState | I::GetVcpuEvents | I::GetClock => &[E::EIO],
        I::GetMsrs | I::SetMsrs => &[E::E2BIG, E::ENOMEM, E::EIO],
        I::GetCpuid2 => &[E::E2BIG, E::EIO],
        I::SetCpuid2 => &[E::E2BIG, E::EINVAL, E::ENOMEM, E::EIO],
        I::Interrupt => &[E::ENXIO, E::EEXIST, E::EIO],
        I::Nmi | I::Translate | I::GetTscKhz => &[E::EIO],
        I::SetGuestDebug => &[E::EINVAL, E::EBUSY, E::EIO],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_call_has_errnos_with_names_each_once() {
        for call in Call::all() {
            let errnos = call.errnos();
            let once: HashSet<_> = errnos.iter().collect();
            assert!(!errnos.is_empty() && once.len() == errnos.len(), "{call}: {errnos:?}");
            assert!(errnos.iter().all(|errno| errno.name().is_some()), "{call}: {errnos:?}");
        }
    }

    #[test]
    fn what_the_traits_take_care_of_is_not_listed() {
        let run = Call::from(Ioctl::Run).errnos();
        assert!(!run.contains(&Errno::EINTR) && !run.contains(&Errno::EAGAIN));
        assert!(!Call::from(Ioctl::SignalMsi).errnos().contains(&Errno::EPERM));
        assert!(Call::all().all(|call| !call.errnos().contains(&Errno::EBADF)));
    }

    #[test]
    fn what_has_a_remedy_can_happen() {
        for call in Call::all() {
            for errno in (1..=133).map(Errno) {
                // These two are said of every call.
                let anywhere = [Errno::EMFILE, Errno::ENOTTY].contains(&errno);
                let known = crate::Error::new(call, errno).remedy().is_some();
                // A closed descriptor can't be named, but may be told by a backend that is broken.
                if known && !anywhere && errno != Errno::EBADF {
                    assert!(call.errnos().contains(&errno), "{call}: {errno}");
                }
            }
        }
    }
}
