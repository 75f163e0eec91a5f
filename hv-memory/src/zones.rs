//! Coalesced zones: writes that KVM collects instead of stopping the vCPU for each.
//!
//! KVM takes a zone twice, or over another, and then ends all of them at once, when a part of one is
//! unregistered; on a kernel that collects no port writes it takes ports for addresses. None of that is
//! an error there, so there is a ledger. What was collected is handed out in order.
//!
//! Lock order: the turn of who drains, then the ledger. The ledger's is held across the ioctl; under
//! the turn the caller's code runs.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hv_core::{CoalescedWrite, CoalescedZone, Errno, IoAddress, MemoryBackend, Vcpu};
use thiserror::Error;

/// Devices that an I/O bus of a VM has room for, zones among them (`NR_IOBUS_DEVS` of Linux since 3.2;
/// no capability tells it).
const BUS_DEVICES: usize = 1000;

/// More writes than the ring can hold (`KVM_COALESCED_MMIO_MAX`).
const RING: usize = 170;

/// What of a guest's writes this host's KVM can collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneSupport {
    /// Those to guest-physical addresses (`KVM_CAP_COALESCED_MMIO`).
    pub memory: bool,
    /// Those to ports (`KVM_CAP_COALESCED_PIO`).
    pub ports: bool,
}

/// Why a zone can't be registered or unregistered. When it can't be registered, nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ZoneError {
    /// The zone has no bytes.
    #[error("zone {name:?} has no bytes")]
    Empty {
        /// Its name.
        name: Arc<str>,
    },
    /// The zone is more than KVM counts, or reaches the last address or beyond.
    #[error("zone {name:?} of {:#x} bytes at {:#x} passes the last address", .zone.size, .zone.address.value())]
    Wraps {
        /// Its name.
        name: Arc<str>,
        /// What was asked for.
        zone: CoalescedZone,
    },
    /// This host's KVM collects no such writes.
    #[error("zone {name:?} at {}: this KVM collects no such writes: handle each as an exit", Range(.zone))]
    Unsupported {
        /// Its name.
        name: Arc<str>,
        /// What was asked for.
        zone: CoalescedZone,
    },
    /// Another zone is there.
    #[error("zone {name:?} at {} overlaps {other:?} at {}", Range(.zone), Range(.other_zone))]
    Overlap {
        /// Its name.
        name: Arc<str>,
        /// What was asked for.
        zone: CoalescedZone,
        /// The name of what is there.
        other: Arc<str>,
        /// Where that is.
        other_zone: CoalescedZone,
    },
    /// KVM has no room for another (`ENOSPC`).
    #[error(
        "no room for zone {name:?} at {}: KVM takes {limit} devices on a bus, its own among them, and \
         {zones} zones are there: join zones, or handle each write as an exit", Range(.zone)
    )]
    NoSpace {
        /// Its name.
        name: Arc<str>,
        /// What was asked for.
        zone: CoalescedZone,
        /// How many zones are on its bus.
        zones: usize,
        /// How many devices, of every kind but ioeventfds, a bus takes.
        limit: usize,
    },
    /// KVM refused.
    #[error("zone {name:?}: {error}")]
    Kvm {
        /// The name of the zone.
        name: Arc<str>,
        /// What KVM said.
        error: hv_core::Error,
    },
}

/// The addresses of a zone, for a person.
struct Range<'a>(&'a CoalescedZone);

impl fmt::Display for Range<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CoalescedZone { address, size } = *self.0;
        let last = address.value().saturating_add(size.saturating_sub(1).into());
        match address {
            IoAddress::Mmio(first) => write!(f, "{first:#x}-{last:#x}"),
            IoAddress::Pio(first) => write!(f, "ports {first:#x}-{last:#x}"),
        }
    }
}

/// The coalesced zones of a VM.
///
/// When the registry is dropped its zones stay as they are: they are the VM's, and go with it. Drop it
/// before their owners when a VM ends, because KVM waits for a grace period for each one that is
/// removed by itself.
pub struct CoalescedZones<M: MemoryBackend> {
    shared: Arc<Shared<M>>,
}

struct Shared<M> {
    vm: Arc<M>,
    support: ZoneSupport,
    ledger: Mutex<Ledger>,
    turn: Turn,
}

/// What KVM has, by first address. Zones don't overlap.
#[derive(Default)]
struct Ledger(BTreeMap<IoAddress, Entry>);

struct Entry {
    name: Arc<str>,
    zone: CoalescedZone,
    /// Its owner is gone but KVM did not unregister it. Each registration tries again.
    abandoned: bool,
}

/// The address after the last, if KVM can count that far: it counts the bytes of a device with a sign,
/// and there are 2^16 ports.
fn end(zone: &CoalescedZone) -> Option<u64> {
    i32::try_from(zone.size).ok()?;
    let end = zone.address.value().checked_add(zone.size.into())?;
    let most = match zone.address {
        IoAddress::Mmio(_) => u64::MAX,
        IoAddress::Pio(_) => 1 << 16,
    };
    (end <= most).then_some(end)
}

