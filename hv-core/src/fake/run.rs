//! One step of a scripted guest, under the lock of its VM.

use super::bus::{Piece, Wrote};
use super::guest::{GuestStep, Seen};
use super::registers::{HALTED, RUNNABLE};
use super::state::State;
use crate::{IoAddress, IoDirection, IoExit, MmioExit, VcpuExit};

/// `X86_EFLAGS_IF`.
const INTERRUPT_FLAG: u64 = 1 << 9;
/// The most data of a port access: a page.
const MAX_IO: usize = 4096;

/// What follows from a step.
#[derive(Debug)]
pub(super) enum Next {
    /// The next one.
    Go,
    /// Nothing to do until an interrupt or a kick.
    Wait,
    /// The run ends with this exit and its data.
    Exit(VcpuExit, Vec<u8>),
}

impl From<VcpuExit> for Next {
    fn from(exit: VcpuExit) -> Self {
        Next::Exit(exit, Vec::new())
    }
}

impl State {
    /// What vCPU `id` does next. `window`: whether the VMM wants to know when it can inject.
    pub(super) fn step(&mut self, id: u32, window: bool) -> Next {
        self.start(id);
        let interrupt = self.interrupt_waits(id);
        let pic = self.has_full_irqchip();
        let Some(vcpu) = self.vcpus.get_mut(&id) else { return VcpuExit::Shutdown.into() };
        vcpu.waits = false;
        if vcpu.kick.take() {
            return VcpuExit::Interrupted.into();
        }
        vcpu.has_run = true;
        match vcpu.registers.mp_state {
            RUNNABLE => {}
            HALTED if interrupt => vcpu.registers.mp_state = RUNNABLE,
            _ => {
                vcpu.waits = true;
                return Next::Wait;
            }
        }
        if self.memory.ring_is_full(id) {
            return VcpuExit::DirtyRingFull.into();
        }
        let flag = vcpu.registers.regs.rflags & INTERRUPT_FLAG != 0;
        if window && !pic && flag && vcpu.injected.is_none() {
            return VcpuExit::IrqWindowOpen.into();
        }
        let step = vcpu.script.pop_front();
        self.irq.listen(id);
        step.map_or_else(|| VcpuExit::Hlt.into(), |step| self.take_step(id, step))
    }

    fn take_step(&mut self, id: u32, step: GuestStep) -> Next {
        match step {
            GuestStep::Write { address, data } => self.write_step(id, address, &data),
            GuestStep::Read { address, len } => self.read_step(id, address, len),
            GuestStep::EndOfInterrupt(vector) => match self.irq.end_of_interrupt(id, vector) {
                Some(vector) => VcpuExit::IoapicEoi { vector }.into(),
                None => Next::Go,
            },
            GuestStep::TakeInterrupts => {
                let taken = self.take_interrupts(id);
                self.saw(id, Seen::Interrupts(taken));
                Next::Go
            }
            GuestStep::WaitForInterrupt if !self.has_irqchip() => VcpuExit::Hlt.into(),
            GuestStep::WaitForInterrupt => {
                if let Some(vcpu) = self.vcpus.get_mut(&id) {
                    vcpu.registers.mp_state = HALTED;
                }
                Next::Go
            }
            GuestStep::Exit(exit @ VcpuExit::Io(io), mut data) => {
                let count = usize::try_from(io.count).unwrap_or(MAX_IO);
                data.resize(count.saturating_mul(io.size.into()).min(MAX_IO), 0);
                Next::Exit(exit, data)
            }
            GuestStep::Exit(exit, _) => exit.into(),
        }
    }

    pub(super) fn saw(&mut self, id: u32, seen: Seen) {
        if let Some(vcpu) = self.vcpus.get_mut(&id) {
            vcpu.saw(seen);
        }
    }

    fn next_step(&mut self, id: u32, step: GuestStep) {
        if let Some(vcpu) = self.vcpus.get_mut(&id) {
            vcpu.script.push_front(step);
        }
    }

    fn write_step(&mut self, id: u32, address: IoAddress, data: &[u8]) -> Next {
        if data.is_empty() {
            return Next::Go;
        }
        let Piece { len, unit, result } = self.write(id, address, data);
        let (piece, rest) = data.split_at_checked(len).unwrap_or((data, &[]));
        if let (Some(address), false) = (after(address, len), rest.is_empty()) {
            self.next_step(id, GuestStep::write(address, rest));
        }
        if let Some(vector) = self.irq.take_ioapic_eoi(id) {
            return VcpuExit::IoapicEoi { vector }.into();
        }
        match (result, address) {
            (Wrote::Exit, IoAddress::Pio(port)) => {
                Next::Exit(port_exit(IoDirection::Out, port, len, unit), piece.to_vec())
            }
            (Wrote::Exit, IoAddress::Mmio(address)) => {
                let mut written = [0; 8];
                for (to, from) in written.iter_mut().zip(piece) {
                    *to = *from;
                }
                mmio_exit(address, len, Some(written)).into()
            }
            _ => Next::Go,
        }
    }

    fn read_step(&mut self, id: u32, address: IoAddress, len: u16) -> Next {
        if len == 0 {
            return Next::Go;
        }
        let Piece { len: done, unit, result } = self.read(id, address, len.into());
        let rest = u16::try_from(done).map_or(0, |done| len.saturating_sub(done));
        if let (Some(address), true) = (after(address, done), rest > 0) {
            self.next_step(id, GuestStep::read(address, rest));
        }
        match (result, address) {
            (Some(data), _) => {
                self.saw(id, Seen::Read { address, data });
                Next::Go
            }
            (None, IoAddress::Pio(port)) => {
                Next::Exit(port_exit(IoDirection::In, port, done, unit), vec![0; done])
            }
            (None, IoAddress::Mmio(address)) => mmio_exit(address, done, None).into(),
        }
    }
}

/// Where the next piece goes: a string stays at its port. None past the last address.
pub(super) fn after(address: IoAddress, len: usize) -> Option<IoAddress> {
    match address {
        IoAddress::Mmio(address) => {
            u64::try_from(len).ok().and_then(|len| address.checked_add(len)).map(IoAddress::Mmio)
        }
        port @ IoAddress::Pio(_) => Some(port),
    }
}

fn mmio_exit(address: u64, len: usize, written: Option<[u8; 8]>) -> VcpuExit {
    VcpuExit::Mmio(MmioExit { address, len: u8::try_from(len).unwrap_or(8), written })
}

/// `len` and `unit` are at most a page.
fn port_exit(direction: IoDirection, port: u16, len: usize, unit: usize) -> VcpuExit {
    let count = len.checked_div(unit).and_then(|n| u32::try_from(n).ok()).unwrap_or(1);
    VcpuExit::Io(IoExit { direction, port, size: u8::try_from(unit).unwrap_or(1), count })
}
