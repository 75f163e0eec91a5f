//! The commands of the README, for `cargo xtask ci` to run: what the README shows works.

/// What a command of the README needs.
#[derive(Debug, PartialEq)]
pub(crate) enum Kind {
    /// `cargo xtask ...`: a step of ci itself, or one that waits for a person.
    Xtask(String),
    /// It runs `hv` or an example called `*_kvm`: both use `/dev/kvm`.
    Kvm,
    /// Anything else: it runs everywhere.
    Plain,
}

/// A line of a block marked as `sh`, with its continuation lines.
#[derive(Debug, PartialEq)]
pub(crate) struct Command {
    pub(crate) line: String,
    pub(crate) kind: Kind,
}

/// The commands in the blocks marked `sh`, in order. Blocks with another mark are not for running.
pub(crate) fn commands(readme: &str) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut inside = false;
    let mut pending = String::new();
    for line in readme.lines() {
        if let Some(mark) = line.strip_prefix("```") {
            inside = !inside && mark.trim() == "sh";
            continue;
        }
        let line = line.trim();
        if !inside || line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(start) = line.strip_suffix('\\') {
            pending.push_str(start);
            continue;
        }
        pending.push_str(line);
        let line = std::mem::take(&mut pending);
        let kind = kind(&line);
        commands.push(Command { line, kind });
    }
    commands
}

fn kind(line: &str) -> Kind {
    if let Some(rest) = line.strip_prefix("cargo xtask ") {
        Kind::Xtask(rest.split_whitespace().next().unwrap_or_default().to_owned())
    } else if line.split_whitespace().any(|word| word == "hv-cli" || word.ends_with("_kvm")) {
        Kind::Kvm
    } else {
        Kind::Plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_marked_blocks_are_commands() {
        let readme = "\
text
```sh
# a comment
cargo xtask test
cargo run --release -p hv-cli -- run \\
    --cpus 2
cargo run -p hv-kvm --example real_mode_kvm

cargo run -p hv-irq --example embed_irq
```
cargo not-in-a-block
```console
$ cargo shown-only
```
```
cargo unmarked
```
```sh
cargo xtask guest --path vmlinux
```
";
        let commands = commands(readme);
        let lines: Vec<_> = commands.iter().map(|command| command.line.as_str()).collect();
        assert_eq!(
            lines,
            [
                "cargo xtask test",
                "cargo run --release -p hv-cli -- run --cpus 2",
                "cargo run -p hv-kvm --example real_mode_kvm",
                "cargo run -p hv-irq --example embed_irq",
                "cargo xtask guest --path vmlinux"
            ]
        );
        let kinds: Vec<_> = commands.into_iter().map(|command| command.kind).collect();
        let xtask = |name: &str| Kind::Xtask(name.to_owned());
        assert_eq!(kinds, [xtask("test"), Kind::Kvm, Kind::Kvm, Kind::Plain, xtask("guest")]);
    }

    #[test]
    fn an_unmarked_block_does_not_open_a_marked_one() {
        assert_eq!(commands("```\n```\nsh\n```text\n```sh\n"), []);
    }
}
