//! The VM: what may be created when, and the VM-wide values.
//!
//! Interrupts, memory and doorbells are in [`super::backends`].

use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};

use super::irq::DirectedEoi;
use super::state::{Shared, State};
use super::{FakeVcpu, Finding, VmView};
use crate::{Capability, Context, Errno, Error, EventFd, IoAddress, Ioctl, Vm};

/// `KVM_MIN_ALLOC_MMU_PAGES`.
const MIN_MMU_PAGES: u64 = 64;
/// The last address the three pages of the task state segment can begin at.
const LAST_TSS: u64 = 0xffff_d000;
/// `KVM_CLOCK_TSC_STABLE`, `_REALTIME` and `_HOST_TSC`.
const CLOCK_FLAGS: u32 = 14;
/// The flags of `KVM_CAP_X2APIC_API`.
const X2APIC_USE_32BIT_IDS: u64 = 1;
const X2APIC_ENABLE_SUPPRESS_EOI: u64 = 4;
const X2APIC_DISABLE_SUPPRESS_EOI: u64 = 8;

/// A VM in memory.
///
/// It ends when this and all its [`FakeVcpu`]s are dropped, in any order; whatever is left in it then
/// is a [`super::Finding`]. What a test asks about it, and what its guest does, goes through
/// [`FakeVm::view`].
#[derive(Debug)]
pub struct FakeVm {
    handle: Arc<Handle>,
}

/// Keeps a VM.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl FakeVm {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { handle: Arc::new(Handle { shared }) }
    }

    /// To look at it, and to be its guest. A view does not keep the VM.
    #[must_use]
    pub fn view(&self) -> VmView {
        VmView::new(self.handle.shared.clone())
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    /// Counts a call, asks whether this host's KVM has it at all, and makes it.
    pub(super) fn call<R>(
        &self,
        ioctl: Ioctl,
        about: Context,
        f: impl FnOnce(&mut State) -> Result<R, Errno>,
    ) -> Result<R, Error> {
        let system = &self.shared().system;
        system.count(ioctl);
        let known = match ioctl {
            Ioctl::ResetDirtyRings => {
                self.has(Capability::DirtyLogRing) || self.has(Capability::DirtyLogRingAcqRel)
            }
            _ => needs(ioctl).is_none_or(|cap| self.has(cap)),
        };
        let result = self.shared().with(|state| if known { f(state) } else { Err(Errno::ENOTTY) });
        result.map_err(|errno| Error::new(ioctl, errno).about(about))
    }

    /// Whether an eventfd is bound in another VM of this KVM. VMs are asked one by one, so no lock is
    /// taken under another.
    pub(super) fn is_bound_elsewhere(&self, event: &EventFd) -> bool {
        let Some(id) = event.id() else { return false };
        let vms = self.shared().system.vms();
        let mut others = vms.iter().filter(|vm| !Arc::ptr_eq(vm, &self.handle.shared));
        others.any(|vm| vm.with(|state| state.irq.is_bound(id)))
    }

    /// Whether VMs of this host have a capability.
    pub(super) fn has(&self, cap: Capability) -> bool {
        self.shared().system.host.has(cap)
    }
}

/// The capability that says whether KVM has an ioctl of a VM.
fn needs(ioctl: Ioctl) -> Option<Capability> {
    use {Capability as C, Ioctl as I};
    Some(match ioctl {
        I::CheckExtension => C::CheckExtensionVm,
        I::EnableCap => C::EnableCapVm,
        I::SetUserMemoryRegion => C::UserMemory,
        I::SetIdentityMapAddr => C::SetIdentityMapAddr,
        I::SetTssAddr => C::SetTssAddr,
        I::CreateIrqchip | I::GetIrqchip | I::SetIrqchip | I::IrqLine => C::Irqchip,
        I::CreatePit2 => C::Pit2,
        I::GetPit2 | I::SetPit2 => C::PitState2,
        I::GetClock | I::SetClock => C::AdjustClock,
        I::SetGsiRouting => C::IrqRouting,
        I::Irqfd => C::Irqfd,
        I::IrqLineStatus => C::IrqInjectStatus,
        I::SignalMsi => C::SignalMsi,
        I::RegisterCoalescedMmio | I::UnregisterCoalescedMmio => C::CoalescedMmio,
        I::Ioeventfd => C::Ioeventfd,
        I::ClearDirtyLog => C::ManualDirtyLogProtect2,
        _ => return None,
    })
}

