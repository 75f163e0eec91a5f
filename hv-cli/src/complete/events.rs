//! INT3, INT n, INTO and INT1: delivery through the guest's IDT.
//!
//! Intel SDM volume 3, "Exception and Interrupt Handling", "Interrupt and Exception Handling in
//! 64-bit Mode" and, for real mode, "8086 Emulation". Delivered by hand rather than queued in KVM,
//! which on some processors skips the instruction at RIP when it injects #BP, and has no way to
//! inject INT n. Not done here: task gates, virtual-8086 mode, shadow stacks, FRED.

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

#[cfg(test)]
mod tests {
    use super::super::testing::{
        CODE, FakeCpu, GATE, Guest, HANDLER, IDT, STACK, TSS, TestGate, descriptor, long_mode,
        protected_mode, real_mode, selector,
    };
    use super::super::{Completed, NotCompleted};
    use super::*;

    const INT3: &[u8] = &[0xcc];
    const INT_80: &[u8] = &[0xcd, 0x80];
    const INT1: &[u8] = &[0xf1];
    const INTO: &[u8] = &[0xce];
    const FLAGS: u64 = rflags::FIXED | rflags::IF | rflags::CF;

    fn guest(mut cpu: FakeCpu) -> Guest {
        cpu.regs.rflags = FLAGS;
        let guest = Guest::with_tables(cpu);
        for vector in [1, 3, 4, 0x80] {
            guest.set_gate(vector, GATE);
        }
        guest
    }

    /// The eight-byte values from the stack pointer up.
    fn frame64(guest: &Guest) -> [u64; 5] {
        [0, 1, 2, 3, 4].map(|n| guest.peek_u64(guest.cpu.regs.rsp + 8 * n))
    }

    fn frame32<const N: usize>(guest: &Guest) -> [u64; N] {
        std::array::from_fn(|n| guest.peek_u32(guest.cpu.regs.rsp + 4 * n as u64).into())
    }

    fn unsupported(result: Result<Completed, NotCompleted>) -> bool {
        matches!(result, Err(NotCompleted::Unsupported(_)))
    }

    #[test]
    fn int3_and_int_n_in_64_bit_mode() {
        for (bytes, next) in [(INT3, CODE + 1), (INT_80, CODE + 2), (INT1, CODE + 1)] {
            let mut guest = guest(long_mode());
            guest.set_gate(0x80, TestGate { offset: 0xffff_8000_1234_5678, ..GATE });
            guest.cpu.regs.rsp = STACK - 3;
            guest.run(bytes);
            let regs = guest.cpu.regs;
            assert_eq!(regs.rsp, STACK - 16 - 40, "aligned, then five values");
            assert_eq!(frame64(&guest), [next, 8, FLAGS, STACK - 3, 0x10]);
            let handler = if bytes == INT_80 { 0xffff_8000_1234_5678 } else { HANDLER };
            assert_eq!(regs.rip, handler);
            assert_eq!(regs.rflags, rflags::FIXED | rflags::CF);
            assert_eq!((guest.cpu.sregs.cs.selector, guest.cpu.sregs.cs.l), (8, 1));
            assert_eq!(guest.cpu.sregs.ss.selector, 0x10, "SS stays without a privilege change");
        }
    }

    #[test]
    fn from_user_code_through_the_64_bit_tss() {
        let mut guest = guest(long_mode());
        guest.set_descriptor(selector::CODE, descriptor::CODE64 & !descriptor::ACCESSED);
        guest.enter_user();
        guest.poke_u64(TSS + 4, 0xa008);
        guest.run(INT_80);
        assert_eq!(frame64(&guest), [CODE + 2, 0x1b, FLAGS, STACK, 0x23]);
        assert_eq!(guest.cpu.regs.rsp, 0xa000 - 40);
        let sregs = &guest.cpu.sregs;
        assert_eq!((sregs.cs.selector, sregs.cs.dpl, sregs.cs.l), (8, 0, 1));
        assert_eq!((sregs.ss.selector, sregs.ss.dpl, sregs.ss.unusable), (0, 0, 0));
        assert_eq!(guest.machine().cpl(), 0);
        assert_eq!(guest.get_descriptor(selector::CODE), descriptor::CODE64, "accessed");
    }

