//! Every call of every flow fails with every errno it can give, on `/dev/kvm`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking and says what it did"
)]

mod sweep;

use std::io::{self, Write};
use std::sync::Arc;

use hv_core::{
    Call, Gsi, HostRange, Irqfd, LineStatus, MemorySlot, Msi, Route, RouteTarget, SlotFlags, Vcpu,
    Vm,
};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use hv_memory::{Mapping, page_size};
use sweep::{Counts, Host, Made};

struct DevKvm;

impl Host for DevKvm {
    type Vcpu = KvmVcpu;
    type Vm = KvmVm;
    type Hypervisor = Kvm;

    fn open(&self) -> Kvm {
        Kvm::open("/dev/kvm").unwrap_or_else(|error| panic!("this test needs KVM: {error}"))
    }

    /// KVM has no list of what it holds, but refuses what is there already.
    fn check_vm<V: Vm>(&self, vm: &V, made: &Made) {
        let memory = Arc::new(Mapping::anonymous(page_size()).unwrap());
        let host = HostRange::new(memory, 0, page_size() as usize).unwrap();
        for &(id, guest) in &made.slots {
            let error = vm.delete_memory_slot(id).unwrap_err();
            assert_eq!(error.errno, hv_core::Errno::EINVAL, "slot {id} was left");
            let flags = SlotFlags::default();
            let slot = MemorySlot { id, guest, host: host.clone(), flags };
            vm.set_memory_slot(&slot).unwrap();
            vm.delete_memory_slot(id).unwrap();
        }
        for event in &made.irqfds {
            let irqfd = Irqfd { event: event.clone(), gsi: Gsi(30), resample: None };
            vm.irqfd_assign(&irqfd).unwrap_or_else(|error| panic!("an irqfd was left: {error}"));
            vm.irqfd_deassign(event, Gsi(30)).unwrap();
        }
        if made.routes.is_some() {
            check_routes(vm);
        }
        for event in &made.ioevents {
            let error = vm.ioeventfd_deassign(event).unwrap_err();
            assert_eq!(error.errno, hv_core::Errno::ENOENT, "an ioeventfd was left");
        }
    }

    fn check_closed(&self, before: &Counts, _failed: Option<Call>) {
        assert_eq!(Counts::now(), *before);
    }

    fn counts(&self) -> Counts {
        Counts::now()
    }
}

/// No GSI beyond the pins leads anywhere. KVM does not show its table, but what comes of a line.
fn check_routes<V: Vm>(vm: &V) {
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut lapic = vcpu.lapic().unwrap();
    // Spurious interrupt vector register: enabled, vector 0xff.
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (-1, 1);
    vcpu.set_lapic(&lapic).unwrap();
    let raise = |gsi| vm.irq_line_status(Gsi(gsi), true).unwrap();
    for gsi in 24..64 {
        assert_eq!(raise(gsi), LineStatus::Ignored, "the route of GSI {gsi} was left");
    }
    // The same of a GSI that is routed: what was seen means something.
    let msi = Msi { address: 0xfee0_0000, data: 0x40, device: None };
    let route = Route { gsi: Gsi(24), target: RouteTarget::Msi(msi) };
    vm.set_gsi_routing(&[route]).unwrap();
    assert_eq!(raise(24), LineStatus::Delivered(1));
}

// The only test of this binary: it counts what the process has.
#[test]
fn nothing_is_left_whatever_fails() {
    let pairs = sweep::run(&DevKvm);
    // Past the capture of the test harness: how much was tried is the result.
    writeln!(
        io::stdout(),
        "fault sweep on /dev/kvm: {pairs} pairs of a call and an errno, nothing left"
    )
    .unwrap();
}
