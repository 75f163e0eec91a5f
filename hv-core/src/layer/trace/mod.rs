//! Trace: what is asked of a hypervisor, how often, how long it takes.
//!
//! Counters are always kept and cost a run loop next to nothing: two readings of the clock and a
//! few additions that no other thread contends for. Events for `tracing` are made if a subscriber
//! wants them, JSON lines are written if a place for them was given. Nothing here changes a call,
//! and a trace that can't be written is told at the end, never to the guest.

mod counts;
mod lines;

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::Level;
use tracing::level_filters::LevelFilter;

use self::counts::Counters;
pub use self::counts::{CallCount, TraceCounts};
use self::lines::Lines;
pub use self::lines::TraceError;
use super::{Answer, Interceptor, Names, Object, Request};
use crate::Error;

/// A layer that tells what passes through it; a clone is the same trace.
///
/// ```
/// # #[cfg(feature = "mock")] {
/// use hv_core::layer::{Interceptor, Trace};
/// use hv_core::{Errno, Error, Hypervisor, Ioctl, Vm};
///
/// let mut kvm = hv_core::mock::MockHypervisor::new();
/// kvm.expect_api_version().return_const(Ok(12));
/// kvm.expect_create_vm().returning(|_| Err(Error::new(Ioctl::CreateVm, Errno::ENOMEM)));
/// let trace = Trace::new();
/// let kvm = trace.over(kvm);
/// kvm.api_version()?;
/// assert!(kvm.create_vm(0).is_err());
///
/// let counts = trace.counts();
/// assert_eq!(counts.get(Ioctl::GetApiVersion).calls, 1);
/// assert_eq!(counts.get(Ioctl::CreateVm).errors, 1);
/// println!("{counts}");
/// # }
/// # Ok::<(), hv_core::Error>(())
/// ```
///
/// # JSON lines
/// One object per line, when the call returns:
/// `{"at":81250,"on":"vm0","call":"KVM_IRQFD","args":{"gsi":24,"eventfd":0},"ok":null,"ns":1840}`.
/// `at` is when the call was made, in nanoseconds since the trace began, and `ns` how long it
/// took. `on`, `call`, `args` and `ok` or `err` are those of a transcript. One `write` is made per
/// line; give a [`std::io::BufWriter`] unless the last lines before a crash matter more than time.
///
/// # Events
/// Their target is `hv::call`. A call that failed is of level `DEBUG`, like every other that is not
/// made again and again; `KVM_RUN`, kicks and interrupts that went well are `TRACE`. They have the
/// fields `on`, `call`, `args`, `ok` or `err` and `ns`.
#[derive(Debug, Clone)]
pub struct Trace {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    counters: Counters,
    began: Instant,
    names: Names,
    lines: Option<Lines>,
}

impl Default for Trace {
    fn default() -> Self {
        Self::new()
    }
}

impl Trace {
    /// Counters, and events if a subscriber wants them.
    #[must_use]
    pub fn new() -> Self {
        Self::with(None)
    }

    /// The same, and a JSON line per call to `output`.
    #[must_use]
    pub fn to_json(output: impl Write + Send + 'static) -> Self {
        Self::with(Some(Lines::new(Box::new(output))))
    }

    fn with(lines: Option<Lines>) -> Self {
        let (counters, names) = (Counters::default(), Names::default());
        Self { shared: Arc::new(Shared { counters, began: Instant::now(), names, lines }) }
    }

    /// What was counted until now.
    #[must_use]
    pub fn counts(&self) -> TraceCounts {
        self.shared.counters.sum()
    }

    /// Flushes the JSON lines and says whether all of them were written. After an error no more are.
    ///
    /// # Errors
    /// The first error of writing, with how many lines there are and how many are missing.
    pub fn finish(&self) -> Result<(), TraceError> {
        self.shared.lines.as_ref().map_or(Ok(()), Lines::finish)
    }
}

impl Shared {
    /// Tells about a call; only if someone listens.
    #[cold]
    fn tell<T: Answer>(
        &self,
        object: Object,
        request: &Request<'_>,
        result: &Result<T, Error>,
        start: Instant,
        took: Duration,
    ) {
        let names = &self.names;
        let ns = nanoseconds(took);
        if let Some(lines) = &self.lines {
            let at = nanoseconds(start.saturating_duration_since(self.began));
            lines.write(|line| lines::line(line, names, at, object, request, result, ns));
        }
        let call = request.call().name();
        // A level is part of what an event is, so there is one for each.
        macro_rules! event {
            ($level:expr) => {
                if tracing::enabled!(target: "hv::call", $level) {
                    let args = Shown(request.arguments(names));
                    match result {
                        Ok(answer) => {
                            let ok = Shown(answer.json(names));
                            tracing::event!(
                                target: "hv::call", $level, on = %object, call, %args, %ok, ns
                            );
                        }
                        Err(err) => tracing::event!(
                            target: "hv::call", $level, on = %object, call, %args, %err, ns
                        ),
                    }
                }
            };
        }
        if result.is_ok() && is_frequent(request) {
            event!(Level::TRACE);
        } else {
            event!(Level::DEBUG);
        }
    }
}

/// Calls that are made again and again while a guest runs.
fn is_frequent(request: &Request<'_>) -> bool {
    matches!(
        request,
        Request::Run(_)
            | Request::Kick
            | Request::TakeCoalescedWrite
            | Request::Interrupt { .. }
            | Request::IrqLine { .. }
            | Request::IrqLineStatus { .. }
            | Request::SignalMsi(_)
    )
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// JSON that is only made if it is shown.
struct Shown<T>(T);

impl<T: Serialize> fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(&self.0).map_err(|_| fmt::Error)?)
    }
}

impl Interceptor for Trace {
    #[inline]
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let start = Instant::now();
        let result = real();
        let took = start.elapsed();
        let shared = &*self.shared;
        shared.counters.add(object, request.call(), nanoseconds(took), result.is_err());
        if shared.lines.is_some() || LevelFilter::current() >= LevelFilter::DEBUG {
            shared.tell(object, &request, &result, start, took);
        }
        result
    }

    #[inline]
    fn wants_data(&self) -> bool {
        self.shared.lines.is_some() || LevelFilter::current() >= LevelFilter::DEBUG
    }
}

#[cfg(test)]
mod tests;
