//! A batch: the only way to change routes and irqfds.
//!
//! A batch only collects. It holds no lock, so handles can be made and dropped while it is open; KVM
//! hears of it when the router commits it, all at once.

use std::fmt;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, Gsi, IrqBackend, Irqfd, Msi, RouteTarget};

use crate::RouterError;
use crate::router::Shared;
use crate::state::Op;

/// An interrupt that a device owns: a GSI, where it leads, and maybe the eventfd that raises it.
///
/// Dropping it unbinds the eventfd, removes the route and frees the GSI. If KVM refuses, the router
/// keeps the GSI and tries again with its next commit. To remove many with one ioctl use
/// [`Batch::remove`]; once the router is gone, dropping does nothing (the VM is going, too). The vectors
/// of a device are easier to have as [`crate::MsiVectors`].
pub struct GsiRoute<V: IrqBackend> {
    owned: Arc<OwnedGsi<V>>,
}

impl<V: IrqBackend> GsiRoute<V> {
    /// The owner of an allocated GSI.
    pub(crate) fn of(gsi: Gsi, router: &Arc<Shared<V>>) -> Self {
        Self { owned: Arc::new(OwnedGsi { gsi, router: Arc::downgrade(router) }) }
    }

    /// Its GSI.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.owned.gsi
    }
}

