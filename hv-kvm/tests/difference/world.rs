//! A VM with what is needed to do any [`Op`] to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::os::fd::AsFd;

use hv_core::conformance::{Checked, Guest, Platform, Seen, VcpuOf, VmOf};
use hv_core::{
    CoalescedWrite, CoalescedZone, Error, EventFd, Gsi, Hypervisor, IoAddress, IoEvent,
    IoEventBackend, IrqBackend, Irqfd, MemoryBackend, MemorySlot, MmioExit, SlotFlags, SlotId,
    Vcpu, VcpuExit, Vm,
};
use kvm_bindings::kvm_pit_config;
use vm_memory::GuestAddress;

use super::op::{Event, Op};
use super::state::{self, State};
use crate::common;

/// How many eventfds there are.
pub(crate) const EVENTS: usize = 4;
/// There is room for guests on vCPUs below this.
const GUESTS: u32 = 256;
/// Pages of host memory.
pub(crate) const PAGES: usize = 80;

/// What a step came to, for a person.
pub(crate) type Answer = String;

/// The answer after which nothing is to be compared: what else a processor takes that an interrupt
/// without end keeps busy, is its own affair.
pub(crate) const STORM: &str = "the guest never gets out of an interrupt";

pub(crate) struct World<'p, P: Platform> {
    platform: &'p P,
    guests: BTreeMap<u32, P::Guest>,
    /// vCPUs without a guest.
    others: Vec<VcpuOf<P>>,
    vm: VmOf<P>,
    events: Vec<EventFd>,
    copies: Vec<EventFd>,
    resamples: Vec<EventFd>,
    barrier: EventFd,
    memory: hv_core::HostRange,
}

fn plain<T: Debug>(result: Result<T, Error>) -> Answer {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => error.errno.to_string(),
    }
}

fn checked<T: Debug>(result: Checked<T>) -> Answer {
    match result {
        Ok(value) => format!("{value:x?}"),
        Err(miss) => format!("{miss:?}"),
    }
}

/// Without what KVM leaves behind the bytes of an MMIO exit.
fn plain_exit(mut seen: Seen) -> Seen {
    if let Seen::ByVmm(VcpuExit::Mmio(MmioExit { len, written: Some(bytes), .. })) = &mut seen {
        bytes[usize::from(*len)..].fill(0);
    }
    seen
}

impl<'p, P: Platform> World<'p, P> {
    pub(crate) fn new(platform: &'p P) -> Self {
        let kvm = platform.hypervisor();
        let vm = kvm.create_vm(0).unwrap();
        let events = || (0..EVENTS).map(|_| kvm.eventfd().unwrap()).collect::<Vec<_>>();
        let copy = |event: &EventFd| event.as_fd().try_clone_to_owned().unwrap().into();
        let first = events();
        Self {
            platform,
            guests: BTreeMap::new(),
            others: Vec::new(),
            vm,
            copies: first.iter().map(copy).collect(),
            events: first,
            resamples: events(),
            barrier: kvm.eventfd().unwrap(),
            memory: common::pages(PAGES),
        }
    }

    pub(crate) fn state(&mut self) -> State {
        state::state(&self.vm, &mut self.guests)
    }

    fn event(&self, event: Event) -> &EventFd {
        if event.copy { &self.copies[event.number] } else { &self.events[event.number] }
    }

    /// Does one step; what it came to.
    pub(crate) fn apply(&mut self, op: &Op) -> Answer {
        match op {
            Op::Write { vcpu, address, data } => match self.guests.get_mut(vcpu) {
                Some(guest) => {
                    let answer = checked(guest.write(*address, data).map(plain_exit));
                    // What a store to a local APIC sets off for its vCPU happens at the latest when
                    // it enters the guest again, and on some machines not earlier.
                    guest.read(IoAddress::Pio(0x80), &mut [0]).unwrap();
                    answer
                }
                None => "nobody".into(),
            },
            Op::Read { vcpu, address, len } => match self.guests.get_mut(vcpu) {
                Some(guest) => {
                    let mut data = vec![0; *len];
                    checked(guest.read(*address, &mut data).map(|seen| (plain_exit(seen), data)))
                }
                None => "nobody".into(),
            },
            Op::Take { vcpu } => match self.guests.get_mut(vcpu) {
                Some(guest) => take(guest).unwrap_or_else(|miss| format!("{miss:?}")),
                None => "nobody".into(),
            },
            Op::TakeEvents => self.take_events(),
            Op::TakeWrites => match self.guests.values_mut().next() {
                Some(guest) => plain(take_writes(guest.vcpu())),
                None => "nobody".into(),
            },
            Op::TakeDirty => plain(self.take_dirty()),
            Op::Signal(number) => {
                self.events[*number].signal();
                self.wait_for_workers();
                Answer::new()
            }
            _ => self.call(op),
        }
    }

