//! What cases start from: VMs in a state, guests on them, and what guests do with more than one
//! instruction.

use std::time::{Duration, Instant};

use super::guest::{Guest, Seen};
use super::{Checked, Miss, Platform, RawRequest, VcpuOf, VmOf};
use crate::{
    Capability, Errno, EventFd, Gsi, Hypervisor, IoAddress, IrqchipId, Irqfd, Msi, Route,
    RouteTarget, Vcpu, Vm,
};

/// How long something that must happen may take on the slowest machine. Only failures wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// Physical address of the I/O APIC.
const IOAPIC: u64 = 0xfec0_0000;

/// What cases ask a platform for.
pub(super) trait Bench: Platform {
    /// A VM as it is created.
    fn vm(&self) -> Checked<VmOf<Self>> {
        Ok(self.hypervisor().create_vm(0)?)
    }

    /// A VM with PICs, I/O APIC and local APICs in the kernel.
    fn vm_with_irqchip(&self) -> Checked<VmOf<Self>> {
        let vm = self.vm()?;
        vm.create_irqchip()?;
        Ok(vm)
    }

    /// A VM with only local APICs in the kernel and `pins` GSIs reserved for an I/O APIC in user
    /// space.
    fn vm_with_split_irqchip(&self, pins: u64) -> Checked<VmOf<Self>> {
        let vm = self.vm()?;
        self.needs(&vm, Capability::SplitIrqchip)?;
        vm.enable_cap(Capability::SplitIrqchip, [pins, 0, 0, 0])?;
        Ok(vm)
    }

    /// The value of a capability, without which the case is not applicable.
    fn needs(&self, vm: &VmOf<Self>, cap: Capability) -> Checked<i32> {
        match Vm::check_extension(vm, cap)? {
            0 => Err(Miss::not_applicable(format!("no {cap}: {}", cap.absence()))),
            value => Ok(value),
        }
    }

    /// A guest on a new vCPU.
    fn guest_on(&self, vm: &VmOf<Self>, id: u32) -> Checked<Self::Guest> {
        self.guest(vm, vm.create_vcpu(id)?)
    }

    /// An eventfd.
    fn eventfd(&self) -> Checked<EventFd> {
        Ok(self.hypervisor().eventfd()?)
    }

    /// What a request comes to that the traits can't express.
    fn ask(&self, vm: &VmOf<Self>, request: &RawRequest) -> Checked<Result<(), Errno>> {
        self.raw(vm, request).ok_or_else(|| {
            Miss::not_applicable("the traits can't express the request, and this platform neither")
        })
    }

    /// A request that the traits can't express is refused with `errno`.
    fn raw_refused(&self, vm: &VmOf<Self>, request: &RawRequest, errno: Errno) -> Checked {
        match self.ask(vm, request)? {
            Err(got) if got == errno => Ok(()),
            Err(got) => Err(Miss::failed(format!("expected {errno}, got {got}"))),
            Ok(()) => Err(Miss::failed(format!("expected {errno}, got success"))),
        }
    }
}

impl<P: Platform> Bench for P {}

/// An I/O APIC entry, without its vector: fixed, physical, to local APIC 0, edge-triggered, not
/// masked.
pub(super) const EDGE: u64 = 0;

/// The same, level-triggered.
pub(super) const LEVEL: u64 = 1 << 15;

/// A fixed, edge-triggered message of `vector` to the local APIC `apic`.
pub(super) fn message(apic: u8, vector: u8) -> Msi {
    Msi { address: 0xfee0_0000 | u64::from(apic) << 12, data: vector.into(), device: None }
}

/// A route of `gsi` to a message.
pub(super) fn msi_route(gsi: u32, msi: Msi) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Msi(msi) }
}

/// A route of `gsi` to a pin.
pub(super) fn pin_route(gsi: u32, chip: IrqchipId, pin: u32) -> Route {
    Route { gsi: Gsi(gsi), target: RouteTarget::Pin { chip, pin } }
}

/// `event` bound to `gsi`, edge-triggered.
pub(super) fn irqfd(event: &EventFd, gsi: u32) -> Irqfd {
    Irqfd { event: event.clone(), gsi: Gsi(gsi), resample: None }
}

/// What cases tell guests to do.
pub(super) trait Drive: Guest {
    /// Writes `data` to guest-physical `address`.
    fn store(&mut self, address: u64, data: &[u8]) -> Checked<Seen> {
        self.write(IoAddress::Mmio(address), data)
    }

    /// Reads `N` bytes from guest-physical `address`.
    fn load<const N: usize>(&mut self, address: u64) -> Checked<([u8; N], Seen)> {
        let mut data = [0; N];
        let seen = self.read(IoAddress::Mmio(address), &mut data)?;
        Ok((data, seen))
    }

    /// Writes `data` to `port`.
    fn port_out(&mut self, port: u16, data: &[u8]) -> Checked<Seen> {
        self.write(IoAddress::Pio(port), data)
    }

    /// Reads `N` bytes from `port`.
    fn port_in<const N: usize>(&mut self, port: u16) -> Checked<([u8; N], Seen)> {
        let mut data = [0; N];
        let seen = self.read(IoAddress::Pio(port), &mut data)?;
        Ok((data, seen))
    }

