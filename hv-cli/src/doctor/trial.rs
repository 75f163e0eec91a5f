//! The proof: a VM made as `hv run` makes one, whose vCPU runs two instructions and a port write.
//!
//! Whatever the host looks like, this is what decides whether VMs run here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hv_core::init::{Config, GUEST_PAGE_SIZE, InitError, InitErrorKind, init};
use hv_core::{
    DeviceChoice, Errno, Error, HostMemory, HostRange, Hypervisor, IoDirection, IoExit, MemorySlot,
    OpenError, SlotFlags, SlotId, Vcpu, VcpuExit, VcpuKick, Vm,
};
use vm_memory::GuestAddress;

/// How long the vCPU may take: far more than any host needs that works at all.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(20);

/// The guest-physical address of the code.
const CODE_ADDRESS: u64 = 0x1000;
/// The port written to, which no in-kernel device has.
const PORT: u16 = 0x510;
/// The byte written.
const BYTE: u8 = 0x5a;
/// Real mode: mov dx, PORT; mov al, BYTE; out dx, al; hlt.
const CODE: [u8; 7] = [0xba, PORT.to_le_bytes()[0], PORT.to_le_bytes()[1], 0xb0, BYTE, 0xee, 0xf4];

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TrialError {
    /// No VM could be made.
    Init(InitError),
    /// A call on the VM or its vCPU failed.
    Call(Error),
    /// The vCPU stopped with something else than the port write.
    Exit(Box<VcpuExit>),
    /// The port write carried another byte.
    Data(Vec<u8>),
    /// The vCPU did not get there within [`TIME_LIMIT`].
    TimedOut,
    /// The thread that watches the time could not be started.
    NoThread(Errno),
}

impl TrialError {
    /// Why the device could not be opened, if that is what failed.
    pub(super) fn open_error(&self) -> Option<&OpenError> {
        match self {
            TrialError::Init(InitError { kind: InitErrorKind::Open(error), .. }) => Some(error),
            _ => None,
        }
    }
}

impl From<Error> for TrialError {
    fn from(error: Error) -> Self {
        TrialError::Call(error)
    }
}

/// Memory for the code: two guest pages, one of which is aligned.
#[derive(Debug)]
struct Pages(Vec<AtomicU8>);

