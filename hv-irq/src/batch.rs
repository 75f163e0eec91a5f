//! A batch: the only way to change routes and irqfds.
//!
//! A batch only collects. It holds no lock, so handles can be made and dropped while it is open; KVM
//! hears of it when the router commits it, all at once.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use hv_core::{Gsi, IrqBackend, Msi, RouteTarget};

use crate::RouterError;
use crate::router::Shared;
use crate::state::Op;

/// A message-signalled interrupt that a device owns: a GSI, its route, and maybe the eventfd that
/// raises it.
///
/// Dropping it unbinds the eventfd, removes the route and frees the GSI. If KVM refuses, the router
/// keeps the GSI and tries again with its next commit. To remove many with one ioctl use
/// [`Batch::remove`]; once the router is gone, dropping does nothing (the VM is going, too).
pub struct MsiRoute<V: IrqBackend> {
    owned: Arc<OwnedGsi<V>>,
}

impl<V: IrqBackend> MsiRoute<V> {
    /// Its GSI.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.owned.gsi
    }
}

impl<V: IrqBackend> fmt::Debug for MsiRoute<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MsiRoute({})", self.owned.gsi)
    }
}

/// The owner of a GSI. A batch that names it shares it, so that the GSI can't be given to someone
/// else before the batch is through.
struct OwnedGsi<V: IrqBackend> {
    gsi: Gsi,
    router: Weak<Shared<V>>,
}

impl<V: IrqBackend> Drop for OwnedGsi<V> {
    fn drop(&mut self) {
        if let Some(router) = self.router.upgrade() {
            router.state().release(&*router.vm, self.gsi);
        }
    }
}

/// Changes to routes and irqfds that are made together; see [`crate::IrqRouter::batch`].
///
/// A later change to the same route replaces an earlier one.
pub struct Batch<'a, V: IrqBackend> {
    router: &'a Arc<Shared<V>>,
    ops: Vec<Op>,
    named: Vec<Arc<OwnedGsi<V>>>,
}

impl<'a, V: IrqBackend> Batch<'a, V> {
    pub(crate) fn new(router: &'a Arc<Shared<V>>) -> Self {
        Self { router, ops: Vec::new(), named: Vec::new() }
    }

    /// Takes the lowest free GSI, at once, and routes it to `msi`.
    ///
    /// # Errors
    /// No GSI or no table entry is free; the batch is unchanged.
    pub fn add_msi(&mut self, msi: Msi) -> Result<MsiRoute<V>, RouterError> {
        let gsi = self.router.state().allocate()?;
        let owned = Arc::new(OwnedGsi { gsi, router: Arc::downgrade(self.router) });
        self.name(&owned, [Op::Set(gsi, RouteTarget::Msi(msi))])?;
        Ok(MsiRoute { owned })
    }

    /// Routes the GSI of `route` to `msi` instead. A bound eventfd stays bound.
    ///
    /// # Errors
    /// The route belongs to another router.
    pub fn set_msi(&mut self, route: &MsiRoute<V>, msi: Msi) -> Result<(), RouterError> {
        self.name(&route.owned, [Op::Set(route.gsi(), RouteTarget::Msi(msi))])
    }

    /// Lets an eventfd raise the interrupt. One that is signalled already raises it at once, which
    /// is how an event that came while the route was unbound (masked) is delivered.
    ///
    /// # Errors
    /// The route belongs to another router. When the batch is committed: the eventfd is bound
    /// already, or the route is to another one.
    pub fn bind(&mut self, route: &MsiRoute<V>, event: Arc<OwnedFd>) -> Result<(), RouterError> {
        self.name(&route.owned, [Op::Bind(route.gsi(), event)])
    }

    /// Unbinds the eventfd of `route`, if it has one, and keeps the route: how to mask. Events are
    /// kept in the eventfd meanwhile.
    ///
    /// # Errors
    /// The route belongs to another router.
    pub fn unbind(&mut self, route: &MsiRoute<V>) -> Result<(), RouterError> {
        self.name(&route.owned, [Op::Unbind(route.gsi())])
    }

    /// Removes a route as dropping it does, but together with everything else in the batch.
    ///
    /// # Errors
    /// The route belongs to another router; it is dropped.
    pub fn remove(&mut self, route: MsiRoute<V>) -> Result<(), RouterError> {
        let gsi = route.gsi();
        self.name(&route.owned, [Op::Unbind(gsi), Op::Clear(gsi)])
    }

    /// Routes the GSI of a legacy pin that is in user space.
    pub(crate) fn set_legacy(&mut self, pin: u32, msi: Msi) {
        self.ops.push(Op::Set(Gsi(pin), RouteTarget::Msi(msi)));
    }

    /// Tells KVM. The routes named so far are released afterwards, if their handles are gone.
    pub(crate) fn commit(self) -> Result<(), RouterError> {
        self.router.state().commit(&*self.router.vm, &self.ops)
    }

    fn name<const N: usize>(
        &mut self,
        owned: &Arc<OwnedGsi<V>>,
        ops: [Op; N],
    ) -> Result<(), RouterError> {
        if !std::ptr::eq(owned.router.as_ptr(), Arc::as_ptr(self.router)) {
            return Err(RouterError::ForeignRoute(owned.gsi));
        }
        self.ops.extend(ops);
        self.named.push(Arc::clone(owned));
        Ok(())
    }
}

impl<V: IrqBackend> fmt::Debug for Batch<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("ops", &self.ops).finish_non_exhaustive()
    }
}
