//! The server's thread: waits for a debugger, serves it, and is there for the next.
//!
//! A debugger that goes away, however it does, is as one that detached: its breakpoints are gone and
//! the guest goes on. Only a guest that was never let go still waits.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{self, JoinHandle};

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::breakpoints::WatchKind;
use hv_core::Vcpu;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::debugger::{Debugger, Report, Why};
use super::socket::Listener;
use super::target::{GdbTarget, tid};
use super::wire::Wire;
use crate::exit_code::StopReason;
use crate::isolation::{Kind, Sandbox};
use crate::machine::stop::Stopper;

/// The longest packet, in bytes. gdb is told; a longer one ends the session.
const PACKET: usize = 16 << 10;

/// What the user is told of a step that is not made.
const CAN_NOT_STEP: &str = "hv: this host's KVM can't make steps in user code\n";

/// A thread that serves debuggers until the machine stops.
pub struct Server(JoinHandle<()>);

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start<V: Vcpu + 'static>(listener: Listener, debugger: Debugger<V>) -> io::Result<Self> {
        let sandbox = Sandbox::new(Kind::Debugger, &[])?.removing(listener.address().path());
        let serve = move || {
            sandbox.enter_or_end();
            serve(&listener, &debugger);
        };
        thread::Builder::new().name("gdb".to_owned()).spawn(serve).map(Self)
    }

    /// Waits until it has ended, which it does when the machine has stopped.
    pub fn join(self) {
        // It has no result, and what it served is stopped.
        let _ = self.0.join();
    }
}

fn serve<V: Vcpu>(listener: &Listener, debugger: &Debugger<V>) {
    let stopper = debugger.stopper();
    while !stopper.is_stopped() {
        let mut fds =
            [PollFd::new(listener, PollFlags::IN), PollFd::new(stopper.event(), PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            // Interrupted, or short of memory.
            thread::yield_now();
            continue;
        }
        match listener.accept() {
            Some(socket) => session(Wire::new(socket, stopper.clone()), debugger),
            None => pause(stopper),
        }
    }
}

/// Waits a little, or until the machine stops: one that is there may still not be accepted, for want of
/// descriptors.
fn pause(stopper: &Stopper) {
    let a_little = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
    let _ = poll(&mut [PollFd::new(stopper.event(), PollFlags::IN)], Some(&a_little));
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The debugger said that it goes.
    Detached,
    /// The debugger ends the machine.
    Killed,
    /// The connection is gone, or what came over it made no sense.
    Lost,
    /// The machine has stopped.
    Stopped,
}

/// Serves one debugger, to whatever end.
pub(super) fn session<V: Vcpu>(wire: Wire, debugger: &Debugger<V>) {
    debugger.attach();
    // A bug that a debugger finds must not leave the machine stopped.
    let result = catch_unwind(AssertUnwindSafe(|| Session::new(debugger).run(wire)));
    let end = result.unwrap_or(End::Lost);
    if end != End::Stopped {
        // The breakpoints of a running guest can't be taken away.
        debugger.stop();
        if !wait_until_stopped(debugger) {
            return;
        }
    }
    if end == End::Killed {
        debugger.forget();
        debugger.stopper().stop(StopReason::Killed);
        return;
    }
    if let Err(error) = debugger.detach(end == End::Lost) {
        debugger.stopper().stop(StopReason::Failed { vcpu: vcpu_of(&error), error });
    }
}

fn vcpu_of(error: &hv_core::Error) -> u32 {
    match error.context {
        hv_core::Context::Vcpu(id) => id,
        _ => 0,
    }
}

/// False if the machine stopped before all vCPUs were parked.
fn wait_until_stopped<V: Vcpu>(debugger: &Debugger<V>) -> bool {
    while !debugger.is_stopped() {
        let stopper = debugger.stopper();
        if stopper.is_stopped() {
            return false;
        }
        let mut fds = [
            PollFd::new(debugger.parked(), PollFlags::IN),
            PollFd::new(stopper.event(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(_) => thread::yield_now(),
        }
        debugger.parked().take();
    }
    true
}

type Protocol<'p, V> = GdbStubStateMachine<'p, GdbTarget<V>, Wire>;

struct Session<'a, V: Vcpu> {
    debugger: &'a Debugger<V>,
    target: GdbTarget<V>,
    /// The debugger wants the guest to stop, and has not been told yet that it did.
    interrupt: bool,
}

impl<'a, V: Vcpu> Session<'a, V> {
    fn new(debugger: &'a Debugger<V>) -> Self {
        Self { debugger, target: GdbTarget::new(debugger.clone()), interrupt: false }
    }

    fn run(&mut self, wire: Wire) -> End {
        if !wait_until_stopped(self.debugger) {
            return End::Stopped;
        }
        // One that gdbstub allocates would grow with the packet.
        let mut buffer = vec![0; PACKET];
        let stub = GdbStub::builder(wire).with_packet_buffer(&mut buffer).build();
        let Some(mut gdb) =
            stub.ok().and_then(|stub| stub.run_state_machine(&mut self.target).ok())
        else {
            return End::Lost;
        };
        loop {
            if self.debugger.stopper().is_stopped() {
                self.say_goodbye(gdb);
                return End::Stopped;
            }
            let next = match gdb {
                GdbStubStateMachine::Running(_) if self.debugger.is_stopped() => self.report(gdb),
                GdbStubStateMachine::Disconnected(mut gdb) => {
                    let killed = gdb.get_reason() == DisconnectReason::Kill;
                    let wire = gdb.borrow_conn();
                    if killed {
                        // gdbstub does not answer vKill, and gdb waits for it.
                        let _ = wire.write_all(b"$OK#9a");
                    }
                    let _ = wire.flush();
                    return if killed { End::Killed } else { End::Detached };
                }
                _ => self.wait(gdb),
            };
            match next {
                Ok(next) => gdb = next,
                Err(Lost) => return End::Lost,
            }
        }
    }

    /// Waits for the debugger, or for the guest to stop, and gives gdbstub what came.
    fn wait<'p>(&mut self, mut gdb: Protocol<'p, V>) -> Result<Protocol<'p, V>, Lost> {
        let wire = connection(&mut gdb);
        wire.flush().map_err(|_| Lost)?;
        let mut fds = [
            PollFd::new(&*wire, PollFlags::IN),
            PollFd::new(self.debugger.parked(), PollFlags::IN),
            PollFd::new(self.debugger.stopper().event(), PollFlags::IN),
        ];
        if poll(&mut fds, None).is_err() {
            thread::yield_now();
            return Ok(gdb);
        }
        let [came, parked, _] = fds.map(|fd| !fd.revents().is_empty());
        if parked {
            self.debugger.parked().take();
        }
        if !came {
            return Ok(gdb);
        }
        let mut buffer = [0; 4096];
        let bytes = connection(&mut gdb).read(&mut buffer).map_err(|_| Lost)?;
        for &byte in bytes {
            gdb = self.feed(gdb, byte)?;
        }
        Ok(gdb)
    }

    fn feed<'p>(&mut self, gdb: Protocol<'p, V>, byte: u8) -> Result<Protocol<'p, V>, Lost> {
        let gdb = match gdb {
            GdbStubStateMachine::Idle(gdb) => gdb.incoming_data(&mut self.target, byte),
            GdbStubStateMachine::Running(gdb) => gdb.incoming_data(&mut self.target, byte),
            // What comes after the end is for nobody.
            gdb => return Ok(gdb),
        };
        let mut gdb = gdb.map_err(|_| Lost)?;
        if let GdbStubStateMachine::CtrlCInterrupt(interrupted) = gdb {
            self.interrupt = true;
            // Told when all are parked.
            let told = None::<MultiThreadStopReason<u64>>;
            gdb = interrupted.interrupt_handled(&mut self.target, told).map_err(|_| Lost)?;
        }
        // One that came while nothing ran stops what is let go next.
        if self.interrupt && matches!(gdb, GdbStubStateMachine::Running(_)) {
            self.debugger.stop();
        }
        Ok(gdb)
    }

    /// Tells the debugger that the guest has stopped, and why.
    fn report<'p>(&mut self, mut gdb: Protocol<'p, V>) -> Result<Protocol<'p, V>, Lost> {
        let report = self.debugger.take_report();
        self.interrupt = false;
        if report.is_some_and(|report| report.why == Why::CanNotStep) {
            let packet = console_packet(CAN_NOT_STEP);
            connection(&mut gdb).write_all(packet.as_bytes()).map_err(|_| Lost)?;
        }
        match gdb {
            GdbStubStateMachine::Running(gdb) => {
                gdb.report_stop(&mut self.target, stop_reason(report)).map_err(|_| Lost)
            }
            gdb => Ok(gdb),
        }
    }

    /// The machine has ended: a debugger that waits for it to stop is told, as far as it reads.
    fn say_goodbye(&mut self, gdb: Protocol<'_, V>) {
        let code = self.debugger.stopper().reason().map_or(0, StopReason::exit_code);
        if let GdbStubStateMachine::Running(gdb) = gdb
            && let Ok(mut gdb) =
                gdb.report_stop(&mut self.target, MultiThreadStopReason::Exited(code))
        {
            let _ = connection(&mut gdb).flush();
        }
    }
}

