//! What a path in a configuration file is relative to: the directory of the file.

use std::any::TypeId;
use std::path::{Path, PathBuf};

use clap::Arg;

use crate::config::words;

/// Where the path is in a value that is not just a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PathForm {
    /// What is before it.
    before: &'static str,
    /// A value with this beginning has no path.
    unless: Option<&'static str>,
    /// It is a word of a list with commas, the first that has `before`; a comma in it is written twice.
    list: bool,
}

/// The value is a path.
const WHOLE: PathForm = PathForm { before: "", unless: None, list: false };

/// The flags whose values have a path in them. Those that are just a path are known by their type.
const FORMS: &[(&str, PathForm)] = &[
    ("disk", PathForm { list: true, ..WHOLE }),
    ("gdb", PathForm { before: "unix:", ..WHOLE }),
    ("kvm", PathForm { unless: Some("fd:"), ..WHOLE }),
    ("vsock", PathForm { before: "uds=", list: true, ..WHOLE }),
];

/// Where there is a path in the values of a flag.
pub(super) fn path_form(name: &str, arg: &Arg) -> Option<PathForm> {
    if arg.get_value_parser().type_id() == TypeId::of::<PathBuf>() {
        return Some(WHOLE);
    }
    FORMS.iter().find(|(flag, _)| *flag == name).map(|(_, form)| *form)
}

impl PathForm {
    /// The value with its path, if it has one, changed. A path that is no text can't be in a value.
    pub(super) fn change(&self, value: &str, change: impl Fn(&Path) -> PathBuf) -> String {
        if value.is_empty() || self.unless.is_some_and(|unless| value.starts_with(unless)) {
            return value.to_owned();
        }
        let change = |path: &str| match path {
            "" => String::new(),
            path => change(Path::new(path)).to_string_lossy().into_owned(),
        };
        if !self.list {
            return match value.strip_prefix(self.before) {
                Some(path) => format!("{}{}", self.before, change(path)),
                None => value.to_owned(),
            };
        }
        let mut changed = false;
        let words = words(value).into_iter().map(|word| match word.strip_prefix(self.before) {
            Some(path) if !changed => {
                changed = true;
                format!("{}{}", self.before, change(path))
            }
            _ => word,
        });
        words.map(|word| word.replace(',', ",,")).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(flag: &str, value: &str) -> String {
        let form = FORMS.iter().find(|(name, _)| *name == flag).map_or(WHOLE, |(_, form)| *form);
        form.change(value, |path| Path::new("/a,b").join(path))
    }

    #[test]
    fn only_the_path_in_a_value_is_changed() {
        assert_eq!(changed("kernel", "vmlinux"), "/a,b/vmlinux");
        assert_eq!(changed("kernel", "/vmlinux"), "/vmlinux");
        assert_eq!(changed("kernel", ""), "");
        assert_eq!(changed("gdb", "unix:vm.gdb"), "unix:/a,b/vm.gdb");
        assert_eq!(changed("gdb", "tcp:127.0.0.1:1"), "tcp:127.0.0.1:1");
        assert_eq!(changed("kvm", "fd:3"), "fd:3");
        assert_eq!(changed("kvm", "./fd:3"), "/a,b/./fd:3");
        assert_eq!(changed("disk", "c,,d,readonly,serial=x"), "/a,,b/c,,d,readonly,serial=x");
        assert_eq!(changed("disk", "/c"), "/c");
        assert_eq!(changed("vsock", "cid=3,uds=s"), "cid=3,uds=/a,,b/s");
        assert_eq!(changed("vsock", "cid=3"), "cid=3");
    }
}
