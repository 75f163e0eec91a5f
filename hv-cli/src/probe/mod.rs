//! `hv probe`: what this host's KVM can do.
//!
//! It makes a VM of one vCPU with the irqchip in the kernel, asks it and the system for every
//! capability the project knows, and shows what init found. If no VM can be made it shows what the
//! system answers, which is what one needs then.
//!
//! # JSON
//! `schema` is 1; fields may be added to a schema, never changed or removed. Addresses, MSR
//! indices and everything else are plain numbers; sizes are bytes.
//!
//! - `device`: the device asked for, as text.
//! - `limits` (null if no VM can be made): `vcpus`, `recommended_vcpus`, `vcpu_ids` (ids are below),
//!   `memory_slots`, `gsis` (0 without routing), `msrs` (how many can be saved), `vcpu_mmap_size`.
//! - `init` (null if no VM can be made): the record of [`hv_core::init`]: `api_version`; `irqchip`
//!   (`kind` is `off`, `kernel` with `pit`, or `split` with `pins`); `routing` (null without;
//!   `gsi_count`, `bitmap_bits`); `irqfds` (`allowed`, `resample`, `msi`); `msi` (`direct` or
//!   `dynamic-routes`); `inject_status`; `pci_2_3`; `ioeventfds`; `many_ioeventfds` (null if it
//!   could not be found out); `coalesced_page` (null without a ring); `joins_memory_regions`;
//!   `readonly_memory`; `reserved` (`identity_map`, `tss`, `len`); `state` (`vcpu_events`,
//!   `robust_singlestep`, `debugregs`, `xsave`, `xcrs`, `pit_state2`); `msrs` (indices);
//!   `consequences` (sentences for people).
//! - `init_error` (null if there is none): why no VM can be made, a sentence for people.
//! - `capabilities`, by number: `name`, `number`, `since` (Linux version), `scope` (`system` or
//!   `vm`: who answers), `value` (in that scope; 0 is absence), `system_value`, `vm_value` (null if
//!   no VM was asked), `consequence` (null if the capability is there).

mod report;
mod text;

use std::io::Write;

use hv_core::init::{Config, InitError, Step, init};
use hv_core::{DeviceChoice, Error, Hypervisor, OpenError};

use crate::exit_code::ExitCode;
use crate::output::{self, OutputError};
use report::Report;

/// The version of the JSON.
const SCHEMA: u32 = 1;

/// There is nothing to report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// KVM can't be used at all.
    #[error(transparent)]
    Init(#[from] InitError),
    /// A question to KVM failed.
    #[error(transparent)]
    Call(#[from] Error),
    /// The report could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Probes the KVM of `device` and writes the report to `out`, as text with ANSI styles (to be
/// stripped by the stream where it is no terminal) or as JSON.
///
/// Returns [`ExitCode::Success`], or [`ExitCode::Vmm`] if no VM can be made.
///
/// # Errors
/// See [`ProbeError`]: the device can't be opened, or is no KVM of API version 12.
pub fn run(device: &DeviceChoice, json: bool, out: &mut dyn Write) -> Result<ExitCode, ProbeError> {
    probe(crate::device::open, device, json, out)
}

fn probe<H: Hypervisor>(
    open: impl Fn(&DeviceChoice) -> Result<H, OpenError>,
    device: &DeviceChoice,
    json: bool,
    out: &mut dyn Write,
) -> Result<ExitCode, ProbeError> {
    let mut config = Config::new(rustix::param::page_size() as u64, 1);
    config.device = device.clone();
    config.probe_many_ioeventfds = true;
    let (report, code) = match init(&open, &config) {
        Ok(machine) => {
            let (system, vm) = (machine.hypervisor(), machine.vm());
            let report = Report::of_vm(device.to_string(), system, vm, machine.record())?;
            (report, ExitCode::Success)
        }
        Err(error) if error.step <= Step::ApiVersion => return Err(error.into()),
        Err(error) => {
            // Init has closed what it had opened.
            let system = open(device)
                .map_err(|reason| InitError { step: Step::Open, kind: reason.into() })?;
            (Report::of_system(device.to_string(), &system, &error)?, ExitCode::Vmm)
        }
    };
    let written = if json { output::json(&report, out) } else { text::write(&report, out) };
    output::finish(out, written)?;
    Ok(code)
}

#[cfg(test)]
mod tests;