/// The session can't go on.
struct Lost;

fn connection<'b, V: Vcpu>(gdb: &'b mut Protocol<'_, V>) -> &'b mut Wire {
    match gdb {
        GdbStubStateMachine::Idle(gdb) => gdb.borrow_conn(),
        GdbStubStateMachine::Running(gdb) => gdb.borrow_conn(),
        GdbStubStateMachine::CtrlCInterrupt(gdb) => gdb.borrow_conn(),
        GdbStubStateMachine::Disconnected(gdb) => gdb.borrow_conn(),
    }
}

/// Why the guest has stopped, as gdb is told.
fn stop_reason(report: Option<Report>) -> MultiThreadStopReason<u64> {
    let Some(Report { vcpu, why }) = report else {
        return MultiThreadStopReason::SignalWithThread { tid: tid(0), signal: Signal::SIGINT };
    };
    let tid = tid(vcpu);
    let signal = |signal| MultiThreadStopReason::SignalWithThread { tid, signal };
    match why {
        Why::Breakpoint => MultiThreadStopReason::SwBreak(tid),
        Why::Hardware => MultiThreadStopReason::HwBreak(tid),
        Why::Watch { address, access } => {
            let kind = if access { WatchKind::ReadWrite } else { WatchKind::Write };
            MultiThreadStopReason::Watch { tid, kind, addr: address }
        }
        Why::Stepped => signal(Signal::SIGTRAP),
        Why::CanNotStep => signal(Signal::SIGILL),
        Why::Crashed => signal(Signal::SIGSEGV),
    }
}

/// A packet of text that gdb shows.
fn console_packet(text: &str) -> String {
    let mut body = String::from("O");
    for byte in text.bytes() {
        body.push_str(&format!("{byte:02x}"));
    }
    let sum = body.bytes().fold(0u8, u8::wrapping_add);
    format!("${body}#{sum:02x}")
}
