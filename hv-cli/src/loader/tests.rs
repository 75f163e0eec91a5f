//! Whole boots, as the VMM asks for them, and hostile images of every format.

use linux_loader::bootparam::boot_params;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::fields::Fields;
use super::testing::*;
use super::*;

const RSDP: GuestAddress = GuestAddress(0xe_0000);
const RESERVED: Range<u64> = 0xfeff_c000..0xff00_0000;

/// Loads into `memory` with an initrd of `initrd` bytes and a command line.
fn boot_with<'a>(
    memory: &GuestMemoryMmap,
    format: Format,
    kernel: &[u8],
    initrd: usize,
    cmdline: impl Into<Option<&'a str>>,
) -> Result<BootState, LoadError> {
    let pattern = (0..initrd).map(|at| (at % 253) as u8).collect();
    let initrd = Image::from_bytes("/boot/initrd", pattern).unwrap();
    let map = MemoryMap::new(memory, &[RESERVED]);
    let rsdp = Some(RSDP);
    let cmdline = cmdline.into();
    let request = LoadRequest {
        format,
        cmdline,
        initrd: Some(&initrd),
        map: &map,
        linux_cmdline: LINUX_CMDLINE,
        rsdp,
    };
    load(memory, &image(kernel), &request)
}

fn zero_page(memory: &GuestMemoryMmap, boot: &BootState) -> boot_params {
    memory.read_obj(GuestAddress(boot.info)).unwrap()
}

fn string_at(memory: &GuestMemoryMmap, at: u64) -> String {
    let bytes = bytes_at(memory, at, 4096);
    let len = bytes.iter().position(|&byte| byte == 0).unwrap();
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

#[test]
fn detects_every_format_by_what_the_image_says() {
    let multiboot = multiboot_header(0, [0; 5]);
    let elf = |elf: ElfImage| elf.build();
    let linux_and_pvh = [linux_note(), pvh_note(0x100_0000)].concat();
    let mut multiboot_elf = ElfImage::new_32(pvh_note(0x10_0000));
    multiboot_elf.code[64..96].copy_from_slice(&multiboot);
    for (kernel, format) in [
        (BzImageFile::new(b"x").build(), Format::BzImage),
        (elf(ElfImage::new(linux_and_pvh)), Format::Linux64),
        (elf(ElfImage::new(linux_note())), Format::Linux64),
        (elf(ElfImage::new(Vec::new())), Format::Linux64),
        (elf(ElfImage::new(pvh_note(0x100_0000))), Format::Pvh),
        (elf(ElfImage::new_32(pvh_note(0x10_0000))), Format::Pvh),
        (elf(multiboot_elf), Format::Multiboot),
        (multiboot, Format::Multiboot),
    ] {
        assert_eq!(Format::detect(&image(&kernel)), Ok(format));
    }
}

#[test]
fn says_what_an_image_that_is_no_kernel_looks_like() {
    for (bytes, text) in [
        (&b"\x1f\x8b\x08\0\0"[..], "gzip data: unpack it first"),
        (b"070701000000", "an initramfs goes to --initrd"),
        (b"MZ\0\0", "EFI program"),
        (b"#!/bin/sh", "script"),
        (b"\xfa\xf4", "--format flat"),
    ] {
        let error = Format::detect(&image(bytes)).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert!(error.starts_with("cannot load '/boot/kernel'"), "{error}");
    }
    let no_entry = ElfImage::new_32(Vec::new()).build();
    assert_eq!(problem(Format::Auto, &no_entry), ElfError::NoEntry.into());
    assert_eq!(problem(Format::Linux64, &no_entry), ElfError::NotSixtyFour.into());
    assert_eq!(problem(Format::Pvh, &no_entry), ElfError::NoPvhNote.into());
    for asked in [Format::BzImage, Format::Elf, Format::Pvh, Format::Linux64, Format::Multiboot] {
        assert_eq!(problem(asked, b"neither"), Problem::WrongFormat { asked });
    }
}

#[test]
fn linux_finds_everything_in_its_boot_parameters() {
    let vmlinux = ElfImage::new(linux_note()).build();
    let bzimage = BzImageFile::new(SAMPLE_GZIP).build();
    for (kernel, is_bzimage) in [(vmlinux, false), (bzimage, true)] {
        let memory = memory(64);
        let boot = boot_with(&memory, Format::Auto, &kernel, 5000, "console=ttyS0").unwrap();
        let CpuMode::Long { gdt, page_tables } = boot.mode else { panic!("{:?}", boot.mode) };
        assert_eq!(
            memory.read_obj::<u64>(GuestAddress(page_tables)).unwrap(),
            page_tables + 0x1003
        );
        assert_eq!(bytes_at(&memory, gdt + 16, 8), 0x00af_9b00_0000_ffffu64.to_le_bytes());

        let params = zero_page(&memory, &boot);
        let (header, rsdp) = (params.hdr, params.acpi_rsdp_addr);
        assert_eq!(({ header.boot_flag }, { header.header }), (0xaa55, 0x5372_6448));
        assert_eq!((header.type_of_loader, header.loadflags & 1), (0xff, 1));
        assert_eq!({ header.kernel_alignment }, if is_bzimage { 0x20_0000 } else { 0x100_0000 });
        assert_eq!(rsdp, RSDP.0);
        assert_eq!(string_at(&memory, header.cmd_line_ptr.into()), "console=ttyS0");

        let initrd = boot.initrd.clone().unwrap();
        assert_eq!(u64::from(header.ramdisk_image), initrd.start);
        assert_eq!({ header.ramdisk_size }, 5000);
        assert_eq!(({ params.ext_ramdisk_image }, { params.ext_ramdisk_size }), (0, 0));
        assert_eq!(initrd, 64 * MIB - 8192..64 * MIB - 8192 + 5000);
        assert_eq!(bytes_at(&memory, initrd.start + 4999, 1), [(4999 % 253) as u8]);

        let table = params.e820_table;
        let entries: Vec<_> = table[..params.e820_entries.into()]
            .iter()
            .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
            .collect();
        assert_eq!(
            entries,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x400, 2),
                (0xe_0000, 0x2_0000, 2),
                (MIB, 63 * MIB, 1),
                (0xfeff_c000, 0x4000, 2),
            ]
        );
    }
}

