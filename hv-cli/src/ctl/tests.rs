//! `hv ctl` and a server that says anything.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// A server that gives one client these bytes, and says what it was asked.
struct Once {
    path: PathBuf,
    thread: JoinHandle<String>,
    _dir: TempDir,
}

impl Once {
    fn new(answer: impl Into<Vec<u8>>) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let answer = answer.into();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                request.push(byte[0]);
            }
            let _ = stream.write_all(&answer);
            String::from_utf8(request).unwrap()
        });
        Self { path, thread, _dir: dir }
    }

    fn json(status: u16, answer: &Value) -> Self {
        let body = answer.to_string();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n", body.len());
        Self::new(head + &body)
    }
}

#[test]
fn a_balloon_is_looked_at_or_asked_for_in_bytes() {
    let balloon = json!({
        "target": 32 << 20, "actual": 16 << 20, "given-back": 4096,
        "statistics": {"free-memory": 5},
    });
    let (asked, shown) = ask(Request::Balloon { size: None }, &balloon, false);
    assert_eq!(asked, "GET /v1/balloon HTTP/1.1");
    assert_eq!(
        shown,
        "target      32 MiB\nactual      16 MiB\ngiven back  4 KiB\n  free-memory: 5\n"
    );
    let size = Some("32M".parse().unwrap());
    let (asked, _) = ask(Request::Balloon { size }, &balloon, false);
    assert_eq!(asked, "PUT /v1/balloon HTTP/1.1");
    let (_, _, body) = Request::Balloon { size }.call();
    assert_eq!(body.unwrap(), b"{\"target\":33554432}");
}

/// The request line, and what is written.
fn ask(request: Request, answer: &Value, json: bool) -> (String, String) {
    let server = Once::json(200, answer);
    let mut out = Vec::new();
    run(&server.path, request, json, &mut out).unwrap();
    let asked = server.thread.join().unwrap().lines().next().unwrap().to_owned();
    (asked, String::from_utf8(out).unwrap())
}

fn error(server: Once) -> (String, ExitCode) {
    let error = run(&server.path, Request::State, false, &mut Vec::new()).unwrap_err();
    (error.to_string(), error.exit_code())
}

#[test]
fn each_request_is_a_call_and_its_answer_is_shown() {
    let info = json!({
        "state": "paused", "held-by-debugger": true, "version": "1", "cpus": 2,
        "memory": 128 << 20, "pid": 77, "uptime-ms": 3_725_000, "new": "field",
    });
    let (asked, shown) = ask(Request::State, &info, false);
    assert_eq!(asked, "GET /v1/vm HTTP/1.1");
    assert_eq!(
        shown,
        "state    paused, held by a debugger\nup       1 h 2 min\ncpus     2\nmemory   128 MiB\n\
         pid      77\nversion  hv 1\n"
    );
    let (_, shown) = ask(Request::State, &info, true);
    assert_eq!(serde_json::from_str::<Value>(&shown).unwrap(), info);
    for (request, path, state) in [
        (Request::Pause, "pause", "paused"),
        (Request::Resume, "resume", "running"),
        (Request::Stop, "stop", "stopping"),
    ] {
        let (asked, shown) = ask(request, &json!({"state": state}), false);
        assert_eq!((asked, shown), (format!("PUT /v1/vm/{path} HTTP/1.1"), format!("{state}\n")));
    }
    let (asked, shown) = ask(Request::PowerButton, &json!({"enabled": true}), false);
    assert_eq!((asked.as_str(), shown.as_str()), ("PUT /v1/vm/power-button HTTP/1.1", "pressed\n"));
    let (_, shown) = ask(Request::PowerButton, &json!({"enabled": false}), false);
    assert!(shown.contains("may not notice"), "{shown}");
}

#[test]
fn stats_are_what_is_not_zero() {
    let stats = json!({
        "reason": null, "exits": {"port reads": 3, "kicks": 1}, "unclaimed": 0, "completed": 2,
        "devices": [{"name": "rng0", "slot": 1, "failure": "w\u{1b}hy", "requests": 5, "errors": 0}],
    });
    let (asked, shown) = ask(Request::Stats, &stats, false);
    assert_eq!(asked, "GET /v1/vm/stats HTTP/1.1");
    let lines: Vec<_> =
        shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in
        ["exits 4", "port reads 3", "completed 2", "rng0", "requests 5", "failure: w\\u{1b}hy"]
    {
        assert!(lines.iter().any(|it| it == line), "{line}: {shown}");
    }
    assert!(!shown.contains("unclaimed") && !shown.contains("errors"), "{shown}");
}

#[test]
fn registers_are_a_table_of_80_columns() {
    let registers = crate::api::tests::registers(1);
    let answer = serde_json::to_value(&registers).unwrap();
    let (asked, shown) = ask(Request::Registers { vcpu: 1 }, &answer, false);
    assert_eq!(asked, "GET /v1/vcpus/1/registers HTTP/1.1");
    assert!(shown.starts_with("vCPU 1: halted\n  rip    0xffffffff81000000"), "{shown}");
    assert!(shown.contains("cs        0x8 base 0x0"), "{shown}");
    assert!(shown.lines().all(|line| line.len() <= 80), "{shown}");
}

#[test]
fn who_is_not_there_is_named_with_what_to_do() {
    let at = |path: &Path| {
        let error = run(path, Request::State, false, &mut Vec::new()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Vmm);
        error.to_string()
    };
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("api");
    let text = at(&path);
    assert!(
        text.contains("ENOENT") && text.contains("is the VM running, with --api-socket"),
        "{text}"
    );
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    drop(UnixListener::bind(&path).unwrap());
    let text = at(&path);
    assert!(text.contains("ECONNREFUSED") && text.contains("is gone"), "{text}");
    std::fs::write(dir.path().join("file"), "").unwrap();
    let text = at(&dir.path().join("file"));
    assert!(text.contains("ECONNREFUSED") || text.contains("ENOTSOCK"), "{text}");
}

#[test]
fn errors_of_the_machine_are_its_words_and_its_kind_is_the_exit_code() {
    let body = json!({"error": {"code": "no-such-vcpu", "message": "there is no vCPU 7\u{7}"}});
    let (text, code) = error(Once::json(404, &body));
    assert_eq!((text.as_str(), code), ("there is no vCPU 7\\u{7} (no-such-vcpu)", ExitCode::Usage));
    let (text, code) = error(Once::json(503, &body));
    assert_eq!((text.as_str(), code), ("there is no vCPU 7\\u{7} (no-such-vcpu)", ExitCode::Vmm));
}

#[test]
fn what_is_no_answer_is_said_to_be_none() {
    for answer in [
        "",
        "SSH-2.0-x\r\n",
        "HTTP/1.1 200 OK\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]",
        "HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}",
    ] {
        let (text, code) = error(Once::new(answer));
        assert!(text.contains("what answers there is not hv"), "{answer:?}: {text}");
        assert_eq!(code, ExitCode::Vmm);
    }
    let (text, _) = error(Once::json(200, &json!({"state": "sleeping"})));
    assert!(text.contains("another version of hv") && text.contains("--json"), "{text}");
}
