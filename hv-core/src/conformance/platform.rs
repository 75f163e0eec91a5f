//! What an implementation must bring to be judged.

use super::{Guest, Miss, RawRequest};
use crate::{Errno, Hypervisor, Vm};

/// The VM of a platform.
pub type VmOf<P> = <<P as Platform>::Hypervisor as Hypervisor>::Vm;

/// The vCPU of a platform.
pub type VcpuOf<P> = <VmOf<P> as Vm>::Vcpu;

/// A hypervisor under test, and what the traits don't say about it.
pub trait Platform: Sized + 'static {
    /// The hypervisor.
    type Hypervisor: Hypervisor;
    /// What runs on its vCPUs.
    type Guest: Guest<Vcpu = VcpuOf<Self>>;

    /// What is judged, for the report: `"/dev/kvm of Linux 6.18.44"`.
    fn name(&self) -> String;

    /// The kernel whose rules it follows, as `(major, minor)`; `None` if it is not to be told
    /// from the newest.
    fn kernel(&self) -> Option<(u32, u32)>;

    /// The hypervisor.
    fn hypervisor(&self) -> &Self::Hypervisor;

    /// A guest on `vcpu`, which is a vCPU of `vm` that has not run, in the state [`Guest`] describes,
    /// also if it is not the boot vCPU and would wait to be started.
    ///
    /// # Errors
    /// A [`Miss`] that says what could not be set up.
    fn guest(&self, vm: &VmOf<Self>, vcpu: VcpuOf<Self>) -> Result<Self::Guest, Miss>;

    /// Makes a request that the traits can't express, or `None` if this platform can't either.
    fn raw(&self, vm: &VmOf<Self>, request: &RawRequest) -> Option<Result<(), Errno>>;
}
