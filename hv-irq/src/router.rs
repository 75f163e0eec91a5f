//! The router of a VM: owns its GSIs, its routing table and its irqfds.
//!
//! The lock around the state is held across the ioctls of a commit so that commits of several threads
//! do not mix. No caller's code runs under it. The order of all locks is in the crate's documentation.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hv_core::init::{Irqchip, MsiMode, Record};
use hv_core::{Gsi, IrqBackend, LineStatus, Msi, MsiStatus, Route};

use crate::pins::CASCADE;
use crate::state::{Op, State};
use crate::{Batch, LEGACY_GSIS, RouterError, pc_default_routes};

/// Who has the pins of the legacy interrupt controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum LegacyPins {
    /// The kernel (`KVM_CREATE_IRQCHIP`): GSIs 0 to 23 lead to its PICs and its I/O APIC.
    Kernel,
    /// User space (`KVM_CAP_SPLIT_IRQCHIP` with 24 pins): GSIs 0 to 23 are kept for the
    /// messages of the pins of its I/O APIC.
    Userspace,
}

/// What a router has to know of its VM; init's [`Record`] says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterConfig {
    /// The value of `KVM_CAP_IRQ_ROUTING`: how many GSIs there are, and entries in the table.
    pub gsi_count: u32,
    /// Who has the legacy pins.
    pub pins: LegacyPins,
    /// Whether KVM says what became of a line that was set (`KVM_CAP_IRQ_INJECT_STATUS`).
    pub inject_status: bool,
    /// How a message without a route of its own is sent.
    pub msi: MsiMode,
    /// Whether messages name 32-bit APIC ids (`KVM_CAP_X2APIC_API` with
    /// `KVM_X2APIC_API_USE_32BIT_IDS`).
    pub x2apic_format: bool,
}

impl RouterConfig {
    /// That of a VM whose KVM has everything since Linux 3.5, without 32-bit APIC ids.
    #[must_use]
    pub fn new(gsi_count: u32, pins: LegacyPins) -> Self {
        let msi = MsiMode::Direct;
        Self { gsi_count, pins, inject_status: true, msi, x2apic_format: false }
    }
}

impl From<&Record> for RouterConfig {
    /// That of the VM init made. Without routing there are no GSIs, and no router
    /// ([`RouterError::TooFewGsis`]).
    fn from(record: &Record) -> Self {
        let pins = match record.irqchip {
            Irqchip::Split { .. } => LegacyPins::Userspace,
            Irqchip::Kernel { .. } | Irqchip::Off => LegacyPins::Kernel,
        };
        Self {
            inject_status: record.inject_status,
            msi: record.msi,
            ..Self::new(record.routing.map_or(0, |routing| routing.gsi_count), pins)
        }
    }
}

/// The interrupt router of a VM. Clones are the same router.
///
/// ```
/// use std::sync::Arc;
/// use hv_core::{Msi, mock::MockVm};
/// use hv_irq::{IrqRouter, LegacyPins, RouterConfig};
///
/// let mut vm = MockVm::new();
/// vm.expect_set_gsi_routing().times(2).returning(|_| Ok(()));
/// # vm.expect_drop().return_const(());
/// let config = RouterConfig::new(4096, LegacyPins::Kernel);
/// let router = IrqRouter::new(Arc::new(vm), config)?; // 38 routes, one ioctl
///
/// let message = |vector| Msi { address: 0xfee0_0000, data: vector, device: None };
/// let vectors = router.batch(|batch| {
///     (0x40..0x48).map(|vector| batch.add_msi(message(vector))).collect::<Result<Vec<_>, _>>()
/// })?; // eight more, one ioctl
/// assert_eq!(vectors[0].gsi().0, 24);
/// # drop(router);
/// # Ok::<(), hv_irq::RouterError>(())
/// ```
pub struct IrqRouter<V: IrqBackend> {
    pub(crate) shared: Arc<Shared<V>>,
}

pub(crate) struct Shared<V> {
    pub(crate) config: RouterConfig,
    state: Mutex<State>,
    vm: RwLock<Arc<V>>,
}

