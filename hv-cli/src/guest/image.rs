//! The guest's code: assembled into a read-only section of the program, never executed there.
//!
//! This is the only part of the guest that needs `unsafe`: naming what the assembler made. The
//! image must stay free of relocations, because nothing applies them to the copy in the guest.

#![allow(
    unsafe_code,
    reason = "the image is assembled by global_asm! and named by an extern static"
)]

use super::check::Check;
use super::protocol::{
    BANNER, DOORBELL_OTHER, DOORBELL_RINGS, DOORBELL_VALUE, LOOPBACK, MMIO, PORTS, mmio, port,
    vector,
};
use crate::layout;

/// Where the image goes: below 1 MiB, so that the second CPU can start in it. The stacks are below.
pub(super) const BASE: u64 = layout::FLAT_IMAGE;
/// Offset of the first instruction of the boot CPU. Other CPUs start at offset 0.
pub(super) const ENTRY: u64 = 0x100;
/// Offset of the GDT: 64-bit code at selector 0x10, data at 0x18.
pub(super) const GDT: u64 = PAGE_TABLES - 0x20;
/// Offset of the PML4. The first and the fourth GiB are mapped one to one.
pub(super) const PAGE_TABLES: u64 = 0x2000;
/// Bytes of the image.
pub(super) const SIZE: usize = 0x6000;

core::arch::global_asm!(
    include_str!("start.S"),
    include_str!("io.S"),
    include_str!("interrupts.S"),
    include_str!("tables.S"),
    base = const BASE,
    check_count = const Check::ALL.len(),
    banner_len = const BANNER.len(),
    entry = const ENTRY,
    gdt = const GDT,
    page_tables = const PAGE_TABLES,
    size = const SIZE,
    lapic = const layout::LOCAL_APIC,
    ioapic = const layout::IO_APIC,
    com1 = const layout::COM1_PORT,
    com1_pin = const layout::COM1_IRQ,
    com1_vector = const vector::COM1,
    loopback = const LOOPBACK,
    ports = const PORTS,
    begin = const port::BEGIN,
    value = const port::VALUE,
    done = const port::DONE,
    end = const port::END,
    checks = const port::CHECKS,
    send = const port::SEND,
    fault = const port::FAULT,
    data = const port::DATA,
    string = const port::STRING,
    mmio = const MMIO,
    mmio_data = const mmio::DATA,
    mmio_string = const mmio::STRING,
    mmio_rom = const mmio::ROM,
    buffer_len = const mmio::STRING_LEN,
    doorbell = const mmio::DOORBELL,
    doorbell_value = const DOORBELL_VALUE,
    doorbell_other = const DOORBELL_OTHER,
    doorbell_rings = const DOORBELL_RINGS,
    pit = const vector::PIT,
    pin0 = const vector::PIN0,
    timer = const vector::TIMER,
    msi = const vector::MSI,
    irqfd = const vector::IRQFD,
    ping = const vector::PING,
    pong = const vector::PONG,
    spurious = const vector::SPURIOUS,
    vectors = const vector::COUNT,
);

// SAFETY: the assembly above defines this symbol, `SIZE` bytes long (its last directive pads it
// to exactly that), in a read-only section, so that nothing ever changes it.
unsafe extern "C" {
    safe static hv_guest_image: [u8; SIZE];
}

// A real-mode segment that starts at a page, as SIPI needs it, and ends in low RAM.
const _: () = assert!(BASE.is_multiple_of(0x1_0000) && SIZE <= 0x1_0000);
const _: () = assert!(BASE + SIZE as u64 <= layout::EBDA_START);

/// The image, to be copied to [`BASE`].
pub(super) fn image() -> &'static [u8; SIZE] {
    &hv_guest_image
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, Mnemonic};

    fn at<const N: usize>(offset: u64) -> [u8; N] {
        *image()[offset as usize..].first_chunk().unwrap()
    }

    fn word(offset: u64) -> u64 {
        u64::from_le_bytes(at(offset))
    }

    #[test]
    fn both_entries_hold_the_code_they_should() {
        let first = |bits, offset| {
            let code = at::<15>(offset);
            Decoder::with_ip(bits, &code, BASE + offset, 0).decode()
        };
        assert_eq!(first(16, 0).mnemonic(), Mnemonic::Cli);
        let boot = first(64, ENTRY);
        assert_eq!((boot.mnemonic(), boot.immediate32() as u64), (Mnemonic::Mov, BASE));
    }

    #[test]
    fn the_gdt_has_the_segments_of_the_boot_state() {
        assert_eq!([word(GDT), word(GDT + 8)], [0, 0]);
        assert_eq!(word(GDT + 0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(word(GDT + 0x18), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn page_tables_map_what_the_guest_touches_to_itself() {
        let translate = |address: u64| {
            let mut table = BASE + PAGE_TABLES;
            for shift in [39, 30] {
                let entry = word(table - BASE + (address >> shift & 511) * 8);
                if entry & 3 != 3 {
                    return None;
                }
                table = entry & !0xfff;
            }
            let entry = word(table - BASE + (address >> 21 & 511) * 8);
            (entry & 0x83 == 0x83).then_some((entry & !0x1f_ffff) | (address & 0x1f_ffff))
        };
        let devices = [MMIO, layout::IO_APIC.into(), u64::from(layout::LOCAL_APIC) + 0x300];
        for address in [0, BASE, BASE + SIZE as u64].into_iter().chain(devices) {
            assert_eq!(translate(address), Some(address), "{address:#x}");
        }
        assert_eq!(translate(1 << 30), None);
        assert_eq!(translate(1 << 32), None);
    }

    #[test]
    fn the_banner_is_what_the_host_expects() {
        assert!(image().windows(BANNER.len()).any(|bytes| bytes == BANNER.as_bytes()));
    }
}
