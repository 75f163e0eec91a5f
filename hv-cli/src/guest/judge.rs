//! Whether a check passed: what the guest observed against what the host saw.

use std::fmt::Write as _;

use hv_core::MsiStatus;

use super::check::Check;
use super::evidence::{Access, Evidence, Fault, Place, Sent};
use super::protocol::{BANNER, DOORBELL, DOORBELL_OTHER, DOORBELL_RINGS, LOOPBACK, MMIO, PORTS};
use super::protocol::{mmio, port, vector};

/// What was observed; `Err` if that is not what had to be.
pub(super) type Verdict = Result<String, String>;

// Intel SDM volume 3, 2.5 "Control Registers" and 2.2.1 "Extended Feature Enable Register".
const CR0_PG_PE: u32 = 1 << 31 | 1;
const CR4_PAE: u32 = 1 << 5;
const EFER_LMA_LME: u32 = 1 << 10 | 1 << 8;

/// Judges `check` by what was seen of it. `rom` is what the read-only page was filled with, where
/// the guest reads it.
pub(super) fn judge(check: Check, evidence: &Evidence, rom: u64) -> Verdict {
    if let Some(fault) = evidence.fault {
        return Err(describe_fault(fault));
    }
    if evidence.overflow {
        return Err("the guest did far more than the check asks for".into());
    }
    match check {
        Check::LongMode => long_mode(evidence),
        Check::Com1 => com1(evidence),
        Check::Port1 => round_trip(evidence, Place::Port(port::DATA), 1),
        Check::Port2 => round_trip(evidence, Place::Port(port::DATA), 2),
        Check::Port4 => round_trip(evidence, Place::Port(port::DATA), 4),
        Check::PortString => string(evidence, &[1, 2, 4], |_| Place::Port(port::STRING)),
        Check::Mmio1 => round_trip(evidence, Place::Mmio(mmio::DATA), 1),
        Check::Mmio2 => round_trip(evidence, Place::Mmio(mmio::DATA), 2),
        Check::Mmio4 => round_trip(evidence, Place::Mmio(mmio::DATA), 4),
        Check::Mmio8 => round_trip(evidence, Place::Mmio(mmio::DATA), 8),
        Check::MmioString => {
            string(evidence, &[1, 2, 4, 8], |offset| Place::Mmio(mmio::STRING + offset))
        }
        Check::Readonly => readonly(evidence, rom),
        Check::LapicTimer => interrupt(evidence, vector::TIMER, "from the local APIC's timer"),
        Check::Com1Ioapic => com1_ioapic(evidence),
        Check::PitIoapic => pit_ioapic(evidence),
        Check::Msi => sent(evidence, vector::MSI, "by KVM_SIGNAL_MSI"),
        Check::Irqfd => sent(evidence, vector::IRQFD, "by an irqfd"),
        Check::Ioeventfd => ioeventfd(evidence),
        Check::SecondVcpu => second_vcpu(evidence),
        Check::Ipi => ipi(evidence),
    }
}

fn verdict(passed: bool, observed: String) -> Verdict {
    if passed { Ok(observed) } else { Err(observed) }
}

/// The values in the numbers a check reports them, or what is wrong.
fn values<const N: usize>(evidence: &Evidence) -> Result<[u32; N], String> {
    <[u32; N]>::try_from(evidence.values.as_slice())
        .map_err(|_| format!("the guest reported {} values, not {N}", evidence.values.len()))
}

fn long_mode(evidence: &Evidence) -> Verdict {
    let [cr0, cr4, efer, cs, high] = values(evidence)?;
    verdict(
        cr0 & CR0_PG_PE == CR0_PG_PE
            && cr4 & CR4_PAE != 0
            && efer & EFER_LMA_LME == EFER_LMA_LME
            && cs == 0x10
            && high == 0x1122_3344,
        format!(
            "CR0 {cr0:#x}, CR4 {cr4:#x}, EFER {efer:#x}, CS {cs:#x}, upper half of a 64-bit \
             register {high:#x}"
        ),
    )
}

