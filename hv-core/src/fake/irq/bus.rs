//! Loads and stores of the guest that the interrupt controllers answer: the local APIC's page, the
//! I/O APIC, and the ports of the 8259 pair.

use super::lapic::Effect;
use super::{Irq, ioapic};
use crate::IrqchipId;

/// Where the local APIC of every vCPU is. (`APIC_BASE` is not followed.)
const LAPIC: u64 = 0xfee0_0000;
const LAPIC_LENGTH: u64 = 0x1000;

impl Irq {
    /// A store of a vCPU to a guest-physical address; `false` if nobody here is at that address. One
    /// to a local APIC may leave a vector for [`Self::take_ioapic_eoi`].
    pub(in crate::fake) fn mmio_write(&mut self, vcpu: u32, address: u64, data: &[u8]) -> bool {
        if let Some(offset) = self.lapic_offset(vcpu, address) {
            // Registers are 4 bytes in 16; KVM ignores any other store.
            let register = u16::try_from(offset).ok().filter(|offset| offset % 16 == 0);
            if let (Some(register), Ok(value)) = (register, <[u8; 4]>::try_from(data)) {
                self.write_lapic(vcpu, register, u32::from_le_bytes(value));
            }
            return true;
        }
        let Some(pins) = &mut self.pins else {
            return false;
        };
        let Some(register) = pins.ioapic.register_at(address) else {
            return false;
        };
        let effect = pins.ioapic.write(register, little_endian(data));
        self.listeners_changed();
        if let ioapic::Effect::Unmasked(pin) = effect {
            self.unmasked(pin);
        }
        true
    }

    fn lapic_offset(&self, vcpu: u32, address: u64) -> Option<u64> {
        let offset = address.checked_sub(LAPIC).filter(|&offset| offset < LAPIC_LENGTH)?;
        (self.kind.is_some() && self.lapics.get(vcpu).is_some()).then_some(offset)
    }

    fn write_lapic(&mut self, vcpu: u32, register: u16, value: u32) {
        self.listen(vcpu);
        let Some(lapic) = self.lapics.get_mut(vcpu) else {
            return;
        };
        let readdresses = lapic.readdresses(register, value);
        match lapic.write(register, value) {
            Effect::None => {
                if readdresses {
                    self.listeners_changed();
                }
            }
            Effect::Send(message) => {
                self.lapics.send(&message, Some(vcpu));
            }
            Effect::Ended(vector) => {
                let due = self.ended(vcpu, vector);
                if let (Some(vector), Some(lapic)) = (due, self.lapics.get_mut(vcpu)) {
                    lapic.exit_with = Some(vector);
                }
            }
        }
    }

    /// A level-triggered pin whose line was high is no longer masked. The line may be low by now:
    /// its resamplers will say, by raising it again; without any it is taken for high.
    fn unmasked(&mut self, pin: u32) {
        let gsi = self.table.gsi_of(IrqchipId::IOAPIC, pin);
        let Some(pins) = &mut self.pins else {
            return;
        };
        match gsi.filter(|&gsi| self.irqfds.resamples(gsi)) {
            Some(gsi) => {
                pins.ioapic.forget(pin);
                self.irqfds.resample(gsi);
            }
            None => {
                pins.ioapic.send(pin, &mut self.lapics);
            }
        }
    }

    /// A load of a vCPU; `false` if nobody here is at that address.
    pub(in crate::fake) fn mmio_read(&self, vcpu: u32, address: u64, data: &mut [u8]) -> bool {
        let (value, skip) = if let Some(offset) = self.lapic_offset(vcpu, address) {
            let register = u16::try_from(offset & !15).unwrap_or(u16::MAX);
            let value = self.lapics.get(vcpu).map_or(0, |lapic| lapic.read(register));
            (value, usize::try_from(offset & 15).unwrap_or(0))
        } else {
            let Some(pins) = &self.pins else {
                return false;
            };
            let Some(register) = pins.ioapic.register_at(address) else {
                return false;
            };
            (pins.ioapic.read(register), 0)
        };
        let bytes = value.to_le_bytes().into_iter().skip(skip).chain(std::iter::repeat(0));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
        true
    }

    /// A store to a port; `false` if nobody here is at that port.
    pub(in crate::fake) fn port_write(&mut self, port: u16, data: &[u8]) -> bool {
        let Some(pins) = &mut self.pins else {
            return false;
        };
        let mine = match *data {
            [value] => pins.pic.write(port, value, self.lapics.any_takes_pic()),
            // A wider store is for the pair, and is ignored.
            _ => pins.pic.read(port).is_some(),
        };
        self.pic_ended();
        mine
    }

    /// A load from a port; `false` if nobody here is at that port.
    pub(in crate::fake) fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        let value = self.pins.as_ref().and_then(|pins| pins.pic.read(port));
        if let (Some(value), [byte]) = (value, data) {
            *byte = value;
        }
        value.is_some()
    }
}

fn little_endian(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
    }
    u32::from_le_bytes(bytes)
}
