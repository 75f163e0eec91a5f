//! Steps 0 to 5: up to a VM that can be worked with.

use super::capabilities::Capabilities;
use super::config::GUEST_PAGE_SIZE;
use super::{Config, InitErrorKind, VcpuLimits};
use crate::{Capability, Errno, Error, Hypervisor};

/// The API version every kernel since 2.6.22 has, and the only one there is.
const API_VERSION: i32 = 12;

/// The vCPUs of a VM if KVM does not say (KVM API documentation, `KVM_CREATE_VCPU`).
const DEFAULT_VCPUS: u32 = 4;

/// How often `KVM_CREATE_VM` is tried. A signal that arrives meanwhile fails it, and is handled before
/// the next try; it takes a constant stream of them to use up these.
const CREATE_VM_TRIES: u32 = 16;

/// Without these no VM runs.
const REQUIRED: [Capability; 6] = [
    Capability::UserMemory,
    Capability::DestroyMemoryRegionWorks,
    Capability::SetTssAddr,
    Capability::ExtCpuid,
    Capability::MpState,
    Capability::ImmediateExit,
];

/// Step 0.
pub(super) fn page_size(config: &Config) -> Result<(), InitErrorKind> {
    match config.host_page_size {
        host if host < GUEST_PAGE_SIZE => Err(InitErrorKind::PageSize { host }),
        _ => Ok(()),
    }
}

/// Step 2.
pub(super) fn api_version<H: Hypervisor>(system: &H) -> Result<i32, InitErrorKind> {
    match system.api_version().map_err(InitErrorKind::NotKvm)? {
        old if old < API_VERSION => Err(InitErrorKind::ApiVersionTooOld(old)),
        new if new > API_VERSION => Err(InitErrorKind::ApiVersionTooNew(new)),
        version => Ok(version),
    }
}

/// Step 3.
pub(super) fn vcpu_limits<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    config: &Config,
) -> Result<VcpuLimits, InitErrorKind> {
    let max = caps.count(Capability::MaxVcpus)?;
    let recommended = caps.count(Capability::NrVcpus)?.unwrap_or(DEFAULT_VCPUS);
    let hard = max.unwrap_or(recommended);
    let ids = caps.count(Capability::MaxVcpuId)?.unwrap_or(hard);

    let Some(last) = config.vcpus.checked_sub(1) else {
        return Err(InitErrorKind::NoVcpus);
    };
    if config.vcpus > hard {
        return Err(InitErrorKind::TooManyVcpus { asked: config.vcpus, limit: hard });
    }
    let highest = config.highest_vcpu_id.max(last);
    if highest >= ids {
        return Err(InitErrorKind::VcpuIdTooHigh { asked: highest, limit: ids });
    }
    Ok(VcpuLimits { hard, recommended: recommended.min(hard), ids })
}

/// Step 4.
pub(super) fn create_vm<H: Hypervisor>(
    system: &H,
    config: &Config,
) -> Result<H::Vm, InitErrorKind> {
    for _ in 0..CREATE_VM_TRIES {
        match system.create_vm(config.vm_type) {
            Err(Error { errno: Errno::EINTR, .. }) => {}
            result => return Ok(result?),
        }
    }
    Err(InitErrorKind::Interrupted { tries: CREATE_VM_TRIES })
}

/// Step 5.
pub(super) fn required<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    config: &Config,
) -> Result<(), InitErrorKind> {
    let joins =
        Some(Capability::JoinMemoryRegionsWorks).filter(|_| !config.accept_broken_memory_regions);
    let mut missing = Vec::new();
    for cap in REQUIRED.into_iter().chain(joins) {
        if !caps.has(cap)? {
            missing.push(cap);
        }
    }
    if missing.is_empty() { Ok(()) } else { Err(InitErrorKind::MissingCapabilities(missing)) }
}