fn com1(evidence: &Evidence) -> Verdict {
    const READY: u32 = 0x60; // THRE and TEMT: nothing is waiting to be sent
    let [scratch, line_status] = values(evidence)?;
    verdict(
        scratch == 0xa55a && line_status & READY == READY && evidence.com1 == BANNER.as_bytes(),
        format!(
            "scratch register held {:#x} and {:#x}, line status {line_status:#x}, sent {:?}",
            scratch & 0xff,
            scratch >> 8,
            String::from_utf8_lossy(&evidence.com1)
        ),
    )
}

/// One read of a value the host chose, which the guest reports, and one write of its complement.
fn round_trip(evidence: &Evidence, place: Place, len: usize) -> Verdict {
    let reported = match (len, evidence.values.as_slice()) {
        (8, &[low, high]) => u64::from(high) << 32 | u64::from(low),
        (1 | 2 | 4, &[value]) => value.into(),
        (_, values) => return Err(format!("the guest reported {} values", values.len())),
    };
    let written = complement(reported, len);
    let expected = [Access::read(place, len, reported), Access::write(place, len, written)];
    if evidence.accesses == expected {
        let at = place_name(place);
        Ok(format!("guest read {reported:#x} and wrote {written:#x} at {at}, host saw the same"))
    } else {
        let seen = list(&evidence.accesses);
        Err(format!("guest read {reported:#x}, host saw {seen}"))
    }
}

/// Eight reads of each length, then the writes of their complements in the same order. `place` is
/// that of an access, by the bytes before it.
fn string(evidence: &Evidence, lens: &[usize], place: impl Fn(u64) -> Place) -> Verdict {
    let [] = values(evidence)?;
    let half = lens.len() * 8;
    let (reads, writes) = match evidence.accesses.split_at_checked(half) {
        Some((reads, writes)) if writes.len() == half => (reads, writes),
        _ => {
            let (n, twice) = (evidence.accesses.len(), 2 * half);
            return Err(format!("{n} accesses, not {twice}: {}", list(&evidence.accesses)));
        }
    };
    let mut offset = 0;
    let in_order = lens.iter().flat_map(|&len| [len; 8]);
    for (len, (&read, &write)) in in_order.zip(reads.iter().zip(writes)) {
        let place = place(offset);
        offset += len as u64;
        if read != Access::read(place, len, read.value) {
            return Err(format!("a read of {len} bytes was {}", list(&[read])));
        }
        if write != Access::write(place, len, complement(read.value, len)) {
            return Err(format!("after {} came {}", list(&[read]), list(&[write])));
        }
    }
    let lens: Vec<_> = lens.iter().map(ToString::to_string).collect();
    Ok(format!("8 reads and 8 writes each of {} bytes, all exact", lens.join(", ")))
}

fn complement(value: u64, len: usize) -> u64 {
    !value & mask(len)
}

/// The bits of `len` bytes.
pub(super) fn mask(len: usize) -> u64 {
    u32::try_from(len.saturating_mul(8))
        .ok()
        .and_then(|bits| 1u64.checked_shl(bits))
        .map_or(u64::MAX, |m| m - 1)
}

fn readonly(evidence: &Evidence, rom: u64) -> Verdict {
    let [low, high, low_again, high_again] = values(evidence)?;
    let before = u64::from(high) << 32 | u64::from(low);
    let after = u64::from(high_again) << 32 | u64::from(low_again);
    let exit = Access::write(Place::Mmio(mmio::ROM), 8, !rom);
    let host = match evidence.rom {
        Some(value) => format!("{value:#x}"),
        None => "that it can't be read".into(),
    };
    verdict(
        before == rom
            && after == rom
            && evidence.rom == Some(rom)
            && evidence.accesses.as_slice() == [exit],
        format!(
            "guest read {before:#x}, and {after:#x} after its write; host saw {} and finds {host}",
            list(&evidence.accesses),
        ),
    )
}

