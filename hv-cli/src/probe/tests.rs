use super::*;
use hv_core::init::InitErrorKind;
use hv_core::mock::{MockHypervisor, MockVm};
use hv_core::{Capability, Errno, Ioctl, MsrIndexList, Scope};
use serde_json::Value;

/// What the system answers; [`MISSING`] is what no VM or system here has.
const ON_SYSTEM: i32 = 7;
/// What a VM answers.
const ON_VM: i32 = 5;
const MISSING: Capability = Capability::Xsave2;

fn answer(cap: Capability, value: i32) -> Result<i32, Error> {
    Ok(if cap == MISSING { 0 } else { value })
}

fn vm() -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm.expect_check_extension().returning(|cap| answer(cap, ON_VM));
    vm.expect_set_identity_map_addr().returning(|_| Ok(()));
    vm.expect_set_tss_addr().returning(|_| Ok(()));
    vm.expect_create_irqchip().returning(|| Ok(()));
    vm.expect_create_pit2().returning(|_| Ok(()));
    vm.expect_ioeventfd_assign().returning(|_| Ok(()));
    vm.expect_ioeventfd_deassign().returning(|_| Ok(()));
    vm
}

/// A KVM that answers everything it was not told to answer otherwise.
fn answering(mut system: MockHypervisor) -> MockHypervisor {
    system.expect_api_version().returning(|| Ok(12));
    system.expect_check_extension().returning(|cap| answer(cap, ON_SYSTEM));
    let msrs = MsrIndexList { available: 2, indices: vec![0x10, 0x174] };
    system.expect_msr_index_list().returning(move |_| Ok(msrs.clone()));
    system.expect_eventfd().returning(|| {
        Ok(rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap().into())
    });
    system.expect_install_kick().returning(|| Ok(()));
    system.expect_create_vm().returning(|_| Ok(vm()));
    system
}

fn working(_: &DeviceChoice) -> Result<MockHypervisor, OpenError> {
    let mut system = MockHypervisor::new();
    system.expect_vcpu_mmap_size().returning(|| Ok(12288));
    Ok(answering(system))
}

/// A KVM that makes no VM. The first expectation is the one that counts.
fn busy(_: &DeviceChoice) -> Result<MockHypervisor, OpenError> {
    let mut system = MockHypervisor::new();
    system.expect_create_vm().returning(|_| Err(Error::new(Ioctl::CreateVm, Errno::EBUSY)));
    Ok(answering(system))
}

type Open = fn(&DeviceChoice) -> Result<MockHypervisor, OpenError>;

fn as_json(open: Open) -> (ExitCode, Value) {
    let mut out = Vec::new();
    let code = probe(open, &DeviceChoice::default(), true, &mut out).unwrap();
    (code, serde_json::from_slice(&out).unwrap())
}

