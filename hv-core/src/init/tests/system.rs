//! Rows 0 to 11: from the page size to the task state segment.

use super::host::Host;
use crate::init::{
    Config, Consequence, InitErrorKind, Irqchip, MsiMode, StateIoctls, Step, VcpuLimits,
};
use crate::{Capability, DeviceChoice, Errno, Error, Ioctl, OpenError};

fn config() -> Config {
    Config::new(4096, 2)
}

#[test]
fn a_host_page_below_4_kib_is_an_error_before_anything_is_opened() {
    let host = Host::new();
    let error = host.refuses(&Config::new(2048, 1));
    assert_eq!(
        (error.step, &error.kind),
        (Step::PageSize, &InitErrorKind::PageSize { host: 2048 })
    );
    assert!(
        error.to_string().contains("2048 bytes are smaller than the guest's of 4096"),
        "{error}"
    );
    assert!(host.lines().is_empty());
    host.init(&Config::new(65536, 1)).expect("larger pages are fine");
}

#[test]
fn the_chosen_device_is_opened_once() {
    for (device, line) in [
        (DeviceChoice::default(), "open /dev/kvm"),
        (DeviceChoice::Path("/tmp/kvm".into()), "open /tmp/kvm"),
        (DeviceChoice::Fd(7), "open fd:7"),
    ] {
        let host = Host::new();
        let mut config = config();
        config.device = device;
        host.init(&config).unwrap();
        let lines = host.lines();
        assert_eq!(lines[0], line);
        assert_eq!(lines.iter().filter(|l| l.starts_with("open")).count(), 1);
    }
}

#[test]
fn an_open_error_says_what_to_do() {
    for (errno, text) in [
        (
            Errno::ENOENT,
            "ENOENT (No such file or directory); there is no such node: load the module",
        ),
        (Errno::EACCES, "EACCES (Permission denied); join the group that owns the node"),
        (Errno::ENODEV, "ENODEV (No such device); the node is there but no driver serves it"),
        (Errno::EBUSY, "EBUSY (Device or resource busy); another hypervisor holds"),
    ] {
        let host = Host::new().failing("open", errno);
        let error = host.refuses(&config());
        let open = OpenError { choice: DeviceChoice::default(), errno };
        assert_eq!((error.step, &error.kind), (Step::Open, &InitErrorKind::Open(open)));
        let start = format!("init step 1 (open the device): can't open /dev/kvm: {text}");
        assert!(error.to_string().starts_with(&start), "{error}");
        assert_eq!(host.lines(), ["open /dev/kvm"], "nothing to undo");
    }
}

#[test]
fn api_version_12_is_the_only_one() {
    assert_eq!(Host::new().init(&config()).unwrap().record().api_version, 12);
    for (version, kind, text) in [
        (11, InitErrorKind::ApiVersionTooOld(11), "API version 11 is too old"),
        (13, InitErrorKind::ApiVersionTooNew(13), "API version 13 is not supported"),
        (i32::MAX, InitErrorKind::ApiVersionTooNew(i32::MAX), "not supported"),
        (-1, InitErrorKind::ApiVersionTooOld(-1), "too old"),
    ] {
        let host = Host::new().with_api_version(version);
        let error = host.refuses(&config());
        assert_eq!((error.step, &error.kind), (Step::ApiVersion, &kind));
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(host.lines(), ["open /dev/kvm", "KVM_GET_API_VERSION", "hypervisor closed"]);
    }
}

#[test]
fn api_version_0_is_an_error_not_success() {
    let host = Host::new().with_api_version(0);
    let error = host.refuses(&config());
    assert_eq!(error.kind, InitErrorKind::ApiVersionTooOld(0));
    assert_eq!(host.lines().last().unwrap(), "hypervisor closed");
}

