//! How often each call was made, and what is still held.

use std::collections::HashMap;
use std::fmt;

use crate::Call;

/// How often each call was made, failed ones included.
///
/// ```
/// use hv_core::fake::FakeKvm;
/// use hv_core::{Hypervisor, IrqBackend, Ioctl, Vm};
/// let kvm = FakeKvm::default();
/// let vm = kvm.create_vm(0)?;
/// vm.create_irqchip()?;
/// let before = kvm.calls();
/// vm.set_gsi_routing(&[])?;
/// let calls = kvm.calls().since(&before);
/// assert_eq!((calls.of(Ioctl::SetGsiRouting), calls.total()), (1, 1));
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallCounts(HashMap<Call, u64>);

impl CallCounts {
    pub(super) fn add(&mut self, call: Call) {
        let count = self.0.entry(call).or_default();
        *count = count.saturating_add(1);
    }

    /// How often `call` was made.
    #[must_use]
    pub fn of(&self, call: impl Into<Call>) -> u64 {
        self.0.get(&call.into()).copied().unwrap_or(0)
    }

    /// How many calls were made.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().fold(0, |sum, &n| sum.saturating_add(n))
    }

    /// The calls made since `earlier` was taken.
    #[must_use]
    pub fn since(&self, earlier: &CallCounts) -> CallCounts {
        let more = |(&call, &n): (&Call, &u64)| Some((call, n.saturating_sub(earlier.of(call))));
        CallCounts(self.0.iter().filter_map(more).filter(|&(_, n)| n > 0).collect())
    }

    /// Every call that was made and how often, by name.
    #[must_use]
    pub fn by_name(&self) -> Vec<(Call, u64)> {
        let mut all: Vec<_> = self.0.iter().map(|(&call, &n)| (call, n)).collect();
        all.sort_by_cached_key(|(call, _)| call.to_string());
        all
    }
}

impl fmt::Display for CallCounts {
    /// One call a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (call, n) in self.by_name() {
            writeln!(f, "{n:>8} {call}")?;
        }
        Ok(())
    }
}

/// What is still held, of one hypervisor: all of it 0 once everything is dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Live {
    /// Handles to the hypervisor ([`super::FakeKvm`]), the one that was asked included.
    pub hypervisors: usize,
    /// VMs: those of which the VM or a vCPU is held.
    pub vms: usize,
    /// vCPU handles. (The vCPU itself lives as long as its VM.)
    pub vcpus: usize,
    /// eventfds made by [`crate::Hypervisor::eventfd`].
    pub eventfds: usize,
    /// Memory slots.
    pub slots: usize,
    /// Assigned irqfds whose eventfds are held.
    pub irqfds: usize,
    /// Assigned ioeventfds.
    pub ioeventfds: usize,
    /// Coalesced zones.
    pub zones: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ioctl;

    #[test]
    fn counts_add_up_and_subtract() {
        let mut counts = CallCounts::default();
        counts.add(Ioctl::Run.into());
        let before = counts.clone();
        counts.add(Ioctl::Run.into());
        counts.add(Call::Eventfd);
        assert_eq!((counts.of(Ioctl::Run), counts.of(Call::Eventfd), counts.total()), (2, 1, 3));
        let since = counts.since(&before);
        assert_eq!(since.by_name(), [(Call::Ioctl(Ioctl::Run), 1), (Call::Eventfd, 1)]);
        assert_eq!(since.to_string(), "       1 KVM_RUN\n       1 eventfd\n");
        assert_eq!(before.since(&counts).total(), 0);
    }
}
