//! ioeventfds: guest writes that signal an eventfd without leaving the kernel.
//!
//! KVM refuses two that cover the same write, but does not say which; and an ioeventfd goes away only
//! for one who names it completely. So there is a ledger. Lock order: one lock, held across the
//! ioctl.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hv_core::{IoAddress, IoEvent, IoEventBackend};
use thiserror::Error;

/// Which guest write signals an eventfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IoEventMatch {
    /// Where the guest writes.
    pub address: IoAddress,
    /// Bytes of the write: 1, 2, 4 or 8, or 0 for any number (then without a value).
    pub length: u32,
    /// The value that must be written; any if `None`.
    pub datamatch: Option<u64>,
}

impl fmt::Display for IoEventMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = match self.address {
            IoAddress::Mmio(_) => "address",
            IoAddress::Pio(_) => "port",
        };
        match self.length {
            0 => f.write_str("any write")?,
            length => write!(f, "a {length}-byte write")?,
        }
        write!(f, " to {space} {:#x}", self.address.value())?;
        match self.datamatch {
            Some(value) => write!(f, " of {value:#x}"),
            None => Ok(()),
        }
    }
}

impl IoEventMatch {
    /// Whether KVM takes the two for the same write: one of any length or of any value covers the
    /// others.
    fn conflicts(&self, other: &Self) -> bool {
        let any_length = self.length == 0 || other.length == 0;
        let any_value = self.datamatch.is_none() || other.datamatch.is_none();
        self.address == other.address
            && (any_length
                || (self.length == other.length
                    && (any_value || self.datamatch == other.datamatch)))
    }

    fn check(&self) -> Result<(), IoEventError> {
        let wide = match self.length {
            0 if self.datamatch.is_some() => return Err(IoEventError::ValueWithoutLength(*self)),
            1 | 2 | 4 => self.datamatch.is_some_and(|value| value >> (8 * self.length) != 0),
            0 | 8 => false,
            _ => return Err(IoEventError::Length(*self)),
        };
        if wide {
            return Err(IoEventError::ValueTooWide(*self));
        }
        // The last byte written must have an address, too.
        let last = self.address.value().checked_add(self.length.saturating_sub(1).into());
        let most = match self.address {
            IoAddress::Mmio(_) => u64::MAX,
            IoAddress::Pio(_) => u16::MAX.into(),
        };
        match last {
            Some(last) if last <= most => Ok(()),
            _ => Err(IoEventError::Wraps(*self)),
        }
    }

    fn event(self, fd: &OwnedFd) -> IoEvent {
        let Self { address, length, datamatch } = self;
        IoEvent { address, length, datamatch, fd: fd.as_raw_fd() }
    }
}

/// Why an ioeventfd can't be made. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IoEventError {
    /// No write has this many bytes.
    #[error("no ioeventfd for {0}: a write has 1, 2, 4 or 8 bytes")]
    Length(IoEventMatch),
    /// A value can't be compared with a write of any length.
    #[error("no ioeventfd for {0}: a value needs a length")]
    ValueWithoutLength(IoEventMatch),
    /// No write of this length has the value.
    #[error("no ioeventfd for {0}: the value does not fit the length")]
    ValueTooWide(IoEventMatch),
    /// The write would pass the last address.
    #[error("no ioeventfd for {0}: it passes the last address")]
    Wraps(IoEventMatch),
    /// Another one covers the same write, whatever its eventfd.
    #[error("no ioeventfd for {new}: there is one for {existing}")]
    Conflict {
        /// What was asked for.
        new: IoEventMatch,
        /// What is there.
        existing: IoEventMatch,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] hv_core::Error),
}

/// The ioeventfds of a VM.
///
/// When the registry is dropped its ioeventfds stay as they are: they are the VM's, and go with it.
/// Drop it before their owners when a VM ends, because KVM waits for a grace period (8 to 12 ms) for
/// each one that is removed by itself.
pub struct IoEventRegistry<B: IoEventBackend> {
    shared: Arc<Shared<B>>,
}

struct Shared<B> {
    vm: Arc<B>,
    ledger: Mutex<Ledger>,
}

#[derive(Default)]
struct Ledger {
    by_address: BTreeMap<IoAddress, Vec<Entry>>,
}

impl Ledger {
    /// Tries again to remove what is abandoned at an address.
    fn reap<B: IoEventBackend>(&mut self, address: IoAddress, vm: &B) {
        if let Some(there) = self.by_address.get_mut(&address) {
            there.retain(|entry| {
                let event = entry.matched.event(&entry.event);
                !(entry.abandoned && vm.ioeventfd_deassign(event).is_ok())
            });
            self.remove_empty(address);
        }
    }