#[test]
fn a_failing_api_version_means_not_kvm() {
    let host = Host::new().failing("KVM_GET_API_VERSION", Errno::ENOTTY);
    let error = host.refuses(&config());
    let inner = Error::new(Ioctl::GetApiVersion, Errno::ENOTTY);
    assert_eq!((error.step, &error.kind), (Step::ApiVersion, &InitErrorKind::NotKvm(inner)));
    assert!(
        error.to_string().contains("the device is not KVM: KVM_GET_API_VERSION failed: ENOTTY")
    );
}

#[test]
fn vcpu_limits_fall_back_to_nr_vcpus_and_then_to_4() {
    // MAX_VCPUS, NR_VCPUS, MAX_VCPU_ID; hard, recommended, ids
    for (max, nr, id, hard, recommended, ids) in [
        (1024, 8, 4096, 1024, 8, 4096),
        (0, 8, 0, 8, 8, 8),
        (0, 0, 0, 4, 4, 4),
        (288, 0, 0, 288, 4, 288),
        (2, 8, 0, 2, 2, 2),
        (-1, -1, -1, 4, 4, 4),
    ] {
        let host = Host::new()
            .with(Capability::MaxVcpus, max)
            .with(Capability::NrVcpus, nr)
            .with(Capability::MaxVcpuId, id);
        let vm = host.init(&config()).unwrap();
        assert_eq!(vm.record().vcpus, VcpuLimits { hard, recommended, ids }, "{max} {nr} {id}");
    }
}

#[test]
fn too_many_vcpus_names_both_numbers() {
    let host = Host::new().with(Capability::MaxVcpus, 16);
    host.init(&Config::new(4096, 16)).expect("the limit itself is fine");
    let error = host.refuses(&Config::new(4096, 17));
    let kind = InitErrorKind::TooManyVcpus { asked: 17, limit: 16 };
    assert_eq!((error.step, &error.kind), (Step::VcpuLimits, &kind));
    let text = error.to_string();
    assert!(text.contains("17 vCPUs were asked for") && text.contains("at most 16"), "{text}");
    let lines = host.lines();
    assert_eq!(lines.iter().filter(|l| l.starts_with("KVM_CREATE_VM")).count(), 1, "{lines:?}");
}

#[test]
fn no_vcpus_is_an_error() {
    let error = Host::new().refuses(&Config::new(4096, 0));
    assert_eq!((error.step, &error.kind), (Step::VcpuLimits, &InitErrorKind::NoVcpus));
    assert!(error.to_string().contains("at least 1"));
}

#[test]
fn a_vcpu_id_at_the_limit_is_an_error() {
    let host = Host::new().with(Capability::MaxVcpuId, 64);
    let mut config = config();
    config.highest_vcpu_id = 63;
    host.init(&config).expect("the last id is fine");
    config.highest_vcpu_id = 64;
    let error = host.refuses(&config);
    let kind = InitErrorKind::VcpuIdTooHigh { asked: 64, limit: 64 };
    assert_eq!((error.step, &error.kind), (Step::VcpuLimits, &kind));
    assert!(error.to_string().contains("vCPU id 64") && error.to_string().contains("below 64"));
    // Ids without gaps reach the number of vCPUs, whatever the caller says of the highest.
    let error = host.refuses(&Config::new(4096, 65));
    assert_eq!(error.kind, InitErrorKind::VcpuIdTooHigh { asked: 64, limit: 64 });
}

#[test]
fn more_vcpus_than_recommended_is_a_consequence() {
    let consequences = |vcpus| {
        let vm = Host::new().init(&Config::new(4096, vcpus)).unwrap();
        vm.record().consequences.clone()
    };
    let many = Consequence::ManyVcpus { asked: 9, recommended: 8 };
    assert!(!consequences(8).iter().any(|c| matches!(c, Consequence::ManyVcpus { .. })));
    assert!(consequences(9).contains(&many));
    assert!(many.to_string().contains("9 vCPUs are more than the 8 recommended"));
}

