//! What calls answer, in JSON and back.
//!
//! Every result of the traits is an [`Answer`]: a layer can write it down whatever it is. What can
//! be read back is `Told`: exactly what was written, bit for bit. A VM, a vCPU and an eventfd
//! can't be read back; whoever replays makes its own.

use std::sync::Arc;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_translation,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde::{Deserialize, de::Error as _};
use serde_json::Value;

use super::Names;
use super::json::{
    Bytes, ClockForm, CpuidForm, DebugregsForm, DirtyForm, ErrorForm, EventsForm, ExitForm, Form,
    FpuForm, InterruptsForm, IrqchipForm, LapicForm, LineStatusForm, MpStateForm, MsiStatusForm,
    MsrForm, MsrIndexForm, OwnedBytes, PitForm, RegsForm, SregsForm, TranslationForm, WriteForm,
    XcrsForm, is_zero,
};
use crate::{
    CoalescedWrite, DirtyRing, Error, EventFd, InterruptState, LineStatus, MsiStatus, MsrIndexList,
    VcpuExit,
};

/// What a call of the traits can return.
pub trait Answer {
    /// Writes it. Eventfds go by `names`.
    ///
    /// # Errors
    /// Those of the serializer.
    fn write<S: Serializer>(&self, names: &Names, to: S) -> Result<S::Ok, S::Error>;

    /// It as something serde can write.
    fn json<'a>(&'a self, names: &'a Names) -> impl Serialize + 'a
    where
        Self: Sized,
    {
        Json { answer: self, names }
    }
}

struct Json<'a, T> {
    answer: &'a T,
    names: &'a Names,
}

impl<T: Answer> Serialize for Json<'_, T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.answer.write(self.names, to)
    }
}

/// An answer that can be read back.
pub(super) trait Told: Sized {
    /// Reads it.
    fn from_json(value: Value) -> Result<Self, serde_json::Error>;
}

macro_rules! answers {
    ($($type:ty as $form:ty,)*) => {$(
        impl Answer for $type {
            fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
                <$form as Form<$type>>::of(self).serialize(to)
            }
        }

        impl Told for $type {
            fn from_json(value: Value) -> Result<Self, serde_json::Error> {
                <$form>::deserialize(value).map(Form::value)
            }
        }
    )*};
}

answers! {
    i32 as i32,
    u32 as u32,
    usize as usize,
    MsrIndexList as MsrIndexForm,
    Vec<kvm_cpuid_entry2> as Vec<CpuidForm>,
    kvm_irqchip as IrqchipForm,
    kvm_pit_state2 as PitForm,
    kvm_clock_data as ClockForm,
    LineStatus as LineStatusForm,
    MsiStatus as MsiStatusForm,
    kvm_regs as RegsForm,
    kvm_sregs as SregsForm,
    kvm_fpu as FpuForm,
    kvm_xcrs as XcrsForm,
    kvm_debugregs as DebugregsForm,
    kvm_mp_state as MpStateForm,
    kvm_vcpu_events as EventsForm,
    kvm_lapic_state as LapicForm,
    kvm_translation as TranslationForm,
    Error as ErrorForm,
}

impl Answer for () {
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_unit()
    }
}

impl Told for () {
    fn from_json(value: Value) -> Result<Self, serde_json::Error> {
        <()>::deserialize(value)
    }
}

impl Answer for EventFd {
    /// Its number.
    fn write<S: Serializer>(&self, names: &Names, to: S) -> Result<S::Ok, S::Error> {
        names.event(self).serialize(to)
    }
}

/// A VM that was just created.
#[derive(Debug)]
pub struct NewVm<V> {
    /// Its number, from 0 in order of creation.
    pub number: u32,
    /// The VM.
    pub vm: V,
}

impl<V> Answer for NewVm<V> {
    /// Its number.
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        self.number.serialize(to)
    }
}

/// A vCPU that was just created.
#[derive(Debug)]
pub struct NewVcpu<V>(pub V);

impl<V> Answer for NewVcpu<V> {
    /// `null`: its id is an argument of the call.
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_unit()
    }
}

