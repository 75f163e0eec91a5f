//! `Replay`: a hypervisor that does what a transcript says.
//!
//! It answers every call with what the transcript has for it, if it is the call the transcript has.
//! There is no KVM behind it and no guest: what it can't know (guest memory, the contents of dirty
//! rings, the time) it does not have. When calls happen is decided in [`order`], what they answer by the transcript; this
//! module and its children only put the two together.
//!
//! What is strict and what is not:
//!
//! - All calls, their arguments and their order, over all threads, are those of the transcript.
//!   Eventfds and host memory are the VMM's own; only their numbers and lengths are compared.
//! - Signals of doorbells come where they came, while the vCPUs run that ran then. What the VMM signals itself is not looked at.
//! - Looking whether there are collected writes is no call and has no line. Where the next line of a
//!   vCPU is one that was taken, there is one, as soon as it is its turn.
//! - A kick waits for its line like any call. But how often a VMM kicks, and whether a vCPU that is to
//!   end runs once more, may depend on timing. So a kick that can make no difference, because the
//!   vCPU was already kicked and not interrupted since or does not run any more, needs no line;
//!   kicks at the end of the transcript need not be made; a vCPU that has no more lines may run
//!   once more if it is kicked, and is interrupted; and of a vCPU that was dropped, runs that were
//!   interrupted may be missing.
//! - Whether a kick fails is not part of that: one without a line works.
//! - When a vCPU or a VM is dropped is not in a transcript.

mod ahead;
mod diff;
mod order;
mod vcpu;
mod vm;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io::BufRead;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::kvm_cpuid_entry2;
use rustix::event::{EventfdFlags, eventfd};
use serde::de::Error as _;
use serde_json::Value;

pub use self::diff::{Difference, Made, Why};
pub use self::vcpu::{ReplayKick, ReplayVcpu};
pub use self::vm::ReplayVm;

use self::ahead::Ahead;
use self::order::{Calling, Order, Turned};
use super::answer::Told;
use super::transcript::{CallLine, Meta, Reader, TranscriptError};
use super::{Names, Object, Request};
use crate::{Call, Capability, Errno, Error, EventFd, Hypervisor, MsrIndexList};

/// How long a call waits while nothing else happens, unless told otherwise.
const LIMIT: Duration = Duration::from_secs(60);

