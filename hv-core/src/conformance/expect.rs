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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ioctl;

    #[test]
    fn a_refusal_must_be_the_one_expected() {
        let error = Err::<(), _>(Error::new(Ioctl::CreateIrqchip, Errno::EEXIST));
        assert_eq!(refused(error, Errno::EEXIST), Ok(()));
        let Err(Miss::Failed(why)) = refused(error, Errno::EINVAL) else { panic!("it passed") };
        assert!(why.starts_with("expected EINVAL (Invalid argument), got: KVM_CREATE_IRQCHIP"));
        let Err(Miss::Failed(why)) = refused(Ok(7), Errno::EINVAL) else { panic!("it passed") };
        assert_eq!(why, "expected EINVAL (Invalid argument), got success: 7");
    }

    #[test]
    fn a_difference_shows_both_sides() {
        assert_eq!(same("the sum", 1 + 1, 2), Ok(()));
        assert_eq!(same("the sum", 3, 2), Err(Miss::failed("the sum: expected 2, got 3")));
        assert_eq!(holds("1 < 2", 1 < 2), Ok(()));
        assert_eq!(holds("2 < 1", 2 < 1), Err(Miss::failed("not so: 2 < 1")));
    }
}
