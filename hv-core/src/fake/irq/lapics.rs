//! All local APICs of a VM: which of them a message reaches.
//!
//! KVM finds targets in a map by id, and only where that does not do by asking everyone. The two
//! answer differently for a target that does not exist: 0 and -1.

use std::collections::BTreeSet;

use super::lapic::Lapic;
use super::message::{Destination, Message, Mode, Outcome};
use crate::fake::Loss;

/// The destination that is everyone.
const BROADCAST: u32 = 0xff;

/// The local APICs, in the order their vCPUs were created.
#[derive(Debug, Default)]
pub(super) struct Lapics {
    all: Vec<Lapic>,
    /// The vCPUs that took the last message as a vector.
    takers: Vec<u32>,
    /// Whether messages name APIC ids of 32 bits.
    pub(super) wide_ids: bool,
}

/// How logical ids are laid out in the VM.
enum Logical {
    /// Nobody has one.
    Nobody,
    Flat,
    Cluster,
    /// Mixed, not unique or of several bits: no map can be made of them.
    NoMap,
}

impl Lapics {
    pub(super) fn add(&mut self, vcpu: u32) {
        if self.get(vcpu).is_none() {
            self.all.push(Lapic::new(vcpu));
        }
    }

    pub(super) fn get(&self, vcpu: u32) -> Option<&Lapic> {
        self.all.iter().find(|lapic| lapic.vcpu() == vcpu)
    }

