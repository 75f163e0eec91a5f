//! The command line: what `hv` understands, and how each command ends in an exit code.
//!
//! Only words are handled here; what they do is elsewhere.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use hv_core::DeviceChoice;

use crate::config::{
    ConsoleChoice, DeviceOption, DiskConfig, GdbConfig, HugePagesOption, IrqchipMode, KernelConfig,
    MemoryBacking, MemorySize, NetConfig, RunConfig, VirtioConfig, VsockConfig,
};
use crate::config_file::{self, Complete, ExpandError, Expanded, Vocabulary};
use crate::exit_code::ExitCode;
use crate::gdb::GdbAddress;
use crate::isolation::SeccompMode;
use crate::loader::Format;
use crate::output::{self, OutputError, printable};
use crate::{ctl, doctor, probe, run};

const EXIT_CODES: &str = "\
Exit codes:
  0   the guest powered off, or all checks of the built-in guest passed
  2   the command line, an image or another input can't be used
  4   the VM could not be made or kept running, or a trace or recording not written
  6   the guest asked for a reset
  8   the guest failed: a failed check, or a crash it reported
  10  triple fault
  12  KVM could not go on: internal error, failed entry, unknown exit
  14  ended by Ctrl-A x, by a debugger, by the API, or by a signal while the guest ran
  16  a thread of hv made a system call that its seccomp filter does not allow
  odd the guest wrote v to isa-debug-exit: (v << 1) | 1";

const CTL_EXIT_CODES: &str = "\
Exit codes:
  0   done
  2   the command line can't be used, or the machine says that what it asks for can't be
  4   the machine was not reached, did not answer or can't do it now";

const EXAMPLES: &str = "\
Examples:
  hv run                                  check this host with the built-in guest
  hv run --kernel vmlinux --initrd initramfs.cpio --cpus 2 --memory 512M
  hv run --kernel bzImage --cmdline 'console=ttyS0 panic=-1'
  hv run --kernel test.flat --format multiboot --device isa-debug-exit --device testdev
  hv run --memory 2G --hugepages thp --prefault
  hv run --kernel vmlinux --disk root.img --disk data.img,readonly --cmdline 'root=/dev/vda'
  hv run --kernel vmlinux --rng --stats-json stats.json
  hv run --kernel vmlinux --initrd initramfs.cpio --net user
  hv run --kernel vmlinux --initrd initramfs.cpio --console hvc0
  hv run --kernel vmlinux --vsock cid=3,uds=vm.vsock
  hv run --kernel vmlinux --memory 1G --balloon 256M
  hv run --trace calls.jsonl              what is asked of KVM, and how long it takes
  hv run --record run.jsonl               the same run again without KVM: for replay in tests
  hv run --kernel vmlinux --gdb unix:vm.gdb --gdb-wait
                                          then: gdb vmlinux -ex 'target remote vm.gdb'
  hv run --kernel vmlinux --api-socket vm.sock
                                          then: hv ctl --socket vm.sock pause
  hv run --config vm.toml --memory 1G     flags from a file, one of them changed
  hv config print --cpus 4 >vm.toml       such a file, with everything in it
  hv doctor                               why VMs can't run here, and what to do

In a VM: Ctrl-A x ends it, Ctrl-A h shows the keys.";

/// A virtual machine monitor on KVM.
#[derive(Debug, Parser)]
#[command(name = "hv", version, about, after_help = EXAMPLES, after_long_help = help_tail())]
#[command(max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

