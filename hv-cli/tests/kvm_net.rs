//! `--net` on real KVM and with real tap interfaces: Linux gets an address, answers, and moves bytes over
//! TCP, by tap and by passt; what a tap interface refuses, and one that disappears.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]
#![allow(unsafe_code, reason = "a tap interface is opened as the parent of hv does it")]

mod common;
mod network;
mod virtio;

use std::fs::OpenOptions;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use common::{Running, artefact};
use hv_cli::config::{NetBackend, NetConfig};
use hv_cli::virtio::{Net, NetError};
use network::{Namespace, serve_dhcp, serve_tcp};
use virtio::{Machine, NEEDS_RESET, Ring, VERSION_1, WRITE, wait_for};
use vm_memory::{Bytes, GuestAddress};

/// See `kvm_linux.rs`; the kernel asks for an address.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 mitigations=off noxsave rodata=off ip=dhcp \
    clearcpuid=cx16,smap,smep,umip,popcnt,movbe,fsgsbase,invpcid,pcid,rdrand,rdseed,pku hv.check=net";

/// A kernel that runs in software takes minutes for all of its packets, more on a busy machine.
const LIMIT: Duration = Duration::from_secs(1000);

/// Linux in a namespace, with its network device and where its counters go.
fn boot(namespace: &Namespace, net: &str, cpus: &str, stats: &str) -> Running {
    let (kernel, initrd) = (artefact("HV_GUEST_VMLINUX"), artefact("HV_GUEST_INITRD"));
    let mut hv = namespace.command(env!("CARGO_BIN_EXE_hv"));
    hv.args(["run", "--net", net, "--cpus", cpus, "--memory", "128M", "--stats-json", stats]);
    hv.args(["--cmdline", CMDLINE]).arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    Running::spawn(&mut hv).within(LIMIT)
}

/// To the guest's end. Its network device has worked without errors, and has the interrupts the guest saw.
fn end(mut linux: Running, stats: &tempfile::NamedTempFile, queues: &[&str]) {
    linux.send("\n");
    linux.wait_for("hv-guest: power off");
    let ran = linux.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let stats: serde_json::Value = serde_json::from_reader(stats).unwrap();
    let net = &stats["devices"][0];
    let count = |name: &str| net[name].as_u64().unwrap();
    assert_eq!((&net["name"], &net["failure"]), (&"net0".into(), &serde_json::Value::Null));
    for bytes in ["bytes-to-guest", "bytes-from-guest"] {
        assert!(count(bytes) > 16 << 20, "{stats:#}");
    }
    for none in ["notification-exits", "errors", "needs-reset", "refused"] {
        assert_eq!(count(none), 0, "{none}: {stats:#}");
    }
    let mut seen = 0;
    for queue in queues {
        let lines =
            ran.stdout.lines().filter_map(|line| line.strip_prefix("hv-guest: interrupts:"));
        let line = lines.into_iter().find(|line| line.contains(queue)).unwrap();
        assert!(line.contains("PCI-MSI"), "{line}");
        let numbers = line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok());
        seen += numbers.sum::<u64>();
    }
    // There may have been more after it was looked at.
    assert!((1..=count("interrupts")).contains(&seen), "{seen}: {stats:#}");
}

#[test]
fn linux_gets_an_address_answers_pings_and_moves_bytes_over_a_tap_with_two_queues() {
    let namespace = Namespace::new();
    let (host, guest) = (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2));
    namespace.ip("tuntap add tap0 mode tap multi_queue");
    namespace.ip("addr add 10.77.0.1/24 dev tap0");
    namespace.ip("link set tap0 up");
    namespace.ip("route add 255.255.255.255 dev tap0");
    let dhcp = serve_dhcp(&namespace, host, guest);
    let tcp = serve_tcp(namespace.enter(|| TcpListener::bind((host, 7777)).unwrap()));

    let stats = tempfile::NamedTempFile::new().unwrap();
    let stats_path = stats.path().to_str().unwrap();
    let net = "tap=tap0,queues=2,mac=02:00:00:77:00:02";
    let mut linux = boot(&namespace, net, "2", stats_path);
    linux.wait_for("hv-guest: check net: ok: 16 MiB each way");
    assert_eq!(tcp.join().unwrap().ip(), IpAddr::V4(guest));
    assert_eq!(dhcp.join().unwrap(), [2, 0, 0, 0x77, 0, 2]);
    linux.wait_for("hv-guest: ready");

    let pings = namespace.run("ping", "-q -A -c 1000 -W 60 10.77.0.2");
    assert!(pings.contains("1000 packets transmitted, 1000 received, 0% packet loss"), "{pings}");
    end(
        linux,
        &stats,
        &["virtio0-input.0", "virtio0-output.0", "virtio0-input.1", "virtio0-output.1"],
    );
}

#[test]
fn linux_moves_bytes_through_passt_which_ends_with_it() {
    let namespace = Namespace::new();
    // What passt takes for the host's network: the guest gets its address, and the host is behind its
    // gateway.
    namespace.ip("tuntap add ext0 mode tap");
    namespace.ip("addr add 10.88.0.2/24 dev ext0");
    namespace.ip("link set ext0 up");
    namespace.ip("route add default via 10.88.0.1 dev ext0");
    let tcp = serve_tcp(namespace.enter(|| TcpListener::bind("0.0.0.0:7777").unwrap()));

    let stats = tempfile::NamedTempFile::new().unwrap();
    let mut linux = boot(&namespace, "user", "1", stats.path().to_str().unwrap());
    linux.wait_for("hv-guest: check net: ok: 16 MiB each way");
    tcp.join().unwrap();
    linux.wait_for("hv-guest: ready");
    assert_eq!(namespace.count("passt"), 1);
    end(linux, &stats, &["virtio0-input.0", "virtio0-output.0"]);
    assert_eq!(namespace.count("passt"), 0, "it is left behind");
}

