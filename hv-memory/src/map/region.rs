//! A region: something that has guest-physical addresses, or that others are an alias of.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use hv_core::HostRange;
use vm_memory::GuestAddress;

/// A region of an address map. None is ever used twice in one map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub(super) u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a region is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Memory(HostRange),
    Mmio { len: u64 },
    Alias { target: RegionId, offset: u64, len: u64 },
}

/// Where a region is, and what it hides there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) range: Range<u64>,
    pub(super) priority: i32,
}

/// A region as the map has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) name: Arc<str>,
    pub(super) kind: Kind,
    pub(super) readonly: bool,
    pub(super) log_dirty: bool,
    pub(super) placement: Option<Placement>,
}

impl Region {
    pub(super) fn len(&self) -> u64 {
        match &self.kind {
            Kind::Memory(host) => host.len() as u64,
            Kind::Mmio { len } | Kind::Alias { len, .. } => *len,
        }
    }

    pub(super) fn target(&self) -> Option<RegionId> {
        match self.kind {
            Kind::Alias { target, .. } => Some(target),
            _ => None,
        }
    }
}

/// A region to be added to an address map; see [`crate::Edit::add`].
///
/// Without [`at`](Self::at) it has no guest-physical addresses, and can only be seen through an alias.
#[derive(Debug, Clone)]
#[must_use]
pub struct NewRegion {
    pub(super) name: Arc<str>,
    pub(super) kind: Kind,
    pub(super) readonly: bool,
    pub(super) log_dirty: bool,
    pub(super) at: Option<(GuestAddress, i32)>,
}

impl NewRegion {
    fn new(name: impl Into<Arc<str>>, kind: Kind) -> Self {
        Self { name: name.into(), kind, readonly: false, log_dirty: false, at: None }
    }

    /// Memory the guest reads and writes.
    pub fn ram(name: impl Into<Arc<str>>, host: HostRange) -> Self {
        Self::new(name, Kind::Memory(host))
    }

    /// Memory the guest only reads: its writes exit as MMIO.
    pub fn rom(name: impl Into<Arc<str>>, host: HostRange) -> Self {
        Self::ram(name, host).readonly()
    }

    /// `len` bytes of a device: every access exits as MMIO.
    pub fn mmio(name: impl Into<Arc<str>>, len: u64) -> Self {
        Self::new(name, Kind::Mmio { len })
    }

    /// `len` bytes of another region from `offset`, seen once more.
    pub fn alias(name: impl Into<Arc<str>>, target: RegionId, offset: u64, len: u64) -> Self {
        Self::new(name, Kind::Alias { target, offset, len })
    }

    /// Makes what is seen through it readonly.
    pub fn readonly(self) -> Self {
        Self { readonly: true, ..self }
    }

    /// Has KVM record which pages are written through it (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub fn log_dirty(self) -> Self {
        Self { log_dirty: true, ..self }
    }

    /// Puts it at a guest-physical address, where it hides what has a lower priority.
    pub fn at(self, guest: GuestAddress, priority: i32) -> Self {
        Self { at: Some((guest, priority)), ..self }
    }
}
