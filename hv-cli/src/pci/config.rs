//! The configuration space of a function (PCI Local Bus Specification 3.0, section 6): a type 0 header
//! and the capabilities behind it.
//!
//! A register is its bytes and a mask of the bits that can be written, so an access of any size at any
//! offset does what the bus would make of it, and nothing else. What a write means is found by looking
//! at the bytes afterwards.

/// Bytes of the space that has anything in it. The rest of the 4 KiB of ECAM reads as 0.
pub(super) const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_END: usize = 0x40;
const BARS: usize = 0x10;
const BAR_COUNT: usize = 6;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// Command register: the function answers to its memory BARs.
pub const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const PARITY_RESPONSE: u16 = 1 << 6;
const SERR_ENABLE: u16 = 1 << 8;
/// Command register: the function does not raise its line.
pub(crate) const INTERRUPT_DISABLE: u16 = 1 << 10;

/// Status register: the function wants its line raised.
const INTERRUPT_STATUS: u8 = 1 << 3;
/// Status register: there is a list of capabilities.
const CAPABILITIES_LIST: u8 = 1 << 4;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface: `0x06_00_00` is a host bridge.
    pub class: u32,
    /// Subsystem vendor ID and subsystem ID.
    pub subsystem: (u16, u16),
}

/// What a base address register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; it takes the next register, too.
    Memory64,
}

/// A base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which register it is, or the first of two.
    pub index: u8,
    /// Its kind.
    pub kind: BarKind,
    /// Its bytes: a power of two, at least 16.
    pub size: u64,
    /// Whether reading it has no side effects.
    pub prefetchable: bool,
}

/// Why a function can't be described: an error of its author, not of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// The capabilities don't fit.
    #[error("the capabilities take more than the configuration space has")]
    NoRoom,
    /// There is no such register, it is taken, or the size can't be.
    #[error("base address register {0} can't be like that")]
    Bar(u8),
}

