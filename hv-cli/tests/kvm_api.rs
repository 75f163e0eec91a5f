//! `hv run --api-socket` and `hv ctl` on real KVM: what they do to a guest, and what clients can't.
//!
//! Guests are a few instructions that count, halt or wait for a button. Whether one makes progress is
//! read from its registers and from its exits, never from a clock.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Image, LIMIT, Ran, Running, hv};
use serde_json::Value;
use tempfile::TempDir;

/// Says R, counts in ECX with a port write each, and powers off when something is typed.
#[rustfmt::skip]
const COUNTER: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, //       mov dx, 0x3f8
    0xb0, b'R', 0xee, //             mov al, 'R'; out dx, al
    0x31, 0xc9, //                   xor ecx, ecx
    0x41, //                         count: inc ecx
    0xe6, 0x80, //                   out 0x80, al
    0x66, 0xba, 0xfd, 0x03, //       mov dx, 0x3fd
    0xec, //                         in al, dx
    0xa8, 0x01, //                   test al, 1
    0x74, 0xf4, //                   jz count
    0x66, 0xba, 0x00, 0x06, //       mov dx, 0x600
    0xb0, 0x34, 0xee, //             mov al, 0x34; out dx, al
    0xf4, //                         hlt
];

/// mov dx,0x3f8; mov al,'R'; out dx,al; loop: hlt; jmp loop
const HALTS: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xf4, 0xeb, 0xfd];

/// A guest with an API.
struct Guest {
    hv: Running,
    socket: PathBuf,
    dir: TempDir,
    _image: Image,
}

impl Guest {
    fn start(image: Image, args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("api");
        let api = ["run", "--kernel", image.path(), "--api-socket", socket.to_str().unwrap()];
        let hv = Running::start(&[&api, args].concat());
        let mut this = Self { hv, socket, dir, _image: image };
        this.hv.wait_for_message("hv ctl --socket");
        this
    }

    fn counting() -> Self {
        let mut this = Self::start(Image::multiboot(COUNTER), &[]);
        this.hv.wait_for("R");
        this
    }

    fn ctl(&self, args: &[&str]) -> Ran {
        hv(&[&["ctl", "--socket", self.socket.to_str().unwrap()], args].concat())
    }

    /// What `hv ctl` says, which must have worked.
    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let ran = self.ctl(args);
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{args:?}: {ran:?}");
        ran.stdout
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.done(&[&["--json"], args].concat())).unwrap()
    }

    fn register(&self, vcpu: &str, name: &str) -> u64 {
        let registers = self.json(&["registers", vcpu]);
        let text = registers["general"][name].as_str().unwrap();
        u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
    }

    fn port_writes(&self) -> u64 {
        self.json(&["stats"])["exits"]["port writes"].as_u64().unwrap()
    }

    /// Waits until the guest has counted on.
    fn wait_for_progress(&self) {
        let (before, deadline) = (self.port_writes(), Instant::now() + LIMIT);
        while self.port_writes() < before + 100 {
            assert!(Instant::now() < deadline, "it does not go on");
        }
    }

    fn finish(self) -> Ran {
        let ran = self.hv.finish();
        assert!(!self.socket.exists(), "the socket is left: {ran:?}");
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
        ran
    }
}

