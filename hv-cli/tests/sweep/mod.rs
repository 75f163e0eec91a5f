//! Every call of a flow fails in turn with every errno it can give; afterwards nothing is left.
//!
//! A flow is what a VMM does with the layers: init, irqchip creation, memory, routing, doorbells,
//! tear-down. It runs once to learn its calls, then once for each pair of a call site and an errno.
//! Its error then names the call and the errno. It may only succeed if the call is one that is tried
//! again or a probe, or was made when something was dropped, which the layers do again later.
//!
//! A [`Host`] is asked whether anything is left: when the handles of a layer are gone but the VM is
//! still there, and when everything is gone. The calls of init are swept once for each irqchip; the
//! other flows start with a sound one.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, LazyLock};

use hv_cli::config::{
    IrqchipMode, MemoryBacking, MemorySize, NetBackend, NetConfig, RunConfig, VirtioConfig,
};
use hv_cli::machine::Machine;
use hv_cli::machine::host::HostFacts;
use hv_core::init::{Config, InitializedVm, Irqchip, init};
use hv_core::layer::{CallSite, Faults, Interceptor, Layered};
use hv_core::{
    Call, CoalescedZone, DeviceChoice, Errno, Error, HostRange, Hypervisor, IoAddress, IoEvent,
    Ioctl, Msi, OpenError, Route, SlotFlags, SlotId, Vcpu, Vm,
};
use hv_irq::{IrqRouter, LegacyPins, RouterConfig};
use hv_memory::{
    IoEventMatch, IoEventRegistry, Mapping, NewSlot, SlotLimits, SlotManager, VcpusPaused,
    page_size,
};
use vm_memory::GuestAddress;

/// What the flows run on.
pub(crate) trait Host {
    type Vcpu: Vcpu + 'static;
    type Vm: Vm<Vcpu = Self::Vcpu> + Send + Sync + 'static;
    type Hypervisor: Hypervisor<Vm = Self::Vm>;

    /// A fresh hypervisor.
    fn open(&self) -> Self::Hypervisor;

    /// Fails if the VM has anything left of `made`. No handle to it exists.
    fn check_vm<V: Vm>(&self, vm: &V, made: &Made);

    /// Fails if anything at all is left. The hypervisor is gone; `failed` is the call that was made to
    /// fail.
    fn check_closed(&self, before: &Counts, failed: Option<Call>);

    /// What this process has.
    fn counts(&self) -> Counts;
}

/// What a process has that could leak.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Open descriptors.
    pub(crate) descriptors: Vec<String>,
    /// Mappings of descriptors and of guest memory.
    pub(crate) mappings: usize,
}

impl Counts {
    pub(crate) fn now() -> Self {
        let mut descriptors: Vec<_> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .map(|path| path.to_string_lossy().into_owned())
            // The directory that is being read.
            .filter(|target| !target.ends_with("/fd"))
            .collect();
        descriptors.sort();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_a_vm = |line: &&str| line.contains("kvm-vcpu") || line.contains("/memfd:");
        Self { descriptors, mappings: maps.lines().filter(of_a_vm).count() }
    }
}

/// What a flow put into its VM.
#[derive(Debug, Default)]
pub(crate) struct Made {
    /// Memory, to see whether the VM still holds it.
    pub(crate) memory: Vec<Arc<Mapping>>,
    /// Slots, to see whether their places are free.
    pub(crate) slots: Vec<(SlotId, GuestAddress)>,
    /// The routes that must be there, if the flow has a router.
    pub(crate) routes: Option<Vec<Route>>,
    /// eventfds that were irqfds.
    pub(crate) irqfds: Vec<hv_core::EventFd>,
    /// ioeventfds.
    pub(crate) ioevents: Vec<IoEvent>,
}

/// The hypervisor of a flow.
type Faulty<H> = Layered<<H as Host>::Hypervisor, Faults>;
type VmOf<H> = <Faulty<H> as Hypervisor>::Vm;

/// A flow, with its errors as they are shown to people.
type Flow<H> = fn(&H, &mut Run) -> Result<(), String>;

/// A run of a flow.
struct Run {
    faults: Faults,
    /// The calls that were made when something was dropped.
    drops: Vec<Range<usize>>,
    /// The calls that are the flow's; the others are its check's.
    made: Option<usize>,
    /// The calls that are init's.
    init: usize,
}

impl Run {
    fn new(faults: Faults) -> Self {
        Self { faults, drops: Vec::new(), made: None, init: 0 }
    }

