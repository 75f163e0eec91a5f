//! bzImage, the kernel image distributions ship (Linux, Documentation/arch/x86/boot.rst).
//!
//! A 64-bit kernel whose payload is compressed in a format the host knows is unpacked here and
//! entered like a `vmlinux`: far faster than in the guest, and no different to the kernel, which
//! is not relocated. Any other is entered at its own 64- or 32-bit entry and unpacks itself.

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::decompress::{Compression, decompress};
use super::elf::Elf;
use super::error::Problem;
use super::fields::Fields;
use super::image::Image;
use super::linux::HEADER_MAGIC;
use super::space::{Part, Space};
use super::{Entered, Protocol};
use crate::layout;

/// Offset of the setup header in the image.
const HEADER: usize = 0x1f1;
/// As much of the image as can hold the setup header.
const HEADER_END: usize = HEADER + size_of::<setup_header>();
/// Where the protected-mode part is loaded.
const LOAD_ADDRESS: u64 = layout::HIGH_RAM_START;
/// Where the 64-bit entry is, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;

/// What is wrong with a bzImage.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// A boot protocol before 2.02 (Linux 2.4).
    #[error(
        "its boot protocol is {}.{:02}; 2.02 or later is needed", .version >> 8, .version & 0xff
    )]
    Version {
        /// The `version` field.
        version: u16,
    },
    /// A zImage, which wants to be in low memory.
    #[error("it is a zImage, loaded low; only bzImages, loaded at 1 MiB, are taken")]
    LoadedLow,
    /// A payload outside the image.
    #[error(
        "its payload has {len} bytes at offset {offset} of a protected-mode part of {size} bytes"
    )]
    Payload {
        /// `payload_offset`.
        offset: u32,
        /// `payload_length`.
        len: u32,
        /// Size of the protected-mode part in bytes.
        size: u64,
    },
    /// A payload that is larger than the RAM, though it is packed.
    #[error(
        "its packed kernel has {len} bytes, more than the {ram} bytes of RAM; give the guest more memory"
    )]
    PayloadBeyondRam {
        /// `payload_length`.
        len: u32,
        /// Bytes of RAM below 4 GiB.
        ram: u64,
    },
    /// The payload is not a kernel.
    #[error("its payload was unpacked, but it is not an ELF file")]
    PayloadNotElf,
}

/// A bzImage's setup header, read with regard to its version.
pub(super) struct BzImage {
    header: setup_header,
    /// Offset and size of the protected-mode part.
    code: (u64, u64),
}

impl BzImage {
    /// Whether `head`, the first bytes of an image, start a bzImage.
    pub(super) fn recognise(head: &[u8]) -> bool {
        let head = Fields(head);
        head.u16(0x1fe) == 0xaa55 && head.u32(0x202) == HEADER_MAGIC
    }

    /// Reads the setup header. The image has been recognised.
    pub(super) fn parse(image: &Image) -> Result<Self, Problem> {
        let head = image.head(HEADER_END)?;
        // The operand of the jump over the header says where it ends; fields of later versions
        // stay zero.
        let end = 0x202 + usize::from(Fields(&head).u8(0x201));
        let mut header = setup_header::default();
        let fields = head.get(HEADER..end.min(head.len())).unwrap_or_default();
        for (to, from) in header.as_mut_slice().iter_mut().zip(fields) {
            *to = *from;
        }
        let version = header.version;
        if version < 0x0202 {
            return Err(BzImageError::Version { version }.into());
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(BzImageError::LoadedLow.into());
        }

        let setup_sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
        let start = (u64::from(setup_sectors) + 1) * 512;
        let rest = image.size().saturating_sub(start);
        // Before 2.04 the size is 16 bits of a larger number.
        let stated = u64::from(header.syssize) * 16;
        let size = if version >= 0x0204 && stated > 0 { stated } else { rest.max(1) };
        image.check("the protected-mode kernel", start, size)?;
        Ok(Self { header, code: (start, size) })
    }

    /// The setup header, to be passed on in the boot parameters.
    pub(super) fn header(&self) -> setup_header {
        self.header
    }

