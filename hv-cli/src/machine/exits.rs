//! From a vCPU exit to what happens next: the part of the run loop that needs no KVM to test.
//!
//! Everything a guest can cause has an answer here; nothing is ignored without being counted, and
//! an exit without an answer stops the machine.

use std::sync::atomic::{AtomicU64, Ordering};

use hv_core::{
    ExitReply, INTERNAL_ERROR_EMULATION, InternalError, IoDirection, IoExit, MmioExit, Vcpu,
    VcpuExit,
};

use super::bus::Bus;
use crate::exit_code::StopReason;

/// What a vCPU reaches when it leaves the guest.
#[derive(Default)]
pub struct Outside {
    /// I/O ports.
    pub ports: Bus,
    /// Guest-physical addresses that are not RAM.
    pub memory: Bus,
    /// Who hears that the guest ended an interrupt of a userspace I/O APIC.
    pub end_of_interrupt: Option<Box<dyn Fn(u8) + Send + Sync>>,
}

/// What the run loop does after an exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Run the vCPU again, unless the machine is to stop.
    Run,
    /// Complete the instruction KVM could not emulate.
    Complete(InternalError),
    /// Stop the machine.
    Stop(StopReason),
}

/// Answers `exit` of `vcpu`.
pub fn answer<V: Vcpu>(vcpu: &mut V, exit: VcpuExit, outside: &Outside) -> Next {
    let id = vcpu.id();
    match exit {
        VcpuExit::Io(io) => port_access(vcpu, io, &outside.ports),
        VcpuExit::Mmio(mmio) => memory_access(vcpu, mmio, &outside.memory),
        VcpuExit::Interrupted => {}
        VcpuExit::IoapicEoi { vector } => {
            if let Some(end_of_interrupt) = &outside.end_of_interrupt {
                end_of_interrupt(vector);
            }
        }
        VcpuExit::Shutdown => return Next::Stop(StopReason::TripleFault { vcpu: id }),
        VcpuExit::InternalError(error) if error.suberror == INTERNAL_ERROR_EMULATION => {
            return Next::Complete(error);
        }
        VcpuExit::InternalError(error) => {
            return Next::Stop(StopReason::InternalError { vcpu: id, error });
        }
        VcpuExit::FailEntry { reason, cpu } => {
            return Next::Stop(StopReason::FailEntry { vcpu: id, reason, cpu });
        }
        VcpuExit::SystemEvent { kind, .. } => return Next::Stop(system_event(kind)),
        exit => return Next::Stop(StopReason::UnexpectedExit { vcpu: id, exit }),
    }
    Next::Run
}

fn port_access<V: Vcpu>(vcpu: &mut V, io: IoExit, ports: &Bus) {
    let data = vcpu.io_data();
    // String instructions access the same port `count` times.
    for access in data.chunks_mut(usize::from(io.size).max(1)) {
        match io.direction {
            IoDirection::In => ports.read(io.port.into(), access),
            IoDirection::Out => ports.write(io.port.into(), access),
        }
    }
}

fn memory_access<V: Vcpu>(vcpu: &mut V, mmio: MmioExit, memory: &Bus) {
    let len = usize::from(mmio.len).min(8);
    match mmio.written {
        Some(data) => memory.write(mmio.address, data.get(..len).unwrap_or(&data)),
        None => {
            let mut data = [0; 8];
            if let Some(data) = data.get_mut(..len) {
                memory.read(mmio.address, data);
            }
            vcpu.reply(ExitReply::Mmio(data));
        }
    }
}

fn system_event(kind: u32) -> StopReason {
    match kind {
        1 => StopReason::PowerOff, // KVM_SYSTEM_EVENT_SHUTDOWN
        2 => StopReason::Reset,    // KVM_SYSTEM_EVENT_RESET
        _ => StopReason::SystemEvent { kind },
    }
}

macro_rules! kinds {
    ($($kind:ident $name:literal,)*) => {
        /// A kind of exit, for counting.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ExitKind {
            $(#[doc = $name] $kind,)*
        }

        const KINDS: &[(ExitKind, &str)] = &[$((ExitKind::$kind, $name),)*];
    };
}

