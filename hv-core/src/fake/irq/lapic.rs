//! The local APIC of a vCPU, in xAPIC mode: what it has been sent, what it lets through to the
//! processor, and its registers (Intel SDM volume 3, "Local APIC").
//!
//! There is no timer, and no thermal or performance interrupt: nothing in the fake has a clock.

use super::interrupt::Interrupt;
use super::message::{Message, Mode};

/// Bytes of the register page, as `kvm_lapic_state` has it.
pub(super) const PAGE: usize = 0x400;
/// How many interrupts the log of a vCPU keeps: the newest, at least half of this.
const LOG: usize = 1 << 16;

pub(super) const ID: u16 = 0x20;
const VERSION: u16 = 0x30;
pub(super) const TPR: u16 = 0x80;
const PPR: u16 = 0xa0;
pub(super) const EOI: u16 = 0xb0;
pub(super) const LDR: u16 = 0xd0;
pub(super) const DFR: u16 = 0xe0;
pub(super) const SPIV: u16 = 0xf0;
const ISR: u16 = 0x100;
const TMR: u16 = 0x180;
pub(super) const IRR: u16 = 0x200;
const ESR: u16 = 0x280;
pub(super) const ICR: u16 = 0x300;
const ICR_HIGH: u16 = 0x310;
const LVT_TIMER: u16 = 0x320;
pub(super) const LVT_LINT0: u16 = 0x350;
const LVT_ERROR: u16 = 0x370;
const TIMER_INITIAL: u16 = 0x380;
const TIMER_DIVIDE: u16 = 0x3e0;

const LVT_MASKED: u32 = 1 << 16;
const SPIV_ENABLED: u32 = 1 << 8;
const SPIV_SUPPRESS_EOI: u32 = 1 << 12;
/// Version 0x14 with six local vectors.
const VERSION_VALUE: u32 = 0x0005_0014;
/// That it can be told not to send the ends of interrupts to I/O APICs.
const VERSION_DIRECTED_EOI: u32 = 1 << 24;

/// What a write to a register has set off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// This vector was in service and has ended.
    Ended(u8),
    Send(Message),
}

/// A local APIC and what its processor has not taken yet.
#[derive(Debug)]
pub(super) struct Lapic {
    vcpu: u32,
    version: u32,
    /// Whether the CPUID of its vCPU has x2APIC.
    pub(super) x2apic: bool,
    page: [u8; PAGE],
    init: bool,
    start_up: Option<u8>,
    smi: bool,
    /// One that is taken next and one behind it, as in KVM.
    nmis: u8,
    /// The vector that ended with a store, for the VMM's I/O APIC.
    pub(super) exit_with: Option<u8>,
    /// The vectors whose end somebody hears of, and as of which change of listeners.
    pub(super) heard: Vec<u8>,
    pub(super) listeners: Option<u64>,
    /// The highest of them whose routes lead elsewhere by now: with its end they are not heard.
    pub(super) last_heard: Option<u8>,
    log: Vec<Interrupt>,
}

impl Lapic {
    /// That of vCPU `vcpu` after reset. LINT0 of vCPU 0, the boot processor, is the wire from the
    /// 8259 pair.
    pub(super) fn new(vcpu: u32) -> Self {
        let mut lapic = Self {
            vcpu,
            version: VERSION_VALUE,
            x2apic: false,
            page: [0; PAGE],
            init: false,
            start_up: None,
            smi: false,
            nmis: 0,
            exit_with: None,
            heard: Vec::new(),
            listeners: None,
            last_heard: None,
            log: Vec::new(),
        };
        lapic.reset();
        lapic
    }

    fn reset(&mut self) {
        self.page = [0; PAGE];
        self.set(ID, self.vcpu << 24);
        self.set(VERSION, self.version);
        self.set(DFR, u32::MAX);
        self.set(SPIV, 0xff);
        for lvt in (LVT_TIMER..=LVT_ERROR).step_by(0x10) {
            self.set(lvt, LVT_MASKED);
        }
        if self.vcpu == 0 {
            self.set(LVT_LINT0, 0x700); // ExtINT, not masked
        }
    }

    pub(super) fn vcpu(&self) -> u32 {
        self.vcpu
    }

    pub(super) fn log(&self) -> &[Interrupt] {
        &self.log
    }

    fn note(&mut self, interrupt: Interrupt) {
        if self.log.len() >= LOG {
            self.log.drain(..LOG / 2);
        }
        self.log.push(interrupt);
    }

