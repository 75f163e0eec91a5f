//! A VM as a test sees it: what is in it, and what its guest does.

use std::fmt;
use std::sync::Arc;

use super::bus::{Piece, Wrote};
use super::guest::{GuestStep, Seen};
use super::irq::{Interrupt, Kind};
use super::run::after;
use super::state::Shared;
use crate::{CoalescedWrite, CoalescedZone, IoAddress, IoEvent, Irqfd, MemorySlot, Route};

/// A look into a VM. Clones look into the same one; none keeps it.
///
/// Whatever is asked, what was signalled before has been delivered. Of a VM that has gone, what it
/// delivered can still be asked for.
///
/// ```
/// use hv_core::fake::{FakeKvm, Interrupt, Wrote};
/// use hv_core::{Gsi, Hypervisor, IoAddress, IrqBackend, Irqfd, Msi, Route, RouteTarget, Vm};
///
/// let kvm = FakeKvm::default();
/// let vm = kvm.create_vm(0)?;
/// vm.create_irqchip()?;
/// let _vcpu = vm.create_vcpu(0)?;
/// let guest = vm.view();
/// guest.enable_apic(0);
///
/// let message = Msi { address: 0xfee0_0000, data: 0x51, device: None };
/// vm.set_gsi_routing(&[Route { gsi: Gsi(24), target: RouteTarget::Msi(message) }])?;
/// let event = kvm.eventfd()?;
/// vm.irqfd_assign(&Irqfd { event: event.clone(), gsi: Gsi(24), resample: None })?;
///
/// event.signal();
/// event.signal();
/// // What waits already is not delivered twice.
/// assert_eq!(guest.take_interrupts(0), [Interrupt::Fixed(0x51)]);
/// assert_eq!(guest.take_interrupts(0), []);
/// assert_eq!(guest.guest_write(IoAddress::Pio(0x3f8), b"A"), Wrote::Exit);
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Clone)]
pub struct VmView(pub(super) Arc<Shared>);

impl fmt::Debug for VmView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmView").finish_non_exhaustive()
    }
}

impl VmView {
    pub(super) fn new(vm: Arc<Shared>) -> Self {
        Self(vm)
    }

    /// Which interrupt controllers KVM has for it.
    #[must_use]
    pub fn irqchip(&self) -> Option<Kind> {
        self.0.with(|state| state.irq.kind())
    }

    /// The routing table, in the order it was set.
    #[must_use]
    pub fn routes(&self) -> Vec<Route> {
        self.0.with(|state| state.irq.routes().to_vec())
    }

    /// The irqfds that are assigned. Holding one holds its eventfds open.
    #[must_use]
    pub fn irqfds(&self) -> Vec<Irqfd> {
        self.0.with(|state| state.irq.irqfds())
    }

    /// The memory slots, by number.
    #[must_use]
    pub fn slots(&self) -> Vec<MemorySlot> {
        self.0.with(|state| state.memory.slots().cloned().collect())
    }

    /// The ioeventfds that are assigned.
    #[must_use]
    pub fn ioeventfds(&self) -> Vec<IoEvent> {
        self.0.with(|state| state.io.ioevents())
    }

    /// The coalesced zones, duplicates included.
    #[must_use]
    pub fn coalesced_zones(&self) -> Vec<CoalescedZone> {
        self.0.with(|state| state.io.zones())
    }

    /// The ids of the vCPUs that were created.
    #[must_use]
    pub fn vcpus(&self) -> Vec<u32> {
        self.0.with(|state| state.vcpus.keys().copied().collect())
    }

    /// Every interrupt that was delivered to a vCPU, in order, taken or not.
    #[must_use]
    pub fn interrupts(&self, vcpu: u32) -> Vec<Interrupt> {
        self.0.with(|state| state.irq.log(vcpu).to_vec())
    }

