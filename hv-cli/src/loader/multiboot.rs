//! Multiboot 1 kernels (Multiboot Specification 0.6.96).

use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use super::elf::Elf;
use super::error::Problem;
use super::fields::Fields;
use super::image::Image;
use super::linux::BootInfo;
use super::space::{Part, PlaceError, Space};
use super::{Entered, Protocol};
use crate::layout;

/// EAX at entry.
pub(super) const BOOT_MAGIC: u32 = 0x2bad_b002;
/// The header lies completely in that many first bytes of the image.
pub(super) const SEARCH: usize = 8192;

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// Header flags that a boot loader must understand. We page-align modules (bit 0) and pass memory
/// information (bit 1) always, and have no video mode to offer (bit 2).
const REQUIRED: u32 = 0xffff;
const SUPPORTED: u32 = 0b11;
/// Header flag: it has load addresses ("a.out kludge").
const ADDRESSES: u32 = 1 << 16;

/// Size of the multiboot information up to the field `boot_loader_name`.
const INFO_SIZE: u64 = 68;
const MODULE_SIZE: u64 = 16;
const MAP_ENTRY_SIZE: u64 = 24;
const LOADER_NAME: &[u8] = b"hv\0";

/// What is wrong with a multiboot kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MultibootError {
    /// It requires something of the boot loader that we can't do.
    #[error(
        "its multiboot header requires features {flags:#x} that are not there \
         (bit 2 is a video mode)"
    )]
    Features {
        /// The flags we don't support.
        flags: u32,
    },
    /// Load addresses that contradict each other or the file.
    #[error(
        "its multiboot header is at {header:#x}, loaded at {load:#x} to {load_end:#x} and \
         cleared to {bss_end:#x}: these addresses are out of order, or before the file"
    )]
    Addresses {
        /// `header_addr`.
        header: u32,
        /// `load_addr`.
        load: u32,
        /// `load_end_addr`.
        load_end: u32,
        /// `bss_end_addr`.
        bss_end: u32,
    },
    /// An entry point outside what is loaded.
    #[error("its multiboot entry point {entry:#x} is outside what it loads")]
    Entry {
        /// `entry_addr`.
        entry: u32,
    },
    /// No load addresses and no ELF file to take them from.
    #[error("its multiboot header has no load addresses and it is not an ELF file")]
    NoAddresses,
}