/// The configuration space of a function.
///
/// ```
/// use hv_cli::pci::{Bar, BarKind, ConfigSpace, Identity};
///
/// let identity =
///     Identity { vendor: 0x1af4, device: 0x1044, revision: 1, class: 0xff_00_00, subsystem: (0, 0) };
/// let mut config = ConfigSpace::new(&identity);
/// config.add_bar(Bar { index: 0, kind: BarKind::Memory32, size: 4096, prefetchable: false })?;
/// // How a guest asks for the size of a BAR.
/// config.write(0x10, &u32::MAX.to_le_bytes());
/// let mut size = [0; 4];
/// config.read(0x10, &mut size);
/// assert_eq!(u32::from_le_bytes(size), !0xfff);
/// # Ok::<(), hv_cli::pci::CapabilityError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: Vec<Bar>,
    /// Where the pointer to the next capability is, and where it would be.
    pointer: usize,
    next: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs, interrupt pin and capabilities; the function answers to nothing
    /// yet.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: Vec::new(),
            pointer: CAPABILITIES_POINTER,
            next: HEADER_END,
        };
        let [interface, sub_class, base_class, _] = identity.class.to_le_bytes();
        config.put(0x00, &identity.vendor.to_le_bytes());
        config.put(0x02, &identity.device.to_le_bytes());
        config.put(0x08, &[identity.revision, interface, sub_class, base_class]);
        config.put(0x2c, &identity.subsystem.0.to_le_bytes());
        config.put(0x2e, &identity.subsystem.1.to_le_bytes());
        let command = MEMORY_SPACE | BUS_MASTER | PARITY_RESPONSE | SERR_ENABLE | INTERRUPT_DISABLE;
        config.allow(COMMAND, &command.to_le_bytes());
        config.allow(0x0c, &[0xff]); // cache line size: for software alone
        config.allow(INTERRUPT_LINE, &[0xff]); // the same
        config
    }

    /// Adds a base address register.
    ///
    /// # Errors
    /// It is taken, or can't be like that.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), CapabilityError> {
        let Bar { index, kind, size, prefetchable } = bar;
        let registers = |bar: &Bar| {
            let first = usize::from(bar.index);
            first..first + if bar.kind == BarKind::Memory64 { 2 } else { 1 }
        };
        let ours = registers(&bar);
        let free =
            self.bars.iter().map(registers).all(|r| r.end <= ours.start || ours.end <= r.start);
        let most = if kind == BarKind::Memory64 { 1 << 63 } else { 1 << 31 };
        if ours.end > BAR_COUNT || !free || !size.is_power_of_two() || !(16..=most).contains(&size)
        {
            return Err(CapabilityError::Bar(index));
        }
        let kind_bits = if kind == BarKind::Memory64 { 0b100 } else { 0 };
        let at = BARS + 4 * ours.start;
        self.put(at, &[kind_bits | if prefetchable { 0b1000 } else { 0 }]);
        let mask = !(size - 1);
        match kind {
            BarKind::Memory32 => self.allow(at, &(mask as u32).to_le_bytes()),
            BarKind::Memory64 => self.allow(at, &mask.to_le_bytes()),
        }
        self.bars.push(bar);
        Ok(())
    }

    /// Adds a capability: its bytes from the third on (after ID and next pointer), and which of their
    /// bits can be written. Returns its offset.
    ///
    /// # Errors
    /// It does not fit.
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, CapabilityError> {
        let at = self.next;
        let end = at.saturating_add(2 + body.len());
        if end > SIZE {
            return Err(CapabilityError::NoRoom);
        }
        self.put(self.pointer, &[at as u8]);
        self.put(STATUS, &[CAPABILITIES_LIST]);
        self.put(at, &[id]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.pointer = at + 1;
        self.next = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// Says that the function has the interrupt pin INTA, and which line it is wired to.
    pub fn set_interrupt(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line, 1]);
        debug_assert_eq!(INTERRUPT_PIN, INTERRUPT_LINE + 1);
    }

    /// Whether the function wants its line raised, for the status register.
    pub fn set_interrupt_status(&mut self, wants: bool) {
        if let Some(byte) = self.bytes.get_mut(STATUS) {
            *byte = *byte & !INTERRUPT_STATUS | if wants { INTERRUPT_STATUS } else { 0 };
        }
    }

    /// The guest reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let there = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = there.get(i).copied().unwrap_or(0);
        }
    }

    /// The guest writes: the bits that can be written are.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.get_mut(at..).unwrap_or_default();
        let masks = self.writable.get(at..).unwrap_or_default();
        for ((byte, mask), new) in bytes.iter_mut().zip(masks).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Changes bytes, whatever the guest may write.
    pub fn put(&mut self, at: usize, data: &[u8]) {
        for (byte, new) in self.bytes.get_mut(at..).unwrap_or_default().iter_mut().zip(data) {
            *byte = *new;
        }
    }

    fn allow(&mut self, at: usize, masks: &[u8]) {
        for (mask, new) in self.writable.get_mut(at..).unwrap_or_default().iter_mut().zip(masks) {
            *mask = *new;
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        u16::from_le_bytes(self.get(COMMAND))
    }

    /// The base address registers.
    #[must_use]
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// The address in a base address register.
    #[must_use]
    pub fn bar_address(&self, bar: &Bar) -> u64 {
        let at = BARS + 4 * usize::from(bar.index);
        let value = match bar.kind {
            BarKind::Memory32 => u32::from_le_bytes(self.get(at)).into(),
            BarKind::Memory64 => u64::from_le_bytes(self.get(at)),
        };
        value & !0xf
    }

    /// Puts an address there, as firmware does.
    pub fn set_bar_address(&mut self, bar: &Bar, address: u64) {
        let at = (BARS + 4 * usize::from(bar.index)) as u16;
        match bar.kind {
            BarKind::Memory32 => self.write(at, &(address as u32).to_le_bytes()),
            BarKind::Memory64 => self.write(at, &address.to_le_bytes()),
        }
    }

    /// Bytes as they are.
    #[must_use]
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        let subsystem = (0x1af4, 0x40);
        let identity =
            Identity { vendor: 0x1af4, device: 0x1044, revision: 1, class: 0xff_12_34, subsystem };
        ConfigSpace::new(&identity)
    }

    fn bar(index: u8, kind: BarKind, size: u64) -> Bar {
        Bar { index, kind, size, prefetchable: kind == BarKind::Memory64 }
    }

    fn read<const N: usize>(config: &ConfigSpace, offset: u16) -> [u8; N] {
        let mut data = [0xee; N];
        config.read(offset, &mut data);
        data
    }

    #[test]
    fn the_header_is_where_pci_has_it() {
        let config = config();
        assert_eq!(read(&config, 0), [0xf4, 0x1a, 0x44, 0x10]);
        assert_eq!(read(&config, 8), [1, 0x34, 0x12, 0xff]);
        assert_eq!(read(&config, 0x0e), [0], "type 0, one function");
        assert_eq!(read(&config, 0x2c), [0xf4, 0x1a, 0x40, 0]);
        assert_eq!(read(&config, 0x34), [0]);
        assert_eq!(read::<4>(&config, 0xfe), [0; 4]);
        assert_eq!(read::<8>(&config, 0xffff), [0; 8]);
    }

    #[test]
    fn bars_are_sized_and_moved_by_writes_of_any_size() {
        let mut config = config();
        let (low, high) = (bar(0, BarKind::Memory32, 0x1000), bar(2, BarKind::Memory64, 1 << 33));
        config.add_bar(low).unwrap();
        config.add_bar(high).unwrap();
        for at in [0x10, 0x14, 0x18, 0x1c] {
            config.write(at, &[0xff; 4]);
        }
        assert_eq!(read(&config, 0x10), 0xffff_f000u32.to_le_bytes());
        assert_eq!(read(&config, 0x14), [0; 4], "no register");
        assert_eq!(read(&config, 0x18), (!((1u64 << 33) - 1) | 0b1100).to_le_bytes());
        config.write(0x1f, &[0x12]);
        config.write(0x1b, &[0xaa, 0x04, 0x00]);
        assert_eq!(config.bar_address(&high), 0x12ff_0004_0000_0000 & !((1 << 33) - 1));
        config.set_bar_address(&low, 0xc000_1234);
        assert_eq!(config.bar_address(&low), 0xc000_1000);
    }

    #[test]
    fn bars_that_can_not_be_are_refused() {
        let mut config = config();
        config.add_bar(bar(1, BarKind::Memory64, 16)).unwrap();
        for (index, kind, size) in [
            (1, BarKind::Memory32, 16),
            (2, BarKind::Memory32, 16),
            (0, BarKind::Memory64, 16),
            (5, BarKind::Memory64, 16),
            (6, BarKind::Memory32, 16),
            (3, BarKind::Memory32, 8),
            (3, BarKind::Memory32, 48),
            (3, BarKind::Memory32, 1 << 32),
            (3, BarKind::Memory32, 0),
        ] {
            let refused = config.add_bar(bar(index, kind, size)).unwrap_err();
            assert_eq!(refused, CapabilityError::Bar(index), "{index} {kind:?} {size:#x}");
        }
        config.add_bar(bar(0, BarKind::Memory32, 16)).unwrap();
    }

    #[test]
    fn only_what_can_be_written_is() {
        let mut config = config();
        config.write(0, &[0xff; 256]);
        assert_eq!(read(&config, 0), [0xf4, 0x1a, 0x44, 0x10]);
        assert_eq!(config.command(), 0x0546);
        assert_eq!(read(&config, 0x06), [0, 0], "no capability, nothing to clear");
        assert_eq!(read(&config, 0x3c), [0xff, 0]);
        config.write(0xfff0, &[1]);
        config.write(0xff, &[1, 2, 3]);
    }

    #[test]
    fn capabilities_are_a_list_and_end_with_the_space() {
        let mut config = config();
        let first = config.add_capability(9, &[1, 2, 3], &[0, 0xf0, 0]).unwrap();
        let second = config.add_capability(0x11, &[4; 10], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read(&config, 0x34), [0x40]);
        assert_eq!(read(&config, 0x40), [9, 0x48, 1, 2, 3]);
        assert_eq!(read(&config, 0x48), [0x11, 0, 4]);
        assert_eq!(read(&config, 0x06), [0x10]);
        config.write(0x40, &[0xff; 16]);
        assert_eq!(read(&config, 0x40), [9, 0x48, 1, 0xf2, 3]);
        assert_eq!(config.add_capability(1, &[0; 200], &[]), Err(CapabilityError::NoRoom));
        config.set_interrupt_status(true);
        assert_eq!(read(&config, 0x06), [0x18]);
        config.set_interrupt_status(false);
        config.set_interrupt(11);
        assert_eq!((read(&config, 0x06), read(&config, 0x3c)), ([0x10], [11, 1]));
    }
}
