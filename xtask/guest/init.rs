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
//! `hv.test=reset` on the kernel command line restarts the machine after "ready" instead, and
//! `hv.test=panic` makes PID 1 exit, which panics the kernel.
//!
//! `cargo xtask guest` compiles this file by itself, as a static executable without libc. It must
//! stay small (the guest's kernel may run in an interpreter, where a system call is slow) and it
//! must do nothing when it is not PID 1: it ends with reboot(2).

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

use core::arch::{asm, global_asm};
use core::ffi::CStr;
use core::panic::PanicInfo;

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

// What the compiler calls to fill and copy: there is no libc to have them.
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
);

/// Numbers from the kernel's `syscall_64.tbl`.
mod nr {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const IOCTL: usize = 16;
    pub const GETPID: usize = 39;
    pub const EXIT: usize = 60;
    pub const UNAME: usize = 63;
    pub const MOUNT: usize = 165;
    pub const REBOOT: usize = 169;
    pub const SCHED_GETAFFINITY: usize = 204;
}

const EINTR: usize = 4;
const EBUSY: usize = 16;
const O_RDONLY: usize = 0;
const O_RDWR: usize = 2;
const O_NOCTTY: usize = 0o400;

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
    console.line(&[b"ready"]);

    match mode(&console) {
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

fn mode(console: &Console) -> Mode {
    let mut cmdline = [0; 4096];
    let cmdline = read_file(c"/proc/cmdline", &mut cmdline);
    let prefix = b"hv.test=";
    let value = cmdline
        .split(|byte| byte.is_ascii_whitespace())
        .find_map(|word| word.strip_prefix(prefix.as_slice()));
    match value {
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

fn open(path: &CStr, flags: usize) -> Result<usize, usize> {
    call(nr::OPEN, [path.as_ptr() as usize, flags, 0, 0, 0])
}

fn read(fd: usize, buffer: &mut [u8]) -> Result<usize, usize> {
    call(nr::READ, [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0])
}

/// One read: enough for the files of proc, which answer whole.
fn read_file<'a>(path: &CStr, buffer: &'a mut [u8]) -> &'a [u8] {
    let Ok(fd) = open(path, O_RDONLY) else { return &[] };
    let len = read(fd, buffer).unwrap_or(0);
    let _ = call(nr::CLOSE, [fd, 0, 0, 0, 0]);
    buffer.get(..len).unwrap_or_default()
}

fn mount(kind: &CStr, target: &CStr) -> Result<usize, usize> {
    let kind = kind.as_ptr() as usize;
    match call(nr::MOUNT, [kind, target.as_ptr() as usize, kind, 0, 0]) {
        Err(EBUSY) => Ok(0),
        result => result,
    }
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

/// One system call: its result, or its errno.
fn call(number: usize, [a, b, c, d, e]: [usize; 5]) -> Result<usize, usize> {
    let result: isize;
    // SAFETY: the callers pass what the call with this number takes: descriptors, flags, and
    // pointers with lengths that come from references alive until it returns. The kernel writes
    // to memory only through those made from a `&mut`, and changes rax, rcx and r11 alone.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    // -4095..=-1 are errors.
    if (-4095..0).contains(&result) { Err(result.unsigned_abs()) } else { Ok(result as usize) }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    Console(2).line(&[b"init panicked"]);
    exit(1)
}
