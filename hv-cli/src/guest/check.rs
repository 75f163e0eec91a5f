//! The checks by number and name, and which of them a machine can run.

macro_rules! checks {
    ($($check:ident $name:literal,)*) => {
        /// A check. Its number, which the guest uses too, is its place in this list.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum Check {
            $($check,)*
        }

        impl Check {
            /// All of them, in the order they run.
            pub(super) const ALL: &'static [Check] = &[$(Check::$check,)*];

            /// What a report calls it.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Check::$check => $name,)*
                }
            }
        }
    };
}

checks! {
    LongMode "long-mode",
    Com1 "com1",
    Port1 "port-1",
    Port2 "port-2",
    Port4 "port-4",
    PortString "port-string",
    Mmio1 "mmio-1",
    Mmio2 "mmio-2",
    Mmio4 "mmio-4",
    Mmio8 "mmio-8",
    MmioString "mmio-string",
    Readonly "readonly-slot",
    LapicTimer "lapic-timer",
    Com1Ioapic "com1-ioapic",
    PitIoapic "pit-ioapic",
    Msi "msi",
    Irqfd "irqfd",
    Ioeventfd "ioeventfd",
    SecondVcpu "second-vcpu",
    Ipi "ipi",
}

impl Check {
    /// The check with this number.
    pub(super) fn from_number(number: u32) -> Option<Check> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Its number.
    pub(super) fn number(self) -> u32 {
        self as u32
    }
}

/// What the machine under the guest has, as far as a check depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Its vCPUs.
    pub vcpus: u32,
    /// There is a PIT, and the I/O APIC has its GSI 0 on pin 2 (not in split mode).
    pub pit_on_ioapic: bool,
    /// Slots can be read-only (`KVM_CAP_READONLY_MEM`).
    pub readonly_slots: bool,
    /// Messages can be sent (`KVM_CAP_SIGNAL_MSI`).
    pub signal_msi: bool,
    /// Eventfds can raise interrupts (`KVM_CAP_IRQFD`), through routes (`KVM_CAP_IRQ_ROUTING`).
    pub irqfd: bool,
    /// Writes can signal eventfds (`KVM_CAP_IOEVENTFD`).
    pub ioeventfd: bool,
}

impl Facts {
    /// Why `check` can't run on this machine; `None` if it can.
    pub(super) fn not_applicable(&self, check: Check) -> Option<&'static str> {
        let (has, reason) = match check {
            Check::PitIoapic => (self.pit_on_ioapic, "a split irqchip has no PIT"),
            Check::Readonly => (self.readonly_slots, "this KVM has no KVM_CAP_READONLY_MEM"),
            Check::Msi => (self.signal_msi, "this KVM has no KVM_CAP_SIGNAL_MSI"),
            Check::Irqfd => (self.irqfd, "this KVM has no KVM_CAP_IRQFD or no KVM_CAP_IRQ_ROUTING"),
            Check::Ioeventfd => (self.ioeventfd, "this KVM has no KVM_CAP_IOEVENTFD"),
            Check::SecondVcpu | Check::Ipi => (self.vcpus >= 2, "the machine has one vCPU"),
            _ => return None,
        };
        (!has).then_some(reason)
    }
}

#[cfg(test)]
pub(super) const EVERYTHING: Facts = Facts {
    vcpus: 2,
    pit_on_ioapic: true,
    readonly_slots: true,
    signal_msi: true,
    irqfd: true,
    ioeventfd: true,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_places_and_names_differ() {
        for (place, &check) in Check::ALL.iter().enumerate() {
            assert_eq!(check.number() as usize, place);
            assert_eq!(Check::from_number(place as u32), Some(check));
        }
        assert_eq!(Check::from_number(Check::ALL.len() as u32), None);
        assert_eq!(Check::from_number(u32::MAX), None);
        let mut names: Vec<_> = Check::ALL.iter().map(|c| c.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Check::ALL.len());
        assert!(Check::ALL.len() <= 32, "the guest gets them as the bits of 4 bytes");
    }

    #[test]
    fn what_a_machine_lacks_rules_out_exactly_what_needs_it() {
        let ruled_out = |facts: Facts| -> Vec<Check> {
            Check::ALL.iter().copied().filter(|&c| facts.not_applicable(c).is_some()).collect()
        };
        assert_eq!(ruled_out(EVERYTHING), []);
        assert_eq!(ruled_out(Facts { vcpus: 1, ..EVERYTHING }), [Check::SecondVcpu, Check::Ipi]);
        assert_eq!(ruled_out(Facts { pit_on_ioapic: false, ..EVERYTHING }), [Check::PitIoapic]);
        assert_eq!(ruled_out(Facts { readonly_slots: false, ..EVERYTHING }), [Check::Readonly]);
        assert_eq!(ruled_out(Facts { signal_msi: false, ..EVERYTHING }), [Check::Msi]);
        assert_eq!(ruled_out(Facts { irqfd: false, ..EVERYTHING }), [Check::Irqfd]);
        assert_eq!(ruled_out(Facts { ioeventfd: false, ..EVERYTHING }), [Check::Ioeventfd]);
    }
}