fn help_tail() -> String {
    format!("{EXAMPLES}\n\n{EXIT_CODES}")
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a virtual machine: the built-in guest, or the kernel given
    #[command(after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
    /// Check or show the configuration of a machine
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Show what this host's KVM can do
    Probe(ProbeArgs),
    /// Say whether VMs can run here, and if not, why and what to do
    Doctor(ProbeArgs),
    /// Control a machine that runs with --api-socket
    #[command(after_help = CTL_EXIT_CODES)]
    Ctl(CtlArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Kernel to boot: bzImage, ELF (Linux or PVH), multiboot 1 or a flat binary.
    /// Without it, the built-in guest checks the machine from inside
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk (for multiboot, the module)
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Kernel command line [default for Linux: reboot=k panic=-1 and console=ttyS0,
    /// or console=hvc0 with --console hvc0]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    cmdline: Option<String>,

    /// What the kernel is
    #[arg(long, value_enum, default_value_t, requires = "kernel")]
    format: Format,

    /// Processors [default: 1; built-in guest: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,

    /// RAM, in MiB or with a unit: K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    memory: MemorySize,

    /// Keep RAM in FILE, which must be at least as long, and which nobody may shorten. What is in it
    /// is what RAM holds at first, and what the guest leaves
    #[arg(long, value_name = "FILE")]
    memory_file: Option<PathBuf>,

    /// Use huge pages for RAM
    #[arg(long, value_enum, value_name = "KIND", ignore_case = true)]
    hugepages: Option<HugePagesOption>,

    /// Give RAM all of its pages before the guest starts
    #[arg(long)]
    prefault: bool,

    /// Where the interrupt controllers are
    #[arg(long, value_enum, default_value_t)]
    irqchip: IrqchipMode,

    /// A further device: isa-debug-exit[,iobase=0xf4] or testdev
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<DeviceOption>,

    #[command(flatten)]
    virtio: VirtioArgs,

    /// Don't complete instructions that KVM can't emulate
    #[arg(long)]
    no_complete: bool,

    /// The built-in guest's results as JSON
    #[arg(long, conflicts_with = "kernel")]
    json: bool,

    /// Write every call to KVM into FILE when it returns, a line of JSON each: arguments, result,
    /// duration
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Record all calls to KVM and their results into FILE, to be replayed without KVM (see
    /// hv_core::layer). Guest memory is not recorded
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// Write what was counted into FILE at the end, as JSON: exits, and what each virtio device did
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,

    /// Let gdb debug the guest: its processors are threads. Connect with `target remote PATH` or
    /// `target remote 127.0.0.1:PORT`. Without a time limit for the built-in guest
    #[arg(long, value_name = "unix:PATH|tcp:127.0.0.1:PORT", conflicts_with = "record")]
    gdb: Option<GdbAddress>,

    /// Execute no instruction before a debugger continues or detaches
    #[arg(long, requires = "gdb")]
    gdb_wait: bool,

    /// What happens when a thread of hv makes a system call it has no need of
    #[arg(long, value_enum, default_value_t)]
    seccomp: SeccompMode,

    /// Let programs and `hv ctl` control the machine: JSON over HTTP on a unix socket. The built-in
    /// guest has no time limit with it
    #[arg(long, value_name = "PATH", conflicts_with = "record")]
    api_socket: Option<PathBuf>,

    #[command(flatten)]
    kvm: KvmArg,
}

/// virtio devices, on a PCI bus that a machine without any does not have.
#[derive(Debug, Args)]
#[command(next_help_heading = "virtio devices")]
struct VirtioArgs {
    /// An entropy device: random numbers of the host
    #[arg(long)]
    rng: bool,

    /// A disk with the contents of FILE (raw); may be given several times. FILE is followed by any of:
    /// ,readonly  ,serial=TEXT (20 characters)  ,queues=N  ,cache=writeback (what the guest has flushed
    /// is safe; the default) or ,cache=writethrough (what it has written is safe)
    /// ,device (FILE may be a block device)  ,format=raw (whatever it looks like)
    /// ,io=auto|uring|sync (io_uring or system calls).
    /// A comma in FILE is written ,,
    #[arg(long = "disk", value_name = "FILE[,PROPERTY]...")]
    disks: Vec<DiskConfig>,

    /// A network device, connected to a tap interface, to what descriptor N is (a tap interface or a
    /// socket), or through passt, which needs no privileges. May be given several times
    #[arg(long = "net", value_name = "tap=NAME|fd=N|user[,mac=ADDRESS][,queues=N]")]
    nets: Vec<NetConfig>,

    /// Which device has the terminal
    #[arg(long, value_enum, default_value_t, requires = "kernel")]
    console: ConsoleChoice,

    /// Streams between the guest, whose address (CID) is N, and the host. Connect to the unix socket
    /// PATH and write CONNECT and a port of the guest; what the guest connects to, port P of CID 2, is
    /// the socket PATH_P
    #[arg(long, value_name = "cid=N,uds=PATH")]
    vsock: Option<VsockConfig>,

    /// A memory balloon, which the guest is asked to fill with SIZE of its memory (without SIZE: nothing).
    /// What is in it, and what the guest reports as free, is given back to the host
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "0")]
    balloon: Option<MemorySize>,
}

impl VirtioArgs {
    fn into_config(self) -> VirtioConfig {
        VirtioConfig {
            rng: self.rng,
            console: self.console,
            disks: self.disks,
            nets: self.nets,
            vsock: self.vsock,
            balloon: self.balloon,
        }
    }
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say whether a file can be given to `hv run --config`. The files it names are not looked at
    Check {
        /// The file
        file: PathBuf,
    },
    /// Show the complete configuration, as TOML that --config takes, after defaults: that of a file, of
    /// flags of hv run, or of both together
    Print {
        /// A configuration file
        file: Option<PathBuf>,

        /// Output for programs
        // Not the flag of `hv run` with this name.
        #[arg(long = "json")]
        as_json: bool,
    },
}

#[derive(Debug, Args)]
struct CtlArgs {
    /// The socket of the machine: the path of its --api-socket
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// The answer as JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    request: ctl::Request,
}

#[derive(Debug, Args)]
struct ProbeArgs {
    /// Output for programs
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    kvm: KvmArg,
}

#[derive(Debug, Args)]
struct KvmArg {
    /// KVM device node, or fd:N for one that is already open
    #[arg(long = "kvm", value_name = "PATH|fd:N", default_value_t)]
    device: DeviceChoice,
}

impl RunArgs {
    fn into_config(self) -> RunConfig {
        let kernel = self.kernel.map(|path| KernelConfig {
            path,
            format: self.format,
            initrd: self.initrd,
            cmdline: self.cmdline,
        });
        // The built-in guest has a check that needs a second processor.
        let default_cpus = if kernel.is_some() { 1 } else { 2 };
        RunConfig {
            kvm: self.kvm.device,
            cpus: self.cpus.unwrap_or(default_cpus),
            memory: self.memory,
            backing: MemoryBacking {
                file: self.memory_file,
                huge_pages: self.hugepages,
                prefault: self.prefault,
            },
            irqchip: self.irqchip,
            devices: self.devices,
            virtio: self.virtio.into_config(),
            complete: !self.no_complete,
            json: self.json,
            trace: self.trace,
            record: self.record,
            stats_json: self.stats_json,
            gdb: self.gdb.map(|address| GdbConfig { address, wait: self.gdb_wait }),
            seccomp: self.seccomp,
            api_socket: self.api_socket,
            kernel,
        }
    }
}

/// The configuration these arguments of `hv run` ask for.
#[cfg(test)]
pub(crate) fn run_config(args: &[&str]) -> RunConfig {
    let args = ["hv", "run"].iter().chain(args).map(OsString::from).collect();
    match parse(args).unwrap().0.command {
        Command::Run(args) => args.into_config(),
        other => panic!("{other:?}"),
    }
}

/// The description of `hv run`, without what is added to it.
#[cfg(test)]
pub(crate) fn run_command() -> clap::Command {
    Cli::command().find_subcommand("run").unwrap().clone()
}

/// What `hv config print` shows for flags of `hv run`.
#[cfg(test)]
pub(crate) fn printed(args: &[&str]) -> Complete {
    let args: Vec<_> = ["hv", "config", "print"].iter().chain(args).collect();
    let matches = command().try_get_matches_from(args).unwrap();
    let flags = matches.subcommand_matches("config").unwrap().subcommand_matches("print").unwrap();
    complete(flags.get_one::<PathBuf>("file").map(PathBuf::as_path), flags).unwrap()
}

/// The defaults that are no flag's own, because they depend on other flags.
fn dependent_defaults(config: &RunConfig) -> [(&'static str, String); 1] {
    [("cpus", config.cpus.to_string())]
}

/// The description of `hv`.
fn command() -> clap::Command {
    config_file::extend(Cli::command())
}

/// Parses a command line, with the configuration file it names.
fn parse(args: Vec<OsString>) -> Result<(Cli, ArgMatches), ExpandError> {
    parse_expanded(&config_file::expand(&Cli::command(), args)?)
}

fn parse_expanded(expanded: &Expanded) -> Result<(Cli, ArgMatches), ExpandError> {
    let parsed = command().try_get_matches_from(&expanded.args).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches)?;
        Ok((cli, matches))
    });
    parsed.map_err(|error| expanded.error(error))
}