    #[test]
    fn an_interrupt_stack_is_used_with_and_without_a_privilege_change() {
        for user in [false, true] {
            let mut guest = guest(long_mode());
            guest.set_gate(3, TestGate { ist: 7, ..GATE });
            guest.poke_u64(TSS + 36 + 8 * 6, 0xb000);
            if user {
                guest.enter_user();
            }
            guest.run(INT3);
            assert_eq!(guest.cpu.regs.rsp, 0xb000 - 40);
            assert_eq!(guest.peek_u64(0xb000 - 16), STACK);
        }
    }

    #[test]
    fn trap_gates_keep_if_and_delivery_ends_stepping() {
        let mut guest = guest(long_mode());
        guest.set_gate(3, TestGate { access: 0xef, ..GATE });
        guest.cpu.regs.rflags |= rflags::TF | rflags::NT;
        guest.run(INT3);
        assert_eq!(guest.cpu.regs.rflags, FLAGS);
        assert_eq!(frame64(&guest)[2], FLAGS | rflags::TF | rflags::NT);
        assert_eq!(guest.cpu.events.exception.injected, 0);
    }

    #[test]
    fn same_privilege_in_32_bit_mode() {
        let mut guest = guest(protected_mode());
        guest.cpu.regs.rsp = 0xffff_ffff_0000_0000 | STACK;
        guest.run(INT_80);
        assert_eq!(guest.cpu.regs.rsp & 0xffff_ffff, STACK - 12);
        guest.cpu.regs.rsp = STACK - 12;
        assert_eq!(frame32(&guest), [CODE + 2, 8, FLAGS]);
        assert_eq!(guest.cpu.regs.rip, HANDLER);
        assert_eq!(guest.cpu.regs.rflags, rflags::FIXED | rflags::CF);
    }

    #[test]
    fn an_inner_stack_in_32_bit_mode() {
        let mut guest = guest(protected_mode());
        guest.enter_user();
        guest.poke(TSS + 4, &0xa000u32.to_le_bytes());
        guest.poke(TSS + 8, &[0x10, 0]);
        guest.set_descriptor(selector::DATA, descriptor::DATA & !descriptor::ACCESSED);
        guest.run(INT_80);
        assert_eq!(guest.cpu.regs.rsp, 0xa000 - 20);
        assert_eq!(frame32(&guest), [CODE + 2, 0x1b, FLAGS, STACK, 0x23]);
        let sregs = &guest.cpu.sregs;
        assert_eq!((sregs.ss.selector, sregs.ss.dpl, sregs.ss.type_), (0x10, 0, 3));
        assert_eq!(guest.get_descriptor(selector::DATA), descriptor::DATA, "accessed");
    }

    #[test]
    fn a_16_bit_tss_and_gate() {
        let mut guest = guest(protected_mode());
        guest.enter_user();
        guest.cpu.sregs.tr.type_ = 3;
        guest.cpu.sregs.tr.limit = 43;
        guest.set_gate(0x80, TestGate { access: 0xe6, offset: 0x5555_9000, ..GATE });
        guest.poke(TSS + 2, &0xa000u16.to_le_bytes());
        guest.poke(TSS + 4, &[0x10, 0]);
        guest.run(INT_80);
        assert_eq!(guest.cpu.regs.rsp, 0xa000 - 10);
        assert_eq!(guest.cpu.regs.rip, 0x9000, "a 16-bit gate has a 16-bit offset");
        let frame = guest.peek::<10>(0xa000 - 10);
        assert_eq!(frame, [0x02, 0x10, 0x1b, 0, 0x03, 0x02, 0x00, 0x40, 0x23, 0]);
    }

