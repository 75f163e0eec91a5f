//! A VM in memory: the parts with their rules, under one lock.
//!
//! Every call and every question goes through [`Shared::with`], which first *settles*: it takes the
//! irqfds that were signalled and delivers them through the table as it is before the call, as KVM
//! would have done by then.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{kvm_clock_data, kvm_pit_state2};

use super::guest::{GuestStep, Seen};
use super::io::{Io, IoLimits};
use super::irq::{Interrupt, Irq, IrqLimits, Kind};
use super::kick::Kickable;
use super::kvm::System;
use super::memory::{Memory, MemoryLimits};
use super::registers::{HALTED, INIT_RECEIVED, RUNNABLE, Registers};
use super::{FakeHost, Finding, Leftover, Live};
use crate::{Capability, Errno, MemorySlot};

/// The register of the local APIC's page.
const TASK_PRIORITY: usize = 0x80;
/// How much of what a guest saw is kept, should nobody ask.
const MAX_SEEN: usize = 100_000;

/// A VM, shared by its handles.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) system: Arc<System>,
    /// The epoll instance on which irqfds are signalled, to wait for without the lock.
    pub(super) epoll: OwnedFd,
    state: Mutex<State>,
}

/// All there is of a VM.
#[derive(Debug)]
pub(super) struct State {
    pub(super) irq: Irq,
    pub(super) memory: Memory,
    pub(super) io: Io,
    pub(super) vcpus: BTreeMap<u32, Vcpu>,
    /// The timer, which does not tick.
    pub(super) pit: Option<kvm_pit_state2>,
    /// Whether the timer has its speaker port.
    pub(super) speaker: bool,
    /// The guest's clock, which stands still.
    pub(super) clock: kvm_clock_data,
    /// Whether `KVM_CAP_EXCEPTION_PAYLOAD` is enabled.
    pub(super) payload: bool,
    /// `KVM_CAP_MAX_VCPU_ID` as enabled, or from the first vCPU on.
    pub(super) max_vcpu_id: Option<u32>,
    /// What was found since they were last told.
    pub(super) findings: Vec<Finding>,
    /// Whether the VM or a vCPU of it is held.
    open: bool,
    /// vCPU handles that are held.
    pub(super) vcpu_handles: usize,
}

/// A vCPU as its VM has it: it stays when its handle goes.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) registers: Registers,
    pub(super) script: VecDeque<GuestStep>,
    seen: VecDeque<Seen>,
    pub(super) has_run: bool,
    /// What `KVM_INTERRUPT` brought and the guest has not taken.
    pub(super) injected: Option<u8>,
    pub(super) kick: Arc<Kickable>,
    /// Whether its thread waits in a run.
    pub(super) waits: bool,
}

impl Vcpu {
    pub(super) fn new(registers: Registers, script: Vec<GuestStep>, kick: Arc<Kickable>) -> Self {
        Self {
            registers,
            script: script.into(),
            seen: VecDeque::new(),
            has_run: false,
            injected: None,
            kick,
            waits: false,
        }
    }

    pub(super) fn saw(&mut self, seen: Seen) {
        if self.seen.len() >= MAX_SEEN {
            self.seen.pop_front();
        }
        self.seen.push_back(seen);
    }

    pub(super) fn take_seen(&mut self) -> Vec<Seen> {
        self.seen.drain(..).collect()
    }
}

impl Shared {
    pub(super) fn new(system: &Arc<System>) -> Result<Arc<Self>, Errno> {
        let state = State::new(&system.host)?;
        let epoll = state.irq.epoll().as_fd().try_clone_to_owned();
        let epoll = epoll.map_err(|error| Errno::from(&error))?;
        Ok(Arc::new(Self { system: system.clone(), epoll, state: Mutex::new(state) }))
    }

    /// Settles, then does `f`.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        state.irq.settle();
        let result = f(&mut state);
        state.wake();
        let mut findings = state.irq.drain_findings();
        findings.append(&mut state.findings);
        self.system.found(findings);
        result
    }

    /// The only code of others that runs under this lock is that of host memory.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().open
    }

    /// What KVM does when the last handle goes. Everything the VM held is let go, which for memory
    /// happens without the lock.
    pub(super) fn close(&self) {
        let (left, memory) = self.with(State::close);
        self.system.found(left.into_iter().map(Finding::Left));
        drop(memory);
    }
}

impl State {
    fn new(host: &FakeHost) -> Result<Self, Errno> {
        let memory = MemoryLimits {
            slots: host.count(Capability::NrMemslots),
            address_spaces: host.count(Capability::MultiAddressSpace).max(1),
            gpa_bits: host.physical_bits,
            readonly: host.has(Capability::ReadonlyMem),
            manual_protect: host.count(Capability::ManualDirtyLogProtect2).into(),
            dirty_ring: host
                .count(Capability::DirtyLogRing)
                .max(host.count(Capability::DirtyLogRingAcqRel)),
        };
        let io = IoLimits {
            devices: host.io_devices,
            any_length: host.has(Capability::IoeventfdAnyLength),
            ports: host.has(Capability::CoalescedPio),
        };
        Ok(Self {
            irq: Irq::new(IrqLimits { routes: host.count(Capability::IrqRouting) })?,
            memory: Memory::new(memory),
            io: Io::new(io),
            vcpus: BTreeMap::new(),
            pit: None,
            speaker: false,
            clock: kvm_clock_data::default(),
            payload: false,
            max_vcpu_id: None,
            findings: Vec::new(),
            open: true,
            vcpu_handles: 0,
        })
    }

