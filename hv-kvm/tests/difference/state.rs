//! What can be seen of a VM's interrupts: the registers of its interrupt controllers.

#![allow(unsafe_code, reason = "kvm_irqchip is a union")]

use std::collections::BTreeMap;

use hv_core::conformance::Guest;
use hv_core::{Vcpu, Vm};
use kvm_bindings::{kvm_irqchip, kvm_lapic_state};

/// The registers of the I/O APIC in `kvm_ioapic_state`, behind base, select, id and requests.
const REDIRECTIONS: usize = 24;

/// The registers of a VM, by name.
pub(crate) type State = BTreeMap<String, u64>;

/// Registers of the local APIC that go by themselves: the timer's current count; and the
/// processor priority, which KVM works out when it needs it.
const MOVING: [usize; 2] = [0x390, 0xa0];

pub(crate) fn state<V: Vm, G: Guest<Vcpu = V::Vcpu>>(
    vm: &V,
    guests: &mut BTreeMap<u32, G>,
) -> State {
    let mut state = State::new();
    for (id, guest) in guests {
        if let Ok(lapic) = guest.vcpu().lapic() {
            for offset in (0..0x400).step_by(16).filter(|offset| !MOVING.contains(offset)) {
                let register = lapic_register(&lapic, offset);
                state.insert(format!("local APIC {id}, {offset:#05x}"), register.into());
            }
        }
    }
    for (id, name) in [(0, "master 8259"), (1, "slave 8259")] {
        if let Ok(chip) = vm.irqchip(id) {
            for (n, byte) in bytes(&chip)[..16].iter().enumerate() {
                state.insert(format!("{name}, {}", PIC[n]), u64::from(*byte));
            }
        }
    }
    if let Ok(chip) = vm.irqchip(2) {
        for (n, bytes) in bytes(&chip)[..REDIRECTIONS + 24 * 8].chunks(8).enumerate() {
            let name = match n {
                0 => "base".into(),
                1 => "select and id".into(),
                2 => "requests".into(),
                n => format!("pin {:02}", n - 3),
            };
            let value = u64::from_le_bytes(bytes.try_into().unwrap());
            state.insert(format!("I/O APIC, {name}"), value);
        }
    }
    state
}

/// The fields of `kvm_pic_state`.
const PIC: [&str; 16] = [
    "last_irr",
    "irr",
    "imr",
    "isr",
    "priority_add",
    "irq_base",
    "read_reg_select",
    "poll",
    "special_mask",
    "init_state",
    "auto_eoi",
    "rotate_on_auto_eoi",
    "special_fully_nested_mode",
    "init4",
    "elcr",
    "elcr_mask",
];

fn bytes(chip: &kvm_irqchip) -> [u8; 512] {
    // SAFETY: `dummy` is as long as the union, all of which KVM or the fake has written, and any
    // bytes are a value of it.
    unsafe { chip.chip.dummy }.map(|byte| byte as u8)
}

/// The I/O APIC with another redirection entry.
pub(crate) fn with_redirection(chip: &kvm_irqchip, pin: usize, entry: u64) -> kvm_irqchip {
    let mut dummy = bytes(chip);
    let at = REDIRECTIONS + pin * 8;
    dummy[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    let mut chip = *chip;
    chip.chip.dummy = dummy.map(|byte| byte as _);
    chip
}

fn lapic_register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| lapic.regs[offset + n] as u8))
}

pub(crate) fn set_lapic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (n, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + n] = byte as _;
    }
}
