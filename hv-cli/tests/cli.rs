//! What `hv` says to a user who asks for what can't be: one line, and the documented exit code.
//! Nothing here opens /dev/kvm.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;

use common::{Image, hv};

/// No KVM node: what is refused for another reason is refused before it is opened.
const NO_KVM: [&str; 2] = ["--kvm", "/no/such/kvm"];

fn run(args: &[&str]) -> common::Ran {
    hv(&[&["run"], args, &NO_KVM].concat())
}

fn refused(args: &[&str], code: i32, says: &[&str]) {
    let ran = run(args);
    assert_eq!(ran.code, Some(code), "{args:?}: {ran:?}");
    for text in says {
        assert!(ran.stderr.contains(text), "{args:?} does not say {text:?}: {}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert_eq!(ran.stdout, "", "{args:?}");
}

fn refused_in_one_line(args: &[&str], code: i32, says: &[&str]) {
    refused(args, code, says);
    let stderr = run(args).stderr;
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("hv: error: "), "{stderr}");
}

#[test]
fn help_teaches() {
    let ran = hv(&["--help"]);
    assert_eq!(ran.code, Some(0));
    for text in ["hv run", "--kernel", "doctor", "Exit codes:", "Ctrl-A x"] {
        assert!(ran.stdout.contains(text), "{text:?} is missing:\n{}", ran.stdout);
    }
    assert_eq!(hv(&["--version"]).code, Some(0));
}

#[test]
fn words_that_mean_nothing_are_usage_errors() {
    for args in [&[][..], &["walk"], &["run", "--frobnicate"], &["run", "extra"]] {
        let ran = hv(args);
        assert_eq!(ran.code, Some(2), "{args:?}");
        assert!(!ran.stderr.is_empty());
    }
    refused(&["--cpus", "0"], 2, &["--cpus", "0"]);
    refused(&["--cpus", "many"], 2, &["--cpus"]);
    refused(&["--memory", "1.5G"], 2, &["--memory", "128M"]);
    refused(&["--device", "virtio"], 2, &["virtio", "isa-debug-exit", "testdev"]);
    refused(&["--initrd", "x"], 2, &["--kernel"]);
    refused(&["--kvm", "fd:x"], 2, &["fd:x"]);
}

#[test]
fn memory_that_can_not_be() {
    refused_in_one_line(&["--memory", "0"], 2, &["--memory", "0 bytes"]);
    refused_in_one_line(&["--memory", "1000T"], 2, &["more than the host has"]);
    refused_in_one_line(&["--memory", "5K"], 2, &["--memory"]);
}

fn file(len: u64) -> Image {
    let image = Image::new(b"");
    std::fs::File::options().write(true).open(image.path()).unwrap().set_len(len).unwrap();
    image
}

#[test]
fn memory_files_that_can_not_be() {
    let refused = |args: &[&str], says: &[&str]| {
        refused_in_one_line(args, 2, &[&["--memory-file"], says].concat());
    };
    let long = file(2 << 20);
    refused(&["--memory-file", "/no/such/file"], &["/no/such/file", "ENOENT", "truncate -s"]);
    refused(&["--memory-file", "/"], &["directory"]);
    refused(&["--memory-file", "/dev/zero"], &["/dev/zero", "character device"]);
    refused(&["--memory-file", "/no/such/a\nb\u{1b}[31m"], &["a\\nb\\u{1b}"]);
    let sizes = ["0x200000 bytes", "0x300000", "truncate -s 3145728", long.path()];
    refused(&["--memory", "3M", "--memory-file", long.path()], &sizes);
    let huge = ["--memory", "2M", "--memory-file", long.path(), "--hugepages", "2M"];
    refused(&huge, &["hugetlbfs"]);
    let observed = ["--memory", "2M", "--memory-file", long.path(), "--trace", long.path()];
    refused(&observed, &["--trace", "overwrite"]);
    assert_eq!(std::fs::metadata(long.path()).unwrap().len(), 2 << 20);

    let kernel = Image::linux(&[0xf4]);
    let len = std::fs::metadata(kernel.path()).unwrap().len();
    let args = ["--kernel", kernel.path(), "--memory-file", kernel.path()];
    refused(&args, &["--kernel", "overwrite", kernel.path()]);
    assert_eq!(std::fs::metadata(kernel.path()).unwrap().len(), len);

    let locked = std::fs::File::open(long.path()).unwrap();
    locked.lock_shared().unwrap();
    refused(&["--memory", "2M", "--memory-file", long.path()], &[long.path(), "in use"]);
    drop(locked);
    // Nothing is wrong with it: then KVM is asked for.
    refused_in_one_line(&["--memory", "2M", "--memory-file", long.path()], 4, &["/no/such/kvm"]);
}

#[test]
fn huge_pages_that_can_not_be() {
    refused(&["--hugepages", "4M"], 2, &["--hugepages", "2M", "1G", "thp"]);
    let unaligned = ["0x500000", "0x200000", "--hugepages"];
    refused_in_one_line(&["--memory", "5M", "--hugepages", "2M"], 2, &unaligned);
    refused_in_one_line(&["--memory", "128M", "--hugepages", "1g"], 2, &["0x40000000"]);
    // In either case a host without KVM; what is asserted of huge pages is in hv-memory.
    for args in [["--memory", "2M", "--hugepages", "2M"], ["--memory", "2M", "--hugepages", "thp"]]
    {
        let ran = run(&args);
        assert_eq!(ran.code, Some(4), "{ran:?}");
        let had = ran.stderr.contains("/no/such/kvm");
        let refused = ran.stderr.starts_with("hv: error: --hugepages: ")
            && (ran.stderr.contains("nr_hugepages")
                || ran.stderr.contains("no huge pages of 2 MiB")
                || ran.stderr.contains("transparent_hugepage"));
        assert!(had != refused, "{ran:?}");
    }
}

#[test]
fn populating_memory_is_shown_on_a_terminal_only() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use std::process::{Command, Stdio};
    let args = [&["run", "--memory", "65M", "--prefault"], &NO_KVM[..]].concat();
    let ran = hv(&args);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(
        ran.stderr.starts_with("hv: error: ") && ran.stderr.contains("/no/such/kvm"),
        "{ran:?}"
    );

    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let screen = openpt(flags).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let terminal = ioctl_tiocgptpeer(&screen, flags).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hv"))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(terminal)
        .spawn()
        .unwrap();
    // The last of the terminal's users gone, reading it is an error.
    let (mut shown, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = rustix::io::read(&screen, &mut buffer) {
        shown.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let shown = String::from_utf8(shown).unwrap();
    let line = "\rhv: populating memory: 98% of 65 MiB\rhv: populating memory: 100% of 65 MiB";
    assert!(shown.starts_with(&format!("{line}\r\u{1b}[K")), "{shown:?}");
    assert!(shown.contains("/no/such/kvm"), "{shown:?}");
}

#[test]
fn images_that_are_none() {
    let text = Image::new(b"not a kernel at all");
    let empty = Image::new(b"");
    let lying = Image::new(&{
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[54..58].fill(0xff);
        elf
    });
    refused_in_one_line(&["--kernel", "/no/such/kernel"], 2, &["/no/such/kernel", "ENOENT"]);
    refused_in_one_line(&["--kernel", "/"], 2, &["directory"]);
    refused_in_one_line(&["--kernel", "/dev/zero"], 2, &["/dev/zero"]);
    refused_in_one_line(&["--kernel", empty.path()], 2, &[empty.path()]);
    for image in [&text, &lying] {
        refused_in_one_line(&["--kernel", image.path()], 2, &[image.path()]);
    }
    refused_in_one_line(&["--kernel", "a\nb\u{1b}[31m"], 2, &["a\\nb\\u{1b}"]);
    refused_in_one_line(&["--cpus", "256"], 2, &["--cpus 256", "255"]);
    let missing = ["--kernel", text.path(), "--format", "flat", "--initrd", "/no/such/initrd"];
    refused_in_one_line(&missing, 2, &["/no/such/initrd"]);
}

#[test]
fn disks_that_can_not_be() {
    let disk = Image::new(&[0; 1024]);
    let with = |properties: &str| format!("{}{properties}", disk.path());
    refused_in_one_line(&["--disk", "/no/such/disk"], 2, &["/no/such/disk", "ENOENT", "truncate"]);
    refused_in_one_line(&["--disk", "/"], 2, &["disk /", "directory"]);
    refused_in_one_line(&["--disk", "/dev/null"], 2, &["/dev/null", "character device"]);
    refused_in_one_line(&["--disk", Image::new(b"short").path()], 2, &["5 bytes", "512"]);
    refused_in_one_line(&["--disk", env!("CARGO_BIN_EXE_hv")], 2, &["ETXTBSY", ",readonly"]);
    refused(&["--disk", ""], 2, &["--disk"]);
    refused(&["--disk", &with(",format=qcow2")], 2, &["qcow2", "qemu-img"]);
    refused(&["--disk", &with(",cache=fast")], 2, &["fast", "writeback"]);
    refused(&["--disk", &with(",write")], 2, &["write", "readonly"]);
    // In use, by a machine or twice by this one.
    refused_in_one_line(&["--disk", disk.path(), "--disk", disk.path()], 2, &["in use"]);
    let reader = std::fs::File::open(disk.path()).unwrap();
    reader.lock_shared().unwrap();
    refused_in_one_line(&["--disk", disk.path()], 2, &["in use", ",readonly"]);
    let read_only = with(",readonly");
    let twice = ["--disk", &read_only, "--disk", &read_only];
    refused_in_one_line(&twice, 4, &["/no/such/kvm"]);
    reader.unlock().unwrap();
    reader.lock().unwrap();
    refused_in_one_line(&["--disk", &read_only], 2, &["in use", "writes"]);
}

#[test]
fn files_to_observe_a_run_with_that_can_not_be() {
    for option in ["--trace", "--record"] {
        refused_in_one_line(&[option, "/"], 2, &[option, "'/'", "EISDIR", "name a file"]);
        refused_in_one_line(&[option, "/no/such/file"], 2, &[option, "/no/such/file", "ENOENT"]);
        refused_in_one_line(&[option, "/dev/null/file"], 2, &[option, "ENOTDIR"]);
        refused(&[option, ""], 2, &[option, "value is required"]);
        let kernel = Image::linux(&[0xf4]);
        let args = ["--kernel", kernel.path(), option, kernel.path()];
        refused_in_one_line(&args, 2, &[option, "overwrite", "--kernel"]);
        assert!(std::fs::metadata(kernel.path()).unwrap().len() > 0);
    }
    let file = Image::new(b"kept");
    let args = ["--trace", file.path(), "--record", file.path()];
    refused_in_one_line(&args, 2, &["--trace and --record", file.path()]);
    assert_eq!(std::fs::read(file.path()).unwrap(), b"kept");
}

#[test]
fn what_fails_before_kvm_is_open_is_recorded_as_nothing() {
    let (trace, record) = (Image::new(b"what was there"), Image::new(b"what was there"));
    let ran = run(&["--trace", trace.path(), "--record", record.path()]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("/no/such/kvm: ") && ran.stderr.contains("0 calls traced"));
    assert_eq!(std::fs::read(trace.path()).unwrap(), b"");
    let record = std::fs::read_to_string(record.path()).unwrap();
    let [first, end] = record.lines().collect::<Vec<_>>()[..] else { panic!("{record}") };
    assert!(first.starts_with(r#"{"hv-transcript":1,"#), "{first}");
    assert_eq!(end, r#"{"end":true}"#);
}

#[test]
fn without_kvm_every_command_says_what_to_do() {
    refused_in_one_line(&[], 4, &["/no/such/kvm", "ENOENT", "modprobe"]);
    for command in ["probe", "doctor"] {
        let ran = hv(&[&[command][..], &NO_KVM].concat());
        assert_eq!(ran.code, Some(4), "{ran:?}");
        assert!(format!("{}{}", ran.stdout, ran.stderr).contains("ENOENT"), "{ran:?}");
    }
    let ran = hv(&["run", "--kvm", "/dev/null"]);
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("not KVM"), "{ran:?}");
}

#[test]
fn a_debugger_is_let_in_by_its_owner_only() {
    for address in ["tcp:0.0.0.0:1234", "tcp:192.0.2.1:1234", "tcp:[::]:1234"] {
        refused(&["--gdb", address], 2, &["--gdb", "no loopback address", "127.0.0.1"]);
    }
    refused(&["--gdb", ":1234"], 2, &["--gdb", "unix:PATH", "tcp:127.0.0.1:PORT"]);
    refused(&["--gdb-wait"], 2, &["--gdb <"]);
    refused(&["--gdb", "unix:gdb", "--record", "run"], 2, &["--record"]);

    let file = Image::new(b"precious");
    let address = format!("unix:{}", file.path());
    refused_in_one_line(&["--gdb", &address], 2, &["--gdb", file.path(), "no socket"]);
    assert_eq!(std::fs::read(file.path()).unwrap(), b"precious");
    let nowhere = "unix:/no/such/gdb";
    refused_in_one_line(
        &["--gdb", nowhere],
        2,
        &["/no/such/gdb", "ENOENT", "directory must exist"],
    );
}

#[test]
fn the_socket_of_a_machine_that_could_not_be_made_is_gone() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("gdb");
    refused(&["--gdb", &format!("unix:{}", path.display())], 4, &["/no/such/kvm"]);
    assert!(!path.exists());
}

#[test]
fn the_api_socket_takes_the_place_of_nothing_else() {
    let file = Image::new(b"precious");
    let says = ["--api-socket: ", file.path(), "no socket"];
    refused_in_one_line(&["--api-socket", file.path()], 2, &says);
    assert_eq!(std::fs::read(file.path()).unwrap(), b"precious");
    let nowhere = ["/no/such/api", "ENOENT", "directory must exist"];
    refused_in_one_line(&["--api-socket", "/no/such/api"], 2, &nowhere);
    refused(&["--api-socket", "api", "--record", "run"], 2, &["--record"]);

    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("api");
    refused(&["--api-socket", path.to_str().unwrap()], 4, &["/no/such/kvm"]);
    assert!(!path.exists());
    // One where somebody listens, even if it is busy.
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let says = ["--api-socket: another process listens on", path.to_str().unwrap()];
    refused_in_one_line(&["--api-socket", path.to_str().unwrap()], 2, &says);
}

#[test]
fn ctl_says_what_to_do_when_nobody_is_there() {
    let ran = hv(&["ctl", "--socket", "/no/such/vm.sock", "state"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    for text in ["hv: error: --socket '/no/such/vm.sock': ENOENT", "--api-socket"] {
        assert!(ran.stderr.contains(text), "{ran:?}");
    }
    for args in [
        &["ctl"][..],
        &["ctl", "state"],
        &["ctl", "--socket", "x"],
        &["ctl", "--socket", "x", "fly"],
        &["ctl", "--socket", "x", "registers", "-1"],
        &["ctl", "--socket", "x", "registers", "0", "1"],
    ] {
        assert_eq!(hv(args).code, Some(2), "{args:?}");
    }
    let help = hv(&["ctl", "--help"]).stdout;
    for text in ["power-button", "registers", "--json", "Exit codes:"] {
        assert!(help.contains(text), "{text:?} is missing:\n{help}");
    }
}

fn toml(text: &str) -> Image {
    Image::new(text.as_bytes())
}

#[test]
fn a_configuration_file_is_refused_with_the_place() {
    let refused = |text: &str, args: &[&str], says: &[&str]| {
        let file = toml(text);
        let says = [says, &[file.path()]].concat();
        refused_in_one_line(&[&["--config", file.path()], args].concat(), 2, &says);
    };
    refused("rng = true\nmemroy = '1G'", &[], &[":2:1: ", "memroy", "did you mean memory?"]);
    refused("memory = '1.5G'", &[], &[":1:10: ", "128M"]);
    // Together with the command line, in either place.
    refused("initrd = 'i'", &[], &["--kernel"]);
    refused("gdb = 'unix:g'", &["--record", "r"], &["--gdb", "--record"]);
    refused("json = true", &["--kernel", "k"], &["--json", "--kernel"]);
    refused_in_one_line(
        &["--config", "/no/such/file"],
        2,
        &["--config", "/no/such/file", "ENOENT"],
    );
    refused_in_one_line(&["--config", "/"], 2, &["--config", "EISDIR"]);

    let good = toml("memory = '5K'\nkvm = '/no/such/kvm'");
    let ran = hv(&["run", "--config", good.path()]);
    assert!(ran.code == Some(2) && ran.stderr.contains("--memory"), "{ran:?}");
    let ran = hv(&["run", &format!("--config={}", good.path()), "--memory", "2M"]);
    assert!(ran.code == Some(4) && ran.stderr.contains("/no/such/kvm"), "{ran:?}");
}

#[test]
fn a_command_line_with_a_configuration_file_is_checked_as_any() {
    let file = toml("rng = true");
    for args in [&["--config", file.path(), "--config", file.path()][..], &["--config"]] {
        refused(args, 2, &["--config"]);
    }
    refused(&["--config", file.path(), "--frobnicate"], 2, &["--frobnicate"]);
    refused(&["--config", file.path(), "--memory", "x"], 2, &["--memory", "128M"]);
}

#[test]
fn a_configuration_is_checked_and_printed() {
    let file = toml("cpus = 3\nrng = true\njson = true\n");
    let ran = hv(&["config", "check", file.path()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    assert!(ran.stdout.contains(file.path()), "{ran:?}");
    for (text, says) in [("cpu = 3", "did you mean cpus?"), ("initrd = 'x'", "--kernel")] {
        let file = toml(text);
        let ran = hv(&["config", "check", file.path()]);
        assert!(ran.code == Some(2) && ran.stderr.contains(says), "{ran:?}");
        assert!(ran.stderr.starts_with("hv: error: ") && ran.stdout.is_empty(), "{ran:?}");
    }

    let ran = hv(&["config", "print", file.path(), "--memory", "1G", "--kernel", "/k"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("--json"), "{ran:?}");
    let ran = hv(&["config", "print", file.path(), "--memory", "1G"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for line in ["cpus = 3", "memory = \"1G\"", "rng = true", "irqchip = \"kernel\"", "device = []"]
    {
        assert!(ran.stdout.lines().any(|l| l == line), "{line}:\n{}", ran.stdout);
    }
    let again = toml(&ran.stdout);
    assert_eq!(hv(&["config", "print", again.path()]).stdout, ran.stdout);

    let ran = hv(&["config", "print", "--json", "--kernel", "/k"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for part in ["\"kernel\": \"/k\"", "\"cpus\": 1", "\"initrd\": null"] {
        assert!(ran.stdout.contains(part), "{part}:\n{}", ran.stdout);
    }
    assert_eq!(hv(&["config", "print", "--initrd", "i"]).code, Some(2));
    assert_eq!(hv(&["config"]).code, Some(2));
}
