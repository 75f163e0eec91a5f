//! A level-triggered pin that an eventfd drives, wherever the pin is.
//!
//! KVM can't see the level of a device, so the level is a conversation: the device raises the pin, the
//! guest ends the interrupt, the device is told and raises the pin again if it is not satisfied. This
//! is how VFIO and virtio with INTx work. It must not know the device.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, Gsi, IrqBackend, Irqfd};

use crate::ioapic::PinTrigger;
use crate::router::Shared;
use crate::{IrqRouter, RouterError};

/// A level-triggered pin of a device: raised by an eventfd, its ends told by another.
///
/// The same for a pin in the kernel ([`IrqRouter::bind_level`]) and in user space
/// ([`crate::Ioapic::bind_level`]). A device that wants an interrupt calls [`LevelPin::raise`], or
/// has something signal [`LevelPin::trigger`]. It waits for [`LevelPin::resample`], and when
/// [`LevelPin::take_end`] says that the guest ended the interrupt, raises the pin again if it still
/// wants one. It is asked the same when the guest unmasks a pin that was raised while masked. A pin may
/// be shared; then each of its devices is told of an end, and a device may be told of one that it did
/// not raise.
///
/// Dropping it unbinds the eventfds. If KVM refuses, the router keeps them open and tries again with
/// its next commit.
pub struct LevelPin<V: IrqBackend> {
    gsi: Gsi,
    trigger: EventFd,
    resample: EventFd,
    _owner: Owner<V>,
}

/// Who has the pin; lets go of it when it is dropped.
#[expect(dead_code, reason = "held to be dropped")]
enum Owner<V: IrqBackend> {
    Kernel(KernelIrqfd<V>),
    UserSpace(PinTrigger<V>),
}

struct KernelIrqfd<V: IrqBackend> {
    router: Weak<Shared<V>>,
    trigger: EventFd,
}

impl<V: IrqBackend> Drop for KernelIrqfd<V> {
    fn drop(&mut self) {
        if let Some(shared) = self.router.upgrade() {
            IrqRouter { shared }.release_irqfd(&self.trigger);
        }
    }
}

impl<V: IrqBackend> LevelPin<V> {
    pub(crate) fn in_user_space(
        gsi: Gsi,
        trigger: EventFd,
        resample: EventFd,
        owner: PinTrigger<V>,
    ) -> Self {
        Self { gsi, trigger, resample, _owner: Owner::UserSpace(owner) }
    }

    /// The GSI of the pin.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }

    /// The device wants an interrupt. Until the guest ends it, raising it again changes nothing or
    /// makes the guest look once more.
    pub fn raise(&self) {
        self.trigger.signal();
    }

    /// What raises the pin when it is signalled, for what is no code of this process.
    #[must_use]
    pub fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    /// What is signalled when the guest ends the interrupt, to be waited for.
    #[must_use]
    pub fn resample(&self) -> &EventFd {
        &self.resample
    }

    /// Whether the guest has ended the interrupt, or unmasked the raised pin, since this was last asked:
    /// then the device has to raise the pin again if it still wants an interrupt.
    #[must_use]
    pub fn take_end(&self) -> bool {
        self.resample.take().is_some()
    }
}

impl<V: IrqBackend> fmt::Debug for LevelPin<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LevelPin({})", self.gsi)
    }
}

impl<V: IrqBackend> IrqRouter<V> {
    /// Lets an eventfd drive a level-triggered line of the kernel's interrupt controllers (`KVM_IRQFD`
    /// with `KVM_IRQFD_FLAG_RESAMPLE`): the line is asserted when `trigger` is signalled; when the guest
    /// ends the interrupt it is deasserted and `resample` is signalled.
    ///
    /// # Errors
    /// There is no such line in the kernel, the eventfd is bound already, or KVM refuses.
    pub fn bind_level(
        &self,
        gsi: Gsi,
        trigger: EventFd,
        resample: EventFd,
    ) -> Result<LevelPin<V>, RouterError> {
        let event = trigger.clone();
        self.bind_line(&Irqfd { event, gsi, resample: Some(resample.clone()) })?;
        let router = Arc::downgrade(&self.shared);
        let owner = Owner::Kernel(KernelIrqfd { router, trigger: trigger.clone() });
        Ok(LevelPin { gsi, trigger, resample, _owner: owner })
    }

    /// Unbinds an eventfd whose owner is gone.
    pub(crate) fn release_irqfd(&self, event: &EventFd) {
        self.shared.state().release_irqfd(&*self.shared.vm(), event.as_raw_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::event;
    use crate::{LegacyPins, RouterConfig};
    use hv_core::mock::MockVm;

    fn router(pins: LegacyPins, vm: MockVm) -> IrqRouter<MockVm> {
        let config = RouterConfig::new(4096, pins);
        IrqRouter::new(Arc::new(vm), config).unwrap()
    }

    #[test]
    fn a_line_of_the_kernel_has_its_resample_event_in_the_ledger() {
        let (trigger, resample) = (event(), event());
        let wanted =
            Irqfd { event: trigger.clone(), gsi: Gsi(10), resample: Some(resample.clone()) };
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().once().returning(|_| Ok(()));
        let irqfd = wanted.clone();
        vm.expect_irqfd_assign().withf(move |i| *i == irqfd).once().returning(|_| Ok(()));
        vm.expect_irqfd_deassign().withf(|_, gsi| *gsi == Gsi(10)).once().returning(|_, _| Ok(()));
        let router = router(LegacyPins::Kernel, vm);
        let pin = router.bind_level(Gsi(10), trigger.clone(), resample.clone()).unwrap();
        assert_eq!(router.irqfds(), [wanted]);
        pin.raise();
        assert_eq!(trigger.take(), Some(1));
        assert!(!pin.take_end());
        resample.signal();
        assert!(pin.take_end() && !pin.take_end());
        drop(pin);
        assert!(router.irqfds().is_empty());
    }

    #[test]
    fn a_level_needs_a_line_of_the_kernel() {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        let split = router(LegacyPins::Userspace, vm);
        let error = split.bind_level(Gsi(10), event(), event()).unwrap_err();
        assert_eq!(error, RouterError::NoKernelLine(Gsi(10)));
    }
}
