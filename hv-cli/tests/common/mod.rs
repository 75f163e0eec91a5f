//! Runs the `hv` binary as a user would, with a time limit, and makes small images for it.

#![allow(dead_code, reason = "every test binary uses a part of this")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Far longer than anything here takes; a run that is still there by then hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(1100);

/// What a Linux guest is told so that it runs on every host this is tested on: some KVMs run the
/// guest's kernel in software and lack these instructions.
pub(crate) const LINUX_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 mitigations=off noxsave rodata=off \
    clearcpuid=cx16,smap,smep,umip,popcnt,movbe,fsgsbase,invpcid,pcid,rdrand,rdseed,pku \
    pty.legacy_count=0 rodata=off";

/// What a run of `hv` left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// `hv` with these arguments and no input.
pub(crate) fn hv(args: &[&str]) -> Ran {
    Running::start(args).finish()
}

/// A run that goes on.
pub(crate) struct Running {
    child: Child,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    told: Vec<u8>,
    deadline: Instant,
}

impl Running {
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_hv")).args(args))
    }

    /// A run of another program.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        let deadline = Instant::now() + LIMIT;
        Self { child, stdout, stderr, seen: Vec::new(), told: Vec::new(), deadline }
    }

    /// With another limit, from now on.
    pub(crate) fn within(mut self, limit: Duration) -> Self {
        self.deadline = Instant::now() + limit;
        self
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types into the guest.
    pub(crate) fn send(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits until the guest has printed `text`.
    pub(crate) fn wait_for(&mut self, text: &str) {
        self.wait_until(&format!("{text:?}"), |seen| String::from_utf8_lossy(seen).contains(text));
    }

    /// Waits until what the guest has printed is enough.
    pub(crate) fn wait_until(&mut self, what: &str, enough: impl Fn(&[u8]) -> bool) {
        while !enough(&self.seen) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(error) => {
                    let _ = self.child.kill();
                    let seen = String::from_utf8_lossy(&self.seen).into_owned();
                    let stderr: Vec<u8> = self.stderr.iter().flatten().collect();
                    let stderr = String::from_utf8_lossy(&stderr).into_owned();
                    panic!("{what} did not come ({error}):\n{seen}\n--- stderr\n{stderr}");
                }
            }
        }
    }

    /// Waits until the program has said `text` on its standard error.
    pub(crate) fn wait_for_message(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.told).contains(text) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match self.stderr.recv_timeout(left) {
                Ok(bytes) => self.told.extend(bytes),
                Err(error) => {
                    let told = String::from_utf8_lossy(&self.told);
                    panic!("{text:?} was not said ({error}):\n{told}");
                }
            }
        }
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Sends SIGKILL and waits for the end.
    pub(crate) fn kill(mut self) -> Ran {
        self.child.kill().unwrap();
        self.finish()
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> Ran {
        drop(self.child.stdin.take());
        let status = self.wait();
        self.seen.extend(self.stdout.iter().flatten());
        let told = std::mem::take(&mut self.told);
        let stderr: Vec<u8> = told.into_iter().chain(self.stderr.iter().flatten()).collect();
        Ran {
            code: status.and_then(|status| status.code()),
            stdout: String::from_utf8_lossy(&self.seen).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        while Instant::now() < self.deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn drain(mut from: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if sender.send(buffer[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A file that goes with the test.
pub(crate) struct Image(tempfile::NamedTempFile);

impl Image {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Self(file)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// An ELF kernel as Linux's `vmlinux`: 64-bit code at 16 MiB, where it is entered.
    pub(crate) fn linux(code: &[u8]) -> Self {
        const ENTRY: u64 = 16 << 20;
        const NOTE: &[u8] = b"\x06\0\0\0\x04\0\0\0\0\x01\0\0Linux\0\0\0salt";
        const NOTE_AT: u64 = 64 + 2 * 56;
        let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        // ET_EXEC, EM_X86_64, version 1; entry; where the program headers are.
        image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        image.extend([ENTRY, 64, 0].into_iter().flat_map(u64::to_le_bytes));
        // Flags; sizes of this header and a program header, and how many of those there are.
        image.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let (note, code_size) = (NOTE.len() as u64, code.len() as u64);
        let code_at = NOTE_AT + note;
        // PT_LOAD and PT_NOTE: offset, addresses, sizes, alignment.
        for (kind, at, address, size) in [(1u64, code_at, ENTRY, code_size), (4, NOTE_AT, 0, note)]
        {
            let header = [kind, at, address, address, size, size, 4];
            image.extend(header.into_iter().flat_map(u64::to_le_bytes));
        }
        image.extend(NOTE);
        image.extend(code);
        Self::new(&image)
    }

    /// A multiboot kernel: 32-bit code that runs at 1 MiB + 32.
    pub(crate) fn multiboot(code: &[u8]) -> Self {
        const MAGIC: u32 = 0x1bad_b002;
        const HAS_ADDRESSES: u32 = 1 << 16;
        const BASE: u32 = 0x10_0000;
        const HEADER: u32 = 32;
        let end = BASE + HEADER + code.len() as u32;
        let checksum = 0u32.wrapping_sub(MAGIC.wrapping_add(HAS_ADDRESSES));
        let header = [MAGIC, HAS_ADDRESSES, checksum, BASE, BASE, end, end, BASE + HEADER];
        let mut image: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
        image.extend(code);
        Self::new(&image)
    }
}

/// The path in an environment variable that `cargo xtask kvm-test` sets.
pub(crate) fn artefact(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: run `cargo xtask kvm-test`, which builds the guest"),
    }
}
