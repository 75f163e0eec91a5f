//! The files of `--trace`, `--record` and `--stats-json`: made before KVM is opened, and told about when the machine
//! is gone.
//!
//! A line is one `write(2)`, made when its call returns: one system call more for each, and in return a
//! run that is killed, or hangs, leaves every call it made, up to the last whole line. What can't be
//! written never changes what the guest sees.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hv_core::Errno;
use hv_core::layer::{Meta, Record, RecordError, Trace};

use crate::config::{KernelConfig, RunConfig};
use crate::machine::host::HostFacts;
use crate::output::{self, printable};
use crate::stats::Stats;

/// What is wrong with a file of `--trace`, `--record` or `--stats-json`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// It can't be opened for writing.
    #[error("{option} '{file}': {errno}; {}", advice(*.errno))]
    Open {
        /// The option.
        option: &'static str,
        /// Its name.
        file: String,
        /// Why.
        errno: Errno,
    },
    /// Two options name the same file.
    #[error("{first} and {second} are both '{file}'; give each a file of its own")]
    Same {
        /// An option.
        first: &'static str,
        /// Another one.
        second: &'static str,
        /// Its name.
        file: String,
    },
    /// It is an image to be read, or the guest's memory.
    #[error("{option} '{file}' would overwrite what {image} names; give it another file")]
    Image {
        /// The option.
        option: &'static str,
        /// Its name.
        file: String,
        /// `--kernel`, `--initrd` or `--memory-file`.
        image: &'static str,
    },
    /// The trace could not be written to its end.
    #[error(
        "--trace '{file}' has only the first {written} calls, {lost} are missing: {errno}; {}",
        advice(*.errno)
    )]
    Trace {
        /// Its name.
        file: String,
        /// Calls that are in it.
        written: u64,
        /// Calls that are not.
        lost: u64,
        /// Why.
        errno: Errno,
    },
    /// The transcript could not be written to its end.
    #[error(
        "--record '{file}' is cut off before line {line} and can't be replayed: {errno}; {}",
        advice(*.errno)
    )]
    Record {
        /// Its name.
        file: String,
        /// The first line that is not whole, from 1.
        line: u64,
        /// Why.
        errno: Errno,
    },
    /// The statistics could not be written.
    #[error("--stats-json '{file}' is not whole: {errno}; {}", advice(*.errno))]
    Stats {
        /// Its name.
        file: String,
        /// Why.
        errno: Errno,
    },
    /// The transcript is not whole for another reason.
    #[error("--record '{file}': {error}")]
    NotWhole {
        /// Its name.
        file: String,
        /// The reason.
        error: RecordError,
    },
}

/// What to do about a file that can't be written.
fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::EISDIR => "name a file in that directory",
        Errno::ENOENT => "its directory must exist",
        Errno::ENOTDIR => "what it is to be in is no directory",
        Errno::EACCES | Errno::EPERM | Errno::EROFS => "choose a place you may write to",
        Errno::ENOSPC | Errno::EDQUOT => "make room or choose another place",
        Errno::EFBIG => "raise the limit of file sizes (ulimit -f)",
        Errno::EMFILE => "raise the limit of open files (ulimit -n)",
        Errno::ETXTBSY => "it is a program that runs: choose another file",
        _ => "choose another file",
    }
}

const TRACE: &str = "--trace";
const RECORD: &str = "--record";
const STATS: &str = "--stats-json";

/// What observes a run.
pub struct Observers {
    trace: Option<(Trace, String)>,
    record: Option<(Record, String)>,
    stats: Option<(File, String)>,
}

impl Observers {
    /// Makes the files `config` asks for, empty but for what precedes the first call.
    ///
    /// # Errors
    /// One that can't be written, or that is something else as well; nothing was overwritten then.
    pub fn create(config: &RunConfig, host: &HostFacts) -> Result<Self, ObserveError> {
        let trace = config.trace.as_deref().map(|path| Output::open(TRACE, path)).transpose()?;
        let record = config.record.as_deref().map(|path| Output::open(RECORD, path)).transpose()?;
        let stats =
            config.stats_json.as_deref().map(|path| Output::open(STATS, path)).transpose()?;
        for (first, second) in [(&trace, &record), (&trace, &stats), (&record, &stats)] {
            if let (Some(first), Some(second)) = (first, second)
                && is_same(&first.metadata, &second.metadata)
            {
                let (first, file) = (first.option, second.name.clone());
                return Err(ObserveError::Same { first, second: second.option, file });
            }
        }
        for output in trace.iter().chain(&record).chain(&stats) {
            output.spares(config)?;
        }
        let trace = trace.map(Output::emptied).transpose()?;
        let record = record.map(Output::emptied).transpose()?;
        let stats = stats.map(Output::emptied).transpose()?;
        Ok(Self {
            trace: trace.map(|(file, name)| (Trace::to_json(file), name)),
            record: record.map(|(file, name)| (Record::with_meta(file, &meta(config, host)), name)),
            stats,
        })
    }

