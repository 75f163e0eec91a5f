//! A host for the tests: mocks that write every call down and fail the ones they are told to.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use crate::init::{Config, InitError, InitializedVm, init};
use crate::mock::{MockHypervisor, MockVm};
use crate::{Call, Capability, DeviceChoice, Errno, Error, Ioctl, MsrIndexList, OpenError};

/// Which call fails, and with what.
#[derive(Clone)]
enum Fault {
    /// The first `times` calls whose line starts so.
    Line { start: String, times: usize, errno: Errno },
    /// The call with this index in the log.
    Index(usize, Errno),
}

/// What the calls leave behind.
#[derive(Default)]
struct Trace {
    lines: Vec<String>,
    faults: Vec<Fault>,
    /// Our ends of the eventfds that were handed out.
    eventfds: Vec<UnixStream>,
}

/// A host with the capabilities of Linux 6.18, until a test says otherwise.
#[derive(Clone)]
pub(super) struct Host {
    api_version: i32,
    capabilities: BTreeMap<Capability, i32>,
    /// How many MSRs there are, at one question after the other; the last answer stays.
    msrs: Vec<usize>,
    trace: Arc<Mutex<Trace>>,
}

impl Host {
    pub(super) fn new() -> Self {
        let mut capabilities: BTreeMap<_, _> = Capability::ALL.iter().map(|&c| (c, 1)).collect();
        capabilities.extend([
            (Capability::MaxVcpus, 1024),
            (Capability::NrVcpus, 8),
            (Capability::MaxVcpuId, 4096),
            (Capability::CoalescedMmio, 2),
            (Capability::NrMemslots, 32764),
            (Capability::IrqRouting, 4096),
            (Capability::Pci23, 0),
        ]);
        Self { api_version: 12, capabilities, msrs: vec![3], trace: Arc::default() }
    }

    /// This host with another value of a capability; 0 is absence.
    pub(super) fn with(mut self, cap: Capability, value: i32) -> Self {
        self.capabilities.insert(cap, value);
        self
    }

    /// This host with another API version.
    pub(super) fn with_api_version(self, api_version: i32) -> Self {
        Self { api_version, ..self }
    }

    /// This host with these answers about its MSRs.
    pub(super) fn with_msrs(self, msrs: impl Into<Vec<usize>>) -> Self {
        Self { msrs: msrs.into(), ..self }
    }

    /// Fails every call whose line starts so.
    pub(super) fn failing(self, start: &str, errno: Errno) -> Self {
        self.failing_times(start, usize::MAX, errno)
    }

    /// Fails the first `times` of them.
    pub(super) fn failing_times(self, start: &str, times: usize, errno: Errno) -> Self {
        self.fault(Fault::Line { start: start.into(), times, errno })
    }

    /// Fails the call with this index.
    pub(super) fn failing_at(self, index: usize, errno: Errno) -> Self {
        self.fault(Fault::Index(index, errno))
    }

    fn fault(self, fault: Fault) -> Self {
        self.trace.lock().unwrap().faults.push(fault);
        self
    }

    /// Starts a VM.
    pub(super) fn init(&self, config: &Config) -> Result<InitializedVm<MockHypervisor>, InitError> {
        init(|choice| self.open(choice), config)
    }

    /// Starts one that must not start.
    pub(super) fn refuses(&self, config: &Config) -> InitError {
        self.init(config).expect_err("the VM must not start")
    }

    /// What happened since the last question, line by line.
    pub(super) fn lines(&self) -> Vec<String> {
        std::mem::take(&mut self.trace.lock().unwrap().lines)
    }

    /// How many eventfds were handed out and whether all of them are closed.
    pub(super) fn eventfds(&self) -> (usize, bool) {
        use std::io::Read;
        let mut trace = self.trace.lock().unwrap();
        let closed = trace.eventfds.iter_mut().all(|ours| matches!(ours.read(&mut [0]), Ok(0)));
        (trace.eventfds.len(), closed)
    }

    /// Writes a call down; fails it if a fault says so.
    fn call(&self, call: impl Into<Call>, line: String) -> Result<(), Error> {
        match self.errno(line) {
            Some(errno) => Err(Error::new(call, errno)),
            None => Ok(()),
        }
    }

    fn errno(&self, line: String) -> Option<Errno> {
        let mut trace = self.trace.lock().unwrap();
        let here = trace.lines.len();
        let errno = trace.faults.iter_mut().find_map(|fault| match fault {
            Fault::Index(index, errno) => (*index == here).then_some(*errno),
            Fault::Line { start, times, errno } => {
                let hit = *times > 0 && line.starts_with(start.as_str());
                *times -= usize::from(hit);
                hit.then_some(*errno)
            }
        });
        trace.lines.push(line);
        errno
    }