#[test]
fn create_vm_retries_eintr_with_a_bound() {
    let host = Host::new().failing_times("KVM_CREATE_VM", 15, Errno::EINTR);
    let mut config = config();
    config.vm_type = 5;
    host.init(&config).expect("the 16th try succeeds");
    let lines = host.lines();
    assert_eq!(lines.iter().filter(|l| *l == "KVM_CREATE_VM 5").count(), 16);
}

#[test]
fn create_vm_gives_up_on_eintr() {
    let host = Host::new().failing("KVM_CREATE_VM", Errno::EINTR);
    let error = host.refuses(&config());
    assert_eq!(
        (error.step, &error.kind),
        (Step::CreateVm, &InitErrorKind::Interrupted { tries: 16 })
    );
    assert!(error.to_string().contains("EINTR) 16 times in a row"), "{error}");
    assert_eq!(host.lines().iter().filter(|l| l.starts_with("KVM_CREATE_VM")).count(), 16);
}

#[test]
fn a_vm_that_cant_be_created_names_the_errno() {
    for (errno, text) in [
        (Errno::ENOMEM, "ENOMEM (Cannot allocate memory); the host has too little memory"),
        (Errno::EBUSY, "EBUSY (Device or resource busy); another hypervisor"),
        (Errno::EMFILE, "EMFILE (Too many open files); raise the limit"),
    ] {
        let host = Host::new().failing("KVM_CREATE_VM", errno);
        let error = host.refuses(&config());
        let kind = InitErrorKind::Call(Error::new(Ioctl::CreateVm, errno));
        assert_eq!((error.step, &error.kind), (Step::CreateVm, &kind));
        let start = format!("init step 4 (create the VM): KVM_CREATE_VM failed: {text}");
        assert!(error.to_string().starts_with(&start), "{error}");
        let lines = host.lines();
        assert_eq!(lines[lines.len() - 2..], ["KVM_CREATE_VM 0", "hypervisor closed"]);
    }
}

const REQUIRED: [Capability; 7] = [
    Capability::UserMemory,
    Capability::DestroyMemoryRegionWorks,
    Capability::SetTssAddr,
    Capability::ExtCpuid,
    Capability::MpState,
    Capability::ImmediateExit,
    Capability::JoinMemoryRegionsWorks,
];

#[test]
fn all_missing_capabilities_are_reported_at_once_by_name() {
    let host = REQUIRED.iter().fold(Host::new(), |host, &cap| host.with(cap, 0));
    let error = host.refuses(&config());
    let InitErrorKind::MissingCapabilities(missing) = &error.kind else { panic!("{error}") };
    assert_eq!((error.step, missing.as_slice()), (Step::RequiredCapabilities, &REQUIRED[..]));
    let text = error.to_string();
    for cap in REQUIRED {
        let part =
            format!("{} (Linux has it since {}; {})", cap.name(), cap.since(), cap.absence());
        assert!(text.contains(&part), "{text}");
    }
    assert!(!text.contains("0x"), "no bit mask: {text}");
    let lines = host.lines();
    assert_eq!(lines[lines.len() - 2..], ["VM closed", "hypervisor closed"]);
}

#[test]
fn each_required_capability_is_required() {
    for cap in REQUIRED {
        let error = Host::new().with(cap, 0).refuses(&config());
        assert_eq!(error.kind, InitErrorKind::MissingCapabilities(vec![cap]));
    }
}

#[test]
fn join_is_required_unless_the_caller_accepts_its_absence() {
    let host = Host::new().with(Capability::JoinMemoryRegionsWorks, 0);
    let error = host.refuses(&config());
    assert!(error.to_string().contains("KVM_CAP_JOIN_MEMORY_REGIONS_WORKS"), "{error}");
    let mut config = config();
    config.accept_broken_memory_regions = true;
    let vm = host.init(&config).unwrap();
    assert!(!vm.record().joins_memory_regions);
    let lacks = Consequence::Lacks(Capability::JoinMemoryRegionsWorks);
    assert!(vm.record().consequences.contains(&lacks));
    assert!(Host::new().init(&config).unwrap().record().joins_memory_regions);
}

