//! A disk of `--disk`.

use std::path::PathBuf;
use std::str::FromStr;

/// A file or block device the guest gets as a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Where its contents are.
    pub path: PathBuf,
    /// The guest can't write to it.
    pub read_only: bool,
    /// It may be a block device.
    pub device: bool,
    /// It is raw whatever it looks like.
    pub raw: bool,
    /// What the guest is told to be its serial number.
    pub serial: String,
    /// When what the guest has written is safe.
    pub cache: CacheMode,
    /// How many queues it has.
    pub queues: u16,
    /// How it is read and written.
    pub io: DiskIo,
}

/// When what a guest has written is on the disk for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// When the guest has flushed it. The guest can ask for write-through.
    #[default]
    Writeback,
    /// When the write is complete.
    Writethrough,
}

/// How a disk is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskIo {
    /// By io_uring, or if the kernel does not let us, as with `Sync`.
    #[default]
    Auto,
    /// By io_uring: many requests at a time.
    Uring,
    /// By preadv(2) and pwritev(2): one request at a time.
    Sync,
}

/// A text that is no disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDiskError {
    /// No file is named.
    #[error(
        "name the disk's file first: FILE[,readonly][,serial=TEXT]…; a comma in it is written ,,"
    )]
    NoPath,
    /// No such property.
    #[error(
        "a disk has no property {0:?}; there are readonly, device, format=raw, serial=TEXT, \
         cache=writeback|writethrough, queues=N and io=auto|uring|sync; a comma in the path is written ,,"
    )]
    Unknown(String),
    /// A format we can't read.
    #[error("format {0:?}: only raw disks can be used; qemu-img convert -O raw makes one")]
    Format(String),
    /// A serial number a guest can't be told.
    #[error("serial {0:?}: at most {MOST_SERIAL} printable ASCII characters")]
    Serial(String),
    /// No such cache mode.
    #[error("cache {0:?}: writeback or writethrough")]
    Cache(String),
    /// Not so many queues.
    #[error("queues {0:?}: a number from 1 to {MOST_QUEUES}")]
    Queues(String),
    /// No such way.
    #[error("io {0:?}: auto, uring or sync")]
    Io(String),
}

/// Bytes of a serial number (virtio 1.2, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
const MOST_SERIAL: usize = 20;
/// More than processors of a guest that could use them at once.
const MOST_QUEUES: u16 = 64;

impl DiskConfig {
    /// A disk of this file, with the defaults.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            device: false,
            raw: false,
            serial: String::new(),
            cache: CacheMode::default(),
            queues: 1,
            io: DiskIo::default(),
        }
    }

    fn set(&mut self, property: &str) -> Result<(), ParseDiskError> {
        let (name, value) = match property.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (property, None),
        };
        let owned = str::to_owned;
        match (name, value) {
            ("readonly", None) => self.read_only = true,
            ("device", None) => self.device = true,
            ("format", Some("raw")) => self.raw = true,
            ("format", Some(other)) => return Err(ParseDiskError::Format(owned(other))),
            ("serial", Some(serial)) => {
                let printable = serial.bytes().all(|byte| matches!(byte, b' '..=b'~'));
                if serial.len() > MOST_SERIAL || !printable {
                    return Err(ParseDiskError::Serial(owned(serial)));
                }
                self.serial = owned(serial);
            }
            ("cache", Some(cache)) => {
                self.cache = match cache {
                    "writeback" => CacheMode::Writeback,
                    "writethrough" => CacheMode::Writethrough,
                    _ => return Err(ParseDiskError::Cache(owned(cache))),
                };
            }
            ("queues", Some(queues)) => {
                let number = queues.parse().ok().filter(|n| (1..=MOST_QUEUES).contains(n));
                self.queues = number.ok_or_else(|| ParseDiskError::Queues(owned(queues)))?;
            }
            ("io", Some(io)) => {
                self.io = match io {
                    "auto" => DiskIo::Auto,
                    "uring" => DiskIo::Uring,
                    "sync" => DiskIo::Sync,
                    _ => return Err(ParseDiskError::Io(owned(io))),
                };
            }
            _ => return Err(ParseDiskError::Unknown(owned(property))),
        }
        Ok(())
    }
}

impl FromStr for DiskConfig {
    type Err = ParseDiskError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = super::words(text).into_iter();
        let path = words.next().filter(|path| !path.is_empty()).ok_or(ParseDiskError::NoPath)?;
        let mut disk = Self::new(path);
        words.try_for_each(|property| disk.set(&property))?;
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_its_properties() {
        let disk = |text: &str| text.parse::<DiskConfig>().unwrap();
        assert_eq!(disk("root.img"), DiskConfig::new("root.img"));
        let all = "/d,readonly,device,format=raw,serial=A 1,cache=writethrough,queues=4,io=sync";
        let expected = DiskConfig {
            read_only: true,
            device: true,
            raw: true,
            serial: "A 1".to_owned(),
            cache: CacheMode::Writethrough,
            queues: 4,
            io: DiskIo::Sync,
            ..DiskConfig::new("/d")
        };
        assert_eq!(disk(all), expected);
        assert_eq!(disk("a,,b,,,readonly").path, PathBuf::from("a,b,"));
        assert!(disk("a,,b,,,readonly").read_only);
    }

    #[test]
    fn what_can_not_be_meant_is_refused() {
        for bad in [
            "",
            ",readonly",
            "d,",
            "d,read-only",
            "d,readonly=1",
            "d,serial",
            "d,serial=123456789012345678901",
            "d,serial=ü",
            "d,cache=none",
            "d,queues=0",
            "d,queues=65",
            "d,queues=",
            "d,io=aio",
            "d,format=qcow2",
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad:?}");
        }
    }
}
