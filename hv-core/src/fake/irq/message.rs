//! Interrupt messages: what an MSI, an I/O APIC redirection entry or an interrupt command says
//! (Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller").

use crate::Msi;
use crate::fake::Loss;

/// How a message is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Fixed,
    LowestPriority,
    Smi,
    /// Remote read, as old processors had it. KVM takes it and does nothing.
    RemoteRead,
    Nmi,
    Init,
    StartUp,
    /// Nobody takes one that is sent: the 8259 pair has a wire of its own.
    ExtInt,
}

impl Mode {
    /// From the three bits above the vector.
    const fn from_bits(low: u32) -> Self {
        match low >> 8 & 7 {
            0 => Mode::Fixed,
            1 => Mode::LowestPriority,
            2 => Mode::Smi,
            3 => Mode::RemoteRead,
            4 => Mode::Nmi,
            5 => Mode::Init,
            6 => Mode::StartUp,
            _ => Mode::ExtInt,
        }
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    Physical(u32),
    Logical(u32),
    Myself,
    Everyone,
    Others,
}

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) destination: Destination,
    pub(super) mode: Mode,
    pub(super) vector: u8,
    /// Level-triggered.
    pub(super) level: bool,
    /// `false` only in an interrupt command that takes a level back.
    pub(super) assert: bool,
    /// The redirection hint of an MSI.
    pub(super) hint: bool,
}

impl Message {
    fn new(low: u32, logical: bool, id: u32) -> Self {
        let mode = Mode::from_bits(low);
        Self {
            destination: match logical {
                true => Destination::Logical(id),
                false => Destination::Physical(id),
            },
            mode,
            vector: low as u8,
            level: low & 1 << 15 != 0,
            assert: true,
            hint: false,
        }
    }

    /// A message signalled interrupt. With `wide_ids` (`KVM_X2APIC_API_USE_32BIT_IDS`), bits 8 to 31
    /// of the destination are in the upper half of the address. The address is not looked at
    /// otherwise: KVM takes any.
    pub(super) fn from_msi(msi: Msi, wide_ids: bool) -> Self {
        let (low, high) = (msi.address as u32, (msi.address >> 32) as u32);
        let id = low >> 12 & 0xff | if wide_ids { high & 0xffff_ff00 } else { 0 };
        let mut message = Self::new(msi.data, low & 1 << 2 != 0, id);
        message.hint = low & 1 << 3 != 0;
        message
    }

    /// Whether one of those it is for is enough.
    pub(super) fn any_one(&self) -> bool {
        self.hint || self.mode == Mode::LowestPriority
    }

    /// A redirection table entry of the I/O APIC.
    pub(super) fn from_redirection(entry: u64) -> Self {
        let low = entry as u32;
        Self::new(low, low & 1 << 11 != 0, (entry >> 56) as u32)
    }

    /// The two halves of the interrupt command register of a local APIC in xAPIC mode.
    pub(super) fn from_command(high: u32, low: u32) -> Self {
        let mut message = Self::new(low, low & 1 << 11 != 0, high >> 24);
        message.assert = low & 1 << 14 != 0;
        message.destination = match low >> 18 & 3 {
            0 => message.destination,
            1 => Destination::Myself,
            2 => Destination::Everyone,
            _ => Destination::Others,
        };
        message
    }
}

/// What became of an interrupt on one of its ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// This many took it, at least one.
    Delivered(u32),
    /// The one before it is still pending: KVM answers 0.
    Coalesced,
    /// Its target took it not: KVM answers 0.
    Blocked(Loss),
    /// KVM answers -1, and nothing is left of it once the line is low again.
    Refused(Loss),
    /// KVM answers -1, but the 8259 remembers the edge.
    Kept,
}

impl Outcome {
    /// KVM's number: how many took it, `None` for -1.
    pub(super) const fn count(self) -> Option<u32> {
        match self {
            Outcome::Delivered(n) => Some(n),
            Outcome::Coalesced | Outcome::Blocked(_) => Some(0),
            Outcome::Refused(_) | Outcome::Kept => None,
        }
    }

    /// Why it is lost, if it is.
    pub(super) const fn loss(self) -> Option<Loss> {
        match self {
            Outcome::Blocked(why) | Outcome::Refused(why) => Some(why),
            Outcome::Delivered(_) | Outcome::Coalesced | Outcome::Kept => None,
        }
    }

