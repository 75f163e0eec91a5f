//! Linux on real KVM with its console on virtio, vsock and a memory balloon: one guest for all three.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use common::{Running, artefact};

/// As in kvm_linux.rs, but for the console; and what makes the boot shorter.
const CMDLINE: &str = "console=hvc0 reboot=k panic=-1 mitigations=off noxsave \
    clearcpuid=cx16,smap,smep,umip,popcnt,movbe,fsgsbase,invpcid,pcid,rdrand,rdseed,pku \
    pty.legacy_count=0 rodata=off hv.check=vsock,balloon";

const MIB: u64 = 1 << 20;

/// Sends data, which the other side sends back.
fn is_echoed(stream: &mut UnixStream, len: usize) {
    let data: Vec<u8> =
        (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == data, "{} bytes of {len} came back", back.len());
}

/// Connects to a port of the guest.
fn connect(path: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = String::new();
    // Nothing follows the line before something is sent.
    BufReader::new(&stream).read_line(&mut line).unwrap();
    assert!(line.starts_with("OK "), "{line:?}");
    stream
}

/// Bytes of memory that a process takes up.
fn resident(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn linux_on_hvc0_echoes_through_vsock_and_fills_and_empties_the_balloon() {
    let dir = tempfile::tempdir().unwrap();
    let vsock = dir.path().join("vsock");
    let listener = UnixListener::bind(dir.path().join("vsock_5000")).unwrap();
    let stats = dir.path().join("stats.json");
    let (kernel, initrd) = (artefact("HV_GUEST_VMLINUX"), artefact("HV_GUEST_INITRD"));
    let vsock_option = format!("cid=3,uds={}", vsock.display());
    let mut linux = Running::start(&[
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        CMDLINE,
        "--memory",
        "128M",
        "--prefault",
        "--console",
        "hvc0",
        "--vsock",
        &vsock_option,
        "--balloon",
        "32M",
        "--stats-json",
        stats.to_str().unwrap(),
    ]);
    linux.wait_for("hv-guest: init up");

    let (mut stream, _) = listener.accept().unwrap();
    is_echoed(&mut stream, 1 << 20);
    is_echoed(&mut connect(&vsock, 1024), 100_000);
    linux.wait_for("hv-guest: check vsock: ok");

    linux.wait_for("hv-guest: check balloon: ok: 32 MiB came out of the balloon");
    // All of the guest's memory was there before it ran; now not even the whole process is that large.
    let resident = resident(linux.pid());
    assert!(resident < 128 * MIB, "{resident} bytes are resident");

    linux.wait_for("hv-guest: ready");
    linux.send("typed on the console\n");
    linux.wait_for("hv-guest: echo: typed on the console");
    linux.wait_for("hv-guest: power off");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.stderr.contains("hv-guest"), "the serial port: {}", ran.stderr);
    assert!(!vsock.exists());

    let stats: serde_json::Value =
        serde_json::from_reader(std::fs::File::open(stats).unwrap()).unwrap();
    let device = |name: &str| {
        let devices = stats["devices"].as_array().unwrap();
        devices.iter().find(|device| device["name"] == name).unwrap().clone()
    };
    for name in ["console0", "vsock0", "balloon0"] {
        for none in ["notification-exits", "errors", "needs-reset", "refused"] {
            assert_eq!(device(name)[none], 0, "{none}: {stats:#}");
        }
    }
    let count = |name: &str, what: &str| device(name)[what].as_u64().unwrap();
    // Everything that was shown came from the console; both ways through vsock; four bytes for each page.
    assert_eq!(count("console0", "bytes-from-guest"), ran.stdout.len() as u64, "{stats:#}");
    assert!(count("vsock0", "bytes-from-guest") > MIB && count("vsock0", "bytes-to-guest") > MIB);
    assert!(count("balloon0", "bytes-from-guest") >= 2 * 4 * (32 * MIB / 4096), "{stats:#}");
}