/// A dirty ring that was just mapped.
#[derive(Debug, Clone)]
pub struct NewDirtyRing(pub Arc<dyn DirtyRing>);

impl Answer for NewDirtyRing {
    /// How many entries it has. What is in them is memory, like the guest's.
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        self.0.entries().len().serialize(to)
    }
}

impl Answer for Option<CoalescedWrite> {
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        self.as_ref().map(WriteForm::of).serialize(to)
    }
}

impl Told for Option<CoalescedWrite> {
    fn from_json(value: Value) -> Result<Self, serde_json::Error> {
        let form = Option::<WriteForm>::deserialize(value)?;
        form.map(WriteForm::value).transpose()
    }
}

/// The bitmap `KVM_GET_DIRTY_LOG` filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyLog<'a>(pub &'a [u64]);

impl Answer for DirtyLog<'_> {
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        DirtyForm::of(self.0).serialize(to)
    }
}

/// Fills `bitmap` with a dirty log that was written down. Another size is an error.
pub(super) fn fill_dirty_log(value: Value, bitmap: &mut [u64]) -> Result<(), serde_json::Error> {
    if DirtyForm::deserialize(value)?.fill(bitmap) {
        return Ok(());
    }
    let words = bitmap.len();
    Err(serde_json::Error::custom(format_args!("no dirty log of {words} words")))
}

/// The registers `KVM_GET_MSRS` read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MsrsRead<'a> {
    /// How many were read.
    pub count: usize,
    /// All entries; those past `count` are as they were.
    pub entries: &'a [kvm_msr_entry],
}

impl Answer for MsrsRead<'_> {
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        let entries: Vec<_> = self.entries.iter().map(MsrForm::of).collect();
        MsrsForm { count: self.count, entries }.serialize(to)
    }
}

#[derive(serde::Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MsrsForm {
    count: usize,
    entries: Vec<MsrForm>,
}

/// Fills `entries` with what was read before; returns how many were read. Another number of
/// entries is an error.
pub(super) fn fill_msrs(
    value: Value,
    entries: &mut [kvm_msr_entry],
) -> Result<usize, serde_json::Error> {
    let form = MsrsForm::deserialize(value)?;
    let n = entries.len();
    if form.entries.len() != n || form.count > n {
        return Err(serde_json::Error::custom(format_args!("not {n} registers")));
    }
    for (entry, read) in entries.iter_mut().zip(form.entries) {
        *entry = read.value();
    }
    Ok(form.count)
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ran<'a> {
    /// Why.
    pub exit: &'a VcpuExit,
    /// The bytes of a port output, if the interceptor
    /// [wants them](super::Interceptor::wants_data).
    pub data: &'a [u8],
    /// What `kvm_run` says about interrupts, if the interceptor wants data.
    pub interrupts: Option<InterruptState>,
}

impl Answer for Ran<'_> {
    fn write<S: Serializer>(&self, _: &Names, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        map.serialize_entry("exit", &ExitForm::of(self.exit))?;
        if !self.data.is_empty() {
            map.serialize_entry("data", &Bytes(self.data))?;
        }
        let interrupts = self.interrupts.as_ref().map(InterruptsForm::of).unwrap_or_default();
        if !is_zero(&interrupts) {
            map.serialize_entry("interrupts", &interrupts)?;
        }
        map.end()
    }
}

/// How a run ended, read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RanBefore {
    pub(super) exit: VcpuExit,
    /// The bytes of a port output: those that were written down, which need not be as many as the
    /// exit says.
    pub(super) data: Vec<u8>,
    pub(super) interrupts: InterruptState,
}

impl Told for RanBefore {
    fn from_json(value: Value) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            exit: ExitForm,
            #[serde(default)]
            data: OwnedBytes,
            #[serde(default)]
            interrupts: InterruptsForm,
        }
        let Fields { exit, data, interrupts } = Fields::deserialize(value)?;
        Ok(Self { exit: exit.value(), data: data.0, interrupts: interrupts.value() })
    }
}