impl HostMemory for Pages {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

/// An aligned page that starts with `code`.
fn page(code: &[u8]) -> Option<HostRange> {
    const SIZE: usize = GUEST_PAGE_SIZE as usize;
    let pages: Vec<AtomicU8> = (0..2 * SIZE).map(|_| AtomicU8::new(0)).collect();
    let start = pages.as_ptr().addr().next_multiple_of(SIZE) - pages.as_ptr().addr();
    for (byte, value) in pages.iter().skip(start).zip(code) {
        byte.store(*value, Ordering::Relaxed);
    }
    HostRange::new(Arc::new(Pages(pages)), start, SIZE)
}

/// Makes the VM on the device and runs its vCPU for at most `limit`.
pub(super) fn run<H: Hypervisor>(
    open: impl FnOnce(&DeviceChoice) -> Result<H, OpenError>,
    device: &DeviceChoice,
    limit: Duration,
) -> Result<(), TrialError> {
    let mut config = Config::new(rustix::param::page_size() as u64, 1);
    config.device = device.clone();
    config.slots.extend(page(&CODE).map(|host| MemorySlot {
        id: SlotId(0),
        guest: GuestAddress(CODE_ADDRESS),
        host,
        flags: SlotFlags::default(),
    }));
    let machine = init(open, &config).map_err(TrialError::Init)?;
    let mut vcpu = machine.vm().create_vcpu(0)?;

    let mut sregs = vcpu.sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.regs()?;
    regs.rip = CODE_ADDRESS;
    regs.rflags = 2; // The bit that is always set.
    vcpu.set_regs(&regs)?;

    let exit = run_for(&mut vcpu, limit)?;
    let write = IoExit { direction: IoDirection::Out, port: PORT, size: 1, count: 1 };
    match exit {
        VcpuExit::Io(io) if io == write => match vcpu.io_data() {
            [BYTE] => Ok(()),
            data => Err(TrialError::Data(data.iter().copied().take(8).collect())),
        },
        exit => Err(TrialError::Exit(Box::new(exit))),
    }
}

/// The first exit that is not an interruption.
fn run_for(vcpu: &mut impl Vcpu, limit: Duration) -> Result<VcpuExit, TrialError> {
    let kicker = vcpu.kicker();
    let late = AtomicBool::new(false);
    let (done, wait) = channel::<()>();
    std::thread::scope(|scope| {
        let (kicker, late) = (&kicker, &late);
        std::thread::Builder::new()
            .name("time limit".into())
            .spawn_scoped(scope, move || {
                if wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                    late.store(true, Ordering::Release);
                    // It only fails for a thread that is gone, which has then run to its end.
                    let _ = kicker.kick();
                }
            })
            .map_err(|error| TrialError::NoThread(Errno::from(&error)))?;
        let exit = loop {
            match vcpu.run() {
                Ok(VcpuExit::Interrupted) if late.load(Ordering::Acquire) => {
                    break Err(TrialError::TimedOut);
                }
                Ok(VcpuExit::Interrupted) => {}
                result => break Ok(result?),
            }
        };
        drop(done);
        exit
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::{MockHypervisor, MockVcpu, MockVcpuKick, MockVm};
    use hv_core::{Capability, Ioctl, MsrIndexList};
    use std::sync::atomic::AtomicUsize;

    /// A KVM whose VM hands out this vCPU.
    fn kvm(vcpu: MockVcpu) -> MockHypervisor {
        let mut vm = MockVm::new();
        vm.expect_drop().return_const(());
        vm.expect_check_extension().returning(|_| Ok(24));
        vm.expect_set_identity_map_addr().returning(|_| Ok(()));
        vm.expect_set_tss_addr().returning(|_| Ok(()));
        vm.expect_set_memory_slot().withf(holds_the_code).times(1).returning(|_| Ok(()));
        vm.expect_create_irqchip().times(1).returning(|| Ok(()));
        vm.expect_create_pit2().returning(|_| Ok(()));
        vm.expect_create_vcpu().return_once(|_| Ok(vcpu));

        let mut kvm = MockHypervisor::new();
        kvm.expect_api_version().returning(|| Ok(12));
        kvm.expect_check_extension().returning(|_: Capability| Ok(1));
        let msrs = MsrIndexList { available: 1, indices: vec![0x10] };
        kvm.expect_msr_index_list().returning(move |_| Ok(msrs.clone()));
        kvm.expect_create_vm().return_once(|_| Ok(vm));
        kvm.expect_install_kick().returning(|| Ok(()));
        kvm
    }

    fn holds_the_code(slot: &MemorySlot) -> bool {
        let start = slot.host.bytes().iter().take(CODE.len()).map(|b| b.load(Ordering::Relaxed));
        slot.guest == GuestAddress(CODE_ADDRESS)
            && slot.host.address().is_multiple_of(GUEST_PAGE_SIZE)
            && slot.host.len() == GUEST_PAGE_SIZE as usize
            && start.eq(CODE)
    }

    /// A vCPU in its reset state that must be set up for the code before it runs.
    fn vcpu() -> MockVcpu {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_sregs().returning(|| {
            let mut sregs = kvm_bindings::kvm_sregs::default();
            (sregs.cs.base, sregs.cs.selector) = (0xffff_0000, 0xf000);
            Ok(sregs)
        });
        vcpu.expect_set_sregs()
            .withf(|sregs| (sregs.cs.base, sregs.cs.selector) == (0, 0))
            .times(1)
            .returning(|_| Ok(()));
        vcpu.expect_regs().returning(|| Ok(kvm_bindings::kvm_regs::default()));
        vcpu.expect_set_regs().withf(|r| r.rip == CODE_ADDRESS).times(1).returning(|_| Ok(()));
        vcpu
    }

    fn trial(mut vcpu: MockVcpu) -> Result<(), TrialError> {
        vcpu.expect_kicker().returning(MockVcpuKick::new);
        let kvm = kvm(vcpu);
        run(|_| Ok(kvm), &DeviceChoice::default(), TIME_LIMIT)
    }

    const WRITE: VcpuExit =
        VcpuExit::Io(IoExit { direction: IoDirection::Out, port: PORT, size: 1, count: 1 });

    #[test]
    fn the_port_write_with_its_byte_is_success() {
        let mut vcpu = vcpu();
        let runs = AtomicUsize::new(0);
        vcpu.expect_run().times(2).returning(move || {
            match runs.fetch_add(1, Ordering::Relaxed) {
                0 => Ok(VcpuExit::Interrupted), // Some signal.
                _ => Ok(WRITE),
            }
        });
        vcpu.expect_io_data().return_var(vec![BYTE]);
        assert_eq!(trial(vcpu), Ok(()));
    }

    #[test]
    fn another_byte_or_exit_is_not() {
        let mut wrong_byte = vcpu();
        wrong_byte.expect_run().return_once(|| Ok(WRITE));
        wrong_byte.expect_io_data().return_var(vec![BYTE + 1]);
        assert_eq!(trial(wrong_byte), Err(TrialError::Data(vec![BYTE + 1])));

        let mut shutdown = vcpu();
        shutdown.expect_run().return_once(|| Ok(VcpuExit::Shutdown));
        assert_eq!(trial(shutdown), Err(TrialError::Exit(Box::new(VcpuExit::Shutdown))));
    }

    #[test]
    fn a_failing_call_is_told() {
        let error = Error::new(Ioctl::Run, Errno::EFAULT);
        let mut vcpu = vcpu();
        vcpu.expect_run().return_once(move || Err(error));
        assert_eq!(trial(vcpu), Err(TrialError::Call(error)));
    }

    #[test]
    fn a_vcpu_that_gets_nowhere_is_kicked() {
        // Runs until it is kicked, whenever that is.
        let kicked = Arc::new(AtomicBool::new(false));
        let (by_kick, by_run) = (kicked.clone(), kicked.clone());
        let mut vcpu = vcpu();
        vcpu.expect_kicker().return_once(move || {
            let mut kick = MockVcpuKick::new();
            kick.expect_kick().times(1).returning(move || {
                by_kick.store(true, Ordering::Release);
                Ok(())
            });
            kick
        });
        vcpu.expect_run().return_once(move || {
            while !by_run.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            Ok(VcpuExit::Interrupted)
        });
        let kvm = kvm(vcpu);
        let result = run(|_| Ok(kvm), &DeviceChoice::default(), Duration::from_millis(1));
        assert_eq!(result, Err(TrialError::TimedOut));
        assert!(kicked.load(Ordering::Relaxed));
    }

    #[test]
    fn a_device_that_can_not_be_opened() {
        let open = |choice: &DeviceChoice| {
            Err::<MockHypervisor, _>(OpenError { choice: choice.clone(), errno: Errno::EACCES })
        };
        let error = run(open, &DeviceChoice::Fd(7), TIME_LIMIT).unwrap_err();
        let open = error.open_error().unwrap();
        assert_eq!((open.errno, &open.choice), (Errno::EACCES, &DeviceChoice::Fd(7)));
    }
}
