//! The bus: which function a configuration access is for, and where the BARs are.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config::SIZE;
use super::{Bar, BarKind, CapabilityError, ConfigSpace, HostBridge, MEMORY_SPACE};

/// Devices of a bus.
const SLOTS: usize = 32;

/// Bytes of the configuration space of a function in ECAM.
const ECAM_FUNCTION: u64 = 4096;

/// A function on the bus.
///
/// The bus reads and writes its configuration space through these methods and looks afterwards what
/// has become of the command register and the BARs.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Its configuration space, for the bus to place its BARs before the machine runs.
    fn config_mut(&mut self) -> &mut ConfigSpace;

    /// The guest reads the configuration space. What is beyond 256 bytes reads as 0.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes the configuration space.
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config_mut().write(offset, data);
    }

    /// The guest reads a BAR. `offset` is in it; the access may reach past its end.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let _ = (bar, offset);
        data.fill(0);
    }

    /// The guest writes a BAR. `offset` is in it; the access may reach past its end.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let _ = (bar, offset, data);
    }

    /// A BAR is now at this address, or nowhere.
    fn bar_mapped(&mut self, bar: u8, address: Option<u64>) {
        let _ = (bar, address);
    }
}

/// Where BARs can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above, if the machine has the addresses for it.
    pub high: Option<Range<u64>>,
}

impl Windows {
    fn contain(&self, range: &Range<u64>) -> bool {
        let inside = |window: &Range<u64>| window.start <= range.start && range.end <= window.end;
        inside(&self.low) || self.high.as_ref().is_some_and(inside)
    }
}

/// Why a function can't be on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// There are as many devices as the bus takes.
    #[error("a machine has at most {} PCI devices", SLOTS - 1)]
    Full,
    /// The windows have no room for its BARs.
    #[error("there are no addresses left for a BAR of {0:#x} bytes: use fewer devices")]
    NoAddresses(u64),
    /// It describes itself wrongly.
    #[error(transparent)]
    Description(#[from] CapabilityError),
}

/// A BAR that the guest can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BarMapping {
    /// Its addresses.
    pub range: Range<u64>,
    /// The device.
    pub slot: u8,
    /// Which of its BARs.
    pub bar: u8,
}

struct State {
    functions: Vec<Box<dyn PciFunction>>,
    windows: Windows,
    /// The next free address of each window.
    next_low: u64,
    next_high: u64,
    /// Sorted by address; no two overlap, all are in a window.
    mapped: Vec<BarMapping>,
    /// Where BARs were that could not be mapped, to count each place once.
    refused: Vec<BarMapping>,
    refusals: u64,
}

/// Bus 0 of segment 0.
pub struct PciBus(Mutex<State>);