impl<V> Shared<V> {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Every change ends with state and kernel in agreement, or rolls back; a panic in a backend
        // is the only way to poison this, and does not make later calls worse than they are.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM. What is done to it under the lock of the state concerns no VM before or after it.
    pub(crate) fn vm(&self) -> Arc<V> {
        Arc::clone(&self.vm.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<V: IrqBackend> IrqRouter<V> {
    /// The router of a VM that has its irqchip. If the kernel has the legacy pins their 38 default
    /// routes are committed with one ioctl.
    ///
    /// # Errors
    /// Fewer GSIs than the legacy interrupts need, or KVM refuses the default routes.
    pub fn new(vm: Arc<V>, config: RouterConfig) -> Result<Self, RouterError> {
        let mut state = State::empty(&config)?;
        let defaults: Vec<Op> = match config.pins {
            LegacyPins::Kernel => pc_default_routes().map(Op::Add).collect(),
            LegacyPins::Userspace => Vec::new(),
        };
        state.commit(&*vm, &defaults)?;
        Ok(Self::with(vm, config, state))
    }

    pub(crate) fn with(vm: Arc<V>, config: RouterConfig, state: State) -> Self {
        let (state, vm) = (Mutex::new(state), RwLock::new(vm));
        Self { shared: Arc::new(Shared { config, state, vm }) }
    }

    /// Moves everything to another VM that has an irqchip of the same kind: the table with one ioctl,
    /// then each irqfd. All handles stay what they are, and an event that comes meanwhile waits in its
    /// eventfd. The router lets go of the old VM.
    ///
    /// # Errors
    /// A VM refuses; everything is on the old one then, and the new one should be dropped.
    pub fn rebuild(&self, vm: Arc<V>) -> Result<(), RouterError> {
        let mut state = self.shared.state();
        state.rebuild(&*self.shared.vm(), &*vm)?;
        let mut current = self.shared.vm.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, vm);
        drop((current, state));
        drop(old); // not under a lock: it may be the last handle to that VM
        Ok(())
    }

    /// Changes routes and irqfds together: whatever `change` asks for is done in one commit if it
    /// returns `Ok`, and not at all otherwise.
    ///
    /// A batch that changes nothing calls no ioctl. Any other unbinds irqfds, writes the table once if
    /// it differs, and binds irqfds. A handle that `change` kept although the batch failed owns a GSI
    /// without a route: it can be routed by another batch, or dropped.
    ///
    /// # Errors
    /// Those of `change`, of the rules of routes and irqfds, and of KVM.
    pub fn batch<'a, T>(
        &'a self,
        change: impl FnOnce(&mut Batch<'a, V>) -> Result<T, RouterError>,
    ) -> Result<T, RouterError> {
        let mut batch = Batch::new(&self.shared);
        let result = change(&mut batch)?;
        batch.commit()?;
        Ok(result)
    }

    /// Sends a message that has no route of its own, as this KVM can: as it is (`KVM_SIGNAL_MSI`), or
    /// through a route that is made when it is sent first and kept for the next
    /// ([`MsiMode::DynamicRoutes`]). Routes of the second kind go when GSIs are short. On a KVM that
    /// does not say what became of a line, a message sent that way counts as delivered.
    ///
    /// # Errors
    /// KVM refuses the message; or all GSIs have owners and it needs one.
    pub fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, RouterError> {
        if self.shared.config.msi == MsiMode::Direct {
            return Ok(self.shared.vm().signal_msi(msi)?);
        }
        // Locked until the interrupt is raised: its route must not go before that.
        let (mut state, vm) = (self.shared.state(), self.shared.vm());
        let gsi = state.dynamic_route(&*vm, msi)?;
        Ok(match self.raise(&*vm, gsi, true)? {
            Some(LineStatus::Delivered(_)) | None => MsiStatus::Delivered,
            Some(LineStatus::Coalesced) => MsiStatus::Blocked,
            Some(LineStatus::Ignored) => MsiStatus::NoTarget,
        })
    }

    /// Sets a line of the kernel's interrupt controllers, and says what became of it if KVM does
    /// (`KVM_IRQ_LINE_STATUS`, else `KVM_IRQ_LINE`).
    ///
    /// # Errors
    /// The pins are in user space, or the ioctl failed.
    pub fn set_line(&self, gsi: Gsi, level: bool) -> Result<Option<LineStatus>, RouterError> {
        let is_line = LEGACY_GSIS.contains(&gsi.0) && gsi.0 != CASCADE;
        if self.shared.config.pins == LegacyPins::Userspace || !is_line {
            return Err(RouterError::NoKernelLine(gsi));
        }
        self.raise(&*self.shared.vm(), gsi, level)
    }

    fn raise(&self, vm: &V, gsi: Gsi, level: bool) -> Result<Option<LineStatus>, RouterError> {
        Ok(if self.shared.config.inject_status {
            Some(vm.irq_line_status(gsi, level)?)
        } else {
            vm.irq_line(gsi, level)?;
            None
        })
    }

    /// What the router was made for.
    #[must_use]
    pub fn config(&self) -> RouterConfig {
        self.shared.config
    }

    /// The routing table, as KVM has it.
    #[must_use]
    pub fn routes(&self) -> Vec<Route> {
        self.shared.state().table.routes()
    }

    /// The GSIs that are allocated, ascending.
    #[must_use]
    pub fn allocated(&self) -> Vec<Gsi> {
        self.shared.state().gsis.iter().collect()
    }

    /// The irqfds KVM has, by descriptor.
    #[must_use]
    pub fn irqfds(&self) -> Vec<hv_core::Irqfd> {
        self.shared.state().irqfds.iter().cloned().collect()
    }
}

impl<V: IrqBackend> Clone for IrqRouter<V> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<V: IrqBackend> fmt::Debug for IrqRouter<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqRouter").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVm;
    use hv_core::{Errno, Error, Ioctl};

    fn vm() -> MockVm {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm
    }

    fn config(pins: LegacyPins) -> RouterConfig {
        RouterConfig::new(4096, pins)
    }

    #[test]
    fn a_kernel_irqchip_starts_with_the_routes_of_a_pc_in_one_ioctl() {
        let mut vm = vm();
        let defaults: Vec<Route> = pc_default_routes().collect();
        vm.expect_set_gsi_routing().withf(move |r| r == defaults).once().returning(|_| Ok(()));
        let router = IrqRouter::new(Arc::new(vm), config(LegacyPins::Kernel)).unwrap();
        assert_eq!(router.routes().len(), 38);
        assert!(router.allocated().is_empty() && router.irqfds().is_empty());
    }

    #[test]
    fn a_split_irqchip_starts_with_none() {
        let router = IrqRouter::new(Arc::new(vm()), config(LegacyPins::Userspace)).unwrap();
        assert!(router.routes().is_empty());
        assert_eq!(
            router.set_line(Gsi(4), true),
            Err(RouterError::NoKernelLine(Gsi(4))),
            "KVM would take the line for a message that ignores the mask"
        );
    }

    #[test]
    fn too_few_gsis_and_a_refusal_are_errors() {
        for (gsi_count, pins, needed) in [
            (37, LegacyPins::Kernel, 38),
            (0, LegacyPins::Kernel, 38),
            (23, LegacyPins::Userspace, 24),
        ] {
            let config = RouterConfig { gsi_count, ..config(pins) };
            let error = IrqRouter::new(Arc::new(vm()), config).unwrap_err();
            assert_eq!(error, RouterError::TooFewGsis { count: gsi_count, needed });
        }
        let mut vm = vm();
        let refused = Error::new(Ioctl::SetGsiRouting, Errno::EINVAL);
        vm.expect_set_gsi_routing().returning(move |_| Err(refused));
        let error = IrqRouter::new(Arc::new(vm), config(LegacyPins::Kernel)).unwrap_err();
        assert_eq!(error, RouterError::Kvm(refused));
    }

    #[test]
    fn a_line_is_set_by_what_the_kernel_has() {
        for inject_status in [true, false] {
            let mut vm = vm();
            vm.expect_set_gsi_routing().returning(|_| Ok(()));
            let (with, without) = if inject_status { (1, 0) } else { (0, 1) };
            vm.expect_irq_line_status().times(with).returning(|_, _| Ok(LineStatus::Coalesced));
            vm.expect_irq_line().times(without).returning(|_, _| Ok(()));
            let config = RouterConfig { inject_status, ..config(LegacyPins::Kernel) };
            let router = IrqRouter::new(Arc::new(vm), config).unwrap();
            let status = router.set_line(Gsi(4), true).unwrap();
            assert_eq!(status, inject_status.then_some(LineStatus::Coalesced));
        }
    }

    #[test]
    fn only_lines_of_the_kernel_are_set() {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_set_gsi_routing().returning(|_| Ok(()));
        vm.expect_irq_line().withf(|gsi, _| gsi.0 == 23).once().returning(|_, _| Ok(()));
        let mut config = config(LegacyPins::Kernel);
        config.inject_status = false;
        let router = IrqRouter::new(Arc::new(vm), config).unwrap();
        for gsi in [2, 24, u32::MAX].map(Gsi) {
            assert_eq!(router.set_line(gsi, true), Err(RouterError::NoKernelLine(gsi)));
        }
        assert_eq!(router.set_line(Gsi(23), true), Ok(None));
    }
}
