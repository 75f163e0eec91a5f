//! `/dev/kvm` as a platform of the conformance suite.

mod code;
mod guest;
mod raw;

use std::fs;

use hv_core::conformance::{Checked, Platform, RawRequest};
use hv_core::{Errno, Hypervisor};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};

use self::guest::KvmGuest;

pub(crate) struct DevKvm {
    kvm: Kvm,
    /// As `uname -r` shows it.
    release: String,
}

impl DevKvm {
    pub(crate) fn open() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let kvm = crate::common::kvm();
        kvm.install_kick().unwrap();
        Self { kvm, release: release.trim().to_owned() }
    }
}

impl Platform for DevKvm {
    type Hypervisor = Kvm;
    type Guest = KvmGuest;

    fn name(&self) -> String {
        format!("/dev/kvm of Linux {}", self.release)
    }

    fn kernel(&self) -> Option<(u32, u32)> {
        let mut numbers = self.release.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    fn hypervisor(&self) -> &Kvm {
        &self.kvm
    }

    fn guest(&self, vm: &KvmVm, vcpu: KvmVcpu) -> Checked<KvmGuest> {
        KvmGuest::new(&self.kvm, vm, vcpu)
    }

    fn raw(&self, vm: &KvmVm, request: &RawRequest) -> Option<Result<(), Errno>> {
        raw::request(vm, request)
    }
}