fn interrupt(evidence: &Evidence, vector: u32, how: &str) -> Verdict {
    let [count] = values(evidence)?;
    verdict(count == 1, arrived(vector, how, count))
}

fn arrived(vector: u32, how: &str, count: u32) -> String {
    match count {
        0 => format!("vector {vector:#x} {how} did not arrive"),
        1 => format!("vector {vector:#x} {how} arrived once"),
        n => format!("vector {vector:#x} {how} arrived {n} times"),
    }
}

fn com1_ioapic(evidence: &Evidence) -> Verdict {
    const DATA_AVAILABLE: u32 = 0b100; // of the interrupt identification register
    let [count, identification, byte] = values(evidence)?;
    let observed = arrived(vector::COM1, "from COM1 at its I/O APIC pin", count);
    verdict(
        count == 1 && identification & 0xf == DATA_AVAILABLE && byte == u32::from(LOOPBACK),
        format!("{observed}, IIR {identification:#x}, {byte:#x} came back in loopback mode"),
    )
}

fn pit_ioapic(evidence: &Evidence) -> Verdict {
    let [pin2, pin0] = values(evidence)?;
    let observed = arrived(vector::PIT, "from the PIT at I/O APIC pin 2", pin2);
    let at_pin0 = if pin0 == 0 { "none" } else { "it did" };
    verdict(pin2 == 1 && pin0 == 0, format!("{observed}; at pin 0: {at_pin0}"))
}

fn sent(evidence: &Evidence, vector: u32, how: &str) -> Verdict {
    let [count] = values(evidence)?;
    let observed = arrived(vector, how, count);
    match &evidence.sent {
        Some(Sent::Message(Ok(MsiStatus::Delivered)) | Sent::Event(Ok(()))) => {
            verdict(count == 1, observed)
        }
        Some(Sent::Message(Ok(status))) => Err(format!("{observed}; KVM says {status:?}")),
        Some(Sent::Message(Err(error))) => Err(format!("{observed}; {error}")),
        Some(Sent::Event(Err(error))) => {
            Err(format!("{observed}; the eventfd could not be written: {error}"))
        }
        None => Err(format!("{observed}; the guest did not ask for it")),
    }
}

fn ioeventfd(evidence: &Evidence) -> Verdict {
    let [] = values(evidence)?;
    // The write of another value shows that a write here would have been seen.
    let let_pass = Access::write(Place::Mmio(mmio::DOORBELL), 4, DOORBELL_OTHER.into());
    let events = evidence.doorbell;
    let rung = format!("{DOORBELL_RINGS} rings at {DOORBELL:#x} gave {events} events");
    match evidence.accesses.as_slice() {
        [exit] if *exit == let_pass => verdict(
            events == DOORBELL_RINGS,
            format!("{rung} and no exit; another value was an exit"),
        ),
        exits => Err(format!("{rung}; exits: {}", list(exits))),
    }
}

fn second_vcpu(evidence: &Evidence) -> Verdict {
    let [up, apic_id, cr0, efer] = values(evidence)?;
    if up == 0 {
        return Err("INIT and SIPI were sent, but it did not start".into());
    }
    verdict(
        apic_id == 1 && cr0 & CR0_PG_PE == CR0_PG_PE && efer & EFER_LMA_LME == EFER_LMA_LME,
        format!("started by INIT and SIPI: APIC ID {apic_id}, CR0 {cr0:#x}, EFER {efer:#x}"),
    )
}

fn ipi(evidence: &Evidence) -> Verdict {
    let [pong, ping] = values(evidence)?;
    let there = arrived(vector::PING, "to the second vCPU", ping);
    let back = arrived(vector::PONG, "back to the first", pong);
    verdict((ping, pong) == (1, 1), format!("{there}, {back}"))
}

