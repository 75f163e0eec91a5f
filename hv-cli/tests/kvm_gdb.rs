//! Debian's gdb debugs guests on real KVM: the one built in, Linux, and small kernels.
//!
//! Every test is a gdb script; what it prints is judged. Nothing depends on the speed of the machine:
//! gdb waits until the guest is where it is to stop.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use common::{Image, Ran, Running, artefact};
use tempfile::TempDir;

/// A guest that waits for a debugger, and where.
struct Guest {
    hv: Running,
    socket: PathBuf,
    dir: TempDir,
}

impl Guest {
    fn start(args: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("gdb");
        let address = format!("unix:{}", socket.display());
        let gdb = ["run", "--gdb", &address, "--gdb-wait"];
        let mut hv = Running::start(&[&gdb, args].concat());
        hv.wait_for_message("the guest waits for it");
        Self { hv, socket, dir }
    }

    /// gdb with this script, connected.
    fn gdb(&self, program: Option<&str>, script: &str) -> Running {
        let file = self.dir.path().join("script");
        let connect = format!("target remote {}", self.socket.display());
        let settings = "set pagination off\nset confirm off\nset language c\n";
        fs::write(&file, format!("{settings}{}", script.replace("CONNECT", &connect))).unwrap();
        let mut command = Command::new("gdb");
        command.args(["-nx", "-batch", "-x"]).arg(file).args(program);
        Running::spawn(&mut command)
    }

    /// The same, to its end.
    fn debug(&self, program: Option<&str>, script: &str) -> String {
        let ran = self.gdb(program, script).finish();
        assert_eq!(ran.code, Some(0), "{ran:?}");
        ran.stdout
    }

    fn finish(self) -> Ran {
        let ran = self.hv.finish();
        assert!(!self.socket.exists(), "the socket is left: {ran:?}");
        ran
    }
}

#[track_caller]
fn assert_has(output: &str, lines: &[&str]) {
    for line in lines {
        assert!(output.lines().any(|it| it.trim_end() == *line), "no {line:?} in:\n{output}");
    }
}

/// The symbols of the built-in guest are those of `hv`, moved to where the guest is loaded. Being
/// part of a constant, its code has no types.
const BUILT_IN: &str = r#"
set $moved = 0x10000 - (long)&hv_guest_image
eval "symbol-file HV -o %ld", $moved
CONNECT
printf "entry %d\n", $pc == (long)&guest_entry
printf "threads %d\n", $_thread
info threads
stepi
printf "stepped %d\n", $pc - (long)&guest_entry

hbreak *(long)&guest_enable_lapic
break *(long)&guest_report
continue
printf "hardware %d\n", $pc == (long)&guest_enable_lapic
delete 1
continue
printf "software %d\n", $pc == (long)&guest_report
printf "code %#x\n", *(unsigned char *)$pc
stepi
printf "after mov %d, edx %#x\n", $pc - (long)&guest_report, $edx
stepi
printf "after out %d\n", $pc - (long)&guest_report
stepi
printf "after ret %d\n", $pc < (long)&guest_report || $pc > (long)&guest_report + 6
delete

break *(long)&guest_ap_long
continue
printf "second vCPU: thread %d, at its start %d\n", $_thread, $pc == (long)&guest_ap_long
printf "paging %d, long mode %d\n", ($cr0 >> 31) & 1, ($efer >> 10) & 1
stepi
printf "second vCPU: thread %d, stepped %d\n", $_thread, $pc - (long)&guest_ap_long
set $rbx = 0x1122334455667788
printf "rbx %#lx\n", $rbx
thread 1
stepi
printf "first vCPU: thread %d\n", $_thread
detach
"#;

fn built_in_guest(args: &[&str], passed: &str) {
    let guest = Guest::start(args);
    let mode = fs::metadata(&guest.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else may connect");
    let hv = env!("CARGO_BIN_EXE_hv");
    let output = guest.debug(Some(hv), &BUILT_IN.replace("HV", hv));
    assert_has(
        &output,
        &[
            "entry 1",
            "threads 1",
            "stepped 5",
            "hardware 1",
            "software 1",
            "code 0xba",
            "after mov 5, edx 0x504",
            "after out 6",
            "after ret 1",
            "second vCPU: thread 2, at its start 1",
            "paging 1, long mode 1",
            "second vCPU: thread 2, stepped 5",
            "rbx 0x1122334455667788",
            "first vCPU: thread 1",
        ],
    );
    assert!(output.contains("vCPU 1: not started"), "{output}");
    // It does not notice: it goes on and passes its checks.
    let ran = guest.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains(passed), "{}", ran.stdout);
}