    /// The longest command line it takes, without the NUL.
    pub(super) fn cmdline_limit(&self) -> usize {
        let limit = if self.header.version >= 0x0206 { self.header.cmdline_size } else { 255 };
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    /// The end of the memory the initrd may be in.
    pub(super) fn initrd_end(&self) -> u64 {
        let last = if self.header.version >= 0x0203 && self.header.initrd_addr_max > 0 {
            self.header.initrd_addr_max
        } else {
            0x37ff_ffff
        };
        u64::from(last) + 1
    }

    /// Puts the kernel into guest memory, unpacked if possible.
    pub(super) fn load<M: GuestMemoryBackend>(
        &self,
        image: &Image,
        space: &mut Space<'_, M>,
    ) -> Result<Entered, Problem> {
        let is_64 = self.header.version >= 0x020c && self.header.xloadflags & XLF_KERNEL_64 != 0;
        if is_64 && let Some(kernel) = self.unpack(image, space)? {
            let elf = Elf::parse(&kernel)?;
            let entry = elf.entry()?;
            let kernel = elf.load(&kernel, space)?;
            return Ok(Entered { protocol: Protocol::Linux64, entry, kernel });
        }

        let (offset, size) = self.code;
        let end = LOAD_ADDRESS.saturating_add(size).max(self.unpacked_end());
        let kernel = space.claim(Part::Kernel, LOAD_ADDRESS, end - LOAD_ADDRESS)?;
        let what = "the protected-mode kernel";
        image.copy_to(what, (offset, size), space, Part::Kernel, LOAD_ADDRESS)?;
        let (protocol, entry) = if is_64 {
            (Protocol::Linux64, LOAD_ADDRESS + ENTRY_64)
        } else {
            (Protocol::Linux32, LOAD_ADDRESS)
        };
        Ok(Entered { protocol, entry, kernel })
    }

    /// The end of what the kernel uses before it looks at the memory map, as it unpacks itself
    /// to its preferred address.
    fn unpacked_end(&self) -> u64 {
        if self.header.version < 0x020a {
            return 0;
        }
        // A packed struct: copied out, not borrowed.
        let (address, size) = (self.header.pref_address, self.header.init_size);
        address.max(LOAD_ADDRESS).saturating_add(size.into())
    }

    /// The unpacked payload, if the host knows its format.
    fn unpack<M: GuestMemoryBackend>(
        &self,
        image: &Image,
        space: &Space<'_, M>,
    ) -> Result<Option<Image>, Problem> {
        let (start, size) = self.code;
        let (offset, len) = (self.header.payload_offset, self.header.payload_length);
        if self.header.version < 0x0208 || len == 0 {
            return Ok(None);
        }
        if u64::from(offset) + u64::from(len) > size {
            return Err(BzImageError::Payload { offset, len, size }.into());
        }
        let start = start + u64::from(offset);
        let mut magic = [0; 6];
        let probe = magic.get_mut(..len.min(6) as usize).unwrap_or_default();
        image.read_at("the payload", start, probe)?;
        let Some(format) = Compression::detect(probe) else { return Ok(None) };

        // A kernel that does not fit in the guest's RAM, packed or unpacked, is not read to the end.
        let ram = space.map().ram_below(layout::MMIO_HOLE_END);
        if u64::from(len) > ram {
            return Err(BzImageError::PayloadBeyondRam { len, ram }.into());
        }
        let limit = usize::try_from(ram).unwrap_or(usize::MAX);
        let mut payload = vec![0; usize::try_from(len).unwrap_or_default()];
        image.read_at("the payload", start, &mut payload)?;
        let kernel = decompress(format, &payload, limit)?;
        if !Elf::recognise(&kernel) {
            return Err(BzImageError::PayloadNotElf.into());
        }
        Image::from_bytes(image.name(), kernel).map(Some).map_err(|error| error.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        BzImageFile, ElfImage, MIB, SAMPLE_GZIP, SAMPLE_LZ4, SAMPLE_XZ, SAMPLE_ZSTD, bytes_at,
        image, linux_note, load_plain, memory, problem, sample_kernel,
    };
    use super::super::{DecompressError, FileError, Format, PlaceError};
    use super::*;

    #[test]
    fn a_payload_larger_than_ram_is_not_read() {
        let packed = [SAMPLE_GZIP, &vec![0; 3 << 20]].concat();
        let file = BzImageFile::new(&packed).build();
        let problem = load_plain(&memory(2), Format::Auto, &file).unwrap_err().problem;
        let Problem::BzImage(BzImageError::PayloadBeyondRam { len, ram }) = problem else {
            panic!("{problem}");
        };
        assert!(u64::from(len) == packed.len() as u64 && ram < 2 * MIB);
    }

    #[test]
    fn unpacks_every_known_payload_on_the_host() {
        let kernel = sample_kernel();
        for payload in [SAMPLE_GZIP, SAMPLE_LZ4, SAMPLE_XZ, SAMPLE_ZSTD] {
            let memory = memory(32);
            let file = BzImageFile::new(payload).build();
            let boot = load_plain(&memory, Format::Auto, &file).unwrap();
            assert_eq!((boot.protocol, boot.entry), (Protocol::Linux64, 16 * MIB));
            assert!(bytes_at(&memory, 16 * MIB, kernel.code.len()) == kernel.code);
            // Nothing of the packed kernel is left behind.
            assert_eq!(bytes_at(&memory, MIB, 64), [0; 64]);
        }
    }

    #[test]
    fn unknown_payloads_unpack_themselves_in_the_guest() {
        let memory = memory(32);
        let file = BzImageFile::new(b"BZh91AY&SY").build();
        let boot = load_plain(&memory, Format::Auto, &file).unwrap();
        assert_eq!((boot.protocol, boot.entry), (Protocol::Linux64, MIB + 0x200));
        // Up to the end of the room it needs at its preferred address.
        assert_eq!(boot.kernel, MIB..17 * MIB);
        assert_eq!(bytes_at(&memory, MIB, file.len() - 1024), file[1024..]);
    }

    #[test]
    fn kernels_without_a_64_bit_entry_are_entered_in_32_bit_mode() {
        let old = BzImageFile { version: 0x020b, ..BzImageFile::new(SAMPLE_GZIP) };
        let not_64 = BzImageFile { xloadflags: 0, ..BzImageFile::new(SAMPLE_GZIP) };
        for file in [old, not_64] {
            let boot = load_plain(&memory(32), Format::BzImage, &file.build()).unwrap();
            assert_eq!((boot.protocol, boot.entry), (Protocol::Linux32, MIB));
        }
    }

    #[test]
    fn fields_newer_than_the_protocol_are_not_believed() {
        let parse = |version| {
            let file = BzImageFile { version, ..BzImageFile::new(b"x") };
            BzImage::parse(&image(&file.build())).unwrap()
        };
        assert_eq!(parse(0x0205).cmdline_limit(), 255);
        assert_eq!(parse(0x0206).cmdline_limit(), 2047);
        assert_eq!(parse(0x0202).initrd_end(), 0x3800_0000);
        assert_eq!(parse(0x0203).initrd_end(), 0x8000_0000);
        assert_eq!(parse(0x0209).unpacked_end(), 0);
        assert_eq!(parse(0x020a).unpacked_end(), 17 * MIB);

        // A header that ends before its payload fields has none.
        let mut short = BzImageFile::new(b"x").build();
        short[0x201] = 0x46;
        let header = BzImage::parse(&image(&short)).unwrap().header();
        assert_eq!({ header.payload_offset }, 0);
        assert_eq!({ header.hardware_subarch_data }, 0);
        assert_eq!({ header.cmdline_size }, 2047);
    }

    #[test]
    fn refuses_what_it_can_not_boot() {
        let file = BzImageFile::new(SAMPLE_GZIP);
        let old = BzImageFile { version: 0x0201, ..file.clone() };
        let error = problem(Format::Auto, &old.build());
        assert_eq!(error, BzImageError::Version { version: 0x0201 }.into());
        assert!(error.to_string().contains("2.01"), "{error}");
        let mut low = file.build();
        low[0x211] = 0;
        assert_eq!(problem(Format::Auto, &low), BzImageError::LoadedLow.into());
        assert_eq!(
            problem(Format::BzImage, &ElfImage::new(linux_note()).build()),
            Problem::WrongFormat { asked: Format::BzImage }
        );
    }

    #[test]
    fn refuses_payloads_that_lie() {
        let file = BzImageFile::new(SAMPLE_GZIP);
        for (at, value) in [(0x248, u32::MAX), (0x24c, u32::MAX), (0x24c, 4096)] {
            let mut bytes = file.build();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            let error = problem(Format::Auto, &bytes);
            assert!(matches!(error, Problem::BzImage(BzImageError::Payload { .. })), "{error}");
        }
        let not_elf = {
            use std::io::Write;
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(b"not a kernel").unwrap();
            BzImageFile::new(&encoder.finish().unwrap()).build()
        };
        assert_eq!(problem(Format::Auto, &not_elf), BzImageError::PayloadNotElf.into());
        let mut corrupt = file.build();
        corrupt[1024 + 0x400 + 600] ^= 0xff;
        assert!(matches!(
            problem(Format::Auto, &corrupt),
            Problem::Decompress(DecompressError::Corrupt { format: Compression::Gzip, .. })
        ));
    }

    #[test]
    fn refuses_every_truncation() {
        let whole = BzImageFile::new(SAMPLE_XZ).build();
        for len in (1..whole.len()).step_by(11).chain([whole.len() - 1]) {
            let error = problem(Format::BzImage, &whole[..len]);
            let truncated = matches!(
                error,
                Problem::File(FileError::Truncated { .. })
                    | Problem::WrongFormat { .. }
                    | Problem::BzImage(_)
            );
            assert!(truncated, "{len}: {error}");
        }
    }

    #[test]
    fn room_to_unpack_must_be_there() {
        let file = BzImageFile { init_size: 20 << 20, ..BzImageFile::new(b"BZh") };
        assert!(matches!(
            problem(Format::Auto, &file.build()),
            Problem::Place(PlaceError::NotRam { part: Part::Kernel, .. })
        ));
        let file = BzImageFile { pref_address: u64::MAX, ..file };
        assert!(matches!(problem(Format::Auto, &file.build()), Problem::Place(_)));
    }
}
