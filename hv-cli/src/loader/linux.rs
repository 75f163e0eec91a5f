//! Linux's boot parameters, the "zero page" (Linux, Documentation/arch/x86/boot.rst and
//! zero-page.rst).

use std::ops::Range;

use linux_loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::error::Problem;
use super::space::{Part, Space};

/// The magic number "HdrS" of the setup header.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// The most a Linux/x86 command line can have: `COMMAND_LINE_SIZE` less the NUL.
pub(super) const CMDLINE_LIMIT: usize = 2047;
/// `type_of_loader` of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// What the boot parameters say besides the setup header and the memory map.
pub(super) struct BootInfo {
    /// Guest-physical address of the NUL-terminated command line.
    pub(super) cmdline: u64,
    pub(super) initrd: Option<Range<u64>>,
    /// Guest-physical address of the ACPI RSDP; 0 if there is none.
    pub(super) rsdp: u64,
}

/// The setup header for a kernel that came without one (`vmlinux`).
pub(super) fn synthetic_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        version: 0x020f,
        loadflags: LOADED_HIGH,
        kernel_alignment: 16 << 20,
        cmdline_size: CMDLINE_LIMIT as u32,
        ..Default::default()
    }
}

/// Writes the boot parameters and returns their guest-physical address.
pub(super) fn put_boot_params<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    header: setup_header,
    info: &BootInfo,
) -> Result<u64, Problem> {
    let (cmdline_low, cmdline_high) = halves(info.cmdline);
    let initrd = info.initrd.clone().unwrap_or_default();
    let (initrd_low, initrd_high) = halves(initrd.start);
    let (size_low, size_high) = halves(initrd.end - initrd.start);

    let mut params = boot_params {
        hdr: setup_header {
            type_of_loader: LOADER_UNDEFINED,
            cmd_line_ptr: cmdline_low,
            ramdisk_image: initrd_low,
            ramdisk_size: size_low,
            ..header
        },
        ext_cmd_line_ptr: cmdline_high,
        ext_ramdisk_image: initrd_high,
        ext_ramdisk_size: size_high,
        acpi_rsdp_addr: info.rsdp,
        ..Default::default()
    };
    let entries = space.map().entries();
    let too_many =
        || Problem::TooManyRanges { entries: entries.len(), limit: E820_MAX_ENTRIES_ZEROPAGE };
    if entries.len() > E820_MAX_ENTRIES_ZEROPAGE {
        return Err(too_many());
    }
    params.e820_entries = u8::try_from(entries.len()).map_err(|_| too_many())?;
    for (slot, entry) in params.e820_table.iter_mut().zip(entries) {
        let Range { start, end } = entry.range;
        *slot = boot_e820_entry { addr: start, size: end - start, r#type: entry.kind as u32 };
    }
    Ok(space.put_low(Part::BootParams, 4096, params.as_slice())?)
}

/// The low and the high half of `value`.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