/// An answer to these bytes.
fn raw(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    // A reset: not all that was sent was read.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

#[test]
fn a_pause_stops_a_guest_that_counts_and_it_goes_on_where_it_was() {
    let guest = Guest::counting();
    let mode = fs::metadata(&guest.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else may connect");
    let state = guest.json(&["state"]);
    assert_eq!((&state["state"], &state["cpus"]), (&"running".into(), &1.into()));
    assert_eq!(state["memory"], 128 << 20);
    assert_eq!(state["pid"], guest.hv.pid());
    assert!(guest.done(&["state"]).starts_with("state    running\n"));
    guest.wait_for_progress();
    let counted = guest.register("0", "rcx");
    guest.wait_for_progress();
    assert!(guest.register("0", "rcx") > counted, "it goes on after a look");

    for _ in 0..2 {
        assert_eq!(guest.done(&["pause"]), "paused\n");
    }
    assert_eq!(guest.json(&["state"])["state"], "paused");
    let (counted, writes) = (guest.register("0", "rcx"), guest.port_writes());
    let rip = guest.register("0", "rip");
    assert!((0x10_0020..0x10_0040).contains(&rip), "{rip:#x}");
    // Long enough for thousands of its steps.
    thread::sleep(Duration::from_millis(200));
    assert_eq!((guest.register("0", "rcx"), guest.port_writes()), (counted, writes));

    for _ in 0..2 {
        assert_eq!(guest.done(&["resume"]), "running\n");
    }
    guest.wait_for_progress();
    assert!(guest.register("0", "rcx") > counted);

    let text = guest.done(&["registers"]);
    assert!(text.starts_with("vCPU 0: runnable\n  rip    0x1000"), "{text}");
    let ran = guest.ctl(&["registers", "1"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("there is no vCPU 1; there are 1"), "{ran:?}");

    assert_eq!(guest.done(&["stop"]), "stopping\n");
    let ran = guest.finish();
    assert_eq!(ran.code, Some(14), "{ran:?}");
    assert!(ran.stderr.contains("ended by a client of the API socket"), "{}", ran.stderr);
}

#[test]
fn vcpus_that_halt_or_have_not_started_are_paused_and_stopped_while_paused() {
    for irqchip in ["kernel", "split"] {
        let args = ["--cpus", "2", "--irqchip", irqchip];
        let mut guest = Guest::start(Image::multiboot(HALTS), &args);
        guest.hv.wait_for("R");
        let halted = |guest: &Guest| guest.json(&["registers"])["activity"] == "halted";
        let deadline = Instant::now() + LIMIT;
        while !halted(&guest) {
            assert!(Instant::now() < deadline, "it does not halt");
        }
        guest.done(&["pause"]);
        assert!(halted(&guest));
        assert_eq!(guest.json(&["registers", "1"])["activity"], "not started");
        guest.done(&["resume"]);
        assert!(halted(&guest), "it halts on");
        guest.done(&["pause"]);
        guest.done(&["stop"]);
        let ran = guest.finish();
        assert_eq!(ran.code, Some(14), "{ran:?}");
    }
}

#[test]
fn the_escape_key_and_a_signal_end_a_paused_machine() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let guest = Guest::counting();
    guest.done(&["pause"]);
    guest.hv.terminate();
    assert_eq!(guest.finish().code, Some(14));

    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let keyboard = openpt(flags).unwrap();
    grantpt(&keyboard).unwrap();
    unlockpt(&keyboard).unwrap();
    let terminal = ioctl_tiocgptpeer(&keyboard, flags).unwrap();
    let image = Image::multiboot(HALTS);
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("api");
    let socket = socket.to_str().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hv"))
        .args(["run", "--kernel", image.path(), "--api-socket", socket])
        .stdin(terminal)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LIMIT;
    while hv(&["ctl", "--socket", socket, "pause"]).code != Some(0) {
        assert!(Instant::now() < deadline, "it can't be paused");
    }
    let code = loop {
        // Until raw mode is on, the line discipline may keep keys.
        let _ = rustix::io::write(&keyboard, b"\x01x");
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(code, Some(14));
}

#[test]
fn a_guest_never_notices_its_clients() {
    let mut guest = Guest::counting();
    // Those that come and say nothing, or begin and do not end.
    let idle: Vec<_> = (0..3)
        .map(|_| {
            let mut stream = UnixStream::connect(&guest.socket).unwrap();
            stream.write_all(b"PUT /v1/vm/stop HTTP/1.1\r\nA: ").unwrap();
            stream
        })
        .collect();
    thread::scope(|scope| {
        for n in 0..4 {
            let socket = &guest.socket;
            scope.spawn(move || {
                let huge = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
                let requests: [&[u8]; 8] = [
                    b"PUT /v1/vm/stop HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
                    b"PUT /v1/vm/stop HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                    b"PUT /v1/vm/stop\r\n\r\n",
                    b"STOP /v1/vm/stop HTTP/1.1\r\n\r\n",
                    b"GET /v1/vm/stop HTTP/1.1\r\n\r\n",
                    b"\0\xff\x80\r\n\r\n",
                    b"PUT /v1/vm/resume HTTP/1.1\r\n\r\n",
                    huge.as_bytes(),
                ];
                for request in requests.iter().cycle().skip(n).take(40) {
                    let answer = raw(socket, request);
                    assert!(answer.starts_with("HTTP/1.1 "), "{answer:?}");
                    // One that goes before it is answered.
                    let mut stream = UnixStream::connect(socket).unwrap();
                    let _ = stream.write_all(b"GET /v1/vcpus/0/registers HTTP/1.1\r\n\r\n");
                }
            });
        }
    });
    let deadline = Instant::now() + LIMIT;
    while guest.ctl(&["state"]).code != Some(0) {
        assert!(Instant::now() < deadline, "the API does not answer any more");
    }
    guest.wait_for_progress();
    drop(idle);
    // It ends as it wants to.
    guest.hv.send("q");
    let ran = guest.finish();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "R"), "{ran:?}");
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn pauses_and_looks_of_many_clients_leave_a_guest_that_goes_on() {
    let mut guest = Guest::counting();
    thread::scope(|scope| {
        for n in 0..4 {
            let socket = &guest.socket;
            scope.spawn(move || {
                let calls = [
                    "PUT /v1/vm/pause",
                    "GET /v1/vcpus/0/registers",
                    "PUT /v1/vm/resume",
                    "GET /v1/vm/stats",
                ];
                for call in calls.iter().cycle().skip(n).take(40) {
                    let answer = raw(socket, format!("{call} HTTP/1.1\r\n\r\n").as_bytes());
                    let full = answer.contains("too-many-connections");
                    assert!(answer.starts_with("HTTP/1.1 200 ") || full, "{call}: {answer}");
                }
            });
        }
    });
    guest.done(&["resume"]);
    guest.wait_for_progress();
    guest.hv.send("q");
    let ran = guest.finish();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "R"), "{ran:?}");
}

