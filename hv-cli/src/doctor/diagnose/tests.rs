use super::super::facts::{Modules, Node, User};
use super::*;
use hv_core::init::Request;
use hv_core::{Call, Capability, INTERNAL_ERROR_EMULATION, InternalError, Ioctl, OpenError};

/// A host with everything as it should be, and user alice.
fn good() -> HostFacts {
    let cpu = Cpu { vendor: Some(Vendor::Intel), vmx: true, svm: false, hypervisor: false };
    HostFacts {
        device: DeviceChoice::default(),
        trial: Ok(()),
        node: Some(Ok(Node {
            is_char_device: true,
            mode: 0o660,
            uid: 0,
            owner: Some("root".into()),
            gid: 106,
            group: Some("kvm".into()),
            user_is_listed: true,
        })),
        cpu: Some(cpu),
        modules: Modules { visible: true, kvm: true, kvm_intel: true, ..Modules::default() },
        user: User { uid: 1000, name: Some("alice".into()), groups: vec![1000, 106] },
        container: false,
        memory_available: Some(8 << 30),
        address_space: None,
        open_files: Some(1024),
        tun: Ok(()),
    }
}

fn fails_to_open(errno: Errno) -> HostFacts {
    let error = OpenError { choice: DeviceChoice::default(), errno };
    HostFacts { trial: Err(init_error(Step::Open, InitErrorKind::Open(error))), ..good() }
}

fn init_error(step: Step, kind: InitErrorKind) -> TrialError {
    TrialError::Init(InitError { step, kind })
}

/// No node, and no module that would make one.
fn no_module() -> HostFacts {
    HostFacts {
        node: Some(Err(Errno::ENOENT)),
        modules: Modules { visible: true, ..Modules::default() },
        ..fails_to_open(Errno::ENOENT)
    }
}

fn without_extension(facts: HostFacts, vendor: Option<Vendor>, hypervisor: bool) -> HostFacts {
    HostFacts { cpu: Some(Cpu { vendor, vmx: false, svm: false, hypervisor }), ..facts }
}

fn node(facts: &mut HostFacts) -> &mut Node {
    facts.node.as_mut().unwrap().as_mut().unwrap()
}

