//! The memory balloon: the guest fills it as asked for, and takes all of it back when its driver goes.

use core::ffi::CStr;

use super::check::Found;
use super::sys::{self, O_WRONLY};

/// What comes back of the 32 MiB in the balloon, in KiB: not all of it is free at once.
const COMES_BACK: usize = 30 << 10;

/// How often the driver is taken away, after a pause that doubles: the balloon may not be full yet.
const TRIES: u32 = 10;

/// Free memory in KiB.
fn free() -> Option<usize> {
    let mut text = [0; 4096];
    let text = sys::read_file(c"/proc/meminfo", &mut text);
    let mut lines = text.split(|byte| *byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(b"MemFree:"))?;
    let digits = value.iter().filter(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |n, digit| n * 10 + usize::from(digit - b'0')))
}

/// Writes to a file of sysfs.
fn write(path: &CStr, text: &[u8]) -> Result<(), usize> {
    let fd = sys::open(path, O_WRONLY)?;
    let result = sys::write_all(fd, text);
    sys::close(fd);
    result
}

/// Takes the driver from its device, whose name is returned.
fn unbind() -> Result<[u8; 7], usize> {
    let mut result = Err(0);
    for number in b'0'..=b'9' {
        let name = [b'v', b'i', b'r', b't', b'i', b'o', number];
        match write(c"/sys/bus/virtio/drivers/virtio_balloon/unbind", &name) {
            Ok(()) => return Ok(name),
            Err(errno) => result = Err(errno),
        }
    }
    result
}

/// The balloon is filled; when its driver goes, which empties it, there is that much more memory.
pub fn check() -> Found {
    let failed = |what: &'static [u8]| move |errno| (what, errno);
    sys::mount(c"sysfs", c"/sys").map_err(failed(b"mount /sys"))?;
    for n in 0..TRIES {
        let before = free().ok_or((&b"no MemFree in /proc/meminfo"[..], 0))?;
        let name = unbind().map_err(failed(b"unbind"))?;
        if free().is_some_and(|after| after >= before + COMES_BACK) {
            return Ok(b"32 MiB came out of the balloon");
        }
        let bound = write(c"/sys/bus/virtio/drivers/virtio_balloon/bind", &name);
        bound.map_err(failed(b"bind"))?;
        sys::sleep_milliseconds(100 << n);
    }
    Err((b"there was less than 32 MiB in the balloon", 0))
}