    /// What became of it when it went this way as well. KVM adds up what is not -1.
    pub(super) const fn and(self, other: Self) -> Self {
        use Outcome::{Coalesced, Delivered};
        match (self, other) {
            (Delivered(a), Delivered(b)) => Delivered(a.saturating_add(b)),
            (Delivered(n), _) | (_, Delivered(n)) => Delivered(n),
            (Coalesced, _) | (_, Coalesced) => Coalesced,
            // Nobody has it now; -1 loses against 0, and what is kept is not lost.
            (Outcome::Blocked(_), Outcome::Kept) | (Outcome::Kept, Outcome::Blocked(_)) => {
                Coalesced
            }
            (Outcome::Kept, _) | (_, Outcome::Kept) => Outcome::Kept,
            (Outcome::Blocked(why), _) | (_, Outcome::Blocked(why)) => Outcome::Blocked(why),
            (Outcome::Refused(why), Outcome::Refused(_)) => Outcome::Refused(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(address: u64, data: u32) -> Message {
        Message::from_msi(Msi { address, data, device: None }, false)
    }

    #[test]
    fn messages_are_read_as_the_manual_lays_them_out() {
        let plain = msi(0xfee0_3000, 0x41);
        assert_eq!(plain.destination, Destination::Physical(3));
        assert_eq!((plain.mode, plain.vector, plain.level), (Mode::Fixed, 0x41, false));
        assert!(plain.assert && !plain.any_one());

        let hinted = msi(0xfee0_100c, 0x8041);
        assert_eq!(hinted.destination, Destination::Logical(1));
        assert!(hinted.any_one() && hinted.level);
        for (data, mode) in [
            (0x100, Mode::LowestPriority),
            (0x200, Mode::Smi),
            (0x400, Mode::Nmi),
            (0x500, Mode::Init),
            (0x600, Mode::StartUp),
            (0x700, Mode::ExtInt),
        ] {
            assert_eq!(msi(0xfee0_0000, data).mode, mode);
        }
        assert!(msi(0xfee0_0000, 0x130).any_one());
    }

    #[test]
    fn the_upper_half_of_the_address_counts_with_wide_ids_only() {
        let far = Msi { address: 0x0000_0100_fee0_2000, data: 0x41, device: None };
        assert_eq!(Message::from_msi(far, false).destination, Destination::Physical(2));
        assert_eq!(Message::from_msi(far, true).destination, Destination::Physical(0x102));
    }

    #[test]
    fn redirection_entries_and_commands() {
        let entry = Message::from_redirection(0x0500_0000_0000_8931);
        assert_eq!(entry.destination, Destination::Logical(5));
        assert_eq!((entry.mode, entry.vector, entry.level), (Mode::LowestPriority, 0x31, true));

        let start = Message::from_command(0x0200_0000, 0x4608);
        assert_eq!((start.destination, start.mode), (Destination::Physical(2), Mode::StartUp));
        assert!(start.assert);
        assert!(!Message::from_command(0, 0x8500).assert, "INIT level de-assert");
        for (bits, whom) in
            [(1, Destination::Myself), (2, Destination::Everyone), (3, Destination::Others)]
        {
            assert_eq!(Message::from_command(0, bits << 18).destination, whom);
        }
    }

    #[test]
    fn ways_add_up_as_in_kvm() {
        use Outcome::{Blocked, Coalesced, Delivered, Kept, Refused};
        for (a, b, sum) in [
            (Delivered(1), Delivered(2), Delivered(3)),
            (Delivered(1), Refused(Loss::Masked), Delivered(1)),
            (Coalesced, Refused(Loss::Masked), Coalesced),
            (Blocked(Loss::Disabled), Refused(Loss::Masked), Blocked(Loss::Disabled)),
            (Kept, Refused(Loss::Masked), Kept),
        ] {
            assert_eq!((a.and(b), b.and(a)), (sum, sum));
        }
        assert_eq!(Kept.and(Blocked(Loss::Disabled)).count(), Some(0));
        assert_eq!(Refused(Loss::Masked).and(Kept).loss(), None);
    }
}