/// A multiboot header.
#[derive(Debug)]
pub(super) struct Multiboot {
    flags: u32,
    /// Offset in the image.
    offset: u64,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr`, `entry_addr`.
    addresses: [u32; 5],
}

impl Multiboot {
    /// The multiboot header in `head`, the first bytes of an image.
    pub(super) fn find(head: &[u8]) -> Option<Self> {
        let head = head.get(..SEARCH).unwrap_or(head);
        (0..head.len()).step_by(4).find_map(|offset| {
            let header = head.get(offset..)?;
            let fields = Fields(header);
            let (magic, flags, checksum) = (fields.u32(0), fields.u32(4), fields.u32(8));
            let sum = magic.wrapping_add(flags).wrapping_add(checksum);
            let size = if flags & ADDRESSES != 0 { 32 } else { 12 };
            (magic == HEADER_MAGIC && sum == 0 && header.len() >= size).then(|| Self {
                flags,
                offset: offset as u64,
                addresses: [12, 16, 20, 24, 28].map(|at| fields.u32(at)),
            })
        })
    }

    /// Puts the kernel into guest memory.
    pub(super) fn load<M: GuestMemoryBackend>(
        &self,
        image: &Image,
        is_elf: bool,
        space: &mut Space<'_, M>,
    ) -> Result<Entered, Problem> {
        let flags = self.flags & REQUIRED & !SUPPORTED;
        if flags != 0 {
            return Err(MultibootError::Features { flags }.into());
        }
        let (entry, kernel) = if self.flags & ADDRESSES != 0 {
            self.load_by_addresses(image, space)?
        } else if is_elf {
            let elf = Elf::parse(image)?;
            (elf.entry()?, elf.load(image, space)?)
        } else {
            return Err(MultibootError::NoAddresses.into());
        };
        Ok(Entered { protocol: Protocol::Multiboot, entry, kernel })
    }

    fn load_by_addresses<M: GuestMemoryBackend>(
        &self,
        image: &Image,
        space: &mut Space<'_, M>,
    ) -> Result<(u64, Range<u64>), Problem> {
        let [header, load, load_end, bss_end, entry] = self.addresses;
        let wrong = || MultibootError::Addresses { header, load, load_end, bss_end };
        // The header tells which part of the file goes to the load address.
        let before = header.checked_sub(load).ok_or_else(wrong)?;
        let offset = self.offset.checked_sub(before.into()).ok_or_else(wrong)?;
        let size = if load_end == 0 {
            image.size() - offset
        } else {
            load_end.checked_sub(load).ok_or_else(wrong)?.into()
        };
        let memory = if bss_end == 0 {
            size
        } else {
            let memory = bss_end.checked_sub(load).ok_or_else(wrong)?.into();
            if memory < size {
                return Err(wrong().into());
            }
            memory
        };
        let kernel = space.claim(Part::Kernel, load.into(), memory)?;
        if !kernel.contains(&entry.into()) {
            return Err(MultibootError::Entry { entry }.into());
        }
        let what = "the multiboot kernel";
        image.copy_to(what, (offset, size), space, Part::Kernel, kernel.start)?;
        Ok((entry.into(), kernel))
    }
}

/// Writes the multiboot information with the module list, the memory map and the loader's name,
/// and returns its guest-physical address.
pub(super) fn put_info<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    info: &BootInfo,
) -> Result<u64, PlaceError> {
    // Memory, command line, modules, memory map, loader name.
    const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
    let entries = space.map().entries();
    let modules = u64::from(info.initrd.is_some());
    let map_size = entries.len() as u64 * MAP_ENTRY_SIZE;
    let size = INFO_SIZE + modules * MODULE_SIZE + map_size + LOADER_NAME.len() as u64;

    let start = space.place_low(Part::MultibootInfo, 16, size as usize)?;
    let modlist = start + INFO_SIZE;
    let map = modlist + modules * MODULE_SIZE;
    let name = map + map_size;

    let ram_at = |at: u64| space.map().ram().find(|ram| ram.contains(&at)).map(|ram| ram.end - at);
    let lower = ram_at(0).unwrap_or(0).min(640 << 10) >> 10;
    let upper = ram_at(layout::HIGH_RAM_START).unwrap_or(0) >> 10;

    // Everything is placed below 4 GiB: the narrowing loses nothing.
    let mut fields = vec![0u32; INFO_SIZE as usize / 4];
    let values = [
        (0, FLAGS.into()),
        (4, lower),
        (8, upper),
        (16, info.cmdline),
        (20, modules),
        (24, modlist),
        (44, map_size),
        (48, map),
        (64, name),
    ];
    for (offset, value) in values {
        if let Some(field) = fields.get_mut(offset / 4) {
            *field = value as u32;
        }
    }
    if let Some(Range { start, end }) = info.initrd {
        fields.extend([start as u32, end as u32, 0, 0]);
    }
    let mut bytes: Vec<u8> = fields.into_iter().flat_map(u32::to_le_bytes).collect();
    for entry in entries {
        let Range { start, end } = entry.range;
        bytes.extend((MAP_ENTRY_SIZE as u32 - 4).to_le_bytes());
        bytes.extend(start.to_le_bytes());
        bytes.extend((end - start).to_le_bytes());
        bytes.extend((entry.kind as u32).to_le_bytes());
    }
    bytes.extend(LOADER_NAME);
    space.write(Part::MultibootInfo, start, &bytes)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{
        ElfImage, MIB, bytes_at, image, load_plain, memory, multiboot_header, problem,
    };
    use super::super::{CpuMode, Format, LoadRequest, MemoryMap, load};
    use super::*;

    /// An a.out-kludge image at 1 MiB, its header 16 bytes in, with these fields replaced.
    fn kludge(replace: &[(usize, u32)]) -> Vec<u8> {
        let base = MIB as u32;
        let mut addresses = [base + 16, base, base + 100, base + 4096, base + 48];
        for &(index, value) in replace {
            addresses[index] = value;
        }
        let mut bytes = vec![0x11; 16];
        bytes.extend(multiboot_header(ADDRESSES | SUPPORTED, addresses));
        bytes.resize(200, 0x22);
        bytes
    }

    #[test]
    fn loads_an_elf_kernel_with_its_module_command_line_and_map() {
        let memory = memory(32);
        let mut elf = ElfImage::new_32(Vec::new());
        elf.code[..32].copy_from_slice(&multiboot_header(SUPPORTED, [0; 5]));
        let module = super::super::Image::from_bytes("initrd", vec![7; 5000]).unwrap();
        let map = MemoryMap::new(&memory, &[]);
        let request = LoadRequest {
            format: Format::Auto,
            cmdline: Some("-v 3"),
            initrd: Some(&module),
            map: &map,
            linux_cmdline: crate::loader::LINUX_CMDLINE,
            rsdp: None,
        };
        let boot = load(&memory, &image(&elf.build()), &request).unwrap();
        assert_eq!((boot.protocol, boot.entry), (Protocol::Multiboot, MIB));
        assert!(matches!(boot.mode, CpuMode::Protected { .. }));
        assert_eq!(bytes_at(&memory, MIB, elf.code.len()), elf.code);

        let info = bytes_at(&memory, boot.info, INFO_SIZE as usize);
        let info = Fields(&info);
        assert_eq!(info.u32(0), 0b10_0100_1101);
        assert_eq!((info.u32(4), info.u32(8)), (639, 31 * 1024));
        assert_eq!(bytes_at(&memory, info.u32(16).into(), 12), b"kernel -v 3\0");
        assert_eq!(bytes_at(&memory, info.u32(64).into(), 3), b"hv\0");

        assert_eq!(info.u32(20), 1);
        let modules = bytes_at(&memory, info.u32(24).into(), 16);
        let (start, end) = (Fields(&modules).u32(0), Fields(&modules).u32(4));
        assert_eq!(boot.initrd, Some(start.into()..end.into()));
        assert_eq!((start % 4096, end - start), (0, 5000));
        assert_eq!(bytes_at(&memory, start.into(), 5000), [7; 5000]);

        let bytes = bytes_at(&memory, info.u32(48).into(), info.u32(44) as usize);
        let entries: Vec<_> = bytes
            .chunks(24)
            .map(Fields)
            .map(|entry| (entry.u32(0), entry.u64(4), entry.u64(12), entry.u32(20)))
            .collect();
        assert_eq!(
            entries,
            [
                (20, 0, 0x9_fc00, 1),
                (20, 0x9_fc00, 0x400, 2),
                (20, 0xe_0000, 0x2_0000, 2),
                (20, MIB, 31 * MIB, 1),
            ]
        );
    }

    #[test]
    fn loads_by_the_addresses_of_the_header() {
        let memory = memory(32);
        let boot = load_plain(&memory, Format::Auto, &kludge(&[])).unwrap();
        assert_eq!((boot.entry, boot.kernel), (MIB + 48, MIB..MIB + 4096));
        assert_eq!(bytes_at(&memory, MIB, 100), kludge(&[])[..100]);
        assert_eq!(bytes_at(&memory, MIB + 100, 100), [0; 100]);
        // No end: all of the file, and nothing cleared behind it.
        let boot = load_plain(&memory, Format::Auto, &kludge(&[(2, 0), (3, 0)])).unwrap();
        assert_eq!(boot.kernel, MIB..MIB + 200);
        // The load address is in the middle of the file.
        let boot = load_plain(&memory, Format::Auto, &kludge(&[(0, MIB as u32)])).unwrap();
        assert_eq!(boot.kernel.start, MIB);
        assert_eq!(bytes_at(&memory, MIB, 4), HEADER_MAGIC.to_le_bytes());
    }

    #[test]
    fn refuses_addresses_that_lie() {
        let base = MIB as u32;
        for replace in
            [(0, base - 1), (0, base + 17), (1, base + 17), (2, base - 1), (3, base + 50)]
        {
            let error = problem(Format::Auto, &kludge(&[replace]));
            assert!(
                matches!(error, Problem::Multiboot(MultibootError::Addresses { .. })),
                "{replace:?}: {error}"
            );
        }
        assert!(matches!(problem(Format::Auto, &kludge(&[(2, base + 201)])), Problem::File(_)));
        assert!(matches!(problem(Format::Auto, &kludge(&[(3, u32::MAX)])), Problem::Place(_)));
        assert_eq!(
            problem(Format::Auto, &kludge(&[(4, base + 4096)])),
            MultibootError::Entry { entry: base + 4096 }.into()
        );
    }

    #[test]
    fn refuses_features_it_does_not_have_and_headers_without_addresses() {
        assert_eq!(
            problem(Format::Auto, &multiboot_header(0b111, [0; 5])),
            MultibootError::Features { flags: 0b100 }.into()
        );
        assert_eq!(
            problem(Format::Multiboot, &multiboot_header(0, [0; 5])),
            MultibootError::NoAddresses.into()
        );
    }

    #[test]
    fn a_header_is_aligned_complete_early_and_its_checksum_right() {
        let header = multiboot_header(0, [0; 5]);
        let at = |offset: usize| [vec![0; offset], header.clone()].concat();
        assert!(Multiboot::find(&at(4096)).is_some());
        assert!(Multiboot::find(&at(SEARCH - 12)).is_some());
        assert!(Multiboot::find(&at(SEARCH - 8)).is_none());
        assert!(Multiboot::find(&at(SEARCH)).is_none());
        assert!(Multiboot::find(&at(2)).is_none());
        assert!(Multiboot::find(&header[..11]).is_none());
        assert!(Multiboot::find(&kludge(&[])[..40]).is_none());
        let mut wrong = header;
        wrong[8] ^= 1;
        assert!(Multiboot::find(&wrong).is_none());
    }
}