    #[test]
    fn real_mode_uses_the_vector_table() {
        let mut guest = Guest::new(real_mode());
        guest.cpu.regs.rflags = FLAGS | rflags::TF | rflags::AC;
        guest.cpu.sregs.cs.selector = 0x40;
        guest.cpu.sregs.cs.base = 0x400;
        guest.cpu.regs.rip = 0xc00;
        guest.cpu.regs.rsp = 0xabcd_0002;
        guest.poke(4 * 0x80, &[0x34, 0x12, 0x00, 0xf0]);
        guest.run(INT_80);
        assert_eq!((guest.cpu.sregs.cs.selector, guest.cpu.sregs.cs.base), (0xf000, 0xf_0000));
        assert_eq!(guest.cpu.regs.rip, 0x1234);
        assert_eq!(guest.cpu.regs.rflags, rflags::FIXED | rflags::CF);
        // SP wraps within 64 KiB; the upper half of ESP stays.
        assert_eq!(guest.cpu.regs.rsp, 0xabcd_fffc);
        assert_eq!(guest.peek::<2>(0), (FLAGS as u16 | 0x100).to_le_bytes());
        assert_eq!(guest.peek::<4>(0xfffc), [0x02, 0x0c, 0x40, 0x00]);

        let mut guest = Guest::new(real_mode());
        guest.cpu.sregs.idt.limit = 0x80 * 4 + 2;
        assert_eq!(guest.fault(INT_80, 13), 0);
    }

    #[test]
    fn into_depends_on_of() {
        let mut guest = guest(protected_mode());
        guest.run(INTO);
        assert_eq!(guest.cpu.regs.rip, CODE + 1);
        guest.cpu.regs.rflags |= rflags::OF;
        guest.run(INTO);
        assert_eq!(guest.cpu.regs.rip, HANDLER);
        assert_eq!(guest.peek_u32(guest.cpu.regs.rsp), CODE as u32 + 2);
    }

    #[test]
    fn gates_are_checked() {
        for mode in [long_mode, protected_mode] {
            // Gate, instruction, vector, error code.
            let rows = [
                (TestGate { access: 0x8e, ..GATE }, INT3, 13, 3 << 3 | 2),
                (TestGate { access: 0x8e, ..GATE }, INT_80, 13, 0x80 << 3 | 2),
                (TestGate { access: 0x6e, ..GATE }, INT_80, 11, 0x80 << 3 | 2),
                (TestGate { access: 0x6e, ..GATE }, INT1, 11, 1 << 3 | 3),
                (TestGate { access: 0xec, ..GATE }, INT_80, 13, 0x80 << 3 | 2),
                (TestGate { access: 0xfe, ..GATE }, INT1, 13, 1 << 3 | 3),
                (TestGate { selector: 3, ..GATE }, INT_80, 13, 0),
                (TestGate { selector: 3, ..GATE }, INT1, 13, 1),
                (TestGate { selector: 0x1008, ..GATE }, INT_80, 13, 0x1008),
                (TestGate { selector: 0x0c, ..GATE }, INT_80, 13, 0x0c),
                (TestGate { selector: selector::DATA, ..GATE }, INT_80, 13, 0x10),
                (TestGate { selector: selector::SPARE, ..GATE }, INT_80, 11, 0x30),
            ];
            for (n, (gate, bytes, vector, code)) in rows.into_iter().enumerate() {
                let mut guest = guest(mode());
                let code_descriptor = guest.get_descriptor(selector::CODE);
                guest.set_descriptor(selector::SPARE, code_descriptor & !descriptor::PRESENT);
                guest.enter_user();
                guest.poke_u64(TSS + 4, 0xa000);
                for vector in [1, 3, 0x80] {
                    guest.set_gate(vector, gate);
                }
                assert_eq!(guest.fault(bytes, vector), code, "row {n}");
                assert_eq!((guest.cpu.regs.rip, guest.cpu.regs.rsp), (CODE, STACK), "row {n}");
            }
            let mut short = guest(mode());
            short.cpu.sregs.idt.limit = 0x3f;
            assert_eq!(short.fault(INT_80, 13), 0x80 << 3 | 2);
        }
    }

