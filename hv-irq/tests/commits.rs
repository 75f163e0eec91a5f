#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]
//! How many tables KVM is given, as it counts them: one for whatever changes at once.

mod common;

use common::{Machine, msi};
use hv_core::fake::FakeKvm;
use hv_irq::{IrqRouter, LegacyPins, MsiVectors};

#[test]
fn any_number_of_vectors_is_one_table_and_none_if_nothing_differs() {
    for n in [1, 8, 256, 2048] {
        for pins in [LegacyPins::Kernel, LegacyPins::Userspace] {
            let kvm = FakeKvm::default();
            let machine = Machine::new(&kvm, pins);
            let router = machine.router();
            let mut before = machine.tables();
            let mut written = |machine: &Machine| {
                let now = machine.tables();
                now - std::mem::replace(&mut before, now)
            };
            let mut vectors = MsiVectors::new(&router, machine.events(n));
            let to = |vectors: &mut MsiVectors<_>, vcpu| {
                vectors
                    .change(|change| {
                        change.enable();
                        (0..n).try_for_each(|i| {
                            change.retarget(i, msi(vcpu, 0x40))?;
                            change.unmask(i)
                        })
                    })
                    .unwrap();
            };
            assert_eq!(written(&machine), 0, "nothing is routed before it is unmasked");
            to(&mut vectors, 0);
            assert_eq!(written(&machine), 1, "{n} enabled");
            to(&mut vectors, 0);
            assert_eq!(written(&machine), 0, "{n} to where they were");
            to(&mut vectors, 1);
            assert_eq!(written(&machine), 1, "{n} retargeted");
            vectors.change(|change| (0..n).try_for_each(|i| change.mask(i))).unwrap();
            vectors.change(|change| (0..n).try_for_each(|i| change.unmask(i))).unwrap();
            assert_eq!(written(&machine), 0, "{n} masked and unmasked");

            let states = (router.save(), vectors.save().unwrap());
            let other = Machine::new(&kvm, pins);
            let mut restored =
                IrqRouter::restore(other.vm.clone(), other.config, &states.0).unwrap();
            let twin = restored.vectors(&states.1, other.events(n)).unwrap();
            let second = restored.finish().unwrap();
            assert_eq!(written(&machine), 1, "{n} restored");
            assert_eq!(other.view.irqfds().len(), n);
            drop((twin, second));
            assert_eq!(written(&machine), 1, "{n} dropped");

            let third = Machine::new(&kvm, pins);
            router.rebuild(third.vm.clone()).unwrap();
            assert_eq!(written(&machine), 1, "{n} moved");
            vectors.disable().unwrap();
            assert_eq!(written(&machine), 1, "{n} disabled");
            assert!(router.allocated().is_empty());
            assert_eq!(kvm.findings(), []);
        }
    }
}
