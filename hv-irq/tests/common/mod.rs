//! A router on a VM of the KVM in memory, and its guest.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not each test uses all; one that can't go on fails"
)]

use std::sync::{Arc, Mutex};

use hv_core::fake::{FakeKvm, FakeVcpu, FakeVm, Interrupt, VmView};
use hv_core::{
    Capability, Errno, Error, EventFd, Gsi, Hypervisor, IoAddress, Ioctl, IrqBackend, Irqfd,
    LineStatus, Msi, MsiStatus, Route, Vm,
};
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

    /// The vectors the guest takes on a vCPU from its local APIC.
    pub(crate) fn taken(&self, vcpu: u32) -> Vec<u8> {
        taken(&self.view, vcpu)
    }

    /// The VM, to fail at times and to complain.
    pub(crate) fn faulty(&self) -> Arc<FaultyVm> {
        Arc::new(FaultyVm { vm: self.vm.clone(), view: self.view.clone(), plan: Mutex::default() })
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

/// The vectors the guest of a VM takes on a vCPU from its local APIC.
pub(crate) fn taken(view: &VmView, vcpu: u32) -> Vec<u8> {
    let fixed = |interrupt| match interrupt {
        Interrupt::Fixed(vector) => Some(vector),
        _ => None,
    };
    view.take_interrupts(vcpu).into_iter().filter_map(fixed).collect()
}

/// A VM that fails when told to, and remembers what a router should never have asked for.
#[derive(Debug)]
pub(crate) struct FaultyVm {
    vm: Arc<FakeVm>,
    pub(crate) view: VmView,
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// Calls from now on that succeed, then how many fail.
    faults: Option<(usize, usize)>,
    injected: usize,
    complaints: Vec<String>,
}

impl FaultyVm {
    /// After `calls` more calls, `failures` fail (`ENOMEM`) and never reach the VM.
    pub(crate) fn fail_after(&self, calls: usize, failures: usize) {
        let mut plan = self.plan.lock().unwrap();
        (plan.faults, plan.injected) = (Some((calls, failures)), 0);
    }

    /// Stops failing, and says how many calls failed.
    pub(crate) fn heal(&self) -> usize {
        let mut plan = self.plan.lock().unwrap();
        plan.faults = None;
        std::mem::take(&mut plan.injected)
    }

    /// What KVM refused by itself, or would have lost.
    pub(crate) fn complaints(&self) -> Vec<String> {
        self.plan.lock().unwrap().complaints.clone()
    }

    pub(crate) fn forgive(&self) {
        self.plan.lock().unwrap().complaints.clear();
    }

    fn call<T>(
        &self,
        ioctl: Ioctl,
        call: impl FnOnce(&FakeVm) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut plan = self.plan.lock().unwrap();
        match &mut plan.faults {
            Some((0, failures)) if *failures > 0 => {
                *failures -= 1;
                plan.injected += 1;
                return Err(Error::new(ioctl, Errno::ENOMEM));
            }
            Some((calls, _)) => *calls = calls.saturating_sub(1),
            None => {}
        }
        let answer = call(&self.vm);
        if let Err(error) = &answer {
            plan.complaints.push(error.to_string());
        }
        answer
    }
}

impl IrqBackend for FaultyVm {
    fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error> {
        let same = self.view.routes() == routes;
        self.call(Ioctl::SetGsiRouting, |vm| vm.set_gsi_routing(routes))?;
        let mut plan = self.plan.lock().unwrap();
        if same {
            plan.complaints.push("the table was written as it was".into());
        }
        for Irqfd { gsi, .. } in self.view.irqfds() {
            if !routes.iter().any(|route| route.gsi == gsi) {
                plan.complaints.push(format!("GSI {gsi} lost its route while bound"));
            }
        }
        Ok(())
    }

    fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error> {
        self.call(Ioctl::Irqfd, |vm| vm.irqfd_assign(irqfd))
    }

    fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error> {
        self.call(Ioctl::Irqfd, |vm| vm.irqfd_deassign(event, gsi))
    }

    fn irq_line(&self, gsi: Gsi, level: bool) -> Result<(), Error> {
        self.call(Ioctl::IrqLine, |vm| vm.irq_line(gsi, level))
    }

    fn irq_line_status(&self, gsi: Gsi, level: bool) -> Result<LineStatus, Error> {
        self.call(Ioctl::IrqLineStatus, |vm| vm.irq_line_status(gsi, level))
    }

    fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error> {
        self.call(Ioctl::SignalMsi, |vm| vm.signal_msi(msi))
    }
}
