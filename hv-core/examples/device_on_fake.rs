//! How a downstream crate tests its own device against KVM's rules, without KVM.
//!
//! The device is a small alarm clock: the guest writes a number to its doorbell, an ioeventfd, so
//! that no vCPU exits; when the alarm is due the device raises an MSI through an irqfd. It is written
//! against two traits of hv-core and never learns what is behind them. The tests put it on
//! `FakeKvm` and play the guest.
//!
//! `cargo run -p hv-core --example device_on_fake --features fake`, or `cargo test` with the same.

use hv_core::{
    Error, EventFd, Gsi, Hypervisor, IoAddress, IoEvent, IoEventBackend, IrqBackend, Irqfd, Msi,
    Route, RouteTarget,
};

/// The device, for any VM that has interrupts and doorbells.
struct Alarm<'a, V: IrqBackend + IoEventBackend> {
    vm: &'a V,
    doorbell: IoEvent,
    interrupt: Irqfd,
    masked: bool,
}

impl<'a, V: IrqBackend + IoEventBackend> Alarm<'a, V> {
    /// Plugs it in: the doorbell at an address, the interrupt as a message through a GSI.
    fn plug<H: Hypervisor>(
        hypervisor: &H,
        vm: &'a V,
        doorbell: u64,
        gsi: Gsi,
        message: Msi,
    ) -> Result<Self, Error> {
        // Before the irqfd: KVM takes one without a route, and drops what is signalled then.
        vm.set_gsi_routing(&[Route { gsi, target: RouteTarget::Msi(message) }])?;
        let interrupt = Irqfd { event: hypervisor.eventfd()?, gsi, resample: None };
        vm.irqfd_assign(&interrupt)?;
        let doorbell = IoEvent {
            address: IoAddress::Mmio(doorbell),
            length: 4,
            datamatch: None,
            event: hypervisor.eventfd()?,
        };
        vm.ioeventfd_assign(&doorbell)?;
        Ok(Self { vm, doorbell, interrupt, masked: false })
    }

    /// What the device's thread does: if the doorbell was rung, the alarm goes off.
    fn poll(&self) -> bool {
        let rung = self.doorbell.event.take().is_some();
        if rung {
            self.interrupt.event.signal();
        }
        rung
    }

    /// Masks by unbinding the eventfd, which then keeps what is signalled. Dropping the route
    /// instead would lose it.
    fn set_masked(&mut self, masked: bool) -> Result<(), Error> {
        if masked != self.masked {
            match masked {
                true => self.vm.irqfd_deassign(&self.interrupt.event, self.interrupt.gsi)?,
                false => self.vm.irqfd_assign(&self.interrupt)?,
            }
            self.masked = masked;
        }
        Ok(())
    }

    /// The eventfd of its interrupt.
    fn event(&self) -> &EventFd {
        &self.interrupt.event
    }

    fn unplug(mut self) -> Result<(), Error> {
        self.set_masked(true)?;
        self.vm.ioeventfd_deassign(&self.doorbell)?;
        self.vm.set_gsi_routing(&[])
    }
}

/// From here on: how it is tested.
mod on_the_fake {
    use super::{Alarm, Error, Gsi, Hypervisor, IoAddress, IrqBackend, Msi};
    use hv_core::fake::{FakeHost, FakeKvm, FakeVm, Finding, GuestStep, Interrupt, Loss, Wrote};
    use hv_core::{Capability, Errno, Ioctl, Vcpu, VcpuExit, Vm};

    const DOORBELL: u64 = 0xd000_0000;
    const GSI: Gsi = Gsi(24);
    const MESSAGE: Msi = Msi { address: 0xfee0_0000, data: 0x51, device: None };

    /// A VM with an irqchip, and a vCPU whose guest has switched its local APIC on.
    fn vm(kvm: &FakeKvm) -> Result<(FakeVm, impl Vcpu), Error> {
        let vm = kvm.create_vm(0)?;
        vm.create_irqchip()?;
        let vcpu = vm.create_vcpu(0)?;
        vm.view().enable_apic(0);
        Ok((vm, vcpu))
    }

