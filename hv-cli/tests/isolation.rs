//! What an isolated process does when one of its threads does what it must not. Such a process ends, so each
//! case is a process of its own: this binary again, with the case in the environment.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod virtio;

use std::fs::File;
use std::net::TcpStream;
use std::process::{Command, Output};

use hv_cli::config::{CacheMode, DiskConfig, DiskIo};
use hv_cli::isolation::{Kind, Policy, Sandbox, SeccompMode, SystemCall, start};
use hv_cli::virtio::{Blk, DeviceError, Rng, Session, VirtioDevice};
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

/// Which part the process plays.
const PART: &str = "HV_ISOLATION_TEST";

/// Runs this test again, playing a part.
fn child(test: &str, part: &str) -> Output {
    let mut this = Command::new(std::env::current_exe().unwrap());
    this.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(PART, part);
    this.output().unwrap()
}

fn part() -> Option<String> {
    std::env::var(PART).ok()
}

fn isolate(seccomp: SeccompMode) {
    start(Policy { seccomp, ..Policy::default() }).unwrap();
}

/// A device that a guest has taken over: when its driver rings, it opens a file.
struct Evil;

impl VirtioDevice for Evil {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn queue_ready(&mut self, _: &mut Session, _: usize) -> Result<(), DeviceError> {
        let opened = File::open("/etc/passwd").is_ok();
        println!("the file was opened: {opened}");
        Ok(())
    }
}

fn drive(device: impl VirtioDevice) {
    let machine = Machine::new();
    let driver = machine.add(device);
    let ring = Ring::new(&machine, 0x1_0000, 16);
    driver.start(VERSION_1, &ring);
    ring.descriptor(0, 0x8_0000, 64, WRITE, 0);
    ring.offer(0);
    driver.ring(0);
    driver.wait_for_requests(1);
}

#[test]
fn a_device_that_opens_a_file_ends_the_vm_with_a_message_and_the_exit_code() {
    match part().as_deref() {
        Some("evil") => {
            isolate(SeccompMode::On);
            drive(Evil);
        }
        Some("honest") => {
            isolate(SeccompMode::On);
            drive(Rng::new());
        }
        _ => {
            let test = "a_device_that_opens_a_file_ends_the_vm_with_a_message_and_the_exit_code";
            let output = child(test, "evil");
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(16), "{output:?}");
            let wanted = "hv: error: a device thread made the system call openat (257), which its seccomp filter";
            assert!(said.contains(wanted) && said.contains("--seccomp log"), "{said}");
            assert!(!String::from_utf8_lossy(&output.stdout).contains("was opened"));
            assert_eq!(child(test, "honest").status.code(), Some(0));
        }
    }
}

/// A write, a read, a flush and a discard of a disk: their statuses. With a feature that switches the cache off,
/// each write is made safe.
fn use_disk(io: DiskIo, features: u64) -> [u8; 4] {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(8 * 512).unwrap();
    let cache = if features == 0 { CacheMode::Writethrough } else { CacheMode::Writeback };
    let disk = Blk::open(&DiskConfig { io, cache, ..DiskConfig::new(file.path()) }).unwrap();
    let machine = Machine::new();
    let driver = machine.add(disk);
    let ring = Ring::new(&machine, 0x1_0000, 16);
    driver.start(VERSION_1 | features, &ring);
    let (header, data, status) = (0x2_0000u64, 0x3_0000u64, 0x4_0000u64);
    // Type, bytes of data, whether the device writes them.
    let requests = [(1u32, 512, false), (0, 512, true), (4, 0, false), (11, 16, false)];
    let mut done = 0;
    requests.map(|(kind, len, writes)| {
        machine.memory.write_obj(u128::from(kind), GuestAddress(header)).unwrap();
        // Of a discard: sector 0, one sector.
        machine.memory.write_obj(1u128 << 64, GuestAddress(data)).unwrap();
        machine.memory.write_obj(0xffu8, GuestAddress(status)).unwrap();
        ring.descriptor(0, header, 16, NEXT, if len > 0 { 1 } else { 2 });
        ring.descriptor(1, data, len, if writes { NEXT | WRITE } else { NEXT }, 2);
        ring.descriptor(2, status, 1, WRITE, 0);
        ring.offer(0);
        driver.ring(0);
        done += 1;
        driver.wait_for_requests(done);
        machine.memory.read_obj(GuestAddress(status)).unwrap()
    })
}

