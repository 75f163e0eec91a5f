//! The traits over the traits: every call goes through an [`Interceptor`].
//!
//! One forwarding implementation serves every layer; each method is one line. What an interceptor
//! does not do costs nothing: with one that only makes the call, what remains after inlining is
//! the call. Nothing here decides anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_guest_debug, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs,
};

use super::{
    DirtyLog, Interceptor, MsrsRead, NewDirtyRing, NewVcpu, NewVm, Object, Ran, Request, Turn,
};
use crate::{
    Capability, CoalescedWrite, CoalescedZone, DirtyRing, Error, EventFd, ExitReply, Gsi,
    Hypervisor, InterruptState, IoDirection, IoEvent, IoEventBackend, IrqBackend, Irqfd,
    LineStatus, MemoryBackend, MemorySlot, Msi, MsiStatus, MsrIndexList, Route, SlotId, Vcpu,
    VcpuExit, VcpuKick, Vm,
};

/// A hypervisor whose calls, and those of all it creates, go through an interceptor.
#[derive(Debug)]
pub struct Layered<H, I> {
    inner: H,
    interceptor: I,
    /// How many VMs there were.
    vms: Arc<AtomicU32>,
}

impl<H: Hypervisor, I: Interceptor> Layered<H, I> {
    /// `interceptor` over `inner`. VMs are numbered from 0.
    #[must_use]
    pub fn new(inner: H, interceptor: I) -> Self {
        Self { inner, interceptor, vms: Arc::default() }
    }

    /// What is below.
    #[must_use]
    pub fn inner(&self) -> &H {
        &self.inner
    }

    /// The interceptor.
    #[must_use]
    pub fn interceptor(&self) -> &I {
        &self.interceptor
    }

    /// What is below, by itself again.
    #[must_use]
    pub fn into_inner(self) -> H {
        self.inner
    }
}

/// Numbers go on, so that two clones never create two VMs of one number.
impl<H: Clone, I: Clone> Clone for Layered<H, I> {
    fn clone(&self) -> Self {
        let Self { inner, interceptor, vms } = self;
        Self { inner: inner.clone(), interceptor: interceptor.clone(), vms: vms.clone() }
    }
}

/// Methods that are one call with the same name and arguments below.
macro_rules! forward {
    ($($method:ident($($arg:ident: $type:ty),*) -> $answer:ty = $request:expr;)*) => {$(
        #[inline]
        fn $method(&self $(, $arg: $type)*) -> Result<$answer, Error> {
            self.interceptor.call(self.object(), $request, || self.inner.$method($($arg),*))
        }
    )*};
}

impl<H, I> Layered<H, I> {
    #[inline]
    fn object(&self) -> Object {
        Object::System
    }
}

impl<H: Hypervisor, I: Interceptor> Hypervisor for Layered<H, I> {
    type Vm = LayeredVm<H::Vm, I>;

    forward! {
        api_version() -> i32 = Request::ApiVersion;
        check_extension(cap: Capability) -> i32 = Request::CheckExtension(cap);
        vcpu_mmap_size() -> usize = Request::VcpuMmapSize;
        msr_index_list(room: usize) -> MsrIndexList = Request::MsrIndexList { room };
        supported_cpuid() -> Vec<kvm_cpuid_entry2> = Request::SupportedCpuid;
        eventfd() -> EventFd = Request::Eventfd;
        install_kick() -> () = Request::InstallKick;
    }

    fn create_vm(&self, vm_type: u64) -> Result<Self::Vm, Error> {
        let real = || {
            let vm = self.inner.create_vm(vm_type)?;
            Ok(NewVm { number: self.vms.fetch_add(1, Ordering::Relaxed), vm })
        };
        let request = Request::CreateVm { vm_type };
        let NewVm { number, vm } = self.interceptor.call(Object::System, request, real)?;
        Ok(LayeredVm { inner: vm, interceptor: self.interceptor.of_vm(number), number })
    }
}

/// A VM of a [`Layered`] hypervisor.
#[derive(Debug)]
pub struct LayeredVm<V, I> {
    inner: V,
    interceptor: I,
    number: u32,
}

impl<V, I> LayeredVm<V, I> {
    /// What is below.
    #[must_use]
    pub fn inner(&self) -> &V {
        &self.inner
    }

