//! Answers for people. What is not in an answer is left out, so that another version's can be shown.

use std::io::{self, Write};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::api::{Balloon, Info, PowerButton, Registers, StateReply};
use crate::config::MemorySize;
use crate::output::printable;

/// The answer as `T`. There is no other error: what is shown is written into memory.
fn read<'a, T: Deserialize<'a>>(answer: &'a Value) -> io::Result<T> {
    T::deserialize(answer).map_err(io::Error::from)
}

pub(super) fn state(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let info: Info = read(answer)?;
    let debugger = if info.held_by_debugger { ", held by a debugger" } else { "" };
    writeln!(out, "state    {}{debugger}", info.state)?;
    writeln!(out, "up       {}", duration(info.uptime_ms))?;
    writeln!(out, "cpus     {}", info.cpus)?;
    writeln!(out, "memory   {}", MemorySize(info.memory))?;
    writeln!(out, "pid      {}", info.pid)?;
    writeln!(out, "version  hv {}", printable(Path::new(&info.version)))
}

fn duration(ms: u64) -> String {
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (minutes, s) = (seconds / 60, seconds % 60);
    let (hours, m) = (minutes / 60, minutes % 60);
    match (hours, minutes) {
        (0, 0) => format!("{s}.{:01} s", ms / 100),
        (0, _) => format!("{m} min {s} s"),
        _ => format!("{hours} h {m} min"),
    }
}

pub(super) fn changed(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let StateReply { state } = read(answer)?;
    writeln!(out, "{state}")
}

pub(super) fn power_button(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let PowerButton { enabled } = read(answer)?;
    if enabled {
        writeln!(out, "pressed")
    } else {
        writeln!(
            out,
            "pressed, but the guest has not asked for its interrupt and may not notice; \
             `hv ctl stop` ends the VM"
        )
    }
}

pub(super) fn balloon(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let balloon: Balloon = read(answer)?;
    writeln!(out, "target      {}", MemorySize(balloon.target))?;
    writeln!(out, "actual      {}", MemorySize(balloon.actual))?;
    writeln!(out, "given back  {}", MemorySize(balloon.given_back))?;
    for (name, value) in &balloon.statistics {
        writeln!(out, "  {}: {value}", printable(Path::new(name)))?;
    }
    Ok(())
}

/// A line for each number that is not 0, and for each device.
pub(super) fn stats(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let Value::Object(stats) = answer else { return Ok(()) };
    for (name, value) in stats {
        match value {
            Value::Object(kinds) => {
                let total: u64 = kinds.values().filter_map(Value::as_u64).sum();
                line(out, name, total)?;
                for (kind, value) in kinds {
                    line(out, &format!("  {kind}"), value.as_u64().unwrap_or(0))?;
                }
            }
            Value::Array(devices) => {
                for device in devices {
                    show_device(device, out)?;
                }
            }
            value => line(out, name, value.as_u64().unwrap_or(0))?,
        }
    }
    Ok(())
}

fn show_device(device: &Value, out: &mut dyn Write) -> io::Result<()> {
    let Value::Object(device) = device else { return Ok(()) };
    let name = device.get("name").and_then(Value::as_str).unwrap_or_default();
    writeln!(out, "{}", printable(Path::new(name)))?;
    for (counter, value) in device {
        if let Some(n) = value.as_u64() {
            line(out, &format!("  {counter}"), n)?;
        }
    }
    match device.get("failure").and_then(Value::as_str) {
        Some(failure) => writeln!(out, "  failure: {}", printable(Path::new(failure))),
        None => Ok(()),
    }
}

fn line(out: &mut dyn Write, name: &str, n: u64) -> io::Result<()> {
    match n {
        0 => Ok(()),
        n => writeln!(out, "{:<24} {n}", printable(Path::new(name))),
    }
}

pub(super) fn registers(answer: &Value, out: &mut dyn Write) -> io::Result<()> {
    let Registers { vcpu, activity, general, segments, system } = read(answer)?;
    writeln!(out, "vCPU {vcpu}: {}", printable(Path::new(&activity)))?;
    let general: Vec<_> = general.iter().map(|(name, value)| (name, value.as_str())).collect();
    rows(&general, 3, out)?;
    let control = [
        ("cr0", &system.cr0),
        ("cr2", &system.cr2),
        ("cr3", &system.cr3),
        ("cr4", &system.cr4),
        ("cr8", &system.cr8),
        ("efer", &system.efer),
    ];
    let control: Vec<_> = control.iter().map(|(name, value)| (*name, value.as_str())).collect();
    rows(&control, 3, out)?;
    for (name, segment) in segments.iter() {
        let present = if segment.present { "" } else { " not present" };
        let size = match (segment.long, segment.default_32) {
            (true, _) => " 64-bit",
            (_, true) => " 32-bit",
            _ => "",
        };
        writeln!(
            out,
            "  {name:<6} {:>6} base {:<18} limit {:<10} type {:>2} dpl {}{size}{present}",
            printable(Path::new(&segment.selector)),
            printable(Path::new(&segment.base)),
            printable(Path::new(&segment.limit)),
            segment.r#type,
            segment.dpl,
        )?;
    }
    for (name, table) in [("gdt", &system.gdt), ("idt", &system.idt)] {
        let (base, limit) = (printable(Path::new(&table.base)), printable(Path::new(&table.limit)));
        writeln!(out, "  {name:<6}        base {base:<18} limit {limit}")?;
    }
    writeln!(out, "  apic   base {}", printable(Path::new(&system.apic_base)))
}

/// Names and values, some in a line.
fn rows(registers: &[(&str, &str)], columns: usize, out: &mut dyn Write) -> io::Result<()> {
    for row in registers.chunks(columns) {
        let mut line = String::new();
        for (name, value) in row {
            line.push_str(&format!("  {name:<6} {:<18}", printable(Path::new(value))));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