    /// The guest takes what is pending, whatever its interrupt flag says: what the VMM injected, INIT
    /// and start-up, SMI, NMI, the 8259 pair, then vectors by priority.
    ///
    /// A vector whose end nobody waits for ends at once. One that was level-triggered, or has a
    /// resample eventfd, or is of a pin of the VMM's own I/O APIC, is in service until
    /// [`Self::end_of_interrupt`], and keeps back its own priority class and those below.
    #[must_use]
    pub fn take_interrupts(&self, vcpu: u32) -> Vec<Interrupt> {
        self.0.with(|state| state.take_interrupts(vcpu))
    }

    /// The guest ends an interrupt at the local APIC.
    pub fn end_of_interrupt(&self, vcpu: u32, vector: u8) {
        self.0.with(|state| {
            state.irq.end_of_interrupt(vcpu, vector);
        });
    }

    /// The guest switches the local APIC of a vCPU on (its spurious interrupt vector register), as
    /// an operating system does: until then it takes no interrupts but NMI, INIT and the like. Nothing
    /// without an in-kernel irqchip.
    pub fn enable_apic(&self, vcpu: u32) {
        const SPURIOUS: u64 = 0xfee0_00f0;
        self.0.with(|state| state.irq.mmio_write(vcpu, SPURIOUS, &0x1ffu32.to_le_bytes()));
    }

    /// vCPU 0 writes, without being run: what the kernel serves happens. What would be an exit is
    /// only told.
    #[must_use]
    pub fn guest_write(&self, address: IoAddress, data: &[u8]) -> Wrote {
        self.0.with(|state| {
            let (mut address, mut rest, mut worst) = (address, data, Wrote::Memory);
            while !rest.is_empty() {
                if state.memory.ring_is_full(0) {
                    return Wrote::Exit;
                }
                let Piece { len, result, .. } = state.write(0, address, rest);
                worst = worst.max(result);
                rest = rest.get(len.max(1)..).unwrap_or_default();
                match after(address, len) {
                    Some(next) => address = next,
                    None => return Wrote::Exit,
                }
            }
            worst
        })
    }

    /// vCPU 0 reads, without being run. False if not all of it is served by the kernel.
    #[must_use]
    pub fn guest_read(&self, address: IoAddress, data: &mut [u8]) -> bool {
        self.0.with(|state| {
            let (mut address, mut rest) = (address, data);
            while !rest.is_empty() {
                let Piece { result: Some(read), .. } = state.read(0, address, rest.len()) else {
                    return false;
                };
                let Some((now, later)) = rest.split_at_mut_checked(read.len().max(1)) else {
                    return false;
                };
                now.copy_from_slice(&read);
                rest = later;
                match after(address, read.len()) {
                    Some(next) => address = next,
                    None => return rest.is_empty(),
                }
            }
            true
        })
    }

    /// What coalesced zones have collected and nobody has taken
    /// ([`Vcpu::take_coalesced_write`](crate::Vcpu::take_coalesced_write)), in order.
    #[must_use]
    pub fn collected(&self) -> Vec<CoalescedWrite> {
        self.0.with(|state| state.io.collected().copied().collect())
    }

    /// Adds to what a vCPU does when it is run. Nothing for a vCPU that does not exist.
    pub fn program(&self, vcpu: u32, steps: impl IntoIterator<Item = GuestStep>) {
        // Whatever the iterator does, it does it without the lock.
        let steps: Vec<_> = steps.into_iter().collect();
        self.0.with(|state| {
            if let Some(vcpu) = state.vcpus.get_mut(&vcpu) {
                vcpu.script.extend(steps);
            }
        });
    }

    /// What the guest of a vCPU has got to see since this was last asked.
    #[must_use]
    pub fn take_seen(&self, vcpu: u32) -> Vec<Seen> {
        self.0
            .with(|state| state.vcpus.get_mut(&vcpu).map_or_else(Vec::new, |vcpu| vcpu.take_seen()))
    }
}
