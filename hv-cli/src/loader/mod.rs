//! From a kernel file to a guest that can run: load the image by its boot protocol, the initrd
//! and the command line beside it, and say how the boot CPU starts.
//!
//! Everything here is a pure function of files and guest memory; no VM is needed. Images are
//! hostile: whatever they contain, loading ends in a [`BootState`] or a [`LoadError`], reads no
//! more than the file has and takes no more memory than the guest has RAM.
//!
//! ```no_run
//! # use hv_cli::loader::{Format, Image, LINUX_CMDLINE, LoadRequest, MemoryMap, load};
//! # fn example(memory: &vm_memory::GuestMemoryMmap) -> Result<(), Box<dyn std::error::Error>> {
//! let kernel = Image::open("vmlinux".as_ref())?;
//! let map = MemoryMap::new(memory, &[]);
//! let request = LoadRequest {
//!     format: Format::Auto,
//!     cmdline: None,
//!     linux_cmdline: LINUX_CMDLINE,
//!     initrd: None,
//!     map: &map,
//!     rsdp: None,
//! };
//! let boot = load(memory, &kernel, &request)?;
//! # let (mut sregs, mut regs) = Default::default();
//! boot.apply(&mut sregs, &mut regs);
//! # Ok(())
//! # }
//! ```

mod bzimage;
mod cpu;
mod decompress;
mod elf;
mod error;
mod fields;
mod format;
mod image;
mod linux;
mod memory_map;
mod multiboot;
mod pvh;
mod space;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use bzimage::BzImageError;
pub use cpu::{BootState, CpuMode, Protocol};
pub use decompress::{Compression, DecompressError};
pub use elf::ElfError;
pub use error::{LoadError, Problem};
pub use format::Format;
pub use image::{FileError, Image};
pub use memory_map::{MemoryKind, MemoryMap, MemoryMapEntry};
pub use multiboot::MultibootError;
pub use space::{Part, PlaceError};

use std::ops::Range;
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::layout;
use bzimage::BzImage;
use elf::Elf;
use format::Recognised;
use linux::BootInfo;
use multiboot::Multiboot;
use space::Space;

/// The command line of a Linux kernel that is given none: its console is COM1, and a panic ends
/// the VM instead of hanging it.
pub const LINUX_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1";

/// The same with the console on virtio.
pub const LINUX_CMDLINE_HVC0: &str = "console=hvc0 reboot=k panic=-1";

/// The longest command line passed to a kernel that sets no limit itself, without the NUL.
const CMDLINE_LIMIT: usize = 4095;

/// What to load besides the kernel, and where.
#[derive(Debug)]
pub struct LoadRequest<'a> {
    /// What the kernel is, or [`Format::Auto`].
    pub format: Format,
    /// The kernel command line. Without one, Linux gets [`linux_cmdline`](Self::linux_cmdline), any
    /// other kernel an empty one.
    pub cmdline: Option<&'a str>,
    /// [`LINUX_CMDLINE`] or [`LINUX_CMDLINE_HVC0`].
    pub linux_cmdline: &'a str,
    /// The initial RAM disk, or the multiboot module.
    pub initrd: Option<&'a Image>,
    /// The map of the guest memory that is loaded into.
    pub map: &'a MemoryMap,
    /// Where the ACPI RSDP is, if there is one.
    pub rsdp: Option<GuestAddress>,
}

/// A kernel in guest memory.
struct Entered {
    protocol: Protocol,
    entry: u64,
    kernel: Range<u64>,
}

/// Looks whether `kernel` is what it is taken for, as far as that shows without a machine.
///
/// # Errors
/// It can't be read, is broken, or is something else.
pub fn check(kernel: &Image, format: Format) -> Result<(), LoadError> {
    format::resolve(kernel, format).map(drop).map_err(|problem| problem.of(kernel.name()))
}

/// Loads `kernel` into `memory`, which is zero so far, with what the request adds.
///
/// A multiboot kernel finds its file name as the first word of its command line.
///
/// # Errors
/// The image is not what was asked for, broken, or does not fit; the error names the image and
/// what is wrong. Guest memory is then partly written.
pub fn load<M: GuestMemoryBackend>(
    memory: &M,
    kernel: &Image,
    request: &LoadRequest<'_>,
) -> Result<BootState, LoadError> {
    let mut space = Space::new(memory, request.map);
    format::resolve(kernel, request.format)
        .and_then(|recognised| match recognised {
            Recognised::BzImage(image) => load_bzimage(&mut space, kernel, &image, request),
            Recognised::Linux64(elf) => load_linux(&mut space, kernel, &elf, request),
            Recognised::Pvh(elf) => load_pvh(&mut space, kernel, &elf, request),
            Recognised::Multiboot { header, is_elf } => {
                load_multiboot(&mut space, kernel, &header, is_elf, request)
            }
            Recognised::Flat => load_flat(&mut space, kernel, request),
        })
        .map_err(|problem| match (&problem, request.initrd) {
            (Problem::Place(PlaceError::NoRoom { part: Part::Initrd, .. }), Some(initrd)) => {
                problem.of(initrd.name())
            }
            _ => problem.of(kernel.name()),
        })
}

