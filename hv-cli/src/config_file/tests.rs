use std::path::Path;

use clap::Command;
use proptest::prelude::*;

use super::file::{ConfigFile, ConfigFileError};
use super::vocabulary::{Kind, Vocabulary, is_relation};
use crate::cli::{printed, run_command, run_config};

fn vocabulary() -> Vocabulary {
    Vocabulary::new(&run_command())
}

/// The arguments a file makes, or its error.
fn arguments(text: &str) -> Result<Vec<String>, ConfigFileError> {
    let file = ConfigFile::parse(Path::new("dir/vm.toml"), text, &vocabulary())?;
    Ok(file.arguments(|_| false).iter().map(|arg| arg.to_str().unwrap().to_owned()).collect())
}

fn refused(text: &str) -> String {
    arguments(text).unwrap_err().to_string()
}

/// A file with this text.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn every_flag_of_hv_run_is_a_key_and_nothing_else_is() {
    let (run, vocabulary) = (run_command(), vocabulary());
    let keys: Vec<_> = vocabulary.keys().iter().map(|key| key.name.as_str()).collect();
    let flags: Vec<_> = run.get_arguments().map(|flag| flag.get_long().unwrap()).collect();
    assert_eq!(keys, flags);
    for flag in run.get_arguments() {
        // What a key can't say: another name, or a value that looks like a flag.
        assert!(flag.get_short().is_none() && flag.get_all_aliases().is_none(), "{flag}");
        assert!(!flag.is_allow_hyphen_values_set() && !flag.is_required_set(), "{flag}");
        let name = flag.get_long().unwrap();
        let shown = flag.get_value_names().unwrap_or_default().iter().map(ToString::to_string);
        let shown: String = shown.collect();
        let has_path = shown.contains("FILE") || shown.contains("PATH");
        let path = vocabulary.get(name).unwrap().path;
        assert_eq!(has_path, path.is_some(), "{name} {shown}: say in paths.rs where its path is");
    }
}

#[test]
fn a_file_is_the_flags_it_names() {
    let text = r#"
        kernel = "vmlinux"      # beside the file
        initrd = "/boot/initrd"
        cmdline = "console=ttyS0 -- 'x'"
        cpus = 0x2
        memory = "1G"
        rng = true
        prefault = false
        device = ["testdev", "isa-debug-exit,iobase=0x501"]
        gdb = "unix:vm.gdb"
        kvm = "fd:3"
    "#;
    let mut made = arguments(text).unwrap();
    made.sort();
    let expected = [
        "--cmdline=console=ttyS0 -- 'x'",
        "--cpus=2",
        "--device=isa-debug-exit,iobase=0x501",
        "--device=testdev",
        "--gdb=unix:dir/vm.gdb",
        "--initrd=/boot/initrd",
        "--kernel=dir/vmlinux",
        "--kvm=fd:3",
        "--memory=1G",
        "--rng",
    ];
    assert_eq!(made, expected);
    assert_eq!(arguments("device = 'testdev'").unwrap(), ["--device=testdev"]);
    // A default needs nothing beside it: --format needs --kernel.
    assert_eq!(arguments("format = 'auto'\nmemory = '128M'").unwrap(), [""; 0]);
    assert_eq!(arguments("").unwrap(), [""; 0]);
}