    /// Drops something that can't report what fails.
    fn drop<T>(&mut self, owned: T) {
        let before = self.faults.calls().len();
        drop(owned);
        self.drops.push(before..self.faults.calls().len());
    }

    /// Fails if the VM has anything left.
    fn check<H: Host>(&mut self, host: &H, vm: &VmOf<H>, made: &Made) {
        self.made = Some(self.faults.calls().len());
        host.check_vm(vm, made);
    }

    /// The calls of the flow.
    fn sites(&self) -> Vec<CallSite> {
        let calls = self.faults.calls();
        let made = self.made.unwrap_or(calls.len());
        calls.into_iter().take(made).collect()
    }

    /// Notes that all calls so far are init's.
    fn initialized(&mut self) {
        self.init = self.faults.calls().len();
    }

    /// Whether the flow may go on when a call fails.
    fn tolerates(&self, site: CallSite, errno: Errno) -> bool {
        let calls = self.faults.calls();
        let n = site.n as usize;
        let probe = calls.iter().position(|site| site.call == Call::Eventfd);
        match site.call {
            Call::Ioctl(Ioctl::CreateVm) => errno == Errno::EINTR,
            // The probe for many ioeventfds is never an error.
            Call::Eventfd => true,
            Call::Ioctl(Ioctl::Ioeventfd) if probe.is_some_and(|probe| n > probe) => true,
            _ => self.drops.iter().any(|drops| drops.contains(&n)),
        }
    }
}

/// One of each virtio device.
fn devices() -> VirtioConfig {
    // What the network device is connected to stays open: each has a descriptor of its own for it.
    static NETWORK: LazyLock<UnixDatagram> = LazyLock::new(|| UnixDatagram::unbound().unwrap());
    let net = NetConfig::new(NetBackend::Fd(NETWORK.as_raw_fd()));
    VirtioConfig { rng: true, nets: vec![net], ..VirtioConfig::default() }
}

/// Runs all flows and returns how many pairs there were.
pub(crate) fn run<H: Host>(host: &H) -> usize {
    // What they are connected to is there before anything is counted.
    let _ = devices();
    let flows: [(&str, Flow<H>); 12] = [
        ("init, no irqchip", |h, run| start(h, run, Irqchip::Off)),
        ("init, irqchip in the kernel", |h, run| start(h, run, Irqchip::Kernel { pit: true })),
        ("init, split irqchip", |h, run| start(h, run, Irqchip::Split { pins: 24 })),
        ("memory", memory),
        ("routing, pins in the kernel", |h, run| routing(h, run, LegacyPins::Kernel)),
        ("routing, split", |h, run| routing(h, run, LegacyPins::Userspace)),
        ("doorbells", doorbells),
        ("a whole VM and its tear-down", whole),
        ("the machine of hv, irqchip in the kernel", |h, run| {
            machine(h, run, IrqchipMode::Kernel, VirtioConfig::default())
        }),
        ("the machine of hv, split irqchip", |h, run| {
            machine(h, run, IrqchipMode::Split, VirtioConfig::default())
        }),
        ("the machine of hv, virtio", |h, run| machine(h, run, IrqchipMode::Kernel, devices())),
        ("the machine of hv, virtio, split irqchip", |h, run| {
            machine(h, run, IrqchipMode::Split, devices())
        }),
    ];
    let mut all = 0;
    for (name, flow) in flows {
        let pairs = sweep(host, name, flow);
        println!("{pairs:6} pairs  {name}");
        all += pairs;
    }
    all
}

fn sweep<H: Host>(host: &H, name: &str, flow: Flow<H>) -> usize {
    let before = host.counts();
    let mut sound = Run::new(Faults::none());
    flow(host, &mut sound).unwrap_or_else(|error| panic!("{name}: {error}"));
    host.check_closed(&before, None);
    let mut pairs = 0;
    let is_init = sound.made.is_none() && sound.sites().len() == sound.init;
    for site in sound.sites() {
        if !is_init && (site.n as usize) < sound.init {
            continue;
        }
        for &errno in site.call.errnos() {
            let place = format!("{name}: call {} ({}) with {errno}", site.n, site.call);
            let mut run = Run::new(Faults::nth(site.n, errno));
            match flow(host, &mut run) {
                Ok(()) => assert!(sound.tolerates(site, errno), "{place} is no error"),
                Err(text) => {
                    assert!(text.contains(&site.call.to_string()), "{place}: {text:?}");
                    assert!(text.contains(errno.name().unwrap()), "{place}: {text:?}");
                    if is_init {
                        let step =
                            text.strip_prefix("init step ").and_then(|t| t.split(' ').next());
                        let step = step.and_then(|number| number.parse::<u32>().ok());
                        assert!(is_step_of(step.unwrap(), site.call), "{place}: {text:?}");
                    }
                }
            }
            assert_eq!(run.faults.failures(), 1, "{place}");
            host.check_closed(&before, Some(site.call));
            pairs += 1;
        }
    }
    assert!(pairs > 0, "{name} makes no call");
    pairs
}