    fn remove_empty(&mut self, address: IoAddress) {
        if self.by_address.get(&address).is_some_and(Vec::is_empty) {
            self.by_address.remove(&address);
        }
    }
}

/// An ioeventfd that KVM has. Holds the eventfd open, because KVM finds it again only by its
/// descriptor.
#[derive(Debug, Clone)]
struct Entry {
    matched: IoEventMatch,
    event: Arc<OwnedFd>,
    /// Its owner is gone but KVM did not remove it. Tried again for the next one at its address.
    abandoned: bool,
}

impl<B: IoEventBackend> IoEventRegistry<B> {
    /// The registry of a VM that has no ioeventfds.
    #[must_use]
    pub fn new(vm: Arc<B>) -> Self {
        Self { shared: Arc::new(Shared { vm, ledger: Mutex::default() }) }
    }

    /// Lets a guest write signal `event` (`KVM_IOEVENTFD`). Assign after the memory is in place, and
    /// before vCPUs run where that is possible.
    ///
    /// # Errors
    /// The write is impossible, another ioeventfd covers it, or KVM refuses.
    pub fn assign(
        &self,
        matched: IoEventMatch,
        event: Arc<OwnedFd>,
    ) -> Result<IoEventHandle<B>, IoEventError> {
        matched.check()?;
        let mut ledger = self.shared.ledger();
        ledger.reap(matched.address, &*self.shared.vm);
        let there = ledger.by_address.get(&matched.address).into_iter().flatten();
        for Entry { matched: existing, .. } in there {
            if existing.conflicts(&matched) {
                return Err(IoEventError::Conflict { new: matched, existing: *existing });
            }
        }
        self.shared.vm.ioeventfd_assign(matched.event(&event))?;
        let entry = Entry { matched, event, abandoned: false };
        ledger.by_address.entry(matched.address).or_default().push(entry);
        Ok(IoEventHandle { matched, shared: Arc::downgrade(&self.shared) })
    }

    /// What KVM has, by address.
    #[must_use]
    pub fn assigned(&self) -> Vec<IoEventMatch> {
        let ledger = self.shared.ledger();
        ledger.by_address.values().flatten().map(|entry| entry.matched).collect()
    }
}

impl<B: IoEventBackend> Shared<B> {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // The ledger is changed after KVM agreed and in one step, so that a panic of a backend
        // leaves it whole.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the ioeventfd of an owner. If KVM refuses it is abandoned.
    fn release(&self, matched: IoEventMatch) -> Result<(), IoEventError> {
        let mut ledger = self.ledger();
        let Some(there) = ledger.by_address.get_mut(&matched.address) else { return Ok(()) };
        let Some(index) = there.iter().position(|entry| entry.matched == matched) else {
            return Ok(());
        };
        if let Some(entry) = there.get_mut(index) {
            let deassigned = self.vm.ioeventfd_deassign(matched.event(&entry.event));
            entry.abandoned = deassigned.is_err();
            deassigned?;
        }
        there.swap_remove(index);
        ledger.remove_empty(matched.address);
        Ok(())
    }
}

/// An ioeventfd and its owner: dropping it removes it.
pub struct IoEventHandle<B: IoEventBackend> {
    matched: IoEventMatch,
    shared: Weak<Shared<B>>,
}

impl<B: IoEventBackend> IoEventHandle<B> {
    /// The write it is for.
    #[must_use]
    pub fn matched(&self) -> IoEventMatch {
        self.matched
    }

    /// Removes it, as dropping does, and says if that failed.
    ///
    /// # Errors
    /// KVM refuses; it is tried again when one is assigned at this address.
    pub fn remove(mut self) -> Result<(), IoEventError> {
        match std::mem::take(&mut self.shared).upgrade() {
            Some(shared) => shared.release(self.matched),
            None => Ok(()),
        }
    }
}

impl<B: IoEventBackend> Drop for IoEventHandle<B> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            // A failure is remembered: the ioeventfd is abandoned.
            let _ = shared.release(self.matched);
        }
    }
}

impl<B: IoEventBackend> fmt::Debug for IoEventRegistry<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoEventRegistry").field("assigned", &self.assigned()).finish()
    }
}

impl<B: IoEventBackend> fmt::Debug for IoEventHandle<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoEventHandle({})", self.matched)
    }
}
