//! A legacy line of the kernel's interrupt controllers, raised edge-triggered by an eventfd.
//!
//! The routes of a line are the machine's: nothing here changes the table.

use std::fmt;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, Gsi, IrqBackend, Irqfd, RouteTarget};

use crate::router::Shared;
use crate::state::Op;
use crate::{IrqRouter, RouterError};

/// An eventfd that raises a legacy line, edge-triggered: each write is one interrupt.
///
/// Dropping it unbinds the eventfd. If KVM refuses, the router keeps the eventfd open and tries again
/// with its next commit.
pub struct PinIrqfd<V: IrqBackend> {
    gsi: Gsi,
    event: EventFd,
    router: Weak<Shared<V>>,
}

impl<V: IrqBackend> PinIrqfd<V> {
    /// The GSI of the line.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }
}

impl<V: IrqBackend> fmt::Debug for PinIrqfd<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinIrqfd({})", self.gsi)
    }
}

impl<V: IrqBackend> Drop for PinIrqfd<V> {
    fn drop(&mut self) {
        if let Some(shared) = self.router.upgrade() {
            IrqRouter { shared }.release_irqfd(&self.event);
        }
    }
}

impl<V: IrqBackend> IrqRouter<V> {
    /// Lets an eventfd raise a line of the kernel's interrupt controllers (`KVM_IRQFD`). Several
    /// eventfds may raise the same line.
    ///
    /// # Errors
    /// There is no such line in the kernel, the eventfd is bound already, or KVM refuses.
    pub fn bind_pin(&self, gsi: Gsi, event: EventFd) -> Result<PinIrqfd<V>, RouterError> {
        self.bind_line(&Irqfd { event: event.clone(), gsi, resample: None })?;
        Ok(PinIrqfd { gsi, event, router: Arc::downgrade(&self.shared) })
    }

    pub(crate) fn bind_line(&self, irqfd: &Irqfd) -> Result<(), RouterError> {
        let mut state = self.shared.state();
        let mut targets = state.table.targets(irqfd.gsi);
        if !targets.any(|target| matches!(target, RouteTarget::Pin { .. })) {
            return Err(RouterError::NoKernelLine(irqfd.gsi));
        }
        drop(targets);
        state.commit(&*self.shared.vm(), &[Op::Bind(irqfd.clone())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{event, is_closed, watched};
    use crate::{LegacyPins, RouterConfig};
    use hv_core::mock::MockVm;
    use hv_core::{Errno, Error, Ioctl};
    use std::os::fd::AsRawFd;

    fn router(pins: LegacyPins, vm: MockVm) -> IrqRouter<MockVm> {
        let config = RouterConfig::new(4096, pins);
        IrqRouter::new(Arc::new(vm), config).unwrap()
    }

    fn vm(commits: usize) -> MockVm {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().times(commits).returning(|_| Ok(()));
        vm
    }

    #[test]
    fn a_line_is_bound_and_unbound_without_a_new_table() {
        let mut vm = vm(1);
        vm.expect_irqfd_assign().withf(|i| i.gsi == Gsi(4)).once().returning(|_| Ok(()));
        vm.expect_irqfd_deassign().withf(|_, gsi| *gsi == Gsi(4)).once().returning(|_, _| Ok(()));
        let router = router(LegacyPins::Kernel, vm);
        let pin = router.bind_pin(Gsi(4), event()).unwrap();
        assert_eq!(router.irqfds().len(), 1);
        drop(pin);
        assert!(router.irqfds().is_empty());
    }

    #[test]
    fn a_line_may_be_shared_but_an_eventfd_raises_one() {
        let mut vm = vm(1);
        vm.expect_irqfd_assign().times(2).returning(|_| Ok(()));
        vm.expect_irqfd_deassign().times(2).returning(|_, _| Ok(()));
        let router = router(LegacyPins::Kernel, vm);
        let (first, second) = (event(), event());
        let one = router.bind_pin(Gsi(10), first.clone()).unwrap();
        let other = router.bind_pin(Gsi(10), second).unwrap();
        let again = router.bind_pin(Gsi(11), first.clone()).unwrap_err();
        assert_eq!(again, RouterError::EventInUse { fd: first.as_raw_fd(), gsi: Gsi(10) });
        drop(one);
        assert_eq!(router.irqfds().len(), 1, "the other one is still bound");
        drop(other);
    }

    #[test]
    fn what_could_not_be_unbound_is_tried_again() {
        let mut vm = vm(1);
        let failure = Error::new(Ioctl::Irqfd, Errno::ENOMEM);
        vm.expect_irqfd_assign().times(2).returning(|_| Ok(()));
        vm.expect_irqfd_deassign().times(2).returning(move |_, _| Err(failure));
        vm.expect_irqfd_deassign().times(2).returning(|_, _| Ok(()));
        let router = router(LegacyPins::Kernel, vm);
        let (abandoned, watch) = watched();
        drop(router.bind_pin(Gsi(4), abandoned).unwrap());
        assert_eq!(router.irqfds().len(), 1, "KVM still has it");
        router.batch(|_| Ok(())).unwrap();
        assert_eq!(router.irqfds().len(), 1, "and again");
        assert!(!is_closed(&watch), "so it is kept open");
        let next = router.bind_pin(Gsi(5), event()).unwrap();
        assert!(is_closed(&watch));
        drop(next);
        assert!(router.irqfds().is_empty());
    }

    #[test]
    fn what_is_no_line_of_the_kernel_is_refused() {
        let kernel = router(LegacyPins::Kernel, vm(1));
        for gsi in [Gsi(2), Gsi(24), Gsi(u32::MAX)] {
            let error = kernel.bind_pin(gsi, event()).unwrap_err();
            assert_eq!(error, RouterError::NoKernelLine(gsi));
        }
        let split = router(LegacyPins::Userspace, vm(0));
        let error = split.bind_pin(Gsi(4), event()).unwrap_err();
        assert_eq!(error, RouterError::NoKernelLine(Gsi(4)));
    }

    #[test]
    fn a_refusal_leaves_nothing_bound() {
        let mut vm = vm(1);
        let refused = Error::new(Ioctl::Irqfd, Errno::EINVAL);
        vm.expect_irqfd_assign().returning(move |_| Err(refused));
        let router = router(LegacyPins::Kernel, vm);
        assert_eq!(router.bind_pin(Gsi(1), event()).unwrap_err(), RouterError::Kvm(refused));
        assert!(router.irqfds().is_empty());
    }
}