kinds! {
    PortIn "port reads",
    PortOut "port writes",
    MmioRead "MMIO reads",
    MmioWrite "MMIO writes",
    EndOfInterrupt "I/O APIC EOIs",
    Interrupted "kicks",
    InternalError "internal errors",
    Other "others",
}

impl From<&VcpuExit> for ExitKind {
    fn from(exit: &VcpuExit) -> Self {
        match exit {
            VcpuExit::Io(IoExit { direction: IoDirection::In, .. }) => Self::PortIn,
            VcpuExit::Io(_) => Self::PortOut,
            VcpuExit::Mmio(MmioExit { written: None, .. }) => Self::MmioRead,
            VcpuExit::Mmio(_) => Self::MmioWrite,
            VcpuExit::IoapicEoi { .. } => Self::EndOfInterrupt,
            VcpuExit::Interrupted => Self::Interrupted,
            VcpuExit::InternalError(_) => Self::InternalError,
            _ => Self::Other,
        }
    }
}

/// How often a vCPU left the guest, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitCounts([u64; KINDS.len()]);

impl ExitCounts {
    /// Counts one.
    pub fn add(&mut self, kind: ExitKind) {
        if let Some(count) = self.0.get_mut(kind as usize) {
            *count += 1;
        }
    }

    /// Adds those of another vCPU.
    pub fn merge(&mut self, other: &Self) {
        for (count, other) in self.0.iter_mut().zip(other.0) {
            *count += other;
        }
    }

    /// How often there was an exit of any kind.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The kinds that happened, each with its plural name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        KINDS.iter().zip(self.0).map(|((_, name), n)| (*name, n)).filter(|(_, n)| *n > 0)
    }
}

/// What is counted of a vCPU while it runs. Only its thread counts, without a lock or a locked
/// instruction; others may look at any time. On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct LiveCounts {
    exits: [AtomicU64; KINDS.len()],
    completed: AtomicU64,
}

impl LiveCounts {
    /// Counts an exit. To be called by the thread of the vCPU alone.
    pub fn add(&self, kind: ExitKind) {
        if let Some(count) = self.exits.get(kind as usize) {
            increment(count);
        }
    }

    /// Counts an instruction that was completed. To be called by the thread of the vCPU alone.
    pub fn add_completed(&self) {
        increment(&self.completed);
    }

    /// The exits until now.
    #[must_use]
    pub fn exits(&self) -> ExitCounts {
        let mut exits = ExitCounts::default();
        for (exits, count) in exits.0.iter_mut().zip(&self.exits) {
            *exits = count.load(Ordering::Relaxed);
        }
        exits
    }

    /// The instructions completed until now.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }
}

