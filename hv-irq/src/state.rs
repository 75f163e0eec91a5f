//! What a router knows, and the one place that makes KVM agree with it.
//!
//! A batch changes this state first, with a record of what was there before; then KVM is told, and if
//! it refuses, both go back. Outside of [`State::commit`] state and kernel agree. Nothing else in
//! the crate calls a mutating ioctl.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, RawFd};

use hv_core::{Error, Gsi, IrqBackend, Irqfd, Msi, Route, RouteTarget};

use crate::dynamic::DynamicMsis;
use crate::ledger::Ledger;
use crate::table::Targets;
use crate::{
    GsiBitmap, LEGACY_GSIS, LegacyPins, RouteError, RouterConfig, RouterError, RoutingTable,
    pc_default_routes,
};

/// One change of a batch.
#[derive(Debug)]
pub(crate) enum Op {
    /// Replaces all a GSI leads to.
    Set(Gsi, RouteTarget),
    /// Adds to what a GSI leads to.
    Add(Route),
    /// Removes all a GSI leads to.
    Clear(Gsi),
    /// Binds an eventfd to a GSI; only a legacy one may have several.
    Bind(Irqfd),
    /// The same, unless it is bound that way: what could not be undone may still be.
    Keep(Irqfd),
    /// Unbinds all eventfds of a GSI.
    Unbind(Gsi),
    /// Unbinds an eventfd.
    UnbindEvent(RawFd),
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) gsis: GsiBitmap,
    pub(crate) table: RoutingTable,
    pub(crate) irqfds: Ledger,
    /// Routes made for messages without one.
    dynamic: DynamicMsis,
    /// Entries of the table that are kept for the legacy GSIs.
    legacy_entries: u32,
    /// GSIs and irqfds whose owner is gone but which KVM would not let go of. Each commit tries
    /// again.
    abandoned: BTreeSet<Gsi>,
    abandoned_irqfds: BTreeSet<RawFd>,
    /// The table for KVM. Kept, because allocating a large one takes as long as filling it.
    buffer: Vec<Route>,
}

/// What a batch changed, with what was there before, in the order of the changes.
#[derive(Debug, Default)]
struct Change {
    routes: Vec<(Gsi, Targets)>,
    irqfds: Vec<(RawFd, Option<Irqfd>)>,
}

impl Change {
    /// Keeps what was there before the first change of each route and irqfd.
    fn settle(&mut self) {
        // Stable, so that the first stays the first.
        self.routes.sort_by_key(|&(gsi, _)| gsi);
        self.routes.dedup_by_key(|&mut (gsi, _)| gsi);
        self.irqfds.sort_by_key(|&(fd, _)| fd);
        self.irqfds.dedup_by_key(|&mut (fd, _)| fd);
    }
}

impl State {
    /// That of a router without routes: the legacy GSIs are reserved, the entries they need kept.
    pub(crate) fn empty(config: &RouterConfig) -> Result<Self, RouterError> {
        let count = config.gsi_count;
        let kernel_pins = config.pins == LegacyPins::Kernel;
        let needed = if kernel_pins { pc_default_routes().count() as u32 } else { LEGACY_GSIS.end };
        if count < needed {
            return Err(RouterError::TooFewGsis { count, needed });
        }
        let mut gsis = GsiBitmap::new(count);
        gsis.reserve(LEGACY_GSIS)?;
        let table = RoutingTable::new(count, count, kernel_pins);
        Ok(Self {
            gsis,
            table: table.with_x2apic_format(config.x2apic_format),
            irqfds: Ledger::default(),
            dynamic: DynamicMsis::EMPTY,
            legacy_entries: needed,
            abandoned: BTreeSet::new(),
            abandoned_irqfds: BTreeSet::new(),
            buffer: Vec::new(),
        })
    }

    /// Whether more GSIs are taken than there are entries for.
    pub(crate) fn is_over_full(&self) -> bool {
        self.legacy_entries + self.gsis.len() > self.gsis.count()
    }

    /// GSIs that are taken though nobody owns them.
    pub(crate) fn ownerless(&self) -> impl Iterator<Item = Gsi> {
        self.dynamic.gsis().chain(self.abandoned.iter().copied())
    }

