//! mockall mocks of every trait, behind the feature `mock`.
//!
//! For tests that state calls, their order and their number. Behaviour like KVM's is not here.

use std::sync::Arc;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};

use crate::{
    Capability, CoalescedWrite, CoalescedZone, DirtyRing, Error, EventFd, ExitReply, Gsi,
    Hypervisor, InterruptState, IoEvent, IoEventBackend, IrqBackend, Irqfd, LineStatus,
    MemoryBackend, MemorySlot, Msi, MsiStatus, MsrIndexList, Route, SlotId, Vcpu, VcpuExit,
    VcpuKick, Vm,
};

mockall::mock! {
    /// A mock of [`Hypervisor`].
    #[derive(Debug)]
    pub Hypervisor {}

    impl Hypervisor for Hypervisor {
        type Vm = MockVm;
        fn api_version(&self) -> Result<i32, Error>;
        fn check_extension(&self, cap: Capability) -> Result<i32, Error>;
        fn vcpu_mmap_size(&self) -> Result<usize, Error>;
        fn msr_index_list(&self, room: usize) -> Result<MsrIndexList, Error>;
        fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error>;
        fn create_vm(&self, vm_type: u64) -> Result<MockVm, Error>;
        fn eventfd(&self) -> Result<EventFd, Error>;
        fn install_kick(&self) -> Result<(), Error>;
    }
}

mockall::mock! {
    /// A mock of [`Vm`]; `expect_drop` tells when it goes.
    #[derive(Debug)]
    pub Vm {}

    impl Drop for Vm {
        fn drop(&mut self);
    }

    impl IrqBackend for Vm {
        fn set_gsi_routing(&self, routes: &[Route]) -> Result<(), Error>;
        fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error>;
        fn irqfd_deassign(&self, event: &EventFd, gsi: Gsi) -> Result<(), Error>;
        fn irq_line(&self, gsi: Gsi, level: bool) -> Result<(), Error>;
        fn irq_line_status(&self, gsi: Gsi, level: bool) -> Result<LineStatus, Error>;
        fn signal_msi(&self, msi: Msi) -> Result<MsiStatus, Error>;
    }

    impl MemoryBackend for Vm {
        fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), Error>;
        fn delete_memory_slot(&self, id: SlotId) -> Result<(), Error>;
        fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error>;
        fn clear_dirty_log(&self, id: SlotId, first: u64, pages: u32, bitmap: &[u64]) -> Result<(), Error>;
        fn reset_dirty_rings(&self) -> Result<u32, Error>;
        fn register_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error>;
        fn unregister_coalesced_zone(&self, zone: CoalescedZone) -> Result<(), Error>;
    }

    impl IoEventBackend for Vm {
        fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error>;
        fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error>;
    }

    impl Vm for Vm {
        type Vcpu = MockVcpu;
        fn check_extension(&self, cap: Capability) -> Result<i32, Error>;
        fn enable_cap(&self, cap: Capability, args: [u64; 4]) -> Result<(), Error>;
        fn set_identity_map_addr(&self, address: u64) -> Result<(), Error>;
        fn set_tss_addr(&self, address: u64) -> Result<(), Error>;
        fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Error>;
        fn create_irqchip(&self) -> Result<(), Error>;
        fn irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, Error>;
        fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Error>;
        fn create_pit2(&self, config: kvm_pit_config) -> Result<(), Error>;
        fn pit2(&self) -> Result<kvm_pit_state2, Error>;
        fn set_pit2(&self, state: &kvm_pit_state2) -> Result<(), Error>;
        fn clock(&self) -> Result<kvm_clock_data, Error>;
        fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Error>;
        fn create_vcpu(&self, id: u32) -> Result<MockVcpu, Error>;
    }
}

mockall::mock! {
    /// A mock of [`VcpuKick`].
    #[derive(Debug)]
    pub VcpuKick {}

    impl VcpuKick for VcpuKick {
        fn kick(&self) -> Result<(), Error>;
    }
}

mockall::mock! {
    /// A mock of [`Vcpu`].
    #[derive(Debug)]
    pub Vcpu {}

    impl Vcpu for Vcpu {
        type Kick = MockVcpuKick;
        fn id(&self) -> u32;
        fn kicker(&self) -> MockVcpuKick;
        fn run(&mut self) -> Result<VcpuExit, Error>;
        fn io_data(&mut self) -> &mut [u8];
        fn reply(&mut self, reply: ExitReply);
        fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error>;
        fn has_coalesced_write(&self) -> bool;
        fn take_coalesced_write(&self) -> Result<Option<CoalescedWrite>, Error>;
        fn interrupt_state(&self) -> InterruptState;
        fn request_interrupt_window(&mut self, wanted: bool);
        fn interrupt(&self, vector: u8) -> Result<(), Error>;
        fn nmi(&self) -> Result<(), Error>;
        fn regs(&self) -> Result<kvm_regs, Error>;
        fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error>;
        fn sregs(&self) -> Result<kvm_sregs, Error>;
        fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error>;
        fn fpu(&self) -> Result<kvm_fpu, Error>;
        fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error>;
        fn xcrs(&self) -> Result<kvm_xcrs, Error>;
        fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Error>;
        fn debugregs(&self) -> Result<kvm_debugregs, Error>;
        fn set_debugregs(&self, debugregs: &kvm_debugregs) -> Result<(), Error>;
        fn mp_state(&self) -> Result<kvm_mp_state, Error>;
        fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), Error>;
        fn vcpu_events(&self) -> Result<kvm_vcpu_events, Error>;
        fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Error>;
        fn lapic(&self) -> Result<kvm_lapic_state, Error>;
        fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error>;
        fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error>;
        fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<usize, Error>;
        fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error>;
        fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error>;
        fn translate(&self, linear_address: u64) -> Result<kvm_translation, Error>;
        fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Error>;
        fn tsc_khz(&self) -> Result<u32, Error>;
    }
}
