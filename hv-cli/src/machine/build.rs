//! Puts a machine together, in the order that costs least and can fail safely: images are opened
//! and memory is laid out before KVM hears of anything, and no vCPU runs before all is in place.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use hv_core::init::{self, InitError, Irqchip, Record};
use hv_core::{Capability, DeviceChoice, Error, Hypervisor, OpenError, SlotId, Vcpu, Vm};
use hv_irq::RouterError;
use hv_memory::{GuestRam, page_size};
use vm_memory::GuestAddress;

use super::Machine;
use super::built_in::{Parts, PartsError};
use super::bus::{Bus, BusError, Device};
use super::connected::{self, Connected};
use super::cpu::{CpuidConfig, cpuid, set_firmware_state};
use super::devices::{self, Devices, DevicesError};
use super::exits::Outside;
use super::host::HostFacts;
use super::interrupts::Interrupts;
use super::ram::{self, LostMemory, MemoryError};
use super::stop::Stopper;
use super::vcpu::VcpuThread;
use crate::acpi::{self, AcpiConfig, AcpiError, AcpiPci};
use crate::complete::Completer;
use crate::config::{ConsoleChoice, DeviceOption, IrqchipMode, KernelConfig, RunConfig};
use crate::console::{Console, Wire};
use crate::devices::{
    Com1, DebugExit, I8042, Latch, PageRemap, PowerControl, ResetPort, Rtc, Scratch, SetIrq,
};
use crate::event::Event;
use crate::gdb::{Debugger, Setup};
use crate::guest::{self, MMIO, MMIO_LEN, PORTS, PORTS_LEN};
use crate::layout;
use crate::loader::{self, BootState, Image, LoadError, LoadRequest, MemoryMap};
use crate::pci::{ConfigPorts, PciBus};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel or the initrd can't be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Init failed.
    #[error(transparent)]
    Init(#[from] InitError),
    /// The built-in guest can't be had.
    #[error("the built-in guest: {0}")]
    BuiltIn(#[from] PartsError),
    /// The built-in guest starts and interrupts its second processor by an 8-bit APIC id.
    #[error(
        "--cpus {0}: the built-in guest takes at most {MAX_BUILT_IN_CPUS}; a kernel may have more"
    )]
    TooManyForBuiltIn(u32),
    /// The built-in guest has no room.
    #[error("--memory: {0}")]
    NoRam(#[from] guest::NoRam),
    /// Interrupts could not be set up.
    #[error("interrupts: {0}")]
    Interrupts(#[from] RouterError),
    /// The virtio devices can't be had.
    #[error(transparent)]
    Devices(#[from] DevicesError),
    /// Two devices are in the same place.
    #[error("--device: {0}")]
    Bus(#[from] BusError),
    /// The ACPI tables don't fit.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// A vCPU could not be made.
    #[error(transparent)]
    Vcpu(#[from] Error),
    /// The host has no descriptor left.
    #[error("can't make an eventfd: {0}; raise the limit of open files (ulimit -n)")]
    Eventfd(hv_core::Errno),
}

impl BuildError {
    /// Whether what was asked for can't be, whatever the state of the host.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Memory(error) => error.is_usage(),
            Self::Load(_)
            | Self::Bus(_)
            | Self::NoRam(_)
            | Self::Acpi(_)
            | Self::Devices(
                DevicesError::Pci(_)
                | DevicesError::Net(_)
                | DevicesError::Vsock(_)
                | DevicesError::Balloon { .. },
            )
            | Self::TooManyForBuiltIn(_) => true,
            Self::Devices(DevicesError::Disk(error)) => error.is_usage(),
            Self::Init(error) => error.step == init::Step::VcpuLimits,
            _ => false,
        }
    }
}

/// APIC ids 0 to 254; 255 is everyone.
const MAX_BUILT_IN_CPUS: u32 = 255;

/// The images of a kernel, opened and checked for what can be checked without a machine.
struct Images {
    kernel: Image,
    initrd: Option<Image>,
}

impl Images {
    fn open(config: &KernelConfig) -> Result<Self, LoadError> {
        let kernel = Image::open(&config.path)?;
        loader::check(&kernel, config.format)?;
        let initrd = config.initrd.as_deref().map(Image::open).transpose()?;
        Ok(Self { kernel, initrd })
    }
}

impl<H> Machine<H>
where
    H: Hypervisor,
    H::Vm: Send + Sync + 'static,
    <H::Vm as Vm>::Vcpu: 'static,
{
    /// A machine that is ready to run, on a host with these facts.
    ///
    /// # Errors
    /// What can't be had; everything made until then is gone again.
    pub fn build(
        open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
        config: &RunConfig,
        host: &HostFacts,
    ) -> Result<Self, BuildError> {
        let images = config.kernel.as_ref().map(Images::open).transpose()?;
        if images.is_none() && config.cpus > MAX_BUILT_IN_CPUS {
            return Err(BuildError::TooManyForBuiltIn(config.cpus));
        }
        let mut virtio = devices::open(&config.virtio)?;
        let ram = Arc::new(ram::ram(config, host)?);
        let mut init = init_config(config, &ram);
        let parts = if images.is_none() { Some(Parts::new()?) } else { None };
        if let Some(parts) = &parts {
            init.slots.extend(parts.slot(SlotId(ram.slots().len() as u32)));
            init.ioeventfds.push(parts.ioeventfd());
        }
        let (hypervisor, vm, record) = init::init(open, &init)?.into_parts();
        let vm = Arc::new(vm);

        let drained = event()?;
        let Connected { devices: connected, input, balloon } =
            connected::open(config, &drained, &ram)?;
        virtio.extend(connected);

        let interrupts = Interrupts::new(vm.clone(), &record)?;
        let devices = Devices::new(virtio, &vm, &record, ram.memory(), host, &interrupts)?;
        let stopper = Stopper::new(event()?);
        let checks = parts
            .map(|parts| parts.checks(interrupts.router(), &record, config.cpus, &stopper))
            .transpose()?;
        let wire = match config.virtio.console {
            ConsoleChoice::Serial => Wire::new(stopper.clone()),
            ConsoleChoice::Hvc0 => Wire::to_stderr(stopper.clone()),
        };
        let out: Box<dyn Write + Send> = match &checks {
            Some(checks) if config.json => Box::new(checks.com1(io::sink())),
            Some(checks) => Box::new(checks.com1(wire)),
            None => Box::new(wire),
        };
        // The built-in guest checks COM1 by itself: what is typed would only be in its way.
        let irq = interrupts.edge(layout::COM1_IRQ)?;
        let com1 = Arc::new(Mutex::new(Com1::new(irq, drained.clone(), out)));
        let console = Console {
            input: input.unwrap_or_else(|| com1.clone()),
            com1,
            drained,
            stopper: stopper.clone(),
            takes_input: checks.is_none(),
        };
        let mut outside = Outside::default();
        let kernel_irqchip = matches!(record.irqchip, Irqchip::Kernel { .. });
        let power = PowerControl::new(stopper.clone(), interrupts.lines());
        let button = power.button();
        let bus = devices.bus();
        legacy_devices(&mut outside, &ram, &stopper, &console, kernel_irqchip, bus, power)?;
        interrupts.attach(&mut outside)?;
        devices.attach(&mut outside)?;
        optional_devices(&mut outside, config, &ram, &stopper, &interrupts)?;
        if let Some(checks) = &checks {
            outside.ports.insert("checks", PORTS.into(), PORTS_LEN, checks.ports())?;
            outside.memory.insert("checks", MMIO, MMIO_LEN, checks.mmio())?;
        }
        let boot = match (&config.kernel, &images) {
            (Some(kernel), Some(images)) => {
                load(&ram, kernel, images, config, &record, devices.bus())?
            }
            _ => guest::load(ram.memory())?,
        };
        let outside = Arc::new(outside);
        let leaves = hypervisor.supported_cpuid()?;
        let cpuid_config = CpuidConfig {
            cpus: config.cpus,
            tsc_deadline: vm.check_extension(Capability::TscDeadlineTimer)? > 0,
            hide_hypercalls: host.software_kvm,
        };
        let mut vcpus = Vec::new();
        for id in 0..config.cpus {
            let vcpu = vm.create_vcpu(id)?;
            vcpu.set_cpuid(&cpuid(&leaves, id, cpuid_config))?;
            set_firmware_state(&vcpu, id == 0)?;
            if id == 0 {
                let (mut sregs, mut regs) = (vcpu.sregs()?, vcpu.regs()?);
                boot.apply(&mut sregs, &mut regs);
                vcpu.set_sregs(&sregs)?;
                vcpu.set_regs(&regs)?;
            }
            vcpus.push(vcpu);
        }
        // A pause of the API stops vCPUs as a debugger does.
        let debugger = (config.gdb.is_some() || config.api_socket.is_some())
            .then(|| {
                let kicks = vcpus.iter().map(Vcpu::kicker);
                let wait = config.gdb.as_ref().is_some_and(|gdb| gdb.wait);
                let setup = Setup { wait, software_kvm: host.software_kvm };
                Debugger::new(kicks, ram.memory().clone(), stopper.clone(), setup)
            })
            .transpose()
            .map_err(eventfd)?;
        let thread = |vcpu| VcpuThread {
            vcpu,
            outside: outside.clone(),
            ram: ram.clone(),
            stopper: stopper.clone(),
            completer: config.complete.then(Completer::default),
            debugger: debugger.clone(),
            counts: Arc::default(),
        };
        let vcpus = vcpus.into_iter().map(thread).collect();
        let _hypervisor = hypervisor;
        Ok(Self {
            vcpus,
            devices,
            console,
            checks,
            debugger,
            button,
            made: Instant::now(),
            balloon,
            stopper,
            interrupts,
            ram,
            record,
            _hypervisor,
        })
    }
}

fn init_config(config: &RunConfig, ram: &GuestRam) -> init::Config {
    let mut init = init::Config::new(page_size(), config.cpus);
    init.device = config.kvm.clone();
    init.highest_vcpu_id = config.cpus.saturating_sub(1);
    init.irqchip = match config.irqchip {
        IrqchipMode::Kernel => Irqchip::Kernel { pit: true },
        IrqchipMode::Split => Irqchip::Split { pins: 24 },
    };
    init.slots = ram.slots().to_vec();
    init
}

fn event() -> Result<Event, BuildError> {
    Event::new().map_err(eventfd)
}

fn eventfd(error: io::Error) -> BuildError {
    BuildError::Eventfd(hv_core::Errno::from(&error))
}

/// Puts a device of its own on `bus`.
pub(super) fn put(
    bus: &mut Bus,
    name: &'static str,
    start: u64,
    len: u64,
    device: impl Device + 'static,
) -> Result<(), BusError> {
    bus.insert(name, start, len, Arc::new(Mutex::new(device)))
}

/// What is never reached, but keeps its place.
struct Nothing;

impl Device for Nothing {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// The devices every machine has.
fn legacy_devices(
    outside: &mut Outside,
    ram: &GuestRam,
    stopper: &Stopper,
    console: &Console,
    kernel_irqchip: bool,
    pci: Option<&Arc<PciBus>>,
    power: PowerControl,
) -> Result<(), BusError> {
    let map = MemoryMap::new(ram.memory(), &[]);
    let below_4g = map.ram_below(layout::MMIO_HOLE_END);
    let rtc = Rtc::new(below_4g, map.ram_below(u64::MAX) - below_4g);
    for slot in ram.slots() {
        let (start, len) = (slot.guest.0, slot.host.len() as u64);
        let lost = LostMemory { start, stopper: stopper.clone() };
        put(&mut outside.memory, "RAM", start, len, lost)?;
    }
    let ports = &mut outside.ports;
    ports.insert("COM1", layout::COM1_PORT.into(), 8, console.com1.clone())?;
    put(ports, "i8042", 0x60, 5, I8042::new(stopper.clone()))?;
    put(ports, "RTC", 0x70, 2, rtc)?;
    put(ports, "ACPI", layout::PM1A_EVENT_PORT.into(), 6, power)?;
    let reset = ResetPort::new(stopper.clone());
    match pci {
        Some(bus) => {
            let config = ConfigPorts::new(bus.clone(), reset);
            put(ports, "PCI", layout::PCI_CONFIG_PORT.into(), 8, config)?;
        }
        None => put(ports, "reset", layout::RESET_PORT.into(), 1, reset)?,
    }
    if !kernel_irqchip {
        return Ok(());
    }
    // KVM answers these itself, so that another device there would never be reached.
    for (name, start, len) in
        [("the PIC", 0x20, 2), ("the PIT", 0x40, 4), ("the PIC", 0xa0, 2), ("the PIC", 0x4d0, 2)]
    {
        put(ports, name, start, len, Nothing)?;
    }
    Ok(())
}

struct RemapRam(Arc<GuestRam>);

impl PageRemap for RemapRam {
    fn remap(&mut self, guest: u64) {
        // A page the host can't map again is where it was: the guest only waits less.
        let _ = self.0.remap_page(GuestAddress(guest));
    }
}

/// The devices that were asked for.
fn optional_devices<V>(
    outside: &mut Outside,
    config: &RunConfig,
    ram: &Arc<GuestRam>,
    stopper: &Stopper,
    interrupts: &Interrupts<V>,
) -> Result<(), BusError>
where
    V: hv_core::IrqBackend + Send + Sync + 'static,
{
    for device in &config.devices {
        match *device {
            DeviceOption::IsaDebugExit { iobase } => {
                let exit = DebugExit::new(stopper.clone());
                put(&mut outside.ports, "isa-debug-exit", iobase.into(), 4, exit)?;
            }
            DeviceOption::Testdev => {
                let lines = SetIrq::new(interrupts.lines());
                put(&mut outside.ports, "testdev", 0xe0, 4, Latch::default())?;
                let flush: Box<dyn PageRemap> = Box::new(RemapRam(ram.clone()));
                put(&mut outside.ports, "testdev", 0xe4, 4, flush)?;
                put(&mut outside.ports, "testdev", 0x2000, SetIrq::LINES, lines)?;
                put(
                    &mut outside.memory,
                    "testdev",
                    0xff00_0000,
                    Scratch::SIZE,
                    Scratch::default(),
                )?;
            }
        }
    }
    Ok(())
}

fn load(
    ram: &GuestRam,
    kernel: &KernelConfig,
    images: &Images,
    config: &RunConfig,
    record: &Record,
    pci: Option<&Arc<PciBus>>,
) -> Result<BootState, BuildError> {
    let reserved = record.reserved.identity_map..record.reserved.identity_map + record.reserved.len;
    let map = MemoryMap::new(ram.memory(), &[reserved]);
    let pic = matches!(record.irqchip, Irqchip::Kernel { .. });
    let pci = pci.map(|bus| AcpiPci { windows: bus.windows(), last_slot: bus.last_slot() });
    let acpi = AcpiConfig { cpus: config.cpus, io_apic: true, pic, pci };
    let rsdp = acpi::build(ram.memory(), &acpi)?;
    let request = LoadRequest {
        format: kernel.format,
        cmdline: kernel.cmdline.as_deref(),
        linux_cmdline: match config.virtio.console {
            ConsoleChoice::Serial => loader::LINUX_CMDLINE,
            ConsoleChoice::Hvc0 => loader::LINUX_CMDLINE_HVC0,
        },
        initrd: images.initrd.as_ref(),
        map: &map,
        rsdp: Some(rsdp),
    };
    Ok(loader::load(ram.memory(), &images.kernel, &request)?)
}
