//! The multiple APIC description table: CPUs and interrupt controllers (ACPI 6.5, 5.2.12).

use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, table};
use crate::layout;

const REVISION: u8 = 5;
/// MADT flag: there are 8259 PICs too, to be masked.
const PCAT_COMPAT: u32 = 1;
/// CPU flag: it can be started.
const ENABLED: u32 = 1;
/// The APIC id that means all CPUs; from here on only x2APIC structures will do.
const FIRST_X2APIC: u8 = 255;
/// Interrupt override flags: as the bus has it, or active high and level triggered.
const CONFORMING: u16 = 0;
const HIGH_LEVEL: u16 = 0b1101;
/// Active low and level triggered, as PCI is.
const LOW_LEVEL: u16 = 0b1111;

pub(super) fn madt(config: &AcpiConfig) -> Sdt {
    let flags = if config.pic { PCAT_COMPAT } else { 0 };
    let mut body = Vec::new();
    body.extend(layout::LOCAL_APIC.to_le_bytes());
    body.extend(flags.to_le_bytes());
    for id in 0..config.cpus {
        match u8::try_from(id) {
            Ok(id) if id < FIRST_X2APIC => {
                body.extend([0, 8, id, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                body.extend([9, 16, 0, 0]);
                body.extend([id, ENABLED, id].iter().flat_map(|field| field.to_le_bytes()));
            }
        }
    }
    if config.io_apic {
        body.extend([1, 12, 0, 0]); // the I/O APIC, id 0
        body.extend(layout::IO_APIC.to_le_bytes());
        body.extend(0u32.to_le_bytes()); // its first GSI
        // The PIT is on pin 2; the SCI is not edge triggered as ISA interrupts are.
        interrupt_override(&mut body, 0, 2, CONFORMING);
        interrupt_override(&mut body, layout::SCI_IRQ, layout::SCI_IRQ, HIGH_LEVEL);
        // Nor is that of PCI. Without PICs, Linux does not change an ISA interrupt to what _PRT says.
        if config.pci.is_some() {
            interrupt_override(&mut body, layout::PCI_IRQ, layout::PCI_IRQ, LOW_LEVEL);
        }
    }
    table(*b"APIC", REVISION, &body)
}

fn interrupt_override(body: &mut Vec<u8>, irq: u8, gsi: u8, flags: u16) {
    body.extend([2, 10, 0, irq]);
    body.extend(u32::from(gsi).to_le_bytes());
    body.extend(flags.to_le_bytes());
}
