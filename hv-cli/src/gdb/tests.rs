//! The server with vCPUs that run scripts, and a debugger that writes packets: what stops, what goes
//! on, and what is left behind.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hv_core::fake::{FakeHost, FakeKvm, FakeVcpu, FakeVm, GuestStep};
use hv_core::{
    Call, Hypervisor, INTERNAL_ERROR_EMULATION, InternalError, IoAddress, Ioctl, Vcpu, VcpuExit, Vm,
};
use hv_memory::{GuestRam, RamLayout, RamMemory};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::{Debugger, GdbAddress, Listener, Server, Setup};
use crate::event::Event;
use crate::exit_code::StopReason;
use crate::machine::stop::Stopper;
use crate::machine::vcpu::{VcpuReport, VcpuThread};

/// Ends what hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Where vCPU 0 begins; vCPU 1 a page later.
const CODE: u64 = 0x1000;

/// A machine of scripted vCPUs with a server.
struct Rig {
    vm: FakeVm,
    kvm: FakeKvm,
    memory: RamMemory,
    stopper: Stopper,
    threads: Vec<JoinHandle<VcpuReport>>,
    server: Server,
    address: GdbAddress,
    _dir: TempDir,
}

const RUNNING: Setup = Setup { wait: false, software_kvm: false };
const WAITING: Setup = Setup { wait: true, software_kvm: false };

impl Rig {
    /// vCPUs that run these scripts and halt then.
    fn new<const N: usize>(setup: Setup, scripts: [Vec<GuestStep>; N]) -> Self {
        let host = (0..).zip(scripts).fold(FakeHost::default(), |host, (id, script)| {
            host.guest(id, script.into_iter().chain([GuestStep::WaitForInterrupt]))
        });
        let kvm = FakeKvm::new(host);
        let vm = kvm.create_vm(0).unwrap();
        vm.create_irqchip().unwrap();
        let ram = Arc::new(GuestRam::new(&RamLayout::new(0x10000, &[], 46).unwrap()).unwrap());
        let memory = ram.memory().clone();
        memory.write_slice(&[0x90; 16], GuestAddress(CODE)).unwrap();
        let vcpus: Vec<FakeVcpu> = (0..N as u32).map(|id| vcpu(&vm, id)).collect();
        let stopper = Stopper::new(Event::new().unwrap());
        let kicks = vcpus.iter().map(Vcpu::kicker);
        let debugger = Debugger::new(kicks, memory.clone(), stopper.clone(), setup).unwrap();
        for vcpu in &vcpus {
            stopper.add_vcpu(vcpu.kicker());
        }
        stopper.add_vcpu(debugger.waker());
        let thread = |vcpu| VcpuThread {
            vcpu,
            outside: Arc::default(),
            ram: ram.clone(),
            stopper: stopper.clone(),
            completer: None,
            debugger: Some(debugger.clone()),
            counts: Arc::default(),
        };
        let threads = vcpus.into_iter().map(|vcpu| thread(vcpu).spawn().unwrap()).collect();
        let dir = TempDir::new().unwrap();
        let address = GdbAddress::Unix(dir.path().join("gdb"));
        let server = Server::start(Listener::bind(&address).unwrap(), debugger).unwrap();
        Self { vm, kvm, memory, stopper, threads, server, address, _dir: dir }
    }

    fn connect(&self) -> Client {
        let GdbAddress::Unix(path) = &self.address else { panic!("{:?}", self.address) };
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client(stream)
    }

    fn bytes(&self, address: u64) -> [u8; 4] {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// How often vCPUs were run.
    fn runs(&self) -> u64 {
        self.kvm.calls().of(Call::Ioctl(Ioctl::Run))
    }

    /// Waits until vCPU 0 has come to its [`mark`].
    fn wait_for_mark(&self) {
        let view = self.vm.view();
        while view.take_seen(0).is_empty() {
            std::thread::yield_now();
        }
    }

    fn stop(self) -> (Option<StopReason>, Vec<VcpuReport>) {
        self.stopper.stop(StopReason::PowerOff);
        let reports = self.threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        self.server.join();
        (self.stopper.reason().cloned(), reports)
    }
}

fn vcpu(vm: &FakeVm, id: u32) -> FakeVcpu {
    let vcpu = vm.create_vcpu(id).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).unwrap();
    let rip = CODE + 0x1000 * u64::from(id);
    vcpu.set_regs(&kvm_regs { rip, rax: 0x11 + u64::from(id), ..Default::default() }).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    vcpu
}

/// A debugger, byte by byte.
struct Client(UnixStream);

