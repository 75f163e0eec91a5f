//! Which eventfds are irqfds, and of which GSI.
//!
//! KVM takes any GSI and answers 0 to any deassign, so somebody has to know. It must hold each
//! eventfd open, the resample one too: KVM finds an irqfd again only by its descriptor, and a closed
//! one could come back as something else.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};

use hv_core::{Gsi, Irqfd};

/// All irqfds, found by eventfd and by GSI.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    by_fd: BTreeMap<RawFd, Irqfd>,
    by_gsi: BTreeSet<(Gsi, RawFd)>,
}

impl Ledger {
    pub(crate) fn get(&self, fd: RawFd) -> Option<&Irqfd> {
        self.by_fd.get(&fd)
    }

    /// The descriptors bound to a GSI.
    pub(crate) fn of(&self, gsi: Gsi) -> impl Iterator<Item = RawFd> {
        self.by_gsi.range((gsi, RawFd::MIN)..=(gsi, RawFd::MAX)).map(|&(_, fd)| fd)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Irqfd> {
        self.by_fd.values()
    }

    /// Binds an eventfd; returns what it was bound to.
    pub(crate) fn insert(&mut self, irqfd: Irqfd) -> Option<Irqfd> {
        let fd = irqfd.event.as_raw_fd();
        let before = self.remove(fd);
        self.by_gsi.insert((irqfd.gsi, fd));
        self.by_fd.insert(fd, irqfd);
        before
    }

    /// Unbinds an eventfd; returns what it was bound to.
    pub(crate) fn remove(&mut self, fd: RawFd) -> Option<Irqfd> {
        let before = self.by_fd.remove(&fd)?;
        self.by_gsi.remove(&(before.gsi, fd));
        Some(before)
    }

    /// Makes a descriptor bound to what it was bound to before.
    pub(crate) fn restore(&mut self, fd: RawFd, before: Option<Irqfd>) {
        match before {
            Some(irqfd) => drop(self.insert(irqfd)),
            None => drop(self.remove(fd)),
        }
    }
}