    // Registers.

    pub(super) fn get(&self, register: u16) -> u32 {
        let at = usize::from(register);
        let bytes = self.page.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    fn set(&mut self, register: u16, value: u32) {
        let at = usize::from(register);
        if let Some(bytes) = self.page.get_mut(at..at + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn bit(&self, base: u16, vector: u8) -> bool {
        self.get(base + u16::from(vector / 32) * 16) & 1 << (vector % 32) != 0
    }

    fn set_bit(&mut self, base: u16, vector: u8, on: bool) {
        let register = base + u16::from(vector / 32) * 16;
        let (word, mask) = (self.get(register), 1 << (vector % 32));
        self.set(register, if on { word | mask } else { word & !mask });
    }

    fn highest(&self, base: u16) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let word = self.get(base + u16::from(i) * 16);
            // At most 31, and 7 * 32 + 31 is 255.
            (word != 0).then(|| i * 32 + word.ilog2() as u8)
        })
    }

    /// The page of `KVM_GET_LAPIC`.
    pub(super) fn page(&self) -> [u8; PAGE] {
        let mut copy = self.page;
        let at = usize::from(PPR);
        if let Some(bytes) = copy.get_mut(at..at + 4) {
            bytes.copy_from_slice(&u32::from(self.processor_priority()).to_le_bytes());
        }
        copy
    }

    /// `KVM_SET_LAPIC`: all but the version is taken as it is.
    pub(super) fn set_page(&mut self, page: [u8; PAGE]) {
        self.page = page;
        self.set(VERSION, self.version);
    }

    /// Whether it tells that it has directed EOI.
    pub(super) fn set_directed_eoi(&mut self, has: bool) {
        self.version = VERSION_VALUE | if has { VERSION_DIRECTED_EOI } else { 0 };
        self.set(VERSION, self.version);
    }

    /// Whether it is told not to send the ends of interrupts to I/O APICs.
    pub(super) fn suppresses_eoi(&self) -> bool {
        self.get(SPIV) & SPIV_SUPPRESS_EOI != 0
    }

    /// A load from a register; the reserved ones are 0.
    pub(super) fn read(&self, register: u16) -> u32 {
        match register {
            PPR => self.processor_priority().into(),
            EOI => 0,
            _ => self.get(register),
        }
    }

    /// A store to a register.
    pub(super) fn write(&mut self, register: u16, value: u32) -> Effect {
        match register {
            ID | LDR | ICR_HIGH => self.set(register, value & 0xff00_0000),
            DFR => self.set(register, value | 0x0fff_ffff),
            TPR => self.set(register, value & 0xff),
            EOI => {
                if let Some(vector) = self.highest(ISR) {
                    self.set_bit(ISR, vector, false);
                    return Effect::Ended(vector);
                }
            }
            SPIV => {
                let directed = self.version & VERSION_DIRECTED_EOI != 0;
                self.set(SPIV, value & (0x3ff | if directed { SPIV_SUPPRESS_EOI } else { 0 }));
                if !self.enabled() {
                    for lvt in (LVT_TIMER..=LVT_ERROR).step_by(0x10) {
                        self.set(lvt, self.get(lvt) | LVT_MASKED);
                    }
                }
            }
            ESR => self.set(ESR, 0),
            ICR => {
                let command = value & !(1 << 12); // delivery status: sent at once
                self.set(ICR, command);
                return Effect::Send(Message::from_command(self.get(ICR_HIGH), command));
            }
            LVT_TIMER..=LVT_ERROR => {
                let masked = if self.enabled() { 0 } else { LVT_MASKED };
                self.set(register, value | masked);
            }
            TIMER_INITIAL | TIMER_DIVIDE => self.set(register, value),
            _ => {}
        }
        Effect::None
    }

    // Whom messages are for.

    /// Whether a store makes KVM look again which messages are for whom.
    pub(super) fn readdresses(&self, register: u16, value: u32) -> bool {
        match register {
            ID | LDR | DFR => true,
            SPIV => (value & SPIV_ENABLED != 0) != self.enabled(),
            _ => false,
        }
    }

    /// Enabled by software, without which no vector is taken.
    pub(super) fn enabled(&self) -> bool {
        self.get(SPIV) & SPIV_ENABLED != 0
    }

    /// Its id, of one byte.
    pub(super) fn id(&self) -> u8 {
        (self.get(ID) >> 24) as u8
    }

