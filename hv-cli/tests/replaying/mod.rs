//! Builds and runs a machine on a transcript instead of a KVM, and records what it does.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::io::{Cursor, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use hv_cli::config::{
    IrqchipMode, KernelConfig, MemoryBacking, MemorySize, RunConfig, VirtioConfig,
};
use hv_cli::console::Console;
use hv_cli::guest::Report;
use hv_cli::isolation::SeccompMode;
use hv_cli::loader::Format;
use hv_cli::machine::host::HostFacts;
use hv_cli::machine::{Machine, Outcome};
use hv_cli::observe::recorded_host;
use hv_core::DeviceChoice;
use hv_core::layer::{Interceptor, Layered, Record, Replay};
use rustix::event::{PollFd, PollFlags, poll};

/// What `hv run --json` is asked for with these options: the built-in guest.
pub(crate) fn built_in(cpus: u32, irqchip: IrqchipMode) -> RunConfig {
    RunConfig {
        kvm: DeviceChoice::default(),
        kernel: None,
        cpus,
        memory: MemorySize(128 << 20),
        backing: MemoryBacking::default(),
        irqchip,
        devices: Vec::new(),
        virtio: VirtioConfig::default(),
        complete: true,
        json: true,
        trace: None,
        record: None,
        stats_json: None,
        gdb: None,
        seccomp: SeccompMode::Off,
        api_socket: None,
    }
}

/// The same with a kernel.
pub(crate) fn with_kernel(path: PathBuf, cpus: u32) -> RunConfig {
    let kernel = KernelConfig { path, format: Format::Auto, initrd: None, cmdline: None };
    RunConfig { kernel: Some(kernel), json: false, ..built_in(cpus, IrqchipMode::Kernel) }
}

/// A writer whose bytes can be had.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A transcript that is replayed, and what is recorded of that.
pub(crate) struct Replaying {
    replay: Replay,
    /// The host it was recorded on.
    host: HostFacts,
    transcript: Vec<u8>,
    record: Record,
    recorded: Memory,
}

/// How the run of a replay ended.
pub(crate) struct Replayed {
    pub(crate) outcome: Outcome,
    /// The results of the built-in guest.
    pub(crate) report: Option<Report>,
}

impl Replaying {
    pub(crate) fn new(transcript: &[u8]) -> Self {
        let replay = Replay::new(Cursor::new(transcript.to_vec())).unwrap();
        let host = recorded_host(replay.meta()).unwrap();
        let recorded = Memory::default();
        let record = Record::of_replay(recorded.clone(), &replay);
        Self { replay, host, transcript: transcript.to_vec(), record, recorded }
    }

    /// The machine, built as on the host of the transcript.
    pub(crate) fn build(&self, config: &RunConfig) -> Machine<Layered<Replay, Record>> {
        let open = |_: &DeviceChoice| Ok(self.record.over(self.replay.clone()));
        Machine::build(open, config, &self.host).unwrap_or_else(|error| {
            match self.replay.finish() {
                Err(difference) => panic!("{error}:\n{difference}"),
                Ok(()) => panic!("{error}"),
            }
        })
    }

    /// Runs the machine to its end.
    pub(crate) fn run(&self, config: &RunConfig) -> Replayed {
        let machine = self.build(config);
        let checks = machine.checks().cloned();
        let outcome = machine.run(|console| {
            wait_for_the_end(console);
            Ok(())
        });
        let report = checks.map(|checks| checks.report());
        Replayed { outcome: outcome.unwrap(), report }
    }

    /// Fails unless all of the transcript was replayed and what was recorded of that is the
    /// transcript, byte for byte.
    pub(crate) fn assert_same(&self) {
        if let Err(difference) = self.replay.finish() {
            panic!("{difference}");
        }
        self.record.finish().unwrap();
        let recorded = self.recorded.0.lock().unwrap();
        let (expected, actual) = (text(&self.transcript), text(&recorded));
        let mut lines = expected.lines().zip(actual.lines()).zip(1..);
        if let Some(((expected, actual), number)) = lines.find(|((a, b), _)| a != b) {
            panic!("line {number}\nexpected: {expected}\nactual:   {actual}");
        }
        assert_eq!(recorded.len(), self.transcript.len(), "one is the beginning of the other");
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// The main thread's work, without signals and a terminal. Only the end of the machine ends it: a
/// replay that is stuck is a failed call, which stops the machine.
fn wait_for_the_end(console: &Console) {
    let stopped = console.stopper.event();
    while !console.stopper.is_stopped() {
        poll(&mut [PollFd::new(stopped, PollFlags::IN)], None).unwrap();
    }
}
