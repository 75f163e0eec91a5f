//! The interrupt half of a VM in memory: routing table, irqfds, the 8259 pair, the I/O APIC and the
//! local APICs, as KVM wires them.
//!
//! It is a state machine: it takes no lock and never waits. [`Irq::settle`] comes before every
//! request and every look, so that a signal that was made before counts before. It must not know
//! vCPUs beyond their local APICs, nor in which order a VM may be put together.

mod bus;
mod clock;
mod interrupt;
mod ioapic;
mod irqfds;
mod lapic;
mod lapics;
mod message;
mod pic;
mod routing;
mod service;
mod state;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;

use kvm_bindings::{kvm_irqchip, kvm_lapic_state};

pub use interrupt::Interrupt;
use ioapic::{Ioapic, Source};
use irqfds::{Irqfds, Unbound, Wire};
use lapic::PAGE;
use lapics::Lapics;
use message::{Message, Outcome};
use pic::{Pic, Which};
use routing::{Rules, Table};

use super::{Finding, Loss};
use crate::{
    Errno, EventFd, Gsi, IrqchipId, Irqfd, LineStatus, Msi, MsiStatus, Route, RouteTarget,
};

/// How many findings wait to be asked for; more of them say nothing new.
const FINDINGS: usize = 4096;

/// What the host allows.
#[derive(Debug, Clone, Copy)]
pub(in crate::fake) struct IrqLimits {
    /// The value of `KVM_CAP_IRQ_ROUTING`: the most routes, and the number of GSIs.
    pub(in crate::fake) routes: u32,
}

/// Which interrupt controllers a VM has in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The 8259 pair, the I/O APIC and the local APICs (`KVM_CREATE_IRQCHIP`).
    Full,
    /// The local APICs alone (`KVM_CAP_SPLIT_IRQCHIP`).
    Split,
}

/// What KVM makes of directed EOI: that a guest can keep the end of an interrupt from I/O APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::fake) enum DirectedEoi {
    /// In split mode it is told and not done, as it always was.
    #[default]
    Told,
    /// `KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST`: it is told and done.
    Done,
    /// `KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST`: it is not told.
    None,
}

/// The chips with pins.
#[derive(Debug)]
struct Pins {
    pic: Pic,
    ioapic: Ioapic,
}

/// The interrupts of a VM.
#[derive(Debug)]
pub(in crate::fake) struct Irq {
    limits: IrqLimits,
    kind: Option<Kind>,
    /// The first GSIs that are kept for the pins of the VMM's I/O APIC, in split mode.
    reserved: u32,
    wide_ids: bool,
    directed_eoi: DirectedEoi,
    table: Table,
    irqfds: Irqfds,
    pins: Option<Pins>,
    lapics: Lapics,
    /// How often it has changed who hears of the end of an interrupt.
    listeners: u64,
    findings: Vec<Finding>,
}

impl Irq {
    /// # Errors
    /// Those of `epoll_create1(2)`.
    pub(in crate::fake) fn new(limits: IrqLimits) -> Result<Self, Errno> {
        Ok(Self {
            limits,
            kind: None,
            reserved: 0,
            wide_ids: false,
            directed_eoi: DirectedEoi::default(),
            table: Table::default(),
            irqfds: Irqfds::new()?,
            pins: None,
            lapics: Lapics::default(),
            listeners: 0,
            findings: Vec::new(),
        })
    }

    /// `KVM_CREATE_IRQCHIP`: every pin has a route.
    pub(in crate::fake) fn create_full(&mut self) {
        self.kind = Some(Kind::Full);
        self.table = Table::of_pins();
        self.pins = Some(Pins { pic: Pic::new(), ioapic: Ioapic::new() });
    }

    /// `KVM_CAP_SPLIT_IRQCHIP`: no route exists, and the first `pins` GSIs are those of the VMM's I/O APIC.
    pub(in crate::fake) fn create_split(&mut self, pins: u32) {
        self.kind = Some(Kind::Split);
        self.reserved = pins;
    }

    /// The most routes, and the number of GSIs.
    pub(in crate::fake) fn route_limit(&self) -> u32 {
        self.limits.routes
    }

