//! A vCPU that goes round a list of exits, and a VM and a hypervisor for it. What a run loop uses are
//! functions of the vCPU's own, and the trait calls them; the rest is refused.

use std::hint::black_box;
use std::sync::Arc;

use hv_core::{
    Capability, CoalescedWrite, CoalescedZone, DirtyRing, Errno, Error, EventFd, ExitReply, Gsi,
    Hypervisor, InterruptState, IoDirection, IoEvent, IoEventBackend, IoExit, Ioctl, IrqBackend,
    Irqfd, LineStatus, MemoryBackend, MemorySlot, MmioExit, Msi, MsiStatus, MsrIndexList, Route,
    SlotId, Vcpu, VcpuExit, VcpuKick, Vm,
};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};

/// Goes round a list of exits.
pub(crate) struct StubVcpu {
    exits: Vec<VcpuExit>,
    next: usize,
    data: Vec<u8>,
    reply: Option<ExitReply>,
    state: InterruptState,
}

impl StubVcpu {
    pub(crate) fn new() -> Self {
        let io = |direction| VcpuExit::Io(IoExit { direction, port: 0x3f8, size: 1, count: 4 });
        let mmio = |written| VcpuExit::Mmio(MmioExit { address: 0xfee0_00b0, len: 4, written });
        let exits = vec![
            io(IoDirection::Out),
            mmio(Some([1; 8])),
            VcpuExit::Interrupted,
            io(IoDirection::In),
            mmio(None),
            VcpuExit::Hlt,
            VcpuExit::Rdmsr { index: 0x10, reason: 1 },
        ];
        // Values the optimizer can't know.
        Self {
            exits: black_box(exits),
            next: 0,
            data: black_box(b"data".to_vec()),
            reply: None,
            state: black_box(InterruptState::default()),
        }
    }

    pub(crate) fn replied(&self) -> Option<ExitReply> {
        self.reply
    }

    pub(crate) fn run(&mut self) -> Result<VcpuExit, Error> {
        let exit = self.exits.get(self.next).copied();
        self.next += 1;
        if self.next == self.exits.len() {
            self.next = 0;
        }
        exit.ok_or_else(|| Error::new(Ioctl::Run, Errno::EIO))
    }

    pub(crate) fn io_data(&mut self) -> &mut [u8] {
        &mut self.data
    }

    pub(crate) fn reply(&mut self, reply: ExitReply) {
        self.reply = Some(reply);
    }

    pub(crate) fn interrupt_state(&self) -> InterruptState {
        self.state
    }
}

/// A kick of a vCPU that never runs for long.
pub(crate) struct StubKick;

