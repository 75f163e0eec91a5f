//! The common configuration structure (virtio 1.2, 4.1.4.3): the registers by which a driver sets a
//! device up.
//!
//! A driver reads and writes each register as a whole, or either half of one with 64 bits. A read of
//! anything else returns the bytes that are there; a write of anything else is refused.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

use super::layout::COMMON_LEN;
use crate::virtio::queue::QueueSetup;

pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// What a driver can say of itself.
const STATUS_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// What the driver has set up.
#[derive(Debug)]
pub(super) struct Common {
    offered: u64,
    taken: u64,
    device_select: u32,
    driver_select: u32,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

/// What of the registers is known elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Elsewhere {
    /// Bits of the device status that the device sets.
    pub(super) status: u8,
    pub(super) generation: u8,
    pub(super) config_vector: u16,
    pub(super) queue_vector: u16,
}

/// What a write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// It was done, here.
    Done,
    /// It means nothing, or not now.
    Refused,
    /// The driver resets the device.
    Reset,
    /// The driver is ready.
    DriverOk,
    /// The driver chooses the vector of configuration changes.
    ConfigVector(u16),
    /// The driver chooses the vector of a queue.
    QueueVector(usize, u16),
}

impl Common {
    /// That of a device after a reset.
    pub(super) fn new(offered: u64, queue_sizes: impl IntoIterator<Item = u16>) -> Self {
        Self {
            offered,
            taken: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.into_iter().map(QueueSetup::new).collect(),
        }
    }

    /// The same again.
    pub(super) fn reset(&mut self) {
        *self =
            Self::new(self.offered, self.queues.iter().map(|queue| queue.most).collect::<Vec<_>>());
    }

    pub(super) fn status(&self) -> u8 {
        self.status
    }

    /// The features the driver took.
    pub(super) fn features(&self) -> u64 {
        self.taken
    }

    pub(super) fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// The queue whose registers are shown, if it exists.
    pub(super) fn selected(&self) -> usize {
        self.queue_select.into()
    }

    /// The driver reads.
    pub(super) fn read(&self, elsewhere: Elsewhere, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(self.selected());
        let word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut all = Vec::with_capacity(COMMON_LEN as usize);
        all.extend(self.device_select.to_le_bytes());
        all.extend(word(self.offered, self.device_select).to_le_bytes());
        all.extend(self.driver_select.to_le_bytes());
        all.extend(word(self.taken, self.driver_select).to_le_bytes());
        all.extend(elsewhere.config_vector.to_le_bytes());
        all.extend((self.queues.len() as u16).to_le_bytes());
        all.extend([self.status | elsewhere.status, elsewhere.generation]);
        all.extend(self.queue_select.to_le_bytes());
        all.extend(queue.map_or(0, |queue| queue.size).to_le_bytes());
        all.extend(elsewhere.queue_vector.to_le_bytes());
        all.extend(u16::from(queue.is_some_and(|queue| queue.enabled)).to_le_bytes());
        all.extend(queue.map_or(0, |_| self.queue_select).to_le_bytes()); // queue_notify_off
        let addresses = queue.map_or([0; 3], |q| [q.descriptors, q.available, q.used]);
        all.extend(addresses.into_iter().flat_map(u64::to_le_bytes));
        // queue_notify_data and queue_reset belong to features that are not offered.
        all.extend([0; 4]);
        let there = usize::try_from(offset).ok().and_then(|at| all.get(at..)).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = there.get(i).copied().unwrap_or(0);
        }
    }

    /// The driver writes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Written {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.device_select = u32::from_le_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => self.driver_select = u32::from_le_bytes([a, b, c, d]),
            (12, &[a, b, c, d]) => return self.take_features(u32::from_le_bytes([a, b, c, d])),
            (16, &[a, b]) => return Written::ConfigVector(u16::from_le_bytes([a, b])),
            (20, &[value]) => return self.write_status(value),
            (22, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (26, &[a, b]) if self.selected() < self.queues.len() => {
                return Written::QueueVector(self.selected(), u16::from_le_bytes([a, b]));
            }
            _ => return self.write_queue(offset, data),
        }
        Written::Done
    }

    /// Half of the features, until the driver is done with them.
    fn take_features(&mut self, half: u32) -> Written {
        if self.status & FEATURES_OK != 0 || self.driver_select > 1 {
            return Written::Refused;
        }
        let shift = 32 * self.driver_select;
        self.taken = self.taken & !(0xffff_ffff << shift) | u64::from(half) << shift;
        Written::Done
    }

    /// Status bits are only ever added. Features that can't be are not acknowledged by `FEATURES_OK`,
    /// and a driver can't be ready without.
    fn write_status(&mut self, value: u8) -> Written {
        if value == 0 {
            return Written::Reset;
        }
        let fresh = value & STATUS_BITS & !self.status;
        let mut accepted = fresh & !FEATURES_OK & !DRIVER_OK;
        if fresh & FEATURES_OK != 0 && self.features_can_be() {
            accepted |= FEATURES_OK;
        }
        if fresh & DRIVER_OK != 0 && (self.status | accepted) & FEATURES_OK != 0 {
            accepted |= DRIVER_OK;
        }
        self.status |= accepted;
        if accepted & DRIVER_OK != 0 {
            Written::DriverOk
        } else if accepted != fresh {
            Written::Refused
        } else {
            Written::Done
        }
    }

    fn features_can_be(&self) -> bool {
        self.taken & !self.offered == 0 && self.taken & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// The registers of the selected queue; not while it is in use.
    fn write_queue(&mut self, offset: u64, data: &[u8]) -> Written {
        let in_use = self.status & DRIVER_OK != 0;
        let selected = self.selected();
        let Some(queue) = self.queues.get_mut(selected).filter(|queue| !in_use && !queue.enabled)
        else {
            return Written::Refused;
        };
        match (offset, data) {
            (24, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if !size.is_power_of_two() || size > queue.most {
                    return Written::Refused;
                }
                queue.size = size;
            }
            (28, &[1, 0]) => queue.enabled = true,
            (32 | 36, [_, _, _, _]) | (32, [_, _, _, _, _, _, _, _]) => {
                put(&mut queue.descriptors, offset - 32, data);
            }
            (40 | 44, [_, _, _, _]) | (40, [_, _, _, _, _, _, _, _]) => {
                put(&mut queue.available, offset - 40, data);
            }
            (48 | 52, [_, _, _, _]) | (48, [_, _, _, _, _, _, _, _]) => {
                put(&mut queue.used, offset - 48, data);
            }
            _ => return Written::Refused,
        }
        Written::Done
    }
}

