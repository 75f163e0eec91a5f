//! `hv run` on real KVM: the built-in guest, every way a guest can end, and small kernels.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Image, Running, hv};

/// Ends the machine by the ACPI sleep control value: mov dx,0x600; mov al,0x34; out dx,al; hlt.
const POWER_OFF_16: &[u8] = &[0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];

fn flat(code: &[u8], args: &[&str]) -> common::Ran {
    let image = Image::new(code);
    hv(&[&["run", "--kernel", image.path(), "--format", "flat"], args].concat())
}

fn multiboot(code: &[u8], args: &[&str]) -> common::Ran {
    let image = Image::multiboot(code);
    hv(&[&["run", "--kernel", image.path()], args].concat())
}

#[test]
fn the_built_in_guest_passes_every_check() {
    let ran = hv(&["run"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("20 passed, 0 failed, 0 not applicable"), "{}", ran.stdout);
    assert!(ran.stdout.contains("hello from the built-in guest"), "{}", ran.stdout);
}

#[test]
fn with_a_split_irqchip_only_the_pit_is_missing() {
    let ran = hv(&["run", "--irqchip", "split"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("19 passed, 0 failed, 1 not applicable"), "{}", ran.stdout);
    let line = ran.stdout.lines().find(|line| line.starts_with("n/a")).unwrap();
    assert!(line.contains("pit-ioapic") && line.contains("split irqchip"), "{line}");
}

#[test]
fn with_one_processor_the_checks_of_the_second_do_not_apply() {
    let ran = hv(&["run", "--cpus", "1", "--json"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let report: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let status = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|c| c["name"] == name).unwrap()["status"].clone()
    };
    assert_eq!(status("second-vcpu"), "not-applicable");
    assert_eq!(status("ipi"), "not-applicable");
    assert_eq!(status("irqfd"), "passed");
}

#[test]
fn memory_in_a_file_holds_what_the_last_guest_left() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(32 << 20).unwrap();
    let path = file.path().to_str().unwrap();
    let args = ["run", "--memory", "32M", "--memory-file", path, "--prefault"];
    for _ in 0..2 {
        let ran = hv(&args);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains("20 passed, 0 failed, 0 not applicable"), "{}", ran.stdout);
    }
    assert!(std::fs::read(path).unwrap().iter().any(|byte| *byte != 0));
    assert_eq!(std::fs::metadata(path).unwrap().len(), 32 << 20);
}

#[test]
fn a_guest_whose_memory_file_is_shortened_ends_and_hv_says_why() {
    const MIB: u64 = 1 << 20;
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(128 * MIB).unwrap();
    let path = file.path().to_str().unwrap();
    let image = Image::linux(&[
        0x66, 0xba, 0xf8, 0x03, //             mov dx, 0x3f8
        0xb0, b'r', //                         mov al, 'r'
        0xee, //                               out dx, al
        0xbb, 0x00, 0x00, 0x00, 0x02, //       mov ebx, 32 MiB
        0x80, 0x3b, 0x00, //                   wait: cmp byte [rbx], 0
        0x74, 0xfb, //                         je wait
        0xbb, 0x00, 0x00, 0x00, 0x06, //       mov ebx, 96 MiB
        0xc6, 0x03, 0x01, //                   mov byte [rbx], 1
        0xf4, //                               hlt
    ]);
    let mut running = Running::start(&["run", "--kernel", image.path(), "--memory-file", path]);
    running.wait_for("r");
    file.as_file().set_len(64 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[1], 32 * MIB).unwrap();
    let ran = running.finish();
    assert_eq!(ran.code, Some(4), "{ran:?}");
    // KVM fails to run it, or asks for a device there if it emulates the instruction.
    let failed = ran.stderr.contains("KVM_RUN") && ran.stderr.contains("EFAULT");
    let emulated = ran.stderr.contains("KVM could not reach the guest's memory at 0x6000000");
    assert!(failed != emulated, "{}", ran.stderr);
    let lost = "it was shortened to 0x4000000 bytes while 0x8000000 of it were the memory";
    assert!(ran.stderr.contains(lost) && ran.stderr.contains(path), "{}", ran.stderr);
}

#[test]
fn transparent_huge_pages_or_the_reason_why_not() {
    let ran = hv(&["run", "--hugepages", "thp", "--prefault"]);
    match ran.code {
        Some(0) => {}
        _ => assert!(ran.stderr.contains("/sys/kernel/mm/transparent_hugepage"), "{ran:?}"),
    }
}

