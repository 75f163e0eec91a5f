//! What guests receive of the interrupts hv-irq routes, on the KVM in memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod irq;
#[path = "../../hv-core/tests/scripted/mod.rs"]
mod scripted;

use hv_core::EventFd;
use hv_core::fake::{FakeKvm, FakeVcpu, FakeVm, Finding, Loss};
use scripted::Scripted;

struct Fake(FakeKvm);

impl irq::Host for Fake {
    type Hypervisor = FakeKvm;
    type Guest = Scripted;

    fn open() -> Self {
        Self(FakeKvm::default())
    }

    fn hypervisor(&self) -> FakeKvm {
        self.0.clone()
    }

    fn guest(&self, vm: &FakeVm, vcpu: FakeVcpu) -> Scripted {
        Scripted::new(vm, vcpu).unwrap()
    }

    fn assert_unbound(&self, vm: &FakeVm, events: &[EventFd]) {
        let irqfds = vm.view().irqfds();
        assert!(!irqfds.iter().any(|irqfd| events.contains(&irqfd.event)), "{irqfds:?}");
    }

    fn check(&self) {
        let mut findings = self.0.findings();
        // Messages to nobody are sent, too, to see that nobody gets them.
        findings.retain(|f| !matches!(f, Finding::LostEvent { why: Loss::NoTarget, .. }));
        assert_eq!(findings, []);
    }
}

irq::scenarios!(Fake);
