//! PID 1 of the test guest: shows that Linux reached user space, that the console works both
//! ways, and that the guest can end itself; a test reads what it prints.
//!
//! ```text
//! hv-guest: init up, 2 cpus online, kernel 6.1.192
//! hv-guest: ready
//! hv-guest: echo: <the line typed on the console>
//! hv-guest: power off
//! ```
//!
//! With `hv.check=NAME,…` on the kernel's command line it checks devices before "ready" (`check.rs`), and
//! says what came of each; then what is in `/proc/interrupts` of virtio:
//!
//! ```text
//! hv-guest: check rng: ok: 64 bytes of /dev/hwrng
//! hv-guest: interrupts:  25:  4  0  PCI-MSI 16385-edge  virtio0-input
//! ```
//!
//! `hv.test=reset` on the kernel command line restarts the machine after "ready" instead, and
//! `hv.test=panic` makes PID 1 exit, which panics the kernel.
//!
//! `cargo xtask guest` compiles this file and its modules by themselves, as a static executable without libc. It must
//! stay small (the guest's kernel may run in an interpreter, where a system call is slow) and it
//! must do nothing when it is not PID 1: it ends with reboot(2).

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod balloon;
mod check;
mod disk;
mod net;
mod sys;
mod vsock;

use core::arch::global_asm;
use core::panic::PanicInfo;

use sys::{EINTR, O_NOCTTY, O_RDWR, call, mount, nr, open, read, read_file};

// The stack pointer is the only thing the kernel hands over; the ABI wants it aligned at a call.
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    main = sym main,
);

// What the compiler calls to fill, copy and compare: there is no libc to have them.
global_asm!(
    ".globl memset",
    "memset:",
    "mov r8, rdi",
    "mov eax, esi",
    "mov rcx, rdx",
    "rep stosb",
    "mov rax, r8",
    "ret",
    ".globl memcpy",
    "memcpy:",
    "mov rax, rdi",
    "mov rcx, rdx",
    "rep movsb",
    "ret",
    ".globl bcmp",
    "bcmp:",
    // Equal if there is nothing to compare.
    "xor eax, eax",
    "mov rcx, rdx",
    "repe cmpsb",
    "setne al",
    "ret",
);

/// `TCSBRK` with an argument that is not 0: tcdrain(3).
const TCSBRK: usize = 0x5409;

/// `linux/reboot.h`: the two magic numbers and the commands.
const REBOOT_MAGIC: [usize; 2] = [0xfee1_dead, 672_274_793];
const REBOOT_RESTART: usize = 0x0123_4567;
const REBOOT_POWER_OFF: usize = 0x4321_fedc;

/// `struct utsname`: six fields of 65 bytes; the third is the release.
const UTS_FIELD: usize = 65;
const UTS_RELEASE: usize = 2;

/// What `hv.test=` on the kernel command line asks for.
enum Mode {
    Echo,
    Reset,
    Panic,
}

extern "C" fn main() -> ! {
    if call(nr::GETPID, [0; 5]) != Ok(1) {
        Console(2).line(&[b"this init is the PID 1 of a test guest and does nothing elsewhere"]);
        exit(1);
    }
    // The kernel mounts devtmpfs by itself only without an initramfs.
    let devtmpfs = mount(c"devtmpfs", c"/dev");
    let console = Console::open();
    report(&console, b"mount /dev", devtmpfs);
    report(&console, b"mount /proc", mount(c"proc", c"/proc"));

    let mut digits = [0; 20];
    let cpus = decimal(cpus_online(), &mut digits);
    let mut uts = [0; 6 * UTS_FIELD];
    console.line(&[b"init up, ", cpus, b" cpus online, kernel ", kernel_release(&mut uts)]);
    let mut cmdline = [0; 4096];
    let cmdline = read_file(c"/proc/cmdline", &mut cmdline);
    if let Some(checks) = option(cmdline, b"hv.check=") {
        check::run(&console, checks);
    }
    console.line(&[b"ready"]);

    match mode(&console, cmdline) {
        Mode::Echo => {
            let mut buffer = [0; 1024];
            console.line(&[b"echo: ", console.read_line(&mut buffer)]);
            console.line(&[b"power off"]);
            reboot(&console, REBOOT_POWER_OFF)
        }
        Mode::Reset => {
            console.line(&[b"reset"]);
            reboot(&console, REBOOT_RESTART)
        }
        Mode::Panic => {
            console.line(&[b"panic"]);
            console.drain();
            exit(0)
        }
    }
}

