//! Random sequences of calls and guest accesses, done to the KVM in memory and to `/dev/kvm` side by
//! side: every answer and, after every step, the registers of the interrupt controllers must be the
//! same. It finds the rules nobody thought of; each one found becomes a case of the conformance
//! suite. Where the two differ, KVM is right.
//!
//! The sequences are the same in every run. `HV_DIFFERENCE_SEED` makes others, and
//! `HV_DIFFERENCE_SEQUENCES` more of them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;
mod conformance;
mod difference;

use std::env;
use std::io::{self, Write};

use difference::{Pair, Profile, Random, steps};

/// How many differences are shown before a test gives up.
const SHOWN: usize = 8;

fn number(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
        Err(_) => default,
    }
}

fn compare(profile: Profile, sequences: u64) {
    let seed = number("HV_DIFFERENCE_SEED", 1);
    let sequences = number("HV_DIFFERENCE_SEQUENCES", sequences);
    let pair = Pair::open();
    let mut found = Vec::new();
    let mut done = 0;
    for n in 0..sequences {
        let steps = steps(profile, &mut Random::new(seed.wrapping_add(n << 32)));
        done += steps.len();
        if let Some(difference) = pair.compare(steps) {
            found.push(format!("sequence {n}:\n{difference}\n"));
            if found.len() == SHOWN {
                break;
            }
        }
    }
    // Past the capture of the test harness: how much was compared is the result.
    let mut out = io::stdout();
    writeln!(out, "{profile:?}: {done} steps, seed {seed}").unwrap();
    assert!(found.is_empty(), "with HV_DIFFERENCE_SEED={seed}:\n{}", found.join("\n"));
}

#[test]
fn interrupts_of_a_full_irqchip() {
    compare(Profile::Full, 150);
}

#[test]
fn interrupts_of_a_split_irqchip() {
    compare(Profile::Split, 100);
}

#[test]
fn memory_and_doorbells() {
    compare(Profile::Memory, 100);
}

#[test]
fn memory_and_dirty_rings() {
    compare(Profile::Rings, 100);
}

#[test]
fn order_of_creation() {
    compare(Profile::Creation, 100);
}