/// A hypervisor that replays a transcript that [`Record`](super::Record) wrote.
///
/// The first call that is not the one of the transcript fails with `EPROTO` and
/// [`Context::Transcript`](crate::Context::Transcript), and so does every call after it, on every
/// thread; [`difference`](Replay::difference) tells what was expected. A clone is the same replay.
///
/// ```
/// use hv_core::layer::{Difference, Replay};
/// use hv_core::{Capability, Errno, Hypervisor};
///
/// let transcript = br#"{"hv-transcript":1,"meta":{}}
/// {"thread":0,"on":"system","call":"KVM_GET_API_VERSION","ok":12}
/// {"thread":0,"on":"system","call":"KVM_CHECK_EXTENSION","args":{"cap":"KVM_CAP_IRQCHIP"},"ok":1}
/// {"end":true}
/// "#;
/// let kvm = Replay::new(&transcript[..])?;
/// assert_eq!(kvm.api_version(), Ok(12));
/// let error = kvm.check_extension(Capability::Irqfd).unwrap_err();
/// assert_eq!(error.errno, Errno::EPROTO);
/// assert_eq!(
///     kvm.difference().unwrap().to_string(),
///     "line 3 of the transcript, KVM_CHECK_EXTENSION on system, differs\n  \
///      args.cap: expected \"KVM_CAP_IRQCHIP\", actual \"KVM_CAP_IRQFD\""
/// );
/// # Ok::<(), hv_core::layer::TranscriptError>(())
/// ```
#[derive(Clone)]
pub struct Replay {
    order: Arc<Order>,
    meta: Arc<Meta>,
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Replay {
    /// Replays a transcript. A call waits at most a minute while nothing else happens.
    ///
    /// # Errors
    /// It is no transcript, or of another version. What is wrong further on is told when it is
    /// reached.
    pub fn new(transcript: impl BufRead + Send + 'static) -> Result<Self, TranscriptError> {
        Self::with_limit(transcript, LIMIT)
    }

    /// Replays a transcript. If no line is used for `limit` while a call waits for its turn, that is
    /// a difference ([`Difference::Stuck`]).
    ///
    /// # Errors
    /// As [`Replay::new`].
    pub fn with_limit(
        transcript: impl BufRead + Send + 'static,
        limit: Duration,
    ) -> Result<Self, TranscriptError> {
        let (reader, meta) = Reader::open(Box::new(transcript) as ahead::Input)?;
        let order = Order::new(Ahead::new(reader), limit);
        Ok(Self { order: Arc::new(order), meta: Arc::new(meta) })
    }

    /// The texts of the transcript's first line.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// The first difference, if there was one.
    #[must_use]
    pub fn difference(&self) -> Option<Arc<Difference>> {
        self.order.difference()
    }

    /// Whether the VMM did all that the transcript has. To be asked when it has ended.
    ///
    /// # Errors
    /// The first difference; a call that it did not make is one.
    pub fn finish(&self) -> Result<(), Arc<Difference>> {
        self.order.finish()
    }

    pub(super) fn order(&self) -> &Order {
        &self.order
    }

    /// The answer to a call.
    fn ask<T: Told>(&self, on: Object, request: &Request<'_>) -> Result<T, Error> {
        self.ask_for(on, request, T::from_json)
    }

    /// The answer to a call, read by `read`.
    fn ask_for<T>(
        &self,
        on: Object,
        request: &Request<'_>,
        read: impl FnOnce(Value) -> Result<T, serde_json::Error>,
    ) -> Result<T, Error> {
        match self.order.call(Calling { on, request }, |_, _| {})? {
            Turned::Line(number, line) => self.answer(request.call(), number, &line, read),
            // Only runs and kicks may have no line; they are asked for elsewhere.
            Turned::Unwritten => Err(Error::new(request.call(), Errno::EPROTO)),
        }
    }

    /// The result a line has, or the error.
    fn answer<T>(
        &self,
        call: Call,
        number: u64,
        line: &CallLine,
        read: impl FnOnce(Value) -> Result<T, serde_json::Error>,
    ) -> Result<T, Error> {
        let value = |text: &str| serde_json::from_str::<Value>(text);
        let answer = match &line.result {
            Ok(None) => read(Value::Null).map(Ok),
            Ok(Some(ok)) => value(ok.get()).and_then(read).map(Ok),
            Err(err) => value(err.get()).and_then(Error::from_json).map(Err),
        };
        answer.unwrap_or_else(|error| {
            let (name, error) = (call.name().to_owned(), Arc::new(error));
            Err(self.order.fail(call, Difference::Result { line: number, call: name, error }))
        })
    }
}

/// The methods that are one request whose answer is in the transcript.
macro_rules! ask {
    ($($method:ident($($arg:ident: $type:ty),*) -> $answer:ty = $request:expr;)*) => {$(
        fn $method(&self $(, $arg: $type)*) -> Result<$answer, crate::Error> {
            self.replay().ask(self.object(), &$request)
        }
    )*};
}
use ask;

impl Replay {
    fn replay(&self) -> &Self {
        self
    }

    fn object(&self) -> Object {
        Object::System
    }
}

impl Hypervisor for Replay {
    type Vm = ReplayVm;

    ask! {
        api_version() -> i32 = Request::ApiVersion;
        check_extension(cap: Capability) -> i32 = Request::CheckExtension(cap);
        vcpu_mmap_size() -> usize = Request::VcpuMmapSize;
        msr_index_list(room: usize) -> MsrIndexList = Request::MsrIndexList { room };
        supported_cpuid() -> Vec<kvm_cpuid_entry2> = Request::SupportedCpuid;
        install_kick() -> () = Request::InstallKick;
    }

    fn create_vm(&self, vm_type: u64) -> Result<ReplayVm, Error> {
        let number = self.ask(Object::System, &Request::CreateVm { vm_type })?;
        Ok(ReplayVm::new(self.clone(), number))
    }

    /// A real eventfd, as that is what a VMM waits for.
    fn eventfd(&self) -> Result<EventFd, Error> {
        let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let failed = |e: rustix::io::Errno| Error::new(Call::Eventfd, Errno(e.raw_os_error()));
        let event = made.map(EventFd::from).map_err(failed)?;
        let mut number = None;
        // It gets its name before anyone else's can.
        let name = |names: &Names, line: &CallLine| {
            number = line.result.as_ref().ok().and_then(|_| names.event(&event));
        };
        let request = Request::Eventfd;
        let calling = Calling { on: Object::System, request: &request };
        let Turned::Line(line, call) = self.order.call(calling, name)? else {
            return Err(Error::new(Call::Eventfd, Errno::EPROTO));
        };
        self.answer(Call::Eventfd, line, &call, |value| {
            if value == Value::from(number) {
                return Ok(());
            }
            Err(serde_json::Error::custom(format_args!("{value} where {number:?} comes next")))
        })?;
        Ok(event)
    }
}
