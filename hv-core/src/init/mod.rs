//! The start of a VM as one transaction.
//!
//! [`init`] takes a [`Config`] through the steps every KVM VMM goes through ([`Step`]), on any
//! [`Hypervisor`], and returns an [`InitializedVm`] with the [`Record`] of what it can do; or an
//! [`InitError`] that names the step, the call and the errno, with everything undone. What was asked
//! for is met or refused: nothing falls back silently.
//!
//! The order must stay as it is: memory slots before irqchip, timer and ioeventfds (a slot added
//! after them waits for a grace period of the kernel), all of it before the first vCPU.

mod arch;
mod capabilities;
mod config;
mod error;
mod ioeventfds;
mod irqchip;
mod record;
mod replay;
mod step;
mod system;
#[cfg(test)]
mod tests;

pub use config::{Config, GUEST_PAGE_SIZE, Irqchip};
pub use error::{InitError, InitErrorKind, Request};
pub use record::{
    Consequence, Irqfds, ManyIoeventfds, MsiMode, Record, Reserved, Routing, StateIoctls,
    VcpuLimits,
};
pub use step::Step;

use crate::{Capability, DeviceChoice, Error, Hypervisor, OpenError};
use capabilities::Capabilities;
use error::At;

/// `KVM_CAP_NR_MEMSLOTS` where KVM does not say (KVM API documentation).
const DEFAULT_MEMSLOTS: u32 = 32;

/// A VM without vCPUs yet, the hypervisor it runs on, and what it can do.
#[derive(Debug)]
pub struct InitializedVm<H: Hypervisor> {
    // The VM goes before the hypervisor.
    vm: H::Vm,
    hypervisor: H,
    record: Record,
}

impl<H: Hypervisor> InitializedVm<H> {
    /// The hypervisor.
    #[must_use]
    pub fn hypervisor(&self) -> &H {
        &self.hypervisor
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &H::Vm {
        &self.vm
    }

    /// What the VM can do.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its parts, for a VMM that shares them between threads.
    #[must_use]
    pub fn into_parts(self) -> (H, H::Vm, Record) {
        (self.hypervisor, self.vm, self.record)
    }
}

/// Starts a VM on the hypervisor that `open` opens.
///
/// # Errors
/// An [`InitError`] for the first step that fails. The VM is then closed, before the hypervisor, and
/// with it everything set up in it.
pub fn init<H: Hypervisor>(
    open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
    config: &Config,
) -> Result<InitializedVm<H>, InitError> {
    system::page_size(config).at(Step::PageSize)?;
    let hypervisor = open(&config.device).at(Step::Open)?;
    let api_version = system::api_version(&hypervisor).at(Step::ApiVersion)?;
    let mut caps = Capabilities::new(&hypervisor);
    let vcpus = system::vcpu_limits(&mut caps, config).at(Step::VcpuLimits)?;
    let vm = system::create_vm(&hypervisor, config).at(Step::CreateVm)?;
    caps.created(&vm).at(Step::RequiredCapabilities)?;
    system::required(&mut caps, config).at(Step::RequiredCapabilities)?;

    let coalesced_page = caps.count(Capability::CoalescedMmio).at(Step::CoalescedMmio)?;
    let joins_memory_regions =
        caps.has(Capability::JoinMemoryRegionsWorks).at(Step::MemoryRegions)?;
    let nr_memslots = caps.count(Capability::NrMemslots).at(Step::MemoryRegions)?;
    let readonly_memory = caps.has(Capability::ReadonlyMem).at(Step::MemoryRegions)?;
    let state = state_ioctls(&mut caps).at(Step::StateIoctls)?;
    let msi = match caps.has(Capability::SignalMsi).at(Step::Msi)? {
        true => MsiMode::Direct,
        false => MsiMode::DynamicRoutes,
    };
    let pci_2_3 = caps.has(Capability::Pci23).at(Step::Intx)?;
    let inject_status = caps.has(Capability::IrqInjectStatus).at(Step::Intx)?;
    let msrs = arch::msrs(&hypervisor).at(Step::Arch)?;
    let reserved = arch::addresses(&mut caps, &vm, config).at(Step::Arch)?;

    replay::slots(&mut caps, &vm, config).at(Step::Replay)?;
    let irqchip = irqchip::create(&mut caps, &vm, config.irqchip).at(Step::Irqchip)?;
    let routing = irqchip::routing(&mut caps, irqchip).at(Step::Routing)?;
    let irqfds = irqchip::irqfds(&mut caps, irqchip, routing).at(Step::ArchRouting)?;
    let ioeventfds = caps.has(Capability::Ioeventfd).at(Step::Replay)?;
    replay::io(&mut caps, &vm, config).at(Step::Replay)?;
    let (many_ioeventfds, leftovers) = match (ioeventfds, config.probe_many_ioeventfds) {
        (false, _) => (ManyIoeventfds::No, 0),
        (true, false) => (ManyIoeventfds::NotProbed, 0),
        (true, true) => ioeventfds::probe(&hypervisor, &vm),
    };
    hypervisor.install_kick().at(Step::Kick)?;

    let mut record = Record {
        api_version,
        vcpus,
        capabilities: caps.into_values(),
        coalesced_page,
        joins_memory_regions,
        nr_memslots: nr_memslots.unwrap_or(DEFAULT_MEMSLOTS),
        readonly_memory,
        state,
        msi,
        pci_2_3,
        inject_status,
        msrs,
        reserved,
        irqchip,
        routing,
        irqfds,
        ioeventfds,
        many_ioeventfds,
        consequences: Vec::new(),
    };
    record.consequences = record::consequences(&record, config.vcpus, leftovers);
    Ok(InitializedVm { vm, hypervisor, record })
}

/// Step 8.
fn state_ioctls<H: Hypervisor>(caps: &mut Capabilities<'_, H>) -> Result<StateIoctls, Error> {
    Ok(StateIoctls {
        vcpu_events: caps.has(Capability::VcpuEvents)?,
        robust_singlestep: caps.has(Capability::X86RobustSinglestep)?,
        debugregs: caps.has(Capability::DebugRegs)?,
        xsave: caps.has(Capability::Xsave)?,
        xcrs: caps.has(Capability::Xcrs)?,
        pit_state2: caps.has(Capability::PitState2)?,
    })
}