#[test]
fn capabilities_are_asked_of_the_vm_if_it_takes_the_question() {
    for (takes, scope) in [(1, "vm KVM_CAP_"), (0, "system KVM_CAP_")] {
        let host = Host::new().with(Capability::CheckExtensionVm, takes);
        host.init(&config()).unwrap();
        let lines = host.lines();
        let created = lines.iter().position(|l| l.starts_with("KVM_CREATE_VM")).unwrap();
        let asks = |l: &&String| l.contains(" KVM_CAP_") && !l.starts_with("KVM_");
        assert!(lines[..created].iter().filter(asks).all(|l| l.starts_with("system")));
        assert_eq!(lines[created + 1], "system KVM_CAP_CHECK_EXTENSION_VM");
        let after: Vec<_> = lines[created + 2..].iter().filter(asks).collect();
        assert!(after.len() > 20 && after.iter().all(|l| l.starts_with(scope)), "{after:?}");
    }
}

#[test]
fn the_coalesced_ring_is_a_page_index() {
    for (value, page) in [(2, Some(2)), (1, Some(1)), (0, None), (-1, None)] {
        let vm = Host::new().with(Capability::CoalescedMmio, value).init(&config()).unwrap();
        assert_eq!(vm.record().coalesced_page, page);
        assert_eq!(vm.record().capabilities.get(&Capability::CoalescedMmio), Some(&value));
    }
}

#[test]
fn memory_limits_are_recorded() {
    let host = Host::new().with(Capability::NrMemslots, 509).with(Capability::ReadonlyMem, 0);
    let vm = host.init(&config()).unwrap();
    assert_eq!((vm.record().nr_memslots, vm.record().readonly_memory), (509, false));
    let host = Host::new().with(Capability::NrMemslots, 0);
    let vm = host.init(&config()).unwrap();
    assert_eq!((vm.record().nr_memslots, vm.record().readonly_memory), (32, true));
}

#[test]
fn each_state_capability_sets_its_own_field() {
    type Field = fn(&StateIoctls) -> bool;
    let fields: [(Capability, Field); 6] = [
        (Capability::VcpuEvents, |s| s.vcpu_events),
        (Capability::X86RobustSinglestep, |s| s.robust_singlestep),
        (Capability::DebugRegs, |s| s.debugregs),
        (Capability::Xsave, |s| s.xsave),
        (Capability::Xcrs, |s| s.xcrs),
        (Capability::PitState2, |s| s.pit_state2),
    ];
    for (absent, _) in fields {
        let vm = Host::new().with(absent, 0).init(&config()).unwrap();
        for (cap, field) in fields {
            assert_eq!(field(&vm.record().state), cap != absent, "{cap} without {absent}");
        }
        assert!(vm.record().consequences.contains(&Consequence::Lacks(absent)));
    }
}

#[test]
fn msis_are_direct_or_need_dynamic_routes() {
    let host = Host::new();
    assert_eq!(host.init(&config()).unwrap().record().msi, MsiMode::Direct);
    let host = host.with(Capability::SignalMsi, 0);
    let vm = host.init(&config()).unwrap();
    assert_eq!(vm.record().msi, MsiMode::DynamicRoutes);
    let lacks = Consequence::Lacks(Capability::SignalMsi);
    assert!(vm.record().consequences.contains(&lacks));
    assert!(lacks.to_string().contains("an MSI needs a route"));
}

#[test]
fn intx_capabilities_set_their_own_fields() {
    for (pci_2_3, inject) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let host =
            Host::new().with(Capability::Pci23, pci_2_3).with(Capability::IrqInjectStatus, inject);
        let vm = host.init(&config()).unwrap();
        assert_eq!(vm.record().pci_2_3, pci_2_3 == 1);
        assert_eq!(vm.record().inject_status, inject == 1);
    }
}