    pub(in crate::fake) fn kind(&self) -> Option<Kind> {
        self.kind
    }

    /// A vCPU with its local APIC, after reset.
    pub(in crate::fake) fn add_vcpu(&mut self, vcpu: u32) {
        self.lapics.add(vcpu);
    }

    /// Whether the CPUID of a vCPU has x2APIC.
    pub(in crate::fake) fn set_x2apic(&mut self, vcpu: u32, has: bool) {
        if let Some(lapic) = self.lapics.get_mut(vcpu) {
            lapic.x2apic = has;
        }
        self.tell_version(vcpu);
    }

    /// `KVM_CAP_X2APIC_API`'s choice about directed EOI; local APICs tell when next they are asked to.
    pub(in crate::fake) fn set_directed_eoi(&mut self, directed: DirectedEoi) {
        self.directed_eoi = directed;
    }

    /// Directed EOI comes with x2APIC, but not with the I/O APIC of the kernel, which knows nothing
    /// of it.
    fn tell_version(&mut self, vcpu: u32) {
        let told = match self.directed_eoi {
            DirectedEoi::Told => self.kind == Some(Kind::Split),
            DirectedEoi::Done => true,
            DirectedEoi::None => false,
        };
        if let Some(lapic) = self.lapics.get_mut(vcpu) {
            lapic.set_directed_eoi(told && lapic.x2apic);
        }
    }

    /// `KVM_X2APIC_API_USE_32BIT_IDS`: messages name APIC ids of 32 bits.
    pub(in crate::fake) fn use_wide_ids(&mut self) {
        self.wide_ids = true;
        self.lapics.wide_ids = true;
    }

