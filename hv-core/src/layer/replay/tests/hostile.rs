//! Transcripts that nobody recorded.

use std::io::{self, Cursor, Read};

use super::super::Difference;
use super::replay;
use crate::layer::transcript::MAX_LINE;
use crate::layer::{Replay, TranscriptError};
use crate::{Capability, Errno, Hypervisor, MemoryBackend, SlotId, Vcpu, Vm};

fn open(transcript: impl Into<Vec<u8>>) -> Result<Replay, TranscriptError> {
    Replay::new(Cursor::new(transcript.into()))
}

const FIRST: &str = "{\"hv-transcript\":1,\"meta\":{}}\n";

/// What stops the replay of a transcript of one line.
fn second(line: &str) -> Difference {
    let kvm = replay(&format!("{FIRST}{line}\n{{\"end\":true}}\n"));
    assert_eq!(kvm.api_version().unwrap_err().errno, Errno::EPROTO, "{line}");
    (*kvm.finish().unwrap_err()).clone()
}

#[test]
fn what_is_no_transcript() {
    for text in ["", "\n", "{}", "{}\n", "[1]\n", "hello\n", "{\"hv-transcript\":\"1\"}\n", "\0\n"]
    {
        let error = open(text).unwrap_err();
        let cut = !text.is_empty() && !text.ends_with('\n');
        match error {
            TranscriptError::NotATranscript => assert!(!cut, "{text:?}"),
            TranscriptError::CutOff { lines: 0 } => assert!(cut, "{text:?}"),
            _ => panic!("{text:?}: {error}"),
        }
    }
    assert!(matches!(open([0xff, b'\n']), Err(TranscriptError::NotATranscript)));
}

#[test]
fn another_version_is_told_as_such_whatever_else_is_new() {
    let error = open("{\"hv-transcript\":2,\"new\":[]}\n").unwrap_err();
    assert!(matches!(error, TranscriptError::Version { found: 2 }));
    assert_eq!(error.to_string(), "the transcript is of version 2; this program reads version 1");
    for first in
        ["{\"hv-transcript\":1,\"new\":[]}\n", "{\"hv-transcript\":1,\"meta\":{\"a\":1}}\n"]
    {
        assert!(matches!(open(first), Err(TranscriptError::Malformed { line: 1, .. })), "{first}");
    }
}

#[test]
fn lines_that_are_malformed_are_errors_with_their_number() {
    let deep = format!("{{\"args\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for line in [
        "",
        "nonsense",
        "{",
        "null",
        "[]",
        "{\"thread\":-1,\"on\":\"system\",\"call\":\"x\"}",
        "{\"thread\":4294967296,\"on\":\"system\",\"call\":\"x\"}",
        "{\"thread\":1e999,\"on\":\"system\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"sytem\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm00\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm+1\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm4294967296\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm0/disk1\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"vm0/vcpu1/vcpu1\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"system\",\"call\":7}",
        "{\"thread\":0,\"on\":\"system\",\"call\":\"x\",\"when\":7}",
        "{\"thread\":0,\"thread\":0,\"on\":\"system\",\"call\":\"x\"}",
        "{\"signal\":0,\"count\":99999999999}",
        "{\"signal\":\"0\",\"count\":1}",
        deep.as_str(),
    ] {
        let difference = second(line);
        let malformed = TranscriptError::Malformed { line: 2, error: dummy() };
        let Difference::Transcript(error) = &difference else { panic!("{line}: {difference}") };
        assert_eq!(error.line(), malformed.line(), "{line}");
        assert!(
            matches!(error, TranscriptError::Malformed { .. } | TranscriptError::Mixed { .. }),
            "{line}: {error}"
        );
        assert!(error.to_string().len() < 400, "{error}");
    }
}

fn dummy() -> std::sync::Arc<serde_json::Error> {
    std::sync::Arc::new(serde_json::from_str::<u8>("x").unwrap_err())
}