fn same_space(a: IoAddress, b: IoAddress) -> bool {
    matches!(a, IoAddress::Mmio(_)) == matches!(b, IoAddress::Mmio(_))
}

impl Ledger {
    /// Refuses a zone that KVM can't have as it is meant.
    fn check(
        &self,
        name: &Arc<str>,
        zone: CoalescedZone,
        support: ZoneSupport,
    ) -> Result<(), ZoneError> {
        let name = || name.clone();
        if zone.size == 0 {
            return Err(ZoneError::Empty { name: name() });
        }
        let Some(end) = end(&zone) else {
            return Err(ZoneError::Wraps { name: name(), zone });
        };
        let supported = match zone.address {
            IoAddress::Mmio(_) => support.memory,
            IoAddress::Pio(_) => support.ports,
        };
        if !supported {
            return Err(ZoneError::Unsupported { name: name(), zone });
        }
        match self.overlapping(zone.address, end) {
            Some(Entry { name: other, zone: other_zone, .. }) => Err(ZoneError::Overlap {
                name: name(),
                zone,
                other: other.clone(),
                other_zone: *other_zone,
            }),
            None => Ok(()),
        }
    }

    /// A zone that has an address from `start` to before `stop`.
    fn overlapping(&self, start: IoAddress, stop: u64) -> Option<&Entry> {
        // None overlaps another, so of those that begin before only the last can reach in.
        let before = self.0.range(..start).next_back();
        let from = self.0.range((Bound::Included(start), Bound::Unbounded)).next();
        let of_space = |entry: &&Entry| same_space(entry.zone.address, start);
        let before = before.map(|(_, entry)| entry).filter(of_space);
        let from = from.map(|(_, entry)| entry).filter(of_space);
        before
            .filter(|entry| end(&entry.zone).is_some_and(|end| end > start.value()))
            .or(from.filter(|entry| entry.zone.address.value() < stop))
    }

    /// Tries again to unregister what is abandoned.
    fn reap<M: MemoryBackend>(&mut self, vm: &M) {
        self.0.retain(|_, Entry { zone, abandoned, .. }| {
            !(*abandoned && vm.unregister_coalesced_zone(*zone).is_ok())
        });
    }

    fn put(&mut self, name: Arc<str>, zone: CoalescedZone) {
        self.0.insert(zone.address, Entry { name, zone, abandoned: false });
    }
}

impl<M: MemoryBackend> CoalescedZones<M> {
    /// The registry of a VM that has no zones.
    #[must_use]
    pub fn new(vm: Arc<M>, support: ZoneSupport) -> Self {
        Self::with(vm, support, Ledger::default())
    }

    fn with(vm: Arc<M>, support: ZoneSupport, ledger: Ledger) -> Self {
        let (ledger, turn) = (Mutex::new(ledger), Turn::default());
        Self { shared: Arc::new(Shared { vm, support, ledger, turn }) }
    }

    /// The registry of a VM that has the given zones and no others, each with what to call it, as
    /// `hv_core::init` has registered them. Returns an owner for each, in that order.
    ///
    /// # Errors
    /// KVM can't have these zones as they are meant; the VM is left alone.
    pub fn adopt<N: Into<Arc<str>>>(
        vm: Arc<M>,
        zones: impl IntoIterator<Item = (N, CoalescedZone)>,
        support: ZoneSupport,
    ) -> Result<(Self, Vec<ZoneHandle<M>>), ZoneError> {
        let (mut ledger, mut adopted) = (Ledger::default(), Vec::new());
        for (name, zone) in zones {
            let name = name.into();
            ledger.check(&name, zone, support)?;
            ledger.put(name, zone);
            adopted.push(zone);
        }
        let registry = Self::with(vm, support, ledger);
        let owners = adopted.into_iter().map(|zone| registry.owner(zone)).collect();
        Ok((registry, owners))
    }

    /// Lets KVM collect the writes to a zone (`KVM_REGISTER_COALESCED_MMIO`). `name` is what errors
    /// call it.
    ///
    /// # Errors
    /// The zone is empty, passes the last address, overlaps another one or is of a space this KVM does
    /// not collect; KVM has no room for it, or refuses.
    pub fn register(
        &self,
        name: impl Into<Arc<str>>,
        zone: CoalescedZone,
    ) -> Result<ZoneHandle<M>, ZoneError> {
        let (name, shared) = (name.into(), &*self.shared);
        let mut ledger = shared.ledger();
        ledger.reap(&*shared.vm);
        ledger.check(&name, zone, shared.support)?;
        shared.vm.register_coalesced_zone(zone).map_err(|error| match error.errno {
            Errno::ENOSPC => {
                let there = ledger.0.keys().filter(|there| same_space(**there, zone.address));
                let (zones, limit) = (there.count(), BUS_DEVICES);
                ZoneError::NoSpace { name: name.clone(), zone, zones, limit }
            }
            _ => ZoneError::Kvm { name: name.clone(), error },
        })?;
        ledger.put(name, zone);
        Ok(self.owner(zone))
    }

