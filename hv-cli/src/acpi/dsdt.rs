//! The differentiated system description table: what only AML can say (ACPI 6.5, 5.2.11.1).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, pci, table};
use crate::layout;

/// Revision 2: integers have 64 bits.
const REVISION: u8 = 2;

pub(super) fn dsdt(config: &AcpiConfig) -> Sdt {
    let mut devices = Vec::new();
    com1(&mut devices);
    if let Some(bus) = &config.pci {
        pci::host_bridge(&mut devices, bus);
    }
    for id in 0..config.cpus {
        processor(&mut devices, id);
    }
    let mut body = Vec::new();
    // SLP_TYP for PM1a and PM1b control, and two reserved numbers.
    let sleep_type = layout::SLEEP_TYPE_S5;
    let s5 = Package::new(vec![&sleep_type, &sleep_type, &0u8, &0u8]);
    Name::new(Path::new("\\_S5_"), &s5).to_aml_bytes(&mut body);
    body.extend(Scope::raw(Path::new("\\_SB_"), devices));
    table(*b"DSDT", REVISION, &body)
}

/// COM1, a 16550.
fn com1(aml: &mut Vec<u8>) {
    let port = layout::COM1_PORT;
    let ports = IO::new(port, port, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_IRQ.into());
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    let id = Name::new(Path::new("_HID"), &EISAName::new("PNP0501"));
    let unique = Name::new(Path::new("_UID"), &0u8);
    let resources = Name::new(Path::new("_CRS"), &resources);
    Device::new(Path::new("COM1"), vec![&id, &unique, &resources]).to_aml_bytes(aml);
}

/// The processor with this number, which its MADT entry has as UID.
fn processor(aml: &mut Vec<u8>, id: u32) {
    let name = Path::new(&format!("C{id:03X}"));
    let unique = Name::new(Path::new("_UID"), &id);
    let id = Name::new(Path::new("_HID"), &"ACPI0007");
    Device::new(name, vec![&id, &unique]).to_aml_bytes(aml);
}