#[test]
fn pvh_finds_everything_in_its_start_info() {
    let memory = memory(64);
    let kernel = ElfImage::new(pvh_note(0x100_0010)).build();
    let boot = boot_with(&memory, Format::Pvh, &kernel, 5000, "quiet").unwrap();
    assert_eq!((boot.protocol, boot.entry), (Protocol::Pvh, 0x100_0010));
    assert!(matches!(boot.mode, CpuMode::Protected { .. }));
    let info = bytes_at(&memory, boot.info, 56);
    let info = Fields(&info);
    assert_eq!((info.u32(0), info.u32(4), info.u32(8), info.u32(12)), (0x336e_c578, 1, 0, 1));
    assert_eq!(string_at(&memory, info.u64(24)), "quiet");
    assert_eq!(info.u64(32), RSDP.0);
    let module = bytes_at(&memory, info.u64(16), 32);
    let module = Fields(&module);
    let initrd = boot.initrd.unwrap();
    assert_eq!((module.u64(0), module.u64(8)), (initrd.start, initrd.end - initrd.start));
    assert_eq!(info.u32(48), 5);
    let map = bytes_at(&memory, info.u64(40), 5 * 24);
    let last = Fields(&map[4 * 24..]);
    assert_eq!((last.u64(0), last.u64(8), last.u32(16)), (0xfeff_c000, 0x4000, 2));
}

#[test]
fn only_linux_has_a_default_command_line() {
    let linux_pvh = [linux_note(), pvh_note(0x100_0000)].concat();
    let mut multiboot = ElfImage::new_32(Vec::new());
    multiboot.code[..32].copy_from_slice(&multiboot_header(0, [0; 5]));
    // Kernel, format, offset of the command line's address in what is passed, the command line.
    for (kernel, format, field, expected) in [
        (ElfImage::new(linux_note()).build(), Format::Linux64, 0x228, LINUX_CMDLINE),
        (BzImageFile::new(SAMPLE_GZIP).build(), Format::BzImage, 0x228, LINUX_CMDLINE),
        (ElfImage::new(linux_pvh).build(), Format::Pvh, 24, LINUX_CMDLINE),
        (ElfImage::new(pvh_note(0x100_0000)).build(), Format::Pvh, 24, ""),
        (multiboot.build(), Format::Multiboot, 16, "kernel"),
    ] {
        let memory = memory(32);
        let boot = load_plain(&memory, format, &kernel).unwrap();
        let at: u32 = memory.read_obj(GuestAddress(boot.info + field)).unwrap();
        assert_eq!(string_at(&memory, at.into()), expected, "{format}");
    }
}

