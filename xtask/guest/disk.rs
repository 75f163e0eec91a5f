//! The check of a disk that the root file system is on: a file is written past the page cache and read back,
//! and the file system is left clean.
//!
//! ```text
//! hv-guest: disk: 8 MiB written
//! …
//! hv-guest: disk: all written, checksum 1234
//! hv-guest: disk: all read, checksum 1234
//! hv-guest: check disk: ok: 64 MiB written to / and read back
//! ```

use super::check::Found;
use super::sys::{self, EINTR, O_CREAT, O_DIRECT, O_RDWR, O_TRUNC, nr};
use super::{Console, decimal};

/// Memory that O_DIRECT takes.
#[repr(align(4096))]
struct Chunk([u8; CHUNK]);

const CHUNK: usize = 1 << 20;
const CHUNKS: usize = 64;
/// After how many chunks it says how far it is.
const STEP: usize = 8;

const MS_RDONLY: usize = 1;
const MS_REMOUNT: usize = 32;

pub fn disk() -> Found {
    let console = Console::open();
    let mut chunk = Chunk([0; CHUNK]);
    let flags = O_RDWR | O_CREAT | O_TRUNC | O_DIRECT;
    let file = sys::open(c"/data", flags).map_err(did(b"creating /data"))?;
    let mut digits = [0; 20];
    let (mut written, mut random) = (0, 1);
    for index in 1..=CHUNKS {
        fill(&mut chunk.0, &mut random);
        written = checksum(&chunk.0, written);
        whole(nr::WRITE, file, &mut chunk).map_err(did(b"writing"))?;
        if index % STEP == 0 {
            console.line(&[b"disk: ", decimal(index, &mut digits), b" MiB written"]);
        }
    }
    sys::call(nr::FSYNC, [file, 0, 0, 0, 0]).map_err(did(b"fsync"))?;
    console.line(&[b"disk: all written, checksum ", decimal(written, &mut digits)]);

    sys::call(nr::LSEEK, [file, 0, 0, 0, 0]).map_err(did(b"lseek"))?;
    let mut read = 0;
    for _ in 0..CHUNKS {
        whole(nr::READ, file, &mut chunk).map_err(did(b"reading"))?;
        read = checksum(&chunk.0, read);
    }
    console.line(&[b"disk: all read, checksum ", decimal(read, &mut digits)]);
    if read != written {
        return Err((b"comparing what was read", 0));
    }

    sys::call(nr::CLOSE, [file, 0, 0, 0, 0]).map_err(did(b"close"))?;
    sys::call(nr::SYNC, [0; 5]).map_err(did(b"sync"))?;
    // Nothing unmounts the root when the machine powers off.
    let root = c"/".as_ptr() as usize;
    let read_only = sys::call(nr::MOUNT, [0, root, 0, MS_REMOUNT | MS_RDONLY, 0]);
    read_only.map_err(did(b"mounting / read-only"))?;
    Ok(b"64 MiB written to / and read back")
}

fn did(what: &'static [u8]) -> impl FnOnce(usize) -> (&'static [u8], usize) {
    move |errno| (what, errno)
}

/// Reads or writes a whole chunk; less is an error without an errno.
fn whole(number: usize, file: usize, chunk: &mut Chunk) -> Result<(), usize> {
    loop {
        match sys::call(number, [file, chunk.0.as_mut_ptr() as usize, CHUNK, 0, 0]) {
            Ok(CHUNK) => return Ok(()),
            Ok(_) => return Err(0),
            Err(EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Numbers that no two chunks have in common (Marsaglia's xorshift64).
fn fill(chunk: &mut [u8; CHUNK], random: &mut u64) {
    for word in chunk.chunks_exact_mut(8) {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        word.copy_from_slice(&random.to_le_bytes());
    }
}

/// Goes on with the checksum of a file, which a test makes as well.
fn checksum(chunk: &[u8; CHUNK], mut sum: usize) -> usize {
    for word in chunk.chunks_exact(8) {
        let word = word.try_into().map_or(0, usize::from_le_bytes);
        sum = (sum ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(23);
    }
    sum
}