#[test]
fn members_that_do_not_belong_together() {
    for line in [
        "{}",
        "{\"end\":false}",
        "{\"signal\":0}",
        "{\"signal\":0,\"count\":1,\"end\":true}",
        "{\"thread\":0,\"on\":\"system\"}",
        "{\"on\":\"system\",\"call\":\"x\"}",
        "{\"thread\":0,\"on\":\"system\",\"call\":\"x\",\"end\":true}",
        "{\"thread\":0,\"on\":\"system\",\"call\":\"x\",\"ok\":1,\"err\":1}",
    ] {
        let difference = second(line);
        assert!(
            matches!(difference, Difference::Transcript(TranscriptError::Mixed { line: 2, .. })),
            "{line}: {difference}"
        );
    }
    // A signal of what KVM was never given.
    let difference = second("{\"signal\":0,\"count\":4294967295}");
    assert!(difference.to_string().contains("no call has named"), "{difference}");
}

#[test]
fn results_that_are_none_of_their_call() {
    let deep = format!("{}1{}", "[".repeat(1000), "]".repeat(1000));
    for result in [
        "\"ok\":\"12\"",
        "\"ok\":99999999999999999999",
        "\"ok\":1e400",
        "\"ok\":{}",
        "",
        "\"err\":7",
        "\"err\":{\"errno\":\"EWHAT\",\"call\":\"KVM_RUN\"}",
        "\"err\":{\"errno\":5,\"call\":\"KVM_RUN\"}",
        "\"err\":{\"errno\":\"EIO\",\"call\":\"KVM_WHAT\"}",
        &format!("\"ok\":{deep}"),
    ] {
        let comma = if result.is_empty() { "" } else { "," };
        let difference = second(&format!(
            "{{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_GET_API_VERSION\"{comma}{result}}}"
        ));
        assert!(matches!(difference, Difference::Result { line: 2, .. }), "{result}: {difference}");
    }
}

#[test]
fn exits_that_claim_data_they_do_not_have() {
    for ran in [
        "{\"exit\":{\"io_in\":{\"port\":\"0x60\",\"size\":255,\"count\":4294967295}}}",
        "{\"exit\":{\"io_in\":{\"port\":\"0x60\",\"size\":1,\"count\":1}},\"data\":\"00\"}",
        "{\"exit\":{\"io_out\":{\"port\":\"0x60\",\"size\":4,\"count\":2}},\"data\":\"00\"}",
        "{\"exit\":{\"io_out\":{\"port\":\"0x60\",\"size\":4,\"count\":4294967295}}}",
        "{\"exit\":{\"io_out\":{\"port\":\"0x10060\",\"size\":1,\"count\":0}}}",
        "{\"exit\":\"hlt\",\"data\":\"00\"}",
        "{\"exit\":\"hlt\",\"data\":\"0\"}",
        "{\"exit\":\"stroll\"}",
        "{\"exit\":{\"mmio_read\":{\"address\":\"0x10000000000000000\",\"len\":1}}}",
        "{}",
        "[]",
    ] {
        let kvm = replay(&format!(
            "{FIRST}{{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_CREATE_VM\",\"args\":{{\"type\":0}},\"ok\":0}}\n\
             {{\"thread\":0,\"on\":\"vm0\",\"call\":\"KVM_CREATE_VCPU\",\"args\":{{\"id\":0}}}}\n\
             {{\"thread\":0,\"on\":\"vm0/vcpu0\",\"call\":\"KVM_RUN\",\"ok\":{ran}}}\n{{\"end\":true}}\n"
        ));
        let mut vcpu = kvm.create_vm(0).unwrap().create_vcpu(0).unwrap();
        assert_eq!(vcpu.run().unwrap_err().errno, Errno::EPROTO, "{ran}");
        assert!(vcpu.io_data().is_empty());
        assert!(matches!(*kvm.finish().unwrap_err(), Difference::Result { line: 4, .. }), "{ran}");
    }
}

