//! What `hv run` was asked for, as data: the vocabulary of the command line.
//!
//! Parsing refuses what can't be meant; what the host can't do is refused later, by what needs it.

mod disk;
mod net;
mod vsock;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hv_core::DeviceChoice;

use crate::gdb::GdbAddress;
use crate::isolation::SeccompMode;
use crate::loader::Format;

pub use disk::{CacheMode, DiskConfig, DiskIo, ParseDiskError};
pub use net::{MacAddress, NetBackend, NetConfig, ParseNetError};
pub use vsock::{ParseVsockError, VsockConfig};

/// What is between commas; two in a row are one that separates nothing.
pub(crate) fn words(text: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        if c != ',' || characters.next_if_eq(&',').is_some() {
            word.push(c);
        } else {
            words.push(std::mem::take(&mut word));
        }
    }
    words.push(word);
    words
}

/// A machine to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunConfig {
    /// Which KVM to use.
    pub kvm: DeviceChoice,
    /// The kernel, or `None` for the built-in guest.
    pub kernel: Option<KernelConfig>,
    /// Processors.
    pub cpus: u32,
    /// RAM.
    pub memory: MemorySize,
    /// What it is made of.
    pub backing: MemoryBacking,
    /// The interrupt controllers.
    pub irqchip: IrqchipMode,
    /// Devices beyond those every machine has.
    pub devices: Vec<DeviceOption>,
    /// virtio devices. With any, the machine has PCI.
    pub virtio: VirtioConfig,
    /// Complete instructions that KVM can't emulate.
    pub complete: bool,
    /// The results of the built-in guest are JSON, and all there is on the standard output.
    pub json: bool,
    /// Where every call to the hypervisor is written to as it is made, with its duration.
    pub trace: Option<PathBuf>,
    /// Where the transcript of the run is written to.
    pub record: Option<PathBuf>,
    /// Where what was counted is written to at the end.
    pub stats_json: Option<PathBuf>,
    /// The GDB server.
    pub gdb: Option<GdbConfig>,
    /// How the process is isolated from its host.
    pub seccomp: SeccompMode,
    /// Where the socket of the API is.
    pub api_socket: Option<PathBuf>,
}

/// The virtio devices of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VirtioConfig {
    /// An entropy device.
    pub rng: bool,
    /// Disks, in the order the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network devices.
    pub nets: Vec<NetConfig>,
    /// Where the console is.
    pub console: ConsoleChoice,
    /// A socket device.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon, and how large it is to be at first.
    pub balloon: Option<MemorySize>,
}

/// Which device has the standard input and output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ConsoleChoice {
    /// The serial port, which every machine has
    #[default]
    Serial,
    /// A virtio console; what is sent to the serial port goes to the standard error
    Hvc0,
}

impl fmt::Display for ConsoleChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serial => "serial",
            Self::Hvc0 => "hvc0",
        })
    }
}

/// A GDB server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdbConfig {
    /// Where it listens.
    pub address: GdbAddress,
    /// The guest executes nothing before a debugger lets it.
    pub wait: bool,
}

/// A kernel to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelConfig {
    /// The image.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// The initial RAM disk, or the multiboot module.
    pub initrd: Option<PathBuf>,
    /// The kernel command line; without one the loader chooses by the kernel's kind.
    pub cmdline: Option<String>,
}

impl KernelConfig {
    /// The files of images, with the options that name them.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let initrd = self.initrd.as_deref().map(|path| ("--initrd", path));
        [("--kernel", self.path.as_path())].into_iter().chain(initrd)
    }
}

/// What RAM is made of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryBacking {
    /// The file that holds it; memory of the process without one.
    pub file: Option<PathBuf>,
    /// Its huge pages; what the host is set to without a choice.
    pub huge_pages: Option<HugePagesOption>,
    /// Give it all of its pages before the guest starts.
    pub prefault: bool,
}

/// Kinds of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum HugePagesOption {
    /// 2 MiB, of the pool of the kernel
    #[value(name = "2M")]
    Mib2,
    /// 1 GiB, of the pool of the kernel
    #[value(name = "1G")]
    Gib1,
    /// Transparent ones, when the kernel has them
    #[value(name = "thp")]
    Transparent,
}

