//! The system descriptor, and that no descriptor is left behind. One process, one test of counts.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;

use common::real_mode;
use hv_core::{Capability, DeviceChoice, Hypervisor, OpenErrorKind, Vcpu, VcpuExit, Vm};
use hv_kvm::Kvm;

#[test]
fn the_host_answers() {
    let kvm = common::kvm();
    assert_eq!(kvm.api_version(), Ok(12));
    assert!(kvm.vcpu_mmap_size().unwrap() >= 8192);
    for cap in [Capability::UserMemory, Capability::Irqchip, Capability::ImmediateExit] {
        assert!(kvm.check_extension(cap).unwrap() > 0, "{cap}");
    }
    let vm = kvm.create_vm(0).unwrap();
    let routes = vm.check_extension(Capability::IrqRouting).unwrap();
    assert!(routes >= 1024, "a number, not a boolean: {routes}");
    assert!(kvm.create_vm(u64::MAX).is_err());
}

#[test]
fn the_msr_list_tells_how_much_room_it_needs() {
    let kvm = common::kvm();
    let asked = kvm.msr_index_list(0).unwrap();
    assert!(asked.available > 10 && asked.indices.is_empty(), "{asked:?}");
    let short = kvm.msr_index_list(asked.available - 1).unwrap();
    assert_eq!((short.available, short.indices.len()), (asked.available, 0));
    for room in [asked.available, asked.available + 100] {
        let list = kvm.msr_index_list(room).unwrap();
        assert_eq!((list.available, list.indices.len()), (asked.available, asked.available));
        assert!(list.indices.contains(&0x174), "IA32_SYSENTER_CS");
    }
}

#[test]
fn from_descriptors() {
    let file = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let number = file.as_raw_fd();
    for _ in 0..2 {
        let inherited = Kvm::from_inherited(number).unwrap();
        assert_eq!(inherited.api_version(), Ok(12));
    }
    let kvm = Kvm::from_fd(file.into()).unwrap();
    assert_eq!(kvm.api_version(), Ok(12), "the number was not closed");
    drop(kvm);
}

#[test]
fn descriptors_of_a_vm_are_not_the_system_s() {
    // Found by what they are, as the crate does not give its descriptors away.
    let (_vm, _vcpu, _) = real_mode(&[0xf4]);
    let (mut vms, mut vcpus) = (0, 0);
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        let fd = entry.file_name().to_string_lossy().parse().unwrap();
        if target.starts_with("anon_inode:kvm-v") {
            // Another test may close its own meanwhile: then it can't be duplicated.
            let error = Kvm::from_inherited(fd).unwrap_err();
            assert_eq!(error.choice, DeviceChoice::Fd(fd));
            // Another test may close its own meanwhile: then it can't be duplicated.
            if error.kind() == OpenErrorKind::BadDescriptor {
                continue;
            }
            if target.starts_with("anon_inode:kvm-vm") { vms += 1 } else { vcpus += 1 }
        }
    }
    assert!(vms > 0 && vcpus > 0);
}

/// In a child process, because other tests of this one open and close descriptors meanwhile.
#[test]
fn nothing_stays_open() {
    const CHILD: &str = "HV_KVM_COUNT_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "nothing_stays_open", "--test-threads=1", "--nocapture"])
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let before = open_descriptors();
    for _ in 0..20 {
        let (vm, mut vcpu, _) = real_mode(&[0xf4]);
        let second = vm.create_vcpu(1).unwrap();
        vm.create_vcpu(1).unwrap_err();
        let eventfd = common::kvm().eventfd().unwrap();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Hlt);
        Kvm::from_inherited(eventfd.as_raw_fd()).unwrap_err();
        Kvm::open("/dev/null").unwrap_err();
        drop(vm);
        drop(vcpu);
        drop(second);
    }
    assert_eq!(open_descriptors(), before);

    let (_vm, _vcpu, _) = real_mode(&[0xf4]);
    let _eventfd = common::kvm().eventfd().unwrap();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let _inherited = Kvm::from_inherited(kvm.as_raw_fd()).unwrap();
    for (fd, target, flags) in kvm_descriptors() {
        assert!(flags & libc::O_CLOEXEC != 0, "{fd} ({target}) would be inherited");
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Number, target and flags of the descriptors of KVM and of eventfds.
fn kvm_descriptors() -> Vec<(String, String, i32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        if !(target.contains("kvm") || target.contains("eventfd")) {
            continue;
        }
        let fd = entry.file_name().to_string_lossy().into_owned();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        found.push((fd, target, i32::from_str_radix(flags.trim(), 8).unwrap()));
    }
    assert!(found.len() >= 4, "{found:?}");
    found
}
