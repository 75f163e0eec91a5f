//! Memory is plugged and unplugged, and split and joined, under a guest that runs all the time and writes
//! to it. Needs `/dev/kvm`:
//!
//! ```text
//! cargo run -p hv-cli --example memory_hotplug_kvm
//! ```
//!
//! What only comes or goes needs no pause. A slot that is split is away for a moment: its plan can't
//! be committed without something that says that no vCPU runs, here [`Paused`].

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hv_core::{
    Capability, HostMemory as _, HostRange, Hypervisor, MemoryBackend, Vcpu, VcpuExit, VcpuKick, Vm,
};
use hv_kvm::{Kvm, KvmKick, KvmVcpu};
use hv_memory::{AddressMap, LiveMap, Mapping, NewRegion, Plan, SlotRules, VcpusPaused, page_size};
use kvm_bindings::kvm_regs;
use vm_memory::GuestAddress;

/// Counts, and writes where it is to two places in its memory and one where none is at first.
const CODE: &[u8] = &[
    0xb8, 0x00, 0x80, //             mov ax, 0x8000
    0x8e, 0xc0, //                   mov es, ax
    0x31, 0xc9, //                   xor cx, cx
    0x41, //                   next: inc cx
    0x89, 0x0e, 0x00, 0x70, //       mov [0x7000], cx
    0x89, 0x0e, 0x00, 0x90, //       mov [0x9000], cx
    0x26, 0x89, 0x0e, 0x00, 0x00, // mov es:[0], cx
    0xeb, 0xf0, //                   jmp next
];

const CODE_AT: u64 = 0x1000;
const RAM: u64 = 0x1_0000;
const DIMM_AT: GuestAddress = GuestAddress(0x8_0000);

/// How long what must happen may take on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the vCPU's thread and those who want it to stop have in common.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Writes of the guest that came here because no memory was where the DIMM is to be.
    exits: AtomicU64,
}

#[derive(Default)]
struct State {
    pause: bool,
    paused: bool,
    end: bool,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Between two runs of the vCPU: waits as long as it is to be paused. Whether it goes on.
    fn pass(&self) -> bool {
        let mut state = self.state();
        while state.pause && !state.end {
            state.paused = true;
            self.changed.notify_all();
            state = self.wait(state);
        }
        state.paused = false;
        !state.end
    }

    /// Returns when the vCPU has stopped, and keeps it stopped.
    fn pause(&self, kick: &KvmKick) -> Result<Paused<'_>, hv_core::Error> {
        let mut state = self.state();
        state.pause = true;
        kick.kick()?;
        while !state.paused && !state.end {
            state = self.wait(state);
        }
        Ok(Paused(self))
    }

    fn end(&self) {
        self.state().end = true;
        self.changed.notify_all();
    }
}

/// The vCPU is stopped for as long as this lives.
struct Paused<'a>(&'a Gate);
impl VcpusPaused for Paused<'_> {}

/// There is none that could run.
struct NoVcpus;
impl VcpusPaused for NoVcpus {}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.pause, state.paused) = (false, false);
        self.0.changed.notify_all();
    }
}

/// Runs the guest until the end.
fn run(vcpu: &mut KvmVcpu, gate: &Gate) -> Result<(), String> {
    while gate.pass() {
        match vcpu.run().map_err(|error| error.to_string())? {
            VcpuExit::Mmio(exit) if exit.address == DIMM_AT.0 => {
                gate.exits.fetch_add(1, Ordering::Relaxed);
            }
            VcpuExit::Interrupted => {}
            exit => return Err(format!("memory that stays was away: {exit:?}")),
        }
    }
    Ok(())
}

/// The number the guest wrote last.
fn number(memory: &Mapping, offset: usize) -> u16 {
    let byte = |n: usize| memory.bytes().get(offset + n).map_or(0, |b| b.load(Ordering::Relaxed));
    u16::from_le_bytes([byte(0), byte(1)])
}