impl Client {
    fn send(&mut self, body: &str) {
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0, "${body}#{sum:02x}").unwrap();
    }

    fn byte(&mut self) -> u8 {
        let mut byte = [0];
        self.0.read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// The next packet.
    fn receive(&mut self) -> String {
        let mut packet = String::new();
        loop {
            match self.byte() {
                b'+' if packet.is_empty() => {}
                b'$' => packet.clear(),
                b'#' => {
                    self.0.read_exact(&mut [0; 2]).unwrap();
                    return packet;
                }
                // Run-length encoding: the last character again, that often and 29.
                b'*' => {
                    let (times, last) = (self.byte() - 29, packet.chars().last().unwrap());
                    packet.extend((0..times).map(|_| last));
                }
                byte => packet.push(byte.into()),
            }
        }
    }

    fn ask(&mut self, body: &str) -> String {
        self.send(body);
        self.receive()
    }

    fn is_closed(&mut self) -> bool {
        match self.0.read_to_end(&mut Vec::new()) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

fn debug(exception: u32, dr6: u64) -> GuestStep {
    GuestStep::exit(VcpuExit::Debug { exception, pc: CODE, dr6, dr7: 0 })
}

fn stepped() -> GuestStep {
    debug(1, 0xffff_4ff0)
}

/// KVM can't emulate the instruction.
fn not_emulated() -> GuestStep {
    let error = InternalError { suberror: INTERNAL_ERROR_EMULATION, ndata: 0, data: [0; 16] };
    GuestStep::exit(VcpuExit::InternalError(error))
}

/// A byte that is read from memory is seen: the sign that a script came so far.
fn mark() -> GuestStep {
    GuestStep::read(IoAddress::Mmio(0xfee0_0020), 4)
}

fn halt() -> Vec<GuestStep> {
    Vec::new()
}

#[test]
fn a_debugger_that_comes_stops_all_and_sees_registers_and_memory() {
    let rig = Rig::new(RUNNING, [halt(), halt()]);
    let mut gdb = rig.connect();
    assert!(gdb.ask("qSupported:multiprocess-;swbreak+;hwbreak+").contains("swbreak+"));
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    let runs = rig.runs();
    assert_eq!(gdb.ask("Hg2"), "OK");
    assert!(gdb.ask("g").starts_with("12000000"));
    assert_eq!(gdb.ask("Hg1"), "OK");
    assert!(gdb.ask("g").starts_with("11000000"));
    assert_eq!(gdb.ask("m1000,4"), "90909090");
    assert_eq!(gdb.ask("M1001,2:aabb"), "OK");
    assert_eq!(gdb.ask("m1000,4"), "90aabb90");
    assert_eq!(gdb.ask("mfffe,4"), "0000", "as far as RAM goes");
    assert_eq!(gdb.ask("m10000,4"), "E0e", "EFAULT");
    assert_eq!(gdb.ask("Mffff,2:0102"), "E0e");
    assert_eq!(gdb.ask("Hg9"), "OK");
    assert_eq!(gdb.ask("g"), "E03", "ESRCH: there is no such thread");
    assert_eq!(rig.runs(), runs, "none ran meanwhile");
    rig.stop();
}

#[test]
fn a_software_breakpoint_is_seen_whether_kvm_tells_or_fails_at_it() {
    for exit in [debug(3, 0), not_emulated()] {
        let rig = Rig::new(WAITING, [vec![exit], halt()]);
        let mut gdb = rig.connect();
        assert_eq!(gdb.ask("Z0,1000,1"), "OK");
        assert_eq!(rig.bytes(CODE), [0xcc, 0x90, 0x90, 0x90]);
        assert_eq!(gdb.ask("m1000,2"), "9090", "hidden");
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;");
        assert_eq!(gdb.ask("z0,1000,1"), "OK");
        assert_eq!(rig.bytes(CODE), [0x90; 4]);
        assert_eq!(gdb.ask("D"), "OK");
        assert!(gdb.is_closed());
        let (reason, _) = rig.stop();
        assert_eq!(reason, Some(StopReason::PowerOff));
    }
}

#[test]
fn an_int3_of_the_guest_is_its_own() {
    let rig = Rig::new(WAITING, [vec![debug(3, 0), mark()]]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("Z0,1001,1"), "OK", "elsewhere");
    gdb.send("vCont;c");
    rig.wait_for_mark();
    rig.stop();
}

#[test]
fn a_step_ends_where_kvm_says_or_when_the_access_is_done() {
    let out = GuestStep::write(IoAddress::Pio(0x80), *b"x");
    let rig = Rig::new(WAITING, [vec![stepped(), out, stepped()], halt()]);
    let mut gdb = rig.connect();
    for _ in 0..3 {
        assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    }
    let (_, reports) = rig.stop();
    // Two steps that KVM told, one port write and the kick that ended its run.
    let exits: Vec<_> = reports[0].exits.iter().collect();
    assert_eq!(exits, [("port writes", 1), ("kicks", 1), ("others", 2)]);
    assert_eq!(reports[1].exits.total(), 0, "it was not let go");
}

#[test]
fn others_run_while_one_steps_if_they_are_told_to() {
    let rig = Rig::new(WAITING, [halt(), vec![stepped()]]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("vCont;s:2;c"), "T05thread:02;");
    assert!(gdb.ask("qThreadExtraInfo,1").starts_with(&hex("vCPU 0: ")));
    let (_, reports) = rig.stop();
    assert!(reports[0].exits.total() > 0);
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn hardware_breakpoints_and_watchpoints_are_told_by_dr6() {
    let script = vec![debug(1, 0xffff_0ff1), debug(1, 0xffff_0ff2), debug(1, 0xffff_0ff4)];
    let rig = Rig::new(WAITING, [script]);
    let mut gdb = rig.connect();
    for (packet, answer) in [
        ("Z1,1000,1", "OK"),
        ("Z2,2000,4", "OK"),
        ("Z4,3008,8", "OK"),
        ("Z3,2000,4", ""), // reads alone can't be watched
    ] {
        let told = gdb.ask(packet);
        assert!(told == answer || answer.is_empty() && told.starts_with('E'), "{packet}: {told}");
    }
    assert_eq!(gdb.ask("vCont;c"), "T05thread:01;hwbreak:;");
    assert_eq!(gdb.ask("vCont;c"), "T05thread:01;watch:2000;");
    assert_eq!(gdb.ask("vCont;c"), "T05thread:01;awatch:3008;");
    assert_eq!(gdb.ask("z2,2000,4"), "OK");
    assert!(gdb.ask("z2,2000,4").starts_with('E'));
    rig.stop();
}

#[test]
fn ctrl_c_stops_what_runs() {
    let rig = Rig::new(WAITING, [vec![mark()], halt()]);
    let mut gdb = rig.connect();
    gdb.send("vCont;c");
    rig.wait_for_mark();
    for _ in 0..3 {
        gdb.0.write_all(&[3]).unwrap();
        assert_eq!(gdb.receive(), "T02thread:01;");
        gdb.send("vCont;c");
    }
    // One that comes while nothing runs stops what is let go next.
    gdb.0.write_all(&[3]).unwrap();
    assert_eq!(gdb.receive(), "T02thread:01;");
    gdb.0.write_all(&[3]).unwrap();
    assert_eq!(gdb.ask("vCont;c"), "T02thread:01;");
    rig.stop();
}

#[test]
fn a_guest_that_waits_is_let_go_by_a_debugger_and_by_nothing_else() {
    let rig = Rig::new(WAITING, [vec![mark()]]);
    drop(rig.connect());
    let mut other = rig.connect();
    other.0.write_all(b"GET / HTTP/1.1\r\n\r\n$nonsense#00").unwrap();
    assert!(other.is_closed());
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("m1000,1"), "90");
    assert_eq!(rig.runs(), 0);
    drop(gdb);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    assert_eq!(rig.runs(), 0);
    assert_eq!(gdb.ask("D"), "OK");
    rig.wait_for_mark();
    rig.stop();
}

#[test]
fn a_debugger_that_goes_away_takes_its_breakpoints_and_the_guest_goes_on() {
    let ends: [fn(&mut Client); 6] = [
        |_| {},
        |gdb| assert_eq!(gdb.ask("D"), "OK"),
        |gdb| {
            // Longer than any packet may be.
            let _ = gdb.0.write_all(b"$");
            let _ = gdb.0.write_all(&[b'M'; 1 << 20]);
            assert!(gdb.is_closed());
        },
        |gdb| {
            gdb.0.write_all(b"$g#00").unwrap();
            assert!(gdb.is_closed());
        },
        |gdb| {
            gdb.0.write_all(b"-").unwrap();
            assert!(gdb.is_closed());
        },
        |gdb| gdb.0.write_all(b"$m10").unwrap(),
    ];
    for (n, end) in ends.into_iter().enumerate() {
        let rig = Rig::new(WAITING, [vec![debug(3, 0), mark()], halt()]);
        let mut gdb = rig.connect();
        assert_eq!(gdb.ask("Z0,1000,1"), "OK");
        assert_eq!(gdb.ask("vCont;c"), "T05thread:01;swbreak:;", "end {n}");
        end(&mut gdb);
        drop(gdb);
        rig.wait_for_mark();
        assert_eq!(rig.bytes(CODE), [0x90; 4], "end {n}");
        // And the next one is served.
        assert_eq!(rig.connect().ask("m1000,1"), "90");
        let (reason, _) = rig.stop();
        assert_eq!(reason, Some(StopReason::PowerOff));
    }
}

#[test]
fn a_debugger_that_goes_away_while_the_guest_runs_takes_its_breakpoints() {
    let rig = Rig::new(WAITING, [vec![mark()], halt()]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("Z0,1004,1"), "OK");
    gdb.send("vCont;c");
    rig.wait_for_mark();
    drop(gdb);
    // The next is served after that.
    assert_eq!(rig.connect().ask("m1004,1"), "90");
    assert_eq!(rig.bytes(CODE + 4), [0x90; 4]);
    rig.stop();
}

#[test]
fn a_kill_ends_the_machine_without_its_breakpoints() {
    for packet in ["k", "vKill;1"] {
        let rig = Rig::new(RUNNING, [halt(), halt()]);
        let mut gdb = rig.connect();
        assert_eq!(gdb.ask("Z0,1000,1"), "OK");
        gdb.send(packet);
        assert!(gdb.is_closed());
        for thread in rig.threads {
            thread.join().unwrap();
        }
        rig.server.join();
        assert_eq!(rig.stopper.reason(), Some(&StopReason::Killed));
        let bytes: [u8; 4] = rig.memory.read_obj(GuestAddress(CODE)).unwrap();
        assert_eq!(bytes, [0x90; 4]);
    }
}

#[test]
fn a_machine_that_ends_tells_the_debugger_that_waits() {
    let rig = Rig::new(WAITING, [vec![mark()]]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    gdb.send("vCont;c");
    rig.wait_for_mark();
    rig.stopper.stop(StopReason::Reset);
    assert_eq!(gdb.receive(), "W06");
    assert!(gdb.is_closed());
    rig.stop();
}

#[test]
fn a_machine_that_is_stopped_can_be_ended() {
    let rig = Rig::new(WAITING, [halt(), halt()]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("?"), "T05thread:01;");
    let (reason, _) = rig.stop();
    assert_eq!(reason, Some(StopReason::PowerOff));
    assert!(gdb.is_closed());
    // With nobody there, too.
    Rig::new(WAITING, [halt()]).stop();
}

#[test]
fn a_vcpu_that_can_not_go_on_is_shown_before_the_machine_ends() {
    let rig = Rig::new(WAITING, [vec![GuestStep::exit(VcpuExit::Shutdown)], halt()]);
    let mut gdb = rig.connect();
    assert_eq!(gdb.ask("vCont;c"), "T0bthread:01;");
    assert!(gdb.ask("g").starts_with("11000000"));
    assert_eq!(gdb.ask("vCont;c"), "W0a");
    let (reason, _) = rig.stop();
    assert_eq!(reason, Some(StopReason::TripleFault { vcpu: 0 }));
}

#[test]
fn what_software_kvm_can_not_do_is_refused() {
    let rig = Rig::new(Setup { wait: true, software_kvm: true }, [vec![stepped()]]);
    let mut gdb = rig.connect();
    assert!(gdb.ask("Z2,2000,4").starts_with('E'));
    assert_eq!(gdb.ask("Z0,1000,1"), "OK");
    assert_eq!(gdb.ask("vCont;s:1"), "T05thread:01;");
    rig.stop();
}

#[test]
fn a_breakpoint_needs_memory() {
    let rig = Rig::new(WAITING, [halt()]);
    let mut gdb = rig.connect();
    for packet in ["Z0,10000,1", "Z0,ffffffff81000000,1", "z0,1000,1"] {
        assert!(gdb.ask(packet).starts_with('E'), "{packet}");
    }
    assert_eq!(gdb.ask("Z1,ffffffff81000000,1"), "OK", "a hardware breakpoint does not");
    rig.stop();
}

#[test]
fn hostile_packets_are_answered_or_end_the_session_only() {
    let rig = Rig::new(WAITING, [halt(), halt()]);
    for packet in [
        "m0,ffffffffffffffff",
        "mffffffffffffffff,ffffffffffffffff",
        "m",
        "M0,ffffffff:00",
        "G00",
        "Hg-1",
        "Hg0",
        "vCont;s",
        "vCont;s:-1",
        "vCont;r0,0:1",
        "vCont;t",
        "vCont",
        "vCont;",
        "Z0,0,ffffffffffffffff",
        "Z2,0,ffffffffffffffff",
        "Z2,ffffffffffffffff,8",
        "Z9,0,1",
        "qXfer:features:read:target.xml:ffffffff,ffffffff",
        "qXfer:features:read:/etc/passwd:0,fff",
        "vFile:open:2f6574632f706173737764,0,0",
        "vRun;2f62696e2f7368",
        "vAttach;1",
        "qRcmd,71756974",
        "R00",
        "T99",
        "X0,1:",
        "p0",
        "P0=0",
        "!",
        "",
    ] {
        let mut gdb = rig.connect();
        gdb.send(packet);
        // If it answers at all. Long answers are not read to their end.
        let mut byte = [0];
        let _ = gdb.0.read(&mut byte);
    }
    assert_eq!(rig.connect().ask("m1000,1"), "90", "the server is still there");
    assert!(!rig.stopper.is_stopped());
    rig.stop();
}