/// There is one writer.
fn increment(count: &AtomicU64) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::bus::Device;
    use hv_core::mock::MockVcpu;
    use std::sync::{Arc, Mutex};

    /// Counts up on reads, records writes.
    #[derive(Default)]
    struct Recorder {
        next: u8,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl Device for Recorder {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            for byte in data {
                self.next += 1;
                *byte = self.next;
            }
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    fn outside() -> (Outside, Arc<Mutex<Recorder>>) {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut outside = Outside::default();
        outside.ports.insert("recorder", 0x10, 4, device.clone()).unwrap();
        outside.memory.insert("recorder", 0x1000, 16, device.clone()).unwrap();
        (outside, device)
    }

    fn vcpu() -> MockVcpu {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_id().return_const(1u32);
        vcpu
    }

    fn io(direction: IoDirection, size: u8, count: u32) -> VcpuExit {
        VcpuExit::Io(IoExit { direction, port: 0x10, size, count })
    }

    fn written(address: u64, len: u8) -> VcpuExit {
        VcpuExit::Mmio(MmioExit { address, len, written: Some([1, 2, 3, 4, 5, 6, 7, 8]) })
    }

    #[test]
    fn string_output_is_one_access_after_the_other() {
        let (outside, device) = outside();
        let mut vcpu = vcpu();
        vcpu.expect_io_data().return_var(vec![1, 2, 3, 4, 5, 6]);
        assert_eq!(answer(&mut vcpu, io(IoDirection::Out, 2, 3), &outside), Next::Run);
        let expected = [(0, vec![1, 2]), (0, vec![3, 4]), (0, vec![5, 6])];
        assert_eq!(device.lock().unwrap().written, expected);
    }

    #[test]
    fn mmio_of_every_size_reaches_the_device_whole() {
        let (outside, device) = outside();
        for len in 1..=8 {
            answer(&mut vcpu(), written(0x1004, len), &outside);
            let data = (1..=len).collect::<Vec<u8>>();
            assert_eq!(device.lock().unwrap().written.pop(), Some((4, data)));
        }
        // A length KVM never reports must not panic.
        assert_eq!(answer(&mut vcpu(), written(0x1000, 200), &outside), Next::Run);
    }

    #[test]
    fn an_mmio_read_is_answered() {
        let (outside, _) = outside();
        let mut vcpu = vcpu();
        let reply = ExitReply::Mmio([1, 2, 3, 4, 0, 0, 0, 0]);
        vcpu.expect_reply().withf(move |r| *r == reply).once().return_const(());
        let read = MmioExit { address: 0x1000, len: 4, written: None };
        assert_eq!(answer(&mut vcpu, VcpuExit::Mmio(read), &outside), Next::Run);
    }

    #[test]
    fn ends_are_told_apart() {
        let internal = |suberror| InternalError { suberror, ndata: 0, data: [0; 16] };
        let event = |kind| VcpuExit::SystemEvent { kind, ndata: 0, data: [0; 16] };
        let hlt = StopReason::UnexpectedExit { vcpu: 1, exit: VcpuExit::Hlt };
        let cases = [
            (VcpuExit::Shutdown, Next::Stop(StopReason::TripleFault { vcpu: 1 })),
            (VcpuExit::InternalError(internal(1)), Next::Complete(internal(1))),
            (
                VcpuExit::InternalError(internal(3)),
                Next::Stop(StopReason::InternalError { vcpu: 1, error: internal(3) }),
            ),
            (
                VcpuExit::FailEntry { reason: 7, cpu: 2 },
                Next::Stop(StopReason::FailEntry { vcpu: 1, reason: 7, cpu: 2 }),
            ),
            (event(1), Next::Stop(StopReason::PowerOff)),
            (event(2), Next::Stop(StopReason::Reset)),
            (event(3), Next::Stop(StopReason::SystemEvent { kind: 3 })),
            (VcpuExit::Interrupted, Next::Run),
            (VcpuExit::Hlt, Next::Stop(hlt)),
        ];
        for (exit, next) in cases {
            assert_eq!(answer(&mut vcpu(), exit, &Outside::default()), next);
        }
    }

    #[test]
    fn an_ended_interrupt_is_told() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let outside = Outside {
            end_of_interrupt: Some(Box::new(move |vector| sender.send(vector).unwrap())),
            ..Outside::default()
        };
        answer(&mut vcpu(), VcpuExit::IoapicEoi { vector: 0x31 }, &outside);
        assert_eq!(receiver.recv().unwrap(), 0x31);
    }

    #[test]
    fn counts_are_kept_by_kind() {
        let live = LiveCounts::default();
        live.add_completed();
        for exit in [io(IoDirection::In, 1, 1), io(IoDirection::Out, 1, 1), VcpuExit::Hlt] {
            live.add((&exit).into());
        }
        let mut other = ExitCounts::default();
        other.add((&io(IoDirection::Out, 1, 1)).into());
        let mut counts = live.exits();
        counts.merge(&other);
        let shown: Vec<_> = counts.iter().collect();
        assert_eq!(shown, [("port reads", 1), ("port writes", 2), ("others", 1)]);
        assert_eq!((counts.total(), live.exits().total(), live.completed()), (4, 3, 1));
    }
}