#[test]
fn kvm_can_be_an_inherited_descriptor() {
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").unwrap();
    rustix::io::fcntl_setfd(&kvm, rustix::io::FdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&kvm);
    let ran = hv(&["run", "--kvm", &format!("fd:{fd}")]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[test]
fn a_flat_guest_prints_and_powers_off() {
    // mov dx,0x3f8; mov al,'R'; out dx,al; mov al,'\n'; out dx,al
    let mut code = vec![0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xb0, b'\n', 0xee];
    code.extend(POWER_OFF_16);
    let ran = flat(&code, &["--memory", "16M"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.stdout, "R\n");
}

#[test]
fn ends_have_their_exit_codes() {
    // i8042: mov al,0xfe; out 0x64,al; hlt
    assert_eq!(flat(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], &[]).code, Some(6));
    // Port 0xcf9: mov dx,0xcf9; mov al,6; out dx,al; hlt
    assert_eq!(flat(&[0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4], &[]).code, Some(6));
    // An IDT without entries: lidt [0x1000] (zeroes); ud2. The fault can't be delivered.
    let ran = multiboot(&[0x0f, 0x01, 0x1d, 0x00, 0x10, 0, 0, 0x0f, 0x0b], &[]);
    assert_eq!(ran.code, Some(10), "{ran:?}");
    assert!(ran.stderr.contains("triple fault on vCPU 0"), "{}", ran.stderr);
    assert!(ran.stderr.contains("RIP"), "{}", ran.stderr);
}

#[test]
fn the_debug_exit_device_gives_the_code_the_guest_chose() {
    // mov al,0x10; out 0xf4,al; hlt
    let code = [0xb0, 0x10, 0xe6, 0xf4, 0xf4];
    let ran = multiboot(&code, &["--device", "isa-debug-exit"]);
    assert_eq!(ran.code, Some(0x21), "{ran:?}");
    // mov dx,0x501; mov al,0; out dx,al; hlt
    let code = [0x66, 0xba, 0x01, 0x05, 0xb0, 0, 0xee, 0xf4];
    let ran = multiboot(&code, &["--device", "isa-debug-exit,iobase=0x501"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let ran = multiboot(&code, &["--device", "isa-debug-exit,iobase=0x3f8"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("overlaps COM1"), "{}", ran.stderr);
}

#[test]
fn the_test_device_has_its_latch_its_memory_and_its_page_flush() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x78, 0x56, 0x34, 0x12,             // mov eax, 0x12345678
        0xe7, 0xe0,                               // out 0xe0, eax
        0x31, 0xc0,                               // xor eax, eax
        0xe5, 0xe0,                               // in eax, 0xe0
        0x3d, 0x78, 0x56, 0x34, 0x12,             // cmp eax, 0x12345678
        0x75, 0x3d,                               // jne fail
        0xbe, 0x00, 0x01, 0x00, 0xff,             // mov esi, 0xff000100
        0xc7, 0x06, 0xef, 0xbe, 0xad, 0xde,       // mov dword [esi], 0xdeadbeef
        0x81, 0x3e, 0xef, 0xbe, 0xad, 0xde,       // cmp dword [esi], 0xdeadbeef
        0x75, 0x2a,                               // jne fail
        0xbf, 0x00, 0x00, 0x20, 0x00,             // mov edi, 0x200000
        0xc7, 0x07, 0xbe, 0xba, 0xfe, 0xca,       // mov dword [edi], 0xcafebabe
        0x89, 0xf8,                               // mov eax, edi
        0xe7, 0xe4,                               // out 0xe4, eax: take the page away and back
        0x81, 0x3f, 0xbe, 0xba, 0xfe, 0xca,       // cmp dword [edi], 0xcafebabe
        0x75, 0x13,                               // jne fail
        0x66, 0xba, 0x05, 0x20,                   // mov dx, 0x2005
        0xb0, 0x01, 0xee,                         // mov al, 1; out dx, al: raise line 5
        0x30, 0xc0, 0xee,                         // xor al, al; out dx, al: lower it
        0xb0, 0x02, 0xe6, 0xf4, 0xf4,             // mov al, 2; out 0xf4, al; hlt
        0x90, 0x90, 0x90, 0x90,
        0xb0, 0x03, 0xe6, 0xf4, 0xf4,             // fail: mov al, 3; out 0xf4, al; hlt
    ];
    for irqchip in ["kernel", "split"] {
        let args = ["--device", "isa-debug-exit", "--device", "testdev", "--irqchip", irqchip];
        let ran = multiboot(&code, &args);
        assert_eq!(ran.code, Some(5), "{ran:?}");
        assert!(!ran.stderr.contains("no device"), "{}", ran.stderr);
    }
}

/// fld dword [0xd0000000]: KVM's emulator has no x87 loads, on no host, and MMIO needs it.
const X87_ON_MMIO: &[u8] = &[0xd9, 0x05, 0x00, 0x00, 0x00, 0xd0, 0xf4];

#[test]
fn what_nobody_can_emulate_ends_with_a_full_report() {
    for args in [&[][..], &["--no-complete"]] {
        let ran = multiboot(X87_ON_MMIO, args);
        assert_eq!(ran.code, Some(12), "{ran:?}");
        for text in [
            "sub-error 1 (KVM_INTERNAL_ERROR_EMULATION), data 0x",
            "RIP 0000000000100020",
            "d9 05 00 00 00 d0",
            "fld dword [0D0000000h]",
            "CR0",
        ] {
            assert!(ran.stderr.contains(text), "{text:?} is missing:\n{}", ran.stderr);
        }
        assert_eq!(ran.stderr.contains("not completed:"), args.is_empty(), "{}", ran.stderr);
    }
}

#[test]
fn a_signal_stops_it_and_says_so() {
    // mov dx,0x3f8; mov al,'R'; out dx,al; loop: hlt; jmp loop
    let image = Image::new(&[0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xf4, 0xeb, 0xfd]);
    let mut running = Running::start(&["run", "--kernel", image.path(), "--format", "flat"]);
    running.wait_for("R");
    running.terminate();
    let ran = running.finish();
    assert_eq!(ran.code, Some(14), "{ran:?}");
    assert!(ran.stderr.contains("SIGTERM"), "{}", ran.stderr);
}

#[test]
fn a_reader_that_does_not_read_can_not_keep_it_alive() {
    // loop: mov dx,0x3f8; mov al,'x'; out dx,al; jmp loop
    let image = Image::new(&[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xf8]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_hv"))
        .args(["run", "--kernel", image.path(), "--format", "flat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (stdout, mut stdin) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    // A pipe counts as full when its last page is in use.
    let size = rustix::pipe::fcntl_getpipe_size(&stdout).unwrap() as u64;
    let full = size - rustix::param::page_size() as u64;
    let deadline = Instant::now() + common::LIMIT;
    let wait_until = |what: &str, done: &dyn Fn() -> bool| {
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let waiting = |pipe: BorrowedFd<'_>| rustix::io::ioctl_fionread(pipe).unwrap();
    wait_until("the guest does not print", &|| waiting(stdout.as_fd()) > full);
    // The serial port waits for its reader now; what is typed has to wait, too.
    stdin.write_all(b"typed").unwrap();
    wait_until("hv does not read", &|| waiting(stdin.as_fd()) == 0);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(code, Some(14));
}

#[test]
fn what_is_on_the_standard_input_is_not_in_the_way_of_the_built_in_guest() {
    let mut running = Running::start(&["run"]);
    running.send(&"noise".repeat(100));
    let ran = running.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[test]
fn the_escape_key_works_whatever_was_typed_before_it() {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let keyboard = openpt(flags).unwrap();
    grantpt(&keyboard).unwrap();
    unlockpt(&keyboard).unwrap();
    let terminal = ioctl_tiocgptpeer(&keyboard, flags).unwrap();
    // loop: jmp loop
    let image = Image::new(&[0xeb, 0xfe]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_hv"))
        .args(["run", "--kernel", image.path(), "--format", "flat"])
        .stdin(terminal)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Far more than the serial port and what is kept for it.
    for _ in 0..100 {
        rustix::io::write(&keyboard, &[b'k'; 100]).unwrap();
        while rustix::io::ioctl_fionread(&keyboard).is_ok_and(|n| n > 0) {
            rustix::io::read(&keyboard, &mut [0; 256]).unwrap(); // echo from before raw mode
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let deadline = Instant::now() + common::LIMIT;
    let code = loop {
        // Until raw mode is on, the line discipline may drop keys of a line that is too long.
        let _ = rustix::io::write(&keyboard, b"\x01x");
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(code, Some(14));
}

#[test]
fn it_stops_even_if_no_signal_can_be_queued() {
    // Of util-linux, which every Debian has.
    let mut child = Command::new("prlimit")
        .args(["--sigpending=0", env!("CARGO_BIN_EXE_hv"), "run"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + common::LIMIT;
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(code, Some(0));
}

#[test]
fn too_many_processors_and_images_that_are_no_kernel_are_usage_errors() {
    let ran = hv(&["run", "--cpus", "100000"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("100000") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
    let text = Image::new(b"not a kernel at all");
    let ran = hv(&["run", "--kernel", text.path()]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    let big = Image::new(&vec![0; 32 << 20]);
    let kernel = Image::multiboot(&[0xf4]);
    let args = ["run", "--kernel", kernel.path(), "--initrd", big.path(), "--memory", "16M"];
    let ran = hv(&args);
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains(big.path()), "{}", ran.stderr);
}
