//! Pin 8 of the I/O APIC, the real-time clock's, of which KVM tells more: a caller that asks what
//! became of its line hears "coalesced" until every processor that took the last one has ended it.

use std::collections::BTreeMap;

use super::lapic::Lapic;
use super::lapics::{self, Lapics};
use super::message::{Message, Outcome};

/// The pin.
pub(super) const PIN: u32 = 8;

/// Who has not ended the last interrupt that a caller asked about.
#[derive(Debug, Default)]
pub(super) struct Clock {
    /// How many processors it reached. One that takes it as no vector never ends it.
    waiting: u32,
    /// The vCPUs that took it, and with which vector.
    takers: BTreeMap<u32, u8>,
}

impl Clock {
    pub(super) fn waits(&self) -> bool {
        self.waiting > 0
    }

    /// It was sent.
    pub(super) fn sent(&mut self, message: &Message, outcome: Outcome, lapics: &Lapics) {
        self.waiting = outcome.count().unwrap_or(0);
        self.takers.extend(lapics.last_takers().map(|vcpu| (vcpu, message.vector)));
    }

    /// A vCPU ended a vector.
    pub(super) fn ended(&mut self, vcpu: u32, vector: u8) {
        if self.takers.get(&vcpu) == Some(&vector) {
            self.takers.remove(&vcpu);
            self.waiting = self.waiting.saturating_sub(1);
        }
    }

    /// State was set: whoever has the vector of the pin requested or in service is taken to have it
    /// from there.
    pub(super) fn restore_all(&mut self, message: &Message, lapics: &Lapics) {
        *self = Self::default();
        for lapic in lapics.iter() {
            self.restore(message, lapic);
        }
    }

    /// The same for one local APIC.
    pub(super) fn restore(&mut self, message: &Message, lapic: &Lapic) {
        if !lapics::meant(lapic, message.destination, None) {
            return;
        }
        let vcpu = lapic.vcpu();
        match (lapic.has(message.vector), self.takers.contains_key(&vcpu)) {
            (true, false) => {
                self.takers.insert(vcpu, message.vector);
                self.waiting = self.waiting.saturating_add(1);
            }
            (false, true) => {
                self.takers.remove(&vcpu);
                self.waiting = self.waiting.saturating_sub(1);
            }
            _ => {}
        }
    }
}