/// Real mode: asks for the interrupt of the power button, says R and halts. The interrupt's handler
/// clears the button's status and powers off.
#[rustfmt::skip]
const LISTENS: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, //           xor ax, ax; mov ds, ax; mov ss, ax
    0xbc, 0x00, 0x70, //                             mov sp, 0x7000
    0xc7, 0x06, 0xc4, 0x01, 0x4f, 0x00, //           mov word [0x71 * 4], handler
    0x8c, 0xc8, 0xa3, 0xc6, 0x01, //                 mov ax, cs; mov [0x71 * 4 + 2], ax
    0xb0, 0x11, 0xe6, 0x20, 0xe6, 0xa0, //           PICs: ICW1
    0xb0, 0x08, 0xe6, 0x21, 0xb0, 0x70, 0xe6, 0xa1, // ICW2: vectors 0x08 and 0x70
    0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x02, 0xe6, 0xa1, // ICW3: the second is on line 2
    0xb0, 0x01, 0xe6, 0x21, 0xe6, 0xa1, //           ICW4
    0xb0, 0xfb, 0xe6, 0x21, 0xb0, 0xfd, 0xe6, 0xa1, // masks: lines 2 and 9
    0xba, 0xd1, 0x04, 0xb0, 0x02, 0xee, //           ELCR: line 9 is level-triggered
    0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, //     PM1_EN: PWRBTN_EN
    0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, //           say R
    0xfb, 0xf4, 0xeb, 0xfd, //                       sti; loop: hlt; jmp loop
    0xba, 0x00, 0x06, 0xed, //                       handler: mov dx, 0x600; in ax, dx
    0xf6, 0xc4, 0x01, 0x74, 0x0c, //                 test ah, 1; jz bad
    0xb8, 0x00, 0x01, 0xef, //                       mov ax, 0x100; out dx, ax
    0xed, 0x84, 0xe4, 0x75, 0x03, //                 in ax, dx; test ah, ah; jnz bad
    0xb0, 0x34, 0xee, //                             mov al, 0x34; out dx, al
    0xf4, //                                         bad: hlt
];