#[test]
fn a_flat_binary_is_entered_where_it_is_loaded() {
    let memory = memory(2);
    let boot = load_plain(&memory, Format::Flat, b"\xfa\xf4").unwrap();
    assert_eq!((boot.mode, boot.entry, boot.info), (CpuMode::Real, 0x1_0000, 0));
    assert_eq!(bytes_at(&memory, 0x1_0000, 2), b"\xfa\xf4");
    assert!(matches!(problem(Format::Flat, &[0; 0xa_0000]), Problem::Place(_)));
    let given = boot_with(&memory, Format::Flat, b"\xf4", 1, None).unwrap_err();
    assert_eq!(given.problem, Problem::FlatTakesNothing { what: "an initrd" });
    let map = MemoryMap::new(&memory, &[]);
    let cmdline = Some("quiet");
    let request = LoadRequest {
        format: Format::Flat,
        cmdline,
        initrd: None,
        map: &map,
        linux_cmdline: LINUX_CMDLINE,
        rsdp: None,
    };
    let given = load(&memory, &image(b"\xf4"), &request).unwrap_err();
    assert_eq!(given.problem, Problem::FlatTakesNothing { what: "a command line" });
}

#[test]
fn the_initrd_stays_below_the_kernels_limit_and_the_device_hole() {
    let limited = BzImageFile { initrd_addr_max: 0x01ff_ffff, ..BzImageFile::new(SAMPLE_GZIP) };
    let boot = boot_with(&memory(64), Format::Auto, &limited.build(), 4096, "").unwrap();
    assert_eq!(boot.initrd, Some(32 * MIB - 4096..32 * MIB));

    let size = usize::try_from(4096 * MIB).unwrap();
    let large = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 3 << 30),
        (GuestAddress(1 << 32), size - (3 << 30)),
    ])
    .unwrap();
    let kernel = ElfImage::new(linux_note()).build();
    let boot = boot_with(&large, Format::Auto, &kernel, 4096, "").unwrap();
    assert_eq!(boot.initrd, Some(0xc000_0000 - 4096..0xc000_0000));
}

#[test]
fn what_does_not_fit_is_named_with_both_sizes() {
    let kernel = ElfImage::new(linux_note()).build();
    let error = boot_with(&memory(20), Format::Auto, &kernel, 18 << 20, "").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("cannot load '/boot/initrd'"), "{text}");
    assert!(text.contains("18874368") && text.contains("15728640"), "{text}");

    let long = "x".repeat(2048);
    let error = boot_with(&memory(20), Format::Auto, &kernel, 1, &*long).unwrap_err();
    assert_eq!(error.problem, Problem::CmdlineTooLong { len: 2048, limit: 2047 });
    assert!(boot_with(&memory(20), Format::Auto, &kernel, 1, &long[..2047]).is_ok());
    let short = BzImageFile { cmdline_size: 10, ..BzImageFile::new(SAMPLE_GZIP) }.build();
    let error = boot_with(&memory(20), Format::Auto, &short, 1, "12345678901").unwrap_err();
    assert_eq!(error.problem, Problem::CmdlineTooLong { len: 11, limit: 10 });
    let unlimited = BzImageFile { cmdline_size: u32::MAX, ..BzImageFile::new(SAMPLE_GZIP) }.build();
    let long = "x".repeat(1 << 20);
    let error = boot_with(&memory(20), Format::Auto, &unlimited, 1, &*long).unwrap_err();
    assert!(matches!(
        error.problem,
        Problem::Place(PlaceError::NoRoom { part: Part::Cmdline, .. })
    ));

    let error = boot_with(&memory(20), Format::Auto, &kernel, 1, "a\0b").unwrap_err();
    assert_eq!(error.problem, Problem::CmdlineNul { at: 1 });
}

#[test]
fn more_ranges_than_the_boot_parameters_hold_are_an_error() {
    let memory = memory(32);
    let reserved: Vec<_> =
        (0..200).map(|at| (20 * MIB + at * 8192)..(20 * MIB + at * 8192 + 1)).collect();
    let map = MemoryMap::new(&memory, &reserved);
    let request = LoadRequest {
        format: Format::Auto,
        cmdline: None,
        initrd: None,
        map: &map,
        linux_cmdline: LINUX_CMDLINE,
        rsdp: None,
    };
    let error = load(&memory, &image(&ElfImage::new(linux_note()).build()), &request).unwrap_err();
    assert!(matches!(error.problem, Problem::TooManyRanges { limit: 128, .. }), "{error}");
}

