//! What the threads of `hv` may ask of the host's kernel: little, so that a guest that takes one over has
//! little.
//!
//! Each thread has a seccomp filter of its kind ([`Kind`]), a list of what may be called; all else ends the
//! process with a message (`trap`). Landlock (since Linux 5.13) takes the file system from it; a thread that
//! has a socket there keeps the right to remove files beside it. Both are set by the thread itself, first
//! thing, and can't be undone.
//!
//! It is the process that is isolated, so it is the process that asks for it, with [`start`]; in a program
//! that never does, as in a test, [`Sandbox::enter`] changes nothing.
//!
//! This module must not know devices: each says itself which calls its thread needs
//! ([`VirtioDevice::system_calls`](crate::virtio::VirtioDevice::system_calls)).

mod allocator;
mod calls;
mod files;
mod filter;
mod trap;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use hv_core::Errno;

use calls::READ_FILE;
pub use calls::SystemCall;
use files::Files;
use filter::Filter;

/// What happens at a call that a filter does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum SeccompMode {
    /// The process ends, with a message that names the call
    #[default]
    On,
    /// The kernel logs the call and makes it
    Log,
    /// There are no filters, and Landlock restricts nothing
    Off,
}

/// Kinds of threads, by what they need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread, once the machine is built: it waits for its end and takes it apart.
    Main,
    /// Runs a vCPU, and answers for the devices that have no thread.
    Vcpu,
    /// Has a virtio device.
    Device,
    /// Serves a debugger.
    Debugger,
    /// Serves the API.
    Control,
}

/// Why there is no isolation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IsolationError {
    /// The kernel has no seccomp filters.
    #[error(
        "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER; prctl(PR_GET_SECCOMP): {0}); \
         --seccomp off runs without"
    )]
    NoSeccomp(Errno),
    /// A filter is not accepted.
    #[error("the seccomp filter of the thread {thread}: {what}")]
    Filter {
        /// The kind of the thread.
        thread: &'static str,
        /// What failed.
        what: &'static str,
    },
    /// The handler of SIGSYS can't be set.
    #[error("the handler of SIGSYS: {0}")]
    Handler(Errno),
    /// Landlock failed, other than by not being there.
    #[error("Landlock: {0}")]
    Landlock(&'static str),
}

/// How a process is isolated.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// What happens at a call that is not allowed.
    pub seccomp: SeccompMode,
    /// Whether every thread may look at the descriptors of the process (`/proc/self/fdinfo`), as the layer
    /// [`Record`](hv_core::layer::Record) does to know which eventfd a call is about.
    pub inspects_descriptors: bool,
}

/// How this process is isolated, once it is.
static POLICY: OnceLock<Policy> = OnceLock::new();

/// Isolates this process: every thread that is started from now on with a [`Sandbox`], and the thread that
/// enters [`Kind::Main`]. The first call counts.
///
/// # Errors
/// The kernel can't do it.
pub fn start(policy: Policy) -> Result<(), IsolationError> {
    if policy.seccomp == SeccompMode::Off {
        return Ok(());
    }
    filter::check_kernel()?;
    trap::install()?;
    allocator::keep_from_files();
    POLICY.get_or_init(|| policy);
    Ok(())
}

/// What a thread is about to be restricted to. It is made before the thread, where an error has somebody
/// to go to.
#[derive(Debug)]
pub struct Sandbox(Option<Rules>);

#[derive(Debug)]
struct Rules {
    kind: Kind,
    filter: Filter,
    files: Files,
}

impl Sandbox {
    /// That of a thread of this kind, which may also make `more` calls. In a process that is not isolated it
    /// is empty.
    ///
    /// # Errors
    /// The filter can't be made.
    pub fn new(kind: Kind, more: &[SystemCall]) -> Result<Self, IsolationError> {
        let Some(policy) = POLICY.get() else { return Ok(Self(None)) };
        let mut calls = [&kind.calls(), more].concat();
        let mut files = Files::default();
        if policy.inspects_descriptors {
            calls.extend(READ_FILE);
            files.readable.push(PathBuf::from("/proc/self/fdinfo"));
        }
        let filter = Filter::new(kind, &calls, policy.seccomp)?;
        Ok(Self(Some(Rules { kind, filter, files })))
    }

    /// Lets the thread remove files in the directories of these.
    #[must_use]
    pub fn removing(mut self, files: impl IntoIterator<Item = PathBuf>) -> Self {
        if let Some(rules) = &mut self.0 {
            let directory = |file: PathBuf| match file.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
                _ => PathBuf::from("."),
            };
            rules.files.removable.extend(files.into_iter().map(directory));
        }
        self
    }

    /// Restricts the calling thread, and those it starts, for good.
    ///
    /// # Errors
    /// The kernel refuses. The thread must not go on then.
    pub fn enter(self) -> Result<(), IsolationError> {
        let Some(Rules { kind, filter, files }) = self.0 else { return Ok(()) };
        trap::name_thread(kind.name());
        files.restrict()?;
        filter.apply(kind)
    }

    /// [`Self::enter`] for a thread that has nobody to tell: if it fails, the process ends as at a call that is
    /// not allowed.
    pub fn enter_or_end(self) {
        if let Err(error) = self.enter() {
            trap::end(format_args!("{error}"));
        }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Device => "device",
            Self::Debugger => "gdb",
            Self::Control => "api",
        }
    }
}

impl From<IsolationError> for io::Error {
    fn from(error: IsolationError) -> Self {
        Self::other(error)
    }
}