impl PciBus {
    /// A bus with a host bridge.
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        let next_high = windows.high.as_ref().map_or(0, |high| high.start);
        Self(Mutex::new(State {
            functions: vec![Box::new(HostBridge::new())],
            next_low: windows.low.start,
            next_high,
            windows,
            mapped: Vec::new(),
            refused: Vec::new(),
            refusals: 0,
        }))
    }

    /// Puts a device in the next slot, which is returned, and gives its BARs addresses, as firmware
    /// would: below 4 GiB while there is room. It does not answer to them until the guest enables that.
    ///
    /// # Errors
    /// The bus is full.
    pub fn add(&self, mut function: Box<dyn PciFunction>) -> Result<u8, PciError> {
        let mut state = self.state();
        let slot = state.functions.len();
        if slot >= SLOTS {
            return Err(PciError::Full);
        }
        let bars = function.config().bars().to_vec();
        for bar in &bars {
            let address = state.place(bar).ok_or(PciError::NoAddresses(bar.size))?;
            function.config_mut().set_bar_address(bar, address);
        }
        state.functions.push(function);
        Ok(slot as u8)
    }

    /// Reads the configuration space of a function: bytes at an offset of ECAM, or of a register that
    /// the ports name. Where there is no function everything is ones.
    pub fn config_read(&self, ecam: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (mut state, offset) = (self.state(), ecam % ECAM_FUNCTION);
        // What passes the end of a function reaches nobody.
        let room = usize::try_from(ECAM_FUNCTION - offset).unwrap_or(0).min(data.len());
        if let (Some((_, function)), Some(data)) = (state.function(ecam), data.get_mut(..room)) {
            data.fill(0);
            let room = SIZE.saturating_sub(offset as usize).min(data.len());
            if let (Some(data), 1..) = (data.get_mut(..room), room) {
                function.config_read(offset as u16, data);
            }
        }
    }

    /// Writes it.
    pub fn config_write(&self, ecam: u64, data: &[u8]) {
        let (mut state, offset) = (self.state(), ecam % ECAM_FUNCTION);
        let room = SIZE.saturating_sub(offset as usize).min(data.len());
        if let (Some((slot, function)), Some(data @ [_, ..])) =
            (state.function(ecam), data.get(..room))
        {
            function.config_write(offset as u16, data);
            state.map_changes(slot);
        }
    }

    /// Reads memory in a window. Where there is no BAR everything is ones.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut state = self.state();
        if let Some((function, bar, offset, room)) = state.bar(address)
            && let Some(data) = data.get_mut(..room.min(data.len()))
        {
            function.bar_read(bar, offset, data);
        }
    }

    /// Writes memory in a window.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        let mut state = self.state();
        if let Some((function, bar, offset, room)) = state.bar(address)
            && let Some(data) = data.get(..room.min(data.len()))
        {
            function.bar_write(bar, offset, data);
        }
    }

    /// The highest slot that has a device.
    #[must_use]
    pub fn last_slot(&self) -> u8 {
        self.state().functions.len().saturating_sub(1) as u8
    }

    /// Where BARs can be.
    #[must_use]
    pub fn windows(&self) -> Windows {
        self.state().windows.clone()
    }

    /// The BARs the guest can reach, by address.
    #[must_use]
    pub fn mapped(&self) -> Vec<BarMapping> {
        self.state().mapped.clone()
    }

    /// How often the guest has put an enabled BAR where none can be.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.state().refusals
    }

    /// Takes the functions off the bus, to end them.
    pub fn clear(&self) {
        let functions = {
            let mut state = self.state();
            state.mapped.clear();
            std::mem::take(&mut state.functions)
        };
        drop(functions);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Addresses for a BAR.
    fn place(&mut self, bar: &Bar) -> Option<u64> {
        let take = |next: &mut u64, window: &Range<u64>| {
            let start = next.checked_next_multiple_of(bar.size)?;
            let end = start.checked_add(bar.size).filter(|end| *end <= window.end)?;
            *next = end;
            Some(start)
        };
        take(&mut self.next_low, &self.windows.low).or_else(|| {
            let high = self.windows.high.as_ref().filter(|_| bar.kind == BarKind::Memory64)?;
            take(&mut self.next_high, high)
        })
    }

    /// The function an offset of ECAM is for. Each device has only function 0.
    fn function(&mut self, ecam: u64) -> Option<(usize, &mut Box<dyn PciFunction>)> {
        let number = ecam / ECAM_FUNCTION;
        let slot = usize::try_from(number / 8).ok().filter(|_| number.is_multiple_of(8))?;
        Some((slot, self.functions.get_mut(slot)?))
    }

    /// The BAR at an address: its function and number, the offset in it, and the bytes from there to its
    /// end.
    fn bar(&mut self, address: u64) -> Option<(&mut Box<dyn PciFunction>, u8, u64, usize)> {
        let at = self.mapped.partition_point(|m| m.range.start <= address).checked_sub(1)?;
        let BarMapping { range, slot, bar } = self.mapped.get(at)?.clone();
        let room = usize::try_from(range.end.checked_sub(address)?).ok().filter(|n| *n > 0)?;
        let function = self.functions.get_mut(usize::from(slot))?;
        Some((function, bar, address - range.start, room))
    }

    /// What a function wants mapped.
    fn wanted(&self, slot: usize) -> Vec<BarMapping> {
        let Some(function) = self.functions.get(slot) else { return Vec::new() };
        let config = function.config();
        if config.command() & MEMORY_SPACE == 0 {
            return Vec::new();
        }
        let bars = config.bars().iter();
        bars.map(|bar| {
            let start = config.bar_address(bar);
            // One that wraps is in no window.
            let range = start..start.saturating_add(bar.size);
            BarMapping { range, slot: slot as u8, bar: bar.index }
        })
        .collect()
    }

    /// Maps what the guest has just enabled or moved in a slot, and unmaps what is not there any more.
    /// What is mapped already has precedence; a place that becomes free is for whoever wants it.
    fn map_changes(&mut self, slot: usize) {
        let wanted = self.wanted(slot);
        let ours = |mapping: &BarMapping| usize::from(mapping.slot) == slot;
        let gone: Vec<_> =
            self.mapped.iter().filter(|m| ours(m) && !wanted.contains(m)).cloned().collect();
        self.refused.retain(|m| !ours(m) || wanted.contains(m));
        if gone.is_empty()
            && wanted.iter().all(|m| self.mapped.contains(m) || self.refused.contains(m))
        {
            return;
        }
        self.mapped.retain(|m| !gone.contains(m));
        // A BAR may only move to another place: then it is told of the new one alone.
        let mut fresh = Vec::new();
        let everyone = (0..self.functions.len()).flat_map(|slot| self.wanted(slot));
        for mapping in wanted.iter().cloned().chain(everyone).collect::<Vec<_>>() {
            if self.mapped.contains(&mapping) {
                continue;
            }
            if self.is_free(&mapping.range) {
                let at = self.mapped.partition_point(|m| m.range.start < mapping.range.start);
                self.mapped.insert(at, mapping.clone());
                self.refused.retain(|m| *m != mapping);
                fresh.push(mapping);
            } else if !self.refused.contains(&mapping) {
                self.refused.push(mapping);
                self.refusals += 1;
            }
        }
        for mapping in gone {
            self.tell(&mapping, None);
        }
        for mapping in fresh {
            self.tell(&mapping, Some(mapping.range.start));
        }
    }

    fn is_free(&self, range: &Range<u64>) -> bool {
        let overlaps = |m: &BarMapping| m.range.start < range.end && range.start < m.range.end;
        self.windows.contain(range) && !self.mapped.iter().any(overlaps)
    }

    fn tell(&mut self, mapping: &BarMapping, address: Option<u64>) {
        if let Some(function) = self.functions.get_mut(usize::from(mapping.slot)) {
            function.bar_mapped(mapping.bar, address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;
    use std::sync::Arc;

    type Log = Arc<Mutex<Vec<(u8, Option<u64>)>>>;

    /// Memory of 4 bytes in each BAR, and a log of where they are.
    struct Ram(ConfigSpace, [u8; 4], Log);

    impl PciFunction for Ram {
        fn config(&self) -> &ConfigSpace {
            &self.0
        }
        fn config_mut(&mut self) -> &mut ConfigSpace {
            &mut self.0
        }
        fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
            assert!(offset < 0x1000 && data.len() as u64 <= 0x1000 - offset);
            data.fill(self.1[usize::from(bar)]);
        }
        fn bar_write(&mut self, bar: u8, _offset: u64, data: &[u8]) {
            self.1[usize::from(bar)] = data[0];
        }
        fn bar_mapped(&mut self, bar: u8, address: Option<u64>) {
            self.2.lock().unwrap().push((bar, address));
        }
    }

    const LOW: Range<u64> = 0xc000_0000..0xc001_0000;
    const HIGH: Range<u64> = 0x40_0000_0000..0x40_0010_0000;

    fn bus(devices: usize) -> (PciBus, Vec<Log>) {
        let bus = PciBus::new(Windows { low: LOW, high: Some(HIGH) });
        let logs = (0..devices).map(|_| add(&bus)).collect();
        (bus, logs)
    }

    fn add(bus: &PciBus) -> Log {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let mut config = ConfigSpace::new(&identity);
        let bar = |index, kind| Bar { index, kind, size: 0x1000, prefetchable: false };
        config.add_bar(bar(0, BarKind::Memory32)).unwrap();
        config.add_bar(bar(2, BarKind::Memory64)).unwrap();
        let log = Log::default();
        bus.add(Box::new(Ram(config, [0; 4], log.clone()))).unwrap();
        log
    }

    fn write(bus: &PciBus, slot: u64, register: u64, value: u32) {
        bus.config_write(slot << 15 | register, &value.to_le_bytes());
    }

    fn read(bus: &PciBus, ecam: u64) -> u32 {
        let mut data = [0; 4];
        bus.config_read(ecam, &mut data);
        u32::from_le_bytes(data)
    }

    fn starts(bus: &PciBus) -> Vec<(u8, u8, u64)> {
        bus.mapped().iter().map(|m| (m.slot, m.bar, m.range.start)).collect()
    }

    #[test]
    fn there_is_a_host_bridge_and_nobody_else_until_added() {
        let (bus, _) = bus(1);
        assert_eq!(read(&bus, 0) & 0xffff, 0x1b36);
        assert_eq!(read(&bus, 8) >> 8, 0x06_00_00);
        assert_eq!(read(&bus, 1 << 15), 0x0002_0001);
        for nobody in [2 << 15, 31 << 15, 1 << 12, (1 << 15) | (7 << 12)] {
            assert_eq!(read(&bus, nobody), u32::MAX);
            write(&bus, 0, nobody, 0);
        }
        assert_eq!(read(&bus, (1 << 15) | 0x100), 0, "no extended capabilities");
    }

    #[test]
    fn accesses_of_any_size_at_any_place_are_answered() {
        let (bus, _) = bus(1);
        for offset in [0, 1, 0xfd, 0xff, 0x100, 0xffe, 0xfff, 0x7fff, (32 << 15) - 1, u64::MAX] {
            for len in 0..=8 {
                let mut data = vec![0xaa; len];
                bus.config_read(1 << 15 | offset, &mut data);
                bus.config_write(1 << 15 | offset, &data);
            }
        }
        let mut data = [0; 8];
        bus.config_read((1 << 15) | 0xffc, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "past the end is nobody");
    }

    #[test]
    fn bars_have_addresses_and_answer_when_enabled() {
        let (bus, logs) = bus(2);
        assert_eq!(read(&bus, (1 << 15) | 0x10), LOW.start as u32);
        assert_eq!(read(&bus, (2 << 15) | 0x18), LOW.start as u32 + 0x3000 | 4);
        let mut data = [0; 4];
        bus.memory_read(LOW.start, &mut data);
        assert_eq!(data, [0xff; 4]);
        write(&bus, 1, 4, MEMORY_SPACE.into());
        assert_eq!(starts(&bus), [(1, 0, LOW.start), (1, 2, LOW.start + 0x1000)]);
        bus.memory_write(LOW.start + 0xfff, &[7, 8]);
        bus.memory_read(LOW.start + 0xffe, &mut data);
        assert_eq!(data, [7, 7, 0xff, 0xff]);
        write(&bus, 1, 4, 0);
        assert!(starts(&bus).is_empty());
        let expected = [LOW.start, LOW.start + 0x1000].map(Some);
        let log = logs[0].lock().unwrap().clone();
        assert_eq!(log, [(0, expected[0]), (2, expected[1]), (0, None), (2, None)]);
    }

    #[test]
    fn a_bar_moves_even_above_4_gib() {
        let (bus, logs) = bus(1);
        write(&bus, 1, 4, MEMORY_SPACE.into());
        logs[0].lock().unwrap().clear();
        write(&bus, 1, 0x18, 0x5000);
        write(&bus, 1, 0x1c, 0x40);
        assert_eq!(starts(&bus), [(1, 0, LOW.start), (1, 2, HIGH.start + 0x5000)]);
        let log = logs[0].lock().unwrap().clone();
        assert_eq!(log, [(2, None), (2, Some(HIGH.start + 0x5000))]);
    }

    #[test]
    fn a_bar_over_ram_or_anything_outside_the_windows_is_not_mapped() {
        let (bus, _) = bus(1);
        write(&bus, 1, 4, MEMORY_SPACE.into());
        for (n, at) in (1..).zip([0, 0x10_0000, 0xfec0_0000, 0xfee0_0000, LOW.end as u32, u32::MAX])
        {
            write(&bus, 1, 0x10, at);
            assert_eq!(starts(&bus), [(1, 2, LOW.start + 0x1000)], "{at:#x}");
            write(&bus, 1, 0x10, at);
            assert_eq!(bus.refusals(), n, "each place is counted once");
        }
        // A 64-bit BAR at the very end: its range would wrap.
        write(&bus, 1, 0x18, u32::MAX);
        write(&bus, 1, 0x1c, u32::MAX);
        assert!(starts(&bus).is_empty());
        write(&bus, 1, 0x10, LOW.start as u32);
        assert_eq!(starts(&bus), [(1, 0, LOW.start)]);
    }

    #[test]
    fn a_bar_over_another_waits_until_the_place_is_free() {
        let (bus, logs) = bus(2);
        write(&bus, 1, 4, MEMORY_SPACE.into());
        write(&bus, 2, 0x10, LOW.start as u32);
        write(&bus, 2, 4, MEMORY_SPACE.into());
        assert_eq!(
            starts(&bus),
            [(1, 0, LOW.start), (1, 2, LOW.start + 0x1000), (2, 2, LOW.start + 0x3000)]
        );
        assert_eq!(bus.refusals(), 1);
        bus.memory_write(LOW.start, &[5]);
        let mut data = [0];
        bus.memory_read(LOW.start, &mut data);
        assert_eq!(data, [5], "the first one's");
        // Also over its own other one.
        write(&bus, 1, 0x18, LOW.start as u32);
        assert_eq!(bus.refusals(), 2);
        write(&bus, 1, 4, 0);
        assert_eq!(starts(&bus), [(2, 0, LOW.start), (2, 2, LOW.start + 0x3000)]);
        assert_eq!(logs[1].lock().unwrap().last(), Some(&(0, Some(LOW.start))));
    }

    #[test]
    fn the_bus_and_the_windows_fill_up() {
        let bus = PciBus::new(Windows { low: LOW, high: None });
        let one = |size| {
            let identity =
                Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
            let mut config = ConfigSpace::new(&identity);
            let bar = Bar { index: 0, kind: BarKind::Memory64, size, prefetchable: true };
            config.add_bar(bar).unwrap();
            bus.add(Box::new(Ram(config, [0; 4], Log::default())))
        };
        assert_eq!(one(0x2_0000), Err(PciError::NoAddresses(0x2_0000)));
        assert_eq!(one(0x8000), Ok(1));
        for slot in 2..32 {
            assert_eq!(one(16), Ok(slot));
        }
        assert_eq!(one(16), Err(PciError::Full));
    }
}