    /// Whether it has this id in messages. Beyond 255 the vCPU's id counts too, as if the guest had
    /// x2APIC mode.
    pub(super) fn has_id(&self, id: u32) -> bool {
        id == self.get(ID) >> 24 || id > 0xff && id == self.vcpu
    }

    /// The logical id, 0 for none.
    pub(super) fn logical_id(&self) -> u8 {
        (self.get(LDR) >> 24) as u8
    }

    /// The model of logical ids: flat (one bit a processor), cluster, or neither.
    pub(super) fn flat(&self) -> Option<bool> {
        match self.get(DFR) >> 28 {
            0xf => Some(true),
            0 => Some(false),
            _ => None,
        }
    }

    pub(super) fn has_logical_id(&self, id: u32) -> bool {
        let mine = u32::from(self.logical_id());
        match self.flat() {
            Some(true) => mine & id != 0,
            Some(false) => mine >> 4 == id >> 4 && mine & id & 0xf != 0,
            None => false,
        }
    }

    /// Whether LINT0 lets the 8259 pair through.
    pub(super) fn takes_pic(&self) -> bool {
        let lint0 = self.get(LVT_LINT0);
        lint0 & LVT_MASKED == 0 && lint0 >> 8 & 7 == 7
    }

    // Taking messages.

    /// Takes a message, if it can. A vector that is already requested is taken again and comes to
    /// the guest once.
    pub(super) fn accept(&mut self, message: &Message) -> bool {
        match message.mode {
            Mode::Fixed | Mode::LowestPriority => {
                if message.level && !message.assert || !self.enabled() {
                    return false;
                }
                self.set_bit(TMR, message.vector, message.level);
                if !self.bit(IRR, message.vector) {
                    self.set_bit(IRR, message.vector, true);
                    self.note(Interrupt::Fixed(message.vector));
                }
            }
            Mode::RemoteRead => {}
            Mode::Smi => {
                self.smi = true;
                self.note(Interrupt::Smi);
            }
            Mode::Nmi => self.nmi(),
            Mode::Init => {
                if message.level && !message.assert {
                    return false;
                }
                (self.init, self.start_up) = (true, None);
                self.note(Interrupt::Init);
            }
            Mode::StartUp => {
                self.start_up = Some(message.vector);
                self.note(Interrupt::StartUp(message.vector));
            }
            Mode::ExtInt => return false,
        }
        true
    }

    /// A non-maskable interrupt.
    pub(super) fn nmi(&mut self) {
        self.nmis = self.nmis.saturating_add(1).min(2);
        self.note(Interrupt::Nmi);
    }

    /// The 8259 pair gave this vector to the processor.
    pub(super) fn took_pic(&mut self, vector: u8) {
        self.note(Interrupt::ExtInt(vector));
    }

    // Giving them to the processor.

    /// The class of the task priority or of what is in service.
    fn processor_priority(&self) -> u8 {
        let task = self.get(TPR) as u8;
        let service = self.highest(ISR).unwrap_or(0) & 0xf0;
        if task & 0xf0 >= service { task } else { service }
    }