    #[test]
    fn the_dpl_of_a_gate_does_not_stop_int1() {
        let mut guest = guest(long_mode());
        guest.enter_user();
        guest.poke_u64(TSS + 4, 0xa000);
        guest.set_gate(1, TestGate { access: 0x8e, ..GATE });
        guest.run(INT1);
        assert_eq!(guest.cpu.regs.rip, HANDLER);
    }

    #[test]
    fn the_code_segment_must_be_64_bit_and_not_outer() {
        let mut guest = guest(long_mode());
        guest.set_descriptor(selector::CODE, descriptor::CODE32);
        assert_eq!(guest.fault(INT3, 13), 8);
        guest.cpu.events = Default::default();
        guest.set_gate(3, TestGate { selector: selector::USER_CODE, ..GATE });
        assert_eq!(guest.fault(INT3, 13), 0x18);
    }

    #[test]
    fn inner_stacks_are_checked_in_32_bit_mode() {
        // SS0 in the TSS, its descriptor, vector, error code.
        let rows = [
            (0, descriptor::DATA, 10, 0),
            (0x31, descriptor::DATA, 10, 0x30),
            (0x30, descriptor::USER_DATA, 10, 0x30),
            (0x30, descriptor::CODE32, 10, 0x30),
            (0x1000, descriptor::DATA, 10, 0x1000),
            (0x30, descriptor::DATA & !descriptor::PRESENT, 12, 0x30),
        ];
        for (selector, descriptor, vector, code) in rows {
            let mut guest = guest(protected_mode());
            guest.enter_user();
            guest.poke(TSS + 4, &0xa000u32.to_le_bytes());
            guest.poke(TSS + 8, &u16::to_le_bytes(selector));
            guest.set_descriptor(selector::SPARE, descriptor);
            assert_eq!(guest.fault(INT_80, vector), code, "{selector:#x} {descriptor:#x}");
        }
        let mut guest = guest(protected_mode());
        guest.enter_user();
        guest.cpu.sregs.tr.limit = 8;
        assert_eq!(guest.fault(INT_80, 10), 0x28, "a TSS too short");
    }

    #[test]
    fn a_stack_that_faults_leaves_everything_as_it_was() {
        let mut guest = guest(long_mode());
        guest.unmap(STACK - 8);
        assert_eq!(guest.fault(INT3, 14), 0b10);
        assert_eq!(guest.cpu.sregs.cr2, STACK - 8);
        assert_eq!((guest.cpu.regs.rip, guest.cpu.regs.rsp), (CODE, STACK));
        assert_eq!(guest.cpu.regs.rflags, FLAGS | rflags::RF);
        assert_eq!(guest.cpu.sregs.cs.selector, 8);

        let mut guest = super::tests::guest(long_mode());
        guest.cpu.regs.rsp = 0x8000_0000_0000_0000;
        assert_eq!(guest.fault(INT3, 12), 0);
        let mut guest = super::tests::guest(protected_mode());
        guest.cpu.sregs.ss.limit = STACK as u32 - 2;
        assert_eq!(guest.fault(INT3, 12), 0);
    }

    #[test]
    fn a_gate_on_a_page_that_is_not_present_faults() {
        let mut guest = guest(long_mode());
        guest.enter_user();
        guest.unmap(IDT);
        assert_eq!(guest.fault(INT_80, 14), 0, "a supervisor read");
        assert_eq!(guest.cpu.sregs.cr2, IDT + 0x800);
    }

    #[test]
    fn what_is_not_done_is_said() {
        let mut task = guest(protected_mode());
        task.set_gate(3, TestGate { access: 0xe5, ..GATE });
        assert!(unsupported(task.complete(INT3)));
        let mut v86 = guest(protected_mode());
        v86.cpu.regs.rflags |= rflags::VM;
        assert!(unsupported(v86.complete(INT3)));
        for bit in [cr4::CET, cr4::FRED] {
            let mut guest = guest(long_mode());
            guest.cpu.sregs.cr4 |= bit;
            assert!(unsupported(guest.complete(INT3)));
        }
    }
}