impl VcpuKick for StubKick {
    fn kick(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Methods that the stub refuses.
macro_rules! refused {
    ($(fn $name:ident($($type:ty),*) -> $answer:ty;)*) => {
        $(refused!(@ $name [$($type),*] -> $answer);)*
    };
    (@ $name:ident [] -> $answer:ty) => {
        fn $name(&self) -> Result<$answer, Error> {
            refuse()
        }
    };
    (@ $name:ident [$a:ty] -> $answer:ty) => {
        fn $name(&self, _: $a) -> Result<$answer, Error> {
            refuse()
        }
    };
    (@ $name:ident [$a:ty, $b:ty] -> $answer:ty) => {
        fn $name(&self, _: $a, _: $b) -> Result<$answer, Error> {
            refuse()
        }
    };
    (@ $name:ident [$a:ty, $b:ty, $c:ty, $d:ty] -> $answer:ty) => {
        fn $name(&self, _: $a, _: $b, _: $c, _: $d) -> Result<$answer, Error> {
            refuse()
        }
    };
}

fn refuse<T>() -> Result<T, Error> {
    Err(Error::new(Ioctl::Run, Errno::ENOTTY))
}

impl Vcpu for StubVcpu {
    type Kick = StubKick;

    fn id(&self) -> u32 {
        0
    }

    fn kicker(&self) -> StubKick {
        StubKick
    }

    fn run(&mut self) -> Result<VcpuExit, Error> {
        StubVcpu::run(self)
    }

    fn io_data(&mut self) -> &mut [u8] {
        StubVcpu::io_data(self)
    }

    fn reply(&mut self, reply: ExitReply) {
        StubVcpu::reply(self, reply);
    }

    fn interrupt_state(&self) -> InterruptState {
        StubVcpu::interrupt_state(self)
    }

    fn request_interrupt_window(&mut self, _wanted: bool) {}

    fn has_coalesced_write(&self) -> bool {
        false
    }

    refused! {
        fn dirty_ring() -> Arc<dyn DirtyRing>;
        fn take_coalesced_write() -> Option<CoalescedWrite>;
        fn interrupt(u8) -> ();
        fn nmi() -> ();
        fn regs() -> kvm_regs;
        fn set_regs(&kvm_regs) -> ();
        fn sregs() -> kvm_sregs;
        fn set_sregs(&kvm_sregs) -> ();
        fn fpu() -> kvm_fpu;
        fn set_fpu(&kvm_fpu) -> ();
        fn xcrs() -> kvm_xcrs;
        fn set_xcrs(&kvm_xcrs) -> ();
        fn debugregs() -> kvm_debugregs;
        fn set_debugregs(&kvm_debugregs) -> ();
        fn mp_state() -> kvm_mp_state;
        fn set_mp_state(kvm_mp_state) -> ();
        fn vcpu_events() -> kvm_vcpu_events;
        fn set_vcpu_events(&kvm_vcpu_events) -> ();
        fn lapic() -> kvm_lapic_state;
        fn set_lapic(&kvm_lapic_state) -> ();
        fn msrs(&mut [kvm_msr_entry]) -> usize;
        fn set_msrs(&[kvm_msr_entry]) -> usize;
        fn cpuid() -> Vec<kvm_cpuid_entry2>;
        fn set_cpuid(&[kvm_cpuid_entry2]) -> ();
        fn translate(u64) -> kvm_translation;
        fn set_guest_debug(&kvm_guest_debug) -> ();
        fn tsc_khz() -> u32;
    }
}

/// Gives out [`StubVm`]s.
pub(crate) struct StubHypervisor;

impl Hypervisor for StubHypervisor {
    type Vm = StubVm;

    fn create_vm(&self, _vm_type: u64) -> Result<StubVm, Error> {
        Ok(StubVm)
    }

    refused! {
        fn api_version() -> i32;
        fn check_extension(Capability) -> i32;
        fn vcpu_mmap_size() -> usize;
        fn msr_index_list(usize) -> MsrIndexList;
        fn supported_cpuid() -> Vec<kvm_cpuid_entry2>;
        fn eventfd() -> EventFd;
        fn install_kick() -> ();
    }
}

/// Gives out [`StubVcpu`]s.
pub(crate) struct StubVm;

impl Vm for StubVm {
    type Vcpu = StubVcpu;

    fn create_vcpu(&self, _id: u32) -> Result<StubVcpu, Error> {
        Ok(StubVcpu::new())
    }

    refused! {
        fn check_extension(Capability) -> i32;
        fn enable_cap(Capability, [u64; 4]) -> ();
        fn set_identity_map_addr(u64) -> ();
        fn set_tss_addr(u64) -> ();
        fn set_nr_mmu_pages(u64) -> ();
        fn create_irqchip() -> ();
        fn irqchip(u32) -> kvm_irqchip;
        fn set_irqchip(&kvm_irqchip) -> ();
        fn create_pit2(kvm_pit_config) -> ();
        fn pit2() -> kvm_pit_state2;
        fn set_pit2(&kvm_pit_state2) -> ();
        fn clock() -> kvm_clock_data;
        fn set_clock(&kvm_clock_data) -> ();
    }
}

impl IrqBackend for StubVm {
    refused! {
        fn set_gsi_routing(&[Route]) -> ();
        fn irqfd_assign(&Irqfd) -> ();
        fn irqfd_deassign(&EventFd, Gsi) -> ();
        fn irq_line(Gsi, bool) -> ();
        fn irq_line_status(Gsi, bool) -> LineStatus;
        fn signal_msi(Msi) -> MsiStatus;
    }
}

impl MemoryBackend for StubVm {
    refused! {
        fn set_memory_slot(&MemorySlot) -> ();
        fn delete_memory_slot(SlotId) -> ();
        fn reset_dirty_rings() -> u32;
        fn dirty_log(SlotId, &mut [u64]) -> ();
        fn clear_dirty_log(SlotId, u64, u32, &[u64]) -> ();
        fn register_coalesced_zone(CoalescedZone) -> ();
        fn unregister_coalesced_zone(CoalescedZone) -> ();
    }
}

impl IoEventBackend for StubVm {
    refused! {
        fn ioeventfd_assign(&IoEvent) -> ();
        fn ioeventfd_deassign(&IoEvent) -> ();
    }
}