#[test]
fn a_guest_too_small_for_anything_is_an_error() {
    let tiny = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    for (format, kernel) in hostile_seeds() {
        assert!(load_plain(&tiny, format, &kernel).is_err());
    }
}

/// A valid image of each kind.
fn hostile_seeds() -> Vec<(Format, Vec<u8>)> {
    let mut multiboot = ElfImage::new_32(Vec::new());
    multiboot.code[..32].copy_from_slice(&multiboot_header(0b11, [0; 5]));
    let base = MIB as u32;
    let kludge = multiboot_header(1 << 16, [base, base, base + 200, base + 400, base + 64]);
    vec![
        (Format::Auto, ElfImage::new([linux_note(), pvh_note(0x100_0000)].concat()).build()),
        (Format::Pvh, ElfImage::new(pvh_note(0x100_0000)).build()),
        (Format::Pvh, ElfImage::new_32(pvh_note(0x10_0000)).build()),
        (Format::Auto, BzImageFile::new(SAMPLE_GZIP).build()),
        (Format::Auto, BzImageFile::new(SAMPLE_LZ4).build()),
        (Format::Auto, BzImageFile::new(SAMPLE_XZ).build()),
        (Format::Auto, BzImageFile::new(SAMPLE_ZSTD).build()),
        (Format::Auto, BzImageFile::new(b"BZh91AY&SY").build()),
        (Format::Multiboot, multiboot.build()),
        (Format::Multiboot, [kludge, vec![0x90; 400]].concat()),
    ]
}

#[test]
fn the_seeds_of_the_hostile_tests_are_valid() {
    for (format, kernel) in hostile_seeds() {
        load_plain(&memory(32), format, &kernel).unwrap();
    }
}

/// Loads with everything, and checks what must hold of any image that loads.
fn check_hostile(format: Format, kernel: &[u8]) {
    let memory = memory(32);
    let map = MemoryMap::new(&memory, &[]);
    let initrd = Image::from_bytes("initrd", vec![1; 5000]).unwrap();
    let initrd = (format != Format::Flat).then_some(&initrd);
    let cmdline = (format != Format::Flat).then_some("quiet");
    let request = LoadRequest {
        format,
        cmdline,
        initrd,
        map: &map,
        linux_cmdline: LINUX_CMDLINE,
        rsdp: Some(RSDP),
    };
    let Ok(boot) = load(&memory, &image(kernel), &request) else { return };
    assert!(boot.kernel.contains(&boot.entry), "{boot:?}");
    let inside = |range: &Range<u64>| range.start < range.end && range.end <= 32 * MIB;
    assert!(inside(&boot.kernel), "{boot:?}");
    if let Some(initrd) = &boot.initrd {
        assert!(inside(initrd) && initrd.start % 4096 == 0, "{boot:?}");
        assert_eq!(bytes_at(&memory, initrd.start, 5000), [1; 5000]);
    }
    boot.apply(&mut Default::default(), &mut Default::default());
}

/// Values that lie in interesting ways.
fn nasty() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..0x1000,
        Just(u64::MAX),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(0x7fff_ffff),
        Just(32 * MIB - 1),
        Just(MIB),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn damaged_images_never_panic(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), nasty(), 1usize..=8), 1..5),
        early in any::<bool>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let seeds = hostile_seeds();
        let (format, mut kernel) = seeds[which.index(seeds.len())].clone();
        for (at, value, size) in damage {
            // Half of the time all the damage is where the headers are.
            let at = at.index(if early { kernel.len().min(0x280) } else { kernel.len() });
            let end = (at + size).min(kernel.len());
            kernel[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        kernel.truncate(cut.index(kernel.len() * 4).max(1));
        check_hostile(format, &kernel);
    }

    #[test]
    fn random_bytes_never_panic(
        format in prop::sample::select(&[
            Format::Auto, Format::BzImage, Format::Elf, Format::Pvh, Format::Linux64,
            Format::Multiboot, Format::Flat,
        ][..]),
        magic in prop::sample::select(vec![&b""[..], b"\x7fELF\x02\x01", b"\x7fELF\x01\x01"]),
        tail in prop::collection::vec(any::<u8>(), 1..4096),
    ) {
        check_hostile(format, &[magic, &tail].concat());
    }
}
