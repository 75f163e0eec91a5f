//! Where the structures of a device are in its BARs, and the capabilities that say so (virtio 1.2,
//! 4.1.4).

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_VSOCK,
};

use crate::pci::{Bar, BarKind, CapabilityError, ConfigSpace, Identity, MSIX_ENTRY};

/// The BAR of the MSI-X table and pending bits.
pub const MSIX_BAR: u8 = 0;
/// The BAR of the registers.
pub const REGISTER_BAR: u8 = 2;

/// Offset of the common configuration.
pub const COMMON: u64 = 0;
/// Offset of the ISR status.
pub const ISR: u64 = PAGE;
/// Offset of the device configuration.
pub const DEVICE: u64 = 2 * PAGE;
/// Offset of the doorbell of the first queue.
pub const NOTIFY: u64 = 3 * PAGE;
/// From the doorbell of a queue to the next.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// Bytes of each structure's place.
pub(super) const PAGE: u64 = 0x1000;
/// Bytes of the registers.
const REGISTERS: u64 = 4 * PAGE;
/// Bytes of the common configuration: up to `queue_reset`.
pub(super) const COMMON_LEN: u32 = 60;

/// The most queues there are doorbells for.
pub(super) const MOST_QUEUES: usize = (PAGE / NOTIFY_MULTIPLIER as u64) as usize;

const VENDOR: u16 = 0x1af4;
/// Device ID of type 0.
const DEVICE_BASE: u16 = 0x1040;
/// A modern device has at least this revision and subsystem ID (4.1.2.1).
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x40;

const VENDOR_CAPABILITY: u8 = 0x09;

/// Types of capabilities: `VIRTIO_PCI_CAP_…`.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// The identity of a device type.
pub(super) fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        VIRTIO_ID_NET => 0x02_00_00,
        VIRTIO_ID_BLOCK => 0x01_80_00,
        VIRTIO_ID_CONSOLE => 0x07_80_00,
        VIRTIO_ID_VSOCK => 0x02_80_00,
        _ => 0xff_00_00,
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE.wrapping_add(device_type as u16),
        revision: REVISION,
        class,
        subsystem: (VENDOR, SUBSYSTEM),
    }
}

/// Where the pending bits are, behind the table of so many vectors, and the size of the BAR.
pub(super) fn msix_layout(vectors: usize) -> (u32, u64) {
    let table = vectors as u64 * MSIX_ENTRY;
    let pending = table.next_power_of_two().max(PAGE / 2);
    let size = pending + (vectors as u64).div_ceil(64) * 8;
    (pending as u32, size.next_power_of_two())
}

/// Describes the BARs and, but for MSI-X, the capabilities. Returns the offset of the one for access
/// through configuration space.
pub(super) fn describe(
    config: &mut ConfigSpace,
    msix_size: u64,
    queues: usize,
    device_config: usize,
) -> Result<u16, CapabilityError> {
    let (kind, prefetchable) = (BarKind::Memory32, false);
    config.add_bar(Bar { index: MSIX_BAR, kind, size: msix_size, prefetchable })?;
    let (kind, prefetchable) = (BarKind::Memory64, true);
    config.add_bar(Bar { index: REGISTER_BAR, kind, size: REGISTERS, prefetchable })?;

    let mut add = |kind, offset: u64, len: u32, extra: &[u8], writable: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, REGISTER_BAR, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(extra);
        config.add_capability(VENDOR_CAPABILITY, &body, writable)
    };
    add(COMMON_CFG, COMMON, COMMON_LEN, &[], &[])?;
    let doorbells = NOTIFY_MULTIPLIER * queues as u32;
    add(NOTIFY_CFG, NOTIFY, doorbells, &NOTIFY_MULTIPLIER.to_le_bytes(), &[])?;
    add(ISR_CFG, ISR, 1, &[], &[])?;
    if device_config > 0 {
        add(DEVICE_CFG, DEVICE, device_config as u32, &[], &[])?;
    }
    // Which BAR, offset and length, and the data, are the driver's.
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.extend([0xff; 12]);
    add(PCI_CFG, 0, 0, &[0; 4], &writable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pending_bits_are_behind_the_table_and_both_fit() {
        for vectors in [1, 2, 64, 127, 128, 129, 1025] {
            let (pending, size) = msix_layout(vectors);
            assert!(vectors as u64 * 16 <= u64::from(pending) && pending % 8 == 0);
            assert!(u64::from(pending) + vectors as u64 / 8 < size && size.is_power_of_two());
        }
        assert_eq!(msix_layout(128), (0x800, 0x1000));
    }

    #[test]
    fn the_capabilities_fit_with_msix() {
        let mut config = ConfigSpace::new(&identity(VIRTIO_ID_BLOCK));
        let at = describe(&mut config, 0x1000, 4, 60).unwrap();
        assert_eq!(config.get::<4>(at.into())[..], [9, 0, 20, 5]);
        assert_eq!(config.get::<4>(0), [0xf4, 0x1a, 0x42, 0x10]);
        config.add_capability(0x11, &[0; 10], &[]).unwrap();
    }
}
