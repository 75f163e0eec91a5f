//! Layers: a hypervisor over a hypervisor, to see or to change what is asked of it.
//!
//! A layer is an [`Interceptor`]: it is given every call, with its arguments and a closure that
//! makes it, and decides what to do. [`Layered`] puts it over any [`Hypervisor`], which makes
//! another one, so layers stack. All is static dispatch: an interceptor that just makes the call
//! costs a run loop a handful of instructions, and none of it allocates unless it keeps something.
//!
//! What an interceptor sees is [`Object`], [`Request`] and [`Answer`]; all of them can be written
//! as JSON without anything that differs between two runs of the same program.
//!
//! ```
//! # #[cfg(feature = "mock")] {
//! use hv_core::layer::{Answer, Interceptor, Layered, Object, Request};
//! use hv_core::{Errno, Error, Hypervisor, Vm};
//!
//! /// A host whose KVM creates no more VMs.
//! #[derive(Clone)]
//! struct NoVms;
//!
//! impl Interceptor for NoVms {
//!     fn call<T: Answer>(
//!         &self,
//!         _: Object,
//!         request: Request<'_>,
//!         real: impl FnOnce() -> Result<T, Error>,
//!     ) -> Result<T, Error> {
//!         match request {
//!             Request::CreateVm { .. } => Err(Error::new(request.call(), Errno::EBUSY)),
//!             _ => real(),
//!         }
//!     }
//! }
//!
//! let mut kvm = hv_core::mock::MockHypervisor::new();
//! kvm.expect_api_version().return_const(Ok(12));
//! let kvm = Layered::new(kvm, NoVms);
//! assert_eq!(kvm.api_version(), Ok(12));
//! assert_eq!(kvm.create_vm(0).err().map(|e| e.errno), Some(Errno::EBUSY));
//! # }
//! ```

mod answer;
mod faults;
#[cfg(test)]
mod forwarding;
mod json;
mod layered;
mod names;
mod record;
mod replay;
mod request;
#[cfg(test)]
mod round_trip;
mod signals;
mod trace;
mod transcript;

pub use answer::{Answer, DirtyLog, MsrsRead, NewDirtyRing, NewVcpu, NewVm, Ran};
pub use faults::{CallSite, Faults};
pub use layered::{Layered, LayeredKick, LayeredVcpu, LayeredVm};
pub use names::Names;
pub use record::Record;
pub use replay::{Difference, Made, Replay, ReplayKick, ReplayVcpu, ReplayVm, Why};
pub use request::{Object, Request, Turn};
pub use trace::{CallCount, Trace, TraceCounts, TraceError};
pub use transcript::{MAX_LINE, Meta, RecordError, TranscriptError, VERSION};

use crate::{Error, EventFd, Hypervisor};

/// What stands between a caller and a hypervisor.
///
/// A clone is the same interceptor: every VM and vCPU has one. Calls come from several threads.
pub trait Interceptor: Clone + Send + Sync {
    /// One call on `object`. `real` makes it; an interceptor that does not call `real` answers
    /// itself, with an error, since it can't make a `T`.
    ///
    /// # Errors
    /// What `real` returned, or what the interceptor returns instead.
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error>;

    /// This interceptor over a hypervisor. What it does for several of them, it does together.
    fn over<H: Hypervisor>(&self, hypervisor: H) -> Layered<H, Self> {
        Layered::new(hypervisor, self.clone())
    }

    /// Whether it looks at what costs something to show it: what a vCPU is told before a run
    /// ([`Turn`]), the bytes of port output ([`Ran::data`]), what `kvm_run` says about interrupts
    /// ([`Ran::interrupts`]), and the registers asked for by [`Request::Msrs`].
    #[inline]
    fn wants_data(&self) -> bool {
        false
    }

    /// The eventfd the hypervisor is to signal, instead of the caller's `event`: for an ioeventfd, or
    /// to say that a level-triggered interrupt ended. Asked before each such call, also the one
    /// that takes the event away, which must be given the same one again. `None`: the caller's.
    ///
    /// # Errors
    /// If it can't be made; the call then fails with that error.
    #[inline]
    fn stand_in(&self, object: Object, event: &EventFd) -> Result<Option<EventFd>, Error> {
        let _ = (object, event);
        Ok(None)
    }

    /// The clone of it for a VM that was just created and all that belongs to that: when the last
    /// of them is dropped, so is the VM.
    #[inline]
    fn of_vm(&self, vm: u32) -> Self {
        let _ = vm;
        self.clone()
    }
}
