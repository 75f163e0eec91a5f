//! The server with a machine that is none: what is answered to whom, and what nobody can make it do.
//!
//! No test depends on the speed of the machine: what is to run into a limit of time has a short one, and
//! everything else one that ends what hangs.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::control::MockControl;
use super::*;
use crate::event::Event;
use crate::exit_code::StopReason;
use crate::gdb::HoldError;
use crate::machine::stop::Stopper;
use crate::socket::UnixSocket;
use crate::stats::Stats;

/// Ends what hangs.
const LONG: Duration = Duration::from_secs(600);

pub(super) struct Rig {
    server: Option<Server>,
    stopper: Stopper,
    path: PathBuf,
    _dir: TempDir,
}

impl Rig {
    pub(super) fn new(control: impl Control + 'static) -> Self {
        Self::limited(control, Limits { transfer: LONG, ..Limits::default() })
    }

    fn limited(control: impl Control + 'static, limits: Limits) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("api");
        let stopper = Stopper::new(Event::new().unwrap());
        let socket = UnixSocket::bind(&path, 64).unwrap();
        let server = Server::start(socket, Arc::new(control), stopper.clone(), limits).unwrap();
        Self { server: Some(server), stopper, path, _dir: dir }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends bytes and takes the answer. Who is refused early may not get rid of them all.
    fn send(&self, request: &[u8]) -> Reply {
        let mut stream = self.connect();
        let _ = stream.write_all(request);
        answer(&mut stream)
    }

    pub(super) fn give(&self, method: &str, path: &str, body: &str) -> Reply {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: vm\r\nContent-Length: {length}");
        self.send(format!("{head}\r\n\r\n{body}").as_bytes())
    }

    pub(super) fn ask(&self, method: &str, path: &str) -> Reply {
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: vm\r\n\r\n").as_bytes())
    }

    /// That the server serves.
    #[track_caller]
    fn assert_serves(&self) {
        let reply = self.ask("GET", "/v1/vm");
        assert_eq!((reply.status, &reply.json["state"]), (200, &json!("running")));
    }

    fn end(mut self) {
        self.stopper.stop(StopReason::PowerOff);
        self.server.take().unwrap().join();
        assert!(!self.path.exists());
    }
}

#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    headers: BTreeMap<String, String>,
    pub(super) json: Value,
}

impl Reply {
    fn code(&self) -> &str {
        assert!(!self.json["error"]["message"].as_str().unwrap().is_empty());
        self.json["error"]["code"].as_str().unwrap()
    }
}

/// Reads to the end of the connection, which may be a reset if not all that was sent was read.
fn read(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    String::from_utf8(bytes).unwrap()
}

#[track_caller]
fn answer(stream: &mut UnixStream) -> Reply {
    let text = read(stream);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let mut lines = head.lines();
    let status = lines.next().unwrap().strip_prefix("HTTP/1.1 ").unwrap();
    let headers: BTreeMap<_, _> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    assert_eq!(headers["content-length"], body.len().to_string());
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["connection"], "close");
    let status = status.split(' ').next().unwrap().parse().unwrap();
    Reply { status, headers, json: serde_json::from_str(body).unwrap() }
}

pub(super) fn info() -> Info {
    Info {
        state: State::Running,
        held_by_debugger: false,
        version: "1.2.3".to_owned(),
        cpus: 2,
        memory: 128 << 20,
        pid: 77,
        uptime_ms: 1234,
    }
}

pub(super) fn stats() -> Stats<'static> {
    let device = crate::stats::DeviceStats {
        name: "rng0".to_owned(),
        slot: 1,
        failure: Some("why".to_owned()),
        counters: Default::default(),
    };
    Stats {
        reason: None,
        exits: BTreeMap::from([("port reads", 3)]),
        unclaimed: 1,
        completed: 2,
        lost_output: 0,
        refused_bars: 0,
        devices: vec![device].into(),
    }
}

