//! The router of a VM: owns its GSIs, its routing table and its irqfds.
//!
//! Lock order: there is one lock, around the state, and it is held across the ioctls of a commit so
//! that commits of several threads do not mix. No caller's code runs under it. The user-space I/O
//! APIC has a lock of its own, which is taken before this one.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv_core::{Error, Gsi, IrqBackend, LineStatus, Msi, MsiStatus, Route};

use crate::state::{Op, State};
use crate::{Batch, GsiBitmap, LEGACY_GSIS, RouterError, RoutingTable, pc_default_routes};

/// Who has the pins of the legacy interrupt controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LegacyPins {
    /// The kernel (`KVM_CREATE_IRQCHIP`): GSIs 0 to 23 lead to its PICs and its I/O APIC.
    Kernel,
    /// User space (`KVM_CAP_SPLIT_IRQCHIP` with 24 pins): GSIs 0 to 23 are kept for the
    /// messages of the pins of its I/O APIC.
    Userspace,
}

/// What a router has to know of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterConfig {
    /// The value of `KVM_CAP_IRQ_ROUTING`: how many GSIs there are, and entries in the table.
    pub gsi_count: u32,
    /// Who has the legacy pins.
    pub pins: LegacyPins,
    /// Whether KVM says what became of a line that was set (`KVM_CAP_IRQ_INJECT_STATUS`).
    pub inject_status: bool,
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
/// let config =
///     RouterConfig { gsi_count: 4096, pins: LegacyPins::Kernel, inject_status: true };
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
    pub(crate) vm: Arc<V>,
    config: RouterConfig,
    state: Mutex<State>,
}

impl<V> Shared<V> {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Every change ends with state and kernel in agreement, or rolls back; a panic in a backend
        // is the only way to poison this, and does not make later calls worse than they are.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V: IrqBackend> IrqRouter<V> {
    /// The router of a VM that has its irqchip. If the kernel has the legacy pins their 38 default
    /// routes are committed with one ioctl.
    ///
    /// # Errors
    /// Fewer GSIs than the legacy interrupts need, or KVM refuses the default routes.
    pub fn new(vm: Arc<V>, config: RouterConfig) -> Result<Self, RouterError> {
        let count = config.gsi_count;
        let kernel = config.pins == LegacyPins::Kernel;
        let defaults: Vec<Op> = match config.pins {
            LegacyPins::Kernel => pc_default_routes().map(Op::Add).collect(),
            LegacyPins::Userspace => Vec::new(),
        };
        let needed = LEGACY_GSIS.end.max(defaults.len() as u32);
        if count < needed {
            return Err(RouterError::TooFewGsis { count, needed });
        }
        let mut gsis = GsiBitmap::new(count);
        gsis.reserve(LEGACY_GSIS)?;
        let mut state = State::new(gsis, RoutingTable::new(count, count, kernel), needed);
        state.commit(&*vm, &defaults)?;
        Ok(Self { shared: Arc::new(Shared { vm, config, state: Mutex::new(state) }) })
    }

    /// Changes routes and irqfds together: whatever `change` asks for is done in one commit if it
    /// returns `Ok`, and not at all otherwise.
    ///
    /// A batch that changes nothing calls no ioctl. Any other unbinds irqfds, writes the table once if
    /// it differs, and binds irqfds. Handles from a batch that failed are dropped, which frees their
    /// GSIs.
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

    /// Sends a message without a route (`KVM_SIGNAL_MSI`).
    ///
    /// # Errors
    /// Those of the ioctl.
    pub fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error> {
        self.shared.vm.signal_msi(msi)
    }

    /// Sets a line of the kernel's interrupt controllers, and says what became of it if KVM does
    /// (`KVM_IRQ_LINE_STATUS`, else `KVM_IRQ_LINE`).
    ///
    /// # Errors
    /// The pins are in user space, or the ioctl failed.
    pub fn set_line(&self, gsi: Gsi, level: bool) -> Result<Option<LineStatus>, RouterError> {
        let Shared { vm, config, .. } = &*self.shared;
        if config.pins == LegacyPins::Userspace {
            return Err(RouterError::NoKernelLine(gsi));
        }
        Ok(if config.inject_status {
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
        self.shared.state().irqfds.iter().map(|binding| binding.irqfd()).collect()
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