    /// Takes and ends interrupts, highest priority first, until none is pending. For
    /// interrupts of the local APIC.
    fn interrupts(&mut self) -> Checked<Vec<u8>> {
        const ENOUGH: usize = 512; // twice what a local APIC can hold
        let mut all = Vec::new();
        loop {
            let taken = self.take_interrupts()?;
            if taken.is_empty() {
                return Ok(all);
            }
            // The last one taken is the one of the highest priority in service.
            for vector in taken.iter().rev().filter(|vector| **vector >= 16) {
                self.end_of_interrupt(*vector)?;
            }
            all.extend(taken);
            if all.len() > ENOUGH {
                return Err(Miss::failed("interrupts keep coming"));
            }
        }
    }

    /// Takes interrupts, without ending them, as soon as one is pending, which must happen.
    fn await_taken(&mut self) -> Checked<Vec<u8>> {
        let start = Instant::now();
        loop {
            let taken = self.take_interrupts()?;
            if !taken.is_empty() {
                return Ok(taken);
            }
            if start.elapsed() > PATIENCE {
                return Err(Miss::failed("an interrupt must come, none did"));
            }
            std::thread::yield_now();
        }
    }

    /// Takes and ends interrupts until `count` have come, which they must. KVM delivers what an
    /// irqfd raises on a pin from a worker thread, so it may take a moment.
    fn await_interrupts(&mut self, count: usize) -> Checked<Vec<u8>> {
        let start = Instant::now();
        let mut all = self.interrupts()?;
        while all.len() < count {
            if start.elapsed() > PATIENCE {
                return Err(Miss::failed(format!(
                    "{count} interrupts must come, only these did: {all:#x?}"
                )));
            }
            std::thread::yield_now();
            all.extend(self.interrupts()?);
        }
        Ok(all)
    }

    /// Reads a byte from `port` until it is `expected`, which it must become.
    fn await_port(&mut self, port: u16, expected: u8) -> Checked {
        let start = Instant::now();
        loop {
            let ([byte], seen) = self.port_in(port)?;
            super::expect::same("who serves the port", seen, Seen::ByKernel)?;
            if byte == expected {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let what = format!("port {port:#x} must become {expected:#x}, it is {byte:#x}");
                return Err(Miss::failed(what));
            }
            std::thread::yield_now();
        }
    }

    /// `vector`, which was just taken, must be in service, or the case is not applicable: there are
    /// software KVMs that end an interrupt when the guest takes it.
    fn needs_in_service(&mut self, vector: u8) -> Checked {
        const ISR: usize = 0x100; // in-service register, 32 vectors every 16 bytes
        let byte = ISR + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        let bits = self.vcpu().lapic()?.regs.get(byte).map_or(0, |bits| bits.cast_unsigned());
        if bits & 1 << (vector % 8) != 0 {
            return Ok(());
        }
        Err(Miss::not_applicable("this KVM ends interrupts when they are taken, not at their EOI"))
    }

    /// Programs entry `pin` of the in-kernel I/O APIC (its redirection table, 82093AA manual).
    fn program_ioapic(&mut self, pin: u8, entry: u64) -> Checked {
        // The high half first: the low half has the mask.
        let half = |high: u8| 0x10 + 2 * pin + high;
        for (register, value) in [(half(1), (entry >> 32) as u32), (half(0), entry as u32)] {
            for (address, word) in [(IOAPIC, register.into()), (IOAPIC + 0x10, value)] {
                let seen = self.store(address, &u32::to_le_bytes(word))?;
                super::expect::same("who serves the I/O APIC", seen, Seen::ByKernel)?;
            }
        }
        Ok(())
    }

    /// Programs both in-kernel PICs as a PC does: vectors from `master` and `slave`, edge-triggered,
    /// slave on pin 2, automatic end of interrupt, no pin masked (8259A manual, ICW1 to 4).
    fn program_pics(&mut self, master: u8, slave: u8) -> Checked {
        for (command, data, words) in [(0x20, 0x21, [master, 4, 3]), (0xa0, 0xa1, [slave, 2, 3])] {
            let writes = [(command, 0x11)].into_iter().chain(words.map(|word| (data, word)));
            for (port, byte) in writes.chain([(data, 0)]) {
                let seen = self.port_out(port, &[byte])?;
                super::expect::same("who serves the PIC", seen, Seen::ByKernel)?;
            }
        }
        Ok(())
    }
}

impl<G: Guest> Drive for G {}

/// Waits until `event` is signalled, which it must be, and takes the count.
pub(super) fn await_signal(event: &EventFd) -> Checked<u64> {
    let start = Instant::now();
    loop {
        if let Some(count) = event.take() {
            return Ok(count);
        }
        if start.elapsed() > PATIENCE {
            return Err(Miss::failed("an eventfd that must be signalled was not"));
        }
        std::thread::yield_now();
    }
}

/// A vCPU of a VM, for cases that only create it.
pub(super) fn vcpu<P: Platform>(vm: &VmOf<P>, id: u32) -> Checked<VcpuOf<P>> {
    Ok(vm.create_vcpu(id)?)
}