    /// What there was to find since this was last asked.
    pub(in crate::fake) fn drain_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings)
    }

    fn find(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS {
            self.findings.push(finding);
        }
    }

    // Routes.

    /// `KVM_SET_GSI_ROUTING`.
    pub(in crate::fake) fn set_routing(&mut self, routes: &[Route]) -> Result<(), Errno> {
        let kind = self.kind.ok_or(Errno::EINVAL)?;
        let rules =
            Rules { limit: self.limits.routes, pins: kind == Kind::Full, wide_ids: self.wide_ids };
        let table = Table::new(routes, rules)?;
        let cut_off =
            |gsi: &Gsi| table.targets(*gsi).is_empty() && !self.table.targets(*gsi).is_empty();
        let cut_off: Vec<_> = self.irqfds.gsis().filter(cut_off).collect();
        self.table = table;
        self.listeners_changed();
        for gsi in cut_off {
            self.find(Finding::UnroutedIrqfd { gsi });
        }
        Ok(())
    }

    /// The table in force.
    pub(in crate::fake) fn routes(&self) -> &[Route] {
        self.table.routes()
    }

    // irqfds.

    /// Whether an eventfd, by the kernel's number, is bound.
    pub(in crate::fake) fn is_bound(&self, eventfd: u64) -> bool {
        self.irqfds.is_bound(eventfd)
    }

    /// `KVM_IRQFD`, of an eventfd that may be bound in another VM.
    pub(in crate::fake) fn irqfd_assign(
        &mut self,
        irqfd: &Irqfd,
        elsewhere: bool,
    ) -> Result<(), Errno> {
        match self.kind {
            None => return Err(Errno::EINVAL),
            Some(Kind::Split) if irqfd.resample.is_some() => return Err(Errno::EINVAL),
            Some(_) => {}
        }
        let assigned = self.irqfds.assign(irqfd, elsewhere);
        if assigned.is_err() {
            self.release(irqfd.into()); // KVM had set up the resampler by then
        }
        let signalled = assigned?;
        if irqfd.resample.is_some() {
            self.listeners_changed();
        }
        let (gsi, limit) = (irqfd.gsi, self.limits.routes);
        if gsi.0 >= limit {
            self.find(Finding::GsiOutOfRange { gsi, limit });
        } else if self.table.targets(gsi).is_empty() {
            self.find(Finding::UnroutedIrqfd { gsi });
        }
        if signalled {
            self.deliver(irqfd.into());
        }
        Ok(())
    }

    /// `KVM_IRQFD` with `KVM_IRQFD_FLAG_DEASSIGN`.
    pub(in crate::fake) fn irqfd_deassign(
        &mut self,
        event: &EventFd,
        gsi: Gsi,
    ) -> Result<(), Errno> {
        match self.irqfds.deassign(event, gsi)? {
            Some(gone) => self.unbound(gone),
            None => self.find(Finding::VainDeassign { gsi }),
        }
        Ok(())
    }

    /// A binding has gone: what it was signalled before counts.
    fn unbound(&mut self, gone: Unbound) {
        if gone.signalled {
            self.deliver(gone.wire);
        }
        self.release(gone.wire);
    }

    /// The last resampler of a GSI takes its level with it.
    fn release(&mut self, gone: Wire) {
        if gone.resamples && !self.irqfds.resamples(gone.gsi) {
            self.listeners_changed();
            self.drive(gone.gsi, Source::Resample, false);
        }
    }

    /// The assigned irqfds.
    pub(in crate::fake) fn irqfds(&self) -> Vec<Irqfd> {
        self.irqfds.list().collect()
    }

    /// Becomes readable when an assigned eventfd is signalled; then [`Self::settle`] is due.
    pub(in crate::fake) fn epoll(&self) -> BorrowedFd<'_> {
        self.irqfds.epoll()
    }

    /// Takes the signals that were made and delivers them through the table, and unbinds the eventfds
    /// that were closed.
    pub(in crate::fake) fn settle(&mut self) {
        for wire in self.irqfds.signalled() {
            self.deliver(wire);
        }
        for gone in self.irqfds.closed() {
            self.unbound(gone);
            self.find(Finding::ClosedIrqfd { gsi: gone.wire.gsi });
        }
    }

    /// An irqfd was signalled: a pulse, or with a resample eventfd a level that stays until the
    /// guest ends the interrupt.
    fn deliver(&mut self, Wire { gsi, resamples }: Wire) {
        let loss = if resamples {
            let loss = self.drive(gsi, Source::Resample, true).loss();
            // A level that can't be sent now waits.
            loss.filter(|why| !matches!(why, Loss::Masked | Loss::InService))
        } else {
            let outcome = self.drive(gsi, Source::Caller, true);
            self.drive(gsi, Source::Caller, false);
            outcome.loss()
        };
        if let Some(why) = loss {
            self.find(Finding::LostEvent { gsi, why });
        }
    }

    // Lines and messages.

    /// `KVM_IRQ_LINE_STATUS`.
    pub(in crate::fake) fn line(&mut self, gsi: Gsi, level: bool) -> Result<LineStatus, Errno> {
        self.kind.ok_or(Errno::ENXIO)?;
        Ok(match self.drive(gsi, Source::Asking, level).count() {
            None => LineStatus::Ignored,
            Some(0) => LineStatus::Coalesced,
            Some(n) => LineStatus::Delivered(n),
        })
    }

    /// `KVM_IRQ_LINE`, whose caller does not ask what becomes of it.
    pub(in crate::fake) fn set_line(&mut self, gsi: Gsi, level: bool) -> Result<(), Errno> {
        self.kind.ok_or(Errno::ENXIO)?;
        self.drive(gsi, Source::Caller, level);
        Ok(())
    }

    /// `KVM_SIGNAL_MSI`.
    pub(in crate::fake) fn msi(&mut self, msi: Msi) -> Result<MsiStatus, Errno> {
        self.kind.ok_or(Errno::EINVAL)?;
        if routing::reserved_bits(msi, self.wide_ids) {
            return Err(Errno::EINVAL);
        }
        let message = Message::from_msi(msi, self.wide_ids);
        Ok(match self.lapics.send(&message, None).count() {
            None => MsiStatus::NoTarget,
            Some(0) => MsiStatus::Blocked,
            Some(_) => MsiStatus::Delivered,
        })
    }

    /// `KVM_NMI`.
    pub(in crate::fake) fn nmi(&mut self, vcpu: u32) {
        if let Some(lapic) = self.lapics.get_mut(vcpu) {
            lapic.nmi();
        }
    }

    /// Sets what a source holds of the line of a GSI, on all its ways.
    fn drive(&mut self, gsi: Gsi, source: Source, level: bool) -> Outcome {
        let ways = self.table.targets(gsi).iter().map(|&target| {
            match (target, &mut self.pins) {
                (RouteTarget::Msi(msi), _) if level => {
                    self.lapics.send(&Message::from_msi(msi, self.wide_ids), None)
                }
                (RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin }, Some(pins)) => {
                    pins.ioapic.set(pin, source, level, &mut self.lapics)
                }
                (RouteTarget::Pin { chip, pin }, Some(pins)) => {
                    let first = if chip == IrqchipId::PIC_SLAVE { 8 } else { 0 };
                    pins.pic.set(first | pin as u8 & 7, source, level)
                }
                // A message has no end, and no guest here has synthetic interrupts.
                _ => Outcome::Refused(Loss::NoTarget),
            }
        });
        let nowhere = if gsi.0 < self.limits.routes { Loss::Unrouted } else { Loss::OutOfRange };
        ways.reduce(Outcome::and).unwrap_or(Outcome::Refused(nowhere))
    }

    // State.

    /// `KVM_GET_IRQCHIP`.
    pub(in crate::fake) fn chip(&self, chip: u32) -> Result<kvm_irqchip, Errno> {
        let pins = self.pins.as_ref().ok_or(Errno::ENXIO)?;
        match IrqchipId(chip) {
            id @ IrqchipId::PIC_MASTER => {
                Ok(state::from_pic(id, pins.pic.registers(Which::Master)))
            }
            id @ IrqchipId::PIC_SLAVE => Ok(state::from_pic(id, pins.pic.registers(Which::Slave))),
            IrqchipId::IOAPIC => Ok(state::from_ioapic(pins.ioapic.registers())),
            _ => Err(Errno::EINVAL),
        }
    }

    /// `KVM_SET_IRQCHIP`. Whichever chip it is, the slave 8259 gets another chance to ask.
    pub(in crate::fake) fn set_chip(&mut self, chip: &kvm_irqchip) -> Result<(), Errno> {
        let pins = self.pins.as_mut().ok_or(Errno::ENXIO)?;
        let pic = |pins: &mut Pins, which| {
            pins.pic.set_registers(which, state::to_pic(chip).ok_or(Errno::EINVAL)?);
            Ok(())
        };
        let result = match IrqchipId(chip.chip_id) {
            IrqchipId::PIC_MASTER => pic(pins, Which::Master),
            IrqchipId::PIC_SLAVE => pic(pins, Which::Slave),
            IrqchipId::IOAPIC => state::to_ioapic(chip).ok_or(Errno::EINVAL).map(|registers| {
                pins.ioapic.set_registers(registers, &mut self.lapics);
            }),
            _ => Err(Errno::EINVAL),
        };
        pins.pic.cascade();
        self.listeners_changed();
        result
    }

    /// `KVM_GET_LAPIC`.
    pub(in crate::fake) fn lapic_page(&self, vcpu: u32) -> Result<kvm_lapic_state, Errno> {
        self.kind.ok_or(Errno::EINVAL)?;
        let lapic = self.lapics.get(vcpu).ok_or(Errno::EINVAL)?;
        Ok(kvm_lapic_state { regs: lapic.page().map(|byte| byte as i8) })
    }

    /// `KVM_SET_LAPIC`.
    pub(in crate::fake) fn set_lapic_page(
        &mut self,
        vcpu: u32,
        state: &kvm_lapic_state,
    ) -> Result<(), Errno> {
        self.kind.ok_or(Errno::EINVAL)?;
        let page: [u8; PAGE] = state.regs.map(|byte| byte as u8);
        self.lapics.get_mut(vcpu).ok_or(Errno::EINVAL)?.set_page(page);
        self.tell_version(vcpu);
        if let (Some(pins), Some(lapic)) = (&mut self.pins, self.lapics.get(vcpu)) {
            pins.ioapic.restore_clock(lapic);
        }
        self.listeners_changed();
        Ok(())
    }
}