#[test]
fn a_directory_may_have_a_comma() {
    let text = "disk = 'd,readonly'\nvsock = 'cid=3,uds=s'";
    let file = ConfigFile::parse(Path::new("a,b/vm.toml"), text, &vocabulary()).unwrap();
    let args: Vec<_> = file.arguments(|_| false).into_iter().map(|arg| arg.into_string()).collect();
    let args: Vec<_> = args.iter().map(|arg| arg.as_deref().unwrap()).collect();
    let virtio = run_config(&args).virtio;
    assert_eq!(virtio.disks[0].path, Path::new("a,b/d"));
    assert_eq!(virtio.vsock.unwrap().path, Path::new("a,b/s"));
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    for (text, says) in [
        (
            "rng = true\nmemroy = 1",
            "dir/vm.toml:2:1: there is no key \"memroy\"; did you mean memory?",
        ),
        (
            "memory_file = 'x'",
            "vm.toml:1:1: there is no key \"memory_file\"; did you mean memory-file?",
        ),
        ("config = 'x'", "1:1: there is no key \"config\""),
        ("help = true", "1:1: there is no key \"help\""),
        ("'rng=true --x' = 1", "1:1: there is no key \"rng=true --x\"; the keys"),
        ("'\\u001b[31m' = 1", "there is no key"),
        ("[rng]\nx = 1", "1:1: rng: true or false is expected, not table"),
        ("ä = 1", "1:1: "),
        ("memory = '1.5G'", "1:10: memory: \"1.5G\" can't be: give a number with a unit"),
        ("# é\n\tmemory = 1.5", "2:11: memory: a string or a number is expected, not float"),
        ("cpus = -1", "1:8: cpus: \"-1\" can't be: "),
        ("cpus = 0", "1:8: cpus: \"0\" can't be: "),
        ("cpus = 99999999999999999999", "1:8: cpus: "),
        ("irqchip = 'none'", "irqchip: \"none\" can't be: it is one of kernel, split"),
        ("rng = 'yes'", "1:7: rng: true or false is expected, not string"),
        ("device = ['testdev', 'virtio']", "1:22: device: \"virtio\" can't be: there is no device"),
        ("device = [['testdev']]", "1:11: device: a string is expected, not array"),
        ("device = {name = 'testdev'}", "device: an array of strings, or one string is expected"),
        ("trace = ''", "1:9: trace: \"\" can't be: a value is required"),
        ("kernel = \"a\\u0000b\"", "1:10: kernel: \"a\\0b\" can't be: no value can have a NUL"),
        ("gdb = 'tcp:0.0.0.0:1'", "1:7: gdb: \"tcp:0.0.0.0:1\" can't be: 0.0.0.0:1 is no loopback"),
        ("rng = true\nrng = true", "2:1: duplicate key"),
        ("rng = ", "1:7: "),
        ("x", "1:2: "),
    ] {
        let error = refused(text);
        assert!(error.contains(says), "{text:?}: {error}");
        assert!(!error.contains(['\n', '\u{1b}']), "{error:?}");
    }
}

#[test]
fn a_configuration_is_bounded() {
    let long = "x".repeat(70_000);
    assert!(
        refused(&format!("cmdline = '{long}'")).contains("cmdline: at most 256 values of 64 KiB")
    );
    let many = "'testdev',".repeat(300);
    assert!(refused(&format!("device = [{many}]")).contains("device: at most 256 values"));
    assert!(refused(&format!("device = {}1{}", "[".repeat(9999), "]".repeat(9999))).contains("1:"));
    let bad = refused(&format!("memory = '{}'", "y".repeat(1000)));
    assert!(bad.len() < 250, "{bad}");

    let path = |text: &[u8]| {
        let file = file("");
        std::fs::write(file.path(), text).unwrap();
        ConfigFile::read(file.path(), &vocabulary()).unwrap_err().to_string()
    };
    assert!(path(&vec![b'#'; (1 << 20) + 1]).contains("has more than 1024 KiB"));
    assert!(path(b"rng = \xff").contains("byte 6 is no UTF-8"));
    let endless = ConfigFile::read(Path::new("/dev/zero"), &vocabulary());
    assert!(matches!(endless, Err(ConfigFileError::TooLong { .. })));
    let none = ConfigFile::read(Path::new("/no/such/file"), &vocabulary()).unwrap_err();
    assert!(none.to_string().contains("'/no/such/file' can't be read: ENOENT"), "{none}");
}

#[test]
fn the_command_line_has_precedence_and_adds_to_lists() {
    let file = file("kernel = 'k'\ncpus = 2\nmemory = '1G'\ndevice = 'testdev'\nrng = true");
    let with =
        |args: &[&str]| run_config(&[&["--config", file.path().to_str().unwrap()], args].concat());
    let config = with(&["--cpus", "3", "--device=isa-debug-exit", "--prefault"]);
    assert_eq!((config.cpus, config.memory.0), (3, 1 << 30));
    assert!(config.virtio.rng && config.backing.prefault);
    assert_eq!(config.devices.len(), 2);
    // Beside the file, but where the command line says in its own directory.
    let beside = file.path().parent().unwrap();
    assert_eq!(config.kernel.unwrap().path, beside.join("k"));
    let here = with(&["--initrd", "i"]).kernel.unwrap();
    assert_eq!((here.path, here.initrd), (beside.join("k"), Some("i".into())));
}

