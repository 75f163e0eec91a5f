//! A KVM in memory, with KVM's rules.
