//! The KVM in memory under two layers: one makes the calls fail that a test chooses, the other sees
//! which slots there are and what is cleared, and complains of what KVM itself refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use hv_core::fake::{FakeKvm, FakeVm};
use hv_core::layer::{Answer, Faults, Interceptor, Layered, LayeredVm, Object, Request};
use hv_core::{Error, MemorySlot, SlotId};

use crate::PAGE;

pub(crate) type TestKvm = Layered<Layered<FakeKvm, Witness>, Chosen>;
pub(crate) type TestVm = LayeredVm<LayeredVm<FakeVm, Witness>, Chosen>;

/// Faults that can be exchanged while a VM runs.
#[derive(Debug, Clone)]
pub(crate) struct Chosen(Arc<Mutex<Faults>>);

impl Chosen {
    pub(crate) fn none() -> Self {
        Self(Arc::new(Mutex::new(Faults::none())))
    }

    /// From now on these calls fail; counted from the next one.
    pub(crate) fn choose(&self, faults: Faults) {
        *self.0.lock().unwrap() = faults;
    }

    /// No call fails any more. How many did.
    pub(crate) fn heal(&self) -> u64 {
        std::mem::replace(&mut *self.0.lock().unwrap(), Faults::none()).failures()
    }
}

impl Interceptor for Chosen {
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let faults = self.0.lock().unwrap().clone();
        faults.call(object, request, real)
    }
}

/// A slot as KVM has it, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) first: u64,
    pub(crate) pages: u64,
    /// Its first page in the one mapping of the tests.
    pub(crate) host: u64,
    pub(crate) logs: bool,
}

impl Live {
    fn of(slot: &MemorySlot) -> Self {
        Self {
            first: slot.guest.0 / PAGE,
            pages: slot.host.len() as u64 / PAGE,
            host: slot.host.offset() as u64 / PAGE,
            logs: slot.flags.log_dirty,
        }
    }
}

/// Sees what arrives at the VM.
#[derive(Debug, Clone, Default)]
pub(crate) struct Witness(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) slots: BTreeMap<SlotId, Live>,
    /// Those that began to log.
    pub(crate) begun: Vec<Live>,
    /// Pages that were cleared, by guest address.
    pub(crate) cleared: BTreeSet<u64>,
    pub(crate) complaints: Vec<String>,
}

impl Witness {
    pub(crate) fn with<R>(&self, look: impl FnOnce(&mut Seen) -> R) -> R {
        look(&mut self.0.lock().unwrap())
    }
}

impl Interceptor for Witness {
    fn call<T: Answer>(
        &self,
        _: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        enum Change {
            Set(SlotId, Live),
            Delete(SlotId),
            Clear(SlotId, Vec<u64>),
            Other,
        }
        let change = match &request {
            Request::SetMemorySlot(slot) => Change::Set(slot.id, Live::of(slot)),
            Request::DeleteMemorySlot(id) => Change::Delete(*id),
            Request::ClearDirtyLog { id, first, pages, bitmap } => {
                let set = |n: &u64| bitmap[(n / 64) as usize] >> (n % 64) & 1 != 0;
                let cleared = (0..u64::from(*pages)).filter(set).map(|n| first + n);
                Change::Clear(*id, cleared.collect())
            }
            _ => Change::Other,
        };
        let answer = real();
        self.with(|seen| {
            if let Err(error) = &answer {
                seen.complaints.push(format!("refused by KVM itself: {error}"));
                return;
            }
            match change {
                Change::Set(id, live) => {
                    let before = seen.slots.insert(id, live);
                    if live.logs && !before.is_some_and(|before| before.logs) {
                        seen.begun.push(live);
                    }
                }
                Change::Delete(id) => drop(seen.slots.remove(&id)),
                Change::Clear(id, pages) => {
                    let first = seen.slots[&id].first;
                    seen.cleared.extend(pages.iter().map(|page| first + page));
                }
                Change::Other => {}
            }
        });
        answer
    }
}
