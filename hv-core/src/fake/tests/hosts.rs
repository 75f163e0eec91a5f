//! Hosts that differ: `init` on each irqchip, and what follows from a capability that is not there.

use kvm_bindings::{kvm_clock_data, kvm_pit_config};

use super::{errno, message, slot};
use crate::fake::{FakeHost, FakeKvm, FakeVm, Kind};
use crate::init::{Config, InitErrorKind, Irqchip, MsiMode, Step, init};
use crate::{
    Capability as C, CoalescedZone, Errno, Error, Gsi, Hypervisor, IoAddress, IoEvent,
    IoEventBackend, Ioctl, IrqBackend, Irqfd, MemoryBackend, SlotFlags, SlotId, Vcpu, Vm,
};

#[test]
fn init_on_every_irqchip() {
    for (irqchip, kind) in [
        (Irqchip::Off, None),
        (Irqchip::Kernel { pit: false }, Some(Kind::Full)),
        (Irqchip::Kernel { pit: true }, Some(Kind::Full)),
        (Irqchip::Split { pins: 24 }, Some(Kind::Split)),
    ] {
        let kvm = FakeKvm::default();
        let mut config = Config::new(4096, 2);
        config.irqchip = irqchip;
        config.probe_many_ioeventfds = true;
        config.slots = vec![slot(0, 0, SlotFlags::default())];
        let vm = init(|_| Ok(kvm.clone()), &config).unwrap();
        assert_eq!(vm.record().irqchip, irqchip);
        assert_eq!(vm.vm().view().irqchip(), kind);
        assert_eq!(vm.record().routing.is_some(), kind.is_some());
        assert_eq!(vm.record().coalesced_page, Some(2));
        assert_eq!(vm.record().vcpus.hard, 1024);
        assert_eq!(vm.vm().view().slots().len(), 1);
        assert!(vm.vm().view().ioeventfds().is_empty(), "the probe is undone");
        let live = kvm.live();
        assert_eq!((live.hypervisors, live.vms, live.slots, live.eventfds), (2, 1, 1, 0));
        drop(vm);
        assert_eq!((kvm.live().hypervisors, kvm.live().vms, kvm.live().slots), (1, 0, 0));
    }
}

#[test]
fn init_on_hosts_that_lack_something() {
    let start = |host: FakeHost, irqchip| {
        let mut config = Config::new(4096, 1);
        config.irqchip = irqchip;
        let kvm = FakeKvm::new(host);
        let vm = init(|_| Ok(kvm.clone()), &config);
        let record = vm.map(|vm| vm.record().clone());
        assert_eq!((kvm.live().hypervisors, kvm.live().vms, kvm.live().eventfds), (1, 0, 0));
        record
    };
    let kernel = Irqchip::Kernel { pit: true };

    let both = FakeHost::default().without(C::MpState).without(C::JoinMemoryRegionsWorks);
    let error = start(both, kernel).unwrap_err();
    assert_eq!(error.step, Step::RequiredCapabilities);
    let missing = [C::MpState, C::JoinMemoryRegionsWorks];
    assert!(matches!(error.kind, InitErrorKind::MissingCapabilities(all) if all == missing));

    let error = start(FakeHost::default().with_api_version(11), kernel).unwrap_err();
    assert!(matches!(error.kind, InitErrorKind::ApiVersionTooOld(11)));

    let no_split = FakeHost::default().without(C::SplitIrqchip);
    assert_eq!(start(no_split, Irqchip::Split { pins: 24 }).unwrap_err().step, Step::Irqchip);

    let record = start(FakeHost::default().without(C::SignalMsi), kernel).unwrap();
    assert_eq!(record.msi, MsiMode::DynamicRoutes);
    let record = start(FakeHost::default().without(C::IrqRouting), kernel).unwrap();
    assert!(record.routing.is_none());
    let record = start(FakeHost::default().with(C::IrqRouting, 1024), kernel).unwrap();
    assert_eq!(record.routing.map(|routing| routing.gsi_count), Some(1024));
    // The VM has the last word where it can be asked.
    let record = start(FakeHost::default().with_system(C::IrqRouting, 1024), kernel).unwrap();
    assert_eq!(record.routing.map(|routing| routing.gsi_count), Some(4096));
    let record = start(FakeHost::default().without(C::SetIdentityMapAddr), kernel).unwrap();
    assert_eq!(record.reserved.identity_map, 0xfffb_c000);
}

