//! What the facts mean.
//!
//! Pure: the same facts give the same findings. The trial decides whether VMs run; the other facts
//! only explain why not, so a host that looks wrong but works is never called broken.

use hv_core::init::{InitError, InitErrorKind, Step};
use hv_core::{DeviceChoice, Errno, Error, OpenErrorKind, VcpuExit};

use super::facts::HostFacts;
use super::finding::{Finding, Status};
use super::parse::{Cpu, Vendor};
use super::trial::{TIME_LIMIT, TrialError};
use super::{permission, shown};

/// Less memory than this is worth a warning.
const LITTLE_MEMORY: u64 = 512 << 20;
/// Fewer descriptors than this are worth a warning: a device takes several.
const FEW_FILES: u64 = 256;

/// Makes a character device only its owner and group may use.
const MAKE_NODE: &str = "mknod -m 660";

/// The findings, causes before effects.
pub(super) fn diagnose(facts: &HostFacts) -> Vec<Finding> {
    let mut findings = vec![virtualization(facts), module(facts), device(facts)];
    findings.extend(vm(facts));
    findings.extend([memory(facts), open_files(facts), network(facts)]);
    findings
}

/// How the host takes part in a failure: `Fail` if a missing extension or driver is what the
/// failure is about, `Warn` if something else is in the way first.
fn blame(facts: &HostFacts) -> Status {
    match &facts.trial {
        Ok(()) => Status::Ok,
        Err(TrialError::Init(InitError { step: Step::CreateVm, .. })) => Status::Fail,
        Err(error) => match error.open_error().map(|e| e.kind()) {
            Some(OpenErrorKind::Missing | OpenErrorKind::NoDriver) => Status::Fail,
            _ => Status::Warn,
        },
    }
}

fn blamed(facts: &HostFacts, check: &'static str, summary: String, remedy: String) -> Finding {
    match blame(facts) {
        Status::Ok => Finding::ok(check, summary),
        Status::Warn => Finding::warn(check, summary, remedy),
        Status::Fail => Finding::fail(check, summary, remedy),
    }
}

fn virtualization(facts: &HostFacts) -> Finding {
    const CHECK: &str = "virtualization";
    let Some(cpu) = facts.cpu else {
        let summary = "/proc/cpuinfo can't be read, so the CPU is not known".into();
        let remedy = "mount /proc where hv runs, and let it be read".into();
        return match blame(facts) {
            // It explains nothing, so it is not the failure.
            Status::Fail => Finding::warn(CHECK, summary, remedy),
            _ => blamed(facts, CHECK, summary, remedy),
        };
    };
    let nested =
        if cpu.hypervisor { "; this host is itself a VM (nested virtualization)" } else { "" };
    if let Some(flag) = cpu.extension() {
        return Finding::ok(CHECK, format!("the CPU has {flag}{nested}"));
    }
    if facts.modules.kvm_pvm {
        let summary = format!(
            "the CPU has neither vmx nor svm: KVM runs guests in software (kvm_pvm){nested}"
        );
        return Finding::warn(
            CHECK,
            summary,
            "expect slow guests, and instructions that KVM can't run and hv has to complete; \
             for full speed use a host with hardware virtualization",
        );
    }
    let summary = format!("the CPU offers neither vmx nor svm{nested}");
    let remedy = match cpu {
        Cpu { vendor: None, .. } => "hv needs an x86-64 host".into(),
        Cpu { hypervisor: true, .. } => {
            "turn on nested virtualization for this VM where it is run: pass the host's CPU \
             through (QEMU: -cpu host), with nested=1 for its kvm_intel or kvm_amd module; in a \
             cloud, choose an instance type that has it"
                .into()
        }
        Cpu { vendor, .. } => {
            let name = match vendor {
                Some(Vendor::Intel) => "Intel VT-x",
                Some(Vendor::Amd) => "SVM (AMD-V)",
                _ => "virtualization (VT-x or SVM)",
            };
            format!("turn on {name} in the firmware setup (BIOS or UEFI), then switch off and on")
        }
    };
    blamed(facts, CHECK, summary, remedy)
}