fn msr_questions(host: &Host) -> Vec<String> {
    host.lines().into_iter().filter(|l| l.starts_with("KVM_GET_MSR_INDEX_LIST")).collect()
}

#[test]
fn the_msr_list_is_asked_for_with_no_room_then_with_enough() {
    let host = Host::new().with_msrs(vec![3]);
    assert_eq!(host.init(&config()).unwrap().record().msrs, [0x10, 0x11, 0x12]);
    assert_eq!(msr_questions(&host), ["KVM_GET_MSR_INDEX_LIST 0", "KVM_GET_MSR_INDEX_LIST 3"]);
    // It may grow, shrink or be empty.
    for (answers, questions, len) in [(vec![3, 5], 3, 5), (vec![5, 3], 2, 3), (vec![0], 1, 0)] {
        let host = Host::new().with_msrs(answers.clone());
        assert_eq!(host.init(&config()).unwrap().record().msrs.len(), len, "{answers:?}");
        assert_eq!(msr_questions(&host).len(), questions, "{answers:?}");
    }
}

#[test]
fn an_msr_list_that_keeps_growing_is_e2big() {
    let host = Host::new().with_msrs((1..100).collect::<Vec<_>>());
    let error = host.refuses(&config());
    let kind = InitErrorKind::Call(Error::new(Ioctl::GetMsrIndexList, Errno::E2BIG));
    assert_eq!((error.step, &error.kind), (Step::Arch, &kind));
    assert_eq!(msr_questions(&host).len(), 4);
}

#[test]
fn the_identity_map_moves_if_it_can_and_the_tss_follows() {
    for (cap, identity, tss) in [(1, 0xfeff_c000, 0xfeff_d000), (0, 0xfffb_c000, 0xfffb_d000)] {
        let host = Host::new().with(Capability::SetIdentityMapAddr, cap);
        let vm = host.init(&config()).unwrap();
        let reserved = vm.record().reserved;
        assert_eq!((reserved.identity_map, reserved.tss, reserved.len), (identity, tss, 0x4000));
        let lines = host.lines();
        let moved = lines.contains(&format!("KVM_SET_IDENTITY_MAP_ADDR {identity:#x}"));
        assert_eq!(moved, cap == 1);
        assert!(lines.contains(&format!("KVM_SET_TSS_ADDR {tss:#x}")));
    }
}

#[test]
fn mmu_pages_are_set_only_when_asked_for() {
    let host = Host::new();
    host.init(&config()).unwrap();
    assert!(!host.lines().iter().any(|l| l.starts_with("KVM_SET_NR_MMU_PAGES")));
    let mut config = config();
    config.nr_mmu_pages = Some(256);
    host.init(&config).unwrap();
    assert!(host.lines().contains(&"KVM_SET_NR_MMU_PAGES 256".to_owned()));
}

#[test]
fn arch_errors_name_the_ioctl_and_the_errno() {
    let mut config = config();
    config.nr_mmu_pages = Some(1);
    config.irqchip = Irqchip::Off;
    for ioctl in
        [Ioctl::GetMsrIndexList, Ioctl::SetIdentityMapAddr, Ioctl::SetTssAddr, Ioctl::SetNrMmuPages]
    {
        let host = Host::new().failing(ioctl.name(), Errno::EINVAL);
        let error = host.refuses(&config);
        let kind = InitErrorKind::Call(Error::new(ioctl, Errno::EINVAL));
        assert_eq!((error.step, &error.kind), (Step::Arch, &kind));
        let text = error.to_string();
        assert!(text.contains(&format!("{ioctl} failed: EINVAL (Invalid argument)")), "{text}");
        let lines = host.lines();
        assert_eq!(lines[lines.len() - 2..], ["VM closed", "hypervisor closed"]);
    }
}
