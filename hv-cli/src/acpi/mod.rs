//! The ACPI tables of the machine: RSDP, XSDT, FADT, FACS, MADT and DSDT (ACPI Specification 6.5), and
//! with PCI the MCFG (PCI Firmware Specification 3.3, 4.1.2).
//!
//! They describe what the other modules provide and the addresses in [`crate::layout`]; nothing
//! is decided here. The platform is not hardware-reduced: Linux would then leave out the PIC and
//! the PIT, which are there.

mod dsdt;
mod fadt;
mod madt;
mod pci;

use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::layout;
use crate::pci::Windows;

const OEM_ID: [u8; 6] = *b"HV    ";
const OEM_TABLE_ID: [u8; 8] = *b"HVTABLES";
const OEM_REVISION: u32 = 1;
/// Size of the header all tables but RSDP and FACS start with.
const HEADER: u32 = 36;
/// Tables start at multiples of this; the FACS has to.
const ALIGN: u64 = 64;
/// The most CPUs the names of their objects can tell apart.
const MAX_CPUS: u32 = 0x1000;

/// What the tables describe besides the devices that are always there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of CPUs; their APIC ids count from 0.
    pub cpus: u32,
    /// Whether there is an I/O APIC, in KVM or outside.
    pub io_apic: bool,
    /// Whether there is a pair of 8259 PICs.
    pub pic: bool,
    /// The PCI bus, if there is one.
    pub pci: Option<AcpiPci>,
}

/// What the tables say of the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiPci {
    /// Where BARs can be.
    pub windows: Windows,
    /// The highest slot that has a device.
    pub last_slot: u8,
}

/// Why there are no tables.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// The tables would leave the BIOS area.
    #[error(
        "the ACPI tables for {cpus} CPUs don't fit in the {} bytes of the BIOS area; use fewer CPUs",
        layout::HIGH_RAM_START - layout::BIOS_START
    )]
    TooManyCpus {
        /// Number of CPUs.
        cpus: u32,
    },
    /// The guest has no memory where the tables belong.
    #[error("the ACPI tables can't be written to {at:#x}: give the guest at least 1 MiB of memory")]
    Write {
        /// Guest-physical address.
        at: u64,
    },
}

/// Writes the tables to the BIOS area of `memory` and returns the address of the RSDP.
///
/// # Errors
/// The tables for that many CPUs don't fit, or the guest has less than 1 MiB of memory.
pub fn build<M: GuestMemoryBackend>(
    memory: &M,
    config: &AcpiConfig,
) -> Result<GuestAddress, AcpiError> {
    if config.cpus > MAX_CPUS {
        return Err(AcpiError::TooManyCpus { cpus: config.cpus });
    }
    let mut area = Area { memory, cpus: config.cpus, next: layout::BIOS_START };
    // The RSDP points to what is placed after it, but has to be found first.
    let rsdp = area.reserve(Rsdp::len())?;
    let facs = area.put(&FACS::new())?;
    let dsdt = area.put(&dsdt::dsdt(config))?;
    let fadt = area.put(&fadt::fadt(facs, dsdt))?;
    let madt = area.put(&madt::madt(config))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if config.pci.is_some() {
        xsdt.add_entry(area.put(&pci::mcfg())?);
    }
    let xsdt = area.put(&xsdt)?;
    area.write(rsdp, &bytes(&Rsdp::new(OEM_ID, xsdt)))?;
    Ok(GuestAddress(rsdp))
}

/// The part of the BIOS area that is still free.
struct Area<'a, M> {
    memory: &'a M,
    cpus: u32,
    next: u64,
}

impl<M: GuestMemoryBackend> Area<'_, M> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let bytes = bytes(table);
        let at = self.reserve(bytes.len())?;
        self.write(at, &bytes)?;
        Ok(at)
    }

    fn reserve(&mut self, size: usize) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at.saturating_add(size as u64);
        if end > layout::HIGH_RAM_START {
            return Err(AcpiError::TooManyCpus { cpus: self.cpus });
        }
        self.next = end.next_multiple_of(ALIGN);
        Ok(at)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), AcpiError> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(|_| AcpiError::Write { at })
    }
}

