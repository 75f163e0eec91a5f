//! ioeventfds: guest writes that signal an eventfd without leaving the kernel.
//!
//! KVM refuses two that cover the same write, but does not say which; and an ioeventfd goes away only
//! for one who names it completely. So there is a ledger. Lock order: one lock, held across the
//! ioctl.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hv_core::{EventFd, IoAddress, IoEvent, IoEventBackend};
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
        // KVM wants an address after the last byte written, and there are 2^16 ports.
        let end = self.address.value().checked_add(self.length.into());
        let most = match self.address {
            IoAddress::Mmio(_) => u64::MAX,
            IoAddress::Pio(_) => 1 << 16,
        };
        match end {
            Some(end) if end <= most => Ok(()),
            _ => Err(IoEventError::Wraps(*self)),
        }
    }

    fn event(self, event: &EventFd) -> IoEvent {
        let Self { address, length, datamatch } = self;
        IoEvent { address, length, datamatch, event: event.clone() }
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
                !(entry.abandoned && vm.ioeventfd_deassign(&event).is_ok())
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
    event: EventFd,
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
        event: EventFd,
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
        self.shared.vm.ioeventfd_assign(&matched.event(&event))?;
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
            let deassigned = self.vm.ioeventfd_deassign(&matched.event(&entry.event));
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

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::{Errno, Error, Ioctl};
    use proptest::prelude::*;
    use std::io::Read;
    use std::os::fd::{AsRawFd, OwnedFd, RawFd};
    use std::os::unix::net::UnixStream;

    /// An ioeventfd that does not keep its eventfd open, so that a test can tell who does.
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Known {
        address: IoAddress,
        length: u32,
        datamatch: Option<u64>,
        fd: RawFd,
    }

    impl From<&IoEvent> for Known {
        fn from(event: &IoEvent) -> Self {
            let IoEvent { address, length, datamatch, ref event } = *event;
            Self { address, length, datamatch, fd: event.as_raw_fd() }
        }
    }

    /// The ioeventfds of a VM by the rules of KVM. What it would refuse is a complaint.
    #[derive(Debug, Default)]
    struct RuleVm {
        events: Mutex<Vec<Known>>,
        calls: Mutex<usize>,
        fail: Mutex<bool>,
        complaints: Mutex<Vec<Known>>,
    }

    impl RuleVm {
        fn call(&self) -> Result<(), Error> {
            *self.calls.lock().unwrap() += 1;
            match std::mem::take(&mut *self.fail.lock().unwrap()) {
                true => Err(Error::new(Ioctl::Ioeventfd, Errno::ENOMEM)),
                false => Ok(()),
            }
        }
    }

    /// As `ioeventfd_check_collision` answers.
    fn collide(a: &Known, b: &Known) -> bool {
        if a.address != b.address {
            return false;
        }
        if a.length == 0 || b.length == 0 {
            return true;
        }
        a.length == b.length
            && (a.datamatch.is_none() || b.datamatch.is_none() || a.datamatch == b.datamatch)
    }

    impl IoEventBackend for RuleVm {
        fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error> {
            self.call()?;
            let event = Known::from(event);
            let mut events = self.events.lock().unwrap();
            if events.iter().any(|other| collide(other, &event)) {
                self.complaints.lock().unwrap().push(event);
                return Err(Error::new(Ioctl::Ioeventfd, Errno::EEXIST));
            }
            events.push(event);
            Ok(())
        }

        fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error> {
            self.call()?;
            let event = Known::from(event);
            let mut events = self.events.lock().unwrap();
            let Some(index) = events.iter().position(|other| *other == event) else {
                self.complaints.lock().unwrap().push(event);
                return Err(Error::new(Ioctl::Ioeventfd, Errno::ENOENT));
            };
            events.remove(index);
            Ok(())
        }
    }

    fn event() -> EventFd {
        watched().0
    }

    /// One, and what reads the end of file once it is closed.
    fn watched() -> (EventFd, UnixStream) {
        let (watch, event) = UnixStream::pair().unwrap();
        watch.set_nonblocking(true).unwrap();
        (OwnedFd::from(event).into(), watch)
    }

    fn is_closed(mut watch: &UnixStream) -> bool {
        watch.read(&mut [0]).is_ok_and(|bytes| bytes == 0)
    }

    fn mmio(address: u64, length: u32, datamatch: Option<u64>) -> IoEventMatch {
        IoEventMatch { address: IoAddress::Mmio(address), length, datamatch }
    }

    fn known(matched: IoEventMatch, fd: RawFd) -> Known {
        let IoEventMatch { address, length, datamatch } = matched;
        Known { address, length, datamatch, fd }
    }

    fn registry() -> (Arc<RuleVm>, IoEventRegistry<RuleVm>) {
        let vm = Arc::new(RuleVm::default());
        (vm.clone(), IoEventRegistry::new(vm))
    }

    #[test]
    fn what_can_not_match_is_refused_before_kvm_is_asked() {
        let (vm, registry) = registry();
        let port =
            |port, length| IoEventMatch { address: IoAddress::Pio(port), length, datamatch: None };
        for (wanted, error, text) in [
            (
                mmio(0x1000, 3, None),
                IoEventError::Length as fn(_) -> _,
                "a 3-byte write to address 0x1000",
            ),
            (
                mmio(0x1000, 0, Some(1)),
                IoEventError::ValueWithoutLength,
                "any write to address 0x1000 of 0x1",
            ),
            (
                mmio(0x1000, 2, Some(0x1_0000)),
                IoEventError::ValueTooWide,
                "a 2-byte write to address 0x1000 of 0x10000",
            ),
            (
                mmio(u64::MAX - 2, 4, None),
                IoEventError::Wraps,
                "a 4-byte write to address 0xfffffffffffffffd",
            ),
            (port(0xffff, 2), IoEventError::Wraps, "a 2-byte write to port 0xffff"),
        ] {
            let refused = registry.assign(wanted, event()).unwrap_err();
            assert_eq!(refused, error(wanted));
            assert!(refused.to_string().contains(text), "{refused}");
        }
        assert_eq!(*vm.calls.lock().unwrap(), 0);
        let last = mmio(u64::MAX - 3, 4, None);
        assert_eq!(registry.assign(last, event()).unwrap_err(), IoEventError::Wraps(last));
        registry.assign(mmio(u64::MAX - 4, 4, Some(0xffff_ffff)), event()).unwrap();
        registry.assign(mmio(1 << 40, 8, Some(u64::MAX)), event()).unwrap();
    }

    #[test]
    fn a_conflict_names_both() {
        let (vm, registry) = registry();
        let _wildcard = registry.assign(mmio(0x1000, 4, None), event()).unwrap();
        let error = registry.assign(mmio(0x1000, 4, Some(2)), event()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no ioeventfd for a 4-byte write to address 0x1000 of 0x2: there is one for a 4-byte \
             write to address 0x1000"
        );
        // The same address beyond 32 bits is another one.
        let _high = registry.assign(mmio(0x1_0000_1000, 4, Some(2)), event()).unwrap();
        assert_eq!(vm.events.lock().unwrap().len(), 2);
    }

    #[test]
    fn the_vm_takes_its_ioeventfds_with_it() {
        let (vm, registry) = registry();
        let handles: Vec<_> =
            (0..8).map(|n| registry.assign(mmio(0x1000, 2, Some(n)), event()).unwrap()).collect();
        drop(registry);
        drop(handles);
        assert_eq!(*vm.calls.lock().unwrap(), 8, "none was removed by itself");
    }

    #[derive(Debug, Clone)]
    enum Op {
        Assign(IoEventMatch),
        Drop(usize),
        Remove(usize),
    }

    fn ops() -> impl Strategy<Value = Vec<(Op, bool)>> {
        let address =
            prop_oneof![(0..3_u64).prop_map(IoAddress::Mmio), (0..2_u16).prop_map(IoAddress::Pio),];
        let length = prop::sample::select(vec![0, 1, 2, 4, 8]);
        let matched = (address, length, prop::option::of(0..3_u64)).prop_map(
            |(address, length, datamatch)| {
                let datamatch = datamatch.filter(|_| length > 0);
                IoEventMatch { address, length, datamatch }
            },
        );
        let op = prop_oneof![
            4 => matched.prop_map(Op::Assign),
            1 => any::<usize>().prop_map(Op::Drop),
            1 => any::<usize>().prop_map(Op::Remove),
        ];
        prop::collection::vec((op, prop::bool::weighted(0.2)), 0..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

        #[test]
        fn registry_kvm_and_owners_agree(ops in ops()) {
            let (vm, registry) = registry();
            let mut owned: Vec<(IoEventHandle<RuleVm>, RawFd, UnixStream)> = Vec::new();
            for (op, fault) in ops {
                *vm.fail.lock().unwrap() = fault;
                let failed = || fault && !*vm.fail.lock().unwrap();
                match op {
                    Op::Assign(matched) => {
                        let (event, watch) = watched();
                        let fd = event.as_raw_fd();
                        match registry.assign(matched, event) {
                            Ok(handle) => {
                                prop_assert_eq!(handle.matched(), matched);
                                owned.push((handle, fd, watch));
                            }
                            Err(IoEventError::Conflict { new, existing }) => {
                                prop_assert_eq!(new, matched);
                                prop_assert!(registry.assigned().contains(&existing));
                                prop_assert!(collide(&known(new, fd), &known(existing, fd)));
                            }
                            Err(error) => prop_assert!(failed(), "{}", error),
                        }
                    }
                    Op::Drop(which) | Op::Remove(which) if !owned.is_empty() => {
                        let (handle, _, watch) = owned.remove(which % owned.len());
                        match op {
                            Op::Remove(_) => prop_assert_eq!(handle.remove().is_err(), failed()),
                            _ => drop(handle),
                        }
                        // What KVM kept is kept open; what it let go of is not.
                        prop_assert_eq!(is_closed(&watch), !failed());
                    }
                    Op::Drop(_) | Op::Remove(_) => {}
                }
                prop_assert!(vm.complaints.lock().unwrap().is_empty());
                let events = vm.events.lock().unwrap();
                let mut kvm: Vec<_> = events.iter().map(|e| (e.address, e.length, e.datamatch)).collect();
                let mut ours: Vec<_> =
                    registry.assigned().iter().map(|m| (m.address, m.length, m.datamatch)).collect();
                kvm.sort_unstable();
                ours.sort_unstable();
                prop_assert_eq!(kvm, ours);
                for (handle, fd, _) in &owned {
                    prop_assert!(events.contains(&known(handle.matched(), *fd)));
                }
            }
        }
    }
}