/// A file descriptor of the console.
struct Console(usize);

impl Console {
    /// `/dev/console`, or what the kernel opened for PID 1 when that fails.
    fn open() -> Self {
        Self(open(c"/dev/console", O_RDWR | O_NOCTTY).unwrap_or(1))
    }

    /// Prints `hv-guest: `, the parts and a line end.
    fn line(&self, parts: &[&[u8]]) {
        self.write(b"hv-guest: ");
        for part in parts {
            self.write(part);
        }
        self.write(b"\n");
    }

    fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match call(nr::WRITE, [self.0, bytes.as_ptr() as usize, bytes.len(), 0, 0]) {
                Err(EINTR) => {}
                // Nobody is left to tell: the rest of the run may still be of use.
                Err(_) | Ok(0) => return,
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            }
        }
    }

    /// Waits until all is sent: the UART's driver would lose what is queued when the machine ends.
    fn drain(&self) {
        while call(nr::IOCTL, [self.0, TCSBRK, 1, 0, 0]) == Err(EINTR) {}
    }

    /// The next line without its line end; what fits the buffer of a longer one; what arrived
    /// before the end of the input.
    fn read_line<'a>(&self, buffer: &'a mut [u8]) -> &'a [u8] {
        let mut len = 0;
        while let Some(rest) = buffer.get_mut(len..) {
            if rest.is_empty() {
                break;
            }
            match read(self.0, rest) {
                Err(EINTR) => {}
                Err(_) | Ok(0) => break,
                Ok(n) => len += n,
            }
            if buffer.get(len.wrapping_sub(1)) == Some(&b'\n') {
                len -= 1;
                break;
            }
        }
        buffer.get(..len).unwrap_or_default()
    }
}

/// Says that `what` failed and with which errno; there is no reason to stop for it.
fn report(console: &Console, what: &[u8], result: Result<usize, usize>) {
    if let Err(errno) = result {
        let mut digits = [0; 20];
        console.line(&[what, b" failed: errno ", decimal(errno, &mut digits)]);
    }
}

/// The value of an option on the kernel's command line.
fn option<'a>(cmdline: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    cmdline.split(|byte| byte.is_ascii_whitespace()).find_map(|word| word.strip_prefix(prefix))
}

fn mode(console: &Console, cmdline: &[u8]) -> Mode {
    match option(cmdline, b"hv.test=") {
        None => Mode::Echo,
        Some(b"reset") => Mode::Reset,
        Some(b"panic") => Mode::Panic,
        Some(other) => {
            console.line(&[b"hv.test=", other, b" is unknown: reset, panic or nothing"]);
            Mode::Echo
        }
    }
}

/// How many CPUs this thread may run on: at boot, all that are online.
fn cpus_online() -> usize {
    let mut mask = [0_u8; 128];
    let written =
        call(nr::SCHED_GETAFFINITY, [0, mask.len(), mask.as_mut_ptr() as usize, 0, 0]).unwrap_or(0);
    mask.iter().take(written).map(|byte| byte.count_ones() as usize).sum()
}

fn kernel_release(uts: &mut [u8; 6 * UTS_FIELD]) -> &[u8] {
    if call(nr::UNAME, [uts.as_mut_ptr() as usize, 0, 0, 0, 0]).is_err() {
        return b"unknown";
    }
    let release = uts.get(UTS_RELEASE * UTS_FIELD..).unwrap_or_default();
    release.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn decimal(mut value: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        start -= 1;
        if value == 0 {
            break;
        }
    }
    digits.get(start..).unwrap_or_default()
}

fn reboot(console: &Console, command: usize) -> ! {
    console.drain();
    let [magic, magic2] = REBOOT_MAGIC;
    report(console, b"reboot", call(nr::REBOOT, [magic, magic2, command, 0, 0]));
    exit(1)
}

fn exit(code: usize) -> ! {
    loop {
        let _ = call(nr::EXIT, [code, 0, 0, 0, 0]);
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    Console(2).line(&[b"init panicked"]);
    exit(1)
}