    /// Wakes the vCPUs that wait and have something to do now. None else: one that is woken in vain
    /// waits again, and would be woken again by that.
    fn wake(&mut self) {
        let waiting = self.vcpus.iter().filter(|(_, vcpu)| vcpu.waits);
        let waiting: Vec<u32> = waiting.map(|(&id, _)| id).collect();
        for id in waiting {
            self.start(id);
            let interrupt = self.interrupt_waits(id);
            if let Some(vcpu) = self.vcpus.get(&id) {
                match vcpu.registers.mp_state {
                    RUNNABLE => vcpu.kick.wake(),
                    HALTED if interrupt => vcpu.kick.wake(),
                    _ => {}
                }
            }
        }
    }

    /// Whether the kernel has local APICs for this VM.
    pub(super) fn has_irqchip(&self) -> bool {
        self.irq.kind().is_some()
    }

    /// Whether it has the PICs and the I/O APIC too.
    pub(super) fn has_full_irqchip(&self) -> bool {
        self.irq.kind() == Some(Kind::Full)
    }

    pub(super) fn is_split(&self) -> bool {
        self.irq.kind() == Some(Kind::Split)
    }

    /// Whether vCPU `id` has an interrupt to take.
    pub(super) fn interrupt_waits(&self, id: u32) -> bool {
        self.irq.pending(id) || self.vcpus.get(&id).is_some_and(|vcpu| vcpu.injected.is_some())
    }

    /// vCPU `id` takes its interrupts. What the VMM injected comes before all that the local APIC
    /// has.
    pub(super) fn take_interrupts(&mut self, id: u32) -> Vec<Interrupt> {
        let injected = self.vcpus.get_mut(&id).and_then(|vcpu| vcpu.injected.take());
        let mut taken: Vec<_> = injected.map(Interrupt::ExtInt).into_iter().collect();
        taken.extend(self.start(id));
        taken.extend(self.irq.take(id));
        taken
    }

    /// INIT and start-up messages act on vCPU `id` whatever it does. Those it took.
    pub(super) fn start(&mut self, id: u32) -> Vec<Interrupt> {
        let irqchip = self.has_irqchip();
        let taken = self.irq.take_starts(id);
        if let Some(vcpu) = self.vcpus.get_mut(&id) {
            for message in &taken {
                match *message {
                    Interrupt::Init => vcpu.registers.init(id, irqchip),
                    // A processor that does not wait for one ignores it.
                    Interrupt::StartUp(page) if vcpu.registers.mp_state == INIT_RECEIVED => {
                        vcpu.registers.start_at(page);
                    }
                    _ => {}
                }
            }
        }
        taken
    }

    /// CR8 of vCPU `id`: the class of its task priority, which the local APIC has if there is one.
    pub(super) fn cr8(&self, id: u32) -> u64 {
        match self.irq.lapic_page(id) {
            Ok(page) => page.regs.get(TASK_PRIORITY).map_or(0, |&tpr| u64::from(tpr as u8 >> 4)),
            Err(_) => self.vcpus.get(&id).map_or(0, |vcpu| vcpu.registers.sregs.cr8),
        }
    }

    /// Sets it.
    pub(super) fn set_cr8(&mut self, id: u32, cr8: u64) {
        if let Ok(mut page) = self.irq.lapic_page(id) {
            if let Some(tpr) = page.regs.get_mut(TASK_PRIORITY) {
                *tpr = ((cr8 as u8 & 15) << 4) as i8;
            }
            // The page is that of this vCPU, so it is taken.
            let _ = self.irq.set_lapic_page(id, &page);
        }
    }

    pub(super) fn add_to(&self, live: &mut Live) {
        live.vcpus += self.vcpu_handles;
        live.slots += self.memory.slots().count();
        live.irqfds += self.irq.irqfds().len();
        live.ioeventfds += self.io.ioevents().len();
        live.zones += self.io.zones().len();
    }

    fn close(&mut self) -> (Vec<Leftover>, Vec<MemorySlot>) {
        self.open = false;
        let lost = self.memory.dirty_slots();
        let lost = lost.map(|(slot, pages)| Finding::LostDirtyPages { slot, pages });
        self.findings.extend(lost);
        match self.io.collected().len() {
            0 => {}
            writes => self.findings.push(Finding::LostCollectedWrites { writes }),
        }
        let mut left = Vec::new();
        let slots: Vec<_> = self.memory.slots().map(|slot| slot.id).collect();
        left.extend(slots.iter().map(|&id| Leftover::Slot(id)));
        let memory = slots.into_iter().filter_map(|id| self.memory.delete(id).ok()).collect();
        for irqfd in self.irq.irqfds() {
            left.push(Leftover::Irqfd(irqfd.gsi));
            // It is there.
            let _ = self.irq.irqfd_deassign(&irqfd.event, irqfd.gsi);
        }
        for event in self.io.ioevents() {
            left.push(Leftover::IoEvent(event.address));
            let _ = self.io.deassign(&event);
        }
        for zone in self.io.zones() {
            left.push(Leftover::Zone(zone));
        }
        for zone in self.io.zones() {
            // Duplicates go with the first.
            let _ = self.io.unregister(zone);
        }
        (left, memory)
    }
}
