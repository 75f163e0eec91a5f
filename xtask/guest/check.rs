//! What the test guest finds out about devices: each check is a function, named on the kernel's command
//! line, that says what it found or why it failed.

use core::ffi::CStr;

use super::disk::disk;
use super::net::net;
use super::sys::{self, O_RDONLY, nr};
use super::{Console, balloon, decimal, vsock};

/// What a check found, or did when it failed and with which errno (0: without one).
pub type Found = Result<&'static [u8], (&'static [u8], usize)>;

/// All checks there are.
const CHECKS: &[(&[u8], fn() -> Found)] = &[
    (b"rng", rng),
    (b"disk", disk),
    (b"net", net),
    (b"vsock", vsock::check),
    (b"balloon", balloon::check),
];

/// Makes the checks with these names, separated by commas, and shows the interrupts of virtio.
pub fn run(console: &Console, names: &[u8]) {
    for name in names.split(|byte| *byte == b',') {
        match CHECKS.iter().find(|(known, _)| *known == name) {
            Some((_, check)) => match check() {
                Ok(found) => console.line(&[b"check ", name, b": ok: ", found]),
                Err((what, errno)) => {
                    let mut digits = [0; 20];
                    let errno = decimal(errno, &mut digits);
                    console.line(&[b"check ", name, b": failed: ", what, b", errno ", errno]);
                }
            },
            None => console.line(&[b"check ", name, b": failed: there is no such check, errno 0"]),
        }
    }
    interrupts(console);
}

/// The lines of `/proc/interrupts` about virtio.
fn interrupts(console: &Console) {
    let mut text = [0; 8192];
    let text = sys::read_file(c"/proc/interrupts", &mut text);
    let about_virtio = |line: &&[u8]| line.windows(6).any(|word| word == b"virtio");
    for line in text.split(|byte| *byte == b'\n').filter(about_virtio) {
        console.line(&[b"interrupts: ", line]);
    }
}

/// Reads all of a buffer.
fn read_exact(path: &CStr, buffer: &mut [u8]) -> Result<(), usize> {
    let fd = sys::open(path, O_RDONLY)?;
    let mut len = 0;
    let result = loop {
        match buffer.get_mut(len..) {
            None | Some([]) => break Ok(()),
            Some(rest) => match sys::read(fd, rest) {
                Ok(0) => break Err(0),
                Ok(n) => len += n,
                Err(sys::EINTR) => {}
                Err(errno) => break Err(errno),
            },
        }
    };
    let _ = sys::call(nr::CLOSE, [fd, 0, 0, 0, 0]);
    result
}

/// Random bytes come from the entropy device, and are not always the same.
fn rng() -> Found {
    let (mut one, mut other) = ([0; 32], [0; 32]);
    for buffer in [&mut one, &mut other] {
        read_exact(c"/dev/hwrng", buffer).map_err(|errno| (&b"reading /dev/hwrng"[..], errno))?;
    }
    if one == other || one == [0; 32] {
        return Err((b"/dev/hwrng repeats itself", 0));
    }
    Ok(b"64 bytes of /dev/hwrng")
}