/// The complete configuration that a file and flags of `hv run` make together.
fn complete(file: Option<&Path>, flags: &ArgMatches) -> Result<Complete, ExpandError> {
    let root = Cli::command();
    let vocabulary = Vocabulary::new(root.find_subcommand("run").unwrap_or(&root));
    let (cli, matches) = parse_expanded(&Expanded::new(file, &vocabulary, flags)?)?;
    let defaults = match cli.command {
        Command::Run(args) => dependent_defaults(&args.into_config()).to_vec(),
        _ => Vec::new(),
    };
    let run = matches.subcommand_matches("run").unwrap_or(&matches);
    Ok(Complete::new(&vocabulary, run, &defaults))
}

/// `hv config`.
fn config(command: ConfigCommand, matches: &ArgMatches) -> Result<u8, ExpandError> {
    let (complete, json) = match &command {
        ConfigCommand::Check { file } => {
            complete(Some(file), &ArgMatches::default())?;
            let written = writeln!(anstream::stdout(), "{}: nothing wrong", printable(file));
            return Ok(finish(written_report(written)));
        }
        ConfigCommand::Print { file, as_json } => {
            let config = matches.subcommand_matches("config");
            let flags = config.and_then(|config| config.subcommand_matches("print"));
            (complete(file.as_deref(), flags.unwrap_or(&ArgMatches::default()))?, *as_json)
        }
    };
    let mut out = anstream::stdout().lock();
    let written = if json { output::json(&complete, &mut out) } else { write!(out, "{complete}") };
    Ok(finish(written_report(written)))
}

