//! `/dev/kvm`, with guests that do what a test tells them: those of hv-kvm's conformance test.

#[path = "../../../hv-kvm/tests/conformance/code.rs"]
mod code;
#[path = "../../../hv-kvm/tests/conformance/guest.rs"]
mod guest;

use hv_core::{EventFd, Gsi, Hypervisor as _, IrqBackend as _, Irqfd};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};

use self::guest::KvmGuest;
use crate::{common, irq};

pub(crate) struct DevKvm(Kvm);

impl irq::Host for DevKvm {
    type Hypervisor = Kvm;
    type Guest = KvmGuest;

    fn open() -> Self {
        let kvm = common::kvm();
        kvm.install_kick().unwrap();
        Self(kvm)
    }

    fn hypervisor(&self) -> Kvm {
        common::kvm()
    }

    fn guest(&self, vm: &KvmVm, vcpu: KvmVcpu) -> KvmGuest {
        KvmGuest::new(&self.0, vm, vcpu).unwrap()
    }

    /// KVM has no list of them, but refuses to take one twice.
    fn assert_unbound(&self, vm: &KvmVm, events: &[EventFd]) {
        let no_route = Gsi(4095);
        for event in events {
            // What it was signalled with would go nowhere.
            let _ = event.take();
            let irqfd = Irqfd { event: event.clone(), gsi: no_route, resample: None };
            vm.irqfd_assign(&irqfd).unwrap_or_else(|error| panic!("an irqfd was left: {error}"));
            vm.irqfd_deassign(event, no_route).unwrap();
        }
    }

    /// KVM does not say what it let pass.
    fn check(&self) {}
}