const SENT: u64 = 0x4_0000;

/// A driver that sends over its first pair of queues, and has buffers for what comes.
fn start(machine: &Machine, driver: &virtio::Driver<'_>, features: u64) -> Ring {
    let (receive, transmit) = (Ring::new(machine, 0x1_0000, 64), Ring::new(machine, 0x2_0000, 16));
    driver.reset();
    driver.negotiate(VERSION_1 | features);
    driver.set_up_queue(0, &receive, 0);
    driver.set_up_queue(1, &transmit, 1);
    for index in 0..64 {
        receive.descriptor(index, 0x8_0000, 2048, WRITE, 0);
        receive.offer(index);
    }
    driver.driver_ok();
    transmit
}

/// Sends a broadcast frame behind this header; how many were dropped since the beginning.
fn send(machine: &Machine, driver: &virtio::Driver<'_>, ring: &Ring, header: [u8; 12]) -> u64 {
    let frame = [&header[..], &[0xff; 6], &[2, 0, 0, 0, 0, 9, 0x88, 0xb5], &[0; 50]].concat();
    machine.memory.write_slice(&frame, GuestAddress(SENT)).unwrap();
    let before = ring.used_index();
    ring.descriptor(0, SENT, frame.len() as u32, 0, 0);
    ring.offer(0);
    driver.ring(1);
    wait_for("a frame to be sent or dropped", || ring.used_index() != before);
    driver.counters().errors
}

/// How many packets a tap interface has got.
fn packets(namespace: &Namespace) -> u64 {
    let shown: serde_json::Value =
        serde_json::from_str(&namespace.ip("-s -j link show tap0")).unwrap();
    shown[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}

const OFFLOADS: u64 = 1 << 16 | 1 << 11 | 1 << 1 | 1;
const PLAIN: [u8; 12] = [0; 12];

fn on_a_tap(device: impl FnOnce(&Namespace) -> Net) {
    let namespace = Namespace::new();
    namespace.ip("tuntap add tap0 mode tap");
    let net = device(&namespace);
    let machine = Machine::new();
    let driver = machine.add(net);
    assert_eq!(driver.features() & OFFLOADS, OFFLOADS);
    let ring = start(&machine, &driver, OFFLOADS);
    // Down: the frame is dropped.
    assert_eq!(send(&machine, &driver, &ring, PLAIN), 1);
    namespace.ip("link set tap0 up");
    let before = packets(&namespace);
    assert_eq!(send(&machine, &driver, &ring, PLAIN), 1);
    assert_eq!(packets(&namespace), before + 1);
    // Kinds of segmentation there are not, and a checksum beyond the frame: the kernel refuses them.
    let garbage: [[u8; 12]; 3] = [
        [0xff; 12],
        [0, 0x7f, 54, 0, 0, 4, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ];
    for (n, header) in (2..).zip(garbage) {
        assert_eq!(send(&machine, &driver, &ring, header), n, "{header:?}");
    }
    assert_eq!(send(&machine, &driver, &ring, PLAIN), 4);
    assert_eq!(packets(&namespace), before + 2);

    // It disappears. The driver is told, the device goes on, and so after a reset.
    assert_eq!(driver.device_config::<2>(6), [1, 0]);
    namespace.ip("link del tap0");
    wait_for("the link to be down", || driver.device_config::<2>(6) == [0, 0]);
    assert_eq!(send(&machine, &driver, &ring, PLAIN), 5);
    let ring = start(&machine, &driver, OFFLOADS);
    assert_eq!(send(&machine, &driver, &ring, PLAIN), 6);
    assert_eq!((driver.status() & NEEDS_RESET, driver.counters().needs_reset), (0, 0));
    machine.end(|_| false);
}

#[test]
fn what_a_tap_refuses_is_dropped_and_one_that_disappears_is_a_link_that_is_down() {
    on_a_tap(|namespace| namespace.enter(|| open("tap=tap0").unwrap()));
}

#[test]
fn a_tap_that_the_parent_has_opened_is_the_same() {
    on_a_tap(|namespace| {
        let tap = namespace.enter(opened_tap);
        Net::open(&NetConfig::new(NetBackend::Fd(tap.as_raw_fd()))).unwrap()
    });
}

fn open(text: &str) -> Result<Net, NetError> {
    Net::open(&text.parse().unwrap())
}

fn opened_tap() -> OwnedFd {
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request[16..18].copy_from_slice(&(flags as u16).to_le_bytes());
    // SAFETY: the kernel reads and writes a struct ifreq, which is 40 bytes.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    tap.into()
}

#[test]
fn taps_that_can_not_be_had_are_refused_with_what_to_do() {
    let namespace = Namespace::new();
    namespace.ip("tuntap add tap0 mode tap");
    namespace.ip("tuntap add tap1 mode tap multi_queue");
    namespace.ip("tuntap add tun0 mode tun");
    namespace.enter(|| {
        let first = open("tap=tap0").unwrap();
        let error = |text: &str| open(text).map(drop).unwrap_err().to_string();
        let busy = error("tap=tap0");
        assert!(busy.starts_with("--net tap=tap0: TUNSETIFF: EBUSY"), "{busy}");
        assert!(busy.ends_with("another program uses it"), "{busy}");
        drop(first);
        for wrong in ["tap=tap0,queues=2", "tap=tap1", "tap=tun0", "tap=lo"] {
            let error = error(wrong);
            assert!(error.contains("TUNSETIFF: EINVAL"), "{error}");
        }
        drop(open("tap=tap0").unwrap());
        drop(open("tap=tap1,queues=16").unwrap());
    });
}
