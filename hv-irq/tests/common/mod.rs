//! A router on a VM of the KVM in memory, and its guest.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not each test uses all; one that can't go on fails"
)]

use std::sync::Arc;

use hv_core::fake::{FakeKvm, FakeVcpu, FakeVm, VmView};
use hv_core::{Capability, EventFd, Hypervisor, IoAddress, Ioctl, Msi, Vm};
use hv_irq::{IrqRouter, LegacyPins, RouterConfig};

/// A VM with its irqchip and two vCPUs whose local APICs are on.
pub(crate) struct Machine {
    pub(crate) kvm: FakeKvm,
    pub(crate) vm: Arc<FakeVm>,
    pub(crate) view: VmView,
    pub(crate) config: RouterConfig,
    vcpus: Vec<FakeVcpu>,
}

impl Machine {
    pub(crate) fn new(kvm: &FakeKvm, pins: LegacyPins) -> Self {
        let vm = kvm.create_vm(0).unwrap();
        match pins {
            LegacyPins::Kernel => vm.create_irqchip().unwrap(),
            LegacyPins::Userspace => {
                vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
            }
        }
        let vcpus = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let view = vm.view();
        (0..2).for_each(|id| view.enable_apic(id));
        let gsi_count = vm.check_extension(Capability::IrqRouting).unwrap();
        let config = RouterConfig::new(gsi_count.try_into().unwrap(), pins);
        Self { kvm: kvm.clone(), vm: Arc::new(vm), view, config, vcpus }
    }

    pub(crate) fn router(&self) -> IrqRouter<FakeVm> {
        IrqRouter::new(self.vm.clone(), self.config).unwrap()
    }

    pub(crate) fn event(&self) -> EventFd {
        self.kvm.eventfd().unwrap()
    }

    pub(crate) fn events(&self, n: usize) -> Vec<EventFd> {
        (0..n).map(|_| self.event()).collect()
    }

    /// How often `KVM_SET_GSI_ROUTING` was called.
    pub(crate) fn tables(&self) -> u64 {
        self.kvm.calls().of(Ioctl::SetGsiRouting)
    }

    /// The vectors the guest takes on a vCPU.
    pub(crate) fn taken(&self, vcpu: u32) -> Vec<u8> {
        let taken = self.view.take_interrupts(vcpu);
        taken.into_iter().filter_map(|interrupt| interrupt.vector()).collect()
    }

    /// The guest programs a pin of the I/O APIC in the kernel.
    pub(crate) fn program_pin(&self, pin: u8, entry: u64) {
        for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry)] {
            let write = |offset: u64, value: u32| {
                let _ = self
                    .view
                    .guest_write(IoAddress::Mmio(0xfec0_0000 + offset), &value.to_le_bytes());
            };
            write(0, register.into());
            write(0x10, value as u32);
        }
    }
}

/// A message to a vCPU.
pub(crate) fn msi(vcpu: u8, vector: u8) -> Msi {
    let address = 0xfee0_0000 | u64::from(vcpu) << 12;
    Msi { address, data: vector.into(), device: None }
}