#[test]
fn a_dirty_log_of_another_size() {
    for log in ["{\"words\":9,\"dirty\":[]}", "{\"words\":1,\"dirty\":[[1,\"0x1\"]]}", "[]"] {
        let kvm = replay(&format!(
            "{FIRST}{{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_CREATE_VM\",\"args\":{{\"type\":0}},\"ok\":0}}\n\
             {{\"thread\":0,\"on\":\"vm0\",\"call\":\"KVM_GET_DIRTY_LOG\",\"args\":{{\"slot\":0,\"words\":1}},\"ok\":{log}}}\n"
        ));
        let vm = kvm.create_vm(0).unwrap();
        assert_eq!(vm.dirty_log(SlotId(0), &mut [0]).unwrap_err().errno, Errno::EPROTO);
        assert!(matches!(*kvm.finish().unwrap_err(), Difference::Result { line: 3, .. }), "{log}");
    }
}

#[test]
fn a_transcript_that_was_cut_off_replays_up_to_there() {
    let call = "{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_GET_API_VERSION\",\"ok\":12}\n";
    for rest in ["", &call[..20], &call[..call.len() - 1]] {
        let kvm = replay(&format!("{FIRST}{call}{rest}"));
        assert_eq!(kvm.api_version(), Ok(12));
        assert_eq!(kvm.api_version().unwrap_err().errno, Errno::EPROTO);
        let difference = kvm.finish().unwrap_err();
        assert!(
            matches!(*difference, Difference::Transcript(TranscriptError::CutOff { lines: 2 })),
            "{difference}"
        );
        assert!(difference.to_string().contains("cut off"), "{difference}");
    }
    // Also if the VMM ends there.
    let kvm = replay(&format!("{FIRST}{call}"));
    assert_eq!(kvm.api_version(), Ok(12));
    assert!(matches!(*kvm.finish().unwrap_err(), Difference::Transcript(_)));
    // What stands after the end.
    let kvm = replay(&format!("{FIRST}{call}{{\"end\":true}}\n{call}"));
    assert_eq!(kvm.api_version(), Ok(12));
    assert!(matches!(
        *kvm.finish().unwrap_err(),
        Difference::Transcript(TranscriptError::Mixed { line: 4, .. })
    ));
}

#[test]
fn a_line_without_an_end_takes_no_more_memory_than_a_line_may() {
    // Endless, unless it stops being read.
    let endless = io::BufReader::new(io::repeat(b' '));
    let error = Replay::new(endless).unwrap_err();
    assert!(matches!(error, TranscriptError::TooLong { line: 1 }), "{error}");
    // The longest there may be.
    let line = format!("{}{}\n", " ".repeat(MAX_LINE - FIRST.len()), FIRST.trim_end());
    assert_eq!(line.len(), MAX_LINE);
    assert!(open(line).is_ok());
}

#[test]
fn many_lines_are_not_read_ahead() {
    // Endless as well: a call on an object that has no line is told at once all the same.
    let call = b"{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_GET_API_VERSION\",\"ok\":12}\n";
    let lines = Endless { first: Cursor::new(FIRST.into()), line: call, at: 0 };
    let kvm = Replay::new(io::BufReader::new(lines)).unwrap();
    for _ in 0..10_000 {
        assert_eq!(kvm.api_version(), Ok(12));
    }
    assert_eq!(kvm.check_extension(Capability::Irqfd).unwrap_err().errno, Errno::EPROTO);
    assert_eq!(kvm.difference().unwrap().line(), Some(10_002));
}

struct Endless {
    first: Cursor<Vec<u8>>,
    line: &'static [u8],
    at: usize,
}

impl Read for Endless {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.first.read(to)?;
        for byte in &mut to[n..] {
            *byte = self.line[self.at % self.line.len()];
            self.at += 1;
        }
        Ok(to.len())
    }
}

#[test]
fn a_reader_that_fails() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(5))
        }
    }
    let first = Cursor::new(FIRST.as_bytes());
    let kvm = Replay::new(io::BufReader::new(first.chain(Broken))).unwrap();
    assert!(kvm.api_version().is_err());
    let text = kvm.finish().unwrap_err().to_string();
    assert!(text.starts_with("line 2 of the transcript can't be read: "), "{text}");
}