fn module(facts: &HostFacts) -> Finding {
    const CHECK: &str = "module";
    let modules = &facts.modules;
    if let Some(driver) = modules.driver() {
        let nested = match modules.nested {
            Some(true) => " (nested=1: its guests may have VMs)",
            Some(false) => " (nested=0: its guests can't have VMs)",
            None => "",
        };
        return Finding::ok(CHECK, format!("{driver} is loaded{nested}"));
    }
    if !modules.visible {
        let summary = "/sys/module can't be seen, so the kernel's modules are not known".into();
        let remedy = "see on the host whether kvm_intel or kvm_amd is loaded: lsmod".into();
        return match blame(facts) {
            Status::Fail => Finding::warn(CHECK, summary, remedy),
            _ => blamed(facts, CHECK, summary, remedy),
        };
    }
    let summary = match modules.kvm {
        true => "kvm is loaded, but no driver for this CPU (kvm_intel or kvm_amd)",
        false => "kvm is not loaded",
    };
    let command = match facts.cpu.and_then(|cpu| cpu.vendor) {
        Some(Vendor::Intel) => "sudo modprobe kvm_intel",
        Some(Vendor::Amd) => "sudo modprobe kvm_amd",
        _ => "sudo modprobe kvm_intel || sudo modprobe kvm_amd",
    };
    let place = if facts.container { "on the host of this container: " } else { "" };
    let first = match facts.cpu {
        Some(cpu) if cpu.extension().is_none() => "once the CPU offers virtualization, ",
        _ => "",
    };
    let remedy = format!(
        "{first}{place}{command}; if that fails, the kernel log says why: sudo dmesg | grep -i kvm"
    );
    blamed(facts, CHECK, summary.into(), remedy)
}

fn device(facts: &HostFacts) -> Finding {
    const CHECK: &str = "device";
    let path = shown(&facts.device);
    let error = match &facts.trial {
        Err(TrialError::Init(InitError { kind: InitErrorKind::NotKvm(error), .. })) => {
            return not_kvm(facts, &path, error.errno);
        }
        Err(TrialError::Init(InitError { step: Step::PageSize, .. })) => {
            return Finding::ok(CHECK, format!("{path} was not tried"));
        }
        Err(error) => error.open_error(),
        Ok(()) => None,
    };
    let Some(error) = error else {
        let state = match facts.device {
            DeviceChoice::Path(_) => "opens for reading and writing",
            DeviceChoice::Fd(_) => "is open, and is KVM",
        };
        return Finding::ok(CHECK, format!("{path} {state}"));
    };
    let why = error.errno.to_string();
    match error.kind() {
        OpenErrorKind::Missing => missing(facts, &path, &why),
        OpenErrorKind::NoPermission => permission::denied(facts, &why),
        OpenErrorKind::NoDriver => {
            let remedy = match facts.modules.driver() {
                Some(_) => replace_node(&path),
                None => "see the lines above; the node works once the module is loaded".into(),
            };
            let summary = format!("{path} is there, but no driver serves it: {why}");
            Finding::fail(CHECK, summary, remedy)
        }
        OpenErrorKind::NotKvm => not_kvm(facts, &path, error.errno),
        OpenErrorKind::BadDescriptor => Finding::fail(
            CHECK,
            format!("{path} is no open descriptor of this process: {why}"),
            "open it where hv is started, in a shell: hv doctor --kvm fd:3 3<>/dev/kvm",
        ),
        _ => {
            let remedy = error.remedy().unwrap_or("see the kernel log: sudo dmesg | grep -i kvm");
            Finding::fail(CHECK, format!("{path} can't be opened: {why}"), remedy)
        }
    }
}

fn not_kvm(facts: &HostFacts, path: &str, errno: Errno) -> Finding {
    let what = match &facts.node {
        Some(Ok(node)) if !node.is_char_device => ", not even a character device",
        _ => "",
    };
    let remedy = match facts.device == DeviceChoice::default() {
        true => replace_node(path),
        false => "name KVM's node with --kvm, normally /dev/kvm".into(),
    };
    Finding::fail("device", format!("{path} is not KVM{what}: {errno}"), remedy)
}

/// For a node that is there, but not KVM's.
fn replace_node(path: &str) -> String {
    format!(
        "something else is in the place of KVM's node: in a container, pass the host's in (docker \
         run --device /dev/kvm); else make it again: sudo rm {path} && sudo {MAKE_NODE} {path} c 10 232"
    )
}

fn missing(facts: &HostFacts, path: &str, why: &str) -> Finding {
    let remedy = if facts.device != DeviceChoice::default() {
        "check the path given with --kvm; KVM's node is normally /dev/kvm".into()
    } else if facts.modules.driver().is_some() {
        format!(
            "the driver is there: in a container, pass the node in (docker run --device /dev/kvm, \
             podman alike); else make it, which udev normally does: sudo {MAKE_NODE} {path} c 10 232"
        )
    } else if facts.container {
        "once the host has the node, pass it in: docker run --device /dev/kvm (podman alike)".into()
    } else {
        "see the lines above; the node appears once the module is loaded".into()
    };
    Finding::fail("device", format!("{path} does not exist: {why}"), remedy)
}