    /// The layer of `--trace`.
    #[must_use]
    pub fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref().map(|(trace, _)| trace)
    }

    /// The layer of `--record`.
    #[must_use]
    pub fn record(&self) -> Option<&Record> {
        self.record.as_ref().map(|(record, _)| record)
    }

    /// Writes the file of `--stats-json`, if there is one.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_stats(&self, stats: &Stats<'_>) -> Result<(), ObserveError> {
        let Some((file, name)) = &self.stats else { return Ok(()) };
        let written = output::json(stats, &mut &*file);
        written
            .map_err(|error| ObserveError::Stats { file: name.clone(), errno: Errno::from(&error) })
    }

    /// Ends the files, and says of each what is in it. To be called when the machine is gone: what
    /// is called later is in no transcript.
    pub fn finish(self) -> impl Iterator<Item = Result<String, ObserveError>> {
        let trace = self.trace.map(|(trace, file)| match trace.finish() {
            Ok(()) => Ok(format!("{} calls traced to '{file}'", trace.counts().total().calls)),
            Err(error) => {
                let errno = Errno::from(&*error.source);
                Err(ObserveError::Trace { file, written: error.written, lost: error.lost, errno })
            }
        });
        let record = self.record.map(|(record, file)| match record.finish() {
            Ok(()) => Ok(format!("recorded to '{file}'")),
            Err(RecordError::Write { line, error }) => {
                Err(ObserveError::Record { file, line, errno: Errno::from(&error) })
            }
            Err(error) => Err(ObserveError::NotWhole { file, error }),
        });
        trace.into_iter().chain(record)
    }
}

/// An open file that has not been written to.
struct Output {
    option: &'static str,
    name: String,
    file: File,
    metadata: Metadata,
}

impl Output {
    fn open(option: &'static str, path: &Path) -> Result<Self, ObserveError> {
        let name = printable(path);
        let opened = OpenOptions::new().append(true).create(true).open(path);
        match opened.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((metadata, file)) => Ok(Self { option, name, file, metadata }),
            Err(error) => Err(failed(option, name, &error)),
        }
    }

    /// Fails if it is an image of the machine, or its memory.
    fn spares(&self, config: &RunConfig) -> Result<(), ObserveError> {
        let images = config.kernel.iter().flat_map(KernelConfig::files);
        let memory = config.backing.file.iter().map(|file| ("--memory-file", file.as_path()));
        for (image, path) in images.chain(memory) {
            // One that can't be looked at is refused by who opens it.
            if std::fs::metadata(path).is_ok_and(|other| is_same(&self.metadata, &other)) {
                let (option, file) = (self.option, self.name.clone());
                return Err(ObserveError::Image { option, file, image });
            }
        }
        Ok(())
    }

    /// The file without what was in it, and its name.
    fn emptied(self) -> Result<(File, String), ObserveError> {
        if self.metadata.is_file()
            && let Err(error) = self.file.set_len(0)
        {
            return Err(failed(self.option, self.name, &error));
        }
        Ok((self.file, self.name))
    }
}

fn failed(option: &'static str, file: String, error: &io::Error) -> ObserveError {
    ObserveError::Open { option, file, errno: Errno::from(error) }
}