impl<V: IrqBackend> fmt::Debug for GsiRoute<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GsiRoute({})", self.owned.gsi)
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
            router.state().release(&*router.vm(), &[self.gsi]);
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
    /// Those of [`Batch::add`].
    pub fn add_msi(&mut self, msi: Msi) -> Result<GsiRoute<V>, RouterError> {
        self.add(RouteTarget::Msi(msi))
    }

    /// Takes the lowest free GSI, at once, and routes it to `target`.
    ///
    /// # Errors
    /// No GSI or no table entry is free; the batch is unchanged. When the batch is committed: KVM would
    /// refuse the target.
    pub fn add(&mut self, target: RouteTarget) -> Result<GsiRoute<V>, RouterError> {
        let gsi = self.router.state().allocate(&*self.router.vm())?;
        let route = GsiRoute::of(gsi, self.router);
        self.set(&route, target)?;
        Ok(route)
    }

    /// Routes the GSI of `route` to `msi` instead. A bound eventfd stays bound.
    ///
    /// # Errors
    /// The route belongs to another router.
    pub fn set_msi(&mut self, route: &GsiRoute<V>, msi: Msi) -> Result<(), RouterError> {
        self.set(route, RouteTarget::Msi(msi))
    }

    /// Routes the GSI of `route` to `target` instead. A bound eventfd stays bound.
    ///
    /// # Errors
    /// The route belongs to another router. When the batch is committed: KVM would refuse the target.
    pub fn set(&mut self, route: &GsiRoute<V>, target: RouteTarget) -> Result<(), RouterError> {
        self.name(&route.owned, [Op::Set(route.gsi(), target)])
    }

    /// Lets an eventfd raise the interrupt. One that is signalled already raises it at once, which
    /// is how an event that came while the route was unbound (masked) is delivered.
    ///
    /// # Errors
    /// The route belongs to another router. When the batch is committed: the eventfd is bound
    /// already, or the route is to another one.
    pub fn bind(&mut self, route: &GsiRoute<V>, event: EventFd) -> Result<(), RouterError> {
        let irqfd = Irqfd { event, gsi: route.gsi(), resample: None };
        self.name(&route.owned, [Op::Bind(irqfd)])
    }

    /// Unbinds the eventfd of `route`, if it has one, and keeps the route: how to mask. Events are
    /// kept in the eventfd meanwhile.
    ///
    /// # Errors
    /// The route belongs to another router.
    pub fn unbind(&mut self, route: &GsiRoute<V>) -> Result<(), RouterError> {
        self.name(&route.owned, [Op::Unbind(route.gsi())])
    }

    /// Removes a route as dropping it does, but together with everything else in the batch.
    ///
    /// # Errors
    /// The route belongs to another router; it is dropped.
    pub fn remove(&mut self, route: GsiRoute<V>) -> Result<(), RouterError> {
        let gsi = route.gsi();
        self.name(&route.owned, [Op::Unbind(gsi), Op::Clear(gsi)])
    }

    /// A change to a legacy GSI, which nobody owns.
    pub(crate) fn stage(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// Tells KVM. The routes named so far are released afterwards, if their handles are gone.
    pub(crate) fn commit(self) -> Result<(), RouterError> {
        self.router.state().commit(&*self.router.vm(), &self.ops)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Told, event, is_closed, msi, router, taken, watched, willing};
    use crate::{GsiError, IrqRouter, LegacyPins, RouteError, RouterConfig};
    use hv_core::mock::MockVm;
    use hv_core::{Errno, Error, Ioctl};
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    fn add(router: &IrqRouter<MockVm>, n: u32) -> Vec<GsiRoute<MockVm>> {
        router.batch(|batch| (0..n).map(|i| batch.add_msi(msi(i))).collect()).unwrap()
    }

    #[test]
    fn any_number_of_changes_is_one_ioctl_and_none_is_none() {
        let (router, log) = willing();
        for n in [1, 8, 256, 2048] {
            let routes = add(&router, n);
            assert_eq!(taken(&log), [Told::Table(38 + n as usize)]);
            router
                .batch(|batch| routes.iter().try_for_each(|route| batch.set_msi(route, msi(9999))))
                .unwrap();
            assert_eq!(taken(&log).len(), 1);
            router
                .batch(|batch| routes.iter().try_for_each(|route| batch.set_msi(route, msi(9999))))
                .unwrap();
            router.batch(|_| Ok(())).unwrap();
            assert_eq!(taken(&log), [], "nothing changed");
            router
                .batch(|batch| routes.into_iter().try_for_each(|route| batch.remove(route)))
                .unwrap();
            assert_eq!(taken(&log), [Told::Table(38)]);
            assert!(router.allocated().is_empty());
        }
    }

    #[test]
    fn what_cancels_out_is_no_change() {
        let (router, log) = willing();
        let [route]: [_; 1] = add(&router, 1).try_into().unwrap();
        let event = event();
        router.batch(|batch| batch.bind(&route, event.clone())).unwrap();
        taken(&log);
        router
            .batch(|batch| {
                batch.unbind(&route)?;
                batch.set_msi(&route, msi(7))?;
                batch.set_msi(&route, msi(0))?;
                batch.bind(&route, event.clone())?;
                let short_lived = batch.add_msi(msi(1))?;
                batch.remove(short_lived)
            })
            .unwrap();
        assert_eq!(taken(&log), []);
        assert_eq!(router.allocated(), [route.gsi()]);
    }

    #[test]
    fn irqfds_are_unbound_before_the_table_and_bound_after_it() {
        let (router, log) = willing();
        let mut routes = add(&router, 3);
        router.batch(|batch| batch.bind(&routes[0], event())).unwrap();
        assert_eq!(taken(&log)[1..], [Told::Assign(Gsi(24))], "the table is the same");
        router
            .batch(|batch| {
                batch.bind(&routes[1], event())?;
                batch.set_msi(&routes[1], msi(0x99))?;
                batch.unbind(&routes[0])
            })
            .unwrap();
        assert_eq!(taken(&log), [Told::Deassign(Gsi(24)), Told::Table(41), Told::Assign(Gsi(25))]);
        drop(routes.remove(1));
        assert_eq!(taken(&log), [Told::Deassign(Gsi(25)), Told::Table(40)]);
    }

    #[test]
    fn an_eventfd_raises_one_gsi_and_a_route_has_one_eventfd() {
        let (router, log) = willing();
        let routes = add(&router, 2);
        let event = event();
        router.batch(|batch| batch.bind(&routes[0], event.clone())).unwrap();
        taken(&log);
        let fd = event.as_raw_fd();
        let twice = router.batch(|batch| batch.bind(&routes[1], event.clone()));
        assert_eq!(twice, Err(RouterError::EventInUse { fd, gsi: Gsi(24) }));
        let second = router.batch(|batch| batch.bind(&routes[0], self::event()));
        assert_eq!(second, Err(RouterError::RouteBound { gsi: Gsi(24), fd }));
        assert_eq!(taken(&log), [], "KVM was not asked");
        router
            .batch(|batch| {
                batch.unbind(&routes[0])?;
                batch.bind(&routes[1], event.clone())
            })
            .unwrap();
        assert_eq!(taken(&log), [Told::Deassign(Gsi(24)), Told::Assign(Gsi(25))]);
    }

    #[test]
    fn a_refused_table_is_rolled_back_exactly() {
        let full = Told::Table(41);
        let (router, log) = router(4096, move |told| (told == full).then_some(Errno::ENOMEM));
        let routes = add(&router, 2);
        router.batch(|batch| batch.bind(&routes[0], event())).unwrap();
        taken(&log);
        let (table, irqfds) = (router.routes(), router.irqfds());
        let error = router
            .batch(|batch| {
                batch.unbind(&routes[0])?;
                batch.bind(&routes[1], event())?;
                batch.add_msi(msi(5))
            })
            .unwrap_err();
        assert_eq!(error, RouterError::Kvm(Error::new(Ioctl::SetGsiRouting, Errno::ENOMEM)));
        assert_eq!(taken(&log), [Told::Deassign(Gsi(24)), full, Told::Assign(Gsi(24))]);
        assert_eq!((router.routes(), router.irqfds()), (table, irqfds));
        assert_eq!(router.allocated(), [Gsi(24), Gsi(25)], "that of the new route is free again");
        router.batch(|batch| batch.set_msi(&routes[1], msi(6))).unwrap();
        assert_eq!(taken(&log), [Told::Table(40)], "the next good batch works");
    }

    #[test]
    fn a_refused_irqfd_takes_the_table_back_with_it() {
        let refused = Told::Assign(Gsi(26));
        let (router, log) = router(4096, move |told| (told == refused).then_some(Errno::EBUSY));
        let routes = add(&router, 2);
        taken(&log);
        let before = router.routes();
        let error = router
            .batch(|batch| {
                let new = batch.add_msi(msi(5))?;
                batch.bind(&routes[0], event())?;
                batch.bind(&new, event())?;
                Ok(new)
            })
            .unwrap_err();
        assert_eq!(error, RouterError::Kvm(Error::new(Ioctl::Irqfd, Errno::EBUSY)));
        assert_eq!(
            taken(&log),
            [
                Told::Table(41),
                Told::Assign(Gsi(24)),
                refused,
                Told::Deassign(Gsi(24)),
                Told::Table(40)
            ]
        );
        assert_eq!(router.routes(), before);
        assert!(router.irqfds().is_empty());
    }

    #[test]
    fn nothing_is_bound_without_a_route_even_if_undoing_fails() {
        // What was bound can't be unbound again: its route stays.
        let (stuck, log) = router(4096, |told| {
            let refused = matches!(told, Told::Assign(Gsi(25)) | Told::Deassign(_));
            refused.then_some(Errno::ENOMEM)
        });
        let routes = Mutex::new(Vec::new());
        let done = stuck.batch(|batch| {
            for _ in 0..2 {
                let route = batch.add_msi(msi(1))?;
                batch.bind(&route, event())?;
                routes.lock().unwrap().push(route);
            }
            Ok(())
        });
        assert!(matches!(done, Err(RouterError::RollbackFailed { .. })));
        assert_eq!(taken(&log).last(), Some(&Told::Table(39)));
        assert_eq!(stuck.irqfds()[0].gsi, Gsi(24));
        assert_eq!(stuck.routes().last().map(|route| route.gsi), Some(Gsi(24)));

        // The table can't be put back: what lost its route is not bound again.
        let tables = Arc::new(Mutex::new(0));
        let (gone, log) = router(4096, move |told| {
            let mut tables = tables.lock().unwrap();
            *tables += i32::from(matches!(told, Told::Table(_)));
            (told == Told::Assign(Gsi(25)) || *tables > 3).then_some(Errno::ENOMEM)
        });
        let [bound]: [_; 1] = add(&gone, 1).try_into().unwrap();
        gone.batch(|batch| batch.bind(&bound, event())).unwrap();
        taken(&log);
        let done = gone.batch(|batch| {
            batch.remove(bound)?;
            let route = batch.add_msi(msi(2))?;
            batch.bind(&route, event())
        });
        assert!(matches!(done, Err(RouterError::RollbackFailed { .. })));
        assert!(gone.irqfds().is_empty() && !taken(&log).contains(&Told::Assign(Gsi(24))));
    }

    #[test]
    fn a_route_that_kvm_keeps_is_removed_by_the_next_commit() {
        let refusals = Arc::new(Mutex::new(1));
        let (router, log) = router(4096, move |told| {
            let mut left = refusals.lock().unwrap();
            let refuse = matches!(told, Told::Deassign(_)) && *left > 0;
            *left -= i32::from(refuse);
            refuse.then_some(Errno::ENOMEM)
        });
        let mut routes = add(&router, 2);
        let (event, watch) = watched();
        router.batch(|batch| batch.bind(&routes[0], event)).unwrap();
        taken(&log);
        drop(routes.remove(0));
        assert_eq!(taken(&log), [Told::Deassign(Gsi(24))]);
        assert_eq!(router.allocated(), [Gsi(24), Gsi(25)], "not given to anybody meanwhile");
        assert!(!is_closed(&watch), "kept open");
        router.batch(|batch| batch.set_msi(&routes[0], msi(5))).unwrap();
        assert_eq!(taken(&log), [Told::Deassign(Gsi(24)), Told::Table(39)]);
        assert_eq!(router.allocated(), [Gsi(25)]);
        assert!(is_closed(&watch));
    }

    #[test]
    fn both_limits_are_met_when_a_route_is_asked_for() {
        // As many GSIs as entries: the 38 legacy entries on 23 GSIs fill the table first.
        let (router, log) = router(64, |_| None);
        let routes = add(&router, 64 - 38);
        taken(&log);
        let error = router.batch(|batch| batch.add_msi(msi(1))).unwrap_err();
        assert_eq!(error, RouterError::Route(RouteError::TableFull { limit: 64 }));
        assert_eq!(taken(&log), []);
        drop(routes);
        assert!(router.allocated().is_empty());

        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        let pins = LegacyPins::Userspace;
        let config = RouterConfig::new(24, pins);
        let split = IrqRouter::new(Arc::new(vm), config).unwrap();
        let error = split.batch(|batch| batch.add_msi(msi(1))).unwrap_err();
        assert_eq!(error, RouterError::Route(RouteError::TableFull { limit: 24 }));
        assert_ne!(error, RouterError::Gsi(GsiError::Exhausted { count: 24 }));
    }

    #[test]
    fn handles_may_go_while_a_batch_is_open() {
        let (router, log) = willing();
        let mut routes = add(&router, 3);
        taken(&log);
        router
            .batch(|batch| {
                let named = routes.remove(0);
                batch.set_msi(&named, msi(7))?;
                drop(named); // stays its GSI's owner until the batch is through
                drop(routes.remove(0)); // goes at once
                Ok(())
            })
            .unwrap();
        assert_eq!(taken(&log), [Told::Table(40), Told::Table(40), Told::Table(39)]);
        assert_eq!(router.allocated(), [Gsi(26)]);
    }

    #[test]
    fn nothing_is_undone_for_a_vm_that_goes_anyway() {
        let (router, log) = willing();
        let routes = add(&router, 100);
        taken(&log);
        drop(router);
        drop(routes);
        assert_eq!(taken(&log), []);
    }

    #[test]
    fn a_route_is_of_its_own_router() {
        let (router, _) = willing();
        let (other, log) = willing();
        let routes = add(&other, 1);
        taken(&log);
        let error = router.batch(|batch| batch.set_msi(&routes[0], msi(5))).unwrap_err();
        assert_eq!(error, RouterError::ForeignRoute(Gsi(24)));
        assert_eq!(taken(&log), []);
    }

    #[test]
    fn a_handle_kept_from_a_failed_batch_can_not_be_bound_before_it_is_routed() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let refusing = Arc::new(AtomicBool::new(true));
        let refuse = refusing.clone();
        let (router, log) = router(4096, move |told| match told {
            Told::Table(n) if n > 38 && refuse.load(Ordering::Relaxed) => Some(Errno::ENOMEM),
            _ => None,
        });
        let mut kept = Vec::new();
        let failed = router.batch(|batch| {
            kept.push(batch.add_msi(msi(0x40))?);
            Ok(())
        });
        assert!(matches!(failed, Err(RouterError::Kvm(_))));
        let route = &kept[0];
        taken(&log);
        let error = router.batch(|batch| batch.bind(route, event())).unwrap_err();
        assert_eq!(error, RouterError::NotRouted(route.gsi()));
        assert_eq!(taken(&log), [], "KVM would lose its events");
        refusing.store(false, Ordering::Relaxed);
        router
            .batch(|batch| {
                batch.set_msi(route, msi(0x40))?;
                batch.bind(route, event())
            })
            .unwrap();
        assert_eq!(taken(&log), [Told::Table(39), Told::Assign(route.gsi())]);
    }
}
