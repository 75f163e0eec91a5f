//! An entry of the redirection table of an I/O APIC (82093AA datasheet, "IOREDTBL"), and the message
//! it stands for (Intel SDM volume 3, "Message Address Register Format").

use hv_core::Msi;

/// The 64 bits of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RedirectionEntry(u64);

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION: u64 = 0xff << 56;

/// What software can write: not the delivery status (bit 12), which is never pending here, nor the
/// remote IRR.
const WRITABLE: u64 = VECTOR | DELIVERY_MODE | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | DESTINATION;

impl RedirectionEntry {
    /// As after a reset: masked, and nothing else.
    pub(super) const RESET: Self = Self(MASKED);

    /// An entry that software can read: `None` if no write leads to these bits.
    pub(super) fn from_bits(bits: u64) -> Option<Self> {
        let entry = Self(bits);
        let possible = bits & !(WRITABLE | REMOTE_IRR) == 0;
        (possible && (entry.is_level() || !entry.remote_irr())).then_some(entry)
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    pub(super) fn low(self) -> u32 {
        self.0 as u32
    }

    pub(super) fn high(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// This entry after a write to its lower half.
    pub(super) fn with_low(self, value: u32) -> Self {
        self.written((self.0 & !0xffff_ffff) | u64::from(value))
    }

    /// This entry after a write to its upper half.
    pub(super) fn with_high(self, value: u32) -> Self {
        self.written((self.0 & 0xffff_ffff) | (u64::from(value) << 32))
    }

    fn written(self, value: u64) -> Self {
        let entry = Self((value & WRITABLE) | (self.0 & REMOTE_IRR));
        // The remote IRR means nothing for an edge, and software that has no other way to end a
        // level-triggered interrupt clears it by making the entry edge-triggered for a moment.
        entry.with_remote_irr(entry.remote_irr() && entry.is_level())
    }

    pub(super) fn vector(self) -> u8 {
        (self.0 & VECTOR) as u8
    }

    pub(super) fn is_masked(self) -> bool {
        self.0 & MASKED != 0
    }

    pub(super) fn is_level(self) -> bool {
        self.0 & LEVEL != 0
    }

    /// A level-triggered interrupt was accepted and not ended yet.
    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub(super) fn with_remote_irr(self, set: bool) -> Self {
        Self(if set { self.0 | REMOTE_IRR } else { self.0 & !REMOTE_IRR })
    }

    /// The message this entry sends. It does not depend on the mask: a masked level-triggered entry
    /// can still be waiting for the end of its interrupt, and KVM knows from the route that it has to
    /// report it.
    pub(super) fn message(self) -> Msi {
        const BASE: u64 = 0xfee0_0000;
        const ASSERT: u64 = 1 << 14;
        let destination = (self.0 & DESTINATION) >> 56;
        let logical = u64::from(self.0 & LOGICAL != 0);
        let level = if self.is_level() { LEVEL | ASSERT } else { 0 };
        let data = (self.0 & (VECTOR | DELIVERY_MODE)) | level;
        Msi {
            address: BASE | (destination << 12) | (logical << 2),
            data: data as u32,
            device: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_software_may_write_is_written() {
        let all = RedirectionEntry::RESET.with_low(u32::MAX).with_high(u32::MAX);
        assert_eq!((all.low(), all.high()), (0x1_afff, 0xff00_0000));
        let accepted = all.with_remote_irr(true);
        assert!(accepted.with_low(0x8030).remote_irr(), "a write does not end an interrupt");
        assert!(!accepted.with_low(0x0030).with_low(0x8030).remote_irr(), "being edge does");
    }

    #[test]
    fn the_message_has_the_fields_of_the_entry() {
        let entry = |low, high| RedirectionEntry::RESET.with_low(low).with_high(high).message();
        let msi = |address, data| Msi { address, data, device: None };
        assert_eq!(entry(0x0030, 0), msi(0xfee0_0000, 0x30), "edge, physical");
        assert_eq!(entry(0x0930, 0x0f00_0000), msi(0xfee0_f004, 0x130), "lowest priority, logical");
        assert_eq!(entry(0xa041, 0x0200_0000), msi(0xfee0_2000, 0xc041), "level, active low");
        assert_eq!(
            entry(0x1_0041, 0xff00_0000),
            msi(0xfeef_f000, 0x41),
            "the mask is no part of it"
        );
    }
}
