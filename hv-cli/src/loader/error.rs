//! Why an image can't be booted: one sentence that names the image, typed down to the field.

use super::Format;
use super::bzimage::BzImageError;
use super::decompress::DecompressError;
use super::elf::ElfError;
use super::image::FileError;
use super::multiboot::MultibootError;
use super::space::PlaceError;

/// An image that can't be loaded, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot load '{image}': {problem}")]
pub struct LoadError {
    /// The image's name: its path, for a file.
    pub image: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with an image, or with the request to load it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The file can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// No format was asked for and none was recognised.
    #[error(
        "it is neither a bzImage, nor an ELF file, nor a multiboot kernel{hint}; \
         a flat real-mode binary needs --format flat"
    )]
    Unrecognised {
        /// What it looks like, as a subordinate clause; may be empty.
        hint: &'static str,
    },
    /// The image is not of the format asked for.
    #[error("it is not {}, as --format {asked} asks for", .asked.article())]
    WrongFormat {
        /// The format that was asked for.
        asked: Format,
    },
    /// A broken or unsuitable ELF file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// A broken or unsuitable bzImage.
    #[error(transparent)]
    BzImage(#[from] BzImageError),
    /// A bzImage payload that can't be decompressed.
    #[error(transparent)]
    Decompress(#[from] DecompressError),
    /// A multiboot kernel that asks for what we don't have, or whose header lies.
    #[error(transparent)]
    Multiboot(#[from] MultibootError),
    /// Something does not fit in guest memory.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes, but this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length in bytes, without the terminating NUL.
        len: usize,
        /// The most this kernel takes.
        limit: usize,
    },
    /// A NUL would silently end the command line.
    #[error("the command line has a NUL at byte {at}; a kernel would ignore what follows")]
    CmdlineNul {
        /// Offset of the first NUL.
        at: usize,
    },
    /// A flat binary is told nothing, so it can't be given anything.
    #[error("a flat binary can't be given {what}: it has no boot protocol to pass it by")]
    FlatTakesNothing {
        /// What was given.
        what: &'static str,
    },
    /// More memory ranges than Linux's boot parameters hold.
    #[error("the memory map has {entries} ranges; Linux's boot parameters hold {limit}")]
    TooManyRanges {
        /// Ranges in the map.
        entries: usize,
        /// The most that fit.
        limit: usize,
    },
}

impl Problem {
    /// This problem, of the image called `image`.
    pub(super) fn of(self, image: &str) -> LoadError {
        LoadError { image: image.to_owned(), problem: self }
    }
}
