//! The report as a table for people, within 80 columns.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

use super::report::{CapabilityValue, Init, IrqchipReport, Limits, Report};
use crate::output::wrap;

const TITLE: Style = Style::new().bold();
const ABSENT: Style = AnsiColor::Yellow.on_default();

/// Where the values of a list start.
const VALUES: usize = 20;

pub(super) fn write(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{TITLE}KVM of {}{TITLE:#}", report.device)?;
    if let Some(limits) = &report.limits {
        write_limits(limits, out)?;
    }
    if let Some(init) = &report.init {
        write_init(init, out)?;
    }
    writeln!(out, "\n{TITLE}{:<38}{:>8}  since   asked on{TITLE:#}", "Capability", "value")?;
    report.capabilities.iter().try_for_each(|cap| write_capability(cap, out))?;
    if let Some(error) = &report.init_error {
        let red = AnsiColor::Red.on_default().bold();
        writeln!(out, "\n{red}No VM can be made:{red:#}")?;
        wrap(error, 2).iter().try_for_each(|line| writeln!(out, "{line}"))?;
    }
    Ok(())
}

/// A name and its value, wrapped to stay right of the name.
fn item(out: &mut dyn Write, name: &str, value: &str) -> io::Result<()> {
    let lines = wrap(value, VALUES);
    for (i, line) in lines.iter().enumerate() {
        let text = line.trim_start();
        let name = if i == 0 { name } else { "" };
        writeln!(out, "  {name:<width$}{text}", width = VALUES - 2)?;
    }
    Ok(())
}

fn write_limits(limits: &Limits, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\n{TITLE}Limits{TITLE:#}")?;
    let vcpus = format!(
        "{} at most, {} recommended, ids below {}",
        limits.vcpus, limits.recommended_vcpus, limits.vcpu_ids
    );
    item(out, "vCPUs", &vcpus)?;
    item(out, "memory slots", &limits.memory_slots.to_string())?;
    item(out, "GSIs", &limits.gsis.to_string())?;
    item(out, "MSRs", &format!("{} can be saved", limits.msrs))?;
    item(out, "vCPU mapping", &format!("{} bytes", limits.vcpu_mmap_size))
}

fn write_init(init: &Init, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\n{TITLE}A VM with 1 vCPU and the irqchip in the kernel{TITLE:#}")?;
    item(out, "API version", &init.api_version.to_string())?;
    let irqchip = match init.irqchip {
        IrqchipReport::Off => "none".into(),
        IrqchipReport::Kernel { pit: true } => "in the kernel, with the timer (PIT)".into(),
        IrqchipReport::Kernel { pit: false } => "in the kernel, without a timer".into(),
        IrqchipReport::Split { pins } => format!("split, {pins} pins"),
    };
    item(out, "irqchip", &irqchip)?;
    let routing = match &init.routing {
        Some(r) => format!("{} GSIs, in a bitmap of {} bits", r.gsi_count, r.bitmap_bits),
        None => "no".into(),
    };
    item(out, "routing", &routing)?;
    let irqfds = [
        (init.irqfds.allowed, "edge-triggered"),
        (init.irqfds.resample, "level-triggered (resample)"),
        (init.irqfds.msi, "MSI"),
    ];
    item(out, "irqfds", &all_true(&irqfds))?;
    let msi = match init.msi {
        "direct" => "sent directly (KVM_SIGNAL_MSI)",
        _ => "through dynamic routes",
    };
    item(out, "MSIs", msi)?;
    let lines = [(init.inject_status, "injection status"), (init.pci_2_3, "INTx masking")];
    item(out, "interrupt lines", &all_true(&lines))?;
    let many = [
        (init.ioeventfds, "yes"),
        (init.many_ioeventfds == Some(true), "many on one port"),
        (init.many_ioeventfds == Some(false), "few on one port"),
    ];
    item(out, "ioeventfds", &all_true(&many))?;
    let ring = init.coalesced_page.map_or_else(|| "none".into(), |page| format!("page {page}"));
    item(out, "coalesced ring", &ring)?;
    let slots = [(init.joins_memory_regions, "can be joined"), (init.readonly_memory, "readonly")];
    item(out, "memory slots", &all_true(&slots))?;
    let reserved = &init.reserved;
    let places = format!(
        "{:#x} identity map, {:#x} TSS, {:#x} bytes in all",
        reserved.identity_map, reserved.tss, reserved.len
    );
    item(out, "reserved", &places)?;
    let state = [
        (init.state.vcpu_events, "events"),
        (init.state.robust_singlestep, "robust single step"),
        (init.state.debugregs, "debug registers"),
        (init.state.xsave, "XSAVE"),
        (init.state.xcrs, "XCRs"),
        (init.state.pit_state2, "PIT"),
    ];
    item(out, "vCPU state", &all_true(&state))?;
    for (i, consequence) in init.consequences.iter().enumerate() {
        item(out, if i == 0 { "consequences" } else { "" }, consequence)?;
    }
    Ok(())
}

/// The names of what is true.
fn all_true(items: &[(bool, &str)]) -> String {
    let names: Vec<&str> = items.iter().filter(|(is, _)| *is).map(|(_, name)| *name).collect();
    if names.is_empty() { "no".into() } else { names.join(", ") }
}

fn write_capability(cap: &CapabilityValue, out: &mut dyn Write) -> io::Result<()> {
    let style = if cap.consequence.is_some() { ABSENT } else { Style::new() };
    let scope = match cap.vm_value {
        Some(vm) if vm != cap.system_value => format!("vm; system: {}", cap.system_value),
        _ => cap.scope.into(),
    };
    let (name, value, since) = (cap.name, cap.value, cap.since);
    writeln!(out, "{style}{name:<38}{value:>8}{style:#}  {since:<8}{scope}")?;
    for line in cap.consequence.into_iter().flat_map(|text| wrap(text, 4)) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}
