//! A router made from a saved state.
//!
//! The state may come from a file or another host: whatever contradicts itself, or the VM, is refused
//! by name. The routes are one commit; then their owners, who have the eventfds, claim what is theirs.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use hv_core::{EventFd, Gsi, IrqBackend};
use thiserror::Error;

use crate::state::{Op, State};
use crate::{
    GsiError, GsiRoute, IrqRouter, LEGACY_GSIS, LegacyPins, MsiVectors, MsiVectorsState,
    RouteError, RouterConfig, RouterError, RouterState, pc_default_routes,
};

/// Why a saved state can't be restored. Nothing was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The legacy pins were elsewhere.
    #[error(
        "the saved router had its legacy pins in {}, this VM has them in {}: restore it with the irqchip it had",
        place(.saved), place(.here)
    )]
    OtherPins {
        /// Who had them.
        saved: LegacyPins,
        /// Who has them.
        here: LegacyPins,
    },
    /// A GSI can't be taken, a route can't be made, or KVM refuses them.
    #[error("the saved router can't be restored: {0}")]
    Router(#[from] RouterError),
    /// A route has a GSI that is not allocated.
    #[error("the saved state contradicts itself: GSI {0} has a route but is not allocated")]
    RouteWithoutOwner(Gsi),
    /// The legacy routes are not those of a PC.
    #[error("the saved state is not of a PC: the routes of GSIs 0 to 23 are not the default ones")]
    LegacyRoutes,
    /// A GSI is raised by an eventfd but has no route.
    #[error("the saved state contradicts itself: an eventfd raised GSI {0}, which has no route")]
    BoundWithoutRoute(Gsi),
    /// A GSI is raised by more eventfds than one.
    #[error("the saved state contradicts itself: several eventfds raised GSI {0}")]
    BoundTwice(Gsi),
    /// A GSI was not allocated, or has been claimed.
    #[error("GSI {0} can't be claimed: it was not allocated in the saved router, or has an owner")]
    NotToClaim(Gsi),
    /// A group has as many eventfds as vectors.
    #[error("the saved group has {saved} vectors, but {events} eventfds were given for it")]
    OtherVectors {
        /// Vectors of the saved group.
        saved: usize,
        /// Eventfds that were given.
        events: usize,
    },
    /// A vector needs a GSI that it does not have, or has one that it can't have.
    #[error("the saved group contradicts itself: vector {0} and its GSI do not go together")]
    VectorGsi(usize),
    /// The router's route of a GSI is not what its owner has.
    #[error("the saved states contradict each other: GSI {0} leads elsewhere in the router")]
    OtherRoute(Gsi),
    /// A register of the I/O APIC can't have this value.
    #[error("the saved I/O APIC is not one: {register} can't be {value:#x}")]
    Ioapic {
        /// Which.
        register: &'static str,
        /// Its value.
        value: u64,
    },
    /// Nobody claimed a GSI.
    #[error("GSI {0} was saved, but no device claimed it")]
    Unclaimed(Gsi),
    /// An eventfd raises a GSI that none raised, or the other way round.
    #[error(
        "GSI {0} is raised by more or fewer eventfds than when it was saved: a device was restored differently"
    )]
    OtherBinding(Gsi),
}

fn place(pins: &LegacyPins) -> &'static str {
    match pins {
        LegacyPins::Kernel => "the kernel",
        LegacyPins::Userspace => "user space",
    }
}

impl From<GsiError> for RestoreError {
    fn from(error: GsiError) -> Self {
        RouterError::Gsi(error).into()
    }
}

/// A router whose routes are restored, and whose owners are not yet; see [`IrqRouter::restore`].
///
/// Dropping it removes what nobody has claimed.
pub struct Restored<V: IrqBackend> {
    router: IrqRouter<V>,
    unclaimed: BTreeSet<Gsi>,
    bound: Vec<Gsi>,
}

impl<V: IrqBackend> IrqRouter<V> {
    /// A router with the GSIs and routes of `saved`, on a VM that has its irqchip; the routes are
    /// committed with one ioctl. Then each device takes what is its own from the result.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use hv_core::{EventFd, mock::MockVm};
    /// # use hv_irq::{IrqRouter, LegacyPins, MsiVectors, RouterConfig};
    /// # fn events(n: usize) -> Vec<EventFd> {
    /// #     let file = || std::fs::File::open("/dev/null").unwrap();
    /// #     (0..n).map(|_| EventFd::from(std::os::fd::OwnedFd::from(file()))).collect()
    /// # }
    /// # fn vm() -> Arc<MockVm> {
    /// #     let mut vm = MockVm::new();
    /// #     vm.expect_drop().return_const(());
    /// #     vm.expect_set_gsi_routing().returning(|_| Ok(()));
    /// #     Arc::new(vm)
    /// # }
    /// # let config = RouterConfig::new(4096, LegacyPins::Kernel);
    /// # let router = IrqRouter::new(vm(), config)?;
    /// # let vectors = MsiVectors::new(&router, events(4));
    /// let (saved, device) = (router.save(), vectors.save()?);
    ///
    /// let mut restored = IrqRouter::restore(vm(), config, &saved)?;
    /// let vectors = restored.vectors(&device, events(4))?;
    /// let router = restored.finish()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// The state contradicts itself or the VM, or KVM refuses its routes.
    pub fn restore(
        vm: Arc<V>,
        config: RouterConfig,
        saved: &RouterState,
    ) -> Result<Restored<V>, RestoreError> {
        let mut state = State::empty(&config)?;
        check(saved, &config, &mut state)?;
        let routes: Vec<Op> = saved.routes.iter().copied().map(Op::Add).collect();
        state.commit(&*vm, &routes)?;
        let unclaimed = saved.allocated.iter().copied().collect();
        let mut bound = saved.bound.clone();
        bound.sort_unstable();
        Ok(Restored { router: Self::with(vm, config, state), unclaimed, bound })
    }
}

