//! A failed call as JSON: errno, call and context by name.

use serde::de::{self, Deserializer};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use super::{Form, Hex};
use crate::{Call, Capability, Context, Errno, Error, Gsi, SlotId};

/// An error of the traits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct ErrorForm {
    errno: ErrnoForm,
    call: CallForm,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    about: Option<ContextForm>,
}

impl Form<Error> for ErrorForm {
    fn of(value: &Error) -> Self {
        let Error { call, errno, context } = *value;
        Self { errno: ErrnoForm(errno), call: CallForm(call), about: ContextForm::of(context) }
    }
    fn value(self) -> Error {
        let context = self.about.map_or(Context::None, ContextForm::value);
        Error { call: self.call.0, errno: self.errno.0, context }
    }
}

/// An errno by name, or by number if it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ErrnoForm(Errno);

/// No errno of Linux is larger (`MAX_ERRNO`).
const MAX_ERRNO: i32 = 4095;

impl Serialize for ErrnoForm {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0.name() {
            Some(name) => to.serialize_str(name),
            None => to.serialize_i32(self.0.0),
        }
    }
}

impl<'de> Deserialize<'de> for ErrnoForm {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Name(String),
            Number(i32),
        }
        let errno = match Either::deserialize(from)? {
            Either::Name(name) => {
                (1..=MAX_ERRNO).map(Errno).find(|errno| errno.name() == Some(name.as_str()))
            }
            Either::Number(number) => Some(Errno(number)).filter(|errno| errno.name().is_none()),
        };
        errno.map(Self).ok_or_else(|| de::Error::custom("no errno of Linux"))
    }
}

/// A call by its name in the KVM API documentation or its manual page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CallForm(Call);

impl Serialize for CallForm {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0.name())
    }
}

impl<'de> Deserialize<'de> for CallForm {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let call = Call::all().find(|call| call.name() == name);
        call.map(Self).ok_or_else(|| de::Error::custom(format_args!("no call is named {name:?}")))
    }
}

/// What an error is about, unless nothing is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum ContextForm {
    Capability(CapabilityForm),
    Vcpu(u32),
    Gsi(u32),
    Routes(usize),
    Slot { slot: u32, guest: Hex, size: Hex },
    SlotId(u32),
    Address(Hex),
    Msr(Hex<u32>),
    Transcript(u64),
}

impl ContextForm {
    fn of(context: Context) -> Option<Self> {
        Some(match context {
            Context::None => return None,
            Context::Capability(cap) => Self::Capability(CapabilityForm(cap)),
            Context::Vcpu(id) => Self::Vcpu(id),
            Context::Gsi(Gsi(gsi)) => Self::Gsi(gsi),
            Context::Routes(n) => Self::Routes(n),
            Context::Slot { slot: SlotId(slot), guest, size } => {
                Self::Slot { slot, guest: Hex(guest), size: Hex(size) }
            }
            Context::SlotId(SlotId(slot)) => Self::SlotId(slot),
            Context::Address(address) => Self::Address(Hex(address)),
            Context::Msr(index) => Self::Msr(Hex(index)),
            Context::Transcript { line } => Self::Transcript(line),
        })
    }

    fn value(self) -> Context {
        match self {
            Self::Capability(CapabilityForm(cap)) => Context::Capability(cap),
            Self::Vcpu(id) => Context::Vcpu(id),
            Self::Gsi(gsi) => Context::Gsi(Gsi(gsi)),
            Self::Routes(n) => Context::Routes(n),
            Self::Slot { slot, guest: Hex(guest), size: Hex(size) } => {
                Context::Slot { slot: SlotId(slot), guest, size }
            }
            Self::SlotId(slot) => Context::SlotId(SlotId(slot)),
            Self::Address(Hex(address)) => Context::Address(address),
            Self::Msr(Hex(index)) => Context::Msr(index),
            Self::Transcript(line) => Context::Transcript { line },
        }
    }
}

/// A capability by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CapabilityForm(Capability);

impl Serialize for CapabilityForm {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0.name())
    }
}

impl<'de> Deserialize<'de> for CapabilityForm {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let name = String::deserialize(from)?;
        let cap = Capability::ALL.iter().find(|cap| cap.name() == name);
        let wrong = || de::Error::custom(format_args!("no capability is named {name:?}"));
        cap.map(|cap| Self(*cap)).ok_or_else(wrong)
    }
}