    fn owner(&self, zone: CoalescedZone) -> ZoneHandle<M> {
        ZoneHandle { zone, shared: Arc::downgrade(&self.shared) }
    }

    /// What KVM has: those at addresses, then those of ports, by address.
    #[must_use]
    pub fn registered(&self) -> Vec<(Arc<str>, CoalescedZone)> {
        let ledger = self.shared.ledger();
        ledger.0.values().map(|entry| (entry.name.clone(), entry.zone)).collect()
    }

    /// Hands out what was collected, in the order in which it was written, whoever wrote it. To be
    /// called after each run of a vCPU, by its thread, before the exit is handled: when it returns, all
    /// writes that came before that exit have been handled, by this thread or another.
    ///
    /// If nothing was collected that costs a few instructions: no lock, no system call. `handle` runs
    /// on one thread at a time; another waits. Called by `handle` itself it does nothing, as the writes
    /// still to come are handed out anyway. A zone that was unregistered may have collected writes
    /// before.
    ///
    /// # Errors
    /// `EIO` if the ring holds what KVM never writes.
    pub fn drain<V: Vcpu>(
        &self,
        vcpu: &V,
        mut handle: impl FnMut(CoalescedWrite),
    ) -> Result<(), hv_core::Error> {
        let turn = &self.shared.turn;
        // In this order: who has taken the last write was seen to have the turn before that.
        if !vcpu.has_coalesced_write() && turn.is_free() {
            return Ok(());
        }
        let Some(_mine) = turn.take() else { return Ok(()) };
        // What came before the exit is in the ring now. What others go on to write need not be handled
        // here, and a guest could keep this thread with it.
        for _ in 0..RING {
            if !vcpu.has_coalesced_write() {
                break;
            }
            // Others take writes only in their turn, so there is one.
            if let Some(write) = vcpu.take_coalesced_write()? {
                handle(write);
            }
        }
        Ok(())
    }
}

impl<M: MemoryBackend> Shared<M> {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // The ledger is changed after KVM agreed and in one step, so that a panic of a backend
        // leaves it whole.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unregisters the zone of an owner. If KVM refuses it is abandoned.
    fn release(&self, zone: CoalescedZone) -> Result<(), ZoneError> {
        let mut ledger = self.ledger();
        let Some(entry) = ledger.0.get_mut(&zone.address) else { return Ok(()) };
        if let Err(error) = self.vm.unregister_coalesced_zone(zone) {
            entry.abandoned = true;
            return Err(ZoneError::Kvm { name: entry.name.clone(), error });
        }
        ledger.0.remove(&zone.address);
        Ok(())
    }
}

/// Whose turn it is to drain.
#[derive(Default)]
struct Turn {
    /// The thread, by its number here; 0 if nobody's.
    of: AtomicU64,
    lock: Mutex<()>,
}

struct MyTurn<'a> {
    of: &'a AtomicU64,
    _lock: MutexGuard<'a, ()>,
}

impl Turn {
    fn is_free(&self) -> bool {
        // Acquire: what was handled in the turn that ended is visible.
        self.of.load(Ordering::Acquire) == 0
    }

    /// Waits for it; none if this thread has it.
    fn take(&self) -> Option<MyTurn<'_>> {
        /// Numbers of threads, which are never used again.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        thread_local! {
            static ME: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
        }
        let me = ME.with(|me| *me);
        if self.of.load(Ordering::Relaxed) == me {
            return None;
        }
        // What a panic of someone's handler leaves is a turn that has ended.
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.of.store(me, Ordering::Relaxed);
        Some(MyTurn { of: &self.of, _lock: lock })
    }
}

impl Drop for MyTurn<'_> {
    fn drop(&mut self) {
        self.of.store(0, Ordering::Release);
    }
}

/// A zone and its owner: dropping it unregisters it.
pub struct ZoneHandle<M: MemoryBackend> {
    zone: CoalescedZone,
    shared: Weak<Shared<M>>,
}

impl<M: MemoryBackend> ZoneHandle<M> {
    /// The zone.
    #[must_use]
    pub fn zone(&self) -> CoalescedZone {
        self.zone
    }

    /// Unregisters it, as dropping does, and says if that failed.
    ///
    /// # Errors
    /// KVM refuses; it is tried again when another zone is registered.
    pub fn unregister(mut self) -> Result<(), ZoneError> {
        match std::mem::take(&mut self.shared).upgrade() {
            Some(shared) => shared.release(self.zone),
            None => Ok(()),
        }
    }
}

impl<M: MemoryBackend> Drop for ZoneHandle<M> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            // A failure is remembered: the zone is abandoned.
            let _ = shared.release(self.zone);
        }
    }
}

impl<M: MemoryBackend> fmt::Debug for CoalescedZones<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoalescedZones").field("registered", &self.registered()).finish()
    }
}

impl<M: MemoryBackend> fmt::Debug for ZoneHandle<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ZoneHandle({})", Range(&self.zone))
    }
}