/// Every call that a disk makes is one that it names.
#[test]
fn a_disk_makes_no_call_that_its_filter_does_not_allow() {
    match part().as_deref() {
        Some(part) => {
            isolate(SeccompMode::On);
            let io = if part == "sync" { DiskIo::Sync } else { DiskIo::Auto };
            for features in [0, 1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH] {
                assert_eq!(use_disk(io, features), [0; 4]);
            }
        }
        None => {
            for part in ["sync", "auto"] {
                let test = "a_disk_makes_no_call_that_its_filter_does_not_allow";
                let output = child(test, part);
                assert_eq!(output.status.code(), Some(0), "{part}: {output:?}");
            }
        }
    }
}

/// With `log` the call is made; Landlock still refuses.
#[test]
fn files_and_ports_are_out_of_reach_even_where_calls_are_only_logged() {
    if part().is_some() {
        isolate(SeccompMode::Log);
        let tried = std::thread::spawn(|| {
            Sandbox::new(Kind::Device, &[]).unwrap().enter().unwrap();
            let opened = File::open("/etc/passwd").err().and_then(|e| e.raw_os_error());
            let connected = TcpStream::connect("127.0.0.1:9").err().and_then(|e| e.raw_os_error());
            (opened, connected)
        });
        println!("tried: {:?}", tried.join().unwrap());
        println!("the main thread: {}", File::open("/etc/passwd").is_ok());
        return;
    }
    let test = "files_and_ports_are_out_of_reach_even_where_calls_are_only_logged";
    let output = child(test, "log");
    let said = String::from_utf8_lossy(&output.stdout);
    if landlock_abi() < 4 {
        eprintln!("NOT TESTED: this kernel's Landlock has no rules for ports: {said}");
        return;
    }
    assert!(said.contains("tried: (Some(13), Some(13))"), "{output:?}");
    assert!(said.contains("the main thread: true"), "only the thread is restricted: {output:?}");
}

/// The version of Landlock, 0 without it.
fn landlock_abi() -> i32 {
    use landlock::{ABI, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let with = |access| {
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        ruleset.handle_access(access).is_ok()
    };
    if with(AccessNet::BindTcp) { ABI::V4 as i32 } else { 0 }
}

#[test]
fn a_call_is_allowed_only_with_its_arguments() {
    if let Some(part) = part() {
        isolate(SeccompMode::On);
        let more = [SystemCall::with(libc::SYS_lseek, 2, libc::SEEK_CUR as u64)];
        Sandbox::new(Kind::Device, &more).unwrap().enter().unwrap();
        let whence = if part == "allowed" {
            rustix::fs::SeekFrom::Current(0)
        } else {
            rustix::fs::SeekFrom::Start(0)
        };
        // A pipe can't seek: what matters is that the call is made.
        let _ = rustix::fs::seek(rustix::stdio::stderr(), whence);
        return;
    }
    let test = "a_call_is_allowed_only_with_its_arguments";
    assert_eq!(child(test, "allowed").status.code(), Some(0));
    let other = child(test, "other");
    assert_eq!(other.status.code(), Some(16));
    assert!(String::from_utf8_lossy(&other.stderr).contains("lseek (8)"), "{other:?}");
}

#[test]
fn a_process_that_asks_for_no_isolation_has_none() {
    if part().is_some() {
        isolate(SeccompMode::Off);
        Sandbox::new(Kind::Device, &[]).unwrap().enter().unwrap();
        assert!(File::open("/etc/passwd").is_ok());
        println!("opened");
        return;
    }
    let output = child("a_process_that_asks_for_no_isolation_has_none", "off");
    assert!(String::from_utf8_lossy(&output.stdout).contains("opened"), "{output:?}");
}

/// glibc looks for processors in /sys when its ninth thread allocates, unless it is told not to.
#[test]
fn many_threads_that_allocate_open_no_files() {
    if part().is_some() {
        isolate(SeccompMode::On);
        Sandbox::new(Kind::Control, &[]).unwrap().enter().unwrap();
        let together = std::sync::Barrier::new(32);
        std::thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    together.wait();
                    std::hint::black_box(vec![1_u8; 1000]);
                    together.wait();
                });
            }
        });
        return;
    }
    let output = child("many_threads_that_allocate_open_no_files", "many");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
