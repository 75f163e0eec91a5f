//! The RAM of a machine, as the command line asks for it: laid out, mapped, and populated if that is
//! wanted. Nothing of KVM is needed here.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;

use hv_memory::{
    Backing, BackingFile, FileError, GuestRam, GuestRange, HugePageSize, HugePages, KeptSize,
    LayoutError, MapError, PrefaultError, Progress, RamError, RamLayout, Sharing,
};
use vm_memory::GuestAddress;

use super::bus::Device;
use super::host::HostFacts;
use super::stop::Stopper;
use crate::config::{DeviceOption, HugePagesOption, MemorySize, RunConfig};
use crate::exit_code::StopReason;
use crate::layout;
use crate::observe::is_same;
use crate::output::printable;

/// Why a machine has no RAM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// This memory can't be laid out.
    #[error("--memory {size}: {error}")]
    Layout {
        /// What was asked for.
        size: MemorySize,
        /// Why not.
        error: LayoutError,
    },
    /// More memory than the host has.
    #[error("--memory {asked} is more than the host has ({host}): ask for less")]
    MoreThanHost {
        /// What was asked for.
        asked: MemorySize,
        /// What there is.
        host: MemorySize,
    },
    /// The file can't hold it.
    #[error("--memory-file {0}")]
    File(#[from] FileError),
    /// The file is an image to be read.
    #[error(
        "--memory-file '{file}' is what {image} names, and the guest would overwrite it; give it \
             another file"
    )]
    Image {
        /// Its name.
        file: String,
        /// `--kernel` or `--initrd`.
        image: &'static str,
    },
    /// The huge pages can't be had.
    #[error("{option}: {error}")]
    HugePages {
        /// `--hugepages`, or `--memory-file` on a hugetlbfs.
        option: &'static str,
        /// Why not.
        error: MapError,
    },
    /// The host does not give the memory.
    #[error("--memory {size}: {error}")]
    Ram {
        /// What was asked for.
        size: MemorySize,
        /// Why not.
        error: RamError,
    },
    /// The host does not give all of its pages.
    #[error("--prefault: {0}")]
    Prefault(#[from] PrefaultError),
}

impl MemoryError {
    /// Whether what was asked for can't be, whatever the state of the host.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Layout { .. }
            | Self::MoreThanHost { .. }
            | Self::File(_)
            | Self::Image { .. } => true,
            Self::HugePages { error, .. } => {
                matches!(error, MapError::Unaligned { .. } | MapError::HugePagesOfFile { .. })
            }
            Self::Ram { .. } | Self::Prefault(_) => false,
        }
    }
}

/// The RAM of the machine, mapped.
pub(super) fn ram(config: &RunConfig, host: &HostFacts) -> Result<GuestRam, MemoryError> {
    let size = config.memory;
    if size > host.memory {
        return Err(MemoryError::MoreThanHost { asked: size, host: host.memory });
    }
    let hole = GuestRange::new(
        GuestAddress(layout::MMIO_HOLE_START),
        layout::MMIO_HOLE_END - layout::MMIO_HOLE_START,
    );
    let holes: Vec<_> = hole.into_iter().collect();
    let layout = RamLayout::new(size.0, &holes, host.physical_address_bits)
        .map_err(|error| MemoryError::Layout { size, error })?;
    let ram = GuestRam::backed(&layout, &backing(config)?).map_err(|error| match error {
        RamError::Map { error: MapError::File(error), .. } => MemoryError::File(error),
        RamError::Map { error, .. } if is_about_huge_pages(&error) => {
            let has_file = config.backing.file.is_some();
            let option = if has_file { "--memory-file" } else { "--hugepages" };
            MemoryError::HugePages { option, error }
        }
        error => MemoryError::Ram { size, error },
    })?;
    if config.backing.prefault {
        let stderr = io::stderr();
        let mut line = stderr.is_terminal().then(|| ProgressLine::new(stderr.lock()));
        ram.prefault(|progress| {
            if let Some(line) = &mut line {
                line.show(progress);
            }
            ControlFlow::Continue(())
        })?;
    }
    Ok(ram)
}

fn is_about_huge_pages(error: &MapError) -> bool {
    matches!(
        error,
        MapError::NoHugePages { .. }
            | MapError::HugePageSize { .. }
            | MapError::HugePagesOfFile { .. }
            | MapError::TransparentOff { .. }
            // A layout is of whole pages of the host.
            | MapError::Unaligned { .. }
    )
}