impl State {
    /// `KVM_CREATE_IRQCHIP`: the 8259s are three devices on the port bus, the I/O APIC is one.
    fn create_irqchip(&mut self) -> Result<(), Errno> {
        if self.has_irqchip() {
            return Err(Errno::EEXIST);
        }
        if !self.vcpus.is_empty() {
            return Err(Errno::EINVAL);
        }
        self.io.plug(&[
            (IoAddress::Pio(0x20), 2),
            (IoAddress::Pio(0xa0), 2),
            (IoAddress::Pio(0x4d0), 2),
            (IoAddress::Mmio(0xfec0_0000), 0x100),
        ])?;
        self.irq.create_full();
        Ok(())
    }

    /// `KVM_CAP_SPLIT_IRQCHIP`.
    fn create_split(&mut self, pins: u64) -> Result<(), Errno> {
        let pins = u32::try_from(pins).ok().filter(|&pins| pins <= self.irq.route_limit());
        let pins = pins.ok_or(Errno::EINVAL)?;
        if self.has_irqchip() || !self.vcpus.is_empty() {
            return Err(Errno::EEXIST);
        }
        self.irq.create_split(pins);
        Ok(())
    }

    fn create_pit(&mut self, config: &kvm_pit_config) -> Result<(), Errno> {
        if self.pit.is_some() {
            return Err(Errno::EEXIST);
        }
        if !self.has_full_irqchip() {
            return Err(Errno::ENOENT);
        }
        let speaker = config.flags & KVM_PIT_SPEAKER_DUMMY != 0;
        let registers = [(IoAddress::Pio(0x40), 4), (IoAddress::Pio(0x61), 4)];
        // On a full bus KVM has no timer to give, and says that it has no memory for one.
        let plugged = self.io.plug(registers.get(..1 + usize::from(speaker)).unwrap_or_default());
        plugged.map_err(|_| Errno::ENOMEM)?;
        self.pit = Some(kvm_pit_state2::default());
        self.speaker = speaker;
        Ok(())
    }

    /// `KVM_CAP_X2APIC_API`.
    fn enable_x2apic_api(&mut self, flags: u64, known: u64) -> Result<(), Errno> {
        let both = X2APIC_ENABLE_SUPPRESS_EOI | X2APIC_DISABLE_SUPPRESS_EOI;
        let split_only = flags & X2APIC_ENABLE_SUPPRESS_EOI != 0 && !self.is_split();
        if flags & !known != 0 || flags & both == both || split_only {
            return Err(Errno::EINVAL);
        }
        if flags & X2APIC_USE_32BIT_IDS != 0 {
            self.irq.use_wide_ids();
        }
        match flags & both {
            X2APIC_ENABLE_SUPPRESS_EOI => self.irq.set_directed_eoi(DirectedEoi::Done),
            X2APIC_DISABLE_SUPPRESS_EOI => self.irq.set_directed_eoi(DirectedEoi::None),
            _ => {}
        }
        Ok(())
    }

    /// `KVM_CAP_MAX_VCPU_ID`: once, and before the first vCPU. 0 leaves it open.
    fn enable_max_vcpu_id(&mut self, max: u64, limit: u32) -> Result<(), Errno> {
        let max = u32::try_from(max).ok().filter(|&max| max <= limit).ok_or(Errno::EINVAL)?;
        if self.max_vcpu_id.is_some_and(|set| set != max) {
            return Err(Errno::EINVAL);
        }
        self.max_vcpu_id = Some(max).filter(|&max| max > 0);
        Ok(())
    }
}

impl Vm for FakeVm {
    type Vcpu = FakeVcpu;

    /// As the host says, but that a VM without a split irqchip leaves out one flag of
    /// `KVM_CAP_X2APIC_API`.
    fn check_extension(&self, cap: Capability) -> Result<i32, Error> {
        self.call(Ioctl::CheckExtension, Context::Capability(cap), |state| {
            let value = self.shared().system.host.vm_value(cap);
            Ok(match cap {
                Capability::X2apicApi if !state.is_split() => value & !4,
                _ => value,
            })
        })
    }

