//! Every call of every flow fails with every errno it can give, on the KVM in memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and says what it did"
)]

mod sweep;

use std::cell::RefCell;
use std::io::{self, Write};

use hv_core::fake::{FakeKvm, FakeVcpu, FakeVm, Finding, Live};
use hv_core::{Call, Ioctl, Vm};
use sweep::{Counts, Host, Made};

#[derive(Default)]
struct Fake(RefCell<FakeKvm>);

impl Host for Fake {
    type Vcpu = FakeVcpu;
    type Vm = FakeVm;
    type Hypervisor = FakeKvm;

    fn open(&self) -> FakeKvm {
        *self.0.borrow_mut() = FakeKvm::default();
        self.0.borrow().clone()
    }

    fn check_vm<V: Vm>(&self, _vm: &V, made: &Made) {
        let kvm = self.0.borrow();
        let vms = kvm.vms();
        let [view] = vms.as_slice() else { panic!("{} VMs", vms.len()) };
        assert_eq!(view.slots(), [], "slots are left");
        assert_eq!(view.irqfds(), [], "irqfds are left");
        assert_eq!(view.ioeventfds(), [], "ioeventfds are left");
        assert_eq!(view.coalesced_zones(), [], "zones are left");
        if let Some(expected) = &made.routes {
            let (mut routes, mut expected) = (view.routes(), expected.clone());
            routes.sort_unstable();
            expected.sort_unstable();
            assert_eq!(routes, expected, "routes are left, or gone");
        }
        assert_eq!(kvm.findings(), [], "KVM let something pass");
    }

    fn check_closed(&self, before: &Counts, failed: Option<Call>) {
        let kvm = self.0.borrow();
        assert_eq!(kvm.live(), Live { hypervisors: 1, ..Live::default() });
        let meant = |finding: &Finding| match finding {
            // What the end of a VM takes with it was left on purpose.
            Finding::Left(_) => true,
            // An irqfd that could not be unbound, or was bound again because its route could not be
            // removed, goes when its eventfd does.
            Finding::ClosedIrqfd { .. } => {
                let unbinding = [Ioctl::Irqfd, Ioctl::SetGsiRouting].map(Call::Ioctl);
                failed.is_some_and(|call| unbinding.contains(&call))
            }
            _ => false,
        };
        let findings = kvm.findings();
        assert!(findings.iter().all(meant), "{failed:?}: KVM let something pass: {findings:?}");
        assert_eq!(Counts::now(), *before);
    }

    fn counts(&self) -> Counts {
        Counts::now()
    }
}

#[test]
fn nothing_is_left_whatever_fails() {
    let pairs = sweep::run(&Fake::default());
    // Past the capture of the test harness: how much was tried is the result.
    writeln!(
        io::stdout(),
        "fault sweep on the KVM in memory: {pairs} pairs of a call and an errno, nothing left"
    )
    .unwrap();
}