fn describe_fault(fault: Fault) -> String {
    let Fault { vector, error_code, rip, cr2 } = fault;
    format!("exception {vector} at {rip:#x}, error code {error_code:#x}, CR2 {cr2:#x}")
}

/// The first few accesses in words.
fn list(accesses: &[Access]) -> String {
    const SHOWN: usize = 4;
    if accesses.is_empty() {
        return "no access".into();
    }
    let mut text = String::new();
    for (n, access) in accesses.iter().take(SHOWN).enumerate() {
        let comma = if n == 0 { "" } else { ", " };
        let verb = if access.is_write { "write" } else { "read" };
        let Access { len, value, .. } = access;
        let at = place_name(access.place);
        // Writing to a String does not fail.
        let _ = write!(text, "{comma}a {verb} of {len} bytes, {value:#x}, at {at}");
    }
    if let Some(more) = accesses.len().checked_sub(SHOWN).filter(|&more| more > 0) {
        let _ = write!(text, " and {more} more");
    }
    text
}

fn place_name(place: Place) -> String {
    match place {
        Place::Port(offset) => format!("port {:#x}", u64::from(PORTS) + u64::from(offset)),
        Place::Mmio(offset) => format!("{:#x}", MMIO.saturating_add(offset)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROM: u64 = 0x0123_4567_89ab_cdef;

    fn round_trip_evidence(place: Place, len: usize) -> Evidence {
        let value = ROM & mask(len);
        let mut values = vec![value as u32];
        if len == 8 {
            values.push((value >> 32) as u32);
        }
        let accesses =
            vec![Access::read(place, len, value), Access::write(place, len, !value & mask(len))];
        Evidence { accesses, values, ..Evidence::default() }
    }

    fn string_evidence(lens: &[usize], place: impl Fn(u64) -> Place) -> Evidence {
        let mut offset = 0;
        let mut reads = Vec::new();
        for len in lens.iter().flat_map(|&len| [len; 8]) {
            reads.push(Access::read(place(offset), len, (ROM + offset) & mask(len)));
            offset += len as u64;
        }
        let writes = reads.iter().map(|r| Access::write(r.place, r.len, !r.value & mask(r.len)));
        let accesses = reads.iter().copied().chain(writes).collect();
        Evidence { accesses, ..Evidence::default() }
    }

    fn with_values(values: &[u32]) -> Evidence {
        Evidence { values: values.to_vec(), ..Evidence::default() }
    }

    /// Evidence of a check that passed.
    fn good(check: Check) -> Evidence {
        let (low, high) = (ROM as u32, (ROM >> 32) as u32);
        let port = Place::Port(port::DATA);
        let address = Place::Mmio(mmio::DATA);
        match check {
            Check::LongMode => with_values(&[0x8000_0011, 0x20, 0x500, 0x10, 0x1122_3344]),
            Check::Com1 => Evidence { com1: BANNER.into(), ..with_values(&[0xa55a, 0x60]) },
            Check::Port1 => round_trip_evidence(port, 1),
            Check::Port2 => round_trip_evidence(port, 2),
            Check::Port4 => round_trip_evidence(port, 4),
            Check::PortString => string_evidence(&[1, 2, 4], |_| Place::Port(port::STRING)),
            Check::Mmio1 => round_trip_evidence(address, 1),
            Check::Mmio2 => round_trip_evidence(address, 2),
            Check::Mmio4 => round_trip_evidence(address, 4),
            Check::Mmio8 => round_trip_evidence(address, 8),
            Check::MmioString => {
                string_evidence(&[1, 2, 4, 8], |offset| Place::Mmio(mmio::STRING + offset))
            }
            Check::Readonly => Evidence {
                accesses: vec![Access::write(Place::Mmio(mmio::ROM), 8, !ROM)],
                rom: Some(ROM),
                ..with_values(&[low, high, low, high])
            },
            Check::LapicTimer => with_values(&[1]),
            Check::Com1Ioapic => with_values(&[1, 4, LOOPBACK.into()]),
            Check::PitIoapic => with_values(&[1, 0]),
            Check::Msi => {
                let sent = Some(Sent::Message(Ok(MsiStatus::Delivered)));
                Evidence { sent, ..with_values(&[1]) }
            }
            Check::Irqfd => Evidence { sent: Some(Sent::Event(Ok(()))), ..with_values(&[1]) },
            Check::Ioeventfd => {
                let place = Place::Mmio(mmio::DOORBELL);
                let accesses = vec![Access::write(place, 4, DOORBELL_OTHER.into())];
                Evidence { accesses, doorbell: DOORBELL_RINGS, ..Evidence::default() }
            }
            Check::SecondVcpu => with_values(&[1, 1, 0x8000_0011, 0x500]),
            Check::Ipi => with_values(&[1, 1]),
        }
    }

    fn fails(check: Check, why: &str, spoil: impl Fn(&mut Evidence)) {
        let mut evidence = good(check);
        spoil(&mut evidence);
        let verdict = judge(check, &evidence, ROM);
        assert!(verdict.is_err(), "{check:?} with {why} gave {verdict:?}");
    }

    #[test]
    fn good_evidence_passes() {
        for &check in Check::ALL {
            let verdict = judge(check, &good(check), ROM);
            assert!(verdict.is_ok(), "{check:?}: {verdict:?}");
        }
    }

    #[test]
    fn every_value_matters() {
        for &check in Check::ALL {
            let count = good(check).values.len();
            for n in 0..count {
                fails(check, "a value cleared or set", |e| {
                    e.values[n] = if e.values[n] == 0 { u32::MAX } else { 0 };
                });
            }
            fails(check, "a value too many", |e| e.values.push(0));
            if count > 0 {
                fails(check, "a value missing", |e| e.values.truncate(count - 1));
            }
        }
    }

    #[test]
    fn every_access_matters() {
        for &check in Check::ALL {
            for n in 0..good(check).accesses.len() {
                fails(check, "a wrong bit", |e| e.accesses[n].value ^= 1);
                fails(check, "a wrong length", |e| e.accesses[n].len += 1);
                fails(check, "a wrong place", |e| e.accesses[n].place = Place::Mmio(0xff0));
                fails(check, "the other direction", |e| e.accesses[n].is_write ^= true);
                fails(check, "an access missing", |e| {
                    e.accesses.remove(n);
                });
                fails(check, "an access twice", |e| e.accesses.insert(n, e.accesses[n]));
            }
        }
    }

    #[test]
    fn what_only_the_host_saw_matters() {
        fails(Check::Com1, "a lost byte", |e| e.com1.truncate(9));
        fails(Check::Readonly, "the page written", |e| e.rom = Some(!ROM));
        fails(Check::Readonly, "the page out of reach", |e| e.rom = None);
        fails(Check::Ioeventfd, "a ring lost", |e| e.doorbell -= 1);
        fails(Check::Ioeventfd, "a ring let pass", |e| e.doorbell += 1);
        fails(Check::Msi, "nothing sent", |e| e.sent = None);
        fails(Check::Irqfd, "a failed write", |e| {
            e.sent = Some(Sent::Event(Err(std::io::ErrorKind::WouldBlock)));
        });
        let fault = Fault { vector: 13, error_code: 0, rip: 0, cr2: 0 };
        for &check in Check::ALL {
            fails(check, "an exception", |e| e.fault = Some(fault));
            fails(check, "more than was kept", |e| e.overflow = true);
        }
    }

    #[test]
    fn lists_are_short_and_say_what_is_left_out() {
        let access = Access::write(Place::Port(port::DATA), 2, 0xbeef);
        assert_eq!(list(&[]), "no access");
        assert_eq!(list(&[access]), "a write of 2 bytes, 0xbeef, at port 0x520");
        assert!(list(&[access; 7]).ends_with(" and 3 more"));
        assert!(!list(&[access; 4]).contains("more"));
    }
}