fn as_text(open: Open) -> String {
    let mut out = anstream::StripStream::new(Vec::new());
    probe(open, &DeviceChoice::default(), false, &mut out).unwrap();
    String::from_utf8(out.into_inner()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn every_capability_is_reported_with_both_answers() {
    let (code, report) = as_json(working);
    assert_eq!(code, ExitCode::Success);
    let caps = report["capabilities"].as_array().unwrap();
    assert_eq!(caps.len(), Capability::ALL.len());
    for (cap, json) in Capability::ALL.iter().zip(caps) {
        assert_eq!(json["name"], cap.name());
        assert_eq!(json["number"], cap.number());
        assert_eq!(json["since"], cap.since());
        let (value, vm_value) = match cap {
            &MISSING => (0, Value::from(0)),
            cap if cap.scope() == Scope::Vm => (ON_VM, Value::from(ON_VM)),
            _ => (ON_SYSTEM, Value::Null),
        };
        assert_eq!((&json["value"], &json["vm_value"]), (&value.into(), &vm_value), "{cap}");
        let absence = if *cap == MISSING { Value::from(cap.absence()) } else { Value::Null };
        assert_eq!(json["consequence"], absence, "{cap}");
    }
}

#[test]
fn the_record_and_the_limits() {
    let (_, report) = as_json(working);
    assert_eq!((&report["schema"], &report["device"]), (&1.into(), &"/dev/kvm".into()));
    assert_eq!(report["init"]["irqchip"]["kind"], "kernel");
    assert_eq!(report["init"]["irqchip"]["pit"], true);
    assert_eq!(report["init"]["routing"]["gsi_count"], ON_VM);
    assert_eq!(report["init"]["many_ioeventfds"], true);
    assert_eq!(report["init"]["msrs"], serde_json::json!([0x10, 0x174]));
    assert_eq!(report["init_error"], Value::Null);
    assert_eq!(report["limits"]["vcpus"], ON_SYSTEM);
    assert_eq!(report["limits"]["memory_slots"], ON_VM);
    assert_eq!(report["limits"]["msrs"], 2);
    assert_eq!(report["limits"]["vcpu_mmap_size"], 12288);
}

#[test]
fn the_schema_has_these_fields() {
    let (_, report) = as_json(working);
    assert_eq!(keys(&report), ["capabilities", "device", "init", "init_error", "limits", "schema"]);
    assert_eq!(
        keys(&report["limits"]),
        [
            "gsis",
            "memory_slots",
            "msrs",
            "recommended_vcpus",
            "vcpu_ids",
            "vcpu_mmap_size",
            "vcpus"
        ]
    );
    assert_eq!(
        keys(&report["capabilities"][0]),
        ["consequence", "name", "number", "scope", "since", "system_value", "value", "vm_value"]
    );
    assert_eq!(
        keys(&report["init"]),
        [
            "api_version",
            "coalesced_page",
            "consequences",
            "inject_status",
            "ioeventfds",
            "irqchip",
            "irqfds",
            "joins_memory_regions",
            "many_ioeventfds",
            "msi",
            "msrs",
            "pci_2_3",
            "readonly_memory",
            "reserved",
            "routing",
            "state",
        ]
    );
}

#[test]
fn a_kvm_that_makes_no_vm_is_still_asked() {
    let (code, report) = as_json(busy);
    assert_eq!(code, ExitCode::Vmm);
    assert_eq!((&report["init"], &report["limits"]), (&Value::Null, &Value::Null));
    assert!(report["init_error"].as_str().unwrap().contains("KVM_CREATE_VM failed: EBUSY"));
    let irqchip = &report["capabilities"][0];
    assert_eq!((&irqchip["value"], &irqchip["vm_value"]), (&ON_SYSTEM.into(), &Value::Null));
    let text = as_text(busy);
    assert!(text.contains("No VM can be made:") && text.contains("EBUSY"), "{text}");
}

#[test]
fn the_table_fits_80_columns_and_says_what_is_missing() {
    for open in [working as Open, busy] {
        let text = as_text(open);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
            assert_eq!(line, line.trim_end());
        }
        for cap in Capability::ALL {
            assert!(text.contains(cap.name()), "{cap}");
        }
        assert!(text.contains(MISSING.absence()), "{text}");
        assert!(!text.contains(Capability::Irqchip.absence()), "it is there");
    }
    let text = as_text(working);
    assert!(text.contains("vm; system: 7"), "answers that differ are both shown: {text}");
}

#[test]
fn a_device_that_can_not_be_used_is_the_error_of_init() {
    let missing = |choice: &DeviceChoice| {
        Err::<MockHypervisor, _>(OpenError { choice: choice.clone(), errno: Errno::ENOENT })
    };
    let mut out = Vec::new();
    let error = probe(missing, &DeviceChoice::default(), false, &mut out).unwrap_err();
    assert!(error.to_string().contains("can't open /dev/kvm: ENOENT"), "{error}");
    assert!(out.is_empty());

    let old = |_: &DeviceChoice| {
        let mut system = MockHypervisor::new();
        system.expect_api_version().returning(|| Ok(0));
        Ok(system)
    };
    let error = probe(old, &DeviceChoice::default(), false, &mut out).unwrap_err();
    let ProbeError::Init(error) = error else { panic!("{error}") };
    assert_eq!(error.kind, InitErrorKind::ApiVersionTooOld(0));
}

#[test]
fn a_question_that_fails_is_an_error_not_a_zero() {
    let failing = |_: &DeviceChoice| {
        let mut system = MockHypervisor::new();
        system
            .expect_vcpu_mmap_size()
            .returning(|| Err(Error::new(Ioctl::GetVcpuMmapSize, Errno::EIO)));
        Ok(answering(system))
    };
    let error = probe(failing, &DeviceChoice::default(), true, &mut Vec::new()).unwrap_err();
    assert!(matches!(error, ProbeError::Call(Error { errno: Errno::EIO, .. })), "{error}");
}
