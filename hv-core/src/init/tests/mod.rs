//! Tests of init over mocks. Each row of the step table has its tests; [`ROWS`] says which.

mod faults;
mod host;
mod irq;
mod probe;
mod system;

use std::collections::BTreeSet;

use crate::init::Step;

/// The rows of the step table (the steps of [`Step`]) and the tests that pin each down: what it asks
/// and sets, then what happens when it fails.
const ROWS: [(u8, &[&str]); 18] = [
    (0, &["a_host_page_below_4_kib_is_an_error_before_anything_is_opened"]),
    (1, &["the_chosen_device_is_opened_once", "an_open_error_says_what_to_do"]),
    (
        2,
        &[
            "api_version_12_is_the_only_one",
            "api_version_0_is_an_error_not_success",
            "a_failing_api_version_means_not_kvm",
        ],
    ),
    (
        3,
        &[
            "vcpu_limits_fall_back_to_nr_vcpus_and_then_to_4",
            "too_many_vcpus_names_both_numbers",
            "no_vcpus_is_an_error",
            "a_vcpu_id_at_the_limit_is_an_error",
            "more_vcpus_than_recommended_is_a_consequence",
        ],
    ),
    (
        4,
        &[
            "create_vm_retries_eintr_with_a_bound",
            "create_vm_gives_up_on_eintr",
            "a_vm_that_cant_be_created_names_the_errno",
        ],
    ),
    (
        5,
        &[
            "all_missing_capabilities_are_reported_at_once_by_name",
            "each_required_capability_is_required",
            "join_is_required_unless_the_caller_accepts_its_absence",
            "capabilities_are_asked_of_the_vm_if_it_takes_the_question",
        ],
    ),
    (6, &["the_coalesced_ring_is_a_page_index"]),
    (7, &["join_is_required_unless_the_caller_accepts_its_absence", "memory_limits_are_recorded"]),
    (8, &["each_state_capability_sets_its_own_field"]),
    (9, &["msis_are_direct_or_need_dynamic_routes"]),
    (10, &["intx_capabilities_set_their_own_fields"]),
    (
        11,
        &[
            "the_msr_list_is_asked_for_with_no_room_then_with_enough",
            "an_msr_list_that_keeps_growing_is_e2big",
            "the_identity_map_moves_if_it_can_and_the_tss_follows",
            "mmu_pages_are_set_only_when_asked_for",
            "arch_errors_name_the_ioctl_and_the_errno",
        ],
    ),
    (
        12,
        &[
            "an_irqchip_off_asks_and_creates_nothing",
            "an_irqchip_in_the_kernel_has_the_timer_unless_told_otherwise",
            "a_split_irqchip_reserves_its_pins",
            "an_irqchip_asked_for_and_missing_is_an_error_never_a_fallback",
            "an_irqchip_that_cant_be_created_names_the_errno",
        ],
    ),
    (
        13,
        &[
            "the_gsi_bitmap_is_whole_words_with_the_rest_taken",
            "without_routing_there_is_no_hpet",
            "msis_are_direct_or_need_dynamic_routes",
        ],
    ),
    (14, &["irqfds_are_probed_and_follow_irqchip_and_routing"]),
    (
        15,
        &[
            "slots_come_before_the_irqchip_and_doorbells_after",
            "a_replay_that_fails_names_the_slot_or_address",
            "a_replay_that_needs_a_missing_capability_says_which",
        ],
    ),
    (
        16,
        &[
            "seven_ioeventfds_are_assigned_and_removed_in_reverse",
            "no_room_for_seven_is_no",
            "any_other_failure_of_the_probe_is_no_answer_and_no_error",
            "the_probe_is_made_only_when_asked_for",
            "ioeventfds_the_probe_leaves_are_a_consequence",
        ],
    ),
    (17, &["the_kick_is_installed_last", "a_kick_that_cant_be_installed_undoes_everything"]),
];

const SOURCES: [&str; 4] = [
    include_str!("faults.rs"),
    include_str!("irq.rs"),
    include_str!("probe.rs"),
    include_str!("system.rs"),
];

#[test]
fn every_row_of_the_step_table_names_tests_that_exist() {
    let rows: Vec<u8> = ROWS.iter().map(|(row, _)| *row).collect();
    let steps: Vec<u8> = Step::ALL.iter().map(|step| step.number()).collect();
    assert_eq!(rows, steps);
    for (row, tests) in ROWS {
        assert!(!tests.is_empty(), "row {row}");
        for test in tests {
            let definition = format!("#[test]\nfn {test}() {{");
            let found = SOURCES.iter().map(|s| s.matches(&definition).count()).sum::<usize>();
            assert_eq!(found, 1, "row {row}: {test}");
        }
    }
}

#[test]
fn every_test_is_in_the_table_or_about_all_rows() {
    let named: BTreeSet<&str> = ROWS.iter().flat_map(|(_, tests)| *tests).copied().collect();
    let about_all = [
        "the_whole_sequence_in_its_order",
        "no_capability_is_asked_for_twice",
        "every_call_fails_in_turn_and_everything_is_undone",
        "a_vm_is_closed_before_its_hypervisor",
    ];
    for source in SOURCES {
        for test in source.split("#[test]\nfn ").skip(1) {
            let name = test.split('(').next().unwrap();
            assert!(named.contains(name) || about_all.contains(&name), "{name} is in no row");
        }
    }
}