/// A table with the standard header and this body.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory(size: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `at`, whole and with its checksum checked.
    fn table_at(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let len = u32_at(&read(memory, at, 8), 4);
        assert!(at + u64::from(len) <= layout::HIGH_RAM_START);
        let table = read(memory, at, len as usize);
        assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
        table
    }

    /// FADT, MADT and DSDT, found as an operating system does.
    fn tables(cpus: u32, io_apic: bool, pic: bool) -> [Vec<u8>; 3] {
        let memory = memory(1 << 20);
        let rsdp_at = build(&memory, &AcpiConfig { cpus, io_apic, pic, pci: None }).unwrap();
        assert_eq!((rsdp_at.0 % 16, rsdp_at.0 >= layout::BIOS_START), (0, true));
        let rsdp = read(&memory, rsdp_at.0, 36);
        assert_eq!(rsdp[..8], *b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp), rsdp[15]), (0, 0, 2));
        let xsdt = table_at(&memory, u64_at(&rsdp, 24));
        assert_eq!((xsdt[..4].to_vec(), xsdt.len()), (b"XSDT".to_vec(), 36 + 2 * 8));
        let [fadt, madt] = [36, 44].map(|at| table_at(&memory, u64_at(&xsdt, at)));
        let dsdt = table_at(&memory, u64_at(&fadt, 140));
        let facs_at = u32_at(&fadt, 36);
        assert_eq!(read(&memory, facs_at.into(), 8)[..], [b'F', b'A', b'C', b'S', 64, 0, 0, 0]);
        assert_eq!(facs_at % 64, 0);
        assert_eq!(
            (&fadt[..4], &madt[..4], &dsdt[..4]),
            (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..])
        );
        [fadt, madt, dsdt]
    }

    /// The entries of a MADT by type.
    fn madt_entries(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (entry, after) = rest.split_at(rest[1].into());
            entries.push((entry[0], entry[2..].to_vec()));
            rest = after;
        }
        entries
    }

    #[test]
    fn fadt_has_power_off_and_reset_where_the_devices_are() {
        let [fadt, ..] = tables(1, true, true);
        assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
        let u16_at = |at: usize| u16::from_le_bytes([fadt[at], fadt[at + 1]]);
        assert_eq!(u16_at(46), 9); // SCI_INT
        assert_eq!((u32_at(&fadt, 48), fadt[52], fadt[53]), (0, 0, 0)); // always in ACPI mode
        assert_eq!((u32_at(&fadt, 56), fadt[88]), (0x600, 4)); // PM1a_EVT
        assert_eq!((u32_at(&fadt, 64), fadt[89]), (0x604, 2)); // PM1a_CNT
        assert_eq!((u32_at(&fadt, 76), fadt[91]), (0, 0)); // no PM timer
        assert_eq!(u16_at(109), 0b111); // devices, an 8042, no VGA
        let flags = u32_at(&fadt, 112);
        assert_eq!((flags >> 10 & 1, flags >> 20 & 1), (1, 0)); // reset, not hardware-reduced
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!((u64_at(&fadt, 120), fadt[128]), (0xcf9, 6));
        assert_eq!((fadt[148..152].to_vec(), u64_at(&fadt, 152)), (vec![1, 32, 0, 2], 0x600));
        assert_eq!((fadt[172..176].to_vec(), u64_at(&fadt, 176)), (vec![1, 16, 0, 2], 0x604));
    }

    #[test]
    fn madt_lists_cpus_the_io_apic_and_the_overrides() {
        let [_, madt, _] = tables(2, true, true);
        assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
        assert_eq!(
            madt_entries(&madt),
            [
                (0, vec![0, 0, 1, 0, 0, 0]),
                (0, vec![1, 1, 1, 0, 0, 0]),
                (1, vec![0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
                (2, vec![0, 0, 2, 0, 0, 0, 0, 0]),
                (2, vec![0, 9, 9, 0, 0, 0, 0xd, 0]),
            ]
        );
        let [_, madt, _] = tables(1, true, false);
        assert_eq!((u32_at(&madt, 40), madt_entries(&madt).len()), (0, 4));
        let [_, madt, _] = tables(1, false, false);
        assert_eq!(madt_entries(&madt), [(0, vec![0, 0, 1, 0, 0, 0])]);
    }

    #[test]
    fn cpus_from_255_on_are_x2apics() {
        let [_, madt, dsdt] = tables(300, true, true);
        let entries = madt_entries(&madt);
        assert_eq!(entries[254], (0, vec![254, 254, 1, 0, 0, 0]));
        assert_eq!(entries[255], (9, vec![0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]));
        assert_eq!(entries.iter().filter(|(kind, _)| *kind == 9).count(), 45);
        assert!(dsdt.windows(4).any(|name| name == b"C12B"));
        assert!(!dsdt.windows(4).any(|name| name == b"C12C"));
    }

    #[test]
    fn dsdt_has_s5_com1_and_the_processors() {
        let [.., dsdt] = tables(2, true, true);
        let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|at| at == bytes);
        // Name(\_S5, Package(4) {5, 5, 0, 0}).
        assert!(has(b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\0\0"));
        // EISAID("PNP0501"); I/O of 8 ports at 0x3f8; edge-triggered interrupt 4.
        assert!(has(&[0x0c, 0x41, 0xd0, 0x05, 0x01]));
        assert!(has(&[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8]));
        assert!(has(&[0x89, 6, 0, 3, 1, 4, 0, 0, 0]));
        assert!(has(b"ACPI0007") && has(b"C000") && has(b"C001") && !has(b"C002"));
    }

    #[test]
    fn a_pci_bus_is_in_mcfg_and_dsdt_and_only_then() {
        let memory = memory(1 << 20);
        let dsdt_and_mcfg = |pci: Option<AcpiPci>| {
            let with_mcfg = pci.is_some();
            let config = AcpiConfig { cpus: 1, io_apic: true, pic: true, pci };
            let rsdp = build(&memory, &config).unwrap();
            let xsdt = table_at(&memory, u64_at(&read(&memory, rsdp.0, 36), 24));
            let fadt = table_at(&memory, u64_at(&xsdt, 36));
            let overrides = madt_entries(&table_at(&memory, u64_at(&xsdt, 44)));
            assert_eq!(overrides.contains(&(2, vec![0, 11, 11, 0, 0, 0, 0xf, 0])), with_mcfg);
            let mcfg = with_mcfg.then(|| table_at(&memory, u64_at(&xsdt, 52)));
            (table_at(&memory, u64_at(&fadt, 140)), mcfg)
        };
        let windows =
            Windows { low: 0xc000_0000..0xd000_0000, high: Some(0x4_0000_0000..0x8_0000_0000) };
        let (dsdt, mcfg) = dsdt_and_mcfg(Some(AcpiPci { windows, last_slot: 2 }));
        let mcfg = mcfg.unwrap();
        assert_eq!((&mcfg[..4], mcfg.len()), (&b"MCFG"[..], 60));
        assert_eq!((u64_at(&mcfg, 44), mcfg[52..56].to_vec()), (0xe000_0000, vec![0; 4]));
        let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|at| at == bytes);
        assert!(has(b"PCI0") && has(b"_PRT") && has(&[0x0c, 0x41, 0xd0, 0x0a, 0x08]));
        // A 32-bit window and a 64-bit one: first and last address.
        assert!(has(&[0, 0, 0, 0xc0, 0xff, 0xff, 0xff, 0xcf]));
        assert!(has(&[0, 0, 0, 0, 4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 7, 0, 0, 0]));
        // Two routes: slots 1 and 2, INTA, GSI 11.
        assert!(has(&[0x0c, 0xff, 0xff, 1, 0, 0, 0, 0x0a, 11]), "{dsdt:x?}");
        assert!(has(&[0x0c, 0xff, 0xff, 2, 0, 0, 0, 0x0a, 11]));
        assert!(!has(&[0x0c, 0xff, 0xff, 3, 0]));
        // ECAM is claimed: Memory32Fixed.
        assert!(has(&[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x10, 0]));
        let (dsdt, mcfg) = dsdt_and_mcfg(None);
        assert!(mcfg.is_none() && !dsdt.windows(4).any(|at| at == b"PCI0"));
    }

    #[test]
    fn as_many_cpus_as_fit_and_an_error_beyond() {
        let memory = memory(1 << 20);
        let fits = |cpus| build(&memory, &AcpiConfig { cpus, io_apic: true, pic: true, pci: None });
        assert!(fits(2048).is_ok());
        for cpus in [4096, 4097, u32::MAX] {
            assert_eq!(fits(cpus), Err(AcpiError::TooManyCpus { cpus }));
        }
        // What does not fit does not reach the kernel behind the area either.
        let mut after = [0; 16];
        let two = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert!(
            build(&two, &AcpiConfig { cpus: 4096, io_apic: true, pic: true, pci: None }).is_err()
        );
        two.read_slice(&mut after, GuestAddress(layout::HIGH_RAM_START)).unwrap();
        assert_eq!(after, [0; 16]);
    }

    #[test]
    fn a_guest_without_the_bios_area_is_an_error() {
        let config = AcpiConfig { cpus: 1, io_apic: true, pic: true, pci: None };
        assert!(matches!(build(&memory(0x8_0000), &config), Err(AcpiError::Write { .. })));
    }
}
