//! Moving a router to another VM.
//!
//! An eventfd must raise one VM's interrupts at a time: of two that wait for it, either takes the
//! event. So each irqfd leaves the old VM first, and its events wait meanwhile.

use std::os::fd::AsRawFd;

use hv_core::{Error, IrqBackend, Irqfd, Route};

use crate::RouterError;
use crate::state::State;

impl State {
    /// Makes `new` what `old` is, but for what nobody owns any more, and unbinds all from `old`; or
    /// leaves all with `old`.
    pub(crate) fn rebuild<V: IrqBackend>(&mut self, old: &V, new: &V) -> Result<(), RouterError> {
        let abandoned = self.abandoned();
        let owned = |route: &Route| !abandoned.contains(&route.gsi);
        let routes: Vec<Route> = self.table.routes().into_iter().filter(owned).collect();
        let (gone, mut irqfds): (Vec<Irqfd>, Vec<Irqfd>) =
            self.irqfds.iter().cloned().partition(|irqfd| self.is_abandoned(irqfd));
        irqfds.sort_by_key(|irqfd| irqfd.gsi);

        let (mut unbound, mut bound) = (0, 0);
        let mut tell = || -> Result<(), Error> {
            if !routes.is_empty() {
                new.set_gsi_routing(&routes)?;
            }
            for irqfd in &irqfds {
                old.irqfd_deassign(&irqfd.event, irqfd.gsi)?;
                unbound += 1;
            }
            for irqfd in &irqfds {
                new.irqfd_assign(irqfd)?;
                bound += 1;
            }
            Ok(())
        };
        let Err(cause) = tell() else {
            // The old VM goes, and with it what it would not let go of.
            for irqfd in gone {
                let _ = old.irqfd_deassign(&irqfd.event, irqfd.gsi);
                self.irqfds.remove(irqfd.event.as_raw_fd());
            }
            self.forget_abandoned();
            return Ok(());
        };

        let mut failure = None;
        for irqfd in irqfds.iter().take(bound) {
            if let Err(error) = new.irqfd_deassign(&irqfd.event, irqfd.gsi) {
                failure.get_or_insert(error);
            }
        }
        for irqfd in irqfds.iter().take(unbound) {
            if let Err(error) = old.irqfd_assign(irqfd) {
                failure.get_or_insert(error);
                self.irqfds.remove(irqfd.event.as_raw_fd());
            }
        }
        Err(match failure {
            None => RouterError::Kvm(cause),
            Some(rollback) => RouterError::RollbackFailed { cause, rollback },
        })
    }
}
