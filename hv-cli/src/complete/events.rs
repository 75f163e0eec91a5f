//! INT3, INT n, INTO and INT1: delivery through the guest's IDT.
//!
//! Intel SDM volume 3, sections 7.12 (protected mode) and 7.14 (64-bit mode), and 22.1.4 (real
//! mode). Delivered by hand rather than queued in KVM: KVM would take the vector for an
//! exception whose instruction is yet to be skipped, on some processors and not on others. Not done here: task
//! gates, virtual-8086 mode, shadow stacks, FRED.

use kvm_bindings::kvm_segment;
use vm_memory::GuestMemoryBackend;

use super::descriptors::{Descriptor, SYSTEM_READ, null_stack};
use super::machine::{Machine, Mode, cr4, rflags};
use super::paging::{Access, Kind, Privilege};
use super::stop::{Fault, Stop};

/// What is to be delivered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) vector: u8,
    /// INT n, INT3 and INTO check the gate's DPL and have EXT clear in error codes; INT1 does
    /// not and has it set.
    pub(super) software: bool,
}

impl Event {
    fn ext(self) -> u32 {
        u32::from(!self.software)
    }

    /// The error code that names this event's gate.
    fn gate_code(self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }
}

/// An interrupt or trap gate.
struct Gate {
    selector: u16,
    offset: u64,
    /// Bytes per value pushed: 2, 4 or 8.
    width: u64,
    /// Interrupt gates clear IF, trap gates do not.
    clears_if: bool,
    /// Index of the stack in the 64-bit TSS; 0 for none.
    ist: u8,
}

/// Where the frame goes.
struct Stack {
    /// The new SS, if it changes.
    segment: Option<(kvm_segment, Option<Descriptor>)>,
    pointer: u64,
}

fn selector_code(selector: u16, event: Event) -> u32 {
    u32::from(selector & !3) | event.ext()
}