    /// Its number among the VMs of the hypervisor, from 0.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    #[inline]
    fn object(&self) -> Object {
        Object::Vm(self.number)
    }
}

impl<V: Vm, I: Interceptor> IrqBackend for LayeredVm<V, I> {
    forward! {
        set_gsi_routing(routes: &[Route]) -> () = Request::SetGsiRouting(routes);
        irqfd_deassign(event: &EventFd, gsi: Gsi) -> () = Request::IrqfdDeassign { event, gsi };
        irq_line(gsi: Gsi, level: bool) -> () = Request::IrqLine { gsi, level };
        irq_line_status(gsi: Gsi, level: bool) -> LineStatus = Request::IrqLineStatus { gsi, level };
        signal_msi(msi: Msi) -> MsiStatus = Request::SignalMsi(msi);
    }

    fn irqfd_assign(&self, irqfd: &Irqfd) -> Result<(), Error> {
        let resample = irqfd.resample.as_ref();
        let stand_in = resample.map(|event| self.interceptor.stand_in(self.object(), event));
        let real = || match stand_in.transpose()?.flatten() {
            None => self.inner.irqfd_assign(irqfd),
            Some(own) => self.inner.irqfd_assign(&Irqfd { resample: Some(own), ..irqfd.clone() }),
        };
        self.interceptor.call(self.object(), Request::IrqfdAssign(irqfd), real)
    }
}

impl<V: Vm, I: Interceptor> MemoryBackend for LayeredVm<V, I> {
    forward! {
        set_memory_slot(slot: &MemorySlot) -> () = Request::SetMemorySlot(slot);
        delete_memory_slot(id: SlotId) -> () = Request::DeleteMemorySlot(id);
        clear_dirty_log(id: SlotId, first: u64, pages: u32, bitmap: &[u64]) -> () =
            Request::ClearDirtyLog { id, first, pages, bitmap };
        reset_dirty_rings() -> u32 = Request::ResetDirtyRings;
        register_coalesced_zone(zone: CoalescedZone) -> () = Request::RegisterCoalescedZone(zone);
        unregister_coalesced_zone(zone: CoalescedZone) -> () =
            Request::UnregisterCoalescedZone(zone);
    }

    fn dirty_log(&self, id: SlotId, bitmap: &mut [u64]) -> Result<(), Error> {
        let request = Request::DirtyLog { id, words: bitmap.len() };
        let vm = &self.inner;
        self.interceptor
            .call(self.object(), request, move || {
                vm.dirty_log(id, bitmap)?;
                Ok(DirtyLog(bitmap))
            })
            .map(|_| ())
    }
}

impl<V: Vm, I: Interceptor> LayeredVm<V, I> {
    /// Makes a call with the doorbell KVM is to ring, which need not be the caller's.
    #[inline]
    fn with_doorbell(
        &self,
        request: Request<'_>,
        event: &IoEvent,
        call: impl FnOnce(&IoEvent) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let stand_in = self.interceptor.stand_in(self.object(), &event.event);
        self.interceptor.call(self.object(), request, || match stand_in? {
            None => call(event),
            Some(own) => call(&IoEvent { event: own, ..event.clone() }),
        })
    }
}

impl<V: Vm, I: Interceptor> IoEventBackend for LayeredVm<V, I> {
    #[inline]
    fn ioeventfd_assign(&self, event: &IoEvent) -> Result<(), Error> {
        let request = Request::IoeventfdAssign(event);
        self.with_doorbell(request, event, |event| self.inner.ioeventfd_assign(event))
    }

    #[inline]
    fn ioeventfd_deassign(&self, event: &IoEvent) -> Result<(), Error> {
        let request = Request::IoeventfdDeassign(event);
        self.with_doorbell(request, event, |event| self.inner.ioeventfd_deassign(event))
    }
}

impl<V: Vm, I: Interceptor> Vm for LayeredVm<V, I> {
    type Vcpu = LayeredVcpu<V::Vcpu, I>;

