//! Faults: calls that fail because a test says so.
//!
//! What a program does when a call fails is seldom seen, since calls seldom fail. This layer makes
//! chosen ones fail: the hypervisor below is not asked, and the caller gets an error like the one it
//! would have made. Which calls fail depends on nothing but the plan and the calls themselves.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Answer, Interceptor, Object, Request};
use crate::{Call, Errno, Error};

/// Calls that are remembered one by one ([`Faults::calls`]).
const REMEMBERED: usize = 1 << 16;

/// A layer that makes calls fail; a clone is the same layer.
///
/// A sweep makes every call of some work fail in turn, with every errno it can give:
///
/// ```
/// # #[cfg(feature = "mock")] {
/// use hv_core::layer::{Faults, Interceptor};
/// use hv_core::{Capability, Error, Hypervisor};
///
/// /// What is tested.
/// fn work(kvm: &impl Hypervisor) -> Result<i32, Error> {
///     kvm.api_version()?;
///     kvm.check_extension(Capability::Irqchip)
/// }
/// # let kvm = || {
/// #     let mut kvm = hv_core::mock::MockHypervisor::new();
/// #     kvm.expect_api_version().return_const(Ok(12));
/// #     kvm.expect_check_extension().return_const(Ok(1));
/// #     kvm
/// # };
///
/// let none = Faults::none();
/// work(&none.over(kvm()))?;
/// for site in none.calls() {
///     for &errno in site.call.errnos() {
///         let faults = Faults::nth(site.n, errno);
///         let error = work(&faults.over(kvm())).unwrap_err();
///         assert_eq!((error.call, error.errno), (site.call, errno));
///         assert_eq!(faults.failures(), 1);
///     }
/// }
/// # }
/// # Ok::<(), hv_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Faults {
    plan: Plan,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Clone, Copy)]
enum Plan {
    None,
    Nth { n: u64, errno: Errno },
    NthOf { call: Call, n: u64, errno: Errno },
    Of { call: Call, errno: Errno },
    Seeded { seed: u64, one_in: NonZeroU32 },
}

#[derive(Debug, Default)]
struct State {
    made: u64,
    /// Those of the call the plan names.
    of_kind: u64,
    /// For a schedule.
    by_object: BTreeMap<Object, u64>,
    failures: u64,
    calls: Vec<CallSite>,
}

/// A call that was made, or would have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallSite {
    /// How many there were before it.
    pub n: u64,
    /// What it was made on.
    pub object: Object,
    /// Which call.
    pub call: Call,
    /// The errno it failed with, if it was made to.
    pub fault: Option<Errno>,
}

impl Faults {
    fn plan(plan: Plan) -> Self {
        Self { plan, state: Arc::default() }
    }

    /// No call fails: to see which there are.
    #[must_use]
    pub fn none() -> Self {
        Self::plan(Plan::None)
    }

    /// The call before which there were `n` others fails with `errno`, all others do not.
    #[must_use]
    pub fn nth(n: u64, errno: Errno) -> Self {
        Self::plan(Plan::Nth { n, errno })
    }

    /// Every `call` fails with `errno`.
    #[must_use]
    pub fn of(call: impl Into<Call>, errno: Errno) -> Self {
        Self::plan(Plan::Of { call: call.into(), errno })
    }

    /// The `call` before which there were `n` others of its kind fails with `errno`.
    #[must_use]
    pub fn nth_of(call: impl Into<Call>, n: u64, errno: Errno) -> Self {
        Self::plan(Plan::NthOf { call: call.into(), n, errno })
    }

    /// One call in `one_in` fails on average, with an errno it [can give](Call::errnos).
    ///
    /// Which, follows from `seed`, the object and how many calls were made on that object: threads
    /// that use objects of their own see the same faults in every run, however they are scheduled.
    /// The numbers are those of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
    /// Generators", 2014).
    #[must_use]
    pub fn seeded(seed: u64, one_in: NonZeroU32) -> Self {
        Self::plan(Plan::Seeded { seed, one_in })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls came, failed ones included.
    #[must_use]
    pub fn made(&self) -> u64 {
        self.state().made
    }

    /// How many were made to fail.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.state().failures
    }

    /// The calls that came, in order: the first 65536 of them.
    #[must_use]
    pub fn calls(&self) -> Vec<CallSite> {
        self.state().calls.clone()
    }

