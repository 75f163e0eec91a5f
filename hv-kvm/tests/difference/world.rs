//! A VM with what is needed to do any [`Op`] to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::os::fd::AsFd;

use hv_core::conformance::{Checked, Guest, Platform, VmOf};
use hv_core::{
    CoalescedZone, Error, EventFd, Gsi, Hypervisor, IoEvent, IoEventBackend, IrqBackend, Irqfd,
    MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu, Vm,
};
use kvm_bindings::kvm_pit_config;
use vm_memory::GuestAddress;

use super::op::{Event, Op};
use super::state::{self, State};
use crate::common;

/// How many eventfds there are.
pub(crate) const EVENTS: usize = 4;
/// Pages of host memory.
pub(crate) const PAGES: usize = 80;

/// What a step came to, for a person.
pub(crate) type Answer = String;

pub(crate) struct World<'p, P: Platform> {
    platform: &'p P,
    guests: BTreeMap<u32, P::Guest>,
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
                Some(guest) => checked(guest.write(*address, data)),
                None => "nobody".into(),
            },
            Op::Read { vcpu, address, len } => match self.guests.get_mut(vcpu) {
                Some(guest) => {
                    let mut data = vec![0; *len];
                    checked(guest.read(*address, &mut data).map(|seen| (seen, data)))
                }
                None => "nobody".into(),
            },
            Op::Take { vcpu } => match self.guests.get_mut(vcpu) {
                Some(guest) => checked(take(guest)),
                None => "nobody".into(),
            },
            Op::TakeEvents => self.take_events(),
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

/// The interrupts a guest takes if it ends each, without those that come again.
fn take<G: Guest>(guest: &mut G) -> Checked<BTreeSet<u8>> {
    let mut all = BTreeSet::new();
    loop {
        let taken = guest.take_interrupts()?;
        for &vector in &taken {
            guest.end_of_interrupt(vector)?;
        }
        let before = all.len();
        all.extend(taken);
        if all.len() == before {
            return Ok(all);
        }
    }
}
