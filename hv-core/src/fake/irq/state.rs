//! The registers of the irqchips as the structure of `KVM_GET_IRQCHIP` and `KVM_SET_IRQCHIP`.
//!
//! That is a C union. Storing into one is safe; it is read by its bytes.

use kvm_bindings::{
    kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1,
    kvm_pic_state,
};
use zerocopy::{FromBytes, IntoBytes};

use super::ioapic::Registers;
use crate::IrqchipId;

/// Where the registers begin, after the number of the chip and padding.
const REGISTERS: usize = 8;

fn empty(chip: IrqchipId) -> kvm_irqchip {
    let registers = kvm_irqchip__bindgen_ty_1 { dummy: [0; 512] };
    kvm_irqchip { chip_id: chip.0, pad: 0, chip: registers }
}

pub(super) fn from_pic(chip: IrqchipId, registers: kvm_pic_state) -> kvm_irqchip {
    let mut state = empty(chip);
    state.chip.pic = registers;
    state
}

pub(super) fn from_ioapic(registers: Registers) -> kvm_irqchip {
    let mut state = empty(IrqchipId::IOAPIC);
    state.chip.ioapic = kvm_ioapic_state {
        base_address: registers.base,
        ioregsel: registers.select,
        id: registers.id,
        irr: registers.irr,
        pad: 0,
        redirtbl: registers.entries.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
    };
    state
}

pub(super) fn to_pic(state: &kvm_irqchip) -> Option<kvm_pic_state> {
    let (registers, _) =
        kvm_pic_state::read_from_prefix(state.as_bytes().get(REGISTERS..)?).ok()?;
    Some(registers)
}

pub(super) fn to_ioapic(state: &kvm_irqchip) -> Option<Registers> {
    let bytes = state.as_bytes().get(REGISTERS..)?;
    let (base, bytes) = u64::read_from_prefix(bytes).ok()?;
    let ([select, id, irr, _pad], bytes) = <[u32; 4]>::read_from_prefix(bytes).ok()?;
    let (entries, _) = FromBytes::read_from_prefix(bytes).ok()?;
    Some(Registers { base, select, id, irr, entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_the_structure() {
        let pic =
            kvm_pic_state { imr: 0xfb, irq_base: 0x28, elcr_mask: 0xde, ..Default::default() };
        let state = from_pic(IrqchipId::PIC_SLAVE, pic);
        assert_eq!((state.chip_id, to_pic(&state)), (1, Some(pic)));

        let entries = std::array::from_fn(|pin| pin as u64 * 0x0101_0101_0101_0101);
        let ioapic = Registers { base: 0xfec0_0000, select: 0x11, id: 3, irr: 5, entries };
        let state = from_ioapic(ioapic.clone());
        assert_eq!((state.chip_id, to_ioapic(&state)), (2, Some(ioapic)));
    }
}