fn load_bzimage<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    kernel: &Image,
    image: &BzImage,
    request: &LoadRequest<'_>,
) -> Result<BootState, Problem> {
    let entered = image.load(kernel, space)?;
    let cmdline = request.cmdline.unwrap_or(request.linux_cmdline);
    let info = put_extras(space, request, cmdline, image.cmdline_limit(), image.initrd_end())?;
    let params = linux::put_boot_params(space, image.header(), &info)?;
    boot_state(space, entered, params, info)
}

fn load_linux<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    kernel: &Image,
    elf: &Elf,
    request: &LoadRequest<'_>,
) -> Result<BootState, Problem> {
    if !elf.is_64 {
        return Err(ElfError::NotSixtyFour.into());
    }
    let entry = elf.entry()?;
    let entered = Entered { protocol: Protocol::Linux64, entry, kernel: elf.load(kernel, space)? };
    let cmdline = request.cmdline.unwrap_or(request.linux_cmdline);
    let info = put_extras(space, request, cmdline, linux::CMDLINE_LIMIT, u64::MAX)?;
    let params = linux::put_boot_params(space, linux::synthetic_header(), &info)?;
    boot_state(space, entered, params, info)
}

fn load_pvh<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    kernel: &Image,
    elf: &Elf,
    request: &LoadRequest<'_>,
) -> Result<BootState, Problem> {
    let entry = elf.pvh_entry()?;
    let entered = Entered { protocol: Protocol::Pvh, entry, kernel: elf.load(kernel, space)? };
    let (default, limit) = if elf.is_linux {
        (request.linux_cmdline, linux::CMDLINE_LIMIT)
    } else {
        ("", CMDLINE_LIMIT)
    };
    let info = put_extras(space, request, request.cmdline.unwrap_or(default), limit, u64::MAX)?;
    let start_info = pvh::put_start_info(space, &info)?;
    boot_state(space, entered, start_info, info)
}

fn load_multiboot<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    kernel: &Image,
    header: &Multiboot,
    is_elf: bool,
    request: &LoadRequest<'_>,
) -> Result<BootState, Problem> {
    let entered = header.load(kernel, is_elf, space)?;
    // By convention the first word is the program, as for any C program.
    let program = Path::new(kernel.name()).file_name().unwrap_or_default().to_string_lossy();
    let cmdline = format!("{program} {}", request.cmdline.unwrap_or_default());
    let info = put_extras(space, request, cmdline.trim_end(), CMDLINE_LIMIT, u64::MAX)?;
    let information = multiboot::put_info(space, &info)?;
    boot_state(space, entered, information, info)
}

/// Loads a binary without any header at [`layout::FLAT_IMAGE`].
fn load_flat<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    kernel: &Image,
    request: &LoadRequest<'_>,
) -> Result<BootState, Problem> {
    let given =
        [(request.initrd.is_some(), "an initrd"), (request.cmdline.is_some(), "a command line")];
    if let Some(&(_, what)) = given.iter().find(|(given, _)| *given) {
        return Err(Problem::FlatTakesNothing { what });
    }
    let range = space.claim(Part::Kernel, layout::FLAT_IMAGE, kernel.size())?;
    kernel.copy_to("the flat binary", (0, kernel.size()), space, Part::Kernel, range.start)?;
    Ok(BootState {
        protocol: Protocol::Flat,
        mode: CpuMode::Real,
        entry: range.start,
        info: 0,
        kernel: range,
        initrd: None,
    })
}

/// Puts the command line low and the initrd as high as it may be.
fn put_extras<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    request: &LoadRequest<'_>,
    cmdline: &str,
    cmdline_limit: usize,
    initrd_end: u64,
) -> Result<BootInfo, Problem> {
    let mut bytes = cmdline.as_bytes().to_vec();
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(Problem::CmdlineNul { at });
    }
    if bytes.len() > cmdline_limit {
        return Err(Problem::CmdlineTooLong { len: bytes.len(), limit: cmdline_limit });
    }
    bytes.push(0);
    let cmdline = space.put_low(Part::Cmdline, 16, &bytes)?;

    let initrd = match request.initrd {
        Some(image) => {
            let window = layout::HIGH_RAM_START..initrd_end.min(layout::MMIO_HOLE_START);
            let start = space.place(Part::Initrd, image.size(), 4096, window)?;
            image.copy_to("the initrd", (0, image.size()), space, Part::Initrd, start)?;
            Some(start..start + image.size())
        }
        None => None,
    };
    Ok(BootInfo { cmdline, initrd, rsdp: request.rsdp.map_or(0, |address| address.0) })
}

fn boot_state<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    entered: Entered,
    info: u64,
    extras: BootInfo,
) -> Result<BootState, Problem> {
    let Entered { protocol, entry, kernel } = entered;
    let mode = match protocol {
        Protocol::Linux64 => cpu::long_mode(space)?,
        _ => cpu::protected_mode(space)?,
    };
    Ok(BootState { protocol, mode, entry, info, kernel, initrd: extras.initrd })
}
