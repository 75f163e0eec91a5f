//! The initramfs of the guest: `init.rs` and its modules compiled, in an uncompressed cpio archive ("newc",
//! `Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel).
//!
//! Uncompressed, because the guest's kernel may run in an interpreter.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Error;
use super::cache::io;
use crate::process;

/// What PID 1 of the guest is made of: the names of its files and what is in them. The first is the root,
/// the others are its modules.
pub(crate) const INIT: &[(&str, &str)] = &[
    ("init.rs", include_str!("../../guest/init.rs")),
    ("balloon.rs", include_str!("../../guest/balloon.rs")),
    ("check.rs", include_str!("../../guest/check.rs")),
    ("disk.rs", include_str!("../../guest/disk.rs")),
    ("net.rs", include_str!("../../guest/net.rs")),
    ("sys.rs", include_str!("../../guest/sys.rs")),
    ("vsock.rs", include_str!("../../guest/vsock.rs")),
];

/// The arguments of `rustc` that make it a small static executable without libc.
pub(crate) const RUSTC: &[&str] = &[
    "--edition=2024",
    "--crate-name=init",
    "--crate-type=bin",
    "--target=x86_64-unknown-linux-gnu",
    "-Copt-level=s",
    "-Cpanic=abort",
    "-Clto=fat",
    "-Cstrip=symbols",
    "-Crelocation-model=static",
    "-Ctarget-feature=+crt-static",
    "-Clink-args=-nostdlib -nostartfiles -static",
];

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The init alone, in the directory of the initramfs.
pub(crate) const BINARY: &str = "init";

/// The initramfs.
pub(crate) const ARCHIVE: &str = "initramfs.cpio";

/// Writes the initramfs, and the init alone, into the directory `out`; `scratch` is for what is needed
/// on the way.
pub(crate) fn make(scratch: &Path, out: &Path) -> Result<(), Error> {
    let path = out.join(BINARY);
    compile(scratch, &path)?;
    let init = io("reading", &path, fs::read(&path))?;
    let mut archive = Archive::default();
    archive.add("dev", DIRECTORY, (0, 0), &[])?;
    archive.add("proc", DIRECTORY, (0, 0), &[])?;
    archive.add("sys", DIRECTORY, (0, 0), &[])?;
    // The kernel opens it for PID 1 before anything is mounted.
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
    archive.add("init", EXECUTABLE, (0, 0), &init)?;
    let bytes = archive.finish()?;
    let path = out.join(ARCHIVE);
    Ok(io("writing", &path, fs::write(&path, bytes))?)
}

/// Compiles the init.
fn compile(scratch: &Path, binary: &Path) -> Result<(), Error> {
    for (name, text) in INIT {
        let source = scratch.join(name);
        io("writing", &source, fs::write(&source, text))?;
    }
    let mut rustc = Command::new("rustc");
    rustc.args(RUSTC).arg("-o").arg(binary).arg(scratch.join("init.rs"));
    // Flags for the host's programs do not fit one without libc.
    Ok(process::run(rustc.env_remove("RUSTFLAGS"))?)
}

/// A cpio archive being written.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(
        &mut self,
        name: &'static str,
        mode: u32,
        (major, minor): (u32, u32),
        data: &[u8],
    ) -> Result<(), Error> {
        let too_large = |_| Error::TooLarge { name };
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        let (inode, uid, gid, links, time, device, check) = (self.entries, 0, 0, 1, 0, 0, 0);
        let fields = [
            inode, mode, uid, gid, links, time, size, device, device, major, minor, name_size,
            check,
        ];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(data);
        self.align();
        Ok(())
    }

    /// Headers and data start at multiples of 4.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Result<Vec<u8>, Error> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry as a reader sees it.
    #[derive(Debug, PartialEq)]
    struct Entry {
        name: String,
        mode: u32,
        device: (u32, u32),
        data: Vec<u8>,
    }

    fn read(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1]).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            entries.push(Entry {
                name: name.to_owned(),
                mode: field(1),
                device: (field(9), field(10)),
                data: bytes[data..data + size].to_vec(),
            });
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn the_archive_reads_back() {
        let mut archive = Archive::default();
        archive.add("dev", DIRECTORY, (0, 0), &[]).unwrap();
        archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]).unwrap();
        archive.add("init", EXECUTABLE, (0, 0), b"12345").unwrap();
        let entry = |name: &str, mode, device, data: &[u8]| Entry {
            name: name.to_owned(),
            mode,
            device,
            data: data.to_vec(),
        };
        assert_eq!(
            read(&archive.finish().unwrap()),
            [
                entry("dev", 0o040_755, (0, 0), b""),
                entry("dev/console", 0o020_600, (5, 1), b""),
                entry("init", 0o100_755, (0, 0), b"12345"),
                entry("TRAILER!!!", 0, (0, 0), b""),
            ]
        );
    }

    #[test]
    fn the_init_is_a_static_executable_for_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), dir.path()).unwrap();
        let archive = fs::read(dir.path().join(ARCHIVE)).unwrap();
        let init = read(&archive).into_iter().find(|e| e.name == "init").unwrap();
        // ELF64, little endian, ET_EXEC, x86-64: System V ABI, "ELF header".
        let elf = init.data;
        assert_eq!(elf, fs::read(dir.path().join(BINARY)).unwrap());
        assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
        assert_eq!(elf[16..20], [2, 0, 62, 0]);
        let half = |at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
        let (headers, size, count) = (64, half(54), half(56));
        for header in 0..count {
            let kind = elf[headers + header * size];
            assert_ne!(kind, 3, "PT_INTERP: it wants a dynamic linker");
        }
        assert!(elf.len() < 16384, "{} bytes", elf.len());
    }
}