    /// The calls of the traits.
    fn call(&mut self, op: &Op) -> Answer {
        let vm = &self.vm;
        match *op {
            Op::CheckExtension(cap) => plain(vm.check_extension(cap)),
            Op::EnableCap(cap, first) => plain(vm.enable_cap(cap, [first, 0, 0, 0])),
            Op::CreateIrqchip => plain(vm.create_irqchip()),
            Op::CreatePit2 { flags } => {
                plain(vm.create_pit2(kvm_pit_config { flags, ..Default::default() }))
            }
            Op::CreateVcpu(id) => match vm.create_vcpu(id) {
                Ok(vcpu) if id >= GUESTS => {
                    self.others.push(vcpu);
                    Answer::new()
                }
                Ok(vcpu) => match self.platform.guest(vm, vcpu) {
                    Ok(guest) => {
                        self.guests.insert(id, guest);
                        Answer::new()
                    }
                    Err(miss) => format!("{miss:?}"),
                },
                Err(error) => error.errno.to_string(),
            },
            Op::SetTssAddr(address) => plain(vm.set_tss_addr(address)),
            Op::SetIdentityMapAddr(address) => plain(vm.set_identity_map_addr(address)),
            Op::SetNrMmuPages(pages) => plain(vm.set_nr_mmu_pages(pages)),
            Op::SetGsiRouting(ref routes) => plain(vm.set_gsi_routing(routes)),
            Op::IrqfdAssign { event, gsi, resample } => {
                let resample = resample.map(|number| self.resamples[number].clone());
                let event = self.event(event).clone();
                let answer = plain(vm.irqfd_assign(&Irqfd { event, gsi: Gsi(gsi), resample }));
                self.wait_for_workers(); // it may have been signalled before
                answer
            }
            Op::IrqfdDeassign { event, gsi } => {
                plain(vm.irqfd_deassign(self.event(event), Gsi(gsi)))
            }
            Op::IrqLine { gsi, level } => plain(vm.irq_line_status(Gsi(gsi), level)),
            Op::SignalMsi(msi) => plain(vm.signal_msi(msi)),
            Op::SetRedirection { pin, entry } => plain(
                vm.irqchip(2)
                    .and_then(|c| vm.set_irqchip(&state::with_redirection(&c, pin, entry))),
            ),
            Op::SetLapic { vcpu, register, value } => match self.guests.get_mut(&vcpu) {
                Some(guest) => plain(guest.vcpu().lapic().and_then(|mut lapic| {
                    state::set_lapic_register(&mut lapic, register, value);
                    guest.vcpu().set_lapic(&lapic)
                })),
                None => "nobody".into(),
            },
            Op::SetMemorySlot { id, guest, host: (offset, len), log_dirty, readonly } => {
                plain(vm.set_memory_slot(&MemorySlot {
                    id: SlotId(id),
                    guest: GuestAddress(guest),
                    host: self.memory.slice(offset, len).unwrap(),
                    flags: SlotFlags { log_dirty, readonly },
                }))
            }
            Op::DeleteMemorySlot(id) => plain(vm.delete_memory_slot(SlotId(id))),
            Op::DirtyLog { id, words } => {
                let mut bitmap = vec![0; words];
                plain(vm.dirty_log(SlotId(id), &mut bitmap).map(|()| bitmap))
            }
            Op::ClearDirtyLog { id, first, pages, bits } => {
                plain(vm.clear_dirty_log(SlotId(id), first, pages, &[bits; 2]))
            }
            Op::CoalescedZone { register, address, size } => {
                let zone = CoalescedZone { address, size };
                plain(match register {
                    true => vm.register_coalesced_zone(zone),
                    false => vm.unregister_coalesced_zone(zone),
                })
            }
            Op::Ioeventfd { assign, event, address, length, datamatch } => {
                let event =
                    IoEvent { address, length, datamatch, event: self.event(event).clone() };
                plain(match assign {
                    true => vm.ioeventfd_assign(&event),
                    false => vm.ioeventfd_deassign(&event),
                })
            }
            _ => unreachable!("not a call: {op:?}"),
        }
    }

    /// The pages in the dirty rings of all vCPUs together: KVM may report one more often than it had
    /// to, and to more than one.
    fn take_dirty(&mut self) -> Result<BTreeSet<(u32, u64)>, Error> {
        let mut all = BTreeSet::new();
        for guest in self.guests.values_mut() {
            // None is ever full, and all that are dirty are collected each time.
            for entry in guest.vcpu().dirty_ring()?.entries() {
                if let Some(page) = entry.dirty() {
                    all.insert((page.slot.0, page.page));
                    entry.collect();
                }
            }
        }
        self.vm.reset_dirty_rings().map(|_| all)
    }

    /// The counts of the eventfds, and which resample eventfds were signalled.
    fn take_events(&mut self) -> Answer {
        let counts: Vec<_> = self.events.iter().map(EventFd::take).collect();
        let resampled: Vec<_> = self.resamples.iter().map(|e| e.take().is_some()).collect();
        format!("{counts:?}, resampled {resampled:?}")
    }

    /// Lets KVM's workers finish. What can't be delivered at once is handed to a worker, in order:
    /// so behind the one of a signal made before comes that of this one, and unbinding it waits.
    fn wait_for_workers(&self) {
        let gsi = Gsi(u32::MAX);
        let irqfd = Irqfd { event: self.barrier.clone(), gsi, resample: None };
        if self.vm.irqfd_assign(&irqfd).is_ok() {
            self.barrier.signal();
            self.vm.irqfd_deassign(&self.barrier, gsi).unwrap();
        }
    }
}

/// What zones have collected.
fn take_writes(vcpu: &impl Vcpu) -> Result<Vec<CoalescedWrite>, Error> {
    let mut all = Vec::new();
    while vcpu.has_coalesced_write() {
        all.extend(vcpu.take_coalesced_write()?);
    }
    Ok(all)
}

/// The interrupts a guest takes if it ends each, and those whose end the VMM is told; [`STORM`] if
/// one comes again and again, because its line is high.
fn take<G: Guest>(guest: &mut G) -> Checked<Answer> {
    let (mut all, mut told) = (BTreeSet::new(), BTreeSet::new());
    loop {
        let taken = guest.take_interrupts()?;
        for &vector in &taken {
            if let Seen::ByVmm(VcpuExit::IoapicEoi { vector }) = guest.end_of_interrupt(vector)? {
                told.insert(vector);
            }
        }
        if taken.is_empty() {
            return Ok(format!("{all:x?}, told {told:x?}"));
        }
        if !taken.into_iter().all(|vector| all.insert(vector)) {
            return Ok(STORM.into());
        }
    }
}