pub(crate) fn registers(vcpu: usize) -> Registers {
    let hex = |n: u64| format!("{n:#x}");
    let zero = || hex(0);
    let segment = || Segment {
        selector: hex(8),
        base: zero(),
        limit: hex(0xffff_ffff),
        r#type: 11,
        dpl: 0,
        present: true,
        long: true,
        default_32: false,
    };
    let table = || Descriptor { base: hex(0x1000), limit: hex(0x7f) };
    Registers {
        vcpu,
        activity: "halted".to_owned(),
        general: General {
            rip: hex(0xffff_ffff_8100_0000),
            rflags: hex(2),
            rax: zero(),
            rbx: zero(),
            rcx: zero(),
            rdx: zero(),
            rsi: zero(),
            rdi: zero(),
            rbp: zero(),
            rsp: zero(),
            r8: zero(),
            r9: zero(),
            r10: zero(),
            r11: zero(),
            r12: zero(),
            r13: zero(),
            r14: zero(),
            r15: zero(),
        },
        segments: Segments {
            cs: segment(),
            ds: segment(),
            es: segment(),
            fs: segment(),
            gs: segment(),
            ss: segment(),
            tr: segment(),
            ldt: segment(),
        },
        system: System {
            cr0: hex(0x8000_0011),
            cr2: zero(),
            cr3: zero(),
            cr4: zero(),
            cr8: zero(),
            efer: hex(0x500),
            apic_base: hex(0xfee0_0900),
            gdt: table(),
            idt: table(),
        },
    }
}

fn running() -> MockControl {
    let mut control = MockControl::new();
    control.expect_info().returning(info);
    control
}

fn balloon(target: u64) -> Balloon {
    let statistics = [("free-memory".to_owned(), 7)].into();
    Balloon { target, actual: 4096, given_back: 8192, statistics }
}

/// One that can do everything.
pub(super) fn whole() -> MockControl {
    let mut control = running();
    control.expect_pause().returning(|| Ok(()));
    control.expect_resume().return_const(());
    control.expect_stop().return_const(());
    control.expect_stats().returning(stats);
    control.expect_power_button().returning(|| PowerButton { enabled: true });
    control.expect_balloon().returning(|| Ok(balloon(1 << 20)));
    control.expect_set_balloon().returning(|target| match target {
        0..=0x10_0000 => Ok(balloon(target)),
        _ => Err(ApiError::BalloonTooLarge { target, memory: 1 << 20 }),
    });
    control.expect_registers().returning(|vcpu| match vcpu {
        0 | 1 => Ok(registers(vcpu)),
        _ => Err(HoldError::NoSuchVcpu { vcpu, vcpus: 2 }.into()),
    });
    control
}

