//! The device configuration space (virtio 1.2, 2.5): a few bytes that the driver and the device share.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The device configuration space of a device. Clones share it.
///
/// The driver reads it at any time and writes the parts that are writable; the device changes it with
/// [`Session::change_config`](super::Session::change_config), and finds there what the driver wrote.
/// What is beyond its end reads as 0, and writes to it are ignored.
///
/// ```
/// use hv_cli::virtio::DeviceConfig;
///
/// // A balloon: num_pages is the device's, actual the driver's (virtio 1.2, 5.5.4).
/// let config = DeviceConfig::new([0; 8]).writable(4..8);
/// config.set(0, &256u32.to_le_bytes());
/// let mut actual = [0; 4];
/// config.get(4, &mut actual);
/// assert_eq!(u32::from_le_bytes(actual), 0);
/// ```
#[derive(Debug, Clone, Default)]
pub struct DeviceConfig(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    writable: Vec<Range<usize>>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// Changes when the device changes the bytes (config_generation, virtio 1.2, 4.1.4.3).
    generation: u8,
    /// Whether the driver has written since the device last looked.
    written: bool,
}

impl DeviceConfig {
    /// A space with these bytes, none of which the driver may write.
    #[must_use]
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        let state = Mutex::new(State { bytes: bytes.into(), ..State::default() });
        Self(Arc::new(Shared { state, writable: Vec::new() }))
    }

    /// Lets the driver write these bytes. Before the space is shared.
    #[must_use]
    pub fn writable(mut self, range: Range<usize>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.0) {
            shared.writable.push(range);
        }
        self
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state().bytes.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads, by the device or the driver.
    pub fn get(&self, offset: usize, data: &mut [u8]) {
        let state = self.state();
        let there = state.bytes.get(offset..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = there.get(i).copied().unwrap_or(0);
        }
    }

    /// The device changes bytes. The driver is not told: that is
    /// [`Session::change_config`](super::Session::change_config).
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut state = self.state();
        let mut changed = false;
        let there = state.bytes.get_mut(offset..).unwrap_or_default();
        for (byte, new) in there.iter_mut().zip(data) {
            changed |= byte != new;
            *byte = *new;
        }
        if changed {
            state.generation = state.generation.wrapping_add(1);
        }
    }

    /// The driver writes. Returns whether it may, to all of these bytes; otherwise nothing is written.
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> bool {
        let end = offset.saturating_add(data.len());
        let inside = |range: &Range<usize>| range.start <= offset && end <= range.end;
        if data.is_empty() || !self.0.writable.iter().any(inside) {
            return false;
        }
        let mut state = self.state();
        let Some(bytes) = state.bytes.get_mut(offset..end) else { return false };
        bytes.copy_from_slice(data);
        state.written = true;
        true
    }

    /// Whether the driver has written since this was last asked.
    pub(crate) fn take_written(&self) -> bool {
        std::mem::take(&mut self.state().written)
    }

    /// Changes whenever the device changes something.
    pub(crate) fn generation(&self) -> u8 {
        self.state().generation
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(config: &DeviceConfig, offset: usize) -> [u8; N] {
        let mut data = [0xee; N];
        config.get(offset, &mut data);
        data
    }

    #[test]
    fn the_driver_writes_only_what_is_writable_and_all_or_nothing() {
        let config = DeviceConfig::new([1, 2, 3, 4]).writable(2..4);
        assert!(config.write(2, &[9]) && config.write(2, &[7, 8]));
        assert!(config.take_written() && !config.take_written());
        for (offset, data) in [(0, &[9][..]), (1, &[9, 9]), (3, &[9, 9]), (4, &[9]), (2, &[])] {
            assert!(!config.write(offset, data), "{offset}, {data:?}");
        }
        assert!(!config.write(usize::MAX, &[1, 2]));
        assert_eq!(read(&config, 0), [1, 2, 7, 8]);
        assert!(!config.take_written());
        assert_eq!(config.generation(), 0, "the driver knows what it writes");
    }

    #[test]
    fn a_writable_range_beyond_the_end_is_not_there() {
        let config = DeviceConfig::new([1]).writable(0..8);
        assert!(!config.write(0, &[1, 2]));
        assert!(config.write(0, &[5]));
    }

    #[test]
    fn the_generation_tells_of_changes_and_the_end_reads_zero() {
        let config = DeviceConfig::new([1, 2]);
        config.set(0, &[1]);
        assert_eq!(config.generation(), 0);
        config.set(1, &[3, 4, 5]);
        assert_eq!(config.generation(), 1);
        assert_eq!(read(&config, 1), [3, 0, 0]);
        assert_eq!(read(&config, usize::MAX), [0, 0]);
        assert_eq!(config.len(), 2);
    }
}
