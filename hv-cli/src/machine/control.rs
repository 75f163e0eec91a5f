//! What the API asks of a machine, answered by what the machine is made of.
//!
//! It is made of shares and never has a machine: that runs and ends without it. vCPUs are stopped as for
//! a debugger; see [`crate::gdb::Debugger`].

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hv_core::{Error, Vcpu};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_dtable, kvm_segment,
};

use super::devices::DeviceCounting;
use super::exits::{ExitCounts, LiveCounts, Outside};
use super::stop::Stopper;
use crate::api::{
    ApiError, Balloon, Control, Descriptor, General, Info, PowerButton, Registers, Segment,
    Segments, State, System,
};
use crate::devices::Button;
use crate::exit_code::StopReason;
use crate::gdb::Debugger;
use crate::stats::Stats;
use crate::virtio::{BALLOON_PAGE, BalloonTarget};

/// How long vCPUs may take to stop. One that waits for nobody takes microseconds; one that does not come
/// is kept by a device.
const TO_STOP: Duration = Duration::from_secs(3);

/// What is counted while a machine runs.
pub(super) struct Counting {
    pub(super) vcpus: Vec<Arc<LiveCounts>>,
    pub(super) outside: Arc<Outside>,
    pub(super) lost_output: Arc<AtomicU64>,
    pub(super) devices: DeviceCounting,
}

impl Counting {
    fn stats(&self) -> Stats<'static> {
        let mut exits = ExitCounts::default();
        for vcpu in &self.vcpus {
            exits.merge(&vcpu.exits());
        }
        Stats {
            reason: None,
            exits: exits.iter().collect(),
            unclaimed: self.outside.ports.unclaimed() + self.outside.memory.unclaimed(),
            completed: self.vcpus.iter().map(|vcpu| vcpu.completed()).sum(),
            lost_output: self.lost_output.load(Ordering::Relaxed),
            refused_bars: self.devices.refused_bars(),
            devices: Cow::Owned(self.devices.stats()),
        }
    }
}

/// A machine from outside.
pub(super) struct MachineControl<V: Vcpu> {
    pub(super) debugger: Debugger<V>,
    pub(super) stopper: Stopper,
    pub(super) button: Button,
    pub(super) counting: Counting,
    pub(super) memory: u64,
    pub(super) balloon: Option<BalloonTarget>,
    pub(super) made: Instant,
}

impl<V: Vcpu> Control for MachineControl<V> {
    fn info(&self) -> Info {
        let state = if self.stopper.is_stopped() {
            State::Stopping
        } else if self.debugger.is_paused() {
            State::Paused
        } else {
            State::Running
        };
        Info {
            state,
            held_by_debugger: self.debugger.is_held_by_debugger(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpus: self.counting.vcpus.len() as u32,
            memory: self.memory,
            pid: std::process::id(),
            uptime_ms: self.made.elapsed().as_millis() as u64,
        }
    }

    fn pause(&self) -> Result<(), ApiError> {
        Ok(self.debugger.pause(TO_STOP)?)
    }

    fn resume(&self) {
        self.debugger.unpause();
    }

    fn stats(&self) -> Stats<'static> {
        self.counting.stats()
    }

    fn power_button(&self) -> PowerButton {
        PowerButton { enabled: self.button.press() }
    }

    fn stop(&self) {
        self.stopper.stop(StopReason::Requested);
    }

    fn registers(&self, vcpu: usize) -> Result<Registers, ApiError> {
        Ok(self.debugger.look(vcpu, TO_STOP, |it| registers(it))??)
    }

    fn balloon(&self) -> Result<Balloon, ApiError> {
        let balloon = self.balloon.as_ref().ok_or(ApiError::NoBalloon)?;
        balloon.ask_statistics();
        Ok(shown(balloon))
    }

    fn set_balloon(&self, target: u64) -> Result<Balloon, ApiError> {
        let balloon = self.balloon.as_ref().ok_or(ApiError::NoBalloon)?;
        let too_large = || ApiError::BalloonTooLarge { target, memory: self.memory };
        if target > self.memory {
            return Err(too_large());
        }
        balloon.set_pages(u32::try_from(target / BALLOON_PAGE).map_err(|_| too_large())?);
        Ok(shown(balloon))
    }
}

fn shown(balloon: &BalloonTarget) -> Balloon {
    let bytes = |pages: u32| u64::from(pages) * BALLOON_PAGE;
    let statistics = balloon.statistics();
    Balloon {
        target: bytes(balloon.pages()),
        actual: bytes(balloon.actual()),
        given_back: balloon.given_back(),
        statistics: statistics.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    }
}

fn registers<V: Vcpu>(vcpu: &V) -> Result<Registers, Error> {
    let (r, s) = (vcpu.regs()?, vcpu.sregs()?);
    let activity = match vcpu.mp_state()?.mp_state {
        KVM_MP_STATE_RUNNABLE => "runnable".to_owned(),
        KVM_MP_STATE_HALTED => "halted".to_owned(),
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
            "not started".to_owned()
        }
        other => format!("KVM_MP_STATE {other}"),
    };
    let general = General {
        rip: hex(r.rip),
        rflags: hex(r.rflags),
        rax: hex(r.rax),
        rbx: hex(r.rbx),
        rcx: hex(r.rcx),
        rdx: hex(r.rdx),
        rsi: hex(r.rsi),
        rdi: hex(r.rdi),
        rbp: hex(r.rbp),
        rsp: hex(r.rsp),
        r8: hex(r.r8),
        r9: hex(r.r9),
        r10: hex(r.r10),
        r11: hex(r.r11),
        r12: hex(r.r12),
        r13: hex(r.r13),
        r14: hex(r.r14),
        r15: hex(r.r15),
    };
    let segments = Segments {
        cs: segment(&s.cs),
        ds: segment(&s.ds),
        es: segment(&s.es),
        fs: segment(&s.fs),
        gs: segment(&s.gs),
        ss: segment(&s.ss),
        tr: segment(&s.tr),
        ldt: segment(&s.ldt),
    };
    let system = System {
        cr0: hex(s.cr0),
        cr2: hex(s.cr2),
        cr3: hex(s.cr3),
        cr4: hex(s.cr4),
        cr8: hex(s.cr8),
        efer: hex(s.efer),
        apic_base: hex(s.apic_base),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
    };
    Ok(Registers { vcpu: vcpu.id() as usize, activity, general, segments, system })
}