/// Nothing if the device could not be used, which [`device`] explains.
fn vm(facts: &HostFacts) -> Option<Finding> {
    const CHECK: &str = "vm";
    const LOG: &str = "see the kernel log: sudo dmesg | grep -i kvm";
    let error = match &facts.trial {
        Ok(()) => {
            return Some(Finding::ok(CHECK, "a VM was made, and its vCPU ran code"));
        }
        Err(error) if error.open_error().is_some() => return None,
        Err(error) => error,
    };
    let (summary, remedy) = match error {
        TrialError::Init(InitError { kind: InitErrorKind::NotKvm(_), .. }) => return None,
        TrialError::Init(InitError { step, kind: InitErrorKind::Call(error) }) => {
            let (what, remedy) = call(error);
            (format!("{step}: {what}"), remedy)
        }
        TrialError::Init(error) => {
            (error.to_string(), "use a kernel, or an outer hypervisor, with a KVM that has it")
        }
        TrialError::Call(error) => call(error),
        TrialError::Exit(exit) => (unexpected(exit), LOG),
        TrialError::Data(data) => {
            (format!("the vCPU wrote {data:02x?} to a port instead of what its code says"), LOG)
        }
        TrialError::TimedOut => (
            format!("the vCPU did not run three instructions within {} s", TIME_LIMIT.as_secs()),
            "see whether the host is overloaded, and the kernel log: sudo dmesg | grep -i kvm",
        ),
        TrialError::NoThread(errno) => (
            format!("no thread could be started: {errno}"),
            "raise the limit of processes (ulimit -u)",
        ),
    };
    Some(Finding::fail(CHECK, summary, remedy))
}

/// A failed call, and what to do about it.
fn call(error: &Error) -> (String, &'static str) {
    let what = format!("{}{} failed: {}", error.call, error.context, error.errno);
    (what, error.remedy().unwrap_or("see the kernel log: sudo dmesg | grep -i kvm"))
}

/// An exit that is not the port write.
fn unexpected(exit: &VcpuExit) -> String {
    match exit {
        VcpuExit::FailEntry { reason, cpu } => {
            format!("the hardware refused to enter the guest on CPU {cpu}: reason {reason:#x}")
        }
        VcpuExit::InternalError(error) => {
            let (len, bytes) = error.instruction();
            let bytes = bytes.get(..len).unwrap_or_default();
            format!("KVM could not go on: {}, instruction bytes {bytes:02x?}", error.name())
        }
        exit => format!("the vCPU stopped in an unexpected way: {exit:?}"),
    }
}

fn memory(facts: &HostFacts) -> Finding {
    const CHECK: &str = "memory";
    if let Some(limit) = facts.address_space {
        return Finding::warn(
            CHECK,
            format!("this process may use {} MiB of address space only", limit >> 20),
            "lift the limit, which guest memory counts against: ulimit -v unlimited",
        );
    }
    match facts.memory_available {
        None => Finding::ok(CHECK, "not known"),
        Some(bytes) if bytes < LITTLE_MEMORY => Finding::warn(
            CHECK,
            format!("{} MiB are available", bytes >> 20),
            "end something, or give VMs less memory (hv run --memory)",
        ),
        Some(bytes) => Finding::ok(CHECK, format!("{} MiB are available", bytes >> 20)),
    }
}

fn open_files(facts: &HostFacts) -> Finding {
    const CHECK: &str = "open-files";
    match facts.open_files {
        Some(limit) if limit < FEW_FILES => Finding::warn(
            CHECK,
            format!("this process may have {limit} open files; a VM with many devices needs more"),
            format!("raise the limit: ulimit -n {}", FEW_FILES * 4),
        ),
        Some(limit) => Finding::ok(CHECK, format!("at most {limit}")),
        None => Finding::ok(CHECK, "no limit"),
    }
}

fn network(facts: &HostFacts) -> Finding {
    let state = match facts.tun {
        Ok(()) => "opens".to_owned(),
        Err(errno) => format!("does not open: {errno}"),
    };
    Finding::ok("network", format!("/dev/net/tun {state}; no VM needs it to run"))
}

#[cfg(test)]
mod tests;