/// What the RAM is made of.
fn backing(config: &RunConfig) -> Result<Backing, MemoryError> {
    let backing = match &config.backing.file {
        Some(path) => Backing::file(file(config, path)?),
        // Only shared memory has pages that can be taken away and given back.
        None if config.devices.contains(&DeviceOption::Testdev) => Backing::memfd(),
        None => Backing::anonymous(),
    };
    Ok(backing.huge_pages(match config.backing.huge_pages {
        None => HugePages::HostDefault,
        Some(HugePagesOption::Mib2) => HugePages::Pool(HugePageSize::Mib2),
        Some(HugePagesOption::Gib1) => HugePages::Pool(HugePageSize::Gib1),
        Some(HugePagesOption::Transparent) => HugePages::Transparent,
    }))
}

/// The file of `--memory-file`. Who names it promises that nobody shortens it.
fn file(config: &RunConfig, path: &Path) -> Result<BackingFile, MemoryError> {
    let file = BackingFile::open(path, Sharing::Shared, KeptSize::Promised)?;
    let images = config.kernel.iter().flat_map(|kernel| kernel.files());
    for (image, other) in images {
        let (Ok(a), Ok(b)) = (fs::metadata(path), fs::metadata(other)) else { continue };
        if is_same(&a, &b) {
            return Err(MemoryError::Image { file: printable(path), image });
        }
    }
    Ok(file)
}

/// What answers where RAM is. An access only comes here if KVM can't reach the memory itself, as
/// when its file has become shorter: the guest can't go on with what is not there.
pub(super) struct LostMemory {
    pub(super) start: u64,
    pub(super) stopper: Stopper,
}

impl LostMemory {
    fn stop(&self, offset: u64) {
        self.stopper.stop(StopReason::LostMemory { address: self.start + offset });
    }
}

impl Device for LostMemory {
    fn read(&mut self, offset: u64, _data: &mut [u8]) {
        self.stop(offset);
    }

    fn write(&mut self, offset: u64, _data: &[u8]) {
        self.stop(offset);
    }
}

/// One line on a terminal that tells how far populating memory is, and goes when it is done.
struct ProgressLine<W: Write> {
    terminal: W,
    percent: Option<u64>,
}

impl<W: Write> ProgressLine<W> {
    fn new(terminal: W) -> Self {
        Self { terminal, percent: None }
    }

    fn show(&mut self, progress: Progress) {
        // 64 bits hold a hundred times what 52 address bits reach.
        let percent =
            (progress.done.saturating_mul(100)).checked_div(progress.total).unwrap_or(100);
        if self.percent != Some(percent) {
            self.percent = Some(percent);
            let total = MemorySize(progress.total);
            // A terminal that can't be written to shows nothing, and nothing else depends on it.
            let _ = write!(self.terminal, "\rhv: populating memory: {percent}% of {total}");
            let _ = self.terminal.flush();
        }
    }
}

impl<W: Write> Drop for ProgressLine<W> {
    fn drop(&mut self) {
        if self.percent.is_some() {
            // Back to the start of the line, and erase it (ECMA-48 EL).
            let _ = write!(self.terminal, "\r\x1b[K");
            let _ = self.terminal.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_kvm_can_not_reach_stops_the_machine() {
        let stopper = Stopper::new(crate::event::Event::new().unwrap());
        let mut lost = LostMemory { start: 0x1000, stopper: stopper.clone() };
        lost.read(0x23, &mut [0]);
        let reason = stopper.reason().unwrap();
        assert_eq!(*reason, StopReason::LostMemory { address: 0x1023 });
        assert!(reason.to_string().contains("memory at 0x1023"), "{reason}");
        assert_eq!(reason.exit_code(), 4);
    }

    #[test]
    fn progress_is_one_line_that_goes() {
        let mut out = Vec::new();
        let mut line = ProgressLine::new(&mut out);
        let total = 1 << 30;
        for done in [1 << 28, (1 << 28) + 1, total] {
            line.show(Progress { done, total });
        }
        drop(line);
        let text = String::from_utf8(out).unwrap();
        let shown = "\rhv: populating memory: 25% of 1 GiB\rhv: populating memory: 100% of 1 GiB";
        assert_eq!(text, format!("{shown}\r\x1b[K"));
        let mut out = Vec::new();
        drop(ProgressLine::new(&mut out));
        assert!(out.is_empty());
    }
}
