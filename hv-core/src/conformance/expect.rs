//! What a case says about an answer: a check that passes, or says what came instead.

use std::fmt::Debug;

use super::{Checked, Miss};
use crate::{Errno, Error};

/// The call is refused with `errno`.
pub(super) fn refused<T: Debug>(result: Result<T, Error>, errno: Errno) -> Checked {
    match result {
        Err(error) if error.errno == errno => Ok(()),
        Err(error) => Err(Miss::failed(format!("expected {errno}, got: {error}"))),
        Ok(value) => Err(Miss::failed(format!("expected {errno}, got success: {value:?}"))),
    }
}

/// `what` is `expected`.
pub(super) fn same<T: Debug + PartialEq>(what: &str, got: T, expected: T) -> Checked {
    if got == expected {
        return Ok(());
    }
    Err(Miss::failed(format!("{what}: expected {expected:?}, got {got:?}")))
}

/// `what`, which is a statement, is true.
pub(super) fn holds(what: &str, truth: bool) -> Checked {
    if truth { Ok(()) } else { Err(Miss::failed(format!("not so: {what}"))) }
}
