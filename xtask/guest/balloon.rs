//! The memory balloon: the guest fills it as asked for, and takes all of it back when its driver goes.

use super::check::Found;
use super::sys::{self, EINTR, O_RDONLY, O_WRONLY};

/// Pages that must come into the balloon: 32 MiB.
const PAGES: usize = 8192;

/// How often is looked, with a pause of 100 ms: long for a slow host.
const LOOKS: usize = 3000;

/// The events of the kernel with this name so far (`/proc/vmstat`); the name ends with a space.
fn events(name: &[u8]) -> Option<usize> {
    let mut text = [0; 16 << 10];
    let fd = sys::open(c"/proc/vmstat", O_RDONLY).ok()?;
    let mut len = 0;
    // One read gives a page at most.
    while let Some(rest) = text.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match sys::read(fd, rest) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(EINTR) => {}
            Err(_) => break,
        }
    }
    sys::close(fd);
    let lines = text.get(..len)?.split(|byte| *byte == b'\n');
    let digits = lines.into_iter().find_map(|line| line.strip_prefix(name))?;
    Some(digits.iter().fold(0, |n, digit| n * 10 + usize::from(digit.wrapping_sub(b'0'))))
}

fn wait_for(name: &'static [u8]) -> Result<(), (&'static [u8], usize)> {
    for _ in 0..LOOKS {
        match events(name) {
            Some(pages) if pages >= PAGES => return Ok(()),
            Some(_) => sys::sleep_milliseconds(100),
            None => return Err((b"/proc/vmstat does not have it", 0)),
        }
    }
    Err((name, 0))
}

/// Takes the driver from its device, whichever it is.
fn unbind() -> Result<(), usize> {
    let fd = sys::open(c"/sys/bus/virtio/drivers/virtio_balloon/unbind", O_WRONLY)?;
    let mut result = Err(0);
    for number in b'0'..=b'9' {
        let mut name = *b"virtio0";
        name[6] = number;
        result = sys::write_all(fd, &name);
        if result.is_ok() {
            break;
        }
    }
    sys::close(fd);
    result
}

/// The balloon is filled; then its driver goes, which empties it.
pub fn check() -> Found {
    wait_for(b"balloon_inflate ")?;
    sys::mount(c"sysfs", c"/sys").map_err(|errno| (&b"mount /sys"[..], errno))?;
    unbind().map_err(|errno| (&b"unbind"[..], errno))?;
    wait_for(b"balloon_deflate ")?;
    Ok(b"32 MiB went into the balloon and came back")
}
