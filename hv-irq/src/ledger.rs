//! Which eventfds are irqfds, and of which GSI.
//!
//! KVM takes any GSI and answers 0 to any deassign, so somebody has to know. It must hold each
//! eventfd open: KVM finds an irqfd again only by its descriptor, and a closed one could come back as
//! something else.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};

use hv_core::{EventFd, Gsi, Irqfd};

/// An eventfd bound to a GSI.
#[derive(Debug, Clone)]
pub(crate) struct Binding {
    pub(crate) gsi: Gsi,
    pub(crate) event: EventFd,
}

impl Binding {
    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub(crate) fn irqfd(&self) -> Irqfd {
        Irqfd { event: self.event.clone(), gsi: self.gsi, resample: None }
    }
}

/// All bindings, found by eventfd and by GSI.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    by_fd: BTreeMap<RawFd, Binding>,
    by_gsi: BTreeSet<(Gsi, RawFd)>,
}

impl Ledger {
    pub(crate) fn get(&self, fd: RawFd) -> Option<&Binding> {
        self.by_fd.get(&fd)
    }

    /// The descriptors bound to a GSI.
    pub(crate) fn of(&self, gsi: Gsi) -> impl Iterator<Item = RawFd> {
        self.by_gsi.range((gsi, RawFd::MIN)..=(gsi, RawFd::MAX)).map(|&(_, fd)| fd)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Binding> {
        self.by_fd.values()
    }

    /// Sets what a descriptor is bound to; returns what it was bound to.
    pub(crate) fn put(&mut self, fd: RawFd, binding: Option<Binding>) -> Option<Binding> {
        let before = self.by_fd.remove(&fd);
        if let Some(before) = &before {
            self.by_gsi.remove(&(before.gsi, fd));
        }
        if let Some(binding) = binding {
            self.by_gsi.insert((binding.gsi, fd));
            self.by_fd.insert(fd, binding);
        }
        before
    }
}