    forward! {
        check_extension(cap: Capability) -> i32 = Request::CheckExtension(cap);
        enable_cap(cap: Capability, args: [u64; 4]) -> () = Request::EnableCap { cap, args };
        set_identity_map_addr(address: u64) -> () = Request::SetIdentityMapAddr(address);
        set_tss_addr(address: u64) -> () = Request::SetTssAddr(address);
        set_nr_mmu_pages(pages: u64) -> () = Request::SetNrMmuPages(pages);
        create_irqchip() -> () = Request::CreateIrqchip;
        irqchip(chip_id: u32) -> kvm_irqchip = Request::Irqchip { chip_id };
        set_irqchip(chip: &kvm_irqchip) -> () = Request::SetIrqchip(chip);
        create_pit2(config: kvm_pit_config) -> () = Request::CreatePit2(&config);
        pit2() -> kvm_pit_state2 = Request::Pit2;
        set_pit2(state: &kvm_pit_state2) -> () = Request::SetPit2(state);
        clock() -> kvm_clock_data = Request::Clock;
        set_clock(clock: &kvm_clock_data) -> () = Request::SetClock(clock);
    }

    fn create_vcpu(&self, id: u32) -> Result<Self::Vcpu, Error> {
        let request = Request::CreateVcpu { id };
        let real = || self.inner.create_vcpu(id).map(NewVcpu);
        let NewVcpu(vcpu) = self.interceptor.call(self.object(), request, real)?;
        Ok(LayeredVcpu {
            inner: vcpu,
            interceptor: self.interceptor.clone(),
            vm: self.number,
            id,
            reply: None,
            window: false,
            input: false,
            copy: Vec::new(),
        })
    }
}

/// A vCPU of a [`LayeredVm`].
#[derive(Debug)]
pub struct LayeredVcpu<V, I> {
    inner: V,
    interceptor: I,
    vm: u32,
    id: u32,
    /// What the VMM answered to the last exit, if the interceptor wants to see it.
    reply: Option<ExitReply>,
    window: bool,
    /// Whether the last exit waits for port input, and the interceptor wants to see it.
    input: bool,
    /// That input, while the vCPU runs: the vCPU's own memory of it can't be borrowed then.
    copy: Vec<u8>,
}

impl<V, I> LayeredVcpu<V, I> {
    /// What is below.
    #[must_use]
    pub fn inner(&self) -> &V {
        &self.inner
    }

    #[inline]
    fn object(&self) -> Object {
        Object::Vcpu { vm: self.vm, id: self.id }
    }
}

/// What there is to see of a run that ended with `exit`; with `wants`, all that is known.
#[inline]
fn seen<'a, V: Vcpu>(vcpu: &'a mut V, exit: &'a VcpuExit, wants: bool) -> Ran<'a> {
    if !wants {
        return Ran { exit, data: &[], interrupts: None };
    }
    let interrupts = Some(vcpu.interrupt_state());
    let data: &[u8] = match exit {
        VcpuExit::Io(io) if io.direction == IoDirection::Out => vcpu.io_data(),
        _ => &[],
    };
    Ran { exit, data, interrupts }
}

impl<V: Vcpu, I: Interceptor> Vcpu for LayeredVcpu<V, I> {
    type Kick = LayeredKick<V::Kick, I>;

    fn id(&self) -> u32 {
        self.inner.id()
    }

    fn kicker(&self) -> Self::Kick {
        let Self { vm, id, .. } = *self;
        LayeredKick { inner: self.inner.kicker(), interceptor: self.interceptor.clone(), vm, id }
    }

    #[inline]
    fn run(&mut self) -> Result<VcpuExit, Error> {
        let object = self.object();
        let wants = self.interceptor.wants_data();
        let turn = if wants {
            self.copy.clear();
            if self.input {
                self.copy.extend_from_slice(self.inner.io_data());
            }
            Turn { reply: self.reply.take(), data: &self.copy, window: self.window }
        } else {
            Turn::default()
        };
        // An exit is large: it stays where it is returned from, and is only lent.
        let mut exit = Ok(VcpuExit::Interrupted);
        let (inner, to) = (&mut self.inner, &mut exit);
        let ran = self.interceptor.call(object, Request::Run(turn), move || {
            *to = inner.run();
            to.as_ref().map(|exit| seen(inner, exit, wants)).map_err(|error| *error)
        });
        if let Err(error) = ran {
            exit = Err(error);
        }
        if wants {
            self.input = matches!(exit, Ok(VcpuExit::Io(io)) if io.direction == IoDirection::In);
        }
        exit
    }

