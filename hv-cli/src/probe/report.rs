//! What `hv probe` found, in the shape of its JSON.

use hv_core::init::{InitError, Irqchip, ManyIoeventfds, MsiMode, Record};
use hv_core::{Capability, Error, Hypervisor, Vm};
use serde::Serialize;

/// The whole report. Its fields are documented in [`super`].
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub schema: u32,
    pub device: String,
    pub limits: Option<Limits>,
    pub init: Option<Init>,
    pub init_error: Option<String>,
    pub capabilities: Vec<CapabilityValue>,
}

#[derive(Debug, Serialize)]
pub(super) struct Limits {
    pub vcpus: u32,
    pub recommended_vcpus: u32,
    pub vcpu_ids: u32,
    pub memory_slots: u32,
    pub gsis: u32,
    pub msrs: usize,
    pub vcpu_mmap_size: usize,
}

#[derive(Debug, Serialize)]
pub(super) struct Init {
    pub api_version: i32,
    pub irqchip: IrqchipReport,
    pub routing: Option<Routing>,
    pub irqfds: Irqfds,
    pub msi: &'static str,
    pub inject_status: bool,
    pub pci_2_3: bool,
    pub ioeventfds: bool,
    pub many_ioeventfds: Option<bool>,
    pub coalesced_page: Option<u32>,
    pub joins_memory_regions: bool,
    pub readonly_memory: bool,
    pub reserved: Reserved,
    pub state: State,
    pub msrs: Vec<u32>,
    pub consequences: Vec<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum IrqchipReport {
    Off,
    Kernel { pit: bool },
    Split { pins: u32 },
}

#[derive(Debug, Serialize)]
pub(super) struct Routing {
    pub gsi_count: u32,
    pub bitmap_bits: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct Irqfds {
    pub allowed: bool,
    pub resample: bool,
    pub msi: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Reserved {
    pub identity_map: u64,
    pub tss: u64,
    pub len: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct State {
    pub vcpu_events: bool,
    pub robust_singlestep: bool,
    pub debugregs: bool,
    pub xsave: bool,
    pub xcrs: bool,
    pub pit_state2: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct CapabilityValue {
    pub name: &'static str,
    pub number: u32,
    pub since: &'static str,
    pub scope: &'static str,
    pub value: i32,
    pub system_value: i32,
    pub vm_value: Option<i32>,
    pub consequence: Option<&'static str>,
}

impl CapabilityValue {
    /// Asks for a capability, on the VM too if there is one that answers.
    pub(super) fn ask<H: Hypervisor>(
        cap: Capability,
        system: &H,
        vm: Option<&H::Vm>,
    ) -> Result<Self, Error> {
        let system_value = system.check_extension(cap)?;
        let vm = vm.filter(|_| cap.scope() == hv_core::Scope::Vm);
        let vm_value = vm.map(|vm| vm.check_extension(cap)).transpose()?;
        let value = vm_value.unwrap_or(system_value);
        Ok(Self {
            name: cap.name(),
            number: cap.number(),
            since: cap.since(),
            scope: cap.scope().name(),
            value,
            system_value,
            vm_value,
            consequence: (value <= 0).then(|| cap.absence()),
        })
    }
}

impl Report {
    /// Of a VM that could be made.
    pub(super) fn of_vm<H: Hypervisor>(
        device: String,
        system: &H,
        vm: &H::Vm,
        record: &Record,
    ) -> Result<Self, Error> {
        let per_vm = system.check_extension(Capability::CheckExtensionVm)? > 0;
        Ok(Self {
            schema: super::SCHEMA,
            device,
            limits: Some(Limits {
                vcpus: record.vcpus.hard,
                recommended_vcpus: record.vcpus.recommended,
                vcpu_ids: record.vcpus.ids,
                memory_slots: record.nr_memslots,
                gsis: record.routing.map_or(0, |routing| routing.gsi_count),
                msrs: record.msrs.len(),
                vcpu_mmap_size: system.vcpu_mmap_size()?,
            }),
            init: Some(Init::from(record)),
            init_error: None,
            capabilities: capabilities(system, per_vm.then_some(vm))?,
        })
    }

    /// Of a KVM that can't make one.
    pub(super) fn of_system<H: Hypervisor>(
        device: String,
        system: &H,
        error: &InitError,
    ) -> Result<Self, Error> {
        Ok(Self {
            schema: super::SCHEMA,
            device,
            limits: None,
            init: None,
            init_error: Some(error.to_string()),
            capabilities: capabilities(system, None)?,
        })
    }
}

fn capabilities<H: Hypervisor>(
    system: &H,
    vm: Option<&H::Vm>,
) -> Result<Vec<CapabilityValue>, Error> {
    Capability::ALL.iter().map(|&cap| CapabilityValue::ask(cap, system, vm)).collect()
}

impl From<&Record> for Init {
    fn from(record: &Record) -> Self {
        let (reserved, state) = (record.reserved, record.state);
        Self {
            api_version: record.api_version,
            irqchip: match record.irqchip {
                Irqchip::Off => IrqchipReport::Off,
                Irqchip::Kernel { pit } => IrqchipReport::Kernel { pit },
                Irqchip::Split { pins } => IrqchipReport::Split { pins },
            },
            routing: record.routing.map(|routing| Routing {
                gsi_count: routing.gsi_count,
                bitmap_bits: routing.bitmap_bits,
            }),
            irqfds: Irqfds {
                allowed: record.irqfds.allowed,
                resample: record.irqfds.resample,
                msi: record.irqfds.msi,
            },
            msi: match record.msi {
                MsiMode::Direct => "direct",
                MsiMode::DynamicRoutes => "dynamic-routes",
            },
            inject_status: record.inject_status,
            pci_2_3: record.pci_2_3,
            ioeventfds: record.ioeventfds,
            many_ioeventfds: match record.many_ioeventfds {
                ManyIoeventfds::Yes => Some(true),
                ManyIoeventfds::No => Some(false),
                ManyIoeventfds::NotProbed => None,
            },
            coalesced_page: record.coalesced_page,
            joins_memory_regions: record.joins_memory_regions,
            readonly_memory: record.readonly_memory,
            reserved: Reserved {
                identity_map: reserved.identity_map,
                tss: reserved.tss,
                len: reserved.len,
            },
            state: State {
                vcpu_events: state.vcpu_events,
                robust_singlestep: state.robust_singlestep,
                debugregs: state.debugregs,
                xsave: state.xsave,
                xcrs: state.xcrs,
                pit_state2: state.pit_state2,
            },
            msrs: record.msrs.clone(),
            consequences: record.consequences.iter().map(ToString::to_string).collect(),
        }
    }
}
