//! A network for a guest: a namespace of its own, which is gone with the test however it ends, and what
//! answers in it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What the tests need besides the guest; `cargo xtask kvm-test` installs it.
const PROGRAMS: [(&str, &str, &str); 5] = [
    ("ip", "-Version", "iproute2"),
    ("ping", "-V", "iputils-ping"),
    ("nsenter", "--version", "util-linux"),
    ("unshare", "--version", "util-linux"),
    ("passt", "--version", "passt"),
];

/// A network namespace. A process is in it that ends when this does, so that nothing is left of it even if
/// the test is killed.
pub(crate) struct Namespace {
    holder: Child,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "a network namespace takes root");
        assert!(fs::exists("/dev/net/tun").unwrap(), "a tap interface takes /dev/net/tun");
        for (program, ask, package) in PROGRAMS {
            let output = Command::new(program).arg(ask).output();
            let runs = output.is_ok_and(|output| output.status.success());
            assert!(runs, "{program} does not run: install the package {package}");
        }
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo in; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "in\n");
        let this = Self { holder };
        this.ip("link set lo up");
        this
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// A program in the namespace.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    /// Runs a program in the namespace, which must succeed; what it printed.
    pub(crate) fn run(&self, program: &str, arguments: &str) -> String {
        let output = self.command(program).args(arguments.split(' ')).output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {stdout}{stderr}");
        stdout
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.run("ip", arguments)
    }

    /// Does something in the namespace. What it opens stays there.
    pub(crate) fn enter<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.path()).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                what()
            });
            inside.join().unwrap()
        })
    }

    /// How many programs are in the namespace whose names begin so: passt becomes `passt.avx2` where it can.
    pub(crate) fn count(&self, name: &str) -> usize {
        let here = fs::read_link(self.path()).unwrap();
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let process = entry.unwrap().path();
            let namespace = fs::read_link(process.join("ns/net")).ok()?;
            (namespace == here).then(|| fs::read_to_string(process.join("comm")).ok())?
        });
        processes.filter(|comm| comm.starts_with(name)).count()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Answers DHCP (RFC 2131) with one address, and says whose it is as soon as that one has taken it.
pub(crate) fn serve_dhcp(
    namespace: &Namespace,
    server: Ipv4Addr,
    address: Ipv4Addr,
) -> thread::JoinHandle<[u8; 6]> {
    let socket = namespace.enter(|| UdpSocket::bind("0.0.0.0:67").unwrap());
    socket.set_broadcast(true).unwrap();
    thread::spawn(move || {
        let mut packet = [0; 1500];
        loop {
            let len = socket.recv(&mut packet).unwrap();
            let request = &packet[..len];
            // A request of a station with an Ethernet address, with options.
            if len < 244 || request[..3] != [1, 1, 6] || request[236..240] != [99, 130, 83, 99] {
                continue;
            }
            let answer = match option(&request[240..], 53) {
                Some([1]) => 2,
                Some([3]) => 5,
                _ => continue,
            };
            let mut reply = vec![0; 240];
            reply[..3].copy_from_slice(&[2, 1, 6]);
            reply[4..8].copy_from_slice(&request[4..8]);
            reply[16..20].copy_from_slice(&address.octets());
            reply[20..24].copy_from_slice(&server.octets());
            reply[28..44].copy_from_slice(&request[28..44]);
            reply[236..240].copy_from_slice(&request[236..240]);
            reply.extend([53, 1, answer, 51, 4, 0, 1, 0, 0, 1, 4, 255, 255, 255, 0]);
            for code in [54, 3] {
                reply.extend([code, 4]);
                reply.extend(server.octets());
            }
            reply.push(255);
            reply.resize(300, 0);
            socket.send_to(&reply, "255.255.255.255:68").unwrap();
            if answer == 5 {
                return request[28..34].try_into().unwrap();
            }
        }
    })
}

/// An option of a DHCP message.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [255, ..] | [] | [_] => return None,
            [code, len, rest @ ..] => {
                let (value, later) = rest.split_at_checked(usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                options = later;
            }
        }
    }
}

/// Bytes each way; what the guest's check `net` does.
const TOTAL: usize = 16 << 20;

/// The other end of the guest's check `net`: who connected, after all bytes have gone both ways and their
/// sums were the same at both ends.
pub(crate) fn serve_tcp(listener: TcpListener) -> thread::JoinHandle<SocketAddr> {
    thread::spawn(move || {
        let (mut guest, address) = listener.accept().unwrap();
        let mut sent: Vec<u8> = Vec::with_capacity(TOTAL);
        let mut state = 0x686f_7374_0000_0001_u64;
        while sent.len() < TOTAL {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            sent.extend((state >> 16).to_le_bytes().iter().take(4));
        }
        guest.write_all(&sent).unwrap();
        assert_eq!(read_sum(&mut guest), sum(&sent), "what the guest received");
        let mut got = vec![0; TOTAL];
        guest.read_exact(&mut got).unwrap();
        assert_eq!(read_sum(&mut guest), sum(&got), "what the guest sent");
        assert!(got.chunks(4096).all(|chunk| chunk.iter().any(|byte| *byte != 0)), "zeros");
        address
    })
}

fn read_sum(guest: &mut TcpStream) -> u64 {
    let mut bytes = [0; 8];
    guest.read_exact(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// FNV-1a, 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}
