//! Plain data as JSON, both ways and bit for bit: the parts every other form here is made of.
//!
//! A number a person reads in hexadecimal is a string (`"0xfee00000"`), bytes are a string of
//! hexadecimal digits, and what is zero because nothing uses it is left out. What is read back is
//! strict: an unknown field, a number out of range or a digit too many is an error, never a guess.

mod exit;
mod fault;
mod state;
mod vm;

use std::fmt;
use std::marker::PhantomData;

use data_encoding::HEXLOWER;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeSeq, Serializer};

pub(super) use exit::{ExitForm, InterruptsForm, ReplyForm};
pub(super) use fault::ErrorForm;
pub(super) use state::{
    CpuidForm, DebugregsForm, EventsForm, FpuForm, GuestDebugForm, LapicForm, MpStateForm, MsrForm,
    RegsForm, SregsForm, TranslationForm, XcrsForm,
};
pub(super) use vm::{
    ClockForm, DirtyForm, IrqchipForm, LineStatusForm, MsiForm, MsiStatusForm, MsrIndexForm,
    PitConfigForm, PitForm, RouteForm, WriteForm,
};

/// The form a `T` has in JSON.
pub(super) trait Form<T>: Serialize + for<'de> Deserialize<'de> {
    /// The form of a value.
    fn of(value: &T) -> Self;
    /// The value, exactly as it was.
    fn value(self) -> T;
}

macro_rules! itself {
    ($($type:ty),*) => {$(
        impl Form<$type> for $type {
            fn of(value: &$type) -> Self {
                *value
            }
            fn value(self) -> $type {
                self
            }
        }
    )*};
}
itself!(bool, u8, u16, u32, i32, u64, i64, usize);

impl<T, F: Form<T>, const N: usize> Form<[T; N]> for [F; N]
where
    [F; N]: Serialize + for<'de> Deserialize<'de>,
{
    fn of(value: &[T; N]) -> Self {
        value.each_ref().map(F::of)
    }
    fn value(self) -> [T; N] {
        self.map(F::value)
    }
}

impl<T, F: Form<T>> Form<Vec<T>> for Vec<F> {
    fn of(value: &Vec<T>) -> Self {
        value.iter().map(F::of).collect()
    }
    fn value(self) -> Vec<T> {
        self.into_iter().map(F::value).collect()
    }
}

/// A number in hexadecimal with `0x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hex<T = u64>(pub(super) T);

impl<T: Copy + fmt::LowerHex> Serialize for Hex<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de, T: TryFrom<u64>> Deserialize<'de> for Hex<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text<T>(PhantomData<T>);
        impl<T: TryFrom<u64>> Visitor<'_> for Text<T> {
            type Value = Hex<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a number of {} bits such as \"0x1f\"", size_of::<T>() * 8)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let wrong = || E::invalid_value(de::Unexpected::Str(text), &self);
                let digits = text.strip_prefix("0x").ok_or_else(wrong)?;
                // Only what is written is read, or a transcript would not survive being read.
                let canonical = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                    && (digits == "0" || !digits.starts_with('0'));
                let number = u64::from_str_radix(digits, 16).ok().filter(|_| canonical);
                number.and_then(|n| T::try_from(n).ok()).map(Hex).ok_or_else(wrong)
            }
        }
        from.deserialize_str(Text(PhantomData))
    }
}

impl<T: Copy + fmt::LowerHex + TryFrom<u64>> Form<T> for Hex<T> {
    fn of(value: &T) -> Self {
        Self(*value)
    }
    fn value(self) -> T {
        self.0
    }
}

/// Bytes in hexadecimal, two digits each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blob<const N: usize>(pub(super) [u8; N]);

impl<const N: usize> Serialize for Blob<N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Bytes(&self.0).serialize(to)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Blob<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bytes = OwnedBytes::deserialize(from)?.0;
        let n = bytes.len();
        let bytes = bytes.try_into();
        let wrong = |_| de::Error::custom(format_args!("{n} bytes where {N} are needed"));
        bytes.map(Self).map_err(wrong)
    }
}