/// What became of a report.
fn written_report(written: io::Result<()>) -> Result<ExitCode, OutputError> {
    output::finish(&mut anstream::stdout().lock(), written).map(|()| ExitCode::Success)
}

/// Says why a command line can't be used, and returns the exit code.
fn refuse(error: &ExpandError) -> u8 {
    match error {
        ExpandError::Clap(error) => {
            // Help and version are errors to clap; they are none to the user. Nowhere to write to
            // is no reason for another message.
            let _ = error.print();
            if error.use_stderr() { ExitCode::Usage as u8 } else { 0 }
        }
        ExpandError::File(error) => run::fail(ExitCode::Usage, error),
    }
}

/// Runs the command line `args` and returns the exit code of the process.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let (cli, matches) = match parse(args.into_iter().collect()) {
        Ok(parsed) => parsed,
        Err(error) => return refuse(&error),
    };
    match cli.command {
        Command::Run(args) => run::run(&args.into_config()),
        Command::Config(command) => {
            config(command, &matches).unwrap_or_else(|error| refuse(&error))
        }
        Command::Probe(args) => {
            finish(probe::run(&args.kvm.device, args.json, &mut anstream::stdout().lock()))
        }
        Command::Ctl(CtlArgs { socket, json, request }) => {
            match ctl::run(&socket, request, json, &mut anstream::stdout().lock()) {
                Ok(code) => code as u8,
                Err(error) => run::fail(error.exit_code(), &error),
            }
        }
        Command::Doctor(args) => {
            finish(doctor::run(&args.kvm.device, args.json, &mut anstream::stdout().lock()))
        }
    }
}

/// The exit code of a command that only reports.
fn finish(result: Result<ExitCode, impl std::fmt::Display>) -> u8 {
    match result {
        Ok(code) => code as u8,
        Err(error) => run::fail(ExitCode::Vmm, &error),
    }
}