    /// Those of the project's capabilities that x86 lets a VM enable; any other is `EINVAL`.
    fn enable_cap(&self, cap: Capability, args: [u64; 4]) -> Result<(), Error> {
        use Capability as C;
        let [first, ..] = args;
        let host = &self.shared().system.host;
        self.call(Ioctl::EnableCap, Context::Capability(cap), |state| {
            if !host.has(cap) {
                return Err(Errno::EINVAL);
            }
            let misses = state.memory.rings_miss_pages();
            let done = match cap {
                C::SplitIrqchip => state.create_split(first),
                C::ManualDirtyLogProtect2 => state.memory.enable_manual_protect(first),
                C::DirtyLogRing | C::DirtyLogRingAcqRel => {
                    state.memory.enable_dirty_ring(first, !state.vcpus.is_empty())
                }
                C::X2apicApi => state.enable_x2apic_api(first, host.count(cap).into()),
                C::ExceptionPayload => {
                    state.payload = first != 0;
                    Ok(())
                }
                C::MaxVcpuId => state.enable_max_vcpu_id(first, host.count(cap)),
                _ => Err(Errno::EINVAL),
            };
            if !misses && state.memory.rings_miss_pages() {
                state.findings.push(Finding::RingAndInitiallySet);
            }
            done
        })
    }

    fn set_identity_map_addr(&self, address: u64) -> Result<(), Error> {
        self.call(Ioctl::SetIdentityMapAddr, Context::Address(address), |state| {
            if state.vcpus.is_empty() { Ok(()) } else { Err(Errno::EINVAL) }
        })
    }

    fn set_tss_addr(&self, address: u64) -> Result<(), Error> {
        self.call(Ioctl::SetTssAddr, Context::Address(address), |_| {
            if address <= LAST_TSS { Ok(()) } else { Err(Errno::EINVAL) }
        })
    }

    fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Error> {
        self.call(Ioctl::SetNrMmuPages, Context::None, |_| {
            if pages >= MIN_MMU_PAGES { Ok(()) } else { Err(Errno::EINVAL) }
        })
    }

    fn create_irqchip(&self) -> Result<(), Error> {
        self.call(Ioctl::CreateIrqchip, Context::None, State::create_irqchip)
    }

    fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, Error> {
        self.call(Ioctl::GetIrqchip, Context::None, |state| state.irq.chip(chip_id))
    }

    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Error> {
        self.call(Ioctl::SetIrqchip, Context::None, |state| state.irq.set_chip(chip))
    }

    /// The timer does not tick.
    fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error> {
        self.call(Ioctl::CreatePit2, Context::None, |state| state.create_pit(&config))
    }

    fn pit2(&self) -> Result<kvm_pit_state2, Error> {
        self.call(Ioctl::GetPit2, Context::None, |state| state.pit.ok_or(Errno::ENXIO))
    }

    fn set_pit2(&self, new: &kvm_pit_state2) -> Result<(), Error> {
        self.call(Ioctl::SetPit2, Context::None, |state| {
            *state.pit.as_mut().ok_or(Errno::ENXIO)? = *new;
            Ok(())
        })
    }

    /// What was last set: time stands still.
    fn clock(&self) -> Result<kvm_clock_data, Error> {
        self.call(Ioctl::GetClock, Context::None, |state| Ok(state.clock))
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Error> {
        self.call(Ioctl::SetClock, Context::None, |state| {
            if clock.flags & !CLOCK_FLAGS != 0 {
                return Err(Errno::EINVAL);
            }
            state.clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
            Ok(())
        })
    }

    fn create_vcpu(&self, id: u32) -> Result<FakeVcpu, Error> {
        let host = &self.shared().system.host;
        let ids = host.count(Capability::MaxVcpuId);
        let most = host.count(Capability::MaxVcpus).max(host.count(Capability::NrVcpus));
        self.call(Ioctl::CreateVcpu, Context::Vcpu(id), |state| {
            // Without the capability ids are limited like the number of vCPUs.
            let ids = if ids == 0 { most } else { ids };
            if id >= ids || state.vcpus.len() >= usize::try_from(most).unwrap_or(usize::MAX) {
                return Err(Errno::EINVAL); // before the limit is settled
            }
            let limit = *state.max_vcpu_id.get_or_insert(ids);
            if id >= limit {
                return Err(Errno::EINVAL);
            }
            FakeVcpu::create(id, &self.handle, state)
        })
    }
}
