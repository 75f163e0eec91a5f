//! The hypervisor itself: what all its VMs share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::kvm_cpuid_entry2;
use rustix::event::{EventfdFlags, eventfd};

use super::state::Shared;
use super::{CallCounts, FakeHost, FakeVm, Finding, Live, VmView};
use crate::{Call, Capability, Context, Errno, Error, EventFd, Hypervisor, Ioctl, MsrIndexList};

/// How many findings are kept; a test that has more has seen enough.
const MAX_FINDINGS: usize = 10_000;

/// A KVM in memory. Clones are the same KVM.
///
/// Besides the trait it has what a test asks afterwards: how often each call was made, what is still
/// held, and what KVM let pass silently ([`Finding`]).
///
/// ```
/// use hv_core::fake::{FakeKvm, Finding, Leftover};
/// use hv_core::{Errno, Gsi, Hypervisor, IrqBackend, Irqfd, Vm};
///
/// let kvm = FakeKvm::default();
/// let vm = kvm.create_vm(0)?;
/// let irqfd = Irqfd { event: kvm.eventfd()?, gsi: Gsi(40), resample: None };
/// // The order KVM wants.
/// assert_eq!(vm.irqfd_assign(&irqfd).unwrap_err().errno, Errno::EINVAL);
/// vm.create_irqchip()?;
/// // What KVM does not check.
/// vm.irqfd_assign(&irqfd)?;
/// drop(vm);
/// assert_eq!(kvm.findings(), [
///     Finding::UnroutedIrqfd { gsi: Gsi(40) },
///     Finding::Left(Leftover::Irqfd(Gsi(40))),
/// ]);
/// assert_eq!(kvm.live().irqfds, 0);
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct FakeKvm {
    system: Arc<System>,
    /// Counts the handles.
    handle: Arc<()>,
}

/// What handles and VMs share. VMs hold this; it does not hold them.
#[derive(Debug)]
pub(super) struct System {
    pub(super) host: FakeHost,
    calls: Mutex<CallCounts>,
    findings: Mutex<Vec<Finding>>,
    vms: Mutex<Vec<Weak<Shared>>>,
    eventfds: Mutex<Vec<Weak<()>>>,
}

/// Nothing that can panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds to a list of what may go away, which is as long as what is still there, at most doubled.
fn remember<T>(list: &mut Vec<Weak<T>>, new: Weak<T>) {
    if list.len() == list.capacity() {
        list.retain(|item| item.strong_count() > 0);
    }
    list.push(new);
}

/// An eventfd as the project wants them.
pub(super) fn new_eventfd() -> Result<EventFd, Errno> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map(EventFd::from)
        .map_err(|errno| Errno(errno.raw_os_error()))
}

impl System {
    pub(super) fn count(&self, call: impl Into<Call>) {
        lock(&self.calls).add(call.into());
    }

    pub(super) fn found(&self, findings: impl IntoIterator<Item = Finding>) {
        let mut all = lock(&self.findings);
        let room = MAX_FINDINGS.saturating_sub(all.len());
        all.extend(findings.into_iter().take(room));
    }

    pub(super) fn vms(&self) -> Vec<Arc<Shared>> {
        lock(&self.vms).iter().filter_map(Weak::upgrade).filter(|vm| vm.is_open()).collect()
    }
}

impl Default for FakeKvm {
    /// On the default [`FakeHost`].
    fn default() -> Self {
        Self::new(FakeHost::default())
    }
}

impl FakeKvm {
    /// The KVM of a host.
    #[must_use]
    pub fn new(host: FakeHost) -> Self {
        let system = System {
            host,
            calls: Mutex::default(),
            findings: Mutex::default(),
            vms: Mutex::default(),
            eventfds: Mutex::default(),
        };
        Self { system: Arc::new(system), handle: Arc::new(()) }
    }

    /// How often each call was made, by all VMs and vCPUs together.
    #[must_use]
    pub fn calls(&self) -> CallCounts {
        lock(&self.system.calls).clone()
    }

    /// What is still held.
    #[must_use]
    pub fn live(&self) -> Live {
        let eventfds = lock(&self.system.eventfds);
        let mut live = Live {
            hypervisors: Arc::strong_count(&self.handle),
            eventfds: eventfds.iter().filter(|fd| fd.strong_count() > 0).count(),
            ..Live::default()
        };
        drop(eventfds);
        for vm in self.system.vms() {
            live.vms += 1;
            vm.with(|state| state.add_to(&mut live));
        }
        live
    }

    /// What KVM silently let pass, in the order it happened (the first 10,000).
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        self.settle();
        lock(&self.system.findings).clone()
    }

    /// The same, and forgets it.
    #[must_use]
    pub fn take_findings(&self) -> Vec<Finding> {
        self.settle();
        std::mem::take(&mut *lock(&self.system.findings))
    }

    /// The VMs there are, in the order they were created.
    #[must_use]
    pub fn vms(&self) -> Vec<VmView> {
        self.system.vms().into_iter().map(VmView::new).collect()
    }

    /// Delivers what has been signalled.
    fn settle(&self) {
        for vm in self.system.vms() {
            vm.with(|_| ());
        }
    }
}

impl Hypervisor for FakeKvm {
    type Vm = FakeVm;

    fn api_version(&self) -> Result<i32, Error> {
        self.system.count(Ioctl::GetApiVersion);
        Ok(self.system.host.api_version)
    }

    fn check_extension(&self, cap: Capability) -> Result<i32, Error> {
        self.system.count(Ioctl::CheckExtension);
        Ok(self.system.host.system_value(cap))
    }

    fn vcpu_mmap_size(&self) -> Result<usize, Error> {
        self.system.count(Ioctl::GetVcpuMmapSize);
        Ok(self.system.host.vcpu_mmap_size)
    }

    fn msr_index_list(&self, room: usize) -> Result<MsrIndexList, Error> {
        self.system.count(Ioctl::GetMsrIndexList);
        let msrs = &self.system.host.msrs;
        let indices = if msrs.len() <= room { msrs.clone() } else { Vec::new() };
        Ok(MsrIndexList { available: msrs.len(), indices })
    }

    fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        self.system.count(Ioctl::GetSupportedCpuid);
        Ok(self.system.host.cpuid.clone())
    }

    /// Only type 0 is known (`EINVAL`).
    fn create_vm(&self, vm_type: u64) -> Result<FakeVm, Error> {
        self.system.count(Ioctl::CreateVm);
        let refused = |errno| Error::new(Ioctl::CreateVm, errno).about(Context::None);
        if vm_type != 0 {
            return Err(refused(Errno::EINVAL));
        }
        let shared = Shared::new(&self.system).map_err(refused)?;
        remember(&mut lock(&self.system.vms), Arc::downgrade(&shared));
        Ok(FakeVm::new(shared))
    }

    /// A real one.
    fn eventfd(&self) -> Result<EventFd, Error> {
        self.system.count(Call::Eventfd);
        let event = new_eventfd().map_err(|errno| Error::new(Call::Eventfd, errno))?;
        remember(&mut lock(&self.system.eventfds), event.downgrade());
        Ok(event)
    }

    /// Nothing to install: a kick needs no signal here.
    fn install_kick(&self) -> Result<(), Error> {
        self.system.count(Call::Sigaction);
        Ok(())
    }
}