/// Whether init makes this call in this step (the table of `hv_core::init`).
fn is_step_of(step: u32, call: Call) -> bool {
    let Call::Ioctl(ioctl) = call else { return call == Call::Sigaction && step == 17 };
    match ioctl {
        Ioctl::GetApiVersion => step == 2,
        Ioctl::CreateVm => step == 4,
        Ioctl::GetMsrIndexList | Ioctl::SetIdentityMapAddr => step == 11,
        Ioctl::SetTssAddr | Ioctl::SetNrMmuPages => step == 11,
        Ioctl::CreateIrqchip | Ioctl::CreatePit2 | Ioctl::EnableCap => step == 12,
        Ioctl::SetUserMemoryRegion | Ioctl::Ioeventfd => step == 15,
        Ioctl::RegisterCoalescedMmio => step == 15,
        // Capabilities are asked for where they are needed.
        Ioctl::CheckExtension => (3..=15).contains(&step),
        _ => false,
    }
}

fn open<H: Host>(
    host: &H,
    faults: &Faults,
) -> impl FnOnce(&DeviceChoice) -> Result<Faulty<H>, OpenError> {
    let hypervisor = faults.over(host.open());
    move |_| Ok(hypervisor)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn host_memory(pages: u64) -> Result<(Arc<Mapping>, HostRange), String> {
    let memory = Arc::new(Mapping::anonymous(pages * page_size()).map_err(text)?);
    let range = HostRange::new(memory.clone(), 0, (pages * page_size()) as usize);
    Ok((memory, range.ok_or("no such range")?))
}

/// An eventfd that is not the flow's business.
fn event() -> hv_core::EventFd {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
}

/// A configuration that uses every step of init.
fn config(irqchip: Irqchip, made: &mut Made) -> Result<Config, String> {
    let mut config = Config::new(page_size(), 2);
    config.irqchip = irqchip;
    config.nr_mmu_pages = Some(1 << 10);
    config.probe_many_ioeventfds = true;
    for (id, guest) in [(0, 0), (1, 0x10_0000)] {
        let (memory, host) = host_memory(4)?;
        let (id, guest) = (SlotId(id), GuestAddress(guest));
        config.slots.push(hv_core::MemorySlot { id, guest, host, flags: SlotFlags::default() });
        made.memory.push(memory);
    }
    let address = IoAddress::Mmio(0xc000_0000);
    config.ioeventfds.push(IoEvent { address, length: 4, datamatch: None, event: event() });
    let address = IoAddress::Mmio(0xc001_0000);
    config.coalesced_zones.push(CoalescedZone { address, size: 0x100 });
    Ok(config)
}

/// Init, with all that it can be asked for.
fn start<H: Host>(host: &H, run: &mut Run, irqchip: Irqchip) -> Result<(), String> {
    let mut made = Made::default();
    let config = config(irqchip, &mut made)?;
    let vm = init(open(host, &run.faults), &config).map_err(text);
    run.initialized();
    let result = vm.map(drop);
    drop(config);
    assert_freed(&made);
    result
}

/// Guest memory is held by nobody else.
fn assert_freed(made: &Made) {
    for memory in &made.memory {
        assert_eq!(Arc::strong_count(memory), 1, "guest memory is still held");
    }
}

/// A VM with an irqchip, no more.
fn vm_with<H: Host>(
    host: &H,
    run: &mut Run,
    irqchip: Irqchip,
) -> Result<(Arc<VmOf<H>>, InitParts<H>), String> {
    let mut config = Config::new(page_size(), 2);
    config.irqchip = irqchip;
    let vm: InitializedVm<Faulty<H>> = init(open(host, &run.faults), &config).map_err(text)?;
    run.initialized();
    let (hypervisor, vm, record) = vm.into_parts();
    Ok((Arc::new(vm), (hypervisor, record)))
}

type InitParts<H> = (Faulty<H>, hv_core::init::Record);

struct NoVcpus;

impl VcpusPaused for NoVcpus {}

/// Slots added, changed and removed.
fn memory<H: Host>(host: &H, run: &mut Run) -> Result<(), String> {
    let mut made = Made::default();
    let (vm, parts) = vm_with(host, run, Irqchip::Off)?;
    let limits = SlotLimits { slots: parts.1.nr_memslots, address_bits: 46 };
    let none: [(&str, hv_core::MemorySlot); 0] = [];
    let (manager, _) = SlotManager::adopt(vm.clone(), none, limits).map_err(text)?;
    let mut kept = Vec::new();
    let result = (|| {
        let mut add = |guest: u64, flags| {
            let (memory, host) = host_memory(2)?;
            made.memory.push(memory);
            let name = "RAM".into();
            let new = NewSlot { name, guest: GuestAddress(guest), host, flags };
            let slot = manager.add(new).map_err(text)?;
            made.slots.push((slot.id(), GuestAddress(guest)));
            Ok::<_, String>(slot)
        };
        let ram = add(0, SlotFlags::default())?;
        let rom = add(0x1_0000, SlotFlags { readonly: true, log_dirty: false })?;
        let vga = add(0x2_0000, SlotFlags { readonly: false, log_dirty: true })?;
        ram.set_log_dirty(true).map_err(text)?;
        vga.set_log_dirty(false).map_err(text)?;
        vga.move_to(GuestAddress(0x3_0000)).map_err(text)?;
        rom.unmap(&NoVcpus).map_err(text)?;
        rom.map().map_err(text)?;
        kept.extend([rom, vga]);
        ram.remove().map_err(text)
    })();
    run.drop(kept);
    // What a drop could not delete goes with the next addition.
    let result = result.and(settle(|| {
        let guest = GuestAddress(0x100_0000);
        let (_, host) = host_memory(1)?;
        let new = NewSlot { name: "next".into(), guest, host, flags: SlotFlags::default() };
        manager.add(new).and_then(|slot| slot.remove()).map_err(text)
    }));
    drop(manager);
    run.check(host, &vm, &made);
    drop(vm);
    assert_freed(&made);
    result
}

/// Makes the layers try again what they could not do; again, should the fault have hit this.
fn settle(next: impl Fn() -> Result<(), String>) -> Result<(), String> {
    next().or_else(|fault| next().and(Err(fault)))
}

fn message(vcpu: u8, vector: u8) -> Msi {
    Msi { address: 0xfee0_0000 | u64::from(vcpu) << 12, data: vector.into(), device: None }
}

/// A device is plugged, retargeted, masked, unmasked and unplugged; a pin is bound.
fn routing<H: Host>(host: &H, run: &mut Run, pins: LegacyPins) -> Result<(), String> {
    let mut made = Made::default();
    let irqchip = match pins {
        LegacyPins::Kernel => Irqchip::Kernel { pit: false },
        _ => Irqchip::Split { pins: 24 },
    };
    let (vm, _parts) = vm_with(host, run, irqchip)?;
    let router = IrqRouter::new(vm.clone(), RouterConfig::new(4096, pins)).map_err(text)?;
    let defaults = router.routes();
    let (mut pin, mut first) = (None, None);
    let result = (|| {
        let events: Vec<_> = (0..4).map(|_| event()).collect();
        made.irqfds.extend(events.iter().cloned());
        if pins == LegacyPins::Kernel {
            let event = event();
            made.irqfds.push(event.clone());
            pin = Some(router.bind_pin(hv_core::Gsi(4), event).map_err(text)?);
        }
        let device = router
            .batch(|batch| {
                let mut device = Vec::new();
                for (event, vector) in events.iter().zip(0x40..) {
                    let route = batch.add_msi(message(0, vector))?;
                    batch.bind(&route, event.clone())?;
                    device.push(route);
                }
                Ok(device)
            })
            .map_err(text)?;
        let ([one, two, ..], [event, ..]) = (device.as_slice(), events.as_slice()) else {
            return Err("four vectors".into());
        };
        router.batch(|batch| batch.unbind(one)).map_err(text)?;
        router
            .batch(|batch| {
                batch.set_msi(one, message(1, 0x40))?;
                batch.bind(one, event.clone())?;
                batch.set_msi(two, message(1, 0x41))
            })
            .map_err(text)?;
        let mut device = device.into_iter();
        first = device.next();
        router.batch(|batch| device.try_for_each(|route| batch.remove(route))).map_err(text)
    })();
    run.drop((pin, first));
    // What a drop could not undo is tried again with the next commit.
    let result = result.and(settle(|| {
        let route = router.batch(|batch| batch.add_msi(message(0, 0x7f))).map_err(text)?;
        router.batch(|batch| batch.remove(route)).map_err(text)
    }));
    assert_eq!(router.routes(), defaults, "routes are left");
    assert_eq!(router.allocated(), [], "GSIs are left");
    assert_eq!(router.irqfds(), [], "irqfds are left");
    drop(router);
    made.routes = Some(defaults);
    run.check(host, &vm, &made);
    result
}

/// ioeventfds made and removed.
fn doorbells<H: Host>(host: &H, run: &mut Run) -> Result<(), String> {
    let mut made = Made::default();
    let (vm, _parts) = vm_with(host, run, Irqchip::Off)?;
    let registry = IoEventRegistry::new(vm.clone());
    let address = IoAddress::Mmio(0xc000_0000);
    let mut handles = Vec::new();
    let result = (|| {
        for value in 0..3 {
            let (length, datamatch, event) = (2, Some(value), event());
            made.ioevents.push(IoEvent { address, length, datamatch, event: event.clone() });
            let matched = IoEventMatch { address, length, datamatch };
            handles.push(registry.assign(matched, event).map_err(text)?);
        }
        handles.pop().map_or(Ok(()), |handle| handle.remove()).map_err(text)
    })();
    run.drop(handles);
    // What a drop could not remove is tried again when something is assigned there.
    let result = result.and(settle(|| {
        let next = IoEventMatch { address, length: 2, datamatch: Some(9) };
        registry.assign(next, event()).and_then(|handle| handle.remove()).map_err(text)
    }));
    assert_eq!(registry.assigned(), [], "ioeventfds are left");
    drop(registry);
    run.check(host, &vm, &made);
    result
}

/// A VM with everything, whose owner drops it in the order that costs least, leaving most of it to
/// the end of the VM.
fn whole<H: Host>(host: &H, run: &mut Run) -> Result<(), String> {
    let mut made = Made::default();
    let mut config = config(Irqchip::Kernel { pit: true }, &mut made)?;
    config.probe_many_ioeventfds = false;
    let slots = config.slots.clone();
    let vm: InitializedVm<Faulty<H>> = init(open(host, &run.faults), &config).map_err(text)?;
    run.initialized();
    drop(config);
    let result = (|| {
        let (hypervisor, vm, record) = vm.into_parts();
        let vm = Arc::new(vm);
        let router = IrqRouter::new(vm.clone(), RouterConfig::new(4096, LegacyPins::Kernel));
        let router = router.map_err(text)?;
        let limits = SlotLimits { slots: record.nr_memslots, address_bits: 46 };
        let slots = slots.into_iter().map(|slot| ("RAM", slot));
        let (manager, owners) = SlotManager::adopt(vm.clone(), slots, limits).map_err(text)?;
        let vector = event();
        let _route = router
            .batch(|batch| {
                let route = batch.add_msi(message(0, 0x40))?;
                batch.bind(&route, vector.clone())?;
                Ok(route)
            })
            .map_err(text)?;
        let shown: fn(Error) -> String = text;
        let vcpus = [vm.create_vcpu(0).map_err(shown)?, vm.create_vcpu(1).map_err(shown)?];
        for vcpu in &vcpus {
            vcpu.set_cpuid(&hypervisor.supported_cpuid().map_err(shown)?).map_err(shown)?;
            vcpu.set_regs(&vcpu.regs().map_err(shown)?).map_err(shown)?;
        }
        // Managers before what they own: the end of the VM takes it all.
        run.drop((manager, owners, router, vm, vcpus, hypervisor));
        Ok(())
    })();
    assert_freed(&made);
    result
}

/// The machine of the built-in guest, from its configuration to its end, without running it.
fn machine<H: Host>(
    host: &H,
    run: &mut Run,
    irqchip: IrqchipMode,
    virtio: VirtioConfig,
) -> Result<(), String> {
    let config = RunConfig {
        kvm: DeviceChoice::default(),
        kernel: None,
        cpus: 2,
        memory: MemorySize(16 << 20),
        backing: MemoryBacking::default(),
        irqchip,
        devices: Vec::new(),
        virtio,
        complete: true,
        json: false,
        trace: None,
        record: None,
        stats_json: None,
        gdb: None,
        api_socket: None,
        seccomp: hv_cli::isolation::SeccompMode::default(),
    };
    let machine = Machine::build(open(host, &run.faults), &config, &HostFacts::detect());
    let machine = machine.map_err(text)?;
    run.drop(machine);
    Ok(())
}