impl<const N: usize> Form<[u8; N]> for Blob<N> {
    fn of(value: &[u8; N]) -> Self {
        Self(*value)
    }
    fn value(self) -> [u8; N] {
        self.0
    }
}

/// Borrowed bytes in hexadecimal.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&HEXLOWER.encode_display(self.0))
    }
}

/// Bytes read from hexadecimal: at most half of the length of the text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct OwnedBytes(pub(super) Vec<u8>);

impl<'de> Deserialize<'de> for OwnedBytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = OwnedBytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes as lower-case hexadecimal digits, two each")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<OwnedBytes, E> {
                let bytes = HEXLOWER.decode(text.as_bytes());
                let wrong = |_| E::invalid_value(de::Unexpected::Str(text), &self);
                bytes.map(OwnedBytes).map_err(wrong)
            }
        }
        from.deserialize_str(Digits)
    }
}

impl Serialize for OwnedBytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        Bytes(&self.0).serialize(to)
    }
}

/// An array without its trailing zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Short<F, const N: usize>(pub(super) [F; N]);

impl<F: Default + Copy, const N: usize> Default for Short<F, N> {
    fn default() -> Self {
        Self([F::default(); N])
    }
}

impl<F: Serialize + Default + PartialEq, const N: usize> Serialize for Short<F, N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let zero = F::default();
        let used = self.0.iter().rposition(|item| *item != zero).map_or(0, |last| last + 1);
        let mut list = to.serialize_seq(Some(used))?;
        for item in self.0.iter().take(used) {
            list.serialize_element(item)?;
        }
        list.end()
    }
}

impl<'de, F: Deserialize<'de> + Default + Copy, const N: usize> Deserialize<'de> for Short<F, N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Items<F, const N: usize>(PhantomData<F>);
        impl<'de, F: Deserialize<'de> + Default + Copy, const N: usize> Visitor<'de> for Items<F, N> {
            type Value = Short<F, N>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N}")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut items = [F::default(); N];
                let mut to = items.iter_mut();
                while let Some(item) = list.next_element()? {
                    let place = to.next().ok_or_else(|| de::Error::invalid_length(N + 1, &self))?;
                    *place = item;
                }
                Ok(Short(items))
            }
        }
        from.deserialize_seq(Items(PhantomData))
    }
}

impl<T, F: Form<T> + Default + Copy + PartialEq, const N: usize> Form<[T; N]> for Short<F, N> {
    fn of(value: &[T; N]) -> Self {
        Self(value.each_ref().map(F::of))
    }
    fn value(self) -> [T; N] {
        self.0.map(F::value)
    }
}

/// Whether a field need not be written.
pub(super) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The form of a structure of KVM, field by field: those before `;` always written, those after it
/// only if they are not zero. The compiler checks that no field is forgotten.
macro_rules! form {
    ($(#[$doc:meta])* $form:ident = $type:ty as $path:path { $($field:ident: $kind:ty,)* ; $($rest:ident: $rest_kind:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(in crate::layer) struct $form {
            $($field: $kind,)*
            $(#[serde(default, skip_serializing_if = "crate::layer::json::is_zero")] $rest: $rest_kind,)*
        }

        impl crate::layer::json::Form<$type> for $form {
            fn of(value: &$type) -> Self {
                use $path as Structure;
                let Structure { $($field,)* $($rest,)* } = value;
                use crate::layer::json::Form;
                Self { $($field: Form::of($field),)* $($rest: Form::of($rest),)* }
            }
            fn value(self) -> $type {
                use $path as Structure;
                use crate::layer::json::Form;
                Structure { $($field: Form::value(self.$field),)* $($rest: Form::value(self.$rest),)* }
            }
        }
    };
}
use form;
