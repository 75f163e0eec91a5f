//! Every method of the traits goes through the interceptor once, with its arguments, and comes
//! back with its result.

use std::sync::{Arc, Mutex};

use kvm_bindings as k;
use vm_memory::GuestAddress;

use super::{Answer, Interceptor, Names, Object, Request};
use crate::mock::{MockHypervisor, MockVcpu, MockVcpuKick, MockVm};
use crate::{
    Capability, CoalescedWrite, CoalescedZone, DirtyGfn, DirtyRing, Error, EventFd, ExitReply, Gsi,
    HostMemory, HostRange, Hypervisor, InterruptState, IoAddress, IoDirection, IoEvent,
    IoEventBackend, IoExit, IrqBackend, IrqchipId, Irqfd, LineStatus, MemoryBackend, MemorySlot,
    Msi, MsiStatus, MsrIndexList, Route, RouteTarget, SlotFlags, SlotId, Vcpu, VcpuExit, VcpuKick,
    Vm,
};

/// Writes down what passes, and makes the call.
#[derive(Clone, Default)]
struct Log {
    lines: Arc<Mutex<Vec<String>>>,
    names: Arc<Names>,
    data: bool,
    stand_in: Option<EventFd>,
}

impl Log {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.lines.lock().unwrap())
    }
}

impl Interceptor for Log {
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let result = real();
        let args = serde_json::to_string(&request.arguments(&self.names)).unwrap();
        let ok = result.as_ref().map(|ok| serde_json::to_string(&ok.json(&self.names)).unwrap());
        let ok = ok.unwrap_or_else(|e| e.to_string());
        let ok = if ok.len() > 200 { "long" } else { &ok };
        let line = format!("{object} {} {args} -> {ok}", request.call().name());
        self.lines.lock().unwrap().push(line);
        result
    }
    fn wants_data(&self) -> bool {
        self.data
    }
    fn stand_in(&self, _: Object, _: &EventFd) -> Result<Option<EventFd>, Error> {
        Ok(self.stand_in.clone())
    }
}

fn event() -> EventFd {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
}

fn mock_vm() -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    vm
}

