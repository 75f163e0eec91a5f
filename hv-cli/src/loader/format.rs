//! What kind of kernel an image is.

use std::fmt;

use super::bzimage::BzImage;
use super::elf::{Elf, ElfError};
use super::error::{LoadError, Problem};
use super::image::Image;
use super::multiboot::{self, Multiboot};

/// A kernel format, as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Whatever the image says it is
    #[default]
    Auto,
    /// Linux bzImage
    #[value(name = "bzimage")]
    BzImage,
    /// ELF by the entry it has: Linux 64-bit for Linux, else PVH
    Elf,
    /// ELF by its PVH entry note
    Pvh,
    /// ELF64 by Linux's 64-bit boot protocol
    Linux64,
    /// Multiboot 1
    Multiboot,
    /// Binary without a header, entered in real mode at 0x10000
    Flat,
}

impl Format {
    /// What `image` is. Never [`Format::Auto`], [`Format::Elf`] or, as it looks like nothing,
    /// [`Format::Flat`].
    ///
    /// - The magic numbers of a bzImage come first: they are at fixed places.
    /// - A multiboot header comes before what an ELF file has otherwise: its checksum is no
    ///   accident, and who adds one means it.
    /// - A Linux `vmlinux`, known by its notes, is entered by the 64-bit protocol even if it has a
    ///   PVH note: it is the way all other boot loaders take, and tells the kernel more.
    /// - Any other ELF file with a PVH note is entered there; that says how to enter it, while
    ///   `e_entry` does not.
    /// - What is left of ELF64 is taken for a Linux kernel older than the notes.
    ///
    /// # Errors
    /// It can't be read, is broken, or is none of them.
    pub fn detect(image: &Image) -> Result<Self, LoadError> {
        match resolve(image, Self::Auto) {
            Ok(Recognised::BzImage(_)) => Ok(Self::BzImage),
            Ok(Recognised::Linux64(_)) => Ok(Self::Linux64),
            Ok(Recognised::Pvh(_)) => Ok(Self::Pvh),
            Ok(Recognised::Multiboot { .. }) => Ok(Self::Multiboot),
            Ok(Recognised::Flat) => Ok(Self::Flat),
            Err(problem) => Err(problem.of(image.name())),
        }
    }

    /// The format in a sentence.
    pub(super) fn article(self) -> &'static str {
        match self {
            Self::Auto => "a kernel",
            Self::BzImage => "a bzImage",
            Self::Elf | Self::Pvh | Self::Linux64 => "an ELF file",
            Self::Multiboot => "a multiboot kernel",
            Self::Flat => "a flat binary",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::BzImage => "bzimage",
            Self::Elf => "elf",
            Self::Pvh => "pvh",
            Self::Linux64 => "linux64",
            Self::Multiboot => "multiboot",
            Self::Flat => "flat",
        })
    }
}

/// A kernel whose headers are read.
pub(super) enum Recognised {
    BzImage(Box<BzImage>),
    Linux64(Elf),
    Pvh(Elf),
    Multiboot { header: Multiboot, is_elf: bool },
    Flat,
}

/// Reads the headers of `image` as `asked`.
pub(super) fn resolve(image: &Image, asked: Format) -> Result<Recognised, Problem> {
    if asked == Format::Flat {
        return Ok(Recognised::Flat);
    }
    let head = image.head(multiboot::SEARCH)?;
    let (is_bzimage, is_elf) = (BzImage::recognise(&head), Elf::recognise(&head));
    let wrong = Problem::WrongFormat { asked };
    match asked {
        Format::BzImage | Format::Auto if is_bzimage => {
            Ok(Recognised::BzImage(Box::new(BzImage::parse(image)?)))
        }
        Format::Multiboot => {
            let header = Multiboot::find(&head).ok_or(wrong)?;
            Ok(Recognised::Multiboot { header, is_elf })
        }
        Format::Linux64 if is_elf => Ok(Recognised::Linux64(Elf::parse(image)?)),
        Format::Pvh if is_elf => Ok(Recognised::Pvh(Elf::parse(image)?)),
        Format::Elf if is_elf => by_notes(Elf::parse(image)?),
        Format::Auto => match Multiboot::find(&head) {
            Some(header) => Ok(Recognised::Multiboot { header, is_elf }),
            None if is_elf => by_notes(Elf::parse(image)?),
            None => Err(Problem::Unrecognised { hint: hint(&head) }),
        },
        _ => Err(wrong),
    }
}

/// Which entry of an ELF file to take: see [`Format::detect`].
fn by_notes(elf: Elf) -> Result<Recognised, Problem> {
    match (elf.is_64, elf.is_linux, elf.pvh_entry) {
        (true, true, _) | (true, _, None) => Ok(Recognised::Linux64(elf)),
        (_, _, Some(_)) => Ok(Recognised::Pvh(elf)),
        (false, _, None) => Err(ElfError::NoEntry.into()),
    }
}

/// What an image that is no kernel looks like.
fn hint(head: &[u8]) -> &'static str {
    let looks: [(&[u8], &str); 6] = [
        (b"\x1f\x8b", " (it is gzip data: unpack it first)"),
        (b"\xfd7zXZ\0", " (it is xz data: unpack it first)"),
        (b"\x28\xb5\x2f\xfd", " (it is zstd data: unpack it first)"),
        (b"070701", " (it is a cpio archive: an initramfs goes to --initrd)"),
        (b"MZ", " (it is an EFI program without Linux's setup header)"),
        (b"#!", " (it is a script)"),
    ];
    looks.iter().find(|(magic, _)| head.starts_with(magic)).map_or("", |(_, hint)| hint)
}