#[test]
fn the_built_in_guest_is_debugged_by_symbol_and_passes_its_checks_afterwards() {
    built_in_guest(&[], "20 passed, 0 failed");
}

#[test]
fn with_a_split_irqchip_too() {
    built_in_guest(&["--irqchip", "split"], "19 passed, 0 failed");
}

/// See `kvm_linux.rs`. Without KASLR, symbols are where the file has them.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 mitigations=off noxsave nokaslr \
    clearcpuid=cx16,smap,smep,umip,popcnt,movbe,fsgsbase,invpcid,pcid,rdrand,rdseed,pku";

/// Before the kernel has its page tables, its symbols are nowhere: a hardware breakpoint is first.
const LINUX: &str = r#"
CONNECT
hbreak start_kernel
continue
printf "start_kernel %d\n", $pc == (long)start_kernel
x/s (char *)&linux_banner
delete
break kernel_clone
continue
printf "kernel_clone %d, thread %d\n", $pc == (long)kernel_clone, $_thread
stepi
printf "stepped %d\n", $pc > (long)kernel_clone && $pc < (long)kernel_clone + 16
stepi
continue
printf "again %d\n", $pc == (long)kernel_clone
backtrace 2
detach
"#;

#[test]
fn linux_is_debugged_by_symbol_and_goes_on_afterwards() {
    let (kernel, initrd) = (artefact("HV_GUEST_VMLINUX"), artefact("HV_GUEST_INITRD"));
    let kernel = kernel.to_str().unwrap();
    let mut guest = Guest::start(&[
        "--kernel",
        kernel,
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        CMDLINE,
        "--cpus",
        "2",
        "--memory",
        "256M",
    ]);
    let output = guest.debug(Some(kernel), LINUX);
    assert_has(&output, &["start_kernel 1", "kernel_clone 1, thread 1", "stepped 1", "again 1"]);
    assert!(output.contains("\"Linux version 6.1."), "{output}");
    assert!(output.contains("in kernel_clone ()"), "{output}");
    // It goes on, with its second processor. That the rest works is `kvm_linux.rs`'s to show.
    guest.hv.wait_for("smp: Brought up 1 node, 2 CPUs");
    guest.hv.terminate();
    let ran = guest.finish();
    assert_eq!(ran.code, Some(14), "{ran:?}");
}

/// mov dx,0x3f8; mov al,'R'; out dx,al; jmp $
const LOOP: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0xeb, 0xfe];

#[test]
fn ctrl_c_stops_a_guest_that_loops_and_kill_ends_it() {
    let image = Image::multiboot(LOOP);
    let mut guest = Guest::start(&["--kernel", image.path()]);
    let script = "CONNECT\ncontinue\nprintf \"loops at %#lx\\n\", $pc\nstepi\nstepi\n\
        printf \"still %#lx\\n\", $pc\nkill\n";
    let gdb = guest.gdb(None, script);
    guest.hv.wait_for("R");
    gdb.signal(rustix::process::Signal::INT);
    let ran = gdb.finish();
    assert_has(&ran.stdout, &["loops at 0x100027", "still 0x100027"]);
    assert!(ran.stdout.contains("SIGINT"), "{ran:?}");
    let ran = guest.finish();
    assert_eq!(ran.code, Some(14), "{ran:?}");
    assert!(ran.stderr.contains("killed by the debugger"), "{}", ran.stderr);
}

#[test]
fn a_debugger_that_dies_leaves_a_guest_that_goes_on() {
    // mov dx,0x3f8; mov al,'R'; out dx,al; nop; mov dx,0x600; mov al,0x34; out dx,al; hlt
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0xb0, b'R', 0xee, 0x90, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee,
        0xf4,
    ];
    let image = Image::multiboot(&code);
    let guest = Guest::start(&["--kernel", image.path()]);
    let script =
        "CONNECT\nbreak *0x100027\ncontinue\nprintf \"stopped at %#lx\\n\", $pc\nshell cat\n";
    let mut gdb = guest.gdb(None, script);
    gdb.wait_for("stopped at 0x100027");
    // As it is: stopped, with a breakpoint where the guest is.
    gdb.signal(rustix::process::Signal::KILL);
    let ran = guest.finish();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.stdout, "R");
}
