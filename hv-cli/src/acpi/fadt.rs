//! The fixed ACPI description table: power-off, reset and what legacy hardware there is
//! (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

// IAPC_BOOT_ARCH: there are devices to be probed for on the ISA bus, an 8042, and no VGA.
const LEGACY_DEVICES: u16 = 1 << 0;
const HAS_8042: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;

/// The FADT, with the addresses of FACS and DSDT (both below 4 GiB).
///
/// There is no SMI command, so ACPI mode is always on; no PM timer and no GPEs.
pub(super) fn fadt(facs: u64, dsdt: u64) -> FADT {
    let io =
        |bits, access, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button, and the RTC can't wake anything. The power button is a fixed one.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::from(layout::SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io(32, AccessSize::WordAccess, layout::PM1A_EVENT_PORT);
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io(16, AccessSize::WordAccess, layout::PM1A_CONTROL_PORT);
    fadt.reset_reg = io(8, AccessSize::ByteAccess, layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | HAS_8042 | NO_VGA).into();
    fadt.finalize()
}