    /// GSIs that KVM would not let go of.
    pub(crate) fn abandoned(&self) -> &BTreeSet<Gsi> {
        &self.abandoned
    }

    /// KVM has none of what is abandoned any more, nor the ledger an irqfd of it.
    pub(crate) fn forget_abandoned(&mut self) {
        self.abandoned_irqfds.clear();
        for gsi in std::mem::take(&mut self.abandoned) {
            self.table.put(gsi, Targets::None);
            let freed = self.gsis.free(gsi);
            debug_assert_eq!(freed, Ok(()), "what is abandoned is allocated");
        }
    }

    /// What an eventfd is bound to, unless its owner is gone.
    pub(crate) fn owned_irqfd(&self, fd: RawFd) -> Option<Gsi> {
        let irqfd = self.irqfds.get(fd)?;
        (!self.is_abandoned(irqfd)).then_some(irqfd.gsi)
    }

    /// Whether the owner of an irqfd is gone.
    pub(crate) fn is_abandoned(&self, irqfd: &Irqfd) -> bool {
        self.abandoned_irqfds.contains(&irqfd.event.as_raw_fd())
    }

    /// Takes the lowest free GSI, and with it the table entry its route will need.
    pub(crate) fn allocate<V: IrqBackend>(&mut self, vm: &V) -> Result<Gsi, RouterError> {
        self.make_room(vm, 1)?;
        Ok(self.gsis.allocate()?)
    }

    /// Takes `n` of them, or none.
    pub(crate) fn allocate_many<V: IrqBackend>(
        &mut self,
        vm: &V,
        n: u32,
    ) -> Result<Vec<Gsi>, RouterError> {
        self.make_room(vm, n)?;
        Ok(self.gsis.allocate_many(n)?)
    }

    /// Both limits are checked here, before anything changes, so that a batch can't find the table
    /// full. Routes made for messages go if that makes the difference.
    fn make_room<V: IrqBackend>(&mut self, vm: &V, n: u32) -> Result<(), RouterError> {
        let limit = self.gsis.count();
        let room = limit.saturating_sub(self.legacy_entries + self.gsis.len());
        if n <= room {
            Ok(())
        } else if n <= room + self.dynamic.len() {
            self.flush_dynamic(vm)
        } else {
            Err(RouteError::TableFull { limit }.into())
        }
    }

    /// The route of a message that has no owner; makes one if there is none.
    pub(crate) fn dynamic_route<V: IrqBackend>(
        &mut self,
        vm: &V,
        msi: Msi,
    ) -> Result<Gsi, RouterError> {
        if let Some(gsi) = self.dynamic.get(msi) {
            return Ok(gsi);
        }
        self.table.check_message(msi)?;
        let gsi = self.allocate(vm)?;
        match self.commit(vm, &[Op::Set(gsi, RouteTarget::Msi(msi))]) {
            Ok(()) => {
                self.dynamic.insert(msi, gsi);
                Ok(gsi)
            }
            Err(error) => {
                self.release(vm, &[gsi]);
                Err(error)
            }
        }
    }

    fn flush_dynamic<V: IrqBackend>(&mut self, vm: &V) -> Result<(), RouterError> {
        let gsis: Vec<Gsi> = self.dynamic.gsis().collect();
        let clear: Vec<Op> = gsis.iter().copied().map(Op::Clear).collect();
        self.commit(vm, &clear)?;
        self.dynamic = DynamicMsis::EMPTY;
        self.release(vm, &gsis);
        Ok(())
    }

    /// Undoes all of GSIs whose owner is gone, in one commit. If KVM refuses, a later one tries again.
    pub(crate) fn release<V: IrqBackend>(&mut self, vm: &V, gsis: &[Gsi]) {
        let ops: Vec<Op> = gsis.iter().flat_map(|&gsi| [Op::Unbind(gsi), Op::Clear(gsi)]).collect();
        if self.commit(vm, &ops).is_ok() {
            for &gsi in gsis {
                let freed = self.gsis.free(gsi);
                debug_assert_eq!(freed, Ok(()), "a GSI has one owner");
            }
        } else {
            self.abandoned_irqfds.extend(gsis.iter().flat_map(|&gsi| self.irqfds.of(gsi)));
            self.abandoned.extend(gsis);
        }
    }