    /// The vector the processor would take now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let class = self.processor_priority() & 0xf0;
        self.highest(IRR).filter(|vector| vector & 0xf0 > class)
    }

    /// Whether the processor has something to take.
    pub(super) fn pending(&self) -> bool {
        let events = self.init || self.start_up.is_some() || self.smi || self.nmis > 0;
        events || self.deliverable().is_some()
    }

    /// Takes INIT, which resets the local APIC, and start-up.
    pub(super) fn take_starts(&mut self) -> Vec<Interrupt> {
        let mut taken = Vec::new();
        if std::mem::take(&mut self.init) {
            self.reset();
            taken.push(Interrupt::Init);
        }
        taken.extend(self.start_up.take().map(Interrupt::StartUp));
        taken
    }

    /// Takes what is no vector.
    pub(super) fn take_events(&mut self) -> Vec<Interrupt> {
        let mut taken = self.take_starts();
        if std::mem::take(&mut self.smi) {
            taken.push(Interrupt::Smi);
        }
        for _ in 0..std::mem::take(&mut self.nmis) {
            taken.push(Interrupt::Nmi);
        }
        taken
    }

    /// Takes the vector of [`Self::deliverable`]: it is in service until it ends.
    pub(super) fn begin(&mut self, vector: u8) {
        self.set_bit(IRR, vector, false);
        self.set_bit(ISR, vector, true);
    }

    /// Ends a vector; `false` if it was not in service.
    pub(super) fn end(&mut self, vector: u8) -> bool {
        let was = self.bit(ISR, vector);
        self.set_bit(ISR, vector, false);
        was
    }

    /// Whether a vector is requested or in service.
    pub(super) fn has(&self, vector: u8) -> bool {
        self.bit(IRR, vector) || self.bit(ISR, vector)
    }

    /// Whether the last interrupt with this vector was level-triggered.
    pub(super) fn level(&self, vector: u8) -> bool {
        self.bit(TMR, vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Msi;

    fn message(data: u32) -> Message {
        Message::from_msi(Msi { address: 0xfee0_0000, data, device: None }, false)
    }

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new(0);
        lapic.write(SPIV, 0x1ff);
        lapic
    }

    #[test]
    fn after_reset_it_takes_no_vector() {
        let mut lapic = Lapic::new(3);
        assert_eq!((lapic.get(ID), lapic.get(SPIV)), (3 << 24, 0xff));
        assert!(!lapic.accept(&message(0x41)));
        assert!(lapic.accept(&message(0x400)), "an NMI needs no enabled local APIC");
        assert_eq!(lapic.take_events(), [Interrupt::Nmi]);
        assert!(!lapic.takes_pic());
        assert!(Lapic::new(0).takes_pic());
    }

    #[test]
    fn vectors_are_served_by_priority_class() {
        let mut lapic = enabled();
        for vector in [0x41, 0x35, 0x42] {
            assert!(lapic.accept(&message(vector)));
        }
        assert_eq!(lapic.deliverable(), Some(0x42));
        lapic.begin(0x42);
        assert_eq!(lapic.deliverable(), None, "0x41 is of the same class");
        assert_eq!(lapic.read(PPR), 0x40);
        assert_eq!(lapic.write(EOI, 0), Effect::Ended(0x42));
        assert_eq!(lapic.deliverable(), Some(0x41));
        lapic.write(TPR, 0x40);
        assert_eq!(lapic.deliverable(), None);
        lapic.write(TPR, 0x3f);
        assert_eq!(lapic.deliverable(), Some(0x41));
        assert_eq!(lapic.write(EOI, 0), Effect::None, "nothing is in service");
    }

    #[test]
    fn a_vector_twice_pending_is_one_interrupt() {
        let mut lapic = enabled();
        assert!(lapic.accept(&message(0x41)));
        assert!(lapic.accept(&message(0x41)));
        assert_eq!(lapic.log(), [Interrupt::Fixed(0x41)]);
        lapic.begin(0x41);
        assert!(lapic.accept(&message(0x41)), "another while the first is in service");
        assert_eq!(lapic.log().len(), 2);
    }

    #[test]
    fn vectors_below_16_never_reach_the_processor() {
        let mut lapic = enabled();
        assert!(lapic.accept(&message(0)));
        assert!(!lapic.pending());
    }

    #[test]
    fn init_resets_and_cancels_a_start() {
        let mut lapic = enabled();
        lapic.accept(&message(0x41));
        lapic.accept(&message(0x601));
        lapic.accept(&message(0x500));
        lapic.accept(&message(0x602));
        assert_eq!(lapic.take_events(), [Interrupt::Init, Interrupt::StartUp(2)]);
        assert!(!lapic.enabled() && !lapic.pending());
    }

    #[test]
    fn disabling_masks_the_local_vectors() {
        let mut lapic = enabled();
        assert!(lapic.takes_pic());
        lapic.write(SPIV, 0xff);
        assert!(!lapic.takes_pic());
        lapic.write(LVT_LINT0, 0x700);
        assert!(!lapic.takes_pic(), "stays masked while disabled");
    }

    #[test]
    fn the_page_is_kept_but_for_the_version() {
        let mut lapic = enabled();
        let mut page = lapic.page();
        page[usize::from(IRR) + 0x20] = 2; // vector 0x41
        page[usize::from(VERSION)] = 0x99;
        lapic.set_page(page);
        assert_eq!(lapic.deliverable(), Some(0x41));
        assert_eq!(lapic.get(VERSION), VERSION_VALUE);
    }

    #[test]
    fn the_log_is_bounded() {
        let mut lapic = enabled();
        for _ in 0..LOG + 10 {
            lapic.accept(&message(0x400));
        }
        assert!((LOG / 2..=LOG).contains(&lapic.log().len()));
    }
}
