//! All rows together: the order of the calls, and each of them failing in turn.

use std::collections::BTreeSet;

use super::host::Host;
use crate::Errno;
use crate::init::{Config, InitErrorKind, Irqchip};

/// A configuration that uses every step.
fn everything(irqchip: Irqchip) -> Config {
    let mut config = Config::new(4096, 1);
    config.irqchip = irqchip;
    config.nr_mmu_pages = Some(64);
    config.probe_many_ioeventfds = true;
    config
}

const IRQCHIPS: [Irqchip; 3] =
    [Irqchip::Off, Irqchip::Kernel { pit: true }, Irqchip::Split { pins: 24 }];

#[test]
fn the_whole_sequence_in_its_order() {
    let host = Host::new();
    let vm = host.init(&Config::new(4096, 1)).unwrap();
    assert_eq!(
        host.lines(),
        [
            "open /dev/kvm",
            "KVM_GET_API_VERSION",
            "system KVM_CAP_MAX_VCPUS",
            "system KVM_CAP_NR_VCPUS",
            "system KVM_CAP_MAX_VCPU_ID",
            "KVM_CREATE_VM 0",
            "system KVM_CAP_CHECK_EXTENSION_VM",
            "vm KVM_CAP_USER_MEMORY",
            "vm KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
            "vm KVM_CAP_SET_TSS_ADDR",
            "vm KVM_CAP_EXT_CPUID",
            "vm KVM_CAP_MP_STATE",
            "vm KVM_CAP_IMMEDIATE_EXIT",
            "vm KVM_CAP_JOIN_MEMORY_REGIONS_WORKS",
            "vm KVM_CAP_COALESCED_MMIO",
            "vm KVM_CAP_NR_MEMSLOTS",
            "vm KVM_CAP_READONLY_MEM",
            "vm KVM_CAP_VCPU_EVENTS",
            "vm KVM_CAP_X86_ROBUST_SINGLESTEP",
            "vm KVM_CAP_DEBUGREGS",
            "vm KVM_CAP_XSAVE",
            "vm KVM_CAP_XCRS",
            "vm KVM_CAP_PIT_STATE2",
            "vm KVM_CAP_SIGNAL_MSI",
            "vm KVM_CAP_PCI_2_3",
            "vm KVM_CAP_IRQ_INJECT_STATUS",
            "KVM_GET_MSR_INDEX_LIST 0",
            "KVM_GET_MSR_INDEX_LIST 3",
            "vm KVM_CAP_SET_IDENTITY_MAP_ADDR",
            "KVM_SET_IDENTITY_MAP_ADDR 0xfeffc000",
            "KVM_SET_TSS_ADDR 0xfeffd000",
            "vm KVM_CAP_IRQCHIP",
            "KVM_CREATE_IRQCHIP",
            "vm KVM_CAP_PIT2",
            "KVM_CREATE_PIT2 flags 1",
            "vm KVM_CAP_IRQ_ROUTING",
            "vm KVM_CAP_IRQFD",
            "vm KVM_CAP_IRQFD_RESAMPLE",
            "vm KVM_CAP_IOEVENTFD",
            "install kick",
        ]
    );
    drop(vm);
}

#[test]
fn no_capability_is_asked_for_twice() {
    for irqchip in IRQCHIPS {
        for accept_broken_memory_regions in [false, true] {
            let host = Host::new();
            let config = Config { accept_broken_memory_regions, ..everything(irqchip) };
            let vm = host.init(&config).unwrap();
            let is_question = |l: &String| l.starts_with("vm ") || l.starts_with("system ");
            let asked: Vec<_> = host.lines().into_iter().filter(is_question).collect();
            let distinct: BTreeSet<_> = asked.iter().map(|l| l.split(' ').nth(1)).collect();
            assert_eq!(asked.len(), distinct.len(), "{asked:?}");
            assert_eq!(asked.len(), vm.record().capabilities.len());
        }
    }
}

#[test]
fn every_call_fails_in_turn_and_everything_is_undone() {
    for irqchip in IRQCHIPS {
        let config = everything(irqchip);
        let host = Host::new();
        let vm = host.init(&config).unwrap();
        let flow = host.lines();
        drop(vm);
        for (index, line) in flow.iter().enumerate() {
            let host = Host::new().failing_at(index, Errno::EIO);
            let result = host.init(&config);
            let lines = host.lines();
            if line == "eventfd" || line.starts_with("KVM_IOEVENTFD") {
                assert!(result.is_ok(), "{line}: the probe is never an error");
                drop(result);
            } else {
                let error = result.expect_err(line);
                assert_eq!(lines[..=index], flow[..=index]);
                let created = flow[..index].iter().any(|l| l.starts_with("KVM_CREATE_VM"));
                let undone: &[&str] = match (index, created) {
                    (0, _) => &[],
                    (_, false) => &["hypervisor closed"],
                    (_, true) => &["VM closed", "hypervisor closed"],
                };
                assert_eq!(lines[index + 1..], *undone, "after {line}");
                let text = error.to_string();
                let call = match line.split_once(' ') {
                    Some(("vm" | "system", cap)) => format!("KVM_CHECK_EXTENSION of {cap} failed"),
                    Some(("open", device)) => format!("can't open {device}"),
                    Some(("install", _)) => "sigaction of the kick signal failed".into(),
                    _ => line.split(' ').next().unwrap().to_owned(),
                };
                assert!(text.contains(&call), "{line}: {text}");
                assert!(text.contains("EIO (Input/output error)"), "{line}: {text}");
                let at = format!("init step {} ({})", error.step.number(), error.step.what());
                assert!(text.starts_with(&at), "{text}");
                assert!(!matches!(error.kind, InitErrorKind::MissingCapabilities(_)), "{text}");
            }
            assert!(host.eventfds().1, "an eventfd is open after {line}");
        }
    }
}

#[test]
fn a_vm_is_closed_before_its_hypervisor() {
    let host = Host::new();
    let vm = host.init(&Config::new(4096, 1)).unwrap();
    host.lines();
    drop(vm);
    assert_eq!(host.lines(), ["VM closed", "hypervisor closed"]);
}