    /// Counts a call and says whether it is to fail.
    fn count(&self, object: Object, call: Call) -> Option<Errno> {
        let state = &mut *self.state();
        let n = state.made;
        state.made += 1;
        let fault = match self.plan {
            Plan::None => None,
            Plan::Nth { n: chosen, errno } => (n == chosen).then_some(errno),
            Plan::Of { call: chosen, errno } => (call == chosen).then_some(errno),
            Plan::NthOf { call: chosen, .. } if call != chosen => None,
            Plan::NthOf { n: chosen, errno, .. } => {
                let nth = state.of_kind;
                state.of_kind += 1;
                (nth == chosen).then_some(errno)
            }
            Plan::Seeded { seed, one_in } => {
                let nth = state.by_object.entry(object).or_insert(0);
                *nth += 1;
                drawn(seed, object, *nth, one_in, call.errnos())
            }
        };
        state.failures += u64::from(fault.is_some());
        if state.calls.len() < REMEMBERED {
            state.calls.push(CallSite { n, object, call, fault });
        }
        fault
    }
}

/// The output function of SplitMix64.
const fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The `n`-th number (from 1) of the SplitMix64 generator that starts at `seed`.
const fn splitmix64(seed: u64, n: u64) -> u64 {
    mix(seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The errno of the `n`-th call on `object`, if it fails. Each object has a generator of its own.
fn drawn(seed: u64, object: Object, n: u64, one_in: NonZeroU32, errnos: &[Errno]) -> Option<Errno> {
    let (kind, vm, id) = match object {
        Object::System => (0, 0, 0),
        Object::Vm(vm) => (1, vm, 0),
        Object::Vcpu { vm, id } => (2, vm, id),
        Object::Kick { vm, id } => (3, vm, id),
    };
    let own = mix(mix(u64::from(vm) << 32 | u64::from(id)).wrapping_add(kind));
    let number = splitmix64(seed ^ own, n);
    if !number.is_multiple_of(u64::from(one_in.get())) {
        return None;
    }
    // Another number, or only some errnos would ever go with some odds.
    let choice = usize::try_from(mix(number) % errnos.len().max(1) as u64).ok()?;
    errnos.get(choice).copied()
}

impl Interceptor for Faults {
    fn call<T: Answer>(
        &self,
        object: Object,
        request: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.count(object, request.call()) {
            None => real(),
            Some(errno) => Err(Error::new(request.call(), errno).about(request.context(object))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::mock::{MockHypervisor, MockVm};
    use crate::{Capability, Context, Hypervisor, Ioctl, IrqBackend, Route};

    /// A hypervisor whose VMs count what really arrives.
    fn hypervisor(arrived: &Arc<Mutex<Vec<&'static str>>>) -> MockHypervisor {
        let mut kvm = MockHypervisor::new();
        let log = arrived.clone();
        let arrive = move |name| log.lock().unwrap().push(name);
        let (a, b) = (arrive.clone(), arrive);
        kvm.expect_check_extension().returning(move |_| {
            a("check");
            Ok(1)
        });
        kvm.expect_create_vm().returning(move |_| {
            b("vm");
            let mut vm = MockVm::new();
            vm.expect_drop().return_const(());
            let c = b.clone();
            vm.expect_set_gsi_routing().returning(move |_| {
                c("routing");
                Ok(())
            });
            Ok(vm)
        });
        kvm
    }

    fn work(kvm: &impl Hypervisor) -> Result<(), Error> {
        kvm.check_extension(Capability::IrqRouting)?;
        kvm.check_extension(Capability::Irqfd)?;
        kvm.create_vm(0)?.set_gsi_routing(&[] as &[Route])
    }

    #[test]
    fn every_call_in_turn_fails_once_and_does_not_happen() {
        let arrived = Arc::default();
        let none = Faults::none();
        work(&none.over(hypervisor(&arrived))).unwrap();
        let sites = none.calls();
        let names = ["KVM_CHECK_EXTENSION", "KVM_CHECK_EXTENSION", "KVM_CREATE_VM"];
        assert!(sites.iter().map(|site| site.call.name()).take(3).eq(names));
        assert_eq!((none.made(), none.failures(), sites.len()), (4, 0, 4));
        assert_eq!(sites[3].object, Object::Vm(0));
        for site in sites {
            arrived.lock().unwrap().clear();
            let faults = Faults::nth(site.n, Errno::ENOMEM);
            let error = work(&faults.over(hypervisor(&arrived))).unwrap_err();
            assert_eq!((error.call, error.errno), (site.call, Errno::ENOMEM));
            assert_eq!(arrived.lock().unwrap().len() as u64, site.n, "the call was not made");
            assert_eq!((faults.made(), faults.failures()), (site.n + 1, 1));
            let failed = CallSite { fault: Some(Errno::ENOMEM), ..site };
            assert_eq!(faults.calls().last(), Some(&failed));
        }
        let beyond = Faults::nth(4, Errno::ENOMEM);
        work(&beyond.over(hypervisor(&arrived))).unwrap();
    }

    #[test]
    fn errors_say_what_they_are_about_as_a_backend_would() {
        let arrived = Arc::default();
        let error = |faults: Faults| work(&faults.over(hypervisor(&arrived))).unwrap_err();
        let error_of = error(Faults::of(Ioctl::CheckExtension, Errno::EIO));
        assert_eq!(error_of.context, Context::Capability(Capability::IrqRouting));
        let second = error(Faults::nth_of(Ioctl::CheckExtension, 1, Errno::EIO));
        assert_eq!(second.context, Context::Capability(Capability::Irqfd));
        let routing = error(Faults::of(Ioctl::SetGsiRouting, Errno::EINVAL));
        assert_eq!(routing.context, Context::Routes(0));
    }

    #[test]
    fn all_calls_of_a_kind() {
        let arrived = Arc::default();
        let faults = Faults::of(Ioctl::CheckExtension, Errno::EIO);
        let kvm = faults.over(hypervisor(&arrived));
        for _ in 0..3 {
            assert!(kvm.check_extension(Capability::Irqchip).is_err());
        }
        kvm.create_vm(0).unwrap();
        assert_eq!((faults.made(), faults.failures()), (4, 3));
        assert_eq!(*arrived.lock().unwrap(), ["vm"]);
    }

    #[test]
    fn a_schedule_is_the_same_every_time_and_keeps_to_its_odds() {
        let one_in = NonZeroU32::new(10).unwrap();
        let run = |seed| {
            let faults = Faults::seeded(seed, one_in);
            for id in 0..4 {
                for _ in 0..2500 {
                    faults.count(Object::Vcpu { vm: 0, id }, Ioctl::Run.into());
                }
            }
            faults
        };
        let (first, second) = (run(7), run(7));
        assert_eq!(first.calls(), second.calls());
        assert_ne!(first.calls(), run(8).calls());
        assert!((800..1200).contains(&first.failures()), "{} of 10000", first.failures());
        let errnos: HashSet<_> = first.calls().iter().filter_map(|site| site.fault).collect();
        assert_eq!(errnos.len(), Call::from(Ioctl::Run).errnos().len(), "each of them: {errnos:?}");
        let always = Faults::seeded(1, NonZeroU32::MIN);
        assert!(always.count(Object::System, Call::Eventfd).is_some());
    }

    #[test]
    fn a_schedule_does_not_depend_on_how_threads_are_interleaved() {
        let one_in = NonZeroU32::new(3).unwrap();
        let object = |id| Object::Vcpu { vm: 0, id };
        let on = |faults: &Faults, id| {
            let calls = faults.calls().into_iter().filter(|site| site.object == object(id));
            calls.map(|site| site.fault).collect::<Vec<_>>()
        };
        let (one, other) = (Faults::seeded(42, one_in), Faults::seeded(42, one_in));
        for n in 0..200 {
            one.count(object(n / 100), Ioctl::Run.into());
            other.count(object(n % 2), Ioctl::Run.into());
        }
        assert_eq!((on(&one, 0), on(&one, 1)), (on(&other, 0), on(&other, 1)));
        assert_ne!(on(&one, 0), on(&one, 1));
    }

    #[test]
    fn the_generator_is_splitmix64() {
        // The first outputs of the reference implementation (Vigna) for the seed 1234567.
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973];
        assert_eq!([splitmix64(1_234_567, 1), splitmix64(1_234_567, 2)], expected);
    }

    #[test]
    fn memory_is_bounded() {
        let faults = Faults::none();
        for _ in 0..REMEMBERED + 10 {
            faults.count(Object::System, Call::Eventfd);
        }
        assert_eq!(faults.made(), REMEMBERED as u64 + 10);
        assert_eq!(faults.calls().len(), REMEMBERED);
    }
}