    /// A scripted guest rings; nothing exits, and the interrupt comes back.
    pub(super) fn rings_and_interrupts() -> Result<(), Error> {
        let host = FakeHost::default()
            .guest(0, [GuestStep::write(IoAddress::Mmio(DOORBELL), 1u32.to_le_bytes())]);
        let kvm = FakeKvm::new(host);
        let (vm, mut vcpu) = vm(&kvm)?;
        let alarm = Alarm::plug(&kvm, &vm, DOORBELL, GSI, MESSAGE)?;

        assert_eq!(vcpu.run()?, VcpuExit::Hlt, "the write did not exit");
        assert!(alarm.poll());
        assert_eq!(vm.view().take_interrupts(0), [Interrupt::Fixed(0x51)]);
        // Another width is not the doorbell's, so the VMM sees it.
        assert_eq!(vm.view().guest_write(IoAddress::Mmio(DOORBELL), &[1]), Wrote::Exit);

        alarm.unplug()?;
        drop((vm, vcpu));
        assert_eq!(kvm.findings(), [], "nothing lost, nothing left behind");
        Ok(())
    }

    /// What happens while the interrupt is masked arrives once it no longer is.
    pub(super) fn keeps_events_while_masked() -> Result<(), Error> {
        let kvm = FakeKvm::default();
        let (vm, _vcpu) = vm(&kvm)?;
        let mut alarm = Alarm::plug(&kvm, &vm, DOORBELL, GSI, MESSAGE)?;
        alarm.set_masked(true)?;
        alarm.event().signal();
        assert_eq!(vm.view().take_interrupts(0), []);
        alarm.set_masked(false)?;
        assert_eq!(vm.view().take_interrupts(0), [Interrupt::Fixed(0x51)]);
        assert_eq!(kvm.findings(), []);
        Ok(())
    }

    /// The mistake this design avoids. KVM answers 0 to all of it; the fake tells.
    pub(super) fn strict_mode_shows_a_lost_event() -> Result<(), Error> {
        let kvm = FakeKvm::default();
        let (vm, _vcpu) = vm(&kvm)?;
        let alarm = Alarm::plug(&kvm, &vm, DOORBELL, GSI, MESSAGE)?;
        vm.set_gsi_routing(&[])?;
        alarm.event().signal();
        let lost = Finding::LostEvent { gsi: GSI, why: Loss::Unrouted };
        assert_eq!(kvm.findings(), [Finding::UnroutedIrqfd { gsi: GSI }, lost]);
        Ok(())
    }

    /// On another host: fewer routes, and how the device takes it.
    pub(super) fn a_smaller_host_refuses_the_gsi() -> Result<(), Error> {
        let kvm = FakeKvm::new(FakeHost::default().with(Capability::IrqRouting, 24));
        let (vm, _vcpu) = vm(&kvm)?;
        let before = kvm.calls();
        let refused = Alarm::plug(&kvm, &vm, DOORBELL, GSI, MESSAGE).err();
        assert_eq!(refused.map(|error| error.errno), Some(Errno::EINVAL));
        let calls = kvm.calls().since(&before);
        assert_eq!((calls.of(Ioctl::SetGsiRouting), calls.total()), (1, 1), "nothing to undo");
        Ok(())
    }
}

fn main() -> Result<(), Error> {
    on_the_fake::rings_and_interrupts()?;
    on_the_fake::keeps_events_while_masked()?;
    on_the_fake::strict_mode_shows_a_lost_event()?;
    on_the_fake::a_smaller_host_refuses_the_gsi()?;
    println!("The alarm clock works, on a KVM in memory.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Error, on_the_fake};

    #[test]
    fn the_device_rings_and_interrupts() -> Result<(), Error> {
        on_the_fake::rings_and_interrupts()
    }

    #[test]
    fn the_device_keeps_events_while_masked() -> Result<(), Error> {
        on_the_fake::keeps_events_while_masked()
    }

    #[test]
    fn strict_mode_shows_a_lost_event() -> Result<(), Error> {
        on_the_fake::strict_mode_shows_a_lost_event()
    }

    #[test]
    fn a_smaller_host_refuses_the_gsi() -> Result<(), Error> {
        on_the_fake::a_smaller_host_refuses_the_gsi()
    }
}