#[test]
fn a_balloon_is_asked_for_with_a_body_that_is_as_described() {
    let rig = Rig::new(whole());
    let reply = rig.give("PUT", "/v1/balloon", r#"{"target": 8192}"#);
    assert_eq!((reply.status, &reply.json["target"]), (200, &json!(8192)));
    assert_eq!(rig.ask("GET", "/v1/balloon").json["statistics"]["free-memory"], 7);
    for (body, status, code) in [
        ("", 400, "bad-body"),
        ("{}", 400, "bad-body"),
        ("[]", 400, "bad-body"),
        (r#"{"target": -1}"#, 400, "bad-body"),
        (r#"{"target": 1.5}"#, 400, "bad-body"),
        (r#"{"target": "32M"}"#, 400, "bad-body"),
        (r#"{"target": 1, "more": 2}"#, 400, "bad-body"),
        (r#"{"target": 1} x"#, 400, "bad-body"),
        (r#"{"target": 18446744073709551615}"#, 400, "balloon-too-large"),
        (r#"{"target": 18446744073709551616}"#, 400, "bad-body"),
    ] {
        let reply = rig.give("PUT", "/v1/balloon", body);
        assert_eq!((reply.status, reply.code()), (status, code), "{body}");
    }
    let reply = rig.give("GET", "/v1/balloon", "{}");
    assert_eq!((reply.status, reply.code()), (400, "unexpected-body"));
    rig.end();
}

#[test]
fn each_call_reaches_the_machine_and_is_answered() {
    let mut control = running();
    control.expect_pause().times(2).returning(|| Ok(()));
    control.expect_resume().once().return_const(());
    control.expect_stop().once().return_const(());
    control.expect_stats().once().returning(stats);
    control.expect_power_button().once().returning(|| PowerButton { enabled: false });
    control.expect_registers().withf(|it| *it == 1).once().returning(|it| Ok(registers(it)));
    let rig = Rig::new(control);
    let ok = |method, path, expected: Value| {
        let reply = rig.ask(method, path);
        assert_eq!((reply.status, reply.json), (200, expected), "{path}");
    };
    ok(
        "GET",
        "/v1/vm",
        json!({
            "state": "running", "held-by-debugger": false, "version": "1.2.3", "cpus": 2,
            "memory": 128 << 20, "pid": 77, "uptime-ms": 1234,
        }),
    );
    ok("PUT", "/v1/vm/pause", json!({"state": "paused"}));
    ok("PUT", "/v1/vm/pause", json!({"state": "paused"}));
    ok("PUT", "/v1/vm/resume", json!({"state": "running"}));
    ok("PUT", "/v1/vm/power-button", json!({"enabled": false}));
    ok("PUT", "/v1/vm/stop", json!({"state": "stopping"}));
    let stats = rig.ask("GET", "/v1/vm/stats").json;
    assert_eq!((&stats["reason"], &stats["exits"]["port reads"]), (&Value::Null, &json!(3)));
    assert_eq!(stats["devices"][0]["name"], "rng0");
    let registers = rig.ask("GET", "/v1/vcpus/1/registers").json;
    assert_eq!((&registers["vcpu"], &registers["activity"]), (&json!(1), &json!("halted")));
    assert_eq!(registers["general"]["rip"], "0xffffffff81000000");
    assert_eq!(registers["segments"]["cs"]["default-32"], false);
    assert_eq!(registers["system"]["gdt"]["limit"], "0x7f");
    rig.end();
}

#[test]
fn what_the_machine_can_not_do_is_told_with_the_reason() {
    let mut control = running();
    let busy = HoldError::Busy { vcpu: 1, limit: Duration::from_secs(3) };
    control.expect_pause().once().returning(move || Err(busy.into()));
    control.expect_pause().once().returning(|| Err(HoldError::Stopping.into()));
    control.expect_pause().once().returning(|| panic!("a bug"));
    let none = |vcpu| HoldError::NoSuchVcpu { vcpu, vcpus: 2 };
    control.expect_registers().once().returning(move |vcpu| Err(none(vcpu).into()));
    let failed = hv_core::Error::new(hv_core::Ioctl::GetRegs, hv_core::Errno::EIO);
    control.expect_registers().once().returning(move |_| Err(failed.into()));
    let rig = Rig::new(control);
    for (method, path, status, code, says) in [
        ("PUT", "/v1/vm/pause", 503, "vcpu-busy", "vCPU 1 did not stop within 3s"),
        ("PUT", "/v1/vm/pause", 503, "stopping", "the machine is stopping"),
        ("PUT", "/v1/vm/pause", 500, "internal", "please report it"),
        ("GET", "/v1/vcpus/7/registers", 404, "no-such-vcpu", "there is no vCPU 7; there are 2"),
        ("GET", "/v1/vcpus/0/registers", 500, "kvm", "EIO"),
        ("GET", "/v1/vcpus/x%20/registers", 400, "not-a-number", "'x%20'"),
        ("GET", "/v1/vcpus/-1/registers", 400, "not-a-number", "'-1'"),
        ("GET", "/v1/vcpus/99999999999999999999/registers", 400, "not-a-number", "999"),
    ] {
        let reply = rig.ask(method, path);
        assert_eq!((reply.status, reply.code()), (status, code), "{path}");
        let message = reply.json["error"]["message"].as_str().unwrap();
        assert!(message.contains(says), "{path}: {message}");
    }
    rig.assert_serves();
    rig.end();
}

#[test]
fn paths_that_are_none_and_methods_that_are_others() {
    let rig = Rig::new(running());
    for path in [
        "/",
        "/v1",
        "/v1/",
        "/v1/vm/",
        "//v1/vm",
        "/v2/vm",
        "/v1/vm/fly",
        "/v1/vcpus/0",
        "/v1/VM",
        "/v1/vcpus//registers",
        "/v1/vcpus/0/registers/",
        "/v1/vm?x=1",
        "*",
        "/v1/vm/../vm",
    ] {
        let reply = rig.ask("GET", path);
        assert_eq!((reply.status, reply.code()), (404, "not-found"), "{path}");
    }
    for (method, path, allow) in [
        ("PUT", "/v1/vm", "GET"),
        ("DELETE", "/v1/vm", "GET"),
        ("get", "/v1/vm", "GET"),
        ("GET", "/v1/vm/pause", "PUT"),
        ("POST", "/v1/vm/pause", "PUT"),
        ("OPTIONS", "/v1/vm/stop", "PUT"),
        ("PUT", "/v1/vcpus/0/registers", "GET"),
    ] {
        let reply = rig.ask(method, path);
        assert_eq!((reply.status, reply.code()), (405, "method-not-allowed"), "{method} {path}");
        assert_eq!(reply.headers["allow"], allow);
    }
    // The answer to HEAD has no body, whatever its length says.
    let mut stream = rig.connect();
    stream.write_all(b"HEAD /v1/vm HTTP/1.1\r\n\r\n").unwrap();
    let text = read(&mut stream);
    assert!(text.starts_with("HTTP/1.1 405 ") && text.ends_with("\r\n\r\n"), "{text}");
    rig.end();
}

#[test]
fn what_is_no_request_is_told_what_is_wrong() {
    let rig = Rig::new(running());
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(9000)).into_bytes();
    let long_header = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "x".repeat(9000)).into_bytes();
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(33)).into_bytes();
    let endless = vec![b'a'; 1 << 20];
    let cases: [(&[u8], u16, &str); 20] = [
        (b"\0\0\0\0\r\n\r\n", 400, "malformed"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 400, "malformed"),
        (b"GET\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm FTP/1.1\r\n\r\n", 505, "http-version"),
        (b"GET /v1/vm HTTP/2.0\r\n\r\n", 505, "http-version"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http-version"),
        (b"GET /v1/vm HTTP/1.1\r\nno colon\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm HTTP/1.1\r\na\0b: c\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "malformed"),
        (b"GET /v1/vm HTTP/1.1\r\nContent-Length:\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "malformed"),
        (b"PUT /v1/vm/pause HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400, "unexpected-body"),
        (
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
            "transfer-encoding",
        ),
        (b"PUT / HTTP/1.1\r\nContent-Length: 4097\r\n\r\n", 413, "body-too-large"),
        (
            b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            413,
            "body-too-large",
        ),
        (&long_path, 431, "head-too-large"),
        (&long_header, 431, "head-too-large"),
        (&many_headers, 431, "head-too-large"),
    ];
    for (request, status, code) in cases {
        let reply = rig.send(request);
        let shown = String::from_utf8_lossy(request.get(..60).unwrap_or(request)).into_owned();
        assert_eq!((reply.status, reply.code()), (status, code), "{shown:?}");
    }
    let reply = rig.send(&endless);
    assert_eq!(reply.status, 431);
    // The message repeats no control characters, and not all of a path.
    let reply = rig.send(b"GET /\x80\xff\"\\ HTTP/1.1\r\n\r\n");
    assert!([400, 404].contains(&reply.status), "{reply:?}");
    rig.assert_serves();
    rig.end();
}

#[test]
fn a_request_may_come_in_pieces_and_be_followed_by_more() {
    let rig = Rig::new(running());
    let mut stream = rig.connect();
    for byte in b"\r\nGET /v1/vm HTTP/1.0\r\nA: b\r\nContent-Length: 0\r\n\r\n" {
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(answer(&mut stream).status, 200);
    // One request for each connection: the second is not answered.
    let request = b"GET /v1/vm HTTP/1.1\r\n\r\n".repeat(2);
    let mut stream = rig.connect();
    stream.write_all(&request).unwrap();
    assert_eq!(answer(&mut stream).status, 200);
    // A client that is done writing still reads.
    let mut stream = rig.connect();
    stream.write_all(b"GET /v1/vm HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(answer(&mut stream).status, 200);
    // One that ends in its middle.
    let mut stream = rig.connect();
    stream.write_all(b"GET /v1/v").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let reply = answer(&mut stream);
    assert_eq!((reply.status, reply.code()), (400, "malformed"));
    rig.end();
}

#[test]
fn a_slow_client_is_told_that_its_time_is_over() {
    for request in [
        &b""[..],
        b"GET /v1/vm HTT",
        b"GET /v1/vm HTTP/1.1\r\nA: b\r\n",
        b"PUT /v1/vm/pause HTTP/1.1\r\nContent-Length: 2\r\n\r\n{",
    ] {
        let limits = Limits { transfer: Duration::from_millis(20), ..Limits::default() };
        let rig = Rig::limited(running(), limits);
        let reply = rig.send(request);
        assert_eq!((reply.status, reply.code()), (408, "timeout"));
        rig.end();
    }
}

#[test]
fn a_client_that_drips_has_no_more_time_than_another() {
    let limits = Limits { transfer: Duration::from_millis(50), ..Limits::default() };
    let rig = Rig::limited(running(), limits);
    let mut stream = rig.connect();
    stream.write_all(b"GET /v1/vm HTTP/1.1\r\nA: ").unwrap();
    // Each byte comes within the time, all of them would not.
    while stream.write_all(b"a").is_ok() {
        thread::sleep(Duration::from_millis(5));
    }
    let text = read(&mut stream);
    assert!(text.starts_with("HTTP/1.1 408 "), "{text}");
    rig.end();
}

#[test]
fn slow_clients_keep_nobody_else_waiting_and_there_are_not_too_many() {
    let limits = Limits { connections: 4, transfer: LONG, ..Limits::default() };
    let rig = Rig::limited(running(), limits);
    let mut slow: Vec<_> = (0..3).map(|_| rig.connect()).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /v1/vm HTT").unwrap();
    }
    let served = || {
        let reply = rig.ask("GET", "/v1/vm");
        // The thread of the last one may not have ended yet.
        assert!(reply.status == 200 || reply.code() == "too-many-connections", "{reply:?}");
        reply.status == 200
    };
    for _ in 0..10 {
        while !served() {
            thread::yield_now();
        }
    }
    // With a fourth, no one else is served, and is told so.
    let mut fourth = rig.connect();
    fourth.write_all(b"GET /v1/vm HTT").unwrap();
    while served() {
        thread::yield_now();
    }
    // The slow ones are, still.
    for mut stream in slow {
        stream.write_all(b"P/1.1\r\n\r\n").unwrap();
        assert_eq!(answer(&mut stream).status, 200);
    }
    while !served() {
        thread::yield_now();
    }
    // Who goes away makes room.
    drop(fourth);
    rig.assert_serves();
    rig.end();
}

#[test]
fn a_call_that_waits_keeps_no_other_call_waiting() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let mut control = running();
    let waits = gate.clone();
    control.expect_registers().returning(move |vcpu| {
        let (open, opened) = &*waits;
        drop(opened.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        Ok(registers(vcpu))
    });
    control.expect_stop().return_const(());
    let rig = Rig::new(control);
    let mut waiting = rig.connect();
    waiting.write_all(b"GET /v1/vcpus/0/registers HTTP/1.1\r\n\r\n").unwrap();
    rig.assert_serves();
    assert_eq!(rig.ask("PUT", "/v1/vm/stop").status, 200);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(answer(&mut waiting).status, 200);
    rig.end();
}

#[test]
fn many_at_once_are_all_answered() {
    let limits = Limits { connections: 64, transfer: LONG, ..Limits::default() };
    let rig = Rig::limited(whole(), limits);
    thread::scope(|scope| {
        for n in 0..8 {
            let rig = &rig;
            scope.spawn(move || {
                for route in ROUTES.iter().cycle().skip(n).take(40) {
                    let path = route.path.replace("{vcpu}", "1");
                    let body = if route.takes_body { r#"{"target": 0}"# } else { "" };
                    let reply = rig.give(&route.method.to_string(), &path, body);
                    assert_eq!(reply.status, 200, "{path}: {reply:?}");
                }
            });
        }
    });
    rig.end();
}

#[test]
fn the_end_of_the_machine_waits_for_no_client() {
    let rig = Rig::new(running());
    let mut silent = rig.connect();
    let mut slow = rig.connect();
    slow.write_all(b"GET /v1/vm HTT").unwrap();
    rig.assert_serves();
    rig.end();
    assert_eq!(read(&mut silent), "");
    assert_eq!(read(&mut slow), "");
}

#[test]
fn who_stops_the_machine_is_answered() {
    let stopper = Arc::new(Mutex::new(None::<Stopper>));
    let mut control = MockControl::new();
    let stops = stopper.clone();
    control.expect_stop().once().returning(move || {
        stops.lock().unwrap().as_ref().unwrap().stop(StopReason::Requested);
    });
    let rig = Rig::new(control);
    *stopper.lock().unwrap() = Some(rig.stopper.clone());
    let reply = rig.ask("PUT", "/v1/vm/stop");
    assert_eq!((reply.status, &reply.json["state"]), (200, &json!("stopping")));
    rig.end();
}

#[test]
fn another_user_is_refused_even_if_the_file_lets_it() {
    use rustix::process::Uid;
    let rig = Rig::new(running());
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can be another user");
        return rig.end();
    }
    let dir = rig.path.parent().unwrap();
    for path in [dir, &rig.path] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let path = rig.path.clone();
    // Of this thread alone, which ends with it.
    let other = thread::spawn(move || {
        let nobody = Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let mut stream = UnixStream::connect(path).unwrap();
        let _ = stream.write_all(b"PUT /v1/vm/stop HTTP/1.1\r\n\r\n");
        answer(&mut stream)
    });
    let reply = other.join().unwrap();
    assert_eq!((reply.status, reply.code()), (403, "forbidden"));
    assert!(reply.json["error"]["message"].as_str().unwrap().contains("user 65534"));
    rig.assert_serves();
    rig.end();
}