fn wait_for(what: &str, gate: &Gate, mut happened: impl FnMut() -> bool) -> Result<(), String> {
    let start = Instant::now();
    while !happened() {
        if gate.state().end || start.elapsed() > PATIENCE {
            return Err(format!("{what} did not happen"));
        }
        thread::yield_now();
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::open("/dev/kvm")?;
    kvm.install_kick()?;
    let vm = Arc::new(kvm.create_vm(0)?);
    vm.set_tss_addr(0xfffb_d000)?;
    let slots = u32::try_from(vm.check_extension(Capability::NrMemslots)?)?;
    let rules = SlotRules { slots, joins: true, readonly: true };
    let mut memory = LiveMap::adopt(vm.clone(), AddressMap::new(36), rules)?;

    let ram = Arc::new(Mapping::anonymous(RAM)?);
    let at = usize::try_from(CODE_AT)?;
    for (to, from) in ram.bytes().iter().skip(at).zip(CODE) {
        to.store(*from, Ordering::Relaxed);
    }
    let host = HostRange::new(ram.clone(), 0, usize::try_from(RAM)?).ok_or("no such range")?;
    let region = NewRegion::ram("RAM", host).at(GuestAddress(0), 0);
    // No vCPU is there yet that could run.
    memory.edit(|edit| edit.add(region))?.commit(|_| NoVcpus)?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE_AT, rflags: 2, ..Default::default() })?;
    let (gate, kick) = (Gate::default(), vcpu.kicker());

    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let ran = run(&mut vcpu, &gate);
            gate.end();
            ran
        });
        let done = change(&mut memory, &ram, &gate, &kick);
        gate.end();
        kick.kick()?;
        guest.join().map_err(|_| "the vCPU's thread panicked")??;
        done
    })
}

/// Changes the memory of the running guest.
fn change<M: MemoryBackend>(
    memory: &mut LiveMap<M>,
    ram: &Mapping,
    gate: &Gate,
    kick: &KvmKick,
) -> Result<(), Box<dyn Error>> {
    let exits = || gate.exits.load(Ordering::Relaxed);
    wait_for("a write to where no memory is", gate, || exits() > 10)?;
    println!("no DIMM: what the guest writes there comes to the VMM");

    for round in 1..=10 {
        let bytes = 4 * page_size();
        let dimm = Arc::new(Mapping::anonymous(bytes)?);
        let host =
            HostRange::new(dimm.clone(), 0, usize::try_from(bytes)?).ok_or("no such range")?;
        let region = NewRegion::ram("DIMM", host).at(DIMM_AT, 0);
        let id = match memory.edit(|edit| edit.add(region))? {
            Plan::Running(plan) => plan.commit()?,
            Plan::Paused(_) => return Err("a DIMM takes nothing away".into()),
        };
        wait_for("a write to the DIMM", gate, || number(&dimm, 0) != 0)?;

        // RAM is split around a device the guest does not use, and joined again.
        let splits = 20;
        for _ in 0..splits {
            let device = NewRegion::mmio("device", page_size()).at(GuestAddress(0x5000), 1);
            let device = commit(memory.edit(|edit| edit.add(device))?, gate, kick)?;
            commit(memory.edit(|edit| edit.remove(device))?, gate, kick)?;
        }
        let before = number(ram, 0x7000);
        wait_for("the guest's progress", gate, || number(ram, 0x7000) != before)?;

        let before = exits();
        match memory.edit(|edit| edit.remove(id))? {
            Plan::Running(plan) => plan.commit()?,
            Plan::Paused(_) => return Err("what goes for good does not stay".into()),
        }
        let last = number(&dimm, 0);
        wait_for("a write to where the DIMM was", gate, || exits() > before)?;
        if number(&dimm, 0) != last || Arc::strong_count(&dimm) != 1 {
            return Err("the guest still has a DIMM that was unplugged".into());
        }
        println!(
            "round {round}: plugged, {splits} times split and joined, unplugged when the guest was at \
             {last:#x}"
        );
    }
    Ok(())
}

/// Commits a change that takes memory away for a moment.
fn commit<M: MemoryBackend, R>(
    plan: Plan<'_, M, R>,
    gate: &Gate,
    kick: &KvmKick,
) -> Result<R, Box<dyn Error>> {
    match plan {
        Plan::Running(_) => Err("splitting and joining takes memory away for a moment".into()),
        Plan::Paused(plan) => {
            let paused = gate.pause(kick)?;
            Ok(plan.commit(&paused)?)
        }
    }
}