/// Whether a state is one, as far as inserting its routes will not tell; takes its GSIs.
fn check(
    saved: &RouterState,
    config: &RouterConfig,
    state: &mut State,
) -> Result<(), RestoreError> {
    if saved.pins != config.pins {
        return Err(RestoreError::OtherPins { saved: saved.pins, here: config.pins });
    }
    for &gsi in &saved.allocated {
        state.gsis.allocate_at(gsi)?;
    }
    if state.is_over_full() {
        let full = RouteError::TableFull { limit: state.gsis.count() };
        return Err(RouterError::Route(full).into());
    }
    let legacy = |gsi: Gsi| LEGACY_GSIS.contains(&gsi.0);
    if let Some(stray) =
        saved.routes.iter().find(|r| !legacy(r.gsi) && !state.gsis.is_allocated(r.gsi))
    {
        return Err(RestoreError::RouteWithoutOwner(stray.gsi));
    }
    if config.pins == LegacyPins::Kernel {
        let found: BTreeSet<_> = saved.routes.iter().filter(|r| legacy(r.gsi)).collect();
        if found != pc_default_routes().collect::<Vec<_>>().iter().collect() {
            return Err(RestoreError::LegacyRoutes);
        }
    }
    let routed: BTreeSet<Gsi> = saved.routes.iter().map(|route| route.gsi).collect();
    let mut seen = BTreeSet::new();
    for &gsi in &saved.bound {
        if !routed.contains(&gsi) {
            return Err(RestoreError::BoundWithoutRoute(gsi));
        }
        if !seen.insert(gsi) && !legacy(gsi) {
            return Err(RestoreError::BoundTwice(gsi));
        }
    }
    Ok(())
}

impl<V: IrqBackend> Restored<V> {
    /// The router, for what devices bind to the legacy pins.
    #[must_use]
    pub fn router(&self) -> &IrqRouter<V> {
        &self.router
    }

    /// Makes the caller the owner of a GSI and its route. What raised it has to be bound again.
    ///
    /// # Errors
    /// The GSI was not saved, or has an owner already.
    pub fn route(&mut self, gsi: Gsi) -> Result<GsiRoute<V>, RestoreError> {
        if !self.unclaimed.remove(&gsi) {
            return Err(RestoreError::NotToClaim(gsi));
        }
        Ok(GsiRoute::of(gsi, &self.router.shared))
    }

    /// Restores a group of vectors with new eventfds: no route is written, and only what is not held
    /// back is bound. Events that waited when it was saved wait again.
    ///
    /// # Errors
    /// The group contradicts itself or the router; or KVM refuses an irqfd. Nothing is claimed then.
    pub fn vectors(
        &mut self,
        saved: &MsiVectorsState,
        events: impl IntoIterator<Item = EventFd>,
    ) -> Result<MsiVectors<V>, RestoreError> {
        let events: Vec<EventFd> = events.into_iter().collect();
        let group = MsiVectors::restore(&self.router, saved, events, &self.unclaimed)?;
        for gsi in saved.vectors.iter().filter_map(|vector| vector.gsi) {
            self.unclaimed.remove(&gsi);
        }
        Ok(group)
    }

    /// The router, once every GSI has its owner and every eventfd is bound again.
    ///
    /// # Errors
    /// A device is missing, or was restored differently. What nobody has claimed is removed.
    pub fn finish(self) -> Result<IrqRouter<V>, RestoreError> {
        if let Some(&gsi) = self.unclaimed.first() {
            return Err(RestoreError::Unclaimed(gsi));
        }
        let now = self.router.save().bound;
        let pairs = (0..now.len().max(self.bound.len())).map(|i| (self.bound.get(i), now.get(i)));
        let mut differing = pairs.filter(|(saved, now)| saved != now);
        // Both ascend: the lower of the two is the one that the other lacks.
        let lacking = differing.next().and_then(|(saved, now)| saved.into_iter().chain(now).min());
        match lacking {
            Some(&gsi) => Err(RestoreError::OtherBinding(gsi)),
            None => Ok(self.router.clone()),
        }
    }
}

impl<V: IrqBackend> fmt::Debug for Restored<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { router, unclaimed, .. } = self;
        f.debug_struct("Restored").field("router", router).field("unclaimed", unclaimed).finish()
    }
}

impl<V: IrqBackend> Drop for Restored<V> {
    fn drop(&mut self) {
        let unclaimed: Vec<Gsi> = self.unclaimed.iter().copied().collect();
        let Self { router: IrqRouter { shared }, .. } = self;
        shared.state().release(&*shared.vm(), &unclaimed);
    }
}
