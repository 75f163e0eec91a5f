//! What a guest finds in its memory while hv-memory changes its map, on `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "../../hv-kvm/tests/conformance/code.rs"]
mod code;
#[path = "../../hv-kvm/tests/common/mod.rs"]
mod common;
#[path = "../../hv-kvm/tests/conformance/guest.rs"]
mod guest;
mod memory_map;

use guest::KvmGuest;
use hv_core::{Hypervisor as _, Vm as _};
use hv_kvm::{Kvm, KvmVm};

struct DevKvm(Kvm);

impl memory_map::Host for DevKvm {
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

    fn guest(&self, vm: &KvmVm) -> KvmGuest {
        KvmGuest::new(&self.0, vm, vm.create_vcpu(0).unwrap()).unwrap()
    }

    /// KVM does not say what it let pass.
    fn check(&self) {}
}

memory_map::scenarios!(DevKvm);