/// Whether they are of one file.
pub(crate) fn is_same(a: &Metadata, b: &Metadata) -> bool {
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

const HOST: &str = "host";

/// What a transcript says of itself: all that a machine depends on besides its hypervisor, and for
/// people what was run.
fn meta(config: &RunConfig, host: &HostFacts) -> Meta {
    let guest = if config.kernel.is_some() { "a kernel" } else { "the built-in guest" };
    let cpus = config.cpus;
    let machine = format!(
        "{guest}, {cpus} CPU{}, {}, {} irqchip",
        if cpus == 1 { "" } else { "s" },
        config.memory,
        config.irqchip
    );
    let texts = [
        ("hv", env!("CARGO_PKG_VERSION").to_owned()),
        ("machine", machine),
        // It holds a number and a truth value, so there is nothing that could not be written.
        (HOST, serde_json::to_string(host).unwrap_or_default()),
    ];
    texts.map(|(key, text)| (key.to_owned(), text)).into()
}

/// The host of a transcript that `hv run --record` wrote: a machine that replays it is built as
/// there.
#[must_use]
pub fn recorded_host(meta: &Meta) -> Option<HostFacts> {
    serde_json::from_str(meta.get(HOST)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::run_config;
    use hv_core::layer::{Interceptor, Replay};
    use hv_core::mock::MockHypervisor;
    use hv_core::{Capability, Hypervisor};
    use tempfile::TempDir;

    fn config(args: &[&str]) -> RunConfig {
        run_config(&[&["--cpus", "1"], args].concat())
    }

    fn host() -> HostFacts {
        HostFacts { physical_address_bits: 39, software_kvm: true, ..HostFacts::detect() }
    }

    fn create(args: &[&str]) -> Result<Observers, ObserveError> {
        Observers::create(&config(args), &host())
    }

    fn error(args: &[&str]) -> String {
        create(args).err().unwrap().to_string()
    }

    fn path(dir: &TempDir, name: &str) -> String {
        dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn finished(observers: Observers) -> Vec<Result<String, String>> {
        observers.finish().map(|it| it.map_err(|error| error.to_string())).collect()
    }

    fn kvm() -> MockHypervisor {
        let mut kvm = MockHypervisor::new();
        kvm.expect_check_extension().return_const(Ok(1));
        kvm
    }

    #[test]
    fn nothing_is_observed_unless_asked_for() {
        let observers = create(&[]).unwrap();
        assert!(observers.trace().is_none() && observers.record().is_none());
        assert_eq!(finished(observers), []);
    }

    #[test]
    fn a_recording_says_on_which_host_it_was_made() {
        let dir = TempDir::new().unwrap();
        let (trace, record) = (path(&dir, "trace"), path(&dir, "record"));
        std::fs::write(&record, "what was there before\n".repeat(100)).unwrap();
        let observers = create(&["--trace", &trace, "--record", &record]).unwrap();
        let below = observers.trace().unwrap().over(kvm());
        let kvm = observers.record().unwrap().over(below);
        kvm.check_extension(Capability::Irqchip).unwrap();
        drop(kvm);
        let said = [format!("1 calls traced to '{trace}'"), format!("recorded to '{record}'")];
        assert_eq!(finished(observers), said.map(Ok));
        let replay = Replay::new(std::io::BufReader::new(File::open(&record).unwrap())).unwrap();
        assert_eq!(recorded_host(replay.meta()), Some(host()));
        assert!(replay.meta()["machine"].contains("1 CPU, 128 MiB, kernel irqchip"));
        assert_eq!(replay.check_extension(Capability::Irqchip), Ok(1));
        replay.finish().unwrap();
        assert_eq!(recorded_host(&Meta::new()), None);
    }

    #[test]
    fn every_line_is_in_the_file_when_its_call_returns() {
        let dir = TempDir::new().unwrap();
        let (trace, record) = (path(&dir, "trace"), path(&dir, "record"));
        let observers = create(&["--trace", &trace, "--record", &record]).unwrap();
        let kvm = observers.record().unwrap().over(observers.trace().unwrap().over(kvm()));
        for calls in 1..4 {
            kvm.check_extension(Capability::Irqchip).unwrap();
            let lines = |path| std::fs::read_to_string(path).unwrap().lines().count();
            assert_eq!([lines(&trace), lines(&record)], [calls, calls + 1]);
        }
    }

    #[test]
    fn a_file_that_can_not_be_written_is_named_with_its_option_and_what_to_do() {
        let dir = TempDir::new().unwrap();
        let place = dir.path().to_str().unwrap();
        for option in [TRACE, RECORD] {
            let text = error(&[option, place]);
            assert!(text.starts_with(&format!("{option} '{place}': EISDIR")), "{text}");
            assert!(text.ends_with("; name a file in that directory"), "{text}");
            let text = error(&[option, "/no/such/file"]);
            assert!(text.contains("ENOENT") && text.contains("directory must exist"), "{text}");
            let text = error(&[option, "/no\n\u{1b}[31m/such"]);
            assert!(text.contains("/no\\n\\u{1b}[31m"), "{text}");
        }
    }

    #[test]
    fn what_is_needed_otherwise_is_not_overwritten() {
        let dir = TempDir::new().unwrap();
        let (kernel, link) = (path(&dir, "kernel"), path(&dir, "link"));
        std::fs::write(&kernel, "a kernel").unwrap();
        std::os::unix::fs::symlink(&kernel, &link).unwrap();
        let text = error(&["--kernel", &kernel, "--record", &link]);
        assert!(text.contains("--record") && text.contains("--kernel"), "{text}");
        let text = error(&["--kernel", "/no/such", "--initrd", &kernel, "--trace", &link]);
        assert!(text.contains("--trace") && text.contains("--initrd"), "{text}");
        let text = error(&["--trace", &kernel, "--record", &link]);
        assert!(text.starts_with("--trace and --record are both"), "{text}");
        assert_eq!(std::fs::read_to_string(&kernel).unwrap(), "a kernel");
    }

    #[test]
    fn a_full_disk_is_told_at_the_end_and_changes_no_call() {
        for option in [TRACE, RECORD] {
            let observers = create(&[option, "/dev/full"]).unwrap();
            let cap = Capability::Irqchip;
            let answer = match (observers.trace(), observers.record()) {
                (Some(trace), _) => trace.over(kvm()).check_extension(cap),
                (_, record) => record.unwrap().over(kvm()).check_extension(cap),
            };
            assert_eq!(answer, Ok(1));
            let said = finished(observers);
            let [Err(text)] = said.as_slice() else { panic!("{said:?}") };
            for part in [option, "/dev/full", "ENOSPC", "make room"] {
                assert!(text.contains(part), "{part:?} is missing: {text}");
            }
        }
    }
}