/// A VM made of `vm`, which is all `kvm` creates.
fn vm_over(log: &Log, vm: MockVm) -> impl Vm<Vcpu: Vcpu> + use<> {
    let mut kvm = MockHypervisor::new();
    kvm.expect_create_vm().return_once(move |_| Ok(vm));
    let vm = log.over(kvm).create_vm(0).unwrap();
    assert_eq!(log.take(), [r#"system KVM_CREATE_VM {"type":0} -> 0"#]);
    vm
}

/// A vCPU with id 3 made of `vcpu`.
fn vcpu_over(log: &Log, vcpu: MockVcpu) -> impl Vcpu + use<> {
    let mut vm = mock_vm();
    vm.expect_create_vcpu().return_once(move |_| Ok(vcpu));
    let vcpu = vm_over(log, vm).create_vcpu(3).unwrap();
    assert_eq!(log.take(), [r#"vm0 KVM_CREATE_VCPU {"id":3} -> null"#]);
    vcpu
}

#[test]
fn the_system() {
    let mut kvm = MockHypervisor::new();
    kvm.expect_api_version().return_const(Ok(12));
    kvm.expect_check_extension().withf(|cap| *cap == Capability::Irqfd).return_const(Ok(1));
    kvm.expect_vcpu_mmap_size().return_const(Ok(12288_usize));
    kvm.expect_msr_index_list()
        .withf(|room| *room == 8)
        .returning(|_| Ok(MsrIndexList { available: 9, indices: vec![] }));
    kvm.expect_supported_cpuid().returning(|| Ok(vec![]));
    kvm.expect_eventfd().returning(|| Ok(event()));
    kvm.expect_install_kick().return_const(Ok(()));
    kvm.expect_create_vm().returning(|_| Ok(mock_vm()));
    let log = Log::default();
    let kvm = log.over(kvm);
    assert_eq!(kvm.api_version(), Ok(12));
    assert_eq!(kvm.check_extension(Capability::Irqfd), Ok(1));
    assert_eq!(kvm.vcpu_mmap_size(), Ok(12288));
    assert_eq!(kvm.msr_index_list(8).unwrap().available, 9);
    assert_eq!(kvm.supported_cpuid(), Ok(vec![]));
    kvm.eventfd().unwrap();
    kvm.install_kick().unwrap();
    assert_eq!((kvm.create_vm(0).unwrap().number(), kvm.create_vm(1).unwrap().number()), (0, 1));
    let expected = [
        r#"system KVM_GET_API_VERSION {} -> 12"#,
        r#"system KVM_CHECK_EXTENSION {"cap":"KVM_CAP_IRQFD"} -> 1"#,
        r#"system KVM_GET_VCPU_MMAP_SIZE {} -> 12288"#,
        r#"system KVM_GET_MSR_INDEX_LIST {"room":8} -> {"available":9,"indices":[]}"#,
        r#"system KVM_GET_SUPPORTED_CPUID {} -> []"#,
        r#"system eventfd {} -> 0"#,
        r#"system sigaction {} -> null"#,
        r#"system KVM_CREATE_VM {"type":0} -> 0"#,
        r#"system KVM_CREATE_VM {"type":1} -> 1"#,
    ];
    assert_eq!(log.take(), expected);
}

#[test]
fn a_vm() {
    let mut vm = mock_vm();
    vm.expect_check_extension().return_const(Ok(4096));
    vm.expect_enable_cap().withf(|_, args| *args == [24, 0, 0, 0]).return_const(Ok(()));
    vm.expect_set_identity_map_addr().withf(|a| *a == 0xfeff_c000).return_const(Ok(()));
    vm.expect_set_tss_addr().withf(|a| *a == 0xfeff_d000).return_const(Ok(()));
    vm.expect_set_nr_mmu_pages().withf(|n| *n == 64).return_const(Ok(()));
    vm.expect_create_irqchip().return_const(Ok(()));
    vm.expect_irqchip().returning(|chip_id| Ok(k::kvm_irqchip { chip_id, ..Default::default() }));
    vm.expect_set_irqchip().withf(|chip| chip.chip_id == 2).return_const(Ok(()));
    vm.expect_create_pit2().withf(|config| config.flags == 1).return_const(Ok(()));
    vm.expect_pit2().returning(|| Ok(Default::default()));
    vm.expect_set_pit2().return_const(Ok(()));
    vm.expect_clock().returning(|| Ok(Default::default()));
    vm.expect_set_clock().withf(|clock| clock.clock == 5).return_const(Ok(()));
    let log = Log::default();
    let vm = vm_over(&log, vm);
    assert_eq!(vm.check_extension(Capability::IrqRouting), Ok(4096));
    vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
    vm.set_identity_map_addr(0xfeff_c000).unwrap();
    vm.set_tss_addr(0xfeff_d000).unwrap();
    vm.set_nr_mmu_pages(64).unwrap();
    vm.create_irqchip().unwrap();
    let chip = vm.irqchip(2).unwrap();
    vm.set_irqchip(&chip).unwrap();
    vm.create_pit2(k::kvm_pit_config { flags: 1, ..Default::default() }).unwrap();
    let pit = vm.pit2().unwrap();
    vm.set_pit2(&pit).unwrap();
    let clock = vm.clock().unwrap();
    vm.set_clock(&k::kvm_clock_data { clock: 5, ..clock }).unwrap();
    let lines = log.take();
    let starts = [
        r#"vm0 KVM_CHECK_EXTENSION {"cap":"KVM_CAP_IRQ_ROUTING"} -> 4096"#,
        r#"vm0 KVM_ENABLE_CAP {"cap":"KVM_CAP_SPLIT_IRQCHIP","args":["0x18","0x0","0x0","0x0"]}"#,
        r#"vm0 KVM_SET_IDENTITY_MAP_ADDR {"address":"0xfeffc000"} -> null"#,
        r#"vm0 KVM_SET_TSS_ADDR {"address":"0xfeffd000"} -> null"#,
        r#"vm0 KVM_SET_NR_MMU_PAGES {"pages":64} -> null"#,
        r#"vm0 KVM_CREATE_IRQCHIP {} -> null"#,
        r#"vm0 KVM_GET_IRQCHIP {"chip_id":2} -> long"#,
        r#"vm0 KVM_SET_IRQCHIP {"chip":{"chip_id":2,"chip":"0000"#,
        r#"vm0 KVM_CREATE_PIT2 {"config":{"flags":1}} -> null"#,
        r#"vm0 KVM_GET_PIT2 {} -> long"#,
        r#"vm0 KVM_SET_PIT2 {"state":{"channels":[{"count":0,"#,
        r#"vm0 KVM_GET_CLOCK {} -> {"clock":0,"#,
        r#"vm0 KVM_SET_CLOCK {"clock":{"clock":5,"#,
    ];
    assert_eq!(lines.len(), starts.len());
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}\n{start}");
    }
}

#[test]
fn interrupts_and_doorbells() {
    let mut vm = mock_vm();
    vm.expect_set_gsi_routing().withf(|routes| routes.len() == 3).return_const(Ok(()));
    vm.expect_irqfd_assign().return_const(Ok(()));
    vm.expect_irqfd_deassign().withf(|_, gsi| *gsi == Gsi(24)).return_const(Ok(()));
    vm.expect_irq_line().withf(|gsi, level| (gsi.0, *level) == (4, true)).return_const(Ok(()));
    vm.expect_irq_line_status().return_const(Ok(LineStatus::Delivered(1)));
    vm.expect_signal_msi().return_const(Ok(MsiStatus::NoTarget));
    vm.expect_ioeventfd_assign().return_const(Ok(()));
    vm.expect_ioeventfd_deassign().return_const(Ok(()));
    let log = Log::default();
    let vm = vm_over(&log, vm);
    let msi = Msi { address: 0xfee0_0000, data: 0x4041, device: Some(8) };
    let target = [
        RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin: 4 },
        RouteTarget::Msi(msi),
        RouteTarget::HypervSint { vcpu: 1, sint: 2 },
    ];
    vm.set_gsi_routing(&target.map(|target| Route { gsi: Gsi(4), target })).unwrap();
    let (first, second) = (event(), event());
    let irqfd = Irqfd { event: first.clone(), gsi: Gsi(24), resample: Some(second) };
    vm.irqfd_assign(&irqfd).unwrap();
    vm.irqfd_deassign(&first, Gsi(24)).unwrap();
    vm.irq_line(Gsi(4), true).unwrap();
    assert_eq!(vm.irq_line_status(Gsi(4), false), Ok(LineStatus::Delivered(1)));
    assert_eq!(vm.signal_msi(Msi { device: None, ..msi }), Ok(MsiStatus::NoTarget));
    let (address, datamatch) = (IoAddress::Pio(0x100), Some(6));
    let bell = IoEvent { address, length: 2, datamatch, event: first };
    vm.ioeventfd_assign(&bell).unwrap();
    let everywhere = IoEvent { address: IoAddress::Mmio(1 << 40), datamatch: None, ..bell };
    vm.ioeventfd_deassign(&everywhere).unwrap();
    let expected = [
        concat!(
            r#"vm0 KVM_SET_GSI_ROUTING {"routes":[{"gsi":4,"pin":{"chip":2,"pin":4}},"#,
            r#"{"gsi":4,"msi":{"address":"0xfee00000","data":"0x4041","device":8}},"#,
            r#"{"gsi":4,"hv_sint":{"vcpu":1,"sint":2}}]} -> null"#,
        ),
        r#"vm0 KVM_IRQFD {"gsi":24,"eventfd":0,"resample":1} -> null"#,
        r#"vm0 KVM_IRQFD {"gsi":24,"eventfd":0,"deassign":true} -> null"#,
        r#"vm0 KVM_IRQ_LINE {"gsi":4,"level":true} -> null"#,
        r#"vm0 KVM_IRQ_LINE_STATUS {"gsi":4,"level":false} -> {"delivered":1}"#,
        r#"vm0 KVM_SIGNAL_MSI {"msi":{"address":"0xfee00000","data":"0x4041"}} -> "no_target""#,
        r#"vm0 KVM_IOEVENTFD {"pio":"0x100","length":2,"datamatch":"0x6","eventfd":0} -> null"#,
        concat!(
            r#"vm0 KVM_IOEVENTFD {"mmio":"0x10000000000","length":2,"eventfd":0,"#,
            r#""deassign":true} -> null"#,
        ),
    ];
    assert_eq!(log.take(), expected);
}

#[test]
fn kvm_signals_what_the_interceptor_gives_it() {
    let (theirs, own) = (event(), event());
    let mut vm = mock_vm();
    let expect = |own: &EventFd| {
        let own = own.clone();
        move |bell: &IoEvent| bell.event == own && bell.length == 4
    };
    vm.expect_ioeventfd_assign().withf(expect(&own)).times(1).return_const(Ok(()));
    vm.expect_ioeventfd_deassign().withf(expect(&own)).times(1).return_const(Ok(()));
    let (event, resample) = (theirs.clone(), own.clone());
    vm.expect_irqfd_assign()
        .withf(move |irqfd| irqfd.event == event && irqfd.resample.as_ref() == Some(&resample))
        .times(1)
        .return_const(Ok(()));
    let log = Log { stand_in: Some(own.clone()), ..Log::default() };
    let vm = vm_over(&log, vm);
    let address = IoAddress::Pio(1);
    let bell = IoEvent { address, length: 4, datamatch: None, event: theirs.clone() };
    vm.ioeventfd_assign(&bell).unwrap();
    vm.ioeventfd_deassign(&bell).unwrap();
    let irqfd = Irqfd { event: theirs.clone(), gsi: Gsi(1), resample: Some(theirs.clone()) };
    vm.irqfd_assign(&irqfd).unwrap();
    // What is told is the caller's.
    assert_eq!(log.names.event(&theirs), Some(0));
    assert!(log.take().iter().all(|line| line.contains(r#""eventfd":0"#)));
}

#[derive(Debug)]
struct Page(Vec<std::sync::atomic::AtomicU8>);

impl HostMemory for Page {
    fn bytes(&self) -> &[std::sync::atomic::AtomicU8] {
        &self.0
    }
}

#[test]
fn memory() {
    let mut vm = mock_vm();
    vm.expect_set_memory_slot().withf(|slot| slot.id == SlotId(1)).return_const(Ok(()));
    vm.expect_delete_memory_slot().withf(|id| *id == SlotId(1)).return_const(Ok(()));
    vm.expect_dirty_log().returning(|_, bitmap| {
        bitmap[1] = 0x8000;
        Ok(())
    });
    vm.expect_clear_dirty_log()
        .withf(|id, first, pages, bitmap| (id.0, *first, *pages, bitmap) == (1, 64, 128, &[0, 3]))
        .return_const(Ok(()));
    vm.expect_reset_dirty_rings().return_const(Ok(7u32));
    vm.expect_register_coalesced_zone().return_const(Ok(()));
    vm.expect_unregister_coalesced_zone().return_const(Ok(()));
    let log = Log::default();
    let vm = vm_over(&log, vm);
    let page = Arc::new(Page((0..4096).map(|_| Default::default()).collect()));
    let flags = SlotFlags { log_dirty: true, readonly: true };
    let host = HostRange::new(page, 0, 4096).unwrap();
    let guest = GuestAddress(0x10_0000);
    vm.set_memory_slot(&MemorySlot { id: SlotId(1), guest, host, flags }).unwrap();
    vm.delete_memory_slot(SlotId(1)).unwrap();
    let mut bitmap = [0; 2];
    vm.dirty_log(SlotId(1), &mut bitmap).unwrap();
    assert_eq!(bitmap, [0, 0x8000]);
    vm.clear_dirty_log(SlotId(1), 64, 128, &[0, 3]).unwrap();
    assert_eq!(vm.reset_dirty_rings(), Ok(7));
    let zone = CoalescedZone { address: IoAddress::Mmio(0xa_0000), size: 0x100 };
    vm.register_coalesced_zone(zone).unwrap();
    vm.unregister_coalesced_zone(CoalescedZone { address: IoAddress::Pio(8), ..zone }).unwrap();
    let expected = [
        concat!(
            r#"vm0 KVM_SET_USER_MEMORY_REGION {"slot":1,"guest":"0x100000","size":"0x1000","#,
            r#""log_dirty":true,"readonly":true} -> null"#,
        ),
        r#"vm0 KVM_SET_USER_MEMORY_REGION {"slot":1,"size":"0x0"} -> null"#,
        concat!(
            r#"vm0 KVM_GET_DIRTY_LOG {"slot":1,"words":2} -> "#,
            r#"{"words":2,"dirty":[[1,"0x8000"]]}"#,
        ),
        concat!(
            r#"vm0 KVM_CLEAR_DIRTY_LOG {"slot":1,"first":64,"pages":128,"#,
            r#""bitmap":{"words":2,"dirty":[[1,"0x3"]]}} -> null"#,
        ),
        r#"vm0 KVM_RESET_DIRTY_RINGS {} -> 7"#,
        r#"vm0 KVM_REGISTER_COALESCED_MMIO {"mmio":"0xa0000","size":256} -> null"#,
        r#"vm0 KVM_UNREGISTER_COALESCED_MMIO {"pio":"0x8","size":256} -> null"#,
    ];
    assert_eq!(log.take(), expected);
}

#[test]
fn registers_of_a_vcpu() {
    let mut vcpu = MockVcpu::new();
    vcpu.expect_id().return_const(3u32);
    vcpu.expect_interrupt().withf(|vector| *vector == 0x20).return_const(Ok(()));
    vcpu.expect_nmi().return_const(Ok(()));
    macro_rules! state {
        ($($get:ident $set:ident),*) => {{ $(
            vcpu.$get().returning(|| Ok(Default::default()));
            vcpu.$set().return_const(Ok(()));
        )* }};
    }
    state!(expect_regs expect_set_regs, expect_sregs expect_set_sregs, expect_fpu expect_set_fpu);
    state!(expect_xcrs expect_set_xcrs, expect_debugregs expect_set_debugregs);
    state!(expect_mp_state expect_set_mp_state, expect_vcpu_events expect_set_vcpu_events);
    state!(expect_lapic expect_set_lapic, expect_cpuid expect_set_cpuid);
    vcpu.expect_msrs().returning(|entries| {
        entries[0].data = 7;
        Ok(1)
    });
    vcpu.expect_set_msrs().return_const(Ok(2_usize));
    vcpu.expect_translate().withf(|a| *a == 0x1000).returning(|_| Ok(Default::default()));
    vcpu.expect_set_guest_debug().return_const(Ok(()));
    vcpu.expect_tsc_khz().return_const(Ok(2_000_000_u32));
    let log = Log { data: true, ..Log::default() };
    let vcpu = vcpu_over(&log, vcpu);
    assert_eq!(vcpu.id(), 3);
    vcpu.interrupt(0x20).unwrap();
    vcpu.nmi().unwrap();
    vcpu.set_regs(&vcpu.regs().unwrap()).unwrap();
    vcpu.set_sregs(&vcpu.sregs().unwrap()).unwrap();
    vcpu.set_fpu(&vcpu.fpu().unwrap()).unwrap();
    vcpu.set_xcrs(&vcpu.xcrs().unwrap()).unwrap();
    vcpu.set_debugregs(&vcpu.debugregs().unwrap()).unwrap();
    vcpu.set_mp_state(vcpu.mp_state().unwrap()).unwrap();
    vcpu.set_vcpu_events(&vcpu.vcpu_events().unwrap()).unwrap();
    vcpu.set_lapic(&vcpu.lapic().unwrap()).unwrap();
    vcpu.set_cpuid(&vcpu.cpuid().unwrap()).unwrap();
    let mut msrs = [k::kvm_msr_entry { index: 0x10, ..Default::default() }; 2];
    assert_eq!(vcpu.msrs(&mut msrs), Ok(1));
    assert_eq!((msrs[0].data, msrs[1].data), (7, 0));
    assert_eq!(vcpu.set_msrs(&msrs), Ok(2));
    vcpu.translate(0x1000).unwrap();
    vcpu.set_guest_debug(&Default::default()).unwrap();
    assert_eq!(vcpu.tsc_khz(), Ok(2_000_000));
    let lines = log.take();
    let calls: Vec<_> = lines.iter().map(|line| line.split(' ').nth(1).unwrap()).collect();
    let expected = "KVM_INTERRUPT KVM_NMI KVM_GET_REGS KVM_SET_REGS KVM_GET_SREGS KVM_SET_SREGS \
        KVM_GET_FPU KVM_SET_FPU KVM_GET_XCRS KVM_SET_XCRS KVM_GET_DEBUGREGS KVM_SET_DEBUGREGS \
        KVM_GET_MP_STATE KVM_SET_MP_STATE KVM_GET_VCPU_EVENTS KVM_SET_VCPU_EVENTS KVM_GET_LAPIC \
        KVM_SET_LAPIC KVM_GET_CPUID2 KVM_SET_CPUID2 KVM_GET_MSRS KVM_SET_MSRS KVM_TRANSLATE \
        KVM_SET_GUEST_DEBUG KVM_GET_TSC_KHZ";
    assert_eq!(calls, expected.split_whitespace().collect::<Vec<_>>());
    assert!(lines.iter().all(|line| line.starts_with("vm0/vcpu3 ")));
    assert!(
        lines.contains(
            &concat!(
                r#"vm0/vcpu3 KVM_GET_MSRS {"indices":["0x10","0x10"]} -> {"count":1,"entries":"#,
                r#"[{"index":"0x10","data":"0x7"},{"index":"0x10","data":"0x0"}]}"#,
            )
            .to_owned()
        )
    );
}

/// A dirty ring of two entries.
#[derive(Debug, Default)]
struct Ring([DirtyGfn; 2]);

impl DirtyRing for Ring {
    fn entries(&self) -> &[DirtyGfn] {
        &self.0
    }
}

#[test]
fn rings_of_a_vcpu() {
    let mut vcpu = MockVcpu::new();
    vcpu.expect_dirty_ring().returning(|| Ok(Arc::new(Ring::default())));
    let mmio = CoalescedWrite::new(IoAddress::Mmio(0xa_0000), &[1, 2]);
    let pio = CoalescedWrite::new(IoAddress::Pio(0x70), &[0xff]);
    let mut writes = vec![None, pio, mmio];
    vcpu.expect_has_coalesced_write().return_const(true);
    vcpu.expect_take_coalesced_write().returning(move || Ok(writes.pop().unwrap()));
    let log = Log::default();
    let vcpu = vcpu_over(&log, vcpu);
    assert_eq!(vcpu.dirty_ring().unwrap().entries().len(), 2);
    assert!(vcpu.has_coalesced_write(), "which is no call");
    assert_eq!([(); 3].map(|()| vcpu.take_coalesced_write()), [Ok(mmio), Ok(pio), Ok(None)]);
    let expected = [
        r#"vm0/vcpu3 mmap_dirty_ring {} -> 2"#,
        r#"vm0/vcpu3 coalesced_mmio_ring {} -> {"mmio":"0xa0000","data":"0102"}"#,
        r#"vm0/vcpu3 coalesced_mmio_ring {} -> {"pio":"0x70","data":"ff"}"#,
        r#"vm0/vcpu3 coalesced_mmio_ring {} -> null"#,
    ];
    assert_eq!(log.take(), expected);
}

/// A vCPU that reads two ports' worth, writes one, then halts.
fn guest() -> MockVcpu {
    let io = |direction| VcpuExit::Io(IoExit { direction, port: 0x60, size: 1, count: 2 });
    let mut exits = vec![VcpuExit::Hlt, io(IoDirection::Out), io(IoDirection::In)];
    let mut vcpu = MockVcpu::new();
    vcpu.expect_run().returning(move || Ok(exits.pop().unwrap()));
    vcpu
}

#[test]
fn runs_with_all_that_passes_between_guest_and_vmm() {
    let mut vcpu = guest();
    vcpu.expect_io_data().return_var(vec![0, 0]);
    vcpu.expect_reply().withf(|reply| *reply == ExitReply::Hypercall(9)).return_const(());
    vcpu.expect_request_interrupt_window().withf(|wanted| *wanted).return_const(());
    let state = InterruptState { ready_for_injection: false, if_flag: true, cr8: 0 };
    vcpu.expect_interrupt_state().return_const(state);
    vcpu.expect_kicker().returning(|| {
        let mut kick = MockVcpuKick::new();
        kick.expect_kick().return_const(Ok(()));
        kick
    });
    let log = Log { data: true, ..Log::default() };
    let mut vcpu = vcpu_over(&log, vcpu);
    vcpu.run().unwrap();
    vcpu.io_data().copy_from_slice(&[0xab, 0xcd]);
    vcpu.reply(ExitReply::Hypercall(9));
    vcpu.run().unwrap();
    vcpu.request_interrupt_window(true);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    assert_eq!(vcpu.interrupt_state(), state);
    vcpu.kicker().kick().unwrap();
    let port = r#"{"port":"0x60","size":1,"count":2}"#;
    let expected = [
        format!(r#"vm0/vcpu3 KVM_RUN {{}} -> {{"exit":{{"io_in":{port}}},"interrupts":{{"if":true}}}}"#),
        format!(
            r#"vm0/vcpu3 KVM_RUN {{"reply":{{"hypercall":"0x9"}},"data":"abcd"}} -> {{"exit":{{"io_out":{port}}},"data":"abcd","interrupts":{{"if":true}}}}"#
        ),
        r#"vm0/vcpu3 KVM_RUN {"request_interrupt_window":true} -> {"exit":"hlt","interrupts":{"if":true}}"#.to_owned(),
        r#"vm0/kick3 tgkill {} -> null"#.to_owned(),
    ];
    assert_eq!(log.take(), expected);
}

#[test]
fn an_interceptor_that_wants_no_data_costs_none() {
    // Any other call on the mock would be unexpected, and panic.
    let log = Log::default();
    let mut vcpu = vcpu_over(&log, guest());
    for _ in 0..3 {
        vcpu.run().unwrap();
    }
    assert_eq!(log.take().len(), 3);
}