    pub(super) fn get_mut(&mut self, vcpu: u32) -> Option<&mut Lapic> {
        self.all.iter_mut().find(|lapic| lapic.vcpu() == vcpu)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Lapic> {
        self.all.iter()
    }

    /// The vCPUs that took the last message as a vector.
    pub(super) fn last_takers(&self) -> impl Iterator<Item = u32> {
        self.takers.iter().copied()
    }

    /// Whether the 8259 pair is wired to any of them.
    pub(super) fn any_takes_pic(&self) -> bool {
        self.all.iter().any(Lapic::takes_pic)
    }

    /// Sends a message that comes from a device, or from the local APIC of vCPU `source`.
    pub(super) fn send(&mut self, message: &Message, source: Option<u32>) -> Outcome {
        self.takers.clear();
        self.send_by_map(message, source).unwrap_or_else(|| self.send_to_all(message, source))
    }

    /// `None` if the map does not do.
    fn send_by_map(&mut self, message: &Message, source: Option<u32>) -> Option<Outcome> {
        if self.all.is_empty() || self.share_an_id() {
            return None;
        }
        let targets = match message.destination {
            Destination::Myself => self.index(|lapic| Some(lapic.vcpu()) == source),
            Destination::Everyone | Destination::Others => return None,
            Destination::Physical(BROADCAST) | Destination::Logical(BROADCAST) => return None,
            Destination::Physical(id) => self.index(|lapic| lapic.has_id(id)),
            Destination::Logical(id) => self.logical_targets(id, message)?,
        };
        Some(self.give(&targets, message).unwrap_or(Outcome::Blocked(Loss::NoTarget)))
    }

    fn index(&self, wanted: impl FnMut(&Lapic) -> bool) -> Vec<usize> {
        self.all.iter().position(wanted).into_iter().collect()
    }

    /// The local APICs a logical id names, by the bits of it; the one a message for any of them
    /// goes to is chosen by its vector.
    fn logical_targets(&self, id: u32, message: &Message) -> Option<Vec<usize>> {
        let bits: Vec<u32> = match self.logical() {
            Logical::Nobody => return Some(Vec::new()),
            Logical::NoMap => return None,
            Logical::Flat => (0..8).map(|bit| 1 << bit).filter(|bit| id & bit != 0).collect(),
            Logical::Cluster => {
                let cluster = id & 0xf0;
                let bits = (0..4).map(|bit| 1 << bit).filter(|bit| id & bit != 0);
                bits.map(|bit| cluster | bit).collect()
            }
        };
        let mut owners = bits.iter().map(|&bit| {
            let has = |lapic: &Lapic| lapic.enabled() && lapic.has_logical_id(bit);
            self.all.iter().position(has)
        });
        match message.any_one() {
            true if bits.is_empty() => Some(Vec::new()),
            // Where nobody has that bit, nobody gets the message: so it is in KVM.
            true => {
                Some(owners.nth(hash(message.vector, bits.len())).flatten().into_iter().collect())
            }
            false => Some(owners.flatten().collect()),
        }
    }

    /// Whether two have one physical id, where ids have a byte: then there is no map.
    fn share_an_id(&self) -> bool {
        let mut seen = BTreeSet::new();
        !self.wide_ids && !self.all.iter().all(|lapic| seen.insert(lapic.id()))
    }

    fn logical(&self) -> Logical {
        let mut layout = Logical::Nobody;
        let mut seen = Vec::new();
        for lapic in self.all.iter().filter(|lapic| lapic.enabled() && lapic.logical_id() != 0) {
            let (id, flat) = (lapic.logical_id(), lapic.flat() == Some(true));
            layout = match (layout, flat) {
                (Logical::Nobody | Logical::Flat, true) => Logical::Flat,
                (Logical::Nobody | Logical::Cluster, false) => Logical::Cluster,
                _ => return Logical::NoMap,
            };
            let bits = if flat { id } else { id & 0xf };
            // 8 flat ids and 60 in clusters are unique: one is seen twice before many are.
            if bits != 0 && (!bits.is_power_of_two() || seen.contains(&id)) {
                return Logical::NoMap;
            }
            seen.push(id);
        }
        layout
    }

    /// Asks every local APIC whether it is meant.
    fn send_to_all(&mut self, message: &Message, source: Option<u32>) -> Outcome {
        let mut message = *message;
        if message.destination == Destination::Physical(BROADCAST) && message.any_one() {
            message.mode = Mode::Fixed; // whatever it was, says KVM; a hint still holds
        }
        let all = self.all.iter().enumerate();
        let meant = all.filter(|(_, lapic)| meant(lapic, message.destination, source));
        let mut targets: Vec<usize> = match message.any_one() {
            true => meant.filter(|(_, lapic)| lapic.enabled()).map(|(i, _)| i).collect(),
            false => meant.map(|(i, _)| i).collect(),
        };
        if message.any_one() && !targets.is_empty() {
            let chosen = hash(message.vector, targets.len());
            targets = targets.get(chosen).into_iter().copied().collect();
        }
        self.give(&targets, &message).unwrap_or(Outcome::Refused(Loss::NoTarget))
    }

    /// Gives a message to these; `None` if there are none.
    fn give(&mut self, targets: &[usize], message: &Message) -> Option<Outcome> {
        if targets.is_empty() {
            return None;
        }
        let mut took = 0;
        for &target in targets {
            let Some(lapic) = self.all.get_mut(target) else { continue };
            if lapic.accept(message) {
                took += 1;
                if matches!(message.mode, Mode::Fixed | Mode::LowestPriority) {
                    self.takers.push(lapic.vcpu());
                }
            }
        }
        Some(match took {
            0 => Outcome::Blocked(Loss::Disabled),
            n => Outcome::Delivered(n),
        })
    }
}

/// Whether a message with this destination is for a local APIC.
pub(super) fn meant(lapic: &Lapic, destination: Destination, source: Option<u32>) -> bool {
    match destination {
        Destination::Physical(BROADCAST) | Destination::Logical(BROADCAST) => true,
        Destination::Physical(id) => lapic.has_id(id),
        Destination::Logical(id) => lapic.has_logical_id(id),
        Destination::Myself => Some(lapic.vcpu()) == source,
        Destination::Everyone => true,
        Destination::Others => Some(lapic.vcpu()) != source,
    }
}

/// Which of `n` gets a message that is for any one of them.
fn hash(vector: u8, n: usize) -> usize {
    usize::from(vector).checked_rem(n).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::lapic::{DFR, ICR, LDR, SPIV};
    use super::*;
    use crate::Msi;

    /// `n` enabled local APICs with flat logical ids.
    fn lapics(n: u32) -> Lapics {
        let mut all = Lapics::default();
        for id in 0..n {
            all.add(id);
            let lapic = all.get_mut(id).unwrap();
            lapic.write(SPIV, 0x1ff);
            lapic.write(LDR, 1 << (24 + id));
        }
        all
    }

    fn msi(address: u64, data: u32) -> Message {
        Message::from_msi(Msi { address, data, device: None }, false)
    }

    fn who(all: &Lapics) -> Vec<u32> {
        all.all.iter().filter(|lapic| lapic.pending()).map(Lapic::vcpu).collect()
    }

    #[test]
    fn nobody_blocked_and_delivered() {
        let mut none = Lapics::default();
        let one = msi(0xfee0_0000, 0x41);
        assert_eq!(none.send(&one, None), Outcome::Refused(Loss::NoTarget));
        none.add(0);
        assert_eq!(none.send(&one, None), Outcome::Blocked(Loss::Disabled));
        let mut all = lapics(2);
        assert_eq!(all.send(&one, None), Outcome::Delivered(1));
        assert_eq!(all.send(&msi(0xfee0_5000, 0x41), None), Outcome::Blocked(Loss::NoTarget));
        assert_eq!(who(&all), [0]);
    }

    #[test]
    fn destinations() {
        const LOGICAL: u64 = 0xfee0_0004;
        const ANY: u64 = 0xfee0_000c;
        for (address, data, expected) in [
            (0xfee0_1000, 0x41, &[1][..]),
            (0xfeef_f000, 0x41, &[0, 1, 2]),
            (LOGICAL | 0x5000, 0x41, &[0, 2]),
            (LOGICAL | 0xff000, 0x41, &[0, 1, 2]),
            // 0x41 modulo 2 bits is 1: the second of them.
            (ANY | 0x5000, 0x41, &[2]),
            (LOGICAL | 0x5000, 0x140, &[0]),
            // To everyone, lowest priority is fixed; with the hint it is for one of the three.
            (0xfeef_f000, 0x141, &[0, 1, 2]),
            (0xfeef_f008, 0x141, &[2]),
            // 0x41 modulo 3 is 2; the third bit is nobody's.
            (ANY | 0xb000, 0x41, &[]),
            (LOGICAL | 0x8000, 0x41, &[]),
        ] {
            let mut all = lapics(3);
            all.send(&msi(address, data), None);
            assert_eq!(who(&all), expected, "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn clusters_and_mixed_models() {
        let mut all = lapics(2);
        for (id, ldr) in [(0, 0x1100_0000), (1, 0x2100_0000)] {
            let lapic = all.get_mut(id).unwrap();
            lapic.write(DFR, 0x0fff_ffff);
            lapic.write(LDR, ldr);
        }
        all.send(&msi(0xfee2_1004, 0x41), None);
        assert_eq!(who(&all), [1]);

        let mut mixed = lapics(2);
        mixed.get_mut(0).unwrap().write(DFR, 0x0fff_ffff);
        let nobody = msi(0xfee8_0004, 0x41);
        assert_eq!(mixed.send(&nobody, None), Outcome::Refused(Loss::NoTarget), "no map: -1");
        assert_eq!(lapics(2).send(&nobody, None), Outcome::Blocked(Loss::NoTarget), "map: 0");
    }

    #[test]
    fn commands_of_a_local_apic() {
        use super::super::lapic::Effect;
        for (command, expected) in
            [(0x4_4041, &[1][..]), (0x8_4041, &[0, 1, 2]), (0xc_4041, &[0, 2])]
        {
            let mut all = lapics(3);
            let Effect::Send(message) = all.get_mut(1).unwrap().write(ICR, command) else {
                panic!("no message");
            };
            all.send(&message, Some(1));
            assert_eq!(who(&all), expected, "{command:#x}");
        }
    }

    #[test]
    fn ids_beyond_a_byte() {
        let mut all = lapics(1);
        all.add(300);
        all.get_mut(300).unwrap().write(SPIV, 0x1ff);
        let far = Msi { address: 0x0000_0100_fee2_c000, data: 0x41, device: None };
        assert_eq!(all.send(&Message::from_msi(far, true), None), Outcome::Delivered(1));
        assert_eq!(who(&all), [300]);
    }
}
