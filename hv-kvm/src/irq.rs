//! Interrupts and doorbells: [`IrqBackend`] and [`IoEventBackend`], one ioctl each.
//!
//! Nothing is checked or remembered here: KVM judges routing tables, and what KVM does not judge
//! (any GSI for an irqfd) is the affair of the layers above.

use std::os::fd::AsRawFd;

use hv_core::{
    Context, Errno, Error, EventFd, Gsi, IoEvent, IoEventBackend, Ioctl, IrqBackend, Irqfd,
    LineStatus, Msi, MsiStatus, Route,
};
use kvm_bindings::{KVM_MSI_VALID_DEVID, kvm_msi};

use crate::{KvmVm, raw};

impl IrqBackend for KvmVm {
    fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error> {
        raw::set_gsi_routing(self.fd(), routes).map_err(|errno| {
            Error::new(Ioctl::SetGsiRouting, errno).about(Context::Routes(routes.len()))
        })
    }

    fn irqfd_assign(&self, Irqfd { event, gsi, resample }: &Irqfd) -> Result<(), Error> {
        let resample = resample.as_ref().map(EventFd::as_raw_fd);
        raw::irqfd_assign(self.fd(), event.as_raw_fd(), *gsi, resample)
            .map_err(|errno| Error::new(Ioctl::Irqfd, errno).about(Context::Gsi(*gsi)))
    }

    fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error> {
        raw::irqfd_deassign(self.fd(), event.as_raw_fd(), gsi)
            .map_err(|errno| Error::new(Ioctl::Irqfd, errno).about(Context::Gsi(gsi)))
    }

    fn irq_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.fd()
            .set_irq_line(gsi.0, level)
            .map_err(|error| Error::new(Ioctl::IrqLine, raw::errno(error)).about(Context::Gsi(gsi)))
    }

    fn irq_line_status(&self, gsi: Gsi, level: bool) -> Result<LineStatus, Error> {
        raw::irq_line_status(self.fd(), gsi, level)
            .map(line_status)
            .map_err(|errno| Error::new(Ioctl::IrqLineStatus, errno).about(Context::Gsi(gsi)))
    }

    fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error> {
        let answer = self.fd().signal_msi(kvm_msi(msi)).map_err(raw::errno);
        msi_status(answer).map_err(|errno| {
            Error::new(Ioctl::SignalMsi, errno).about(Context::Address(msi.address))
        })
    }
}

impl IoEventBackend for KvmVm {
    fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error> {
        ioeventfd(self, event, false)
    }

    fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error> {
        ioeventfd(self, event, true)
    }
}

fn ioeventfd(vm: &KvmVm, event: &IoEvent, deassign: bool) -> Result<(), Error> {
    raw::ioeventfd(vm.fd(), event, deassign).map_err(|errno| {
        Error::new(Ioctl::Ioeventfd, errno).about(Context::Address(event.address.value()))
    })
}

fn line_status(status: i32) -> LineStatus {
    match u32::try_from(status) {
        Ok(0) => LineStatus::Coalesced,
        Ok(vcpus) => LineStatus::Delivered(vcpus),
        Err(_) => LineStatus::Ignored,
    }
}

fn kvm_msi(msi: Msi) -> kvm_msi {
    kvm_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        flags: msi.device.map_or(0, |_| KVM_MSI_VALID_DEVID),
        devid: msi.device.unwrap_or(0),
        ..Default::default()
    }
}

/// KVM answers -1 for a message nobody took, which arrives as `EPERM`.
fn msi_status(answer: Result<i32, Errno>) -> Result<MsiStatus, Errno> {
    match answer {
        Ok(0) => Ok(MsiStatus::Blocked),
        Ok(_) => Ok(MsiStatus::Delivered),
        Err(Errno::EPERM) => Ok(MsiStatus::NoTarget),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_delivered_coalesced_or_ignored() {
        assert_eq!(line_status(2), LineStatus::Delivered(2));
        assert_eq!(line_status(0), LineStatus::Coalesced);
        assert_eq!(line_status(-1), LineStatus::Ignored);
    }

    #[test]
    fn eperm_is_a_message_without_a_target_and_no_failure() {
        assert_eq!(msi_status(Ok(1)), Ok(MsiStatus::Delivered));
        assert_eq!(msi_status(Ok(0)), Ok(MsiStatus::Blocked));
        assert_eq!(msi_status(Err(Errno::EPERM)), Ok(MsiStatus::NoTarget));
        assert_eq!(msi_status(Err(Errno::EINVAL)), Err(Errno::EINVAL));
    }

    #[test]
    fn a_message_keeps_all_of_its_address() {
        let msi = kvm_msi(Msi { address: 0x12_fee0_3004, data: 0x41, device: Some(7) });
        assert_eq!((msi.address_lo, msi.address_hi), (0xfee0_3004, 0x12));
        assert_eq!((msi.data, msi.flags, msi.devid), (0x41, KVM_MSI_VALID_DEVID, 7));
    }
}
