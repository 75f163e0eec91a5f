//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc and
//! xen/include/public/arch-x86/hvm/start_info.h).

use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestMemoryBackend;

use super::linux::BootInfo;
use super::space::{Part, PlaceError, Space};

/// Writes the start info, the module list and the memory map, one after the other, and returns
/// the guest-physical address of the first.
pub(super) fn put_start_info<M: GuestMemoryBackend>(
    space: &mut Space<'_, M>,
    info: &BootInfo,
) -> Result<u64, PlaceError> {
    let entries = space.map().entries();
    let modules = usize::from(info.initrd.is_some());
    let modules_size = modules * size_of::<hvm_modlist_entry>();
    let map_size = entries.len() * size_of::<hvm_memmap_table_entry>();
    let size = size_of::<hvm_start_info>() + modules_size + map_size;

    let start = space.place_low(Part::StartInfo, 16, size)?;
    let modlist = start + size_of::<hvm_start_info>() as u64;
    let memmap = modlist + modules_size as u64;

    let mut bytes = Vec::with_capacity(size);
    bytes.extend(XEN_HVM_START_MAGIC_VALUE.to_le_bytes());
    bytes.extend(1u32.to_le_bytes()); // version: with a memory map
    bytes.extend(0u32.to_le_bytes()); // flags
    bytes.extend((modules as u32).to_le_bytes());
    let modlist = if modules > 0 { modlist } else { 0 };
    for address in [modlist, info.cmdline, info.rsdp, memmap] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend((entries.len() as u32).to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // reserved
    if let Some(Range { start, end }) = info.initrd {
        // Address, size, address of a command line, reserved.
        bytes.extend([start, end - start, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
    }
    for entry in entries {
        let Range { start, end } = entry.range;
        bytes.extend(start.to_le_bytes());
        bytes.extend((end - start).to_le_bytes());
        bytes.extend(u64::from(entry.kind as u32).to_le_bytes()); // type and reserved
    }
    space.write(Part::StartInfo, start, &bytes)?;
    Ok(start)
}