    /// Unbinds an eventfd whose owner is gone. If KVM refuses, a later commit tries again.
    pub(crate) fn release_irqfd<V: IrqBackend>(&mut self, vm: &V, fd: RawFd) {
        if self.commit(vm, &[Op::UnbindEvent(fd)]).is_err() {
            self.abandoned_irqfds.insert(fd);
        }
    }

    /// Applies all of `ops` or none: irqfds are unbound, the table is written if it differs, irqfds
    /// are bound, in this order.
    ///
    /// The order matters: an event that arrives while its GSI has no route is lost, one that arrives
    /// while the eventfd is unbound waits in its counter. And some kernels panic if the route of a
    /// bound irqfd leaves the table.
    pub(crate) fn commit<V: IrqBackend>(&mut self, vm: &V, ops: &[Op]) -> Result<(), RouterError> {
        let mut change = Change::default();
        let reaped = self.reap(vm, &mut change);
        for op in ops {
            if let Err(error) = self.apply(op, &mut change) {
                change.settle();
                self.undo(change);
                return Err(error);
            }
        }
        change.settle();
        self.carry_out(vm, change)?;
        for gsi in reaped {
            if self.gsis.free(gsi).is_ok() {
                self.abandoned.remove(&gsi);
            }
        }
        Ok(())
    }

    /// Tries again to unbind what is abandoned, and clears the routes of what has no irqfd left.
    fn reap<V: IrqBackend>(&mut self, vm: &V, change: &mut Change) -> Vec<Gsi> {
        for fd in std::mem::take(&mut self.abandoned_irqfds) {
            let Some(irqfd) = self.irqfds.get(fd) else { continue };
            match vm.irqfd_deassign(&irqfd.event, irqfd.gsi) {
                Ok(()) => drop(self.irqfds.remove(fd)),
                Err(_) => drop(self.abandoned_irqfds.insert(fd)),
            }
        }
        let mut reaped = Vec::new();
        for &gsi in &self.abandoned {
            if self.irqfds.of(gsi).next().is_none() {
                let before = self.table.put(gsi, Targets::None);
                change.routes.push((gsi, before));
                reaped.push(gsi);
            }
        }
        reaped
    }

    fn apply(&mut self, op: &Op, change: &mut Change) -> Result<(), RouterError> {
        match op {
            Op::Set(gsi, target) => {
                let before = self.table.get(*gsi);
                self.table.replace(Route { gsi: *gsi, target: *target })?;
                change.routes.push((*gsi, before));
            }
            Op::Add(route) => {
                let before = self.table.get(route.gsi);
                self.table.insert(*route)?;
                change.routes.push((route.gsi, before));
            }
            Op::Clear(gsi) => {
                let before = self.table.put(*gsi, Targets::None);
                change.routes.push((*gsi, before));
            }
            Op::Keep(irqfd) if self.irqfds.get(irqfd.event.as_raw_fd()) == Some(irqfd) => {}
            Op::Bind(irqfd) | Op::Keep(irqfd) => {
                let (gsi, fd) = (irqfd.gsi, irqfd.event.as_raw_fd());
                // KVM would take it, and lose every event.
                if self.table.get(gsi) == Targets::None {
                    return Err(RouterError::NotRouted(gsi));
                }
                if let Some(bound) = self.irqfds.get(fd) {
                    return Err(RouterError::EventInUse { fd, gsi: bound.gsi });
                }
                if let Some(fd) = self.irqfds.of(gsi).next()
                    && !self.gsis.is_reserved(gsi)
                {
                    return Err(RouterError::RouteBound { gsi, fd });
                }
                let before = self.irqfds.insert(irqfd.clone());
                change.irqfds.push((fd, before));
            }
            Op::Unbind(gsi) => {
                let fds: Vec<RawFd> = self.irqfds.of(*gsi).collect();
                for fd in fds {
                    self.unbind(fd, change);
                }
            }
            Op::UnbindEvent(fd) => self.unbind(*fd, change),
        }
        Ok(())
    }