    fn ioctl(&self, ioctl: Ioctl, argument: impl std::fmt::Display) -> Result<(), Error> {
        self.call(ioctl, format!("{ioctl} {argument}"))
    }

    fn check(&self, scope: &str, cap: Capability) -> Result<i32, Error> {
        self.call(Ioctl::CheckExtension, format!("{scope} {cap}"))?;
        Ok(self.capabilities.get(&cap).copied().unwrap_or(0))
    }

    fn open(&self, choice: &DeviceChoice) -> Result<MockHypervisor, OpenError> {
        match self.errno(format!("open {choice}")) {
            Some(errno) => Err(OpenError { choice: choice.clone(), errno }),
            None => Ok(self.hypervisor()),
        }
    }

    fn hypervisor(&self) -> MockHypervisor {
        let mut mock = MockHypervisor::new();
        let (host, gone) = (self.clone(), Gone(self.clone()));
        mock.expect_api_version().returning(move || {
            let _ = &gone;
            host.call(Ioctl::GetApiVersion, "KVM_GET_API_VERSION".into())?;
            Ok(host.api_version)
        });
        let host = self.clone();
        mock.expect_check_extension().returning(move |cap| host.check("system", cap));
        let (host, mut answers) = (self.clone(), self.msrs.clone());
        mock.expect_msr_index_list().returning(move |room| {
            host.ioctl(Ioctl::GetMsrIndexList, room)?;
            let available = if answers.len() > 1 { answers.remove(0) } else { answers[0] };
            let count = if available <= room { available } else { 0 };
            Ok(MsrIndexList { available, indices: (0x10..).take(count).collect() })
        });
        let host = self.clone();
        mock.expect_create_vm().returning(move |vm_type| {
            host.ioctl(Ioctl::CreateVm, vm_type)?;
            Ok(host.vm())
        });
        let host = self.clone();
        mock.expect_eventfd().returning(move || {
            host.call(Call::Eventfd, "eventfd".into())?;
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.trace.lock().unwrap().eventfds.push(ours);
            Ok(OwnedFd::from(theirs).into())
        });
        let host = self.clone();
        mock.expect_install_kick()
            .returning(move || host.call(Call::Sigaction, "install kick".into()));
        mock
    }

    fn vm(&self) -> MockVm {
        let mut vm = MockVm::new();
        let host = self.clone();
        vm.expect_drop().times(1).returning(move || {
            host.errno("VM closed".into());
        });
        let host = self.clone();
        vm.expect_check_extension().returning(move |cap| host.check("vm", cap));
        let host = self.clone();
        vm.expect_set_identity_map_addr()
            .returning(move |at| host.ioctl(Ioctl::SetIdentityMapAddr, format_args!("{at:#x}")));
        let host = self.clone();
        vm.expect_set_tss_addr()
            .returning(move |at| host.ioctl(Ioctl::SetTssAddr, format_args!("{at:#x}")));
        let host = self.clone();
        vm.expect_set_nr_mmu_pages()
            .returning(move |pages| host.ioctl(Ioctl::SetNrMmuPages, pages));
        let host = self.clone();
        vm.expect_create_irqchip()
            .returning(move || host.call(Ioctl::CreateIrqchip, "KVM_CREATE_IRQCHIP".into()));
        let host = self.clone();
        vm.expect_create_pit2().returning(move |pit| {
            host.ioctl(Ioctl::CreatePit2, format_args!("flags {}", pit.flags))
        });
        let host = self.clone();
        vm.expect_enable_cap().returning(move |cap, args| {
            host.ioctl(Ioctl::EnableCap, format_args!("{cap} {args:?}"))
        });
        let host = self.clone();
        vm.expect_set_memory_slot().returning(move |slot| {
            let (id, guest, len) = (slot.id, slot.guest.0, slot.host.len());
            host.ioctl(Ioctl::SetUserMemoryRegion, format_args!("slot {id} {guest:#x} {len:#x}"))
        });
        let host = self.clone();
        vm.expect_ioeventfd_assign().returning(move |e| {
            let line = format!("assign {:?} len {} {:?}", e.address, e.length, e.datamatch);
            host.ioctl(Ioctl::Ioeventfd, line)
        });
        let host = self.clone();
        vm.expect_ioeventfd_deassign().returning(move |e| {
            let line = format!("deassign {:?} len {} {:?}", e.address, e.length, e.datamatch);
            host.ioctl(Ioctl::Ioeventfd, line)
        });
        let host = self.clone();
        vm.expect_register_coalesced_zone().returning(move |zone| {
            let line = format!("{:?} {:#x}", zone.address, zone.size);
            host.ioctl(Ioctl::RegisterCoalescedMmio, line)
        });
        vm
    }
}

/// Owned by the mock of the hypervisor, so it goes when that does.
struct Gone(Host);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.errno("hypervisor closed".into());
    }
}
