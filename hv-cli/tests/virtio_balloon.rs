//! The memory balloon with a driver over PCI, on the KVM in memory: what is given back is zero and nothing
//! else changes, whatever page numbers the driver has.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use hv_cli::virtio::{BALLOON_PAGE, Balloon, BalloonTarget};
use hv_core::fake::Finding;
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
const NUMBERS: u64 = 0x8_0000;
const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
/// Pages of the machine's RAM below the hole, and of all.
const LOW_PAGES: u32 = (LOW_RAM / BALLOON_PAGE) as u32;
const PAGES: u32 = (RAM / BALLOON_PAGE) as u32;
const HIGH_PAGE: u32 = (HIGH_RAM / BALLOON_PAGE) as u32;

fn never(_: &Finding) -> bool {
    false
}

struct Bench<'a> {
    driver: Driver<'a>,
    target: BalloonTarget,
    rings: Vec<Ring>,
    used: [std::cell::Cell<u16>; 5],
}

impl<'a> Bench<'a> {
    fn new(machine: &'a Machine, pages: u32, features: u64) -> Self {
        let device = Balloon::new(machine.ram.clone(), pages).unwrap();
        let target = device.target();
        let driver = machine.add(device);
        assert_eq!(driver.features() & 0x3f, F_STATS | F_DEFLATE_ON_OOM | F_REPORTING);
        let at = [0x1_0000, 0x1_4000, 0x1_8000, 0x1_c000, 0x2_0000];
        let rings: Vec<_> = at.iter().map(|at| Ring::new(machine, *at, 64)).collect();
        driver.start_all(VERSION_1 | features, &rings.iter().collect::<Vec<_>>());
        Self { driver, target, rings, used: Default::default() }
    }

    fn request(&self, queue: u16, buffer: (u64, u32, u16)) {
        let index = usize::from(queue);
        self.driver.offer(queue, &self.rings[index], 0, buffer);
        let used = &self.used[index];
        used.set(used.get() + 1);
        self.rings[index].wait_for_used(used.get());
    }

    fn pages(&self, queue: u16, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.machine.memory.write_slice(&bytes, GuestAddress(NUMBERS)).unwrap();
        self.request(queue, (NUMBERS, bytes.len() as u32, 0));
    }

    fn errors(&self) -> u64 {
        self.driver.counters().errors
    }

    /// Fills pages with their numbers.
    fn mark(&self, pages: impl IntoIterator<Item = u32>) {
        for page in pages {
            self.driver.machine.memory.write_obj(page, address(page)).unwrap();
        }
    }

    fn marks<const N: usize>(&self, pages: [u32; N]) -> [u32; N] {
        pages.map(|page| self.driver.machine.memory.read_obj(address(page)).unwrap())
    }
}

fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * BALLOON_PAGE)
}