/// Changes the bytes of a register from `offset` on.
fn put(register: &mut u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    let there = bytes.get_mut(offset as usize..).unwrap_or_default();
    for (byte, new) in there.iter_mut().zip(data) {
        *byte = *new;
    }
    *register = u64::from_le_bytes(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = 1 << 32 | 1 << 29 | 0b101;

    fn common() -> Common {
        Common::new(OFFERED, [256, 64])
    }

    fn read<const N: usize>(common: &Common, offset: u64) -> [u8; N] {
        let elsewhere =
            Elsewhere { status: 0, generation: 7, config_vector: 0xffff, queue_vector: 3 };
        let mut data = [0xee; N];
        common.read(elsewhere, offset, &mut data);
        data
    }

    fn take_features(common: &mut Common, features: u64) -> Written {
        common.write(8, &0u32.to_le_bytes());
        common.write(12, &(features as u32).to_le_bytes());
        common.write(8, &1u32.to_le_bytes());
        common.write(12, &((features >> 32) as u32).to_le_bytes());
        common.write(20, &[1]);
        common.write(20, &[3]);
        common.write(20, &[11])
    }

    #[test]
    fn features_are_offered_and_taken_by_halves() {
        let mut common = common();
        assert_eq!(read(&common, 4), (OFFERED as u32).to_le_bytes());
        common.write(0, &1u32.to_le_bytes());
        assert_eq!(read(&common, 4), 1u32.to_le_bytes());
        common.write(0, &2u32.to_le_bytes());
        assert_eq!(read(&common, 4), [0; 4]);
        assert_eq!(take_features(&mut common, OFFERED), Written::Done);
        assert_eq!((common.features(), read(&common, 20)), (OFFERED, [11]));
        assert_eq!(common.write(12, &[0; 4]), Written::Refused, "too late");
        assert_eq!(common.write(20, &[15]), Written::DriverOk);
        assert_eq!(common.write(20, &[15]), Written::Done, "once");
    }

    #[test]
    fn features_that_can_not_be_are_not_acknowledged() {
        for features in [0, 1, OFFERED | 1 << 40, OFFERED | 1 << 4] {
            let mut common = common();
            assert_eq!(take_features(&mut common, features), Written::Refused);
            assert_eq!(read(&common, 20), [3], "{features:#x}");
            assert_eq!(common.write(20, &[7]), Written::Refused);
            assert_eq!(common.status() & DRIVER_OK, 0, "not ready without features");
        }
        let mut common = common();
        common.write(8, &2u32.to_le_bytes());
        assert_eq!(common.write(12, &[1, 0, 0, 0]), Written::Refused);
    }

    #[test]
    fn status_bits_stay_until_the_reset() {
        let mut common = common();
        common.write(20, &[0x83]);
        assert_eq!(common.write(20, &[1]), Written::Done);
        assert_eq!(read(&common, 20), [0x83]);
        common.write(20, &[0x40 | 0x30]);
        assert_eq!(read(&common, 20), [0x83], "what only the device says, or nobody");
        assert_eq!(common.write(20, &[0]), Written::Reset);
        common.reset();
        assert_eq!(read(&common, 20), [0]);
    }

    #[test]
    fn a_queue_is_set_up_until_it_is_enabled() {
        let mut common = common();
        assert_eq!((read(&common, 18), read(&common, 24)), ([2, 0], [0, 1]));
        common.write(22, &[1, 0]);
        assert_eq!((read(&common, 24), read(&common, 30)), ([64, 0], [1, 0]));
        assert_eq!(common.write(24, &[32, 0]), Written::Done);
        for size in [0u16, 33, 128, 0xffff] {
            assert_eq!(common.write(24, &size.to_le_bytes()), Written::Refused, "{size}");
        }
        common.write(32, &0x1000u32.to_le_bytes());
        common.write(36, &[1, 0, 0, 0]);
        common.write(40, &0x2_0000_0000u64.to_le_bytes());
        common.write(52, &[3, 0, 0, 0]);
        assert_eq!(common.write(28, &[2, 0]), Written::Refused);
        assert_eq!(common.write(28, &[1, 0]), Written::Done);
        let queue = QueueSetup {
            most: 64,
            size: 32,
            enabled: true,
            descriptors: 0x1_0000_1000,
            available: 0x2_0000_0000,
            used: 0x3_0000_0000,
        };
        assert_eq!(common.queues()[1], queue);
        for (offset, data) in [(24, &[16, 0][..]), (28, &[0, 0]), (28, &[1, 0]), (32, &[1; 4])] {
            assert_eq!(common.write(offset, data), Written::Refused, "{offset}");
        }
        assert_eq!(common.queues()[1], queue);
        assert_eq!(read(&common, 32), 0x1_0000_1000u64.to_le_bytes());
    }

    #[test]
    fn a_queue_that_does_not_exist_has_no_size_and_takes_nothing() {
        let mut common = common();
        common.write(22, &[2, 0]);
        assert_eq!(read(&common, 24), [0, 0]);
        assert_eq!(read(&common, 28), [0; 4]);
        for (offset, data) in [(24, &[1, 0][..]), (26, &[0, 0]), (28, &[1, 0]), (32, &[0; 4])] {
            assert_eq!(common.write(offset, data), Written::Refused, "{offset}");
        }
    }

    #[test]
    fn accesses_of_odd_sizes_read_what_is_there_and_write_nothing() {
        let mut common = common();
        assert_eq!(read(&common, 17), [0xff, 2, 0, 0, 7]);
        assert_eq!(read(&common, 58), [0; 8]);
        assert_eq!(read(&common, u64::MAX), [0; 8]);
        let before = format!("{common:?}");
        let registers = [0, 8, 12, 16, 20, 22, 24, 26, 28, 32, 36, 40, 44, 48, 52];
        for offset in (0..70).chain([u64::MAX]) {
            for len in 0..=9 {
                let whole = match (offset, len) {
                    (32 | 40 | 48, 8) => true,
                    (16 | 22 | 24 | 26 | 28, 2) | (20, 1) => true,
                    (0 | 8 | 12 | 32.., 4) => registers.contains(&offset),
                    _ => false,
                };
                if !whole {
                    let data = vec![1; len];
                    assert_eq!(common.write(offset, &data), Written::Refused, "{offset} {len}");
                }
            }
        }
        assert_eq!(format!("{common:?}"), before);
    }
}