fn hex(value: impl Into<u64>) -> String {
    format!("{:#x}", value.into())
}

fn segment(segment: &kvm_segment) -> Segment {
    Segment {
        selector: hex(segment.selector),
        base: hex(segment.base),
        limit: hex(segment.limit),
        r#type: segment.type_,
        dpl: segment.dpl,
        present: segment.present != 0,
        long: segment.l != 0,
        default_32: segment.db != 0,
    }
}

fn table(table: &kvm_dtable) -> Descriptor {
    Descriptor { base: hex(table.base), limit: hex(table.limit) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{IrqLines, PowerControl};
    use crate::event::Event;
    use crate::gdb::{HoldError, Setup};
    use crate::machine::exits::ExitKind;
    use hv_core::mock::{MockVcpu, MockVcpuKick};
    use hv_core::{Errno, Ioctl};
    use hv_memory::RamMemory;
    use kvm_bindings::{kvm_mp_state, kvm_regs, kvm_sregs};
    use vm_memory::GuestAddress;

    struct NoLine;

    impl IrqLines for NoLine {
        fn set(&mut self, _gsi: u32, _level: bool) {}
    }

    /// A machine whose vCPUs have no threads.
    fn control(vcpus: usize) -> MachineControl<MockVcpu> {
        let stopper = Stopper::new(Event::new().unwrap());
        let memory = RamMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let kicks = (0..vcpus).map(|_| MockVcpuKick::new());
        let setup = Setup { wait: false, software_kvm: false };
        let debugger = Debugger::new(kicks, memory, stopper.clone(), setup).unwrap();
        MachineControl {
            debugger,
            button: PowerControl::new(stopper.clone(), Box::new(NoLine)).button(),
            stopper,
            counting: Counting {
                vcpus: (0..vcpus).map(|_| Arc::default()).collect(),
                outside: Arc::default(),
                lost_output: Arc::new(7.into()),
                devices: DeviceCounting::default(),
            },
            memory: 0x1000,
            balloon: None,
            made: Instant::now(),
        }
    }

    #[test]
    fn the_state_is_what_was_asked_for_last_until_it_stops() {
        let control = control(0);
        assert_eq!(control.info().state, State::Running);
        control.pause().unwrap();
        assert_eq!(control.info().state, State::Paused);
        control.resume();
        assert_eq!(control.info().state, State::Running);
        control.stop();
        let info = control.info();
        assert_eq!((info.state, info.cpus, info.memory), (State::Stopping, 0, 0x1000));
        assert_eq!(control.stopper.reason(), Some(&StopReason::Requested));
        assert_eq!(control.pause(), Err(HoldError::Stopping.into()));
    }

    #[test]
    fn a_machine_without_a_balloon_says_so() {
        let control = control(0);
        assert_eq!(control.balloon(), Err(ApiError::NoBalloon));
        assert_eq!(control.set_balloon(0), Err(ApiError::NoBalloon));
    }

    #[test]
    fn stats_are_the_sum_of_all_vcpus_while_they_run() {
        let control = control(2);
        for vcpu in &control.counting.vcpus {
            vcpu.add(ExitKind::PortOut);
            vcpu.add_completed();
        }
        control.counting.vcpus[1].add(ExitKind::Interrupted);
        let stats = serde_json::to_value(control.stats()).unwrap();
        assert_eq!(stats["exits"], serde_json::json!({"port writes": 2, "kicks": 1}));
        assert_eq!((&stats["completed"], &stats["lost-output"]), (&2.into(), &7.into()));
        assert!(stats["reason"].is_null());
    }

    #[test]
    fn registers_are_hexadecimal_and_what_kvm_refuses_is_an_error() {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_id().return_const(3u32);
        vcpu.expect_regs()
            .returning(|| Ok(kvm_regs { rip: u64::MAX, r15: 0x1f, ..Default::default() }));
        vcpu.expect_sregs().returning(|| {
            let mut sregs = kvm_sregs { cr0: 0x11, ..Default::default() };
            sregs.cs = kvm_segment { selector: 8, limit: 0xf_ffff, l: 1, ..Default::default() };
            sregs.idt.limit = 0x3ff;
            Ok(sregs)
        });
        vcpu.expect_mp_state()
            .once()
            .returning(|| Ok(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }));
        let error = Error::new(Ioctl::GetMpState, Errno::EIO);
        vcpu.expect_mp_state().once().returning(move || Err(error));
        let it = registers(&vcpu).unwrap();
        assert_eq!((it.vcpu, it.activity.as_str()), (3, "halted"));
        assert_eq!(it.general.rip, "0xffffffffffffffff");
        assert_eq!((it.general.r15.as_str(), it.system.cr0.as_str()), ("0x1f", "0x11"));
        assert_eq!((it.segments.cs.limit.as_str(), it.segments.cs.long), ("0xfffff", true));
        assert_eq!(it.system.idt.limit, "0x3ff");
        assert_eq!(registers(&vcpu), Err(error));
    }
}