    fn unbind(&mut self, fd: RawFd, change: &mut Change) {
        let before = self.irqfds.remove(fd);
        change.irqfds.push((fd, before));
    }

    /// Puts back what `change` replaced; returns the routes that were there instead.
    fn undo(&mut self, change: Change) -> Vec<(Gsi, Targets)> {
        for (fd, before) in change.irqfds {
            self.irqfds.restore(fd, before);
        }
        let routes = change.routes.into_iter();
        routes.map(|(gsi, before)| (gsi, self.table.put(gsi, before))).collect()
    }

    /// Makes KVM agree with the state after `change`, or the state with KVM as it was before.
    fn carry_out<V: IrqBackend>(&mut self, vm: &V, change: Change) -> Result<(), RouterError> {
        let (unbind, bind) = self.irqfd_difference(&change);
        let table_differs =
            change.routes.iter().any(|&(gsi, before)| self.table.get(gsi) != before);

        let (mut unbound, mut written, mut bound) = (0, false, 0);
        let mut tell = || -> Result<(), Error> {
            for irqfd in &unbind {
                vm.irqfd_deassign(&irqfd.event, irqfd.gsi)?;
                unbound += 1;
            }
            if table_differs {
                self.table.write_to(&mut self.buffer);
                vm.set_gsi_routing(&self.buffer)?;
                written = true;
            }
            for irqfd in &bind {
                vm.irqfd_assign(irqfd)?;
                bound += 1;
            }
            Ok(())
        };
        let Err(cause) = tell() else { return Ok(()) };

        // Back in the same order: unbind, table, bind. Where KVM does not let us, the state follows
        // KVM, so that the two agree whatever happens.
        let mut failure = None;
        let refused = self.undo(change);
        for irqfd in bind.into_iter().take(bound) {
            if let Err(error) = vm.irqfd_deassign(&irqfd.event, irqfd.gsi) {
                failure.get_or_insert(error);
                // It must not be without a route.
                let kept = refused.iter().find(|&&(gsi, _)| gsi == irqfd.gsi);
                if let (Targets::None, Some(&(gsi, targets))) = (self.table.get(irqfd.gsi), kept) {
                    self.table.put(gsi, targets);
                }
                self.irqfds.insert(irqfd);
            }
        }
        let differs = refused.iter().any(|&(gsi, targets)| self.table.get(gsi) != targets);
        if written
            && differs
            && let Err(error) = vm.set_gsi_routing(&self.table.routes())
        {
            failure.get_or_insert(error);
            for (gsi, targets) in refused {
                self.table.put(gsi, targets);
            }
        }
        for irqfd in unbind.iter().take(unbound) {
            let fd = irqfd.event.as_raw_fd();
            // A new binding of the same eventfd that could not be undone stays instead.
            if self.irqfds.get(fd) != Some(irqfd) {
                continue;
            }
            if self.table.get(irqfd.gsi) == Targets::None {
                // Its route could not be restored: its events wait, and are not lost.
                self.irqfds.remove(fd);
            } else if let Err(error) = vm.irqfd_assign(irqfd) {
                failure.get_or_insert(error);
                self.irqfds.remove(fd);
            }
        }
        Err(match failure {
            None => RouterError::Kvm(cause),
            Some(rollback) => RouterError::RollbackFailed { cause, rollback },
        })
    }

    /// The irqfds KVM has and should not, and those it should have and has not. By GSI: what KVM is told
    /// does not depend on the numbers of descriptors.
    fn irqfd_difference(&self, change: &Change) -> (Vec<Irqfd>, Vec<Irqfd>) {
        let (mut unbind, mut bind) = (Vec::new(), Vec::new());
        for (fd, before) in &change.irqfds {
            let after = self.irqfds.get(*fd);
            if before.as_ref() != after {
                unbind.extend(before.clone());
                bind.extend(after.cloned());
            }
        }
        unbind.sort_by_key(|irqfd| irqfd.gsi);
        bind.sort_by_key(|irqfd| irqfd.gsi);
        (unbind, bind)
    }
}
