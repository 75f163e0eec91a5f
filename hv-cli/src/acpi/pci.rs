//! The PCI bus in the tables: MCFG, and the host bridge in the DSDT (PCI Firmware Specification 3.3,
//! 4.1; ACPI 6.5, 6.2.13 for the interrupts).

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package, Path,
    ResourceTemplate,
};
use acpi_tables::mcfg::MCFG;

use super::{AcpiPci, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;
use crate::pci::Ecam;

/// Where bus 0 is in memory.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    mcfg
}

/// The host bridge with its windows and interrupts, and what keeps ECAM from being used otherwise.
pub(super) fn host_bridge(aml: &mut Vec<u8>, pci: &AcpiPci) {
    let windows = &pci.windows;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let port = layout::PCI_CONFIG_PORT;
    let ports = IO::new(port, port, 1, 8);
    let Range { start, end } = windows.low;
    // Both are below 4 GiB.
    let (start, last) = (start as u32, (end - 1) as u32);
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let low = AddressSpace::new_memory(not_cacheable, true, start, last, None);
    let high = windows.high.as_ref().map(|Range { start, end }| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, *start, end - 1, None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &ports, &low];
    if let Some(high) = &high {
        resources.push(high);
    }
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources));

    // INTA of every device is the one line: the address of the slot with any function, the pin, no
    // link device, the GSI. For what there is only: some guests are slow to read it.
    let line = u32::from(layout::PCI_IRQ);
    let slots = 1..=u32::from(pci.last_slot);
    let addresses: Vec<u32> = slots.map(|slot| slot << 16 | 0xffff).collect();
    let route = |address| Package::new(vec![address, &0u8, &0u8, &line]);
    let routes: Vec<Package<'_>> = addresses.iter().map(|address| route(address)).collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    let routes = Name::new(Path::new("_PRT"), &routes);

    let id = Name::new(Path::new("_HID"), &EISAName::new("PNP0A08"));
    let compatible = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let zero = |name| Name::new(Path::new(name), &0u8);
    let (address, segment, number, unique) =
        (zero("_ADR"), zero("_SEG"), zero("_BBN"), zero("_UID"));
    let children: Vec<&dyn Aml> =
        vec![&id, &compatible, &address, &segment, &number, &unique, &resources, &routes];
    Device::new(Path::new("PCI0"), children).to_aml_bytes(aml);

    // ECAM is to be claimed by a motherboard resource, not by the bridge (4.1.2, note 2).
    let ecam = Memory32Fixed::new(true, layout::PCI_ECAM as u32, Ecam::SIZE as u32);
    let id = Name::new(Path::new("_HID"), &EISAName::new("PNP0C02"));
    let unique = Name::new(Path::new("_UID"), &0u8);
    let resources = Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam]));
    Device::new(Path::new("ECAM"), vec![&id, &unique, &resources]).to_aml_bytes(aml);
}