fn with_balloon(pages: u32, features: u64, test: impl FnOnce(&Bench<'_>)) {
    let machine = Machine::new();
    let bench = Bench::new(&machine, pages, features);
    test(&bench);
    assert_eq!(bench.driver.counters().needs_reset, 0);
    drop(bench.driver);
    machine.end(never);
}

/// The driver inflates with these page numbers: which of the marked pages are left as they were.
fn inflates(numbers: &[u32], kept: [u32; 3], given: [u32; 3], errors: u64) {
    with_balloon(0, 0, |bench| {
        bench.mark(kept.into_iter().chain(given));
        bench.pages(INFLATE, numbers);
        assert_eq!((bench.marks(kept), bench.marks(given)), (kept, [0; 3]));
        assert_eq!(bench.errors(), errors);
    });
}

#[test]
fn pages_in_the_balloon_are_given_back_and_come_back_as_zeros() {
    with_balloon(0, 0, |bench| {
        bench.mark(200..210);
        // In the order Linux has them, which is none.
        bench.pages(INFLATE, &[203, 201, 202, 205]);
        assert_eq!(bench.marks([200, 201, 202, 203, 204, 205, 206]), [200, 0, 0, 0, 204, 0, 206]);
        assert_eq!(bench.target.given_back(), 4 * BALLOON_PAGE);
        bench.pages(DEFLATE, &[201, 202]);
        bench.mark([201]);
        assert_eq!(bench.marks([201, 202]), [201, 0]);
        assert_eq!(bench.errors(), 0);
    });
}

#[test]
fn page_numbers_beyond_ram() {
    let beyond = [HIGH_PAGE + LOW_PAGES, HIGH_PAGE + LOW_PAGES + 9, u32::MAX, u32::MAX - 1];
    inflates(&beyond, [200, 201, HIGH_PAGE], [0; 3], 3);
}

#[test]
fn page_numbers_in_no_region() {
    inflates(
        &[LOW_PAGES, LOW_PAGES + 1, HIGH_PAGE - 1],
        [200, LOW_PAGES - 1, HIGH_PAGE],
        [0; 3],
        2,
    );
}

#[test]
fn runs_of_pages_across_the_end_of_ram() {
    let around = |page: u32| [page - 2, page - 1, page, page + 1];
    let numbers = [around(LOW_PAGES), around(HIGH_PAGE)].concat();
    let given = [LOW_PAGES - 1, HIGH_PAGE, HIGH_PAGE + 1];
    inflates(&numbers, [LOW_PAGES - 3, HIGH_PAGE + 2, 200], given, 2);
}

#[test]
fn the_same_page_many_times() {
    inflates(&[201; 1000], [200, 202, 203], [201; 3], 0);
}

#[test]
fn half_a_page_number_and_none() {
    with_balloon(0, 0, |bench| {
        bench.mark([200, 201]);
        bench.driver.machine.memory.write_obj([200u32, 201], GuestAddress(NUMBERS)).unwrap();
        bench.request(INFLATE, (NUMBERS, 7, 0));
        assert_eq!((bench.marks([200, 201]), bench.errors()), ([0, 201], 1));
        bench.request(INFLATE, (NUMBERS, 0, 0));
        bench.request(INFLATE, (NUMBERS, 8, WRITE));
        bench.request(DEFLATE, (NUMBERS, 3, 0));
        assert_eq!(bench.errors(), 1);
    });
}

#[test]
fn a_huge_count_of_page_numbers() {
    with_balloon(0, 0, |bench| {
        // 15 MiB of zeros: page 0, nearly four million times.
        bench.mark([0, 1]);
        let ring = &bench.rings[0];
        for index in 0..15 {
            let flags = if index == 14 { 0 } else { NEXT };
            ring.descriptor(index, HIGH_RAM, LOW_RAM as u32, flags, index + 1);
        }
        ring.offer(0);
        bench.driver.ring(INFLATE);
        ring.wait_for_used(1);
        assert_eq!((bench.marks([0, 1]), bench.errors()), ([0, 1], 1));
        assert_eq!(bench.target.given_back(), BALLOON_PAGE);
    });
}

#[test]
fn all_of_ram_with_the_rings_in_it() {
    let machine = Machine::new();
    let bench = Bench::new(&machine, 0, 0);
    let numbers: Vec<u32> = (0..LOW_PAGES).chain(HIGH_PAGE..HIGH_PAGE + LOW_PAGES).collect();
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    machine.memory.write_slice(&bytes, GuestAddress(NUMBERS)).unwrap();
    bench.driver.offer(INFLATE, &bench.rings[0], 0, (NUMBERS, bytes.len() as u32, 0));
    // The rings are zeros then, which no ring that was in use can be.
    bench.driver.wait_for_needs_reset();
    assert_eq!(bench.target.given_back(), RAM);
    assert!(bench.driver.failure().contains("more requests are available"));
    bench.driver.start_all(VERSION_1, &bench.rings.iter().collect::<Vec<_>>());
    bench.mark([200, 201]);
    bench.pages(INFLATE, &[200]);
    assert_eq!(bench.marks([200, 201]), [0, 201]);
    drop(bench.driver);
    machine.end(never);
}

#[test]
fn free_pages_that_are_reported_are_given_back() {
    // Where drivers have the queue: by the specification, and by counting only what there is.
    for (queue, features) in [(4, F_STATS), (3, F_STATS), (2, 0), (4, 0)] {
        with_balloon(0, F_REPORTING | features, |bench| {
            bench.mark(200..210);
            bench.request(queue, (201 * BALLOON_PAGE, 3 * 4096, WRITE));
            assert_eq!(bench.marks([200, 201, 202, 203, 204]), [200, 0, 0, 0, 204]);
            assert_eq!(bench.rings[usize::from(queue)].used_element(0), (0, 0));
            assert_eq!(bench.errors(), 0);
        });
    }
}

#[test]
fn reports_of_parts_of_pages_keep_them() {
    with_balloon(0, F_REPORTING, |bench| {
        bench.mark(200..204);
        bench.request(4, (200 * BALLOON_PAGE + 1, 2 * 4096 - 1, WRITE));
        assert_eq!(bench.marks([200, 201, 202]), [200, 0, 202]);
        bench.request(4, (202 * BALLOON_PAGE, 4095, WRITE));
        bench.request(4, (202 * BALLOON_PAGE, 4096, 0));
        assert_eq!(bench.marks([202, 203]), [202, 203], "too short, and nothing to give");
        assert_eq!(bench.errors(), 2);
    });
}

#[test]
fn a_report_outside_memory_asks_for_a_reset() {
    let machine = Machine::new();
    let bench = Bench::new(&machine, 0, F_REPORTING);
    bench.driver.offer(4, &bench.rings[4], 0, (LOW_RAM - 4096, 8192, WRITE));
    bench.driver.wait_for_needs_reset();
    assert!(bench.driver.failure().contains("not guest memory"), "{}", bench.driver.failure());
    drop(bench.driver);
    machine.end(never);
}

#[test]
fn the_target_is_there_from_the_start_and_changes_while_it_runs() {
    with_balloon(64, 0, |bench| {
        let target = &bench.target;
        assert_eq!(bench.driver.device_config(0), 64u32.to_le_bytes());
        assert_eq!((target.pages(), target.actual()), (64, 0));
        bench.driver.write_device_config(4, &64u32.to_le_bytes());
        assert_eq!(target.actual(), 64);
        bench.driver.write_device_config(0, &[9; 4]);
        assert_eq!(target.pages(), 64, "it is not the driver's");
        wait_for("the first interrupt", || bench.driver.isr() & 2 != 0);
        let other = target.clone();
        std::thread::spawn(move || other.set_pages(10)).join().unwrap();
        wait_for("the interrupt", || bench.driver.isr() & 2 != 0);
        assert_eq!(bench.driver.device_config(0), 10u32.to_le_bytes());
        assert_eq!(target.set_pages(u32::MAX), PAGES, "there is no more");
        assert_eq!(bench.driver.device_config(0), PAGES.to_le_bytes());
        bench.driver.reset();
        assert_eq!((target.pages(), target.actual()), (PAGES, 0));
    });
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    with_balloon(0, F_STATS, |bench| {
        let (ring, target) = (&bench.rings[usize::from(STATS)], &bench.target);
        let tell = |entries: &[(u16, u64)]| {
            let entry =
                |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
            let bytes: Vec<u8> = entries.iter().flat_map(entry).collect();
            bench.driver.machine.memory.write_slice(&bytes, GuestAddress(NUMBERS)).unwrap();
            bench.driver.offer(STATS, ring, 0, (NUMBERS, bytes.len() as u32, 0));
        };
        tell(&[(4, 12345), (5, 99), (0xffff, 1), (10, 2)]);
        wait_for("statistics", || !target.statistics().is_empty());
        let told: Vec<_> = target.statistics().into_iter().collect();
        assert_eq!(told, [("free-memory", 12345), ("total-memory", 99)]);
        assert_eq!(ring.used_index(), 0, "the request waits");
        target.ask_statistics();
        ring.wait_for_used(1);
        tell(&[(4, 1)]);
        wait_for("other statistics", || target.statistics().get("free-memory") == Some(&1));
        // A second one gets the first back; one that is too long is looked at in part.
        bench.driver.offer(STATS, ring, 1, (0, LOW_RAM as u32, 0));
        ring.wait_for_used(2);
        assert_eq!((ring.used_element(1), bench.errors()), ((0, 0), 1));
    });
}