    #[inline]
    fn io_data(&mut self) -> &mut [u8] {
        self.inner.io_data()
    }

    #[inline]
    fn reply(&mut self, reply: ExitReply) {
        if self.interceptor.wants_data() {
            self.reply = Some(reply);
        }
        self.inner.reply(reply);
    }

    /// The ring itself is memory: what is read and written there no layer sees.
    fn dirty_ring(&self) -> Result<Arc<dyn DirtyRing>, Error> {
        let real = || self.inner.dirty_ring().map(NewDirtyRing);
        self.interceptor.call(self.object(), Request::DirtyRing, real).map(|ring| ring.0)
    }

    #[inline]
    fn has_coalesced_write(&self) -> bool {
        self.inner.has_coalesced_write()
    }

    #[inline]
    fn interrupt_state(&self) -> InterruptState {
        self.inner.interrupt_state()
    }

    #[inline]
    fn request_interrupt_window(&mut self, wanted: bool) {
        self.window = wanted;
        self.inner.request_interrupt_window(wanted);
    }

    forward! {
        take_coalesced_write() -> Option<CoalescedWrite> = Request::TakeCoalescedWrite;
        interrupt(vector: u8) -> () = Request::Interrupt { vector };
        nmi() -> () = Request::Nmi;
        regs() -> kvm_regs = Request::Regs;
        set_regs(regs: &kvm_regs) -> () = Request::SetRegs(regs);
        sregs() -> kvm_sregs = Request::Sregs;
        set_sregs(sregs: &kvm_sregs) -> () = Request::SetSregs(sregs);
        fpu() -> kvm_fpu = Request::Fpu;
        set_fpu(fpu: &kvm_fpu) -> () = Request::SetFpu(fpu);
        xcrs() -> kvm_xcrs = Request::Xcrs;
        set_xcrs(xcrs: &kvm_xcrs) -> () = Request::SetXcrs(xcrs);
        debugregs() -> kvm_debugregs = Request::Debugregs;
        set_debugregs(debugregs: &kvm_debugregs) -> () = Request::SetDebugregs(debugregs);
        mp_state() -> kvm_mp_state = Request::MpState;
        set_mp_state(state: kvm_mp_state) -> () = Request::SetMpState(state);
        vcpu_events() -> kvm_vcpu_events = Request::VcpuEvents;
        set_vcpu_events(events: &kvm_vcpu_events) -> () = Request::SetVcpuEvents(events);
        lapic() -> kvm_lapic_state = Request::Lapic;
        set_lapic(lapic: &kvm_lapic_state) -> () = Request::SetLapic(lapic);
        set_msrs(entries: &[kvm_msr_entry]) -> usize = Request::SetMsrs(entries);
        cpuid() -> Vec<kvm_cpuid_entry2> = Request::Cpuid;
        set_cpuid(entries: &[kvm_cpuid_entry2]) -> () = Request::SetCpuid(entries);
        translate(linear_address: u64) -> kvm_translation = Request::Translate { linear_address };
        set_guest_debug(debug: &kvm_guest_debug) -> () = Request::SetGuestDebug(debug);
        tsc_khz() -> u32 = Request::TscKhz;
    }

    fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Error> {
        // The entries are filled during the call, so what they ask for is copied, if anyone looks.
        let asked = if self.interceptor.wants_data() { entries.to_vec() } else { Vec::new() };
        let vcpu = &self.inner;
        self.interceptor
            .call(self.object(), Request::Msrs(&asked), move || {
                let count = vcpu.msrs(entries)?;
                Ok(MsrsRead { count, entries })
            })
            .map(|read| read.count)
    }
}

/// What kicks a [`LayeredVcpu`].
#[derive(Debug, Clone)]
pub struct LayeredKick<K, I> {
    inner: K,
    interceptor: I,
    vm: u32,
    id: u32,
}

impl<K: VcpuKick, I: Interceptor> VcpuKick for LayeredKick<K, I> {
    #[inline]
    fn kick(&self) -> Result<(), Error> {
        let object = Object::Kick { vm: self.vm, id: self.id };
        self.interceptor.call(object, Request::Kick, || self.inner.kick())
    }
}
