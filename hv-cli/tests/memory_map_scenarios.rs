//! What a guest finds in its memory while hv-memory changes its map, on the KVM in memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod memory_map;
#[path = "../../hv-core/tests/scripted/mod.rs"]
mod scripted;

use hv_core::Vm as _;
use hv_core::fake::{FakeKvm, FakeVm, Finding, Leftover};
use scripted::Scripted;

struct Fake(FakeKvm);

impl memory_map::Host for Fake {
    type Hypervisor = FakeKvm;
    type Guest = Scripted;

    fn open() -> Self {
        Self(FakeKvm::default())
    }

    fn hypervisor(&self) -> FakeKvm {
        self.0.clone()
    }

    fn guest(&self, vm: &FakeVm) -> Scripted {
        Scripted::new(vm, vm.create_vcpu(0).unwrap()).unwrap()
    }

    fn check(&self) {
        let mut findings = self.0.findings();
        // The slots of a map go with its VM.
        findings.retain(|finding| !matches!(finding, Finding::Left(Leftover::Slot(_))));
        assert_eq!(findings, []);
    }
}

memory_map::scenarios!(Fake);