#[test]
fn the_power_button_interrupts_a_guest_that_listens() {
    for paused in [false, true] {
        let mut guest = Guest::start(Image::new(LISTENS), &["--format", "flat"]);
        guest.hv.wait_for("R");
        if paused {
            guest.done(&["pause"]);
        }
        assert_eq!(guest.done(&["power-button"]), "pressed\n");
        if paused {
            assert_eq!(guest.json(&["state"])["state"], "paused");
            guest.done(&["resume"]);
        }
        let ran = guest.finish();
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    let guest = Guest::counting();
    let said = guest.done(&["power-button"]);
    assert!(said.contains("has not asked for its interrupt"), "{said}");
    guest.wait_for_progress();
    guest.done(&["stop"]);
    assert_eq!(guest.finish().code, Some(14));
}

#[test]
fn a_debugger_sees_a_paused_guest_and_leaves_it_paused() {
    let dir = TempDir::new().unwrap();
    let gdb_socket = dir.path().join("gdb");
    let address = format!("unix:{}", gdb_socket.display());
    let mut guest = Guest::start(Image::multiboot(COUNTER), &["--gdb", &address]);
    guest.hv.wait_for("R");
    guest.done(&["pause"]);
    let counted = guest.register("0", "rcx");
    let script = dir.path().join("script");
    let connect = format!("target remote {}", gdb_socket.display());
    let debug = |commands: &str| {
        fs::write(&script, format!("set pagination off\n{connect}\n{commands}")).unwrap();
        Running::spawn(Command::new("gdb").args(["-nx", "-batch", "-x"]).arg(&script))
    };
    let shows = "printf \"counted %d\\n\", $ecx\nshell cat\ndetach\n";
    let mut gdb = debug(shows);
    gdb.wait_for(&format!("counted {counted}"));
    let state = guest.json(&["state"]);
    assert_eq!((&state["state"], &state["held-by-debugger"]), (&"paused".into(), &true.into()));
    // Resumed, it is still the debugger's.
    guest.done(&["resume"]);
    let state = guest.json(&["state"]);
    assert_eq!((&state["state"], &state["held-by-debugger"]), (&"running".into(), &true.into()));
    assert!(guest.done(&["state"]).contains("held by a debugger"));
    assert_eq!(guest.register("0", "rcx"), counted);
    guest.done(&["pause"]);
    assert_eq!(gdb.finish().code, Some(0));
    // The debugger has let it go, and it is paused.
    assert_eq!(guest.register("0", "rcx"), counted);
    // A step waits for the end of the pause.
    let mut gdb = debug("echo steps\\n\nstepi\nprintf \"at %#x\\n\", $pc\ndetach\n");
    gdb.wait_for("steps");
    guest.done(&["resume"]);
    let ran = gdb.finish();
    assert!(ran.code == Some(0) && ran.stdout.contains("at 0x1000"), "{ran:?}");
    guest.wait_for_progress();
    guest.done(&["stop"]);
    assert_eq!(guest.finish().code, Some(14));
}

#[test]
fn a_vcpu_that_a_device_keeps_is_not_paused_and_can_be_stopped() {
    // loop: mov dx,0x3f8; mov al,'x'; out dx,al; jmp loop
    let image = Image::new(&[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xf8]);
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("api");
    let socket = socket.to_str().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hv"))
        .args(["run", "--kernel", image.path(), "--format", "flat", "--api-socket", socket])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    // A pipe counts as full when its last page is in use.
    let size = rustix::pipe::fcntl_getpipe_size(&stdout).unwrap() as u64;
    let full = size - rustix::param::page_size() as u64;
    let deadline = Instant::now() + LIMIT;
    while rustix::io::ioctl_fionread(&stdout).unwrap() <= full {
        assert!(Instant::now() < deadline, "the guest does not print");
        thread::sleep(Duration::from_millis(5));
    }
    let ctl = |request: &str| hv(&["ctl", "--socket", socket, request]);
    let ran = ctl("pause");
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("vCPU 0 did not stop within 3s"), "{ran:?}");
    assert!(ctl("state").stdout.starts_with("state    running\n"));
    assert_eq!(ctl("stats").code, Some(0));
    assert_eq!(ctl("stop").code, Some(0));
    assert_eq!(child.wait().unwrap().code(), Some(14));
}

#[test]
fn the_socket_of_a_dead_machine_is_replaced() {
    let guest = Guest::counting();
    let socket = guest.socket.to_str().unwrap();
    let image = Image::multiboot(COUNTER);
    let args = ["run", "--kernel", image.path(), "--api-socket", socket];
    let ran = hv(&args);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("--api-socket: another process listens on"), "{ran:?}");
    guest.hv.signal(rustix::process::Signal::KILL);
    let ran = loop {
        let ran = guest.ctl(&["state"]);
        if ran.stderr.contains("ECONNREFUSED") {
            break ran;
        }
    };
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("is gone"), "{ran:?}");
    let mut second = Running::start(&args);
    second.wait_for("R");
    second.send("q");
    assert_eq!(second.finish().code, Some(0));
    assert!(!guest.socket.exists());
}

/// Without the debugger that holds it at first, it might be done before anybody asks.
#[test]
fn the_built_in_guest_passes_its_checks_after_a_pause() {
    for irqchip in ["kernel", "split"] {
        let dir = TempDir::new().unwrap();
        let (gdb, socket) = (dir.path().join("gdb"), dir.path().join("api"));
        let (address, socket) = (format!("unix:{}", gdb.display()), socket.to_str().unwrap());
        let args = ["run", "--irqchip", irqchip, "--gdb", &address, "--gdb-wait"];
        let mut running = Running::start(&[&args[..], &["--api-socket", socket]].concat());
        running.wait_for_message("the guest waits for it");
        let ctl = |request: &str| {
            let ran = hv(&["ctl", "--socket", socket, request]);
            assert_eq!(ran.code, Some(0), "{request}: {ran:?}");
        };
        ctl("pause");
        let release = format!("target remote {}", gdb.display());
        let gdb = Running::spawn(
            Command::new("gdb").args(["-nx", "-batch", "-ex", &release, "-ex", "detach"]),
        );
        assert_eq!(gdb.finish().code, Some(0));
        for request in ["state", "registers", "stats", "pause", "resume"] {
            ctl(request);
        }
        let ran = running.finish();
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains(" passed, 0 failed"), "{}", ran.stdout);
    }
}