impl<M: GuestMemoryBackend> Machine<'_, M> {
    /// Delivers `event`, with CS:RIP already after the instruction.
    pub(super) fn deliver(&mut self, event: Event) -> Result<(), Stop> {
        match self.mode() {
            Mode::Virtual8086 => return Err(Stop::unsupported("in virtual-8086 mode")),
            Mode::Real => self.deliver_real(event)?,
            _ if self.sregs.cr4 & (cr4::CET | cr4::FRED) != 0 => {
                return Err(Stop::unsupported("with shadow stacks or FRED on"));
            }
            _ => self.deliver_protected(event)?,
        }
        self.delivered = true;
        self.sregs_changed = true;
        Ok(())
    }

    fn deliver_real(&mut self, event: Event) -> Result<(), Stop> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.sregs.idt.limit) {
            return Err(Fault::gp(0).into());
        }
        let vector = self.read_uint(self.sregs.idt.base.wrapping_add(offset), 4, SYSTEM_READ)?;
        let frame = [self.regs.rflags, u64::from(self.sregs.cs.selector), self.regs.rip];
        let stack = Stack { segment: None, pointer: self.regs.rsp };
        self.regs.rsp = self.push_frame(&frame, 2, &stack, 0, 0)?;
        self.sregs.cs.selector = (vector >> 16) as u16;
        self.sregs.cs.base = (vector >> 16) << 4;
        self.regs.rip = vector & 0xffff;
        self.set_flags(rflags::IF | rflags::TF | rflags::AC | rflags::RF, 0);
        Ok(())
    }

    fn deliver_protected(&mut self, event: Event) -> Result<(), Stop> {
        let gate = self.gate(event)?;
        let code = selector_code(gate.selector, event);
        if gate.selector & !3 == 0 {
            return Err(Fault::gp(event.ext()).into());
        }
        let target = self.descriptor(gate.selector)?.ok_or(Fault::gp(code))?;
        let cpl = self.cpl();
        let long = self.long_mode();
        if !target.is_code()
            || target.dpl() > cpl
            || (long && (!target.is_long() || target.is_big()))
        {
            return Err(Fault::gp(code).into());
        }
        if !target.is_present() {
            return Err(Fault::np(code).into());
        }
        let new_cpl = if target.is_conforming() { cpl } else { target.dpl() };
        let stack = if long {
            self.long_stack(&gate, new_cpl, event)?
        } else {
            self.legacy_stack(new_cpl, event)?
        };
        if !long && gate.offset > u64::from(target.limit()) {
            return Err(Fault::gp(event.ext()).into());
        }
        if long && !self.is_canonical(gate.offset) {
            return Err(Fault::gp(event.ext()).into());
        }

        let mut frame = [0; 5];
        frame[0] = u64::from(self.sregs.ss.selector);
        frame[1] = self.regs.rsp;
        frame[2] = self.regs.rflags;
        frame[3] = u64::from(self.sregs.cs.selector);
        frame[4] = self.regs.rip;
        // 64-bit mode always pushes SS:RSP, otherwise only a new stack has the old one's address.
        let skipped = if long || stack.segment.is_some() { 0 } else { 2 };
        let values = frame.get(skipped..).unwrap_or(&frame);
        self.mark_accessed(&target)?;
        if let Some((_, Some(descriptor))) = &stack.segment {
            self.mark_accessed(descriptor)?;
        }
        self.regs.rsp = self.push_frame(values, gate.width, &stack, new_cpl, event.ext())?;
        if let Some((segment, _)) = stack.segment {
            self.sregs.ss = segment;
        }
        self.sregs.cs = target.segment(new_cpl);
        self.regs.rip = gate.offset;
        let cleared = if gate.clears_if { rflags::IF } else { 0 };
        self.set_flags(cleared | rflags::TF | rflags::NT | rflags::RF | rflags::VM, 0);
        Ok(())
    }

    fn gate(&self, event: Event) -> Result<Gate, Stop> {
        let size: u64 = if self.long_mode() { 16 } else { 8 };
        let offset = u64::from(event.vector) * size;
        if offset + size - 1 > u64::from(self.sregs.idt.limit) {
            return Err(Fault::gp(event.gate_code()).into());
        }
        let linear = self.sregs.idt.base.wrapping_add(offset);
        let low = self.read_uint(linear, 8, SYSTEM_READ)?;
        let high = match size {
            16 => self.read_uint(linear.wrapping_add(8), 8, SYSTEM_READ)?,
            _ => 0,
        };
        // Bit 4 is S: no gate has it.
        let kind = (low >> 40) as u8 & 0x1f;
        let width = match kind {
            0xe | 0xf if size == 16 => 8,
            0xe | 0xf => 4,
            0x6 | 0x7 if size == 8 => 2,
            0x5 if size == 8 => return Err(Stop::unsupported("through a task gate")),
            _ => return Err(Fault::gp(event.gate_code()).into()),
        };
        if event.software && ((low >> 45) as u8 & 3) < self.cpl() {
            return Err(Fault::gp(event.gate_code()).into());
        }
        if low >> 47 & 1 == 0 {
            return Err(Fault::np(event.gate_code()).into());
        }
        let mut offset = low & 0xffff;
        if width > 2 {
            offset |= low >> 32 & 0xffff_0000;
        }
        if width == 8 {
            offset |= high << 32;
        }
        let ist = if size == 16 { (low >> 32) as u8 & 7 } else { 0 };
        Ok(Gate { selector: (low >> 16) as u16, offset, width, clears_if: kind & 1 == 0, ist })
    }

    fn long_stack(&self, gate: &Gate, new_cpl: u8, event: Event) -> Result<Stack, Stop> {
        let inner = new_cpl < self.cpl();
        let field = match gate.ist {
            0 if inner => Some(4 + 8 * u64::from(new_cpl)),
            0 => None,
            ist => Some(36 + 8 * u64::from(ist - 1)),
        };
        let pointer = match field {
            Some(offset) => self.tss_field(offset, 8, event)?,
            None => self.regs.rsp,
        };
        let segment = inner.then(|| (null_stack(new_cpl), None));
        Ok(Stack { segment, pointer: pointer & !15 })
    }

    fn legacy_stack(&self, new_cpl: u8, event: Event) -> Result<Stack, Stop> {
        if new_cpl == self.cpl() {
            return Ok(Stack { segment: None, pointer: self.regs.rsp });
        }
        let level = u64::from(new_cpl);
        let (pointer, selector) = if self.sregs.tr.type_ & 8 != 0 {
            let selector = self.tss_field(8 + 8 * level, 2, event)?;
            (self.tss_field(4 + 8 * level, 4, event)?, selector)
        } else {
            let selector = self.tss_field(4 + 4 * level, 2, event)?;
            (self.tss_field(2 + 4 * level, 2, event)?, selector)
        };
        let selector = selector as u16;
        if selector & !3 == 0 {
            return Err(Fault::ts(event.ext()).into());
        }
        let code = selector_code(selector, event);
        let descriptor = self.descriptor(selector)?.ok_or(Fault::ts(code))?;
        if selector & 3 != u16::from(new_cpl)
            || descriptor.dpl() != new_cpl
            || !descriptor.is_writable_data()
        {
            return Err(Fault::ts(code).into());
        }
        if !descriptor.is_present() {
            return Err(Fault::ss(code).into());
        }
        Ok(Stack { segment: Some((descriptor.segment(new_cpl), Some(descriptor))), pointer })
    }

    fn tss_field(&self, offset: u64, size: usize, event: Event) -> Result<u64, Stop> {
        let tr = &self.sregs.tr;
        if offset + size as u64 - 1 > u64::from(tr.limit) {
            return Err(Fault::ts(selector_code(tr.selector, event)).into());
        }
        self.read_uint(tr.base.wrapping_add(offset), size, SYSTEM_READ)
    }

    /// Pushes `values` of `width` bytes in order; the new stack pointer. Every value's place is
    /// checked before the first is written.
    fn push_frame(
        &self,
        values: &[u64],
        width: u64,
        stack: &Stack,
        cpl: u8,
        ext: u32,
    ) -> Result<u64, Stop> {
        let privilege = if cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let access = Access { kind: Kind::Write, privilege };
        let size = width as usize;
        for (_, slot) in self.frame_slots(values, width, stack) {
            let linear = self.stack_linear(slot, width, stack, ext)?;
            self.probe(linear, size, access)?;
        }
        let mut pointer = stack.pointer;
        for (value, slot) in self.frame_slots(values, width, stack) {
            let linear = self.stack_linear(slot, width, stack, ext)?;
            self.write_uint(linear, size, value, access)?;
            pointer = slot;
        }
        // A 16-bit stack pointer leaves the upper half of ESP alone.
        let mask = self.stack_mask(stack);
        Ok(stack.pointer & !mask | pointer & mask)
    }

    fn frame_slots(
        &self,
        values: &[u64],
        width: u64,
        stack: &Stack,
    ) -> impl Iterator<Item = (u64, u64)> {
        let (pointer, mask) = (stack.pointer, self.stack_mask(stack));
        values
            .iter()
            .zip(1..)
            .map(move |(&value, n)| (value, pointer.wrapping_sub(width.wrapping_mul(n)) & mask))
    }

    fn stack_mask(&self, stack: &Stack) -> u64 {
        let segment = stack.segment.as_ref().map_or(&self.sregs.ss, |(segment, _)| segment);
        if self.long_mode() {
            u64::MAX
        } else if segment.db != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// The linear address of a slot on the stack; #SS with the new stack's selector, or the old
    /// one's bare code, if it is outside.
    fn stack_linear(&self, slot: u64, width: u64, stack: &Stack, ext: u32) -> Result<u64, Stop> {
        if self.long_mode() {
            return if self.is_canonical(slot) && self.is_canonical(slot.wrapping_add(width - 1)) {
                Ok(slot)
            } else {
                Err(Fault::ss(ext).into())
            };
        }
        let (segment, code) = match &stack.segment {
            Some((segment, _)) => (segment, u32::from(segment.selector & !3) | ext),
            None => (&self.sregs.ss, ext),
        };
        self.segment_linear(segment, slot, width, Kind::Write).ok_or(Fault::ss(code).into())
    }
}