#[test]
fn what_is_printed_is_complete_and_taken_again() {
    for args in [
        &[][..],
        &["--kernel", "/k", "--cmdline", "a=\"b\" 'c' \\ \t\u{1b}", "--cpus", "3"],
        &["--kernel", "/k", "--initrd", "/i", "--format", "elf", "--memory", "1234567K"],
        &["--kernel", "/k", "--cmdline", "007", "--rng", "--prefault", "--hugepages", "2m"],
        &["--kernel", "/k", "--cmdline=-1", "--no-complete", "--irqchip", "split"],
        &["--json", "--device", "testdev", "--device", "isa-debug-exit,iobase=0x501"],
        &["--trace", "/t", "--stats-json", "/s\n", "--gdb", "unix:/g", "--gdb-wait"],
        &["--record", "/r", "--kvm", "fd:7", "--memory-file", "/m"],
    ] {
        // --json there is how it is printed, so here it is in a file.
        let json = file("json = true");
        let has_json = args.contains(&"--json");
        let mut print: Vec<_> = args.iter().copied().filter(|arg| *arg != "--json").collect();
        if has_json {
            print.push(json.path().to_str().unwrap());
        }
        let shown = printed(&print);
        let (text, as_json) = (shown.to_string(), serde_json::to_value(&shown).unwrap());
        for key in vocabulary().keys() {
            let line = |line: &str| {
                let line = line.strip_prefix("# ").unwrap_or(line);
                line.split_once(" = ").is_some_and(|(name, _)| name == key.name)
            };
            assert!(text.lines().any(line), "{} is missing:\n{text}", key.name);
            assert!(as_json.get(&key.name).is_some(), "{}", key.name);
        }
        let again = file(&text);
        let again = run_config(&["--config", again.path().to_str().unwrap()]);
        assert_eq!(again, run_config(args), "{text}");
    }
    let text = printed(&["--kernel", "k", "--kvm", "./fd:3"]).to_string();
    let here = std::env::current_dir().unwrap().join("k");
    assert!(text.contains(&format!("kernel = \"{}\"", here.display())), "{text}");
    assert!(text.contains("cpus = 1\n") && text.contains("# initrd = FILE\n"), "{text}");
}

#[test]
fn a_flag_may_need_what_the_file_has() {
    let command = Command::new("run").args(vocabulary().lenient());
    let mut parsed = 0;
    for flag in run_command().get_arguments() {
        let name = flag.get_long().unwrap();
        let value = flag.get_possible_values().first().map(|value| value.get_name().to_owned());
        let arg = match vocabulary().get(name).unwrap().kind {
            Kind::Switch => format!("--{name}"),
            // What is no value of some flags is the only thing wrong with it.
            _ => format!("--{name}={}", value.as_deref().unwrap_or("1")),
        };
        match command.clone().try_get_matches_from(["run", &arg]) {
            Ok(_) => parsed += 1,
            Err(error) => assert!(!is_relation(&error), "{arg}: {error}"),
        }
    }
    assert!(parsed > 10, "{parsed}");
}

proptest! {
    #[test]
    fn any_text_is_a_configuration_or_an_error_in_one_line(
        lines in prop::collection::vec(
            (
                prop_oneof![
                    Just("rng"), Just("memory"), Just("device"), Just("kernel"), Just("\"x"), Just("[a"),
                ],
                prop_oneof![
                    Just("true".to_owned()), Just("1".to_owned()), Just("['testdev']".to_owned()),
                    "[ -~]{0,12}", "\"[^\"\\\\]{0,8}\"", ".{0,6}",
                ],
            ),
            0..4,
        ),
    ) {
        let text: String = lines.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        if let Err(error) = arguments(&text) {
            let message = error.to_string();
            prop_assert!(!message.contains('\n'), "{:?}", message);
            if let ConfigFileError::At { at, .. } = error {
                prop_assert!(at.line <= text.matches('\n').count() + 1, "{}", message);
            }
        }
    }
}