/// Where the interrupt controllers of the machine are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum IrqchipMode {
    /// PICs, I/O APIC, local APICs and the timer in KVM
    #[default]
    Kernel,
    /// Local APICs in KVM, the I/O APIC in hv; no PICs and no PIT
    Split,
}

impl fmt::Display for IrqchipMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Split => "split",
        })
    }
}

/// A size of memory in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

/// A text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("give a number with a unit, such as 128M or 2G (K, M, G, T; without one it is MiB)")]
pub struct ParseSizeError;

impl FromStr for MemorySize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "k" | "kb" | "kib" => 10,
            "" | "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(ParseSizeError),
        };
        let number: u64 = number.parse().map_err(|_| ParseSizeError)?;
        number.checked_mul(1 << shift).map(Self).ok_or(ParseSizeError)
    }
}

impl fmt::Display for MemorySize {
    /// The largest unit that shows the size exactly.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// A device of `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceOption {
    /// A port whose write ends the machine.
    IsaDebugExit {
        /// Its first port.
        iobase: u16,
    },
    /// What multiboot test kernels expect.
    Testdev,
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDeviceOptionError {
    /// No such device.
    #[error("there is no device {0:?}; there are isa-debug-exit[,iobase=0xf4] and testdev")]
    Unknown(String),
    /// No such property.
    #[error("{device} has no property {property:?}")]
    Property {
        /// The device.
        device: &'static str,
        /// What was given.
        property: String,
    },
    /// No port number, or one too high for the device's four ports.
    #[error("iobase {0:?} is no I/O port from 0x0 to 0xfffc")]
    Port(String),
}

impl FromStr for DeviceOption {
    type Err = ParseDeviceOptionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        match name {
            "isa-debug-exit" => {
                let mut iobase = 0xf4;
                for property in parts {
                    let Some(value) = property.strip_prefix("iobase=") else {
                        let property = property.to_owned();
                        return Err(ParseDeviceOptionError::Property {
                            device: "isa-debug-exit",
                            property,
                        });
                    };
                    iobase = port(value)
                        .ok_or_else(|| ParseDeviceOptionError::Port(value.to_owned()))?;
                }
                Ok(Self::IsaDebugExit { iobase })
            }
            "testdev" => match parts.next() {
                None => Ok(Self::Testdev),
                Some(property) => Err(ParseDeviceOptionError::Property {
                    device: "testdev",
                    property: property.to_owned(),
                }),
            },
            _ => Err(ParseDeviceOptionError::Unknown(name.to_owned())),
        }
    }
}

fn port(text: &str) -> Option<u16> {
    let port = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    port.ok().filter(|port| *port <= 0xfffc)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Option<u64> {
        text.parse::<MemorySize>().ok().map(|s| s.0)
    }

    #[test]
    fn sizes_have_units_and_mebibytes_without() {
        assert_eq!(size("128M"), Some(128 << 20));
        assert_eq!(size("128"), Some(128 << 20));
        assert_eq!(size("2GiB"), Some(2 << 30));
        assert_eq!(size("4k"), Some(4096));
        assert_eq!(size("0"), Some(0), "refused later, with the reason");
        for bad in ["", "M", "1.5G", "-1", "+1", "1X", "99999999999T", "1 G", "0x10", "１M"] {
            assert_eq!(size(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_exact_unit() {
        let shown = [128 << 20, 3 << 30, 1536 << 20, 4097, 0].map(|n| MemorySize(n).to_string());
        assert_eq!(shown, ["128 MiB", "3 GiB", "1536 MiB", "4097 bytes", "0 bytes"]);
    }

    #[test]
    fn devices_and_their_properties() {
        let device = |text: &str| text.parse::<DeviceOption>();
        assert_eq!(device("isa-debug-exit"), Ok(DeviceOption::IsaDebugExit { iobase: 0xf4 }));
        let custom = DeviceOption::IsaDebugExit { iobase: 0x501 };
        assert_eq!(device("isa-debug-exit,iobase=0x501"), Ok(custom));
        assert_eq!(device("testdev"), Ok(DeviceOption::Testdev));
        for bad in [
            "",
            "virtio",
            "testdev,x=1",
            "isa-debug-exit,port=1",
            "isa-debug-exit,iobase=0xffff",
            "isa-debug-exit,iobase=0x10000",
            "isa-debug-exit,iobase=",
        ] {
            assert!(device(bad).is_err(), "{bad:?}");
        }
    }
}