/// Asserts the status of a check and that its line and remedy contain these words.
#[track_caller]
fn says(facts: &HostFacts, check: &str, status: Status, words: &[&str]) {
    let findings = diagnose(facts);
    let finding = findings.iter().find(|f| f.check == check).unwrap_or_else(|| {
        panic!("nothing about {check} in {findings:#?}");
    });
    let text = format!("{} | {}", finding.summary, finding.remedy.as_deref().unwrap_or(""));
    assert_eq!(finding.status, status, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

fn fails(facts: &HostFacts, check: &str, words: &[&str]) {
    says(facts, check, Status::Fail, words);
}

#[test]
fn a_good_host_has_nothing_but_ok() {
    let findings = diagnose(&good());
    assert!(findings.iter().all(|f| f.status == Status::Ok && f.remedy.is_none()), "{findings:#?}");
    assert!(findings.iter().any(|f| f.check == "vm"));
}

#[test]
fn a_host_that_works_is_never_called_broken() {
    let odd = HostFacts {
        cpu: None,
        node: None,
        modules: Modules::default(),
        memory_available: None,
        tun: Err(Errno::ENOENT),
        ..good()
    };
    assert!(diagnose(&odd).iter().all(|f| f.status == Status::Ok));
    let odd = without_extension(odd, Some(Vendor::Amd), true);
    assert!(diagnose(&odd).iter().all(|f| f.status == Status::Ok));
}

#[test]
fn module_not_loaded_by_vendor() {
    let facts = no_module();
    says(&facts, "virtualization", Status::Ok, &["vmx"]);
    fails(&facts, "module", &["kvm is not loaded", "sudo modprobe kvm_intel;", "dmesg"]);
    fails(&facts, "device", &["/dev/kvm does not exist", "ENOENT", "once the module is loaded"]);
    assert!(diagnose(&facts).iter().all(|f| f.check != "vm"), "nothing was tried");

    let amd = Cpu { vendor: Some(Vendor::Amd), vmx: false, svm: true, hypervisor: false };
    fails(&HostFacts { cpu: Some(amd), ..facts }, "module", &["sudo modprobe kvm_amd;"]);
    fails(
        &HostFacts { cpu: None, ..no_module() },
        "module",
        &["kvm_intel || sudo modprobe kvm_amd"],
    );
}

#[test]
fn only_the_common_module() {
    let modules = Modules { visible: true, kvm: true, ..Modules::default() };
    fails(&HostFacts { modules, ..no_module() }, "module", &["no driver for this CPU", "modprobe"]);
}

#[test]
fn no_extension_is_the_firmwares_doing() {
    let facts = without_extension(no_module(), Some(Vendor::Intel), false);
    fails(&facts, "virtualization", &["neither vmx nor svm", "VT-x", "firmware"]);
    fails(&facts, "module", &["once the CPU offers virtualization, sudo modprobe kvm_intel"]);
    let facts = without_extension(no_module(), Some(Vendor::Amd), false);
    fails(&facts, "virtualization", &["SVM", "firmware"]);
}

#[test]
fn no_extension_inside_a_vm_is_the_outer_hypervisors_doing() {
    let facts = without_extension(no_module(), Some(Vendor::Amd), true);
    fails(&facts, "virtualization", &["itself a VM", "-cpu host", "nested=1", "cloud"]);
    // The module may be there and refuse: creating the VM then fails.
    let error = Error::new(Ioctl::CreateVm, Errno::ENODEV);
    let trial = Err(init_error(Step::CreateVm, error.into()));
    fails(&HostFacts { trial, ..facts }, "virtualization", &["itself a VM"]);
}

#[test]
fn not_an_x86_host() {
    let facts = without_extension(no_module(), None, false);
    fails(&facts, "virtualization", &["x86-64"]);
}

#[test]
fn nested_virtualization_is_told_and_no_fault() {
    let mut facts = good();
    facts.cpu.as_mut().unwrap().hypervisor = true;
    facts.modules.nested = Some(true);
    says(&facts, "virtualization", Status::Ok, &["vmx", "itself a VM"]);
    says(&facts, "module", Status::Ok, &["kvm_intel", "nested=1"]);
}

#[test]
fn kvm_in_software_is_a_warning() {
    let modules = Modules { visible: true, kvm: true, kvm_pvm: true, ..Modules::default() };
    let facts = HostFacts { modules, ..without_extension(good(), Some(Vendor::Amd), true) };
    says(&facts, "virtualization", Status::Warn, &["kvm_pvm", "slow", "complete"]);
    says(&facts, "module", Status::Ok, &["kvm_pvm"]);
    assert!(diagnose(&facts).iter().all(|f| f.status != Status::Fail));
}

#[test]
fn no_node_in_a_container() {
    let facts = HostFacts { container: true, ..no_module() };
    fails(&facts, "device", &["docker run --device /dev/kvm"]);
    fails(&facts, "module", &["on the host of this container: sudo modprobe"]);
}

#[test]
fn no_node_though_the_driver_is_loaded() {
    let facts = HostFacts { node: Some(Err(Errno::ENOENT)), ..fails_to_open(Errno::ENOENT) };
    fails(&facts, "device", &["mknod -m 660 /dev/kvm c 10 232", "docker run --device"]);
    says(&facts, "module", Status::Ok, &["kvm_intel"]);
}

#[test]
fn another_path_is_questioned_first() {
    let mut facts = fails_to_open(Errno::ENOENT);
    facts.device = DeviceChoice::Path("/dev/kwm".into());
    fails(&facts, "device", &["/dev/kwm does not exist", "--kvm"]);
}

#[test]
fn not_in_the_group() {
    let mut facts = fails_to_open(Errno::EACCES);
    facts.user.groups = vec![1000];
    node(&mut facts).user_is_listed = false;
    let words = ["EACCES", "owner root, group kvm, mode 0660", "you are alice, not in group kvm"];
    fails(&facts, "device", &words);
    fails(&facts, "device", &["sudo usermod -aG kvm alice, then log out and in again"]);
    says(&facts, "module", Status::Ok, &[]);
}

#[test]
fn in_the_group_since_the_last_login_only() {
    let mut facts = fails_to_open(Errno::EACCES);
    facts.user.groups = vec![1000];
    fails(&facts, "device", &["not yet a member in this session", "log out and in", "newgrp kvm"]);
}

#[test]
fn a_group_or_user_without_a_name() {
    let mut facts = fails_to_open(Errno::EACCES);
    facts.user.groups = vec![1000];
    node(&mut facts).group = None;
    node(&mut facts).user_is_listed = false;
    fails(&facts, "device", &["group 106", "--group-add 106"]);
    node(&mut facts).group = Some("kvm".into());
    facts.user.name = None;
    fails(&facts, "device", &["you are uid 1000", "--group-add 106"]);
}

#[test]
fn a_node_no_group_may_use() {
    let mut facts = fails_to_open(Errno::EACCES);
    facts.user.groups = vec![1000];
    for (mode, gid) in [(0o600, 0), (0o660, 0), (0o600, 106), (0o640, 106)] {
        let node = node(&mut facts);
        (node.mode, node.gid, node.user_is_listed) = (mode, gid, false);
        let words = [&*format!("mode {mode:04o}"), "chgrp kvm /dev/kvm", "chmod 660", "udev"];
        fails(&facts, "device", &words);
        fails(&facts, "device", &["usermod -aG kvm alice"]);
    }
}

#[test]
fn a_mode_that_would_allow_it_is_not_blamed() {
    let facts = fails_to_open(Errno::EPERM);
    fails(&facts, "device", &["EPERM", "it is not the mode", "--device", "DeviceAllow", "SELinux"]);
    let mut facts = fails_to_open(Errno::EACCES);
    facts.user.uid = 0;
    node(&mut facts).mode = 0o600;
    fails(&facts, "device", &["it is not the mode"]);
}

#[test]
fn an_owner_without_rights() {
    let mut facts = fails_to_open(Errno::EACCES);
    node(&mut facts).uid = 1000;
    node(&mut facts).mode = 0o060;
    fails(&facts, "device", &["the owner", "chmod u+rw /dev/kvm"]);
}

#[test]
fn a_directory_that_can_not_be_searched() {
    let facts = HostFacts { node: Some(Err(Errno::EACCES)), ..fails_to_open(Errno::EACCES) };
    fails(&facts, "device", &["can't even be looked at: EACCES", "search"]);
}

#[test]
fn a_node_without_a_driver() {
    for errno in [Errno::ENODEV, Errno::ENXIO] {
        let modules = Modules { visible: true, ..Modules::default() };
        let facts = HostFacts { modules, ..fails_to_open(errno) };
        fails(&facts, "device", &["no driver serves it", errno.name().unwrap()]);
        fails(&facts, "module", &["kvm is not loaded"]);
        let facts = fails_to_open(errno);
        fails(&facts, "device", &["something else", "sudo rm /dev/kvm && sudo mknod"]);
    }
}

#[test]
fn other_errors_of_opening() {
    fails(&fails_to_open(Errno::EBUSY), "device", &["EBUSY", "another hypervisor", "stop it"]);
    fails(&fails_to_open(Errno::EMFILE), "device", &["EMFILE", "ulimit -n"]);
    fails(&fails_to_open(Errno::EIO), "device", &["EIO", "dmesg"]);
    let facts =
        HostFacts { device: DeviceChoice::Fd(9), node: None, ..fails_to_open(Errno::EBADF) };
    fails(&facts, "device", &["fd:9 is no open descriptor", "3<>/dev/kvm"]);
}

#[test]
fn what_is_not_kvm() {
    let mut facts = fails_to_open(Errno::ENOTTY);
    fails(&facts, "device", &["/dev/kvm is not KVM: ENOTTY", "something else", "mknod"]);
    facts.device = DeviceChoice::Path("/dev/null".into());
    fails(&facts, "device", &["/dev/null is not KVM: ENOTTY", "--kvm"]);
    node(&mut facts).is_char_device = false;
    fails(&facts, "device", &["not even a character device"]);
    let error = Error::new(Ioctl::GetApiVersion, Errno::EINVAL);
    facts.trial = Err(init_error(Step::ApiVersion, InitErrorKind::NotKvm(error)));
    fails(&facts, "device", &["is not KVM", "EINVAL"]);
}

#[test]
fn a_kvm_that_lacks_something() {
    for (step, kind, word) in [
        (Step::ApiVersion, InitErrorKind::ApiVersionTooOld(0), "version 0 is too old"),
        (Step::ApiVersion, InitErrorKind::ApiVersionTooNew(13), "version 13"),
        (
            Step::RequiredCapabilities,
            InitErrorKind::MissingCapabilities(vec![Capability::ExtCpuid, Capability::MpState]),
            "KVM_CAP_MP_STATE",
        ),
        (
            Step::Irqchip,
            InitErrorKind::Unsupported {
                request: Request::KernelIrqchip,
                capability: Capability::Irqchip,
            },
            "KVM_CAP_IRQCHIP",
        ),
    ] {
        let facts = HostFacts { trial: Err(init_error(step, kind)), ..good() };
        says(&facts, "device", Status::Ok, &["opens"]);
        fails(&facts, "vm", &[word, "kernel"]);
    }
}

#[test]
fn creating_the_vm_fails() {
    let error = Error::new(Ioctl::CreateVm, Errno::EBUSY);
    let facts = HostFacts { trial: Err(init_error(Step::CreateVm, error.into())), ..good() };
    fails(&facts, "vm", &["KVM_CREATE_VM failed: EBUSY", "another hypervisor"]);
    let error = Error::new(Ioctl::CreateVcpu, Errno::ENOMEM);
    let facts = HostFacts { trial: Err(TrialError::Call(error)), ..good() };
    fails(&facts, "vm", &["KVM_CREATE_VCPU failed: ENOMEM", "dmesg"]);
}

#[test]
fn a_vcpu_that_does_not_do_what_it_should() {
    let mut data = [0; 16];
    (data[0], data[1]) = (1, u64::from_le_bytes([2, 0x0f, 0x0b, 0, 0, 0, 0, 0]));
    let internal = InternalError { suberror: INTERNAL_ERROR_EMULATION, ndata: 3, data };
    let exit = |exit| TrialError::Exit(Box::new(exit));
    for (error, words) in [
        (exit(VcpuExit::FailEntry { reason: 0x21, cpu: 3 }), ["refused", "0x21"]),
        (exit(VcpuExit::InternalError(internal)), ["INTERNAL_ERROR_EMULATION", "0f, 0b"]),
        (exit(VcpuExit::Shutdown), ["Shutdown", "dmesg"]),
        (TrialError::Data(vec![0x5b]), ["5b", "dmesg"]),
        (TrialError::TimedOut, ["20 s", "overloaded"]),
        (TrialError::NoThread(Errno::EAGAIN), ["EAGAIN", "ulimit -u"]),
    ] {
        fails(&HostFacts { trial: Err(error), ..good() }, "vm", &words);
    }
}

#[test]
fn limits_of_the_process_are_warnings() {
    let facts = HostFacts { open_files: Some(64), ..good() };
    says(&facts, "open-files", Status::Warn, &["64", "ulimit -n 1024"]);
    let facts = HostFacts { memory_available: Some(100 << 20), ..good() };
    says(&facts, "memory", Status::Warn, &["100 MiB", "--memory"]);
    let facts = HostFacts { address_space: Some(1 << 30), ..good() };
    says(&facts, "memory", Status::Warn, &["1024 MiB", "ulimit -v"]);
    let facts = HostFacts { open_files: None, tun: Err(Errno::EACCES), ..good() };
    says(&facts, "open-files", Status::Ok, &["no limit"]);
    says(&facts, "network", Status::Ok, &["EACCES", "no VM needs it"]);
}

#[test]
fn every_failure_has_a_fail_and_every_finding_that_is_not_ok_a_remedy() {
    let mut trials: Vec<TrialError> = (0..=140)
        .map(|n| {
            let error = OpenError { choice: DeviceChoice::default(), errno: Errno(n) };
            init_error(Step::Open, error.into())
        })
        .collect();
    trials.extend(Step::ALL.iter().map(|&step| {
        let error = Error::new(Call::Ioctl(Ioctl::CheckExtension), Errno::EIO);
        init_error(step, error.into())
    }));
    trials.push(init_error(Step::PageSize, InitErrorKind::PageSize { host: 1024 }));
    trials.push(TrialError::TimedOut);
    let hosts = [
        good(),
        no_module(),
        without_extension(good(), Some(Vendor::Other), false),
        without_extension(no_module(), None, true),
        HostFacts { cpu: None, node: None, modules: Modules::default(), ..good() },
        HostFacts { container: true, user: User { uid: 0, name: None, groups: vec![] }, ..good() },
    ];
    for trial in trials {
        for host in &hosts {
            let findings = diagnose(&HostFacts { trial: Err(trial.clone()), ..host.clone() });
            assert!(findings.iter().any(|f| f.status == Status::Fail), "{trial:?} {findings:#?}");
            for finding in &findings {
                assert_eq!(finding.status == Status::Ok, finding.remedy.is_none(), "{finding:?}");
                assert!(!finding.summary.contains('\n'), "{finding:?}");
            }
        }
    }
}