/// One call for each capability that stands for an ioctl.
#[test]
fn without_its_capability_an_ioctl_does_not_exist() {
    type Try = fn(&FakeKvm, &FakeVm) -> Result<(), Error>;
    let table: &[(C, Ioctl, Try)] = &[
        (C::CheckExtensionVm, Ioctl::CheckExtension, |_, vm| {
            Vm::check_extension(vm, C::Irqchip).map(|_| ())
        }),
        (C::EnableCapVm, Ioctl::EnableCap, |_, vm| vm.enable_cap(C::SplitIrqchip, [24, 0, 0, 0])),
        (C::SetIdentityMapAddr, Ioctl::SetIdentityMapAddr, |_, vm| vm.set_identity_map_addr(0)),
        (C::SetTssAddr, Ioctl::SetTssAddr, |_, vm| vm.set_tss_addr(0)),
        (C::Irqchip, Ioctl::CreateIrqchip, |_, vm| vm.create_irqchip()),
        (C::Pit2, Ioctl::CreatePit2, |_, vm| vm.create_pit2(kvm_pit_config::default())),
        (C::PitState2, Ioctl::GetPit2, |_, vm| vm.pit2().map(|_| ())),
        (C::AdjustClock, Ioctl::SetClock, |_, vm| vm.set_clock(&kvm_clock_data::default())),
        (C::IrqRouting, Ioctl::SetGsiRouting, |_, vm| vm.set_gsi_routing(&[])),
        (C::Irqfd, Ioctl::Irqfd, |kvm, vm| {
            vm.irqfd_assign(&Irqfd { event: kvm.eventfd()?, gsi: Gsi(0), resample: None })
        }),
        (C::IrqInjectStatus, Ioctl::IrqLineStatus, |_, vm| {
            vm.irq_line_status(Gsi(0), true).map(|_| ())
        }),
        (C::SignalMsi, Ioctl::SignalMsi, |_, vm| vm.signal_msi(message(0x40)).map(|_| ())),
        (C::CoalescedMmio, Ioctl::RegisterCoalescedMmio, |_, vm| {
            vm.register_coalesced_zone(CoalescedZone { address: IoAddress::Mmio(0), size: 1 })
        }),
        (C::Ioeventfd, Ioctl::Ioeventfd, |kvm, vm| {
            let (address, event) = (IoAddress::Pio(1), kvm.eventfd()?);
            vm.ioeventfd_assign(&IoEvent { address, length: 1, datamatch: None, event })
        }),
        (C::ManualDirtyLogProtect2, Ioctl::ClearDirtyLog, |_, vm| {
            vm.clear_dirty_log(SlotId(0), 0, 64, &[0])
        }),
        (C::VcpuEvents, Ioctl::GetVcpuEvents, |_, vm| vm.create_vcpu(0)?.vcpu_events().map(|_| ())),
        (C::Xcrs, Ioctl::GetXcrs, |_, vm| vm.create_vcpu(0)?.xcrs().map(|_| ())),
        (C::DebugRegs, Ioctl::GetDebugregs, |_, vm| vm.create_vcpu(0)?.debugregs().map(|_| ())),
        (C::GetTscKhz, Ioctl::GetTscKhz, |_, vm| vm.create_vcpu(0)?.tsc_khz().map(|_| ())),
    ];
    for &(cap, ioctl, attempt) in table {
        let kvm = FakeKvm::new(FakeHost::default().without(cap));
        let vm = kvm.create_vm(0).unwrap();
        let error = attempt(&kvm, &vm).unwrap_err();
        assert_eq!((error.call, error.errno), (ioctl.into(), Errno::ENOTTY), "{cap}");
        assert_eq!(kvm.calls().of(ioctl), 1, "it was tried all the same");
        let with = FakeKvm::default();
        let answer = attempt(&with, &with.create_vm(0).unwrap());
        assert_ne!(errno(answer), Err(Errno::ENOTTY), "{cap}");
    }
}

#[test]
fn without_its_capability_a_flag_is_unknown() {
    let kvm = FakeKvm::new(
        FakeHost::default()
            .without(C::ReadonlyMem)
            .without(C::IrqfdResample)
            .without(C::IoeventfdAnyLength),
    );
    let vm = kvm.create_vm(0).unwrap();
    vm.create_irqchip().unwrap();
    let rom = slot(0, 0, SlotFlags { readonly: true, log_dirty: false });
    assert_eq!(errno(vm.set_memory_slot(&rom)), Err(Errno::EINVAL));
    let (event, resample) = (kvm.eventfd().unwrap(), kvm.eventfd().ok());
    let irqfd = Irqfd { event, gsi: Gsi(4), resample };
    assert_eq!(errno(vm.irqfd_assign(&irqfd)), Err(Errno::EINVAL));
    let (address, event) = (IoAddress::Pio(1), kvm.eventfd().unwrap());
    let any = IoEvent { address, length: 0, datamatch: None, event };
    assert_eq!(errno(vm.ioeventfd_assign(&any)), Err(Errno::EINVAL));
}

#[test]
fn limits_follow_the_values() {
    let host = FakeHost::default()
        .with(C::NrMemslots, 2)
        .with(C::MaxVcpus, 1)
        .with(C::NrVcpus, 1)
        .with_io_devices(3);
    let vm = FakeKvm::new(host).create_vm(0).unwrap();
    assert_eq!(errno(vm.set_memory_slot(&slot(2, 0, SlotFlags::default()))), Err(Errno::EINVAL));
    assert_eq!(errno(vm.set_memory_slot(&slot(1, 0, SlotFlags::default()))), Ok(()));
    let _vcpu = vm.create_vcpu(5).unwrap();
    assert_eq!(errno(vm.create_vcpu(6).map(|_| ())), Err(Errno::EINVAL));
    for n in 0..4 {
        let zone = CoalescedZone { address: IoAddress::Mmio(n * 16), size: 8 };
        let answer = if n < 3 { Ok(()) } else { Err(Errno::ENOSPC) };
        assert_eq!(errno(vm.register_coalesced_zone(zone)), answer);
    }
}

#[test]
fn the_system_answers_as_it_is_told() {
    let host = FakeHost::default().with_msrs(vec![0x10, 0x174, 0x175]).with_tsc_khz(42);
    let kvm = FakeKvm::new(host.with_cpuid(Vec::new()));
    assert_eq!(kvm.msr_index_list(2).map(|list| (list.available, list.indices.len())), Ok((3, 0)));
    assert_eq!(kvm.msr_index_list(3).map(|list| list.indices), Ok(vec![0x10, 0x174, 0x175]));
    assert!(kvm.supported_cpuid().unwrap().is_empty());
    assert_eq!(kvm.vcpu_mmap_size(), Ok(12288));
    let vcpu = kvm.create_vm(0).unwrap().create_vcpu(0).unwrap();
    assert_eq!(vcpu.tsc_khz(), Ok(42));
}
