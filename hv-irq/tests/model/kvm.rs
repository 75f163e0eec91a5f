//! The KVM in memory under two layers: one makes the calls fail that a test chooses, the other sees
//! what arrives and complains of what a router should never ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use hv_core::fake::{FakeKvm, FakeVm};
use hv_core::layer::{Answer, Faults, Interceptor, Layered, LayeredVm, Object, Request};
use hv_core::{Error, EventFd, Gsi, Route};

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

/// Sees what arrives at the VMs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Witness(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    tables: BTreeMap<Object, Vec<Route>>,
    irqfds: BTreeMap<Object, BTreeSet<(EventFd, Gsi)>>,
    complaints: Vec<String>,
}

impl Witness {
    /// What KVM refused by itself, and what would cost time or lose events.
    pub(crate) fn complaints(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).complaints.clone()
    }
}

impl Interceptor for Witness {
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        enum Change {
            Table(Vec<Route>),
            Assign(EventFd, Gsi),
            Deassign(EventFd, Gsi),
            Other,
        }
        let change = match &request {
            Request::SetGsiRouting(routes) => Change::Table(routes.to_vec()),
            Request::IrqfdAssign(irqfd) => Change::Assign(irqfd.event.clone(), irqfd.gsi),
            Request::IrqfdDeassign { event, gsi } => Change::Deassign((*event).clone(), *gsi),
            _ => Change::Other,
        };
        let answer = real();
        let mut seen = self.0.lock().unwrap();
        let Seen { tables, irqfds, complaints } = &mut *seen;
        if let Err(error) = &answer {
            complaints.push(format!("refused by KVM itself: {error}"));
            return answer;
        }
        let irqfds = irqfds.entry(object).or_default();
        let routed = |table: &[Route], gsi| table.iter().any(|route| route.gsi == gsi);
        match change {
            Change::Table(table) => {
                for (_, gsi) in irqfds.iter().filter(|(_, gsi)| !routed(&table, *gsi)) {
                    complaints.push(format!("GSI {gsi} lost its route while it was bound"));
                }
                if tables.get(&object) == Some(&table) {
                    complaints.push("the table was written though it is the same".into());
                }
                tables.insert(object, table);
            }
            Change::Assign(event, gsi) => {
                if !tables.get(&object).is_some_and(|table| routed(table, gsi)) {
                    complaints.push(format!("GSI {gsi} was bound before it had a route"));
                }
                irqfds.insert((event, gsi));
            }
            Change::Deassign(event, gsi) => drop(irqfds.remove(&(event, gsi))),
            Change::Other => {}
        }
        answer
    }
}
