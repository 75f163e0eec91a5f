//! System calls without libc, for the init of the test guest.

use core::arch::asm;
use core::ffi::CStr;

/// Numbers from the kernel's `syscall_64.tbl`.
pub mod nr {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const OPEN: usize = 2;
    pub const CLOSE: usize = 3;
    pub const LSEEK: usize = 8;
    pub const IOCTL: usize = 16;
    pub const NANOSLEEP: usize = 35;
    pub const GETPID: usize = 39;
    pub const SOCKET: usize = 41;
    pub const CONNECT: usize = 42;
    pub const ACCEPT: usize = 43;
    pub const BIND: usize = 49;
    pub const LISTEN: usize = 50;
    pub const EXIT: usize = 60;
    pub const UNAME: usize = 63;
    pub const FSYNC: usize = 74;
    pub const SYNC: usize = 162;
    pub const MOUNT: usize = 165;
    pub const REBOOT: usize = 169;
    pub const SCHED_GETAFFINITY: usize = 204;
}

pub const EINTR: usize = 4;
const EBUSY: usize = 16;
pub const O_RDONLY: usize = 0;
pub const O_WRONLY: usize = 1;
pub const O_RDWR: usize = 2;
pub const O_CREAT: usize = 0o100;
pub const O_NOCTTY: usize = 0o400;
pub const O_TRUNC: usize = 0o1000;
pub const O_DIRECT: usize = 0o40000;

/// A file that is made may be read by all and written by its owner.
pub fn open(path: &CStr, flags: usize) -> Result<usize, usize> {
    call(nr::OPEN, [path.as_ptr() as usize, flags, 0o644, 0, 0])
}

pub fn read(fd: usize, buffer: &mut [u8]) -> Result<usize, usize> {
    call(nr::READ, [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0])
}

/// One read: enough for the files of proc, which answer whole.
pub fn read_file<'a>(path: &CStr, buffer: &'a mut [u8]) -> &'a [u8] {
    let Ok(fd) = open(path, O_RDONLY) else { return &[] };
    let len = read(fd, buffer).unwrap_or(0);
    let _ = call(nr::CLOSE, [fd, 0, 0, 0, 0]);
    buffer.get(..len).unwrap_or_default()
}

pub fn close(fd: usize) {
    let _ = call(nr::CLOSE, [fd, 0, 0, 0, 0]);
}

/// Writes all of it.
pub fn write_all(fd: usize, mut bytes: &[u8]) -> Result<(), usize> {
    while !bytes.is_empty() {
        match call(nr::WRITE, [fd, bytes.as_ptr() as usize, bytes.len(), 0, 0]) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

pub fn sleep_milliseconds(n: i64) {
    let time: [i64; 2] = [n / 1000, n % 1000 * 1_000_000];
    let _ = call(nr::NANOSLEEP, [time.as_ptr() as usize, 0, 0, 0, 0]);
}

pub fn mount(kind: &CStr, target: &CStr) -> Result<usize, usize> {
    let kind = kind.as_ptr() as usize;
    match call(nr::MOUNT, [kind, target.as_ptr() as usize, kind, 0, 0]) {
        Err(EBUSY) => Ok(0),
        result => result,
    }
}

/// One system call: its result, or its errno.
pub fn call(number: usize, [a, b, c, d, e]: [usize; 5]) -> Result<usize, usize> {
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
