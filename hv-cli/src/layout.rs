//! Where things are in the guest: physical addresses, I/O ports and interrupt lines.
//!
//! One place, so that the devices, the ACPI tables and the loaders agree. Constants only; nothing
//! here decides anything.

/// Lowest address used for boot data. The page below keeps the real-mode interrupt vectors and
/// the BIOS data area.
pub const BOOT_DATA_START: u64 = 0x1000;
/// End of the range for boot data (boot parameters, page tables, GDT, command line).
///
/// Linux's own decompressor may use the memory just below 0x9f000 as a trampoline while it still
/// runs on our page tables, so they stay clear of it.
pub const BOOT_DATA_END: u64 = 0x9_0000;
/// Where a flat binary is loaded and entered, in real mode.
pub const FLAT_IMAGE: u64 = 0x1_0000;
/// Extended BIOS data area: the end of low RAM.
pub const EBDA_START: u64 = 0x9_fc00;
/// The legacy video window; no RAM is reported from here up to [`BIOS_START`].
pub const VGA_START: u64 = 0xa_0000;
/// Start of the BIOS area that operating systems scan for the RSDP; holds the ACPI tables.
pub const BIOS_START: u64 = 0xe_0000;
/// End of the BIOS area and start of extended memory (1 MiB); protected-mode kernels go here.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// End of low RAM (3 GiB): from here to [`MMIO_HOLE_END`] are devices.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the device hole (4 GiB); RAM continues here. Boot page tables map everything below.
pub const MMIO_HOLE_END: u64 = 1 << 32;
/// Where memory BARs of PCI devices go below 4 GiB: the start of the device hole.
pub const PCI_WINDOW_START: u64 = MMIO_HOLE_START;
/// End of that.
pub const PCI_WINDOW_END: u64 = 0xd000_0000;
/// Bytes of the window for memory BARs above RAM, to which its start is aligned (16 GiB).
pub const PCI_HIGH_WINDOW: u64 = 1 << 34;
/// The configuration space of PCI bus 0 in memory (ECAM), 1 MiB; room for the other buses follows.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Register window of the I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Register window of the local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// First I/O port of COM1, a 16550 (8 ports).
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u8 = 4;
/// I/O port of the PM1a event block: status and enable, 2 bytes each (ACPI 6.5, 4.8.3.1).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// I/O port of the PM1a control block, 2 bytes (ACPI 6.5, 4.8.3.2). Writing
/// [`SLEEP_TYPE_S5`]` << 10 | 1 << 13` powers the VM off.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// The SLP_TYP value of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// First of the 8 ports of PCI configuration, when there is PCI.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Interrupt line that all PCI devices share as INTA, level triggered. On both interrupt controllers.
pub const PCI_IRQ: u8 = 11;
/// I/O port of the ACPI reset register.
pub const RESET_PORT: u16 = 0xcf9;
/// Value that resets the VM when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x06;
/// Interrupt line of the ACPI system control interrupt, level triggered, active high.
pub const SCI_IRQ: u8 = 9;
