//! A legacy line of the kernel's interrupt controllers with an eventfd that raises it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use hv_core::{Gsi, IrqBackend};

use crate::router::Shared;
use crate::state::Op;
use crate::{IrqRouter, LEGACY_GSIS, LegacyPins, RouterError};

/// An eventfd that raises a legacy line, edge-triggered: each write is one interrupt.
///
/// Dropping it unbinds the eventfd. The line's routes stay: they are the machine's.
pub struct PinIrqfd<V: IrqBackend> {
    gsi: Gsi,
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
        if let Some(router) = self.router.upgrade() {
            // If KVM refuses, the ledger keeps the binding, and with it the eventfd.
            let _ = router.state().commit(&*router.vm, &[Op::Unbind(self.gsi)]);
        }
    }
}

impl<V: IrqBackend> IrqRouter<V> {
    /// Lets an eventfd raise a line of the kernel's interrupt controllers, without a change to the
    /// routing table.
    ///
    /// # Errors
    /// There is no such line in the kernel, the line has an eventfd already, or KVM refuses.
    pub fn bind_pin(&self, gsi: Gsi, event: Arc<OwnedFd>) -> Result<PinIrqfd<V>, RouterError> {
        let mut state = self.shared.state();
        let in_kernel = self.config().pins == LegacyPins::Kernel && LEGACY_GSIS.contains(&gsi.0);
        if !in_kernel || state.table.targets(gsi).next().is_none() {
            return Err(RouterError::NoKernelLine(gsi));
        }
        state.commit(&*self.shared.vm, &[Op::Bind(gsi, event)])?;
        Ok(PinIrqfd { gsi, router: Arc::downgrade(&self.shared) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RouterConfig;
    use hv_core::mock::MockVm;
    use hv_core::{Errno, Error, Ioctl};
    use std::fs::File;

    fn router(pins: LegacyPins, vm: MockVm) -> IrqRouter<MockVm> {
        let config = RouterConfig { gsi_count: 4096, pins, inject_status: true };
        IrqRouter::new(Arc::new(vm), config).unwrap()
    }

    fn vm(commits: usize) -> MockVm {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().times(commits).returning(|_| Ok(()));
        vm
    }

    fn event() -> Arc<OwnedFd> {
        Arc::new(File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn a_line_is_bound_and_unbound_without_a_new_table() {
        let mut vm = vm(1);
        vm.expect_irqfd_assign().withf(|i| i.gsi == Gsi(4)).once().returning(|_| Ok(()));
        vm.expect_irqfd_deassign().withf(|_, gsi| *gsi == Gsi(4)).once().returning(|_, _| Ok(()));
        let router = router(LegacyPins::Kernel, vm);
        let pin = router.bind_pin(Gsi(4), event()).unwrap();
        assert_eq!(router.irqfds().len(), 1);
        let second = router.bind_pin(Gsi(4), event()).unwrap_err();
        assert!(matches!(second, RouterError::RouteBound { gsi: Gsi(4), .. }), "{second}");
        drop(pin);
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
